"""soft_merge in an ordinary process: operators, gradients, compilation, errors, numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastreduce import ops, reference
from fastreduce.ops.soft_merge import SoftMerge
from tests.helpers.cases import slow_but
from tests.helpers.inputs import DTYPES, tokens

OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
NATIVE = torch.ops.fastreduce


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def inputs(batch=2, num_tokens=7, clusters=3, channels=5, head=1, dtype=torch.float64, seed=0):
    """Make logits, and a sequence split into the rows that stay and the tokens, as a reducer hands them over."""
    sequence = tokens(batch, head + num_tokens, channels, dtype=dtype, seed=seed)
    logits = 3 * tokens(batch, num_tokens, clusters, seed=seed + 1)
    return logits.to(dtype), sequence[:, head:], sequence[:, :head]


def opcheck_both(logits, x, head):
    torch.library.opcheck(NATIVE.soft_merge.default, (logits, x, head), test_utils=OPCHECKS)
    rows, logsumexp = NATIVE.soft_merge(logits, x, head)
    for grad in (rows, torch.ones(1, 1, rows.shape[2], dtype=rows.dtype).expand_as(rows)):
        arguments = (grad, logits, x, rows, logsumexp)
        torch.library.opcheck(NATIVE.soft_merge_backward.default, arguments, test_utils=OPCHECKS)


@pytest.mark.parametrize("dtype", slow_but((torch.float32, torch.bfloat16, torch.float64), torch.bfloat16))
def test_opcheck(dtype):
    logits, x, head = inputs(dtype=dtype)
    opcheck_both(logits, x, head)
    opcheck_both(logits.mT.contiguous().mT, x.contiguous(), None)
    opcheck_both(logits.half(), x, head.float())


def test_opcheck_of_other_layouts_and_of_few_clusters():
    logits, x, head = inputs(dtype=torch.float32)
    opcheck_both(logits[:1].expand(2, -1, -1), x.transpose(0, 1).contiguous().transpose(0, 1), head)
    opcheck_both(logits.permute(1, 2, 0).contiguous().permute(2, 0, 1), x, None)
    opcheck_both(logits[..., :1], x, head)
    opcheck_both(logits[..., :0].clone(), x, head)
    opcheck_both(torch.zeros(0, 7, 3), torch.zeros(0, 7, 5), torch.zeros(0, 1, 5))


# The CPU implementation of the operators is the reference, so gradcheck checks its explicit backward formulas.
@pytest.mark.parametrize("merge", [SoftMerge.apply, lambda logits, x, head: ops.soft_merge(logits, x, head=head)])
def test_gradcheck(merge):
    leaves = [leaf(tensor) for tensor in inputs(head=2)]
    assert torch.autograd.gradcheck(lambda *leaves: merge(*leaves)[0], leaves)
    assert torch.autograd.gradcheck(lambda *leaves: merge(*leaves, None)[0], leaves[:2])


def test_gradcheck_with_masked_tokens():
    logits, x, _ = inputs()
    hidden = torch.tensor([True, False, False, True, False, True, False]).view(1, -1, 1)
    for merge in (SoftMerge.apply, lambda logits, x, head: ops.soft_merge(logits, x, head=head)):
        assert torch.autograd.gradcheck(
            lambda logits, x: merge(logits.masked_fill(hidden, -math.inf), x, None)[0],  # noqa: B023
            (leaf(logits), leaf(x)),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_function_and_reference_have_the_same_gradients_in_the_dtypes_of_their_inputs(dtype):
    arguments = inputs(dtype=dtype)
    grad = tokens(2, 4, 5, dtype=dtype, seed=5)
    results = []
    for merge in (SoftMerge.apply, lambda logits, x, head: ops.soft_merge(logits, x, head=head)):
        leaves = [leaf(tensor) for tensor in arguments]
        rows, logsumexp = merge(*leaves)
        assert (rows.dtype, logsumexp.dtype) == (dtype, torch.float32)
        assert not logsumexp.requires_grad
        results.append([rows, logsumexp, *torch.autograd.grad(rows, leaves, grad)])
    tolerance = {} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}  # the mean is that of rounded rows
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, **tolerance)


def test_only_the_wanted_gradients_are_made():
    logits, x, head = inputs()
    first = leaf(head)
    rows, _ = SoftMerge.apply(logits, x, first)
    torch.testing.assert_close(torch.autograd.grad(rows.sum(), first)[0], torch.ones_like(head))


def test_a_bias_common_to_all_tokens_has_no_gradient():
    logits, x, _ = inputs()
    bias = leaf(torch.randn(3, dtype=torch.float64))
    rows, _ = SoftMerge.apply(logits + bias, x, None)
    (grad,) = torch.autograd.grad(rows.square().sum(), bias)
    assert grad.abs().max() < 1e-13


def by_function(logits, x, head):
    return SoftMerge.apply(logits, x, head)[0]


def by_reference(logits, x, head):
    return ops.soft_merge(logits, x, head=head, backend="reference")[0]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("stage", [by_function, by_reference])
def test_compile_fullgraph(stage, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(stage, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, num_tokens in ((2, 8), (5, 8), (3, 11)) if dynamic else ((2, 8),):
        leaves = [leaf(tensor) for tensor in inputs(batch, num_tokens, dtype=torch.float32)]
        rows = stage(*leaves), compiled(*leaves)
        torch.testing.assert_close(*rows)
        for pair in zip(*(torch.autograd.grad(out.square().sum(), leaves) for out in rows), strict=True):
            torch.testing.assert_close(*pair)


def test_dynamic_batch_compiles_once():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(by_function, fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 3, 7):
        compiled(*(leaf(tensor) for tensor in inputs(batch, dtype=torch.float32)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("stage", [by_function, by_reference])
def test_export(stage):
    class Stage(nn.Module):
        def forward(self, logits, x, head):
            return stage(logits, x, head)

    def example(batch, seed):
        return tuple(tensor.contiguous() for tensor in inputs(batch, dtype=torch.float32, seed=seed))

    batch = torch.export.Dim("batch", min=2, max=16)
    exported = torch.export.export(Stage(), example(2, 0), dynamic_shapes=({0: batch},) * 3).module()
    torch.testing.assert_close(exported(*example(3, 5)), stage(*example(3, 5)))


def test_refuses():
    logits, x, head = inputs(dtype=torch.float32)
    good = {"logits": logits, "x": x, "head": head}
    for kind, message, changed in (
        (TypeError, r"logits must be a tensor of shape \(B, N, K\), got list", {"logits": [0.0]}),
        (ValueError, r"logits must have shape \(B, N, K\), got \(7, 3\)", {"logits": logits[0]}),
        (TypeError, "logits must be floating point, got torch.int64", {"logits": logits.long()}),
        (TypeError, r"x must be a tensor of shape \(B, N, C\), got NoneType", {"x": None}),
        (ValueError, r"x must have shape \(B, N, C\), got \(7, 5\)", {"x": x[0]}),
        (TypeError, "x must be floating point, got torch.bool", {"x": x.bool()}),
        (ValueError, "x is on cpu and logits on meta", {"logits": logits.to("meta")}),
        (ValueError, r"tokens \(2, 7\), got shape \(2, 6, 3\)", {"logits": logits[:, 1:]}),
        (ValueError, r"tokens \(2, 7\), got shape \(1, 7, 3\)", {"logits": logits[:1]}),
        (ValueError, r"at least one token, got shape \(2, 0, 5\)", {"logits": logits[:, :0], "x": x[:, :0]}),
        (ValueError, r"head must have shape \(B, P, C\), got \(2, 5\)", {"head": head[:, 0]}),
        (TypeError, "head must be floating point, got torch.int64", {"head": head.long()}),
        (ValueError, "x is on cpu and head on meta", {"head": head.to("meta")}),
        (ValueError, r"batch size 2 and width 5, got \(1, 1, 5\)", {"head": head[:1]}),
        (ValueError, r"batch size 2 and width 5, got \(2, 1, 4\)", {"head": head[..., 1:]}),
        (ValueError, "unknown backend 'best'", {"backend": "best"}),
        (RuntimeError, "'triton' was asked for", {"backend": "triton"}),
    ):
        with pytest.raises(kind, match=message):
            ops.soft_merge(**{**good, **changed})
    assert ops.soft_merge(**good)[0].shape == (2, 4, 5)


LOGITS = st.one_of(st.floats(-50, 50), st.sampled_from([0.0, -math.inf, 700.0, -700.0]))


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 3),
    num_tokens=st.integers(1, 9),
    clusters=st.integers(0, 5),
    num_head=st.sampled_from([None, 0, 1, 2]),
    data=st.data(),
)
def test_against_plain_loops(batch, num_tokens, clusters, num_head, data):
    _, x, head = inputs(batch, num_tokens, clusters, head=num_head or 0)
    values = data.draw(st.lists(LOGITS, min_size=num_tokens * clusters, max_size=num_tokens * clusters))
    logits = torch.tensor(values, dtype=torch.float64).view(1, num_tokens, clusters).repeat(batch, 1, 1)
    logits[:, data.draw(st.integers(0, num_tokens - 1))] = data.draw(st.floats(-5, 5))
    rows, logsumexp = ops.soft_merge(logits, x, head=None if num_head is None else head)
    first = num_head or 0
    assert (rows.shape, logsumexp.shape) == ((batch, first + clusters, 5), (batch, clusters))
    assert torch.equal(rows[:, :first], head)
    for b in range(batch):
        for k in range(clusters):
            largest = logits[b, :, k].max().item()
            weights = [math.exp(value - largest) for value in logits[b, :, k].tolist()]
            total = math.fsum(weights)
            expected = sum((weight / total * token for weight, token in zip(weights, x[b], strict=True)), 0 * x[b, 0])
            torch.testing.assert_close(rows[b, first + k], expected, atol=1e-13, rtol=1e-12)
            assert math.isclose(logsumexp[b, k].item(), largest + math.log(total), rel_tol=1e-12, abs_tol=1e-13)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_recorded_weights_sum_to_one_over_the_tokens(dtype):
    logits, x, _ = inputs(num_tokens=40, dtype=dtype)
    rows, logsumexp = ops.soft_merge(logits, x)
    assert (rows.dtype, logsumexp.dtype) == (dtype, reference.accumulator(dtype))
    weights = torch.exp(logits.to(logsumexp.dtype) - logsumexp.unsqueeze(1))
    torch.testing.assert_close(weights.sum(1), torch.ones_like(logsumexp))
    torch.testing.assert_close(rows, (weights.mT @ x.to(weights.dtype)).to(dtype))


def test_a_column_that_is_nothing_but_masked_is_nan():
    logits, x, head = inputs()
    logits[:, :, 1] = -math.inf
    rows, _ = ops.soft_merge(logits, x, head=head)
    assert rows[:, 2].isnan().all()
    assert rows[:, [0, 1, 3]].isfinite().all()


def test_nan_spoils_its_cluster_only():
    logits, x, head = inputs()
    clean, _ = ops.soft_merge(logits, x, head=head)
    logits[0, 3, 1] = math.nan
    rows, logsumexp = ops.soft_merge(logits, x, head=head)
    assert rows[0, 2].isnan().all()
    assert logsumexp.isnan().tolist() == [[False, True, False], [False, False, False]]
    rows[0, 2] = clean[0, 2]
    assert torch.equal(rows, clean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_batch_invariance_and_determinism(dtype):
    arguments = inputs(4, 23, 9, 40, 1, dtype)

    def run(part):
        leaves = [leaf(tensor[part]) for tensor in arguments]
        rows, logsumexp = SoftMerge.apply(*leaves)
        return [rows, logsumexp, *torch.autograd.grad(rows.float().square().sum(), leaves)]

    whole, again, alone = run(slice(None)), run(slice(None)), run(slice(2, 3))
    for first, second, one in zip(whole, again, alone, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first[2:3], one)
