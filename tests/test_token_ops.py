"""gather, group, merge, unmerge, match in an ordinary process: operators, gradients, compilation, errors, numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastreduce import ops, reference
from fastreduce.ops.gather_tokens import GatherTokens
from fastreduce.ops.merge_tokens import MergeTokens, UnmergeTokens
from tests.inputs import distinct_indices, seeded, tokens
from tests.matching import exact_metric, plain_slots

OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
NATIVE = torch.ops.fastreduce
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def slots(batch=2, num_tokens=9, num_out=4, low=0, seed=0):
    return torch.randint(low, num_out, (batch, num_tokens), generator=seeded(seed))


def sizes(batch=2, num_tokens=9, dtype=torch.float32):
    return torch.randint(1, 5, (batch, num_tokens), generator=seeded(3)).to(dtype)


def layouts(x):
    """The same tokens, dense and with the sequence axis first in memory."""
    return x, x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_gather(dtype):
    index, residual = distinct_indices(2, 3, 7), tokens(2, 4, 5, dtype=dtype, seed=1)
    for x in layouts(tokens(2, 8, 5, dtype=dtype)):
        for added in (residual, residual.float(), None):
            torch.library.opcheck(NATIVE.gather_tokens.default, (x, index, 1, added), test_utils=OPCHECKS)
    for grad in layouts(residual):
        torch.library.opcheck(NATIVE.gather_tokens_backward.default, (grad, index, 1, 8), test_utils=OPCHECKS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_merge(dtype):
    slot, residual = slots(), tokens(2, 4, 5, dtype=dtype, seed=1)
    torch.library.opcheck(NATIVE.group_slots.default, (slot, 4), test_utils=OPCHECKS)
    groups = NATIVE.group_slots(slot, 4)
    for x in layouts(tokens(2, 9, 5, dtype=dtype)):
        for size in (sizes(), None):
            for added in (residual, residual.float(), None):
                arguments = (x, slot, *groups, size, added)
                torch.library.opcheck(NATIVE.merge_tokens.default, arguments, test_utils=OPCHECKS)
    total = NATIVE.merge_tokens(tokens(2, 9, 5, dtype=dtype), slot, *groups, sizes(), None)[1]
    for grad in layouts(residual):
        arguments = (grad, slot, sizes(), total)
        torch.library.opcheck(NATIVE.merge_tokens_backward.default, arguments, test_utils=OPCHECKS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_unmerge_and_match(dtype):
    slot = slots(low=-1)
    for x in layouts(tokens(2, 4, 5, dtype=dtype)):
        torch.library.opcheck(NATIVE.unmerge_tokens.default, (x, slot), test_utils=OPCHECKS)
    for grad in layouts(tokens(2, 9, 5, dtype=dtype)):
        torch.library.opcheck(NATIVE.unmerge_tokens_backward.default, (grad, slot, 4), test_utils=OPCHECKS)
    for metric in layouts(tokens(2, 9, 5, dtype=dtype)):
        torch.library.opcheck(NATIVE.match_tokens.default, (metric, 3, 1), test_utils=OPCHECKS)


# The CPU implementation of the operators is the reference, so gradcheck checks its explicit backward formulas.
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_gradcheck_gather(prefix):
    index = torch.tensor([[4, 0, 4], [1, 1, 1]])  # repeated on purpose
    leaves = leaf(tokens(2, 8, 3).double()), leaf(tokens(2, prefix + 3, 3, seed=1).double())
    assert torch.autograd.gradcheck(lambda x, r: GatherTokens.apply(x, index, prefix, r), leaves)
    assert torch.autograd.gradcheck(lambda x: GatherTokens.apply(x, index, prefix, None), leaves[:1])


@pytest.mark.parametrize("size", [None, sizes(dtype=torch.float64)])
def test_gradcheck_merge(size):
    slot = slots()
    groups = NATIVE.group_slots(slot, 4)
    leaves = leaf(tokens(2, 9, 3).double()), leaf(tokens(2, 4, 3, seed=1).double())
    assert torch.autograd.gradcheck(lambda x, r: MergeTokens.apply(x, slot, *groups, size, r)[0], leaves)


def test_gradcheck_unmerge():
    slot = slots(low=-1)
    assert torch.autograd.gradcheck(lambda x: UnmergeTokens.apply(x, slot), leaf(tokens(2, 4, 3).double()))


def test_function_and_reference_have_the_same_gradients():
    x, slot, size, residual = tokens(2, 9, 5), slots(), sizes(), tokens(2, 4, 5, seed=1)
    groups, grad = NATIVE.group_slots(slot, 4), tokens(2, 4, 5, seed=2)
    results = []
    for run in (
        lambda x, r: MergeTokens.apply(x, slot, *groups, size, r)[0],
        lambda x, r: ops.merge_tokens(x, slot, 4, size=size, residual=r)[0],
    ):
        leaves = leaf(x), leaf(residual)
        results.append(torch.autograd.grad(run(*leaves), leaves, grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


def by_functions(x, metric):
    """A merging and a pruning stage, and back, through the autograd functions that the kernels use."""
    slot = NATIVE.match_tokens(metric, 3, 1)
    groups = NATIVE.group_slots(slot, 6)
    merged, total = MergeTokens.apply(x, slot, *groups, None, None)
    kept = GatherTokens.apply(merged, total[:, 1:].topk(3)[1], 1, None)
    return UnmergeTokens.apply(merged, slot).sum(1) + kept.sum(1)


def by_reference(x, metric):
    slot = ops.match_tokens(metric, 3)
    merged, total = ops.merge_tokens(x, slot, 6)
    kept = ops.gather_tokens(merged, total[:, 1:].topk(3)[1])
    return ops.unmerge_tokens(merged, slot).sum(1) + kept.sum(1)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("stage", [by_functions, by_reference])
def test_compile_fullgraph(stage, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(stage, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 5) if dynamic else (2,):
        x, metric = leaf(tokens(batch, 9, 5)), tokens(batch, 9, 4, seed=1)
        outs = stage(x, metric), compiled(x, metric)
        torch.testing.assert_close(*outs)
        torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in outs))


@pytest.mark.parametrize("stage", [by_functions, by_reference])
def test_export(stage):
    class Stage(nn.Module):
        def forward(self, x, metric):
            return stage(x, metric)

    batch = torch.export.Dim("batch", min=2, max=16)
    example = tokens(2, 9, 5), tokens(2, 9, 4, seed=1)
    exported = torch.export.export(Stage(), example, dynamic_shapes=({0: batch}, {0: batch})).module()
    other = tokens(3, 9, 5, seed=2), tokens(3, 9, 4, seed=3)
    torch.testing.assert_close(exported(*other), stage(*other))


X, INDEX, SLOT, METRIC = tokens(2, 9, 5), torch.zeros(2, 3, dtype=torch.int64), slots(), tokens(2, 9, 4)
BAD_CALLS = [
    (ValueError, r"x must have shape \(B, N, C\), got \(9, 5\)", lambda: ops.gather_tokens(X[0], INDEX)),
    (TypeError, "x must be a tensor .* got list", lambda: ops.gather_tokens([1.0], INDEX)),
    (TypeError, "x must be floating point, got torch.int64", lambda: ops.gather_tokens(X.long(), INDEX)),
    (TypeError, "index must hold .* got torch.float32", lambda: ops.gather_tokens(X, INDEX.float())),
    (TypeError, "index must hold .* got torch.bool", lambda: ops.gather_tokens(X, INDEX.bool())),
    (ValueError, "prefix must be .* 9, got 10", lambda: ops.gather_tokens(X, INDEX, prefix=10)),
    (ValueError, "prefix must be .* got -1", lambda: ops.gather_tokens(X, INDEX, prefix=-1)),
    (ValueError, r"batch size 2, got shape \(1, 3\)", lambda: ops.gather_tokens(X, INDEX[:1])),
    (ValueError, r"residual .* \(2, 4, 5\), got \(2, 3, 5\)", lambda: ops.gather_tokens(X, INDEX, residual=X[:, :3])),
    (ValueError, "index on meta", lambda: ops.gather_tokens(X, INDEX.to("meta"))),
    (ValueError, "num_out must be .* got 0", lambda: ops.merge_tokens(X, SLOT, 0)),
    (TypeError, "num_out must be an integer, got 4.0", lambda: ops.merge_tokens(X, SLOT, 4.0)),
    (ValueError, r"slot must have shape \(2, 9\), got \(2, 8\)", lambda: ops.merge_tokens(X, SLOT[:, :8], 4)),
    (
        ValueError,
        r"size must have shape \(2, 9\), got \(2, 4\)",
        lambda: ops.merge_tokens(X, SLOT, 4, size=X[:, :4, 0]),
    ),
    (ValueError, r"residual .* \(2, 4, 5\), got \(2, 9, 5\)", lambda: ops.merge_tokens(X, SLOT, 4, residual=X)),
    (TypeError, "slot must hold .* got torch.float32", lambda: ops.unmerge_tokens(X, SLOT.float())),
    (ValueError, r"batch size 2, got shape \(1, 9\)", lambda: ops.unmerge_tokens(X, SLOT[:1])),
    (ValueError, "r must be between 0 and 4, got 5", lambda: ops.match_tokens(METRIC, 5)),
    (ValueError, "r must be between 0 and 4, got -1", lambda: ops.match_tokens(METRIC, -1)),
    (ValueError, r"metric must have shape \(B, N, D\), got \(2, 9\)", lambda: ops.match_tokens(METRIC[..., 0], 1)),
    (TypeError, "metric must be floating point, got torch.int64", lambda: ops.match_tokens(METRIC.long(), 1)),
    (ValueError, "unknown backend 'gpu'", lambda: ops.gather_tokens(X, INDEX, backend="gpu")),
]


@pytest.mark.parametrize(("kind", "message", "call"), BAD_CALLS, ids=[message for _, message, _ in BAD_CALLS])
def test_bad_input_is_quoted(kind, message, call):
    with pytest.raises(kind, match=message):
        call()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 3), st.integers(1, 12), st.integers(1, 6), st.integers(1, 5), st.booleans(), st.integers(0, 10**6)
)
def test_merge_is_the_loop(batch, num_tokens, num_out, channels, sized, seed):
    x, slot = tokens(batch, num_tokens, channels, seed=seed).double(), slots(batch, num_tokens, num_out, seed=seed)
    size = sizes(batch, num_tokens, torch.float64) if sized else torch.ones(batch, num_tokens, dtype=torch.float64)
    merged, total = ops.merge_tokens(x, slot, num_out, size=size if sized else None)
    for b in range(batch):
        for m in range(num_out):
            members = (slot[b] == m).nonzero().squeeze(1)
            weight = size[b, members]
            expected = (
                (weight.unsqueeze(1) * x[b, members]).sum(0) / weight.sum() if len(members) else x.new_zeros(channels)
            )
            torch.testing.assert_close(merged[b, m], expected)
            assert total[b, m] == weight.sum()
    spread = ops.unmerge_tokens(merged, slot)
    torch.testing.assert_close((spread * size.unsqueeze(-1)).sum(1), (x * size.unsqueeze(-1)).sum(1))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_match_is_the_plain_transcription(data):
    num_tokens = data.draw(st.integers(2, 14))
    prefix = data.draw(st.integers(0, min(5, num_tokens)))
    r = data.draw(st.integers(0, (num_tokens - prefix) // 2))
    metric = exact_metric(2, num_tokens, data.draw(st.sampled_from([1, 4, 7])), seed=data.draw(st.integers(0, 10**6)))
    if data.draw(st.booleans()):
        metric[0, data.draw(st.integers(0, num_tokens - 1))] = float("nan")
    slot = ops.match_tokens(metric, r, prefix=prefix)
    assert slot.tolist() == [plain_slots(rows, r, prefix) for rows in metric.tolist()]


def test_unmerge_leaves_dropped_tokens_zero():
    x, slot = tokens(1, 2, 3), torch.tensor([[1, -1, 0, 1]])
    expected = torch.stack([x[0, 1], torch.zeros(3), x[0, 0], x[0, 1]]).unsqueeze(0)
    assert torch.equal(ops.unmerge_tokens(x, slot), expected)


def test_references_give_the_same_bits_in_any_batch():
    x, slot, metric, index = tokens(4, 9, 5), slots(4), tokens(4, 9, 6, seed=1), distinct_indices(4, 3, 8)
    for run in (
        lambda rows: reference.gather_tokens(x[rows], index[rows], 1, None),
        lambda rows: reference.merge_tokens(x[rows], slot[rows], 4, sizes(4)[rows], None)[0],
        lambda rows: reference.unmerge_tokens(x[rows], slot[rows]),
        lambda rows: reference.match_tokens(metric[rows], 3, 1),
    ):
        whole = run(slice(None))
        assert torch.equal(whole, run(slice(None)))
        assert torch.equal(whole[2:3], run(slice(2, 3)))
