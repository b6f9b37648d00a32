"""cluster_k_medoids compiles for sm_80 and sm_90 at every shape class within the gates."""

import pytest
import torch

from fastreduce.kernels import cluster_k_medoids as kernels
from tests.compiled.gates import ARCHES, check_gates
from tests.helpers.inputs import DTYPES


def reports_for(arch, x, weights, *, k=None, members=False):
    k = x.shape[1] // 2 if k is None else k
    lengths, *reports = check_gates(arch, lambda: kernels.cluster_k_medoids(x, weights, k, 3, members, 0), wide=False)
    assert lengths.name == "squared_lengths_kernel"
    return reports


def distances_of(x, weights):
    cost, centers = torch.zeros(x.shape[:2]), torch.zeros(2, 98, dtype=torch.int64)
    return lambda: kernels.token_distances(x, torch.zeros(x.shape[:2]), weights, cost, centers)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("channels", "dtype"), [(48, DTYPES[1]), (384, DTYPES[0]), (384, DTYPES[2])])
def test_gates_of_the_distances(channels, dtype, arch):
    x = torch.zeros(2, 197, channels, dtype=dtype)[:, 1:]
    (report,) = check_gates(arch, distances_of(x, torch.zeros(2, 196)), wide=False)
    # Tensor cores for half precision; none for float32, where they would round the inputs to 11 bits.
    assert (report.mma_ops > 0) == (dtype != torch.float32), report
    assert 16 in report.load_bytes, report
    assert 16 in report.store_bytes, report


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(("width", "channels"), [(33, 33), (192, 64)])
def test_gates_of_other_widths_and_strides(width, channels, dtype, arch):
    x = torch.zeros(2, 198, width, dtype=dtype)[..., :channels]
    for weights in (None, torch.zeros(2, 396, dtype=dtype)[:, ::2]):
        check_gates(arch, distances_of(x, weights), wide=False)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("weighted", "members"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("num_tokens", [196, 1024])
def test_gates_of_the_iterations(num_tokens, weighted, members, arch):
    weights = torch.zeros(2, num_tokens) if weighted else None
    *_, report = reports_for(arch, torch.zeros(2, num_tokens, 64, dtype=torch.float16), weights, members=members)
    assert report.registers <= 64, report
    if num_tokens >= 196:  # a thread has four distances of a row
        assert 16 in report.load_bytes, report


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("width", "channels", "dtype"), [(384, 384, DTYPES[1]), (33, 33, DTYPES[0])])
def test_gates_of_distances_computed_again(width, channels, dtype, arch):
    x = torch.zeros(2, 4097, width, dtype=dtype)[:, 1:, :channels]
    reports = reports_for(arch, x, torch.zeros(2, 4096), members=True) + reports_for(arch, x, None)
    names = {report.name for report in reports}
    again = {"farthest_first_again", "assign_again", "cost_of_members_again", "cheapest_of_each", "token_costs"}
    assert names == {f"{name}_kernel" for name in again}
    for report in reports:
        compares_tiles = report.name not in ("farthest_first_again_kernel", "cheapest_of_each_kernel")
        assert (report.mma_ops > 0) == (compares_tiles and dtype != torch.float32), report
        if width == 384 and report.name != "cheapest_of_each_kernel":
            assert 16 in report.load_bytes, report


@pytest.mark.parametrize("k", [1, 196])
def test_gates_of_the_number_of_clusters(k):
    reports_for(90, torch.zeros(2, 196, 64, dtype=torch.bfloat16), torch.zeros(2, 196), k=k)
