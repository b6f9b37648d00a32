"""The kernels of packed tokens compile for sm_80 and sm_90 at every shape class within the gates."""

import pytest
import torch

from fastreduce.kernels import cls_scores, gather_packed, linear_packed
from tests.compiled.gates import ARCHES, check_gates

OFFSETS = torch.zeros(9, dtype=torch.int32)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("channels", "dtype"), [(384, torch.float16), (1024, torch.float32)])
def test_gates_of_rows(arch, dtype, channels):
    x, index = torch.zeros(1, 800, channels, dtype=dtype), torch.zeros(8, 98, dtype=torch.int64)
    both = (OFFSETS, OFFSETS, 1, 800)
    check_gates(arch, lambda: gather_packed.gather_packed(x, index, *both, x))
    check_gates(arch, lambda: gather_packed.gather_packed_backward(x, index, *both))
    check_gates(arch, lambda: gather_packed.unpack_tokens(x, OFFSETS, 99))
    padded = torch.zeros(8, 99, channels, dtype=dtype)
    check_gates(arch, lambda: gather_packed.unpack_tokens_backward(padded, OFFSETS, 800))


# All widths that are multiples of 64 compile to one and the same kernel.
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gates_of_linear_packed(arch, dtype):
    ins, outs = 384, 1536
    x, weight = torch.zeros(1, 2048, ins, dtype=dtype), torch.zeros(outs, ins, dtype=dtype)
    grad = torch.zeros(1, 2048, outs, dtype=dtype)
    (forward,) = check_gates(
        arch, lambda: linear_packed.linear_packed(x, weight, weight[:, 0].clone(), OFFSETS), mma=True
    )
    backward = check_gates(arch, lambda: linear_packed.linear_packed_backward(grad, x, weight, OFFSETS), mma=True)
    for report in (forward, *backward):
        assert report.mma_ops > 0, report
        assert 16 in report.load_bytes, report
        assert arch == 80 or report.registers <= 168, report  # room for what comes with the next compiler


@pytest.mark.parametrize(
    ("ins", "outs", "dtype", "arch"),
    [(300, 1001, torch.float16, 90), (300, 1001, torch.float32, 80), (75, 1024, torch.float16, 80)],
)
def test_odd_widths_do_not_spill(arch, ins, outs, dtype):
    x, weight, grad = (torch.zeros(size, dtype=dtype) for size in ((1, 600, ins), (outs, ins), (1, 600, outs)))
    check_gates(arch, lambda: linear_packed.linear_packed(x, weight, None, OFFSETS), wide=False, mma=True)
    check_gates(arch, lambda: linear_packed.linear_packed_backward(grad, x, weight, OFFSETS), wide=False, mma=True)


@pytest.mark.parametrize("arch", ARCHES)
def test_gates_of_offsets_and_scores(arch):
    check_gates(arch, lambda: gather_packed.token_offsets(torch.zeros(256, 99, dtype=torch.bool)), wide=False)
    for head_dim, dtype in ((80, torch.float16), (256, torch.float32)):
        q, k = torch.zeros(8, 6, head_dim, dtype=dtype), torch.zeros(1, 800, 3, 6, head_dim, dtype=dtype)
        k = k.permute(2, 0, 3, 1, 4)[1]
        scores = (q, k, k, OFFSETS, 99, 1, 0.125)
        stream, _ = check_gates(arch, lambda: cls_scores.cls_value_scores_packed(*scores), wide=False)  # noqa: B023
        assert stream.load_bytes[16] >= 8, stream
