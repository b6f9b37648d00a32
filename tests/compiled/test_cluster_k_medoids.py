"""cluster_k_medoids compiles for sm_80 and sm_90 at every shape class within the gates."""

import pytest
import torch

from fastreduce.kernels import cluster_k_medoids as kernels
from tests.compiled.gates import ARCHES, check_gates
from tests.helpers.inputs import DTYPES


def reports_for(arch, x, weights, *, k=None):
    k = x.shape[1] // 2 if k is None else k
    lengths, *reports = check_gates(arch, lambda: kernels.cluster_k_medoids(x, weights, k, 3), wide=False)
    assert lengths.name == "squared_lengths_kernel"
    return reports


def distances_of(x, weights):
    cost, centers = torch.zeros(x.shape[:2]), torch.zeros(2, 98, dtype=torch.int64)
    distance = torch.zeros(2, x.shape[1], -(-x.shape[1] // 16) * 16)
    return lambda: kernels.token_distances(x, torch.zeros(x.shape[:2]), weights, distance, cost, centers, range(2))


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
    check_gates(arch, distances_of(x, torch.zeros(2, 396, dtype=dtype)[:, ::2]), wide=False)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("num_tokens", [196, 1024, 4096])
def test_gates_of_the_iterations(num_tokens, arch):
    x, weights = torch.zeros(2, num_tokens, 64, dtype=torch.float16), torch.zeros(2, num_tokens)
    *_, report = reports_for(arch, x, weights)
    assert report.registers <= 64, report
    if num_tokens >= 196:  # a thread has four distances of a row
        assert 16 in report.load_bytes, report


@pytest.mark.parametrize("k", [1, 196])
def test_gates_of_the_number_of_clusters(k):
    reports_for(90, torch.zeros(2, 196, 64, dtype=torch.bfloat16), torch.zeros(2, 196), k=k)
