"""cls_scores, received_scores, select_topk, fuse_tokens in an ordinary process: gradients, errors, numbers."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastreduce import ops, reference
from fastreduce.ops.cls_scores import ClsScores
from fastreduce.ops.fuse_tokens import FuseTokens
from fastreduce.ops.received_scores import ReceivedScores
from fastreduce.reference import _blocks
from tests.helpers.inputs import DTYPES, distinct_indices, seeded, tokens

OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def class_query_and_keys(batch=2, heads=3, num_tokens=7, head_dim=4, dtype=torch.float64, seed=0):
    """Return views of one packed qkv, as a block of a model hands them over."""
    qkv = torch.randn(batch, num_tokens, 3, heads, head_dim, generator=seeded(seed)).to(dtype)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q[:, :, 0], k


def queries_and_keys(batch=2, heads=3, queries=5, keys=7, head_dim=4, dtype=torch.float64, seed=0):
    """Return views likewise; the numbers of queries and keys may differ."""
    qkv = torch.randn(batch, max(queries, keys), 3, heads, head_dim, generator=seeded(seed)).to(dtype)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q[:, :, :queries], k[:, :, :keys]


@pytest.fixture(params=[2**20, 15], ids=["whole heads", "blocks of queries"])
def matrix(request, monkeypatch):
    """Set the number of logits that the reference of received_scores holds at a time."""
    monkeypatch.setattr(_blocks, "MATRIX", request.param)


def fuse_inputs(batch=2, num_tokens=8, k=3, channels=5, prefix=1, dtype=torch.float64):
    x = tokens(batch, num_tokens, channels, dtype=dtype)
    order = distinct_indices(batch, num_tokens - prefix, num_tokens - prefix)
    scores = torch.rand(batch, num_tokens - prefix, generator=seeded(1)).to(reference.accumulator(dtype))
    return x, order, scores, tokens(batch, prefix + k + 1, channels, dtype=dtype, seed=2)


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["packed", "dense", "sequence first"])
def test_opcheck_cls_scores(layout, dtype):
    q, k = class_query_and_keys(dtype=dtype)
    if layout == "dense":
        q, k = q.contiguous(), k.contiguous()
    if layout == "sequence first":
        k = k.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    torch.library.opcheck(torch.ops.fastreduce.cls_scores.default, (q, k, 1, 0.5), test_utils=OPCHECKS)
    scores, logits, logsumexp = torch.ops.fastreduce.cls_scores(q, k, 1, 0.5)
    for grad in (torch.ones_like(scores), torch.ones(2, 1, dtype=scores.dtype).expand(2, 6)):
        torch.library.opcheck(
            torch.ops.fastreduce.cls_scores_backward.default,
            (grad, q, k, logits, logsumexp, 1, 0.5),
            test_utils=OPCHECKS,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck_cls_scores_of_valid_keys_and_values(dtype):
    q, k = class_query_and_keys(dtype=dtype)
    valid = torch.arange(7) < torch.tensor([[7], [4]])
    torch.library.opcheck(torch.ops.fastreduce.cls_scores.default, (q, k, 1, 0.5, valid), test_utils=OPCHECKS)
    for mask in (None, valid):
        torch.library.opcheck(
            torch.ops.fastreduce.cls_value_scores.default, (q, k, k, mask, 1, 0.5), test_utils=OPCHECKS
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["packed", "dense"])
def test_opcheck_received_scores(layout, dtype):
    q, k = queries_and_keys(dtype=dtype)
    if layout == "dense":
        q, k = q.contiguous(), k.contiguous()
    torch.library.opcheck(torch.ops.fastreduce.received_scores.default, (q, k, 0.5), test_utils=OPCHECKS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("k", [0, 2, 9])
def test_opcheck_select_topk(k, dtype):
    for scores in (tokens(3, 9, dtype=dtype), tokens(9, 3, dtype=dtype).t()):
        torch.library.opcheck(torch.ops.fastreduce.select_topk.default, (scores, k), test_utils=OPCHECKS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("k", "prefix"), [(3, 1), (0, 0), (6, 2)])
def test_opcheck_fuse_tokens(k, prefix, dtype):
    x, order, scores, residual = fuse_inputs(k=k, prefix=prefix, dtype=dtype)
    sequence_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    for tensor in (x, sequence_first):
        for added in (residual, residual.float(), None):
            torch.library.opcheck(
                torch.ops.fastreduce.fuse_tokens.default,
                (tensor, order, scores, k, prefix, added, None if added is None else residual[0, 0]),
                test_utils=OPCHECKS,
            )
        for bias in (residual[0, 0], None):
            torch.library.opcheck(
                torch.ops.fastreduce.fuse_tokens_backward.default,
                (residual, tensor, order, scores, k, prefix, bias),
                test_utils=OPCHECKS,
            )


# The CPU implementation of the operators is the reference, so gradcheck checks its explicit backward formulas.
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_gradcheck_cls_scores(prefix):
    q, k = class_query_and_keys()
    assert torch.autograd.gradcheck(lambda q, k: ClsScores.apply(q, k, prefix, 0.7), (leaf(q), leaf(k)))
    valid = torch.arange(7) < torch.tensor([[6], [3]])
    for run in (
        lambda q, k: ClsScores.apply(q, k, prefix, 0.7, valid),
        lambda q, k: ops.cls_scores(q, k, prefix=prefix, scale=0.7, valid=valid),
    ):
        assert torch.autograd.gradcheck(run, (leaf(q), leaf(k)))


@pytest.mark.parametrize("run", [ReceivedScores.apply, lambda q, k, scale: ops.received_scores(q, k, scale=scale)])
def test_gradcheck_received_scores(run, matrix):
    q, k = queries_and_keys()
    assert torch.autograd.gradcheck(lambda q, k: run(q, k, 0.7), (leaf(q), leaf(k)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_received_scores_by_function_and_by_reference(dtype, matrix):
    q, k = queries_and_keys(dtype=dtype)
    grad = tokens(2, 7, seed=5)
    results = []
    for run in (lambda q, k: ReceivedScores.apply(q, k, 0.5), lambda q, k: ops.received_scores(q, k, scale=0.5)):
        leaves = (leaf(q), leaf(k))
        scores = run(*leaves)
        results.append([scores, *torch.autograd.grad(scores, leaves, grad)])
    for ours, plain, tensor in zip(*results, (grad, q, k), strict=True):
        assert (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape)
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize(("k", "prefix"), [(3, 1), (0, 0), (6, 2), (0, 1), (7, 1)])
@pytest.mark.parametrize("added", [0, 1, 2])
def test_gradcheck_fuse_tokens(k, prefix, added):
    x, order, scores, residual = fuse_inputs(k=k, prefix=prefix)
    leaves = [leaf(residual), leaf(residual[0, 0])][:added]
    assert torch.autograd.gradcheck(
        lambda x, scores, *rest: FuseTokens.apply(x, order, scores, k, prefix, *rest, *[None] * (2 - added)),
        (leaf(x), leaf(scores), *leaves),
    )


def test_function_and_reference_have_the_same_gradients():
    q, k = class_query_and_keys(dtype=torch.float32)
    grad = tokens(2, 6, seed=5)
    pairs = []
    for run in (lambda q, k: ClsScores.apply(q, k, 1, 0.5), lambda q, k: ops.cls_scores(q, k, scale=0.5)):
        leaves = (leaf(q), leaf(k))
        pairs.append(torch.autograd.grad(run(*leaves), leaves, grad))
    x, order, scores, residual = fuse_inputs(dtype=torch.float32)
    grad = tokens(2, 5, 5, seed=6)
    for run in (
        lambda x, s, r, b: FuseTokens.apply(x, order, s, 3, 1, r, b),
        lambda x, s, r, b: ops.fuse_tokens(x, order, s, 3, residual=r, residual_bias=b),
    ):
        leaves = (leaf(x), leaf(scores), leaf(residual), leaf(residual[1, 2]))
        pairs.append(torch.autograd.grad(run(*leaves), leaves, grad))
    for first, second in (pairs[:2], pairs[2:]):
        for ours, plain in zip(first, second, strict=True):
            torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_dtypes_of_their_inputs(dtype):
    q, k = class_query_and_keys(dtype=dtype)
    x, order, scores, residual = fuse_inputs(dtype=dtype)
    leaves = [leaf(q), leaf(k), leaf(x), leaf(scores), leaf(residual.float()), leaf(residual[0, 0])]
    total = ClsScores.apply(leaves[0], leaves[1], 1, 0.5).sum()
    total = total + FuseTokens.apply(leaves[2], order, leaves[3], 3, 1, *leaves[4:]).float().sum()
    for tensor, grad in zip(leaves, torch.autograd.grad(total, leaves), strict=True):
        assert (grad.dtype, grad.shape) == (tensor.dtype, tensor.shape)


def test_only_the_wanted_gradients_are_made():
    x, order, scores, residual = fuse_inputs()
    added = leaf(residual)
    out = FuseTokens.apply(x, order, scores, 3, 1, added, None)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), added)[0], torch.ones_like(residual))


def test_no_gradient_flows_through_the_selection():
    scores = leaf(tokens(2, 9))
    assert not ops.select_topk(scores, 4).requires_grad
    assert not torch.ops.fastreduce.select_topk(scores.detach(), 4).requires_grad


def evit_by_functions(q, k, x, residual):
    """Run a whole stage, through the autograd functions that the kernels use."""
    scores = ClsScores.apply(q, k, 1, 0.5)
    order = torch.ops.fastreduce.select_topk(scores.detach(), scores.shape[1])
    return FuseTokens.apply(x, order, scores, 3, 1, residual, None)


def evit_by_reference(q, k, x, residual):
    scores = ops.cls_scores(q, k, scale=0.5, backend="reference")
    order = ops.select_topk(scores, scores.shape[1], backend="reference")
    return ops.fuse_tokens(x, order, scores, 3, residual=residual, backend="reference")


def stage_inputs(batch, num_tokens=8, seed=0):
    q, k = class_query_and_keys(batch, num_tokens=num_tokens, dtype=torch.float32, seed=seed)
    return [leaf(t) for t in (q, k, tokens(batch, num_tokens, 6, seed=seed), tokens(batch, 5, 6, seed=seed + 1))]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("stage", [evit_by_functions, evit_by_reference])
def test_compile_fullgraph(stage, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(stage, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, num_tokens in ((2, 8), (5, 8), (3, 11)) if dynamic else ((2, 8),):
        leaves = stage_inputs(batch, num_tokens)
        expected, ours = stage(*leaves), compiled(*leaves)
        torch.testing.assert_close(ours, expected)
        grads = [torch.autograd.grad(out.square().sum(), leaves) for out in (ours, expected)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_dynamic_batch_compiles_once():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(evit_by_functions, fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 3, 7):
        compiled(*stage_inputs(batch))
    assert counter.frame_count == 1


@pytest.mark.parametrize("keep", [2, 5])
def test_compile_with_a_count_that_follows_the_shape(keep):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda s: ops.select_topk(s, s.shape[1] * keep // 6, backend="reference"),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for num_tokens in (6, 12, 18):
        scores = tokens(2, num_tokens)
        assert torch.equal(compiled(scores), ops.select_topk(scores, num_tokens * keep // 6))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("run", [ReceivedScores.apply, lambda q, k, s: ops.received_scores(q, k, scale=s)])
def test_received_scores_compile_fullgraph(run, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k: run(q, k, 0.5).square(), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, keys in ((2, 7), (5, 7), (3, 11)) if dynamic else ((2, 7),):
        leaves = [leaf(t) for t in queries_and_keys(batch, queries=keys, keys=keys, dtype=torch.float32)]
        ours, expected = compiled(*leaves), run(*leaves, 0.5).square()
        torch.testing.assert_close(ours, expected)
        grads = [torch.autograd.grad(out.sum(), leaves) for out in (ours, expected)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_received_scores_compile_once_for_every_batch():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, k: ops.received_scores(q, k), fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 3, 7):
        compiled(*queries_and_keys(batch, dtype=torch.float32))
    assert counter.frame_count == 1


def raises(kind, message, call, *args, **kwargs):
    with pytest.raises(kind, match=message):
        call(*args, **kwargs)


def test_cls_scores_refuses():
    q, k = torch.zeros(2, 3, 4), torch.zeros(2, 3, 7, 4)
    refuse = functools.partial(raises, call=ops.cls_scores)
    for q_, k_, kind, message in (
        ([0.0], k, TypeError, r"q must be a tensor of shape \(B, H, D\), got list"),
        (torch.zeros(2, 1, 3, 4), k, ValueError, r"q must have shape \(B, H, D\), got \(2, 1, 3, 4\)"),
        (q, torch.zeros(2, 3, 7), ValueError, r"k must have shape \(B, H, N, D\), got \(2, 3, 7\)"),
        (q.long(), k.long(), TypeError, "q must be floating point, got torch.int64"),
        (q.half(), k, TypeError, "q is torch.float16 and k torch.float32"),
        (q.to("meta"), k, ValueError, "q is on meta and k on cpu"),
        (torch.zeros(2, 3, 5), k, ValueError, r"q must have shape \(2, 3, 4\) to go with k .*, got \(2, 3, 5\)"),
        (q, torch.zeros(2, 3, 0, 4), ValueError, r"at least one head, key and channel, got shape \(2, 3, 0, 4\)"),
        (q[:, :0], k[:, :0], ValueError, r"at least one head, key and channel, got shape \(2, 0, 7, 4\)"),
    ):
        raises(kind, message, ops.cls_scores, q_, k_)
    valid = torch.ones(2, 7, dtype=torch.bool)
    for kind, message, options in (
        (TypeError, r"valid must be a tensor of shape \(B, N\), got bool", {"valid": True}),
        (TypeError, "valid must be bool, got torch.float32", {"valid": valid.float()}),
        (ValueError, r"valid must have shape \(2, 7\) to go with k, got \(2, 6\)", {"valid": valid[:, 1:]}),
        (ValueError, "k is on cpu and valid on meta", {"valid": valid.to("meta")}),
    ):
        refuse(kind, message, q=q, k=k, **options)
        raises(kind, message, ops.cls_value_scores, q, k, k, **options)
    for kind, message, value in (
        (ValueError, r"value must have shape \(B, H, N, D\), got \(2, 3, 4\)", q),
        (ValueError, r"value must have k's shape \(2, 3, 7, 4\), got \(2, 3, 6, 4\)", k[:, :, 1:]),
        (TypeError, "k is torch.float32 and value torch.float16", k.half()),
        (ValueError, "k is on cpu and value on meta", k.to("meta")),
    ):
        raises(kind, message, ops.cls_value_scores, q, k, value)
    refuse(ValueError, "prefix must be between 0 and 7, got 8", q=q, k=k, prefix=8)
    refuse(ValueError, "prefix must be between 0 and 7, got -1", q=q, k=k, prefix=-1)
    refuse(TypeError, "prefix must be an integer, got 1.0", q=q, k=k, prefix=1.0)
    refuse(ValueError, "unknown backend 'cuda'", q=q, k=k, backend="cuda")
    refuse(RuntimeError, "'triton' was asked for", q=q, k=k, backend="triton")


def test_received_scores_refuses():
    q, k = torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 7, 4)
    refuse = functools.partial(raises, call=ops.received_scores)
    for q_, k_, kind, message in (
        ([0.0], k, TypeError, r"q must be a tensor of shape \(B, H, M, D\), got list"),
        (q[0], k, ValueError, r"q must have shape \(B, H, M, D\), got \(3, 5, 4\)"),
        (q, k[0], ValueError, r"k must have shape \(B, H, N, D\), got \(3, 7, 4\)"),
        (q.long(), k.long(), TypeError, "q must be floating point, got torch.int64"),
        (q.half(), k, TypeError, "q is torch.float16 and k torch.float32"),
        (q.to("meta"), k, ValueError, "q is on meta and k on cpu"),
        (q[:1], k, ValueError, r"q and k must agree in B, H and D, got \(1, 3, 5, 4\) and \(2, 3, 7, 4\)"),
        (q[..., :3], k, ValueError, r"q and k must agree in B, H and D, got \(2, 3, 5, 3\) and"),
        (q, k[:, :, :0], ValueError, r"at least one head, key and channel, got shape \(2, 3, 0, 4\)"),
        (q[:, :0], k[:, :0], ValueError, r"at least one head, key and channel, got shape \(2, 0, 7, 4\)"),
        (q[..., :0], k[..., :0], ValueError, r"at least one head, key and channel, got shape \(2, 3, 7, 0\)"),
    ):
        raises(kind, message, ops.received_scores, q_, k_)
    refuse(ValueError, "unknown backend 'cuda'", q=q, k=k, backend="cuda")
    refuse(RuntimeError, "'triton' was asked for", q=q, k=k, backend="triton")


def test_select_topk_refuses():
    scores = torch.zeros(2, 5)
    refuse = functools.partial(raises, call=ops.select_topk)
    raises(TypeError, r"scores must be a tensor of shape \(B, N\), got list", ops.select_topk, [1.0], 1)
    raises(ValueError, r"scores must have shape \(B, N\), got \(5,\)", ops.select_topk, scores[0], 1)
    raises(TypeError, "scores must be floating point, got torch.int64", ops.select_topk, scores.long(), 1)
    refuse(ValueError, "k must be between 0 and 5, got 6", scores=scores, k=6)
    refuse(ValueError, "k must be between 0 and 5, got -1", scores=scores, k=-1)
    refuse(TypeError, "k must be an integer, got 2.0", scores=scores, k=2.0)
    refuse(TypeError, "k must be an integer, got True", scores=scores, k=True)
    refuse(ValueError, "unknown backend 'gpu'", scores=scores, k=1, backend="gpu")
    refuse(RuntimeError, "'triton' was asked for", scores=scores, k=1, backend="triton")


def test_fuse_tokens_refuses():
    x, order, scores, residual = fuse_inputs(dtype=torch.float32)
    good = {"x": x, "order": order, "scores": scores, "k": 3, "residual": residual}
    for kind, message, changed in (
        (TypeError, r"x must be a tensor of shape \(B, N, C\), got NoneType", {"x": None}),
        (ValueError, r"x must have shape \(B, N, C\), got \(8, 5\)", {"x": x[0]}),
        (ValueError, r"order must have shape \(B, P\), got \(7,\)", {"order": order[0]}),
        (ValueError, r"scores must have shape \(B, P\), got \(7,\)", {"scores": scores[0]}),
        (TypeError, "x must be floating point, got torch.int64", {"x": x.long()}),
        (TypeError, "order must hold int64 or int32 indices, got torch.float32", {"order": order.float()}),
        (TypeError, "scores must be floating point, got torch.int64", {"scores": scores.long()}),
        (ValueError, "x is on cpu and order on meta", {"order": order.to("meta")}),
        (ValueError, "x is on cpu and scores on meta", {"scores": scores.to("meta")}),
        (ValueError, "x is on cpu and residual on meta", {"residual": residual.to("meta")}),
        (ValueError, "prefix must be between 0 and 8, got 9", {"prefix": 9}),
        (TypeError, "prefix must be an integer, got '1'", {"prefix": "1"}),
        (ValueError, r"order must have shape \(2, 7\), .* got \(2, 6\)", {"order": order[:, 1:]}),
        (ValueError, r"scores must have shape \(2, 7\), .* got \(1, 7\)", {"scores": scores[:1]}),
        (ValueError, "k must be between 0 and 7, got 8", {"k": 8}),
        (ValueError, "k must be between 0 and 7, got -1", {"k": -1}),
        (TypeError, "k must be an integer, got 3.0", {"k": 3.0}),
        (ValueError, r"residual must have shape \(2, 5, 5\), got \(2, 4, 5\)", {"residual": residual[:, 1:]}),
        (ValueError, "residual_bias is part of a residual", {"residual": None, "residual_bias": residual[0, 0]}),
        (ValueError, r"residual_bias must have shape \(5,\), got \(4,\)", {"residual_bias": residual[0, 0, 1:]}),
        (ValueError, "x is on cpu and residual_bias on meta", {"residual_bias": residual[0, 0].to("meta")}),
        (ValueError, "unknown backend 'best'", {"backend": "best"}),
        (RuntimeError, "'triton' was asked for", {"backend": "triton"}),
    ):
        raises(kind, message, ops.fuse_tokens, **{**good, **changed})
    assert ops.fuse_tokens(**good).shape == (2, 5, 5)


def slow_order(row, k):
    """Sort best first; NaN after everything else; Python's sort is stable, so ties stay in index order."""
    return sorted(range(len(row)), key=lambda n: (math.isnan(row[n]), 0.0 if math.isnan(row[n]) else -row[n]))[:k]


SCORES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan]),
    st.integers(-3, 3).map(float),
    st.floats(width=16),
)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    batch=st.integers(0, 3),
    num_tokens=st.integers(0, 12),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    transposed=st.booleans(),
)
def test_select_topk_against_a_slow_sort(data, batch, num_tokens, dtype, transposed):
    count = batch * num_tokens
    values = data.draw(st.lists(SCORES, min_size=count, max_size=count))
    scores = torch.tensor(values, dtype=torch.float64).view(batch, num_tokens).to(dtype)
    if transposed:
        scores = scores.t().contiguous().t()
    k = data.draw(st.integers(0, num_tokens))
    expected = [slow_order(row, k) for row in scores.tolist()]
    for ours in (ops.select_topk(scores, k), torch.ops.fastreduce.select_topk(scores, k)):
        assert (ours.dtype, ours.shape) == (torch.int64, (batch, k))
        assert ours.tolist() == expected


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 3),
    heads=st.integers(1, 4),
    num_tokens=st.integers(1, 9),
    head_dim=st.sampled_from([1, 3, 8, 80]),
    scale=st.sampled_from([None, 0.1, 2.0]),
    data=st.data(),
)
def test_cls_scores_against_the_softmax_matrix(batch, heads, num_tokens, head_dim, scale, data):
    prefix = data.draw(st.integers(0, num_tokens))
    q, k = class_query_and_keys(batch, heads, num_tokens, head_dim)
    factor = head_dim**-0.5 if scale is None else scale
    attention = torch.softmax(factor * q.unsqueeze(2) @ k.transpose(2, 3), dim=-1)[:, :, 0]
    ours = ops.cls_scores(q, k, prefix=prefix, scale=scale)
    torch.testing.assert_close(ours, attention[:, :, prefix:].mean(1), atol=1e-13, rtol=1e-12)
    half = ops.cls_scores(q.bfloat16(), k.bfloat16(), prefix=prefix, scale=scale)
    assert half.dtype == torch.float32
    exact = ops.cls_scores(q.bfloat16().double(), k.bfloat16().double(), prefix=prefix, scale=scale)
    torch.testing.assert_close(half.double(), exact, atol=1e-5, rtol=1e-4)  # logits reach 100: 1e-5 of float32


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 3),
    heads=st.integers(1, 4),
    queries=st.integers(0, 9),
    keys=st.integers(1, 9),
    head_dim=st.sampled_from([1, 3, 8, 80]),
    scale=st.sampled_from([None, 0.1, 2.0]),
)
def test_received_scores_against_plain_loops(batch, heads, queries, keys, head_dim, scale):
    q, k = queries_and_keys(batch, heads, queries, keys, head_dim)
    factor = head_dim**-0.5 if scale is None else scale
    expected = torch.zeros(batch, keys, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for m in range(queries):
                weights = [math.exp(factor * torch.dot(q[b, h, m], k[b, h, n]).item()) for n in range(keys)]
                expected[b] += torch.tensor(weights, dtype=torch.float64) / sum(weights)
    torch.testing.assert_close(ops.received_scores(q, k, scale=scale), expected, atol=1e-12, rtol=1e-11)
    half = ops.received_scores(q.bfloat16(), k.bfloat16(), scale=scale)
    assert half.dtype == torch.float32
    exact = ops.received_scores(q.bfloat16().double(), k.bfloat16().double(), scale=scale)
    torch.testing.assert_close(half.double(), exact, atol=1e-4, rtol=1e-4)  # logits reach 100: 1e-5 of float32


@pytest.mark.parametrize("queries", [1, 30, 100])
def test_received_scores_of_blocks_of_queries(queries, monkeypatch):
    q, k = queries_and_keys(2, 2, queries, 11)
    whole = ops.received_scores(q, k)
    torch.testing.assert_close(whole.sum(1), torch.full((2,), 2.0 * queries, dtype=torch.float64))
    monkeypatch.setattr(_blocks, "MATRIX", 77)
    torch.testing.assert_close(ops.received_scores(q, k), whole)


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(0, 3), num_tokens=st.integers(1, 9), with_residual=st.booleans(), data=st.data())
def test_fuse_tokens_against_plain_loops(batch, num_tokens, with_residual, data):
    prefix = data.draw(st.integers(0, num_tokens))
    k = data.draw(st.integers(0, num_tokens - prefix))
    x, order, scores, residual = fuse_inputs(batch, num_tokens, k, 3, prefix)
    if batch == 0:
        order = order.new_empty(0, num_tokens - prefix)
    expected = residual.clone() if with_residual else torch.zeros_like(residual)
    bias = torch.tensor([0.5, -1.0, 2.0], dtype=x.dtype)
    for b in range(batch):
        rows = [*range(prefix), *(order[b, :k] + prefix).tolist()]
        for j, n in enumerate(rows):
            expected[b, j] += x[b, n]
        for n in order[b, k:].tolist():
            expected[b, -1] += scores[b, n] * x[b, n + prefix]
        if with_residual:
            expected[b, -1] += (sum(scores[b, n] for n in order[b, k:].tolist()) - 1) * bias
    added = {"residual": residual, "residual_bias": bias} if with_residual else {}
    ours = ops.fuse_tokens(x, order, scores, k, prefix=prefix, **added)
    torch.testing.assert_close(ours, expected, atol=1e-13, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 3),
    heads=st.integers(1, 4),
    num_tokens=st.integers(1, 9),
    head_dim=st.sampled_from([1, 3, 8]),
    masked=st.booleans(),
    data=st.data(),
)
def test_cls_scores_of_valid_keys_and_values_against_loops(batch, heads, num_tokens, head_dim, masked, data):
    prefix = data.draw(st.integers(0, num_tokens))
    qkv = torch.randn(batch, num_tokens, 3, heads, head_dim, generator=seeded(3), dtype=torch.float64)
    q, k, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q, valid = q[:, :, 0], torch.ones(batch, num_tokens, dtype=torch.bool)
    if masked:
        valid = torch.rand(batch, num_tokens, generator=seeded(4)) < 0.5
        valid[:, 0] = True
    plain, weighted = torch.zeros(batch, num_tokens).double(), torch.zeros(batch, num_tokens).double()
    for b in range(batch):
        for h in range(heads):
            seen = valid[b].nonzero().flatten().tolist()
            exponentials = {n: math.exp(0.6 * float(q[b, h] @ k[b, h, n])) for n in seen}
            for n in seen:
                attention = exponentials[n] / sum(exponentials.values())
                plain[b, n] += attention / heads
                weighted[b, n] += attention * math.sqrt(float(value[b, h, n] @ value[b, h, n]))
    given_mask = valid if masked else None
    ours = ops.cls_scores(q, k, prefix=prefix, scale=0.6, valid=given_mask)
    torch.testing.assert_close(ours, plain[:, prefix:], atol=1e-13, rtol=1e-12)
    for ours in (
        ops.cls_value_scores(q, k, value, prefix=prefix, scale=0.6, valid=given_mask),
        torch.ops.fastreduce.cls_value_scores(q, k, value, given_mask, prefix, 0.6),
    ):
        torch.testing.assert_close(ours, weighted[:, prefix:], atol=1e-13, rtol=1e-12)
        assert not ours[~valid[:, prefix:]].any()


def test_cls_scores_with_values_have_no_gradient():
    q, k = class_query_and_keys()
    assert not ops.cls_value_scores(leaf(q), leaf(k), leaf(k)).requires_grad
    assert ops.cls_scores(leaf(q), leaf(k), valid=torch.ones(2, 7, dtype=torch.bool)).requires_grad


@pytest.mark.parametrize("with_value", [False, True])
def test_compile_cls_scores_with_options(with_value):
    torch._dynamo.reset()

    def by_functions(q, k, valid):
        if with_value:
            return torch.ops.fastreduce.cls_value_scores(q, k, k, valid, 1, 0.5)
        return ClsScores.apply(q, k, 1, 0.5, valid)

    def by_reference(q, k, valid):
        if with_value:
            return ops.cls_value_scores(q, k, k, scale=0.5, valid=valid)
        return ops.cls_scores(q, k, scale=0.5, valid=valid)

    for run in (by_functions, by_reference):
        compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
        for batch in (2, 3):
            q, k = class_query_and_keys(batch, dtype=torch.float32)
            valid = torch.arange(7) < torch.arange(5, 5 + batch).unsqueeze(1)
            torch.testing.assert_close(compiled(q, k, valid), by_reference(q, k, valid))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_add_up_to_the_attention_that_the_prefix_leaves(dtype):
    q, k = class_query_and_keys(dtype=dtype)
    whole = ops.cls_scores(q, k, prefix=0)
    torch.testing.assert_close(whole.sum(1), torch.ones(2))
    assert torch.equal(whole[:, 2:], ops.cls_scores(q, k, prefix=2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_batch_invariance_and_determinism(dtype):
    q, k = class_query_and_keys(4, 3, 23, 16, dtype)
    x, _, _, residual = fuse_inputs(4, 23, 9, 40, 1, dtype)

    def run(part):
        leaves = [leaf(tensor[part]) for tensor in (q, k, x, residual)]
        scores = ClsScores.apply(leaves[0], leaves[1], 1, 0.5)
        chosen = torch.ops.fastreduce.select_topk(scores.detach(), 22)
        out = FuseTokens.apply(leaves[2], chosen, scores, 9, 1, leaves[3], None)
        return [scores, chosen, out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    whole, again, alone = run(slice(None)), run(slice(None)), run(slice(2, 3))
    for first, second, one in zip(whole, again, alone, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first[2:3], one)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("run", [ReceivedScores.apply, lambda q, k, scale: ops.received_scores(q, k, scale=scale)])
def test_received_scores_bitwise_batch_invariance_and_determinism(run, dtype, matrix):
    q, k = queries_and_keys(4, 3, 23, 23, 16, dtype)

    def results(part):
        leaves = [leaf(q[part]), leaf(k[part])]
        scores = run(*leaves, 0.5)
        return [scores, *torch.autograd.grad(scores.square().sum(), leaves)]

    whole, again, alone = results(slice(None)), results(slice(None)), results(slice(2, 3))
    for first, second, one in zip(whole, again, alone, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first[2:3], one)
