"""match_tokens compiles for sm_80 and sm_90 at every shape class within the gates."""

import pytest
import torch

from fastreduce.kernels import match_tokens as kernels
from tests.compiled.gates import ARCHES, check_gates, with_dtypes
from tests.inputs import DTYPES


def reports_for(arch, metric, *, r=None, prefix=1):
    r = (metric.shape[-2] - prefix) // 2 if r is None else r
    reports = check_gates(arch, lambda: kernels.match_tokens(metric, r, prefix), wide=False)
    similarity, slots, *groups = (report for report in reports if report.name != "mean_keys_kernel")
    assert len(groups) == (metric.shape[-2] > kernels.MAX_GROUPED)
    # Tensor cores for half precision; none for float32, where they would round the inputs to 11 bits.
    assert (similarity.mma_ops > 0) == (metric.dtype != torch.float32), similarity
    return similarity, slots


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("dim", "dtype"), with_dtypes([32, 64, 80, 1024]))
def test_gates(dim, dtype, arch):
    similarity, _ = reports_for(arch, torch.zeros(2, 197, dim, dtype=dtype))
    assert set(similarity.load_bytes) == {16}, similarity
    assert similarity.registers <= 128, similarity


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("num_tokens", "dim", "dtype", "separately"),
    [
        (197, 64, torch.float16, False),
        (577, 128, torch.bfloat16, False),
        (642, 64, torch.float16, True),
        (197, 80, torch.float32, True),
    ],
)
def test_gates_of_keys(num_tokens, dim, dtype, separately, arch):
    keys = torch.zeros(2, num_tokens, 3, 12, dim, dtype=dtype).permute(2, 0, 3, 1, 4)[1]
    similarity, _ = reports_for(arch, keys)
    assert set(similarity.load_bytes) == {16}, similarity
    assert similarity.registers <= 224, similarity
    if separately:
        (mean,) = check_gates(arch, lambda: kernels.mean_keys(keys))
        assert mean.registers <= 64, mean


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(("width", "dim"), [(33, 33), (192, 64)])
def test_gates_of_other_widths_and_strides(width, dim, dtype, arch):
    reports_for(arch, torch.zeros(2, 198, width, dtype=dtype)[..., :dim], prefix=2)
    reports_for(arch, torch.zeros(2, 3, 198, width, dtype=dtype)[..., :dim], prefix=2)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("num_tokens", [2, 320, 640, 4097, 20000])
def test_gates_of_the_slots(num_tokens, arch):
    _, slots = reports_for(arch, torch.zeros(2, num_tokens, 64, dtype=torch.float16))
    assert slots.registers <= 80, slots
    if num_tokens % 16 == 0:  # a pair of slots at once, where every image's row is aligned
        assert 16 in slots.store_bytes, slots


@pytest.mark.parametrize("r", [0, 1, 16])
def test_gates_of_the_number_merged(r):
    reports_for(90, torch.zeros(2, 197, 64, dtype=torch.bfloat16), r=r)
