"""match_tokens compiles for sm_80 and sm_90 at every shape class within the gates."""

import pytest
import torch

from fastreduce.kernels import match_tokens as kernels
from tests.compiled.gates import ARCHES, check_gates, with_dtypes
from tests.inputs import DTYPES


def reports_for(arch, metric, *, r=None, prefix=1):
    r = (metric.shape[1] - prefix) // 2 if r is None else r
    similarity, slots, *groups = check_gates(arch, lambda: kernels.match_tokens(metric, r, prefix), wide=False)
    assert len(groups) == (metric.shape[1] > kernels.MAX_GROUPED)
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
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(("width", "dim"), [(33, 33), (192, 64), (15, 10)])
def test_gates_of_other_widths_and_strides(width, dim, dtype, arch):
    reports_for(arch, torch.zeros(2, 198, width, dtype=dtype)[..., :dim], prefix=2)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("num_tokens", [2, 197, 320, 577, 640, 1025, 4097, 8192, 20000])
def test_gates_of_the_slots(num_tokens, arch):
    _, slots = reports_for(arch, torch.zeros(2, num_tokens, 64, dtype=torch.float16))
    assert slots.registers <= 80, slots
    if num_tokens % 16 == 0:  # a pair of slots at once, where every image's row is aligned
        assert 16 in slots.store_bytes, slots


@pytest.mark.parametrize("r", [0, 1, 16])
def test_gates_of_the_number_merged(r):
    reports_for(90, torch.zeros(2, 197, 64, dtype=torch.bfloat16), r=r)
