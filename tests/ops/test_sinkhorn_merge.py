"""sinkhorn_merge in an ordinary process: values, operators, gradients, compilation, errors."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastreduce import ops
from fastreduce.ops.sinkhorn_merge import SinkhornMerge
from tests.helpers.cases import slow_but
from tests.helpers.inputs import DTYPES, tokens

OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
NATIVE = torch.ops.fastreduce


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def unit_rows(clusters, channels, dtype=torch.float64, seed=1):
    return nn.functional.normalize(tokens(clusters, channels, seed=seed).double(), dim=1).to(dtype)


def inputs(batch=2, num_tokens=7, clusters=3, channels=5, dtype=torch.float64, num_head=1):
    """Make tokens as a view behind the rows that form the head, as a model hands them over."""
    sequence = tokens(batch, num_head + num_tokens, channels, dtype=dtype)
    head = sequence[:, :num_head] if num_head else None
    return sequence[:, num_head:], unit_rows(clusters, channels, dtype), head


def slow_merge(x, centers, eps, iters):
    """Merge entry by entry, with the marginals, in float64: merged rows, scores, and both biases."""
    batch, num_tokens, clusters = x.shape[0], x.shape[1], centers.shape[0]
    merged = torch.zeros(batch, clusters, x.shape[2], dtype=torch.float64)
    scores = torch.zeros(batch, num_tokens, clusters, dtype=torch.float64)
    rows, columns = torch.zeros(batch, num_tokens), torch.zeros(batch, clusters)
    marginal = -math.log(clusters + num_tokens)

    def total(values):
        return max(values) + math.log(sum(math.exp(value - max(values)) for value in values))

    for b in range(batch):
        unit = [row / max(math.sqrt(float(row @ row)), 1e-12) for row in x[b]]
        z = [[float(row @ center) / eps for center in centers] for row in unit]
        c, r = [0.0] * num_tokens, [0.0] * clusters
        for _ in range(iters):
            r = [marginal - total([z[n][k] + c[n] for n in range(num_tokens)]) for k in range(clusters)]
            c = [marginal - total([z[n][k] + r[k] for k in range(clusters)]) for n in range(num_tokens)]
        for k in range(clusters):
            for n in range(num_tokens):
                merged[b, k] += math.exp(z[n][k] + r[k] + c[n] - marginal) * unit[n]
        scores[b], rows[b] = torch.tensor(z, dtype=torch.float64), torch.tensor(c)
        columns[b] = torch.tensor([value - marginal for value in r])
    return merged, scores, rows, columns


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(0, 2),
    num_tokens=st.integers(1, 7),
    clusters=st.integers(1, 5),
    channels=st.integers(1, 4),
    eps=st.sampled_from([1.0, 0.1, 0.01]),
    iters=st.integers(1, 4),
    num_head=st.sampled_from([None, 0, 2]),
)
def test_against_plain_loops(batch, num_tokens, clusters, channels, eps, iters, num_head):
    x, centers, head = inputs(batch, num_tokens, clusters, channels, num_head=num_head or 0)
    if num_head == 0:
        head = x[:, :0]
    merged, *plan = ops.sinkhorn_merge(x, centers, eps=eps, iters=iters, head=head)
    expected, *expected_plan = slow_merge(x, centers, eps, iters)
    if head is not None:
        expected = torch.cat([head, expected], dim=1)
    torch.testing.assert_close(merged, expected, atol=1e-11, rtol=1e-11)
    for ours, slow in zip(plan, expected_plan, strict=True):
        torch.testing.assert_close(ours, slow.double(), atol=1e-5, rtol=1e-5)  # the loops store them in float32


@pytest.mark.parametrize("eps", [1.0, 0.05, 0.01])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_token_is_given_away_once(dtype, eps):
    x, centers, _ = inputs(3, 11, 4, 8, dtype)
    merged, similarity, token_bias, cluster_bias = ops.sinkhorn_merge(x, centers, eps=eps)
    assert (merged.dtype, similarity.dtype, token_bias.dtype, cluster_bias.dtype) == (dtype, *[torch.float32] * 3)
    plan = torch.exp(similarity + token_bias[:, :, None] + cluster_bias[:, None])
    torch.testing.assert_close(plan.sum(2), torch.ones(3, 11), atol=3e-5, rtol=0)
    unit = nn.functional.normalize(x.float(), dim=2)
    torch.testing.assert_close(merged.float(), plan.mT @ unit, atol=2e-2 if dtype != torch.float32 else 1e-4, rtol=1e-2)


def test_enough_iterations_give_both_marginals():
    x, centers, _ = inputs(2, 12, 4, 6)
    _, similarity, token_bias, cluster_bias = ops.sinkhorn_merge(x, centers, eps=0.3, iters=300)
    plan = torch.exp(similarity + token_bias[:, :, None] + cluster_bias[:, None])
    torch.testing.assert_close(plan.sum(1), torch.full((2, 4), 3.0).double(), atol=1e-9, rtol=0)


def test_zero_tokens_and_float32_at_a_small_eps():
    x, centers, _ = inputs(1, 30, 6, 8, torch.float32)
    x = x.clone()
    x[:, 3] = 0.0
    exact = ops.sinkhorn_merge(x.double(), centers.double(), eps=0.01, iters=5)
    for ours, value in zip(ops.sinkhorn_merge(x, centers, eps=0.01, iters=5), exact, strict=True):
        torch.testing.assert_close(ours.double(), value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", slow_but((torch.float32, torch.bfloat16, torch.float64), torch.bfloat16))
@pytest.mark.parametrize("num_head", [0, 2])
def test_opcheck(num_head, dtype):
    x, centers, head = inputs(dtype=dtype, num_head=num_head)
    promoted = None if head is None else head.float()
    for view in (x, x.contiguous(), x.transpose(0, 1).contiguous().transpose(0, 1)):
        for rows in (head, promoted):
            arguments = (view, centers, 0.5, 2, rows)
            torch.library.opcheck(NATIVE.sinkhorn_merge.default, arguments, test_utils=OPCHECKS)
            torch.library.opcheck(NATIVE.sinkhorn_merge_inference.default, arguments, test_utils=OPCHECKS)
    merged, similarity, _, *saved = NATIVE.sinkhorn_merge(x, centers, 0.5, 2, None)
    for grad in (torch.ones_like(merged), merged[:1, :1].expand(merged.shape)):
        arguments = (grad, x, centers, similarity, *saved, 0.5)
        torch.library.opcheck(NATIVE.sinkhorn_merge_backward.default, arguments, test_utils=OPCHECKS)


def test_opcheck_of_an_empty_batch_and_of_full_columns():
    for batch, clusters in ((0, 3), (1, 16), (1, 17)):
        x, centers, head = tokens(batch, 7, 5), unit_rows(clusters, 5, torch.float32), tokens(batch, 1, 5)
        for merge in (NATIVE.sinkhorn_merge, NATIVE.sinkhorn_merge_inference):
            torch.library.opcheck(merge.default, (x, centers, 1.0, 3, head), test_utils=OPCHECKS)
        merged, similarity, _, *saved = NATIVE.sinkhorn_merge(x, centers, 1.0, 3, None)
        arguments = (merged, x, centers, similarity, *saved, 1.0)
        torch.library.opcheck(NATIVE.sinkhorn_merge_backward.default, arguments, test_utils=OPCHECKS)


# The CPU implementation of the operators is the reference, so gradcheck checks its explicit backward formulas.
@pytest.mark.parametrize(("eps", "iters", "clusters"), [(1.0, 3, 3), (0.2, 1, 4), (0.05, 2, 2), (1.0, 2, 1)])
@pytest.mark.parametrize("merge", ["function", "reference"])
def test_gradcheck(merge, eps, iters, clusters):
    x, centers, head = inputs(clusters=clusters)

    def merged(x, centers, *head):
        head = head[0] if head else None
        if merge == "function":
            return SinkhornMerge.apply(x, centers, eps, iters, head)[0]
        return ops.sinkhorn_merge(x, centers, eps=eps, iters=iters, head=head)[0]

    assert torch.autograd.gradcheck(merged, (leaf(x), leaf(centers), leaf(head)))
    assert torch.autograd.gradcheck(merged, (leaf(x), leaf(centers)))


@pytest.mark.parametrize("eps", [1.0, 0.01])
def test_gradient_of_tokens_whose_norm_is_clamped(eps):
    x, centers, _ = inputs(1, 5, 3, 4)
    x = x.clone()
    x[:, 1], x[:, 3] = 0.0, 1e-14
    results = []
    for run in (
        lambda x, v: SinkhornMerge.apply(x, v, eps, 3, None)[0],
        lambda x, v: ops.sinkhorn_merge(x, v, eps=eps)[0],
    ):
        leaves = leaf(x), leaf(centers)
        results.append(torch.autograd.grad(run(*leaves).square().sum(), leaves))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_dtypes_of_their_inputs(dtype):
    x, centers, head = inputs(dtype=dtype)
    leaves = [leaf(x), leaf(centers.float()), leaf(head.float())]
    merged = SinkhornMerge.apply(leaves[0], leaves[1], 1.0, 3, leaves[2])[0]
    assert merged.dtype == torch.float32
    for tensor, grad in zip(leaves, torch.autograd.grad(merged.sum(), leaves), strict=True):
        assert (grad.dtype, grad.shape) == (tensor.dtype, tensor.shape)


@pytest.mark.parametrize("merge", ["function", "reference"])
def test_what_is_recorded_has_no_gradient(merge):
    x, centers, head = map(leaf, inputs())
    if merge == "function":
        outputs = SinkhornMerge.apply(x, centers, 1.0, 3, head)
    else:
        outputs = ops.sinkhorn_merge(x, centers, head=head)
    assert [output.requires_grad for output in outputs] == [True, False, False, False]


def test_only_the_wanted_gradients_are_made():
    x, centers, head = inputs()
    rows = leaf(head)
    merged = SinkhornMerge.apply(x, centers, 1.0, 3, rows)[0]
    assert torch.equal(torch.autograd.grad(merged.sum(), rows)[0], torch.ones_like(rows))


def test_two_forwards_before_a_backward():
    x, centers, _ = inputs()
    weight = leaf(centers)
    first, second = (ops.sinkhorn_merge(part, weight)[0].square().sum() for part in (x, 2 * x + 1))
    (first + second).backward()
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("merge", ["function", "reference"])
def test_compile_fullgraph(merge, dynamic):
    def stage(x, centers, head):
        if merge == "function":
            return SinkhornMerge.apply(x, centers, 0.5, 2, head)[0]
        return ops.sinkhorn_merge(x, centers, eps=0.5, iters=2, head=head)[0]

    torch._dynamo.reset()
    compiled = torch.compile(stage, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, num_tokens in ((2, 7), (3, 9)) if dynamic else ((2, 7),):
        leaves = [leaf(tensor) for tensor in inputs(batch, num_tokens)]
        expected, ours = stage(*leaves), compiled(*leaves)
        torch.testing.assert_close(ours, expected)
        for a, b in zip(*(torch.autograd.grad(out.square().sum(), leaves) for out in (ours, expected)), strict=True):
            torch.testing.assert_close(a, b)


def test_export():
    class Stage(nn.Module):
        def forward(self, x, centers):
            return ops.sinkhorn_merge(x, centers)

    batch = torch.export.Dim("batch", min=2, max=16)
    x, centers, _ = inputs()
    exported = torch.export.export(Stage(), (x, centers), dynamic_shapes=({0: batch}, None)).module()
    other = inputs(3)[0]
    torch.testing.assert_close(exported(other, centers), ops.sinkhorn_merge(other, centers))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_batch_invariance_and_determinism(dtype):
    x, centers, head = inputs(4, 23, 6, 24, dtype)

    def run(part):
        leaves = [leaf(tensor[part]) for tensor in (x, head)]
        outputs = ops.sinkhorn_merge(leaves[0], centers, eps=0.1, head=leaves[1])
        return [*outputs, *torch.autograd.grad(outputs[0].float().square().sum(), leaves)]

    for first, second, one in zip(run(slice(None)), run(slice(None)), run(slice(2, 3)), strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first[2:3], one)


X, CENTERS, HEAD = inputs(dtype=torch.float32)
GOOD = {"x": X, "centers": CENTERS, "head": HEAD}


@pytest.mark.parametrize(
    ("kind", "message", "changed"),
    [
        (TypeError, r"x must be a tensor of shape \(B, N, C\), got list", {"x": [1.0]}),
        (ValueError, r"x must have shape \(B, N, C\), got \(7, 5\)", {"x": X[0]}),
        (TypeError, "x must be floating point, got torch.int64", {"x": X.long()}),
        (ValueError, r"at least one token and one channel, got shape \(2, 0, 5\)", {"x": X[:, :0]}),
        (ValueError, r"got shape \(2, 7, 0\)", {"x": X[..., :0], "centers": CENTERS[:, :0]}),
        (TypeError, r"centers must be a tensor of shape \(K, C\), got NoneType", {"centers": None}),
        (ValueError, r"centers must have shape \(K, C\), got \(5,\)", {"centers": CENTERS[0]}),
        (TypeError, "centers must be floating point, got torch.int64", {"centers": CENTERS.long()}),
        (ValueError, r"centers must have x's 5 channels, got shape \(3, 4\)", {"centers": CENTERS[:, 1:]}),
        (ValueError, r"centers must have at least one row, got shape \(0, 5\)", {"centers": CENTERS[:0]}),
        (ValueError, "x is on cpu and centers on meta", {"centers": CENTERS.to("meta")}),
        (TypeError, "eps must be a number, got '1'", {"eps": "1"}),
        (TypeError, "eps must be a number, got True", {"eps": True}),
        (TypeError, "eps must be a number, got None", {"eps": None}),
        (ValueError, "eps must be positive and finite, got 0", {"eps": 0}),
        (ValueError, "eps must be positive and finite, got -0.1", {"eps": -0.1}),
        (ValueError, "eps must be positive and finite, got nan", {"eps": math.nan}),
        (ValueError, "eps must be positive and finite, got inf", {"eps": math.inf}),
        (ValueError, "iters must be .* got 0", {"iters": 0}),
        (TypeError, "iters must be an integer, got 3.0", {"iters": 3.0}),
        (TypeError, "iters must be an integer, got True", {"iters": True}),
        (ValueError, r"head must have shape \(B, P, C\), got \(2, 5\)", {"head": X[:, 0]}),
        (ValueError, r"head must have shape \(2, P, 5\), got \(1, 1, 5\)", {"head": HEAD[:1]}),
        (ValueError, r"head must have shape \(2, P, 5\), got \(2, 1, 4\)", {"head": HEAD[..., 1:]}),
        (TypeError, "head must be floating point, got torch.int64", {"head": HEAD.long()}),
        (ValueError, "x is on cpu and head on meta", {"head": HEAD.to("meta")}),
        (ValueError, "unknown backend 'gpu'", {"backend": "gpu"}),
        (RuntimeError, "'triton' was asked for, but .*TRITON_INTERPRET=1", {"backend": "triton"}),
    ],
)
def test_bad_input_is_quoted(kind, message, changed):
    with pytest.raises(kind, match=message):
        functools.partial(ops.sinkhorn_merge, **{**GOOD, **changed})()
