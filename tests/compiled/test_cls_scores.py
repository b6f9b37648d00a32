"""cls_scores compiles for sm_80 and sm_90 at every shape class within the gates."""

import pytest
import torch

from fastreduce.kernels import cls_scores as kernels
from tests.compiled.gates import ARCHES, check_gates

# (heads, tokens, head_dim): DeiT-T/S/B and more tokens, then head widths of which some are no powers of two; of 72, as
# SigLIP has them, and odd heads, no stride is a multiple of 16
CLASSES = [(3, 197, 64), (6, 577, 64), (12, 1025, 64), (16, 4096, 64)]  # multiples of 16 compile apart
WIDTHS = [(12, 197, 32), (3, 197, 72), (8, 197, 80), (8, 577, 128), (4, 197, 256)]
CASES = [
    *((shape, torch.float16) for shape in CLASSES + WIDTHS),
    *((shape, torch.float32) for shape in (CLASSES[3], WIDTHS[0], WIDTHS[1], WIDTHS[4])),  # takes most registers
    (CLASSES[1], torch.bfloat16),
]


def packed(heads, tokens, head_dim, dtype):
    q, k, _ = torch.zeros(2, tokens, 3, heads, head_dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    return q[:, :, 0], k


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_gates(shape, dtype, arch):
    heads, tokens, head_dim = shape
    q, k = packed(heads, tokens, head_dim, dtype)
    logits, logsumexp = torch.zeros(2, heads, tokens), torch.zeros(2, heads)
    grad = torch.zeros(2, tokens - 1)

    stream, _ = check_gates(arch, lambda: kernels.cls_scores(q, k, 1, 0.125), wide=False)
    assert max(stream.load_bytes) == 16, stream  # K; logits and scores start at odd rows and are few
    (backward,) = check_gates(arch, lambda: kernels.cls_scores_backward(grad, q, k, logits, logsumexp, 1, 0.125))
    assert backward.registers <= 128, backward


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("shape", "dtype"), [CASES[0], CASES[3], CASES[5], CASES[-2]])
def test_gates_of_valid_keys_and_values(shape, dtype, arch):
    heads, tokens, head_dim = shape
    q, k = packed(heads, tokens, head_dim, dtype)
    valid = torch.zeros(2, tokens, dtype=torch.bool)
    for mask in (None, valid):
        both, _ = check_gates(arch, lambda: kernels.cls_value_scores(q, k, k, mask, 1, 0.125), wide=False)  # noqa: B023
        assert both.registers <= 96, both
        assert both.load_bytes[16] >= 8, both  # K and V, at least four each
    check_gates(arch, lambda: kernels.cls_scores(q, k, 1, 0.125, valid), wide=False)
