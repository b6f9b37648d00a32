"""group_slots, merge_tokens, unmerge_tokens compile for sm_80 and sm_90 at every shape class within the gates."""

import pytest
import torch

from fastreduce.kernels import merge_tokens as kernels
from fastreduce.kernels import slots
from tests.compiled.gates import ARCHES, check_gates


def groups(num_tokens, num_out):
    return torch.zeros(2, num_tokens, dtype=torch.int32), torch.zeros(2, num_out + 1, dtype=torch.int32)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("num_tokens", "dtype"), [(197, torch.int64), (576, torch.int32), (4097, torch.int64)])
def test_gates_of_the_groups(num_tokens, dtype, arch):
    slot = torch.zeros(2, num_tokens, dtype=dtype)
    (report,) = check_gates(arch, lambda: slots.group_slots(slot, num_tokens // 2), wide=False)
    assert report.registers <= 128, report


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("channels", "dtype"),
    [(192, torch.float16), (384, torch.bfloat16), (1024, torch.float16), (768, torch.float32)],
)
def test_gates(channels, dtype, arch):
    x, residual = torch.zeros(2, 197, channels, dtype=dtype), torch.zeros(2, 99, channels, dtype=dtype)
    slot, size, total = torch.zeros(2, 197, dtype=torch.int64), torch.zeros(2, 197), torch.zeros(2, 99)
    for launch in (
        lambda: kernels.merge_tokens(x, *groups(197, 99), size, residual),
        lambda: kernels.merge_tokens(x, *groups(197, 99), None, None),
        lambda: kernels.spread_slots(residual, *groups(197, 99), size, total),
        lambda: kernels.spread_slots(residual, *groups(197, 99)),
    ):
        (report,) = check_gates(arch, launch)
        assert report.registers <= 64, report
        assert report.shared_bytes == 0, report
    *_, report = check_gates(arch, lambda: kernels.sum_slots(x, slot, 99))
    assert report.registers <= 64, report


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("num_tokens", "channels", "dtype"),
    [(196, 192, torch.float16), (196, 384, torch.float32), (576, 768, torch.bfloat16), (4096, 1024, torch.float16)],
)
def test_gates_of_learned_weights(num_tokens, channels, dtype, arch):
    whole = torch.zeros(2, 1 + num_tokens, channels, dtype=dtype)
    x, head, merged = whole[:, 1:], whole[:, :1], whole[:, : num_tokens // 2]
    grouped = groups(num_tokens, num_tokens // 2)
    size, total = torch.zeros(2, num_tokens), torch.zeros(2, num_tokens // 2)
    (report,) = check_gates(arch, lambda: kernels.merge_tokens(x, *grouped, size, None, 1e-6, head))
    assert report.registers <= 64, report
    for weight in (None, whole[:1, 0]):
        arguments = merged, x, *grouped, size, total, 1e-6, weight
        (report,) = check_gates(arch, lambda: kernels.merge_tokens_size_backward(*arguments))  # noqa: B023
        assert report.registers <= 96, report


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("channels", "dtype"),
    [(192, torch.float16), (384, torch.bfloat16), (768, torch.float32), (1024, torch.float16), (1280, torch.float32)],
)
def test_gates_of_sizes_by_a_layer(channels, dtype, arch):
    x = torch.zeros(2, 197, channels, dtype=dtype)
    learned = torch.zeros(1, channels, dtype=dtype), torch.zeros(1, dtype=dtype)
    (report,) = check_gates(
        arch, lambda: kernels.merge_tokens(x[:, 1:], *groups(196, 98), None, None, 1e-6, x[:, :1], *learned)
    )
    assert report.registers <= 96, report
    assert report.shared_bytes <= 8192, report  # a sum over its warps, and the weights from one layout to another


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("width", "channels", "dtype"), [(33, 33, torch.float32), (75, 64, torch.float16), (1000, 250, torch.bfloat16)]
)
def test_gates_of_other_widths_and_strides(width, channels, dtype, arch):
    x = torch.zeros(2, 198, width, dtype=dtype)[..., :channels]
    grouped, size, total = groups(198, 198), torch.zeros(2, 198), torch.zeros(2, 198)
    for launch in (
        lambda: kernels.merge_tokens(x, *grouped, size, x),
        lambda: kernels.spread_slots(x, *grouped, size, total),
        lambda: kernels.spread_slots(x, *grouped),
        lambda: kernels.merge_tokens_size_backward(x, x, *grouped, size, total, 1e-6, x[0, :1]),
        lambda: kernels.merge_tokens(x, *grouped, size, None, 1e-6, x[:, :5]),
        lambda: kernels.merge_tokens(x, *grouped, None, None, 1e-6, x[:, :5], x[0, :1], x[0, 0, :1]),
    ):
        check_gates(arch, launch, wide=False)
