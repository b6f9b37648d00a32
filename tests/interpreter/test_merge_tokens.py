"""group_slots, merge_tokens, unmerge_tokens: kernel against reference in the interpreter, under the sanitizer."""

import pytest
import torch

from fastreduce import ops
from tests.budget import assert_within_budget
from tests.inputs import DTYPES, seeded, tokens

SHAPES = [(2, 17, 5, 24), (1, 2, 1, 1), (3, 9, 9, 33), (0, 9, 4, 8), (1, 12, 4, 1030), (2, 70, 66, 16)]


def slots(batch, num_tokens, num_out, *, dropped=False, seed=0):
    low = -1 if dropped else 0
    return torch.randint(low, num_out, (batch, num_tokens), generator=seeded(seed))


def sizes(batch, num_tokens):
    return torch.randint(1, 6, (batch, num_tokens), generator=seeded(7)).float()


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(
    ("batch", "num_tokens", "num_out"), [(2, 17, 5), (1, 1, 1), (3, 70, 130), (2, 65, 3), (0, 4, 2)]
)
def test_groups(batch, num_tokens, num_out, dropped):
    slot = slots(batch, num_tokens, num_out, dropped=dropped)
    for chosen in (slot, slot.int(), slot.repeat_interleave(2, dim=1)[:, ::2]):
        order, offsets = ops.group_slots(chosen, num_out, backend="triton")
        expected_order, expected_offsets = ops.group_slots(slot, num_out, backend="reference")
        assert torch.equal(order, expected_order)
        assert torch.equal(offsets, expected_offsets)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["dense", "sliced", "expanded"])
@pytest.mark.parametrize(("batch", "num_tokens", "num_out", "channels"), SHAPES)
def test_merge_forward_and_backward(batch, num_tokens, num_out, channels, layout, dtype):
    x = tokens(batch, num_tokens, channels, dtype=dtype, layout=layout)
    slot, size = slots(batch, num_tokens, num_out), sizes(batch, num_tokens)
    residual = tokens(batch, num_out, channels, dtype=dtype, seed=1, layout=layout)
    grad = tokens(batch, num_out, channels, dtype=dtype, seed=2, layout=layout)
    results = []
    for backend, cast in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        leaves = [x.to(cast).detach().requires_grad_(), residual.to(cast).detach().requires_grad_()]
        out, total = ops.merge_tokens(leaves[0], slot, num_out, size=size, residual=leaves[1], backend=backend)
        assert torch.equal(total.double(), torch.zeros(batch, num_out).double().scatter_add(1, slot, size.double()))
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(cast))])
    for triple in zip(*results, strict=True):
        assert_within_budget(*triple, steps=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["dense", "sliced", "expanded"])
@pytest.mark.parametrize(("batch", "num_tokens", "num_out", "channels"), SHAPES)
def test_unmerge_forward_and_backward(batch, num_tokens, num_out, channels, layout, dtype):
    x = tokens(batch, num_out, channels, dtype=dtype, layout=layout)
    slot = slots(batch, num_tokens, num_out, dropped=True)
    grad = tokens(batch, num_tokens, channels, dtype=dtype, seed=2, layout=layout)
    results = []
    for backend, cast in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        leaf = x.to(cast).detach().requires_grad_()
        out = ops.unmerge_tokens(leaf, slot, backend=backend)
        results.append([out, *torch.autograd.grad(out, [leaf], grad.to(cast))])
    assert torch.equal(results[0][0], results[1][0])
    assert_within_budget(results[0][1], results[1][1], results[2][1], steps=2)


def test_empty_slots_give_zeros_and_size_zero():
    x, slot = tokens(1, 6, 8), torch.tensor([[4, 1, 1, 4, 4, 1]])
    merged, total = ops.merge_tokens(x, slot, 6, backend="triton")
    assert total.tolist() == [[0, 3, 0, 0, 3, 0]]
    assert not merged[0, [0, 2, 3, 5]].any()
    torch.testing.assert_close(merged, ops.merge_tokens(x, slot, 6, backend="reference")[0])


def test_one_slot_takes_all():
    x = tokens(2, 33, 16)
    merged, total = ops.merge_tokens(x, torch.zeros(2, 33, dtype=torch.int64), 1, backend="triton")
    torch.testing.assert_close(merged[:, 0], x.mean(1))
    assert total.eq(33).all()


def test_prepared_groups_and_mixed_dtypes():
    x, residual = tokens(2, 9, 8), tokens(2, 4, 8, dtype=torch.bfloat16)
    slot = slots(2, 9, 4)
    groups = ops.prepare_merge(slot, 4, backend="triton")
    assert groups is not None
    merged, _ = ops.merge_tokens(x, slot, 4, residual=residual, groups=groups, backend="triton")
    expected, _ = ops.merge_tokens(x, slot, 4, residual=residual, backend="reference")
    assert merged.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(merged, expected)


def test_same_bits_again_and_in_any_batch():
    x, slot, size = tokens(4, 21, 48, dtype=torch.float16), slots(4, 21, 6), sizes(4, 21)
    whole, _ = ops.merge_tokens(x, slot, 6, size=size, backend="triton")
    again, _ = ops.merge_tokens(x, slot, 6, size=size, backend="triton")
    alone, _ = ops.merge_tokens(x[1:2], slot[1:2], 6, size=size[1:2], backend="triton")
    assert torch.equal(whole, again)
    assert torch.equal(whole[1:2], alone)
