"""attention in an ordinary process: operator, gradients, compilation, errors, numbers."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastreduce import ops, reference
from fastreduce.ops.attention import Attention, AttentionPolicy
from fastreduce.ops.attention_scores import AttentionScores
from fastreduce.reference import _blocks
from tests.helpers.inputs import DTYPES, seeded, tokens

OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
NATIVE = torch.ops.fastreduce
ALL_DTYPES = [*DTYPES, torch.float64]


def packed(batch=2, heads=3, num_tokens=7, head_dim=4, dtype=torch.float64, seed=0):
    """Return views of one packed qkv, as a block of a model hands them over."""
    qkv = torch.randn(batch, num_tokens, 3, heads, head_dim, generator=seeded(seed)).to(dtype)
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def policies(batch=2, num_tokens=7, dtype=torch.float64, seed=0):
    """Draw hidden, seen and half seen keys."""
    choices = torch.tensor([0.0, 1.0, 0.3], dtype=torch.float64)
    return choices[torch.randint(3, (batch, num_tokens), generator=seeded(seed))].to(dtype)


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def attend(q, k, v, policy, scale=None, eps=1e-6, **options):
    """Attend, plain or under a policy, by the public functions."""
    if policy is None:
        return ops.attention(q, k, v, scale=scale, **options)
    return ops.attention_policy(q, k, v, policy, scale=scale, eps=eps, **options)


def by_kernels(q, k, v, policy, scale=0.5, eps=1e-6):
    """Compute the same by the functions that differentiate kernels."""
    if policy is None:
        return Attention.apply(q, k, v, scale)
    return AttentionPolicy.apply(q, k, v, policy, scale, eps)


def plain(q, k, v, policy, scale, eps):
    """Attend one query after the other, in Python's numbers."""
    batch, heads, queries, _ = q.shape
    out = torch.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            for m in range(queries):
                logits = [scale * float(q[b, h, m] @ key) for key in k[b, h]]
                weights = [math.exp(logit - max(logits)) for logit in logits]
                if policy is not None:
                    weights = [w if n == m else w * float(policy[b, n]) for n, w in enumerate(weights)]
                    total = sum(weights) + eps
                    weights = [w + eps / len(weights) for w in weights]
                else:
                    total = sum(weights)
                for n, weight in enumerate(weights):
                    out[b, h, m] += weight / total * v[b, h, n]
    return out


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 2),
    heads=st.integers(1, 2),
    queries=st.integers(0, 6),
    keys=st.integers(1, 6),
    head_dim=st.integers(1, 3),
    scale=st.sampled_from([None, 0.7, 5.0]),
    eps=st.sampled_from([1e-6, 0.1, 0.0]),
    masked=st.booleans(),
)
def test_against_plain_loops(batch, heads, queries, keys, head_dim, scale, eps, masked):
    queries = keys if masked else queries
    q = packed(batch, heads, queries, head_dim, seed=1)[0]
    _, k, v = packed(batch, heads, keys, head_dim)
    policy = policies(batch, keys) if masked else None
    expected = plain(q, k, v, policy, head_dim**-0.5 if scale is None else scale, eps)
    ours = attend(q, k, v, policy, scale, eps)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)
    ours = by_kernels(q, k, v, policy, head_dim**-0.5 if scale is None else scale, eps)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)


def textbook(q, k, v, policy, scale, eps):
    """Attend by the textbook, the matrix A and all."""
    num_tokens = k.shape[2]
    logits = scale * q @ k.transpose(2, 3)
    own = torch.eye(num_tokens, dtype=q.dtype)
    visible = policy[:, None, None, :]
    weights = torch.exp(logits - logits.max(-1, keepdim=True)[0]) * (visible + (1.0 - visible) * own)
    return ((weights + eps / num_tokens) / (weights.sum(-1, keepdim=True) + eps)) @ v


@pytest.mark.parametrize("scale", [0.5, 8.0])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_values_and_gradients_against_the_textbook(scale, eps):
    # With the strong scale hidden keys dominate rows, and the gradient of the maximum is no longer small.
    leaves = [leaf(t) for t in (*packed(), policies())]
    expected = textbook(*leaves, scale, eps)
    grad = tokens(*expected.shape, seed=5).double()
    grads = torch.autograd.grad(expected, leaves, grad)
    for out in (attend(*leaves, scale, eps), by_kernels(*leaves, scale, eps)):
        torch.testing.assert_close(out, expected, atol=1e-13, rtol=1e-12)
        for a, b in zip(torch.autograd.grad(out, leaves, grad), grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12 * b.abs().max().item(), rtol=1e-11)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [*(("packed", dtype) for dtype in ALL_DTYPES), ("dense", torch.float16), ("sequence first", torch.float32)],
)
@pytest.mark.parametrize("masked", [True, False])
def test_opcheck(masked, layout, dtype):
    q, k, v = packed(dtype=dtype)
    if layout == "dense":
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if layout == "sequence first":
        q, k, v = (t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for t in (q, k, v))
    policy = policies(dtype=torch.float32).t().contiguous().t() if masked else None
    check = functools.partial(torch.library.opcheck, test_utils=OPCHECKS)
    inputs, numbers = (q, k, v, policy) if masked else (q, k, v), (0.5, 1e-6) if masked else (0.5,)
    operators = NATIVE.attention_policy, NATIVE.attention_policy_backward
    forward, backward = operators if masked else (NATIVE.attention, NATIVE.attention_backward)
    check(forward.default, (*inputs, *numbers))
    saved = forward(*inputs, *numbers)
    for grad in (torch.ones_like(q), torch.ones(2, 1, 1, 1, dtype=dtype).expand(2, 3, 7, 4)):
        check(backward.default, (grad, *inputs, *saved, *numbers))


def test_opcheck_of_fewer_queries_and_of_empty_batches():
    check = functools.partial(torch.library.opcheck, test_utils=OPCHECKS)
    q, k, v = packed(dtype=torch.float32)
    check(NATIVE.attention.default, (q[:, :, :2], k, v, 0.5))
    policy = policies(dtype=torch.float32)
    check(NATIVE.attention_policy.default, (q[:0], k[:0], v[:0], policy[:0], 0.5, 1e-6))


# The CPU implementation of the operators is the reference, so gradcheck checks its explicit backward formulas.
@pytest.mark.parametrize(("scale", "eps"), [(0.7, 1e-6), (0.7, 0.05), (3.0, 0.05)])
def test_gradcheck_with_a_policy(scale, eps):
    leaves = [leaf(t) for t in (*packed(num_tokens=5, head_dim=3), policies(num_tokens=5))]
    assert torch.autograd.gradcheck(lambda *inputs: AttentionPolicy.apply(*inputs, scale, eps), leaves)
    assert torch.autograd.gradcheck(lambda *inputs: reference.attention_policy(*inputs, scale, eps), leaves)


def test_gradcheck_without():
    q, k, v = (leaf(t) for t in packed(num_tokens=5, head_dim=3))
    assert torch.autograd.gradcheck(lambda q, k, v: Attention.apply(q[:, :, :2], k, v, 0.7), (q, k, v))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("policy_dtype", [torch.float32, torch.bfloat16])
def test_dtypes_of_result_and_gradients(dtype, policy_dtype):
    leaves = [leaf(t) for t in (*packed(dtype=dtype), policies(dtype=policy_dtype))]
    for out in (attend(*leaves), by_kernels(*leaves)):
        assert out.dtype == dtype
        for tensor, grad in zip(leaves, torch.autograd.grad(out.float().sum(), leaves), strict=True):
            assert (grad.dtype, grad.shape) == (tensor.dtype, tensor.shape)


def test_a_constant_policy_gets_no_gradient():
    q, k, v = (leaf(t) for t in packed())
    out = by_kernels(q, k, v, policies())
    assert all(grad is not None for grad in torch.autograd.grad(out.sum(), (q, k, v)))


def test_hidden_tokens_hardly_matter_to_the_others():
    q, k, v = packed(dtype=torch.float32)
    policy = torch.ones(2, 7)
    policy[:, 4:] = 0.0
    ours = attend(q, k, v, policy)
    alone = ops.attention(q[:, :, :4], k[:, :, :4], v[:, :, :4])
    torch.testing.assert_close(ours[:, :, :4], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_is_summed_in_float32(dtype):
    inputs = packed(2, 2, 40, 8, dtype)
    policy = policies(2, 40, dtype)
    ours = attend(*inputs, policy)
    exact = textbook(*(t.double() for t in inputs), policy.double(), 8**-0.5, 1e-6)
    torch.testing.assert_close(ours, exact.to(dtype), atol=1e-6, rtol=2 * torch.finfo(dtype).eps)


def by_function(q, k, v, policy):
    return by_kernels(q, k, v, policy)


def by_reference(q, k, v, policy):
    return attend(q, k, v, policy, 0.5, backend="reference")


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("stage", [by_function, by_reference])
def test_compile_fullgraph(stage, masked, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(stage, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, num_tokens in ((2, 7), (5, 7), (3, 9)) if dynamic else ((2, 7),):
        leaves = [leaf(t) for t in packed(batch, num_tokens=num_tokens, dtype=torch.float32)]
        leaves += [leaf(policies(batch, num_tokens, torch.float32))] if masked else []
        expected, ours = (f(*leaves, *([] if masked else [None])) for f in (stage, compiled))
        torch.testing.assert_close(ours, expected)
        grads = [torch.autograd.grad(out.square().sum(), leaves) for out in (ours, expected)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_batch_invariance_and_determinism(dtype):
    q, k, v = packed(4, 2, 23, 16, dtype)
    policy = policies(4, 23, torch.float32)

    def run(part):
        leaves = [leaf(tensor[part]) for tensor in (q, k, v, policy)]
        out = by_kernels(*leaves, 0.25)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    for first, second, one in zip(run(slice(None)), run(slice(None)), run(slice(2, 3)), strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first[2:3], one)


def test_refuses():
    q, k, v = packed(dtype=torch.float32)
    policy = torch.ones(2, 7)
    good = {"q": q, "k": k, "v": v, "policy": policy}
    for kind, message, changed in (
        (TypeError, r"q must be a tensor of shape \(B, H, M, D\), got list", {"q": [0.0]}),
        (ValueError, r"k must have shape \(B, H, N, D\), got \(3, 7, 4\)", {"k": k[0]}),
        (ValueError, r"v must have shape \(B, H, N, D\), got \(3, 7, 4\)", {"v": v[0]}),
        (TypeError, "q must be floating point, got torch.int64", {"q": q.long()}),
        (TypeError, "q is torch.float32 and k torch.float16", {"k": k.half()}),
        (TypeError, "q is torch.float32 and v torch.float64", {"v": v.double()}),
        (ValueError, "q is on cpu and v on meta", {"v": v.to("meta")}),
        (ValueError, r"k must have shape \(2, 3, 7, 4\) to go with q .*, got \(2, 2, 7, 4\)", {"k": k[:, :2]}),
        (ValueError, r"v must have shape \(2, 3, 7, 4\) to go with q .*, got \(2, 3, 6, 4\)", {"v": v[:, :, 1:]}),
        (ValueError, "at least one head, key and channel", {"q": q[:, :0], "k": k[:, :0], "v": v[:, :0]}),
        (ValueError, "at least one head, key and channel", {"k": k[:, :, :0], "v": v[:, :, :0]}),
        (ValueError, r"policy must have shape \(B, N\), got \(7,\)", {"policy": policy[0]}),
        (TypeError, "policy must be floating point, got torch.bool", {"policy": policy.bool()}),
        (ValueError, "q is on cpu and policy on meta", {"policy": policy.to("meta")}),
        (ValueError, r"policy must have shape \(2, 7\), one entry a key, got \(2, 6\)", {"policy": policy[:, 1:]}),
        (ValueError, "as many queries as keys, got 6 queries and 7 keys", {"q": q[:, :, 1:]}),
        (ValueError, "eps must be at least 0 and finite, got -1.0", {"eps": -1.0}),
        (ValueError, "eps must be at least 0 and finite, got nan", {"eps": math.nan}),
        (ValueError, "unknown backend 'cuda'", {"backend": "cuda"}),
        (RuntimeError, "'triton' was asked for", {"backend": "triton"}),
    ):
        with pytest.raises(kind, match=message):
            ops.attention_policy(**{**good, **changed})


INDEX = torch.tensor([[4, 0, 0], [2, 5, 2]])  # as ATS pads: the same query several times
CHOSEN_OFFSETS = tuple(torch.tensor(bounds, dtype=torch.int32) for bounds in ([0, 3, 3, 5, 6], [0, 5, 5, 8, 13]))
KEPT = torch.tensor([[0, 2], [0, 0], [1, 0], [1, 2]])  # of packed images, each once, the real ones first
OFFSETS = tuple(torch.tensor(bounds, dtype=torch.int32) for bounds in ([0, 3, 3, 5, 6], [0, 2, 4, 4, 6]))


def bias_of(q, *, hidden=True):
    """Return a bias: every third key is seen by nobody, and with ``hidden`` no key of the last image."""
    bias = tokens(q.shape[0], q.shape[2], seed=3).to(torch.promote_types(q.dtype, torch.float32))
    bias[:, 1::3] = -torch.inf
    if hidden:
        bias[-1] = -torch.inf
    return bias


def chosen(q, prefix=1):
    rows = torch.cat([torch.arange(prefix).expand(2, prefix), INDEX + prefix], dim=1)
    return q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))


def spelled_out(q, k, v, bias):
    """Return the matrix, the result and the logsumexp; a query without keys has weights of zero."""
    logits = q.shape[3] ** -0.5 * q @ k.transpose(2, 3)
    logits = logits if bias is None else logits + bias[:, None, None, :]
    weights = torch.nan_to_num(torch.softmax(logits, -1), nan=0.0)
    return weights, weights @ v, logits.logsumexp(-1)


def in_one_row(*tensors):
    """Put two images into one row: (2, H, 7, D) -> (1, H, 14, D)."""
    return [t.transpose(1, 2).flatten(0, 1).unsqueeze(0).transpose(1, 2) for t in tensors]


def ragged(q, k, v, bias=None, **options):
    """Return all images in one row, of which the last is past the end."""
    bias = None if bias is None else bias.reshape(1, -1)
    return ops.attention_packed(*in_one_row(q, k, v), OFFSETS, (3, 2), bias=bias, **options)


def ragged_index(q, k, v, bias, **options):
    """Return an index: the class token and at most two others of every image attend, and there is room for two more."""
    options = {"index": KEPT, "offsets": CHOSEN_OFFSETS, "longest": (3, 5), "num_out": 8, **options}
    return ops.attention_packed(*in_one_row(q, k, v), bias=bias.reshape(1, -1), **options)


def by_parts(scale=None):
    """Name -> (q, k, v, bias) -> results, by the public functions and by the functions that differentiate kernels."""
    half = 0.5 if scale is None else scale
    return {
        "bias": lambda q, k, v, b: (ops.attention(q, k, v, bias=b, scale=scale),),
        "bias, by function": lambda q, k, v, b: (Attention.apply(q, k, v, half, b),),
        "index": lambda q, k, v, b: (ops.attention(q, k, v, index=INDEX, scale=scale),),
        "index, by function": lambda q, k, v, b: (Attention.apply(q, k, v, half, b, INDEX, 1),),
        "class": lambda q, k, v, b: ops.attention_cls_scores(q, k, v, bias=b, prefix=2, scale=scale),
        "class, by function": lambda q, k, v, b: AttentionScores.apply(q, k, v, "class", b, 2, half),
        "received": lambda q, k, v, b: ops.attention_received_scores(q, k, v, bias=b, scale=scale),
        "received, by function": lambda q, k, v, b: AttentionScores.apply(q, k, v, "received", b, 0, half),
        "ragged": lambda q, k, v, b: (ragged(q, k, v, b, scale=scale),),
        "ragged, index": lambda q, k, v, b: (ragged_index(q, k, v, b, scale=scale),),
        "ragged, index, by function": lambda q, k, v, b: (
            Attention.apply(*in_one_row(q, k, v), half, b.reshape(1, -1), KEPT, 1, *CHOSEN_OFFSETS, 3, 5, 8),
        ),
        "ragged, by function": lambda q, k, v, b: (
            Attention.apply(*in_one_row(q, k, v), half, b.reshape(1, -1), None, 0, *OFFSETS, 3, 2),
        ),
    }


@pytest.mark.parametrize("name", by_parts())
def test_gradcheck_of_options(name):
    call = by_parts(0.5)[name]
    q, k, v = (leaf(t) for t in packed(heads=2, head_dim=3))
    bias = tokens(2, 7, seed=3).double()
    assert torch.autograd.gradcheck(call, (q, k, v, leaf(bias)))
    hidden = bias_of(q)

    def seen(q, k, v):
        return tuple(out.masked_fill(out == -torch.inf, 0.0) for out in call(q, k, v, hidden))

    assert torch.autograd.gradcheck(seen, (q, k, v))


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("by_function", [False, True])
def test_options_against_the_matrix(by_function, dtype):
    q, k, v = packed(dtype=dtype)
    bias = bias_of(q)
    wide = [t.double() for t in (q, k, v)]
    weights, exact, logsumexp = spelled_out(*wide, bias.double())
    calls = by_parts()
    suffix = ", by function" if by_function else ""
    close = functools.partial(
        torch.testing.assert_close, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps
    )
    close(calls["bias" + suffix](q, k, v, bias)[0].double(), exact)
    close(
        calls["index" + suffix](q, k, v, bias)[0].double(),
        chosen(spelled_out(*wide, None)[1] if not by_function else exact),
    )
    if by_function:
        sums = NATIVE.attention(q, k, v, q.shape[3] ** -0.5, bias, INDEX, 1)[1]
        close(sums.double(), chosen(logsumexp.unsqueeze(-1)).squeeze(-1), atol=1e-5, rtol=1e-5)
    for kind, scores in (("class", weights[:, :, 0, 2:].mean(1)), ("received", weights.sum((1, 2)))):
        out, ours = calls[kind + suffix](q, k, v, bias)
        close(out.double(), exact)
        close(ours.double(), scores, atol=1e-5, rtol=1e-5)
        assert ours.dtype == torch.promote_types(dtype, torch.float32)


def test_scores_are_those_of_the_primitives(monkeypatch):
    q, k, v = packed(dtype=torch.float32)
    for most in (1 << 20, 20):  # a few rows of the matrix at a time
        monkeypatch.setattr(_blocks, "MATRIX", most)
        out, scores = ops.attention_received_scores(q[:, :, 1:], k, v)
        torch.testing.assert_close(scores, ops.received_scores(q[:, :, 1:], k))
        torch.testing.assert_close(out, ops.attention(q[:, :, 1:], k, v))
        torch.testing.assert_close(
            AttentionScores.apply(q[:, :, 1:], k, v, "received", None, 0, 0.5)[1],
            ops.received_scores(q[:, :, 1:], k, scale=0.5),
        )
    torch.testing.assert_close(ops.attention_cls_scores(q, k, v, prefix=2)[1], ops.cls_scores(q[:, :, 0], k, prefix=2))


def test_images_of_one_row_see_their_own_keys_only():
    q, k, v = packed(1, 2, 9, dtype=torch.float32)
    q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
    bias = bias_of(q, hidden=False)
    out = ops.attention_packed(q, k, v, OFFSETS, (3, 2), bias=bias)
    for m, n in ((slice(0, 3), slice(0, 2)), (slice(5, 6), slice(4, 6))):
        alone = ops.attention(q[:, :, m], k[:, :, n], v[:, :, n], bias=bias[:, n])
        torch.testing.assert_close(out[:, :, m], alone)
    for nothing in (slice(3, 5), slice(6, 9)):  # an image without keys, and rows past the end
        assert not out[:, :, nothing].any()
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    for grad, count in zip(grads, (6, 6, 6), strict=True):
        assert not grad[:, :, count:].any()
        assert grad.isfinite().all()
    none = torch.zeros(1, dtype=torch.int32)
    assert not ops.attention_packed(q, k, v, (none, none), (0, 0)).any()


@pytest.mark.parametrize("name", [name for name in by_parts() if "function" in name])
def test_opcheck_and_compile_options(name):
    q, k, v = packed(dtype=torch.float32)
    bias = bias_of(q)
    call = by_parts()[name]
    leaves = [leaf(t) for t in (q, k, v, bias)]
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for run in (call, compiled):
        outs = run(*leaves)
        total = sum(torch.where(out == -torch.inf, 0.0, out).square().sum() for out in outs)
        results.append([*outs, *torch.autograd.grad(total, leaves, allow_unused=True)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)
    check = functools.partial(torch.library.opcheck, test_utils=OPCHECKS)
    num_out = ()
    if name.startswith("ragged, index"):
        q, k, v = in_one_row(q, k, v)
        options, num_out = (bias.reshape(1, -1), KEPT, 1, *CHOSEN_OFFSETS, 3, 5), (8,)
    elif name.startswith("ragged"):
        q, k, v = (t[:1] for t in (q, k, v))
        options = (bias[:1], None, 0, *OFFSETS, 3, 2)
    else:
        options = (bias, INDEX if name.startswith("index") else None, 1, None, None, 0, 0)
    arguments = (q, k, v, 0.5, *options, *num_out)
    check(NATIVE.attention.default, arguments)
    out, logsumexp = NATIVE.attention(*arguments)
    of_scores = ()
    if name.startswith(("class", "received")):
        kind = name.split(",")[0]
        check(NATIVE.attention_scores.default, (q, k, logsumexp, kind, bias, 1, 0.5))
        of_scores = (torch.ones(2, 7 if kind == "received" else 6), kind, False)
    for more in ((), of_scores):
        check(NATIVE.attention_backward.default, (out, q, k, v, out, logsumexp, 0.5, *options, *more))


def test_refuses_options():
    q, k, v = packed(dtype=torch.float32)
    one = [t[:1] for t in (q, k, v)]
    bias, bounds = bias_of(q), OFFSETS[0]
    call, row, scores = ops.attention, ops.attention_packed, ops.attention_cls_scores
    images = {"offsets": OFFSETS, "longest": (3, 2)}
    for kind, message, refused in (
        (ValueError, r"bias must have shape .*, got \(2, 6\)", lambda: call(q, k, v, bias=bias[:, 1:])),
        (TypeError, "bias must be floating point", lambda: call(q, k, v, bias=bias > 0)),
        (ValueError, "needs num_out", lambda: row(*one, index=KEPT, **images)),
        (ValueError, "num_out=6 goes with an index", lambda: row(*one, num_out=6, **images)),
        (ValueError, "num_out must be between 0", lambda: row(*one, index=KEPT, num_out=-1, **images)),
        (ValueError, r"each of the 4 images, got shape \(2, 3\)", lambda: row(*one, index=INDEX, num_out=6, **images)),
        (ValueError, "lie as the keys", lambda: row(one[0][:, :, 1:], *one[1:], index=KEPT, num_out=6, **images)),
        (TypeError, "index must hold int64 or int32", lambda: call(q, k, v, index=INDEX.float())),
        (ValueError, r"index must have q's batch size 2, got shape \(1, 3\)", lambda: call(q, k, v, index=INDEX[:1])),
        (ValueError, "prefix must be between 0 and 7, got 8", lambda: call(q, k, v, index=INDEX, prefix=8)),
        (ValueError, "the rows of all images", lambda: row(q, k, v, **images)),
        (TypeError, "keys must be int32", lambda: row(*one, offsets=(bounds, bounds.long()), longest=(3, 2))),
        (ValueError, "of one length, images", lambda: row(*one, offsets=(bounds, bounds[1:]), longest=(3, 2))),
        (ValueError, "longest must be between 0", lambda: row(*one, offsets=OFFSETS, longest=(-1, 2))),
        (ValueError, "class token's query", lambda: scores(q[:, :, :0], k, v)),
        (ValueError, "prefix must be", lambda: scores(q, k, v, prefix=8)),
        (ValueError, "bias must have shape", lambda: scores(q, k, v, bias=bias[:1])),
    ):  # fmt: skip
        with pytest.raises(kind, match=message):
            refused()
