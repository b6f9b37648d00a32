"""fuse_tokens: kernels against reference in the interpreter, under the sanitizer."""

import pytest
import torch

from fastreduce import ops
from tests.helpers.budget import assert_within_budget
from tests.helpers.inputs import DTYPES, distinct_indices, seeded, tokens

# (batch, tokens, k, channels, prefix); 75 tokens leave 65 to sum, one more than a step; 1030 channels are two blocks
SHAPES = [
    (2, 17, 5, 24, 1),
    (1, 75, 9, 33, 1),
    (3, 9, 0, 8, 0),
    (1, 12, 0, 16, 1),
    (2, 9, 7, 8, 2),
    (1, 3, 0, 8, 3),
    (0, 9, 3, 8, 1),
    (1, 9, 3, 1030, 2),
]


def inputs(batch, num_tokens, k, channels, prefix, dtype, layout="dense"):
    x = tokens(batch, num_tokens, channels, dtype=dtype, layout=layout)
    order = distinct_indices(batch, num_tokens - prefix, num_tokens - prefix)
    scores = torch.rand(batch, num_tokens - prefix, generator=seeded(1))
    residual = tokens(batch, prefix + k + 1, channels, dtype=dtype, seed=2, layout=layout)
    grad = tokens(batch, prefix + k + 1, channels, dtype=dtype, seed=3, layout=layout)
    return x, order, scores, residual, grad


def forward_and_backward(x, order, scores, residual, grad, k, prefix, backend, bias=None):
    leaves = [tensor.detach().requires_grad_() for tensor in (x, scores, residual, bias) if tensor is not None]
    added = dict(zip(("residual", "residual_bias"), leaves[2:], strict=False))
    out = ops.fuse_tokens(leaves[0], order, leaves[1], k, prefix=prefix, backend=backend, **added)
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["dense", "sliced", "expanded"])
@pytest.mark.parametrize(("batch", "num_tokens", "k", "channels", "prefix"), SHAPES)
def test_forward_and_backward(batch, num_tokens, k, channels, prefix, layout, dtype):
    x, order, scores, residual, grad = inputs(batch, num_tokens, k, channels, prefix, dtype, layout)
    for bias in (None, tokens(channels, dtype=dtype, seed=4)):
        exact = [x.double(), order, *(tensor.double() for tensor in (scores, residual, grad)), k, prefix, "reference"]
        results = [
            forward_and_backward(x, order, scores, residual, grad, k, prefix, "triton", bias),
            forward_and_backward(x, order, scores, residual, grad, k, prefix, "reference", bias),
            forward_and_backward(*exact, None if bias is None else bias.double()),
        ]
        for triple in zip(*results, strict=True):
            assert_within_budget(*triple, steps=2)  # sums in another order


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_rows_are_copied_bit_for_bit(dtype):
    x, order, scores, _, _ = inputs(2, 20, 7, 40, 1, dtype)
    out = ops.fuse_tokens(x, order.int(), scores, 7, backend="triton")
    assert torch.equal(out[:, :-1], ops.gather_tokens(x, order[:, :7], backend="reference"))


def test_kept_rows_do_not_touch_the_fused_row():
    x, order, scores, residual, grad = inputs(1, 12, 4, 16, 1, torch.float32)
    clean = forward_and_backward(x, order, scores, residual, grad, 4, 1, "triton")
    spoilt_x, spoilt_scores = x.clone(), scores.clone()
    spoilt_x[:, order[0, :4] + 1] = float("nan")
    spoilt_scores[:, order[0, :4]] = float("nan")
    out, grad_x, grad_scores, _ = forward_and_backward(spoilt_x, order, spoilt_scores, residual, grad, 4, 1, "triton")
    assert torch.equal(out[:, -1], clean[0][:, -1])
    assert torch.equal(grad_x, clean[1])
    assert torch.equal(grad_scores, clean[2])


def test_nothing_left_gives_a_row_of_zeros():
    x, order, scores, _, _ = inputs(2, 6, 5, 8, 1, torch.float32)
    assert (ops.fuse_tokens(x, order, scores, 5, backend="triton")[:, -1] == 0).all()


def test_scores_and_order_of_any_stride_and_dtype():
    x, order, scores, _, _ = inputs(3, 14, 5, 8, 1, torch.float32)
    wide = torch.stack([scores, scores], -1).flatten(1)[:, ::2].bfloat16()
    for chosen in (order[:1].expand(3, -1), order.t().contiguous().t(), torch.stack([order] * 2, -1)[..., 0]):
        for weights in (wide, scores[:1].expand(3, -1)):
            results = []
            for backend in ("triton", "reference"):
                leaf = weights.detach().requires_grad_()
                out = ops.fuse_tokens(x, chosen, leaf, 5, backend=backend)
                results.append([out, torch.autograd.grad(out.sum(), leaf)[0]])
            for ours, reference in zip(*results, strict=True):
                torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize(("left", "right"), [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
def test_mixed_dtypes_promote(left, right):
    x, order, scores, residual, grad = inputs(2, 12, 4, 16, 1, left)
    ours = forward_and_backward(x, order, scores, residual.to(right), grad, 4, 1, "triton")
    reference = forward_and_backward(x, order, scores, residual.to(right), grad, 4, 1, "reference")
    assert [tensor.dtype for tensor in ours] == [torch.float32, left, torch.float32, right]
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)  # the reference rounds the fused row to x's dtype


def test_batch_invariance_and_determinism_bitwise():
    arguments = inputs(4, 75, 20, 48, 1, torch.float16)
    whole = forward_and_backward(*arguments, 20, 1, "triton")
    alone = forward_and_backward(*(tensor[2:3] for tensor in arguments), 20, 1, "triton")
    again = forward_and_backward(*arguments, 20, 1, "triton")
    for first, one, second in zip(whole, alone, again, strict=True):
        assert torch.equal(first[2:3], one)
        assert torch.equal(first, second)
