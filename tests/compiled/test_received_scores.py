"""received_scores compiles for sm_80 and sm_90 at every shape class within the gates."""

import pytest
import torch

from fastreduce.kernels import received_scores as kernels
from tests.compiled.gates import ARCHES, check_gates

# (heads, tokens, head_dim): DeiT-T/S/B and more tokens, then head widths of which some are no powers of two; of 72, as
# SigLIP has them, and odd heads, no stride is a multiple of 16
CLASSES = [(3, 197, 64), (6, 577, 64), (12, 1025, 64), (16, 4097, 64)]
WIDTHS = [(12, 197, 32), (3, 4097, 72), (8, 577, 128), (4, 197, 256), (4, 4097, 256)]
CASES = [
    *((shape, torch.float16) for shape in CLASSES + WIDTHS),
    *((shape, torch.float32) for shape in (CLASSES[0], CLASSES[3], WIDTHS[0], WIDTHS[1], WIDTHS[4])),
    (CLASSES[0], torch.bfloat16),
]


def packed(heads, tokens, head_dim, dtype):
    q, k, _ = torch.zeros(2, tokens, 3, heads, head_dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k


def check(reports, shape, dtype):
    for report in reports:
        # Tensor cores for half precision; none for float32, where they would round the inputs to 11 bits.
        assert (report.mma_ops > 0) == (dtype != torch.float32 and report.name != "sum_parts_kernel"), report
        if shape[2] <= 64:
            assert report.registers <= 128, report


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_gates(shape, dtype, arch):
    _, tokens, _ = shape
    q, k = packed(*shape, dtype)
    reports = check_gates(arch, lambda: kernels.received_scores(q, k, 0.125), wide=False)
    second = "sum_parts_kernel" if tokens <= 2048 else "column_sum_kernel"
    assert [report.name for report in reports] == ["row_softmax_kernel", second]
    if second == "sum_parts_kernel":
        assert set(reports[1].load_bytes) == {16}, reports[1]
    assert all(16 in report.load_bytes for report in reports), reports
    check(reports, shape, dtype)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gates_of_odd_widths_and_strides(dtype, arch):
    q, k = packed(3, 30, 33, dtype)
    q = q[:, :, :9]
    check_gates(arch, lambda: kernels.received_scores(q, k, 0.125), wide=False)
