"""attention compiles for sm_80 and sm_90 at every shape class within the gates."""

import pytest
import torch

from fastreduce.kernels import attention as kernels
from tests.compiled.gates import ARCHES, check_gates

# (heads, tokens, head_dim): counts of tokens compile to two kernels only, whether they divide by 16 or not
CLASSES = [
    ((6, 197, 64), torch.float16),
    ((16, 4096, 32), torch.bfloat16),
    ((12, 577, 80), torch.float16),
    ((8, 4097, 128), torch.bfloat16),
    ((4, 1025, 256), torch.float16),
    ((8, 197, 128), torch.float32),
]
PLAIN = [CLASSES[0], CLASSES[5]]


def launches(heads, num_tokens, head_dim, dtype, policy):
    q, k, v = torch.zeros(2, num_tokens, 3, heads, head_dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    out, *sums = kernels.attention(q, k, v, policy, 0.125, 1e-6)
    kernels.attention_backward(torch.zeros_like(out), q, k, v, policy, out, *sums, 0.125, 1e-6)


def check(shape, dtype, arch, policy):
    reports = check_gates(arch, lambda: launches(*shape, dtype, policy), wide=False)
    dots = {r.name: r for r in reports if r.name not in ("mean_values_kernel", "sum_heads_kernel")}
    assert set(dots) == {"attention_kernel", "grad_queries_kernel", "grad_keys_kernel"}
    for report in dots.values():
        assert max(report.load_bytes) == max(report.store_bytes) == 16, report
        # Tensor cores for half precision; none for float32, where they would round the inputs to 11 bits.
        assert (report.mma_ops > 0) == (dtype != torch.float32), report
    return reports


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("shape", "dtype"), CLASSES)
def test_gates_with_a_policy(shape, dtype, arch):
    mean, *_, summed = check(shape, dtype, arch, torch.zeros(2, shape[1]))
    assert (mean.name, summed.name) == ("mean_values_kernel", "sum_heads_kernel")
    assert mean.registers <= 128, mean
    assert max(mean.load_bytes) == 16, mean
    assert summed.registers <= 64, summed


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("shape", "dtype"), PLAIN)
def test_gates_without(shape, dtype, arch):
    check(shape, dtype, arch, None)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("width", "head_dim", "dtype"), [(33, 33, torch.float32), (75, 64, torch.float16)])
def test_gates_of_other_widths_and_strides(width, head_dim, dtype, arch):
    q = torch.zeros(2, 3, 198, width, dtype=dtype)[..., :head_dim]
    policy = torch.zeros(198, 2, dtype=dtype).t()
    out, *sums = torch.zeros(2, 198, 3, head_dim, dtype=dtype).transpose(1, 2), torch.zeros(2, 3, 198)
    total, mean = torch.zeros(2, 3, 198), torch.zeros(2, 3, head_dim)
    check_gates(arch, lambda: kernels.attention(q, q, q, policy, 0.1, 1e-6), wide=False)
    backward = (q, q, q, q, policy, out, *sums, total, mean, 0.1, 1e-6)
    check_gates(arch, lambda: kernels.attention_backward(*backward), wide=False)
