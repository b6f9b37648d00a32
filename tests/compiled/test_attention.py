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
PLAIN = [CLASSES[1], CLASSES[2]]
HIDDEN = [CLASSES[0], *CLASSES[3:]]


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
@pytest.mark.parametrize(("shape", "dtype"), HIDDEN)
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


def launch_options(heads, num_tokens, head_dim, dtype, *, bias=False, chosen=False, packed=False, kind=""):
    """Forward, the scores of that kind, and backward from all that has a gradient then."""
    batch = 1 if packed else 2
    q, k, v = torch.zeros(batch, num_tokens, 3, heads, head_dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    of_keys = torch.zeros(batch, num_tokens) if bias else None
    index = torch.zeros(batch, num_tokens // 2, dtype=torch.int64) if chosen else None
    offsets = (torch.zeros(4, dtype=torch.int32),) * 2 if packed else None
    options = (of_keys, index, 1, offsets, (num_tokens, num_tokens))
    out, logsumexp, *rest = kernels.attention(q, k, v, None, 0.125, 0.0, *options)
    scores = kernels.key_scores(q, k, logsumexp, kind, of_keys, 1, 0.125) if kind else None
    kernels.attention_backward(
        *(torch.zeros_like(out), q, k, v, None, out, logsumexp, *rest, 0.125, 0.0, *options),
        *(torch.zeros_like(logsumexp), scores, kind),
    )


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        (CLASSES[0][0], torch.float16, {"packed": True, "bias": True}),
        ((8, 4097, 128), torch.float16, {"kind": "received", "bias": True}),
        ((8, 4097, 128), torch.bfloat16, {"chosen": True, "bias": True}),
        ((8, 197, 128), torch.float32, {"kind": "class", "bias": True}),
    ],
)
def test_gates_of_options(shape, dtype, options, arch):
    reports = check_gates(arch, lambda: launch_options(*shape, dtype, **options), wide=False)
    names = ["attention", options.get("kind"), "sum_heads" if options.get("kind") == "received" else None]
    names += ["grad_queries", "grad_keys", "sum_heads" if "bias" in options else None]
    assert [report.name for report in reports] == [f"{name}_kernel" for name in names if name]
    for report in reports:
        if report.name == "sum_heads_kernel":
            continue
        assert max(report.load_bytes) == 16, report
        assert report.name in ("class_kernel", "received_kernel") or max(report.store_bytes) == 16, report
        assert (report.mma_ops > 0) == (dtype != torch.float32), report


@pytest.mark.parametrize(
    ("width", "head_dim", "dtype", "arch"), [(33, 33, torch.float32, 80), (75, 64, torch.float16, 90)]
)
def test_gates_of_other_widths_and_strides(width, head_dim, dtype, arch):
    q = torch.zeros(2, 3, 198, width, dtype=dtype)[..., :head_dim]
    policy = torch.zeros(198, 2, dtype=dtype).t()
    out, *sums = torch.zeros(2, 198, 3, head_dim, dtype=dtype).transpose(1, 2), torch.zeros(2, 3, 198)
    total, mean = torch.zeros(2, 3, 198), torch.zeros(2, 3, head_dim)
    check_gates(arch, lambda: kernels.attention(q, q, q, policy, 0.1, 1e-6), wide=False)
    backward = (q, q, q, q, policy, out, *sums, total, mean, 0.1, 1e-6)
    check_gates(arch, lambda: kernels.attention_backward(*backward), wide=False)
