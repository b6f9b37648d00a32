"""match_tokens compiles for sm_80 and sm_90 at every shape class within the gates."""

import pytest
import torch

from fastreduce.kernels import match_tokens as kernels
from tests.compiled.gates import ARCHES, check_gates, with_dtypes
from tests.helpers.inputs import DTYPES


def reports_for(arch, metric, *, r=None, prefix=1, separately=False):
    """Compile the matching and the slots; where keys are averaged ``separately``, that is the first of the launches."""
    r = (metric.shape[-2] - prefix) // 2 if r is None else r
    reports = check_gates(arch, lambda: kernels.match_tokens(metric, r, prefix), wide=False)
    names = ["mean_keys_kernel"] * separately + ["best_match_kernel", "assign_slots_kernel"]
    one_head = separately or metric.ndim == 3
    if one_head and lengths(metric.shape[-1], metric.dtype):
        names.insert(separately, "squared_lengths_kernel")  # before channels in chunks
    assert [report.name for report in reports] == names + ["group_slots_kernel"] * (metric.shape[-2] > 640)
    mean, (similarity, slots) = reports[0], reports[len(names) - 2 : len(names)]
    # Tensor cores for half precision; none for float32, where they would round the inputs to 11 bits.
    assert (similarity.mma_ops > 0) == (metric.dtype != torch.float32), similarity
    if separately:
        assert mean.registers <= 64, mean
        assert metric.shape[-1] % 8 or set(mean.load_bytes) == set(mean.store_bytes) == {16}, mean
    return similarity, slots


def lengths(dim, dtype):
    """Return width of the loads of squared lengths, which channels in chunks take."""
    return {4} if dim > kernels.match_tile(1000, dim, dtype)["BLOCK_D"] else set()


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("dim", "dtype"), with_dtypes([32, 64, 72, 1024]))
def test_gates(dim, dtype, arch):
    similarity, _ = reports_for(arch, torch.zeros(2, 197, dim, dtype=dtype))
    assert set(similarity.load_bytes) == {16} | lengths(dim, dtype), similarity
    assert similarity.registers <= 128, similarity


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("num_tokens", "heads", "dim", "dtype", "separately"),
    [
        (197, 12, 64, torch.float16, False),
        (257, 16, 72, torch.bfloat16, False),
        (577, 12, 128, torch.bfloat16, False),
        (1025, 16, 64, torch.float16, False),
        (4097, 16, 72, torch.float16, True),
        (197, 12, 80, torch.float32, False),
        (1025, 6, 64, torch.float32, False),
        (4097, 3, 64, torch.float32, True),
    ],
)
def test_gates_of_keys(num_tokens, heads, dim, dtype, separately, arch):
    keys = torch.zeros(2, num_tokens, 3, heads, dim, dtype=dtype).permute(2, 0, 3, 1, 4)[1]
    similarity, _ = reports_for(arch, keys, separately=separately)
    narrow = {4} if dtype == torch.float32 and num_tokens == 1025 else set()  # 32 odd tokens: one number a thread
    assert set(similarity.load_bytes) == {16} | narrow | (lengths(dim, dtype) if separately else set()), similarity


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(("width", "dim"), [(33, 33), (192, 64)])
def test_gates_of_other_widths_and_strides(width, dim, dtype, arch):
    reports_for(arch, torch.zeros(2, 198, width, dtype=dtype)[..., :dim], prefix=2)
    keys = torch.zeros(2, 3, 198, width, dtype=dtype)[..., :dim]
    reports_for(arch, keys, prefix=2, separately=width % 8 > 0)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("num_tokens", [3, 320, 640, 4097, 20000])
def test_gates_of_the_slots(num_tokens, arch):
    _, slots = reports_for(arch, torch.zeros(2, num_tokens, 64, dtype=torch.float16))
    assert slots.registers <= 80, slots
    if num_tokens % 16 == 0:  # a pair of slots at once, where every image's row is aligned
        assert 16 in slots.store_bytes, slots


@pytest.mark.parametrize("r", [0, 1, 16])
def test_gates_of_the_number_merged(r):
    reports_for(90, torch.zeros(2, 197, 64, dtype=torch.bfloat16), r=r)
