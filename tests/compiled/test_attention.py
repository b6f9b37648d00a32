"""attention compiles for sm_80 and sm_90 at every shape class within the gates."""

import pytest
import torch

from bench.proof.compiler import compiled_for
from fastreduce.kernels import attention as kernels
from fastreduce.kernels import attention_backward as backward
from fastreduce.kernels._attention import last_keys, last_rows, takes_whole, whole_tile
from fastreduce.kernels._rows import unit_of
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
    if policy is None:
        out, logsumexp = kernels.attention(q, k, v, 0.125)
        backward.attention_backward(torch.zeros_like(out), q, k, v, out, logsumexp, 0.125)
    else:
        out, *sums = kernels.attention_policy(q, k, v, policy, 0.125, 1e-6)
        backward.attention_policy_backward(torch.zeros_like(out), q, k, v, policy, out, *sums, 0.125, 1e-6)


def check_tensor_cores(report, dtype, head_dim):
    """Check for tensor cores in half precision, on sm_90 by warp groups.

    There are none in float32, where they would round the inputs to 11 bits.
    """
    assert (report.mma_ops > 0) == (dtype != torch.float32), report
    groups = report.arch == 90 and dtype != torch.float32 and head_dim <= 128
    assert not groups or report.warpgroup_ops > 0, report


def check(shape, dtype, arch, policy):
    reports = check_gates(arch, lambda: launches(*shape, dtype, policy), wide=False)
    dots = {r.name: r for r in reports if r.name not in ("mean_values_kernel", "sum_heads_kernel")}
    assert set(dots) == {"attention_kernel", "grad_queries_kernel", "grad_keys_kernel"}
    for report in dots.values():
        assert max(report.load_bytes) == max(report.store_bytes) == 16, report
        check_tensor_cores(report, dtype, shape[2])
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


def launch_options(
    heads, num_tokens, head_dim, dtype, *, width=None, bias=False, chosen=False, packed=False, policy=False, kind=""
):
    """Return launches forward, of the scores of a kind, and backward from all that has a gradient then.

    Rows are those of one packed qkv, or with a ``width`` they lie apart by so many elements.
    """
    batch = 1 if packed else 2

    def rows(number):
        return torch.zeros(batch, number, heads, width, dtype=dtype)[..., :head_dim].transpose(1, 2)

    if width is None:
        q, k, v = torch.zeros(batch, num_tokens, 3, heads, head_dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q, k, v = (rows(num_tokens) for _ in "qkv")
    hidden = torch.zeros(num_tokens, batch, dtype=dtype).t() if policy else None
    of_keys = torch.zeros(batch, num_tokens) if bias else None
    index = torch.zeros(3 if packed else batch, num_tokens // 2, dtype=torch.int64) if chosen else None
    offsets = (torch.zeros(4, dtype=torch.int32),) * 2 if packed else (None, None)
    if hidden is not None:
        out, *sums = kernels.attention_policy(q, k, v, hidden, 0.125, 1e-6)
        grad = torch.zeros_like(out) if width is None else rows(out.shape[2])
        backward.attention_policy_backward(grad, q, k, v, hidden, out, *sums, 0.125, 1e-6)
        return
    options = (of_keys, index, 1, *offsets, num_tokens, num_tokens)
    out, logsumexp = kernels.attention(q, k, v, 0.125, *options, num_out=num_tokens)
    scores = kernels.key_scores(q, k, logsumexp, kind, of_keys, 1, 0.125) if kind else None
    grad = torch.zeros_like(out) if width is None else rows(out.shape[2])
    backward.attention_backward(grad, q, k, v, out, logsumexp, 0.125, *options, scores, kind)


# Those that spilled, or could not load 16 bytes at a time, with other tiles or other hints.
@pytest.mark.parametrize(
    ("shape", "dtype", "options", "arch"),
    [
        ((6, 197, 64), torch.float16, {"packed": True, "bias": True}, 90),
        ((6, 197, 64), torch.bfloat16, {}, 90),
        ((3, 99, 64), torch.float16, {"chosen": True, "bias": True}, 90),
        ((6, 197, 64), torch.bfloat16, {"kind": "received", "bias": True}, 90),
        ((16, 197, 72), torch.float16, {"packed": True, "chosen": True, "bias": True}, 90),
        ((12, 197, 80), torch.float16, {"chosen": True, "bias": True}, 80),
        ((8, 4097, 128), torch.float16, {"kind": "received", "bias": True}, 80),
        ((8, 4097, 128), torch.bfloat16, {"packed": True, "chosen": True, "bias": True}, 90),
        ((8, 197, 128), torch.float32, {"kind": "class", "bias": True}, 80),
    ],
)
def test_gates_of_options(shape, dtype, options, arch):
    reports = check_gates(arch, lambda: launch_options(*shape, dtype, **options), wide=False)
    names = ["attention", options.get("kind"), "sum_heads" if options.get("kind") == "received" else None]
    # On Hopper all queries of a head fit into one program, which gives the keys their gradients too.
    whole = arch == 90 and shape[1] <= 197 and shape[2] == 64 and "kind" not in options
    names += ["grad_queries", None if whole else "grad_keys", "sum_heads" if "bias" in options else None]
    assert [report.name for report in reports] == [f"{name}_kernel" for name in names if name]
    for report in reports:
        if report.name == "sum_heads_kernel":
            continue
        assert max(report.load_bytes) == 16, report
        assert report.name in ("class_kernel", "received_kernel") or max(report.store_bytes) == 16, report
        if report.name != "class_kernel":
            check_tensor_cores(report, dtype, shape[2])


# 8 heads of 33 channels: rows begin at multiples of 16 bytes, and heads do not.
@pytest.mark.parametrize(
    ("shape", "width", "dtype", "options", "arch"),
    [
        ((3, 198, 33), 33, torch.float32, {"policy": True}, 80),
        ((3, 198, 64), 75, torch.float16, {"policy": True}, 90),
        ((8, 197, 33), 33, torch.float16, {"kind": "class", "bias": True}, 80),
        ((6, 197, 128), 129, torch.float16, {"packed": True, "chosen": True, "bias": True}, 90),
        ((6, 197, 80), 81, torch.float32, {"chosen": True}, 80),
    ],
)
def test_gates_of_rows_that_are_not_aligned(shape, width, dtype, options, arch):
    check_gates(arch, lambda: launch_options(*shape, dtype, width=width, **options), wide=False)


@pytest.mark.parametrize(
    ("rows", "step", "last"), [(197, 64, 16), (138, 64, 16), (99, 64, 64), (87, 64, 32), (128, 64, 0), (3, 16, 16)]
)
def test_the_last_step_is_as_narrow_as_what_is_left(rows, step, last):
    assert last_rows(rows, step) == last
    assert last_keys(rows, step) == (last if rows >= step else -1)  # no step apart where there is no other


def test_where_one_program_takes_all_queries():
    def own(queries, head_dim=64, dtype=torch.float16, aligned=True):
        tile = whole_tile(queries, head_dim, dtype, aligned)
        return None if tile is None else tile["BLOCK_M"]

    assert [own(queries) for queries in (1, 64, 65, 197, 256, 257)] == [64, 64, 128, 256, 256, None]
    assert [own(queries, head_dim=128) for queries in (100, 197)] == [128, None]  # accumulators that warps hold
    assert [own(197, head_dim=72), own(197, dtype=torch.float32), own(197, aligned=False)] == [None] * 3
    with compiled_for(90):
        assert takes_whole()
    for arch in (80, "gfx942"):
        with compiled_for(arch):
            assert not takes_whole()


def test_tiles_follow_the_alignment_of_every_stride():
    x = torch.zeros(2, 9, 8, 32, dtype=torch.float16)
    assert unit_of(x, x[:, 1:], x[..., :24]) == 8
    assert unit_of(x.float()[..., :20]) == 4
    for odd in (x[..., :20], x[..., 1:25], x.view(2, 9, 4, 64)[..., :33], torch.zeros(2, 9, 8, 33).half()):
        assert unit_of(odd) == unit_of(x, odd) == 1
