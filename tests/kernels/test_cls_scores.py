"""cls_scores: kernels against reference in the interpreter, under the sanitizer."""

import pytest
import torch
import torch.nn.functional as F

from fastreduce import ops
from fastreduce.kernels import cls_scores as kernels
from fastreduce.kernels._launch import Tile
from tests.helpers.budget import assert_within_budget
from tests.helpers.inputs import DTYPES, seeded, tokens

# (batch, heads, tokens, head_dim, prefix); 67 keys take two programs, 130 three, 3 heads and 72 channels are masked
SHAPES = [
    (2, 3, 67, 64, 1),
    (1, 1, 1, 1, 0),
    (1, 2, 5, 72, 2),
    (2, 1, 3, 8, 3),
    (0, 2, 9, 16, 1),
    (1, 3, 40, 256, 0),
    (1, 5, 130, 33, 1),
]


def packed(batch, heads, num_tokens, head_dim, dtype, seed=0):
    """Return q of the class token and K as views of one packed qkv."""
    qkv = torch.randn(batch, num_tokens, 3, heads, head_dim, generator=seeded(seed)).to(dtype)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q[:, :, 0], k


def plain(q, k, prefix, scale):
    attention = torch.softmax(scale * q.unsqueeze(2) @ k.transpose(2, 3), dim=-1)
    return attention[:, :, 0, prefix:].mean(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "heads", "num_tokens", "head_dim", "prefix"), SHAPES)
def test_forward_and_backward(batch, heads, num_tokens, head_dim, prefix, dtype):
    q, k = packed(batch, heads, num_tokens, head_dim, dtype)
    grad = tokens(batch, num_tokens - prefix, seed=2)
    results = []
    for backend, cast in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        leaves = [q.to(cast).detach().requires_grad_(), k.to(cast).detach().requires_grad_()]
        scores = ops.cls_scores(*leaves, prefix=prefix, backend=backend)
        results.append([scores, *torch.autograd.grad(scores, leaves, grad.to(scores.dtype))])
    exact = plain(q.double(), k.double(), prefix, head_dim**-0.5)
    torch.testing.assert_close(results[2][0], exact, atol=1e-12, rtol=1e-12)
    for triple in zip(*results, strict=True):
        # A rounding of a logit near 4 is four of its exponential, and so is one of the logsumexp.
        assert_within_budget(*triple, steps=8)


def some_valid(batch, num_tokens, seed=4):
    """Return the class token and about two thirds of the others; the last image's second half is padding."""
    valid = torch.rand(batch, num_tokens, generator=seeded(seed)) < 0.67
    valid[-1:, num_tokens // 2 :] = False
    valid[:, 0] = True
    return valid


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "heads", "num_tokens", "head_dim", "prefix"), SHAPES)
def test_keys_that_are_not_valid(batch, heads, num_tokens, head_dim, prefix, dtype):
    q, k = packed(batch, heads, num_tokens, head_dim, dtype)
    valid, grad = some_valid(batch, num_tokens), tokens(batch, num_tokens - prefix, seed=2)
    results = []
    for backend, cast in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        leaves = [q.to(cast).detach().requires_grad_(), k.to(cast).detach().requires_grad_()]
        scores = ops.cls_scores(*leaves, prefix=prefix, valid=valid, backend=backend)
        results.append([scores, *torch.autograd.grad(scores, leaves, grad.to(scores.dtype))])
        assert not scores[~valid[:, prefix:]].any()
        assert not results[-1][2].transpose(1, 2)[~valid].any()
    for triple in zip(*results, strict=True):
        assert_within_budget(*triple, steps=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("batch", "heads", "num_tokens", "head_dim", "prefix"), SHAPES)
def test_value_scores(batch, heads, num_tokens, head_dim, prefix, masked, dtype):
    q, k = packed(batch, heads, num_tokens, head_dim, dtype)
    _, value = packed(batch, heads, num_tokens, head_dim, dtype, seed=1)
    valid = some_valid(batch, num_tokens) if masked else None
    ours, reference, exact = (
        ops.cls_value_scores(*(t.to(cast) for t in (q, k, value)), prefix=prefix, valid=valid, backend=backend)
        for backend, cast in (("triton", dtype), ("reference", dtype), ("reference", torch.float64))
    )
    assert_within_budget(ours, reference, exact, steps=4)
    if masked:
        assert not ours[~valid[:, prefix:]].any()


def test_strided_values_and_masks_are_read_in_place():
    q, k = packed(2, 2, 21, 24, torch.float16)
    _, value = packed(2, 2, 21, 24, torch.float16, seed=1)
    valid = some_valid(2, 21)
    ours = ops.cls_value_scores(q, k, value, valid=valid, backend="triton")
    strided = torch.stack([valid, ~valid], -1)[..., 0]
    for other_value, other_valid in (
        (value.contiguous(), strided),
        (value.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3), valid.t().contiguous().t()),
        (torch.stack([value, value], -1).flatten(-2)[..., ::2], valid),
        (F.pad(value, (1, 0))[..., 1:], valid),  # rows of 25, and none begins at a multiple of 16 bytes
    ):
        assert torch.equal(ours, ops.cls_value_scores(q, k, other_value, valid=other_valid, backend="triton"))
    alone = ops.cls_value_scores(q[1:], k[1:], value[1:], valid=valid[1:], backend="triton")
    assert torch.equal(ours[1:], alone)
    shared = valid[:1].expand(2, -1)
    assert torch.equal(
        ops.cls_value_scores(q, k, value, valid=shared, backend="triton"),
        ops.cls_value_scores(q, k, value, valid=shared.clone(), backend="triton"),
    )


def test_what_is_not_valid_is_not_read():
    q, k = packed(2, 2, 70, 16, torch.float32)
    _, value = packed(2, 2, 70, 16, torch.float32, seed=1)
    valid = some_valid(2, 70)
    results = []
    for fill in (0.0, float("nan")):
        spoilt = [t.masked_fill(~valid[:, None, :, None], fill) for t in (k, value)]
        for backend in ("triton", "reference"):
            results.append(ops.cls_value_scores(q, spoilt[0], spoilt[1], valid=valid, backend=backend))
            results.append(ops.cls_scores(q, spoilt[0], valid=valid, backend=backend))
    for clean, spoilt in zip(results[:4], results[4:], strict=True):
        assert torch.equal(clean, spoilt)


def test_all_valid_changes_no_bit():
    q, k = packed(2, 3, 70, 16, torch.float16)
    everything = torch.ones(2, 70, dtype=torch.bool)
    plain_scores = ops.cls_scores(q, k, backend="triton")
    assert torch.equal(plain_scores, ops.cls_scores(q, k, valid=everything, backend="triton"))
    weighted = ops.cls_value_scores(q, k, k, backend="triton")
    assert torch.equal(weighted, ops.cls_value_scores(q, k, k, valid=everything, backend="triton"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_are_read_in_place(dtype):
    q, k = packed(2, 2, 21, 24, dtype)
    ours = ops.cls_scores(q, k, backend="triton")
    assert torch.equal(ours, ops.cls_scores(q.contiguous(), k.contiguous(), backend="triton"))
    sequence_first = k.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    assert torch.equal(ours, ops.cls_scores(q, sequence_first, backend="triton"))
    sparse_channels = torch.stack([k, k], -1).flatten(-2)[..., ::2]
    assert torch.equal(ours, ops.cls_scores(q, sparse_channels, backend="triton"))
    odd_rows = F.pad(k, (1, 0))[..., 1:]
    assert torch.equal(ours, ops.cls_scores(q, odd_rows, backend="triton"))
    shared_keys = k[:1].expand(2, -1, -1, -1)
    assert torch.equal(
        ops.cls_scores(q, shared_keys, backend="triton"), ops.cls_scores(q, shared_keys.clone(), backend="triton")
    )


def test_explicit_scale_and_large_logits():
    q, k = packed(1, 2, 70, 16, torch.float32)
    for scale in (0.3, 40.0):
        ours = ops.cls_scores(q, k, scale=scale, backend="triton")
        reference = ops.cls_scores(q, k, scale=scale, backend="reference")
        exact = ops.cls_scores(q.double(), k.double(), scale=scale, backend="reference")
        assert_within_budget(ours, reference, exact, steps=2)


def test_keys_of_weight_zero_in_a_whole_block():
    # All logits of the first block of keys overflow to -inf: its partial softmax must count for nothing.
    q, k = torch.ones(1, 1, 64), torch.zeros(1, 1, 80, 64)
    k[:, :, :64] = -3e38
    ours = ops.cls_scores(q, k, prefix=0, backend="triton")
    assert torch.equal(ours, ops.cls_scores(q, k, prefix=0, backend="reference"))


def test_nan_stays_in_its_image():
    q, k = packed(2, 2, 9, 8, torch.float32)
    spoilt = k.clone()
    spoilt[0, 1, 3, 5] = float("nan")
    ours = ops.cls_scores(q, spoilt, backend="triton")
    assert ours[0].isnan().all()
    assert torch.equal(ours[1:], ops.cls_scores(q, k, backend="triton")[1:])


def test_backward_takes_an_expanded_gradient_and_keeps_the_packed_layout():
    q, k = packed(2, 3, 20, 8, torch.float32)
    results = []
    for backend in ("triton", "reference"):
        leaves = [q.detach().requires_grad_(), k.detach().requires_grad_()]
        scores = ops.cls_scores(*leaves, backend=backend)
        upstream = torch.ones(2, 1).expand(2, 19)
        results.append(torch.autograd.grad(scores, leaves, upstream, retain_graph=True))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-7, rtol=1e-4)
    _, logits, logsumexp = kernels.cls_scores(q, k, 1, 1.0)
    _, grad_k = kernels.cls_scores_backward(torch.ones(2, 19), q, k, logits, logsumexp, 1, 1.0)
    assert grad_k.transpose(1, 2).is_contiguous()


def test_partial_softmaxes_are_joined_in_several_steps(monkeypatch):
    q, k = packed(2, 3, 70, 16, torch.float32)
    k[:, :, 40:] *= 3.0  # the maximum rises on the way
    whole = kernels.cls_scores(q, k, 1, 1.0)
    monkeypatch.setattr(kernels, "ELEMENTS", 8 * 16)
    monkeypatch.setattr(kernels, "head_tile", lambda *_, **__: Tile(BLOCK_H=4, BLOCK_N=16, BLOCK_P=2))
    for ours, expected in zip(kernels.cls_scores(q, k, 1, 1.0), whole, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


def test_saved_logits_and_logsumexp():
    q, k = packed(2, 3, 70, 16, torch.float32)
    _, logits, logsumexp = kernels.cls_scores(q, k, 1, 0.25)
    exact = 0.25 * (q.double().unsqueeze(2) * k.double()).sum(-1)
    torch.testing.assert_close(logits.double(), exact, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logsumexp.double(), exact.logsumexp(-1), atol=1e-6, rtol=1e-6)


def test_batch_invariance_bitwise():
    q, k = packed(4, 2, 75, 64, torch.float16)
    grad = tokens(4, 74, seed=3)
    results = []
    for part in (slice(None), slice(2, 3)):
        leaves = [q[part].detach().requires_grad_(), k[part].detach().requires_grad_()]
        scores = ops.cls_scores(*leaves, backend="triton")
        results.append([scores, *torch.autograd.grad(scores, leaves, grad[part])])
    for whole, alone in zip(*results, strict=True):
        assert torch.equal(whole[2:3], alone)
