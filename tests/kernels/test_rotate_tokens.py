"""rotate_tokens: kernel against reference in the interpreter, under the sanitizer."""

import pytest
import torch

from fastreduce import ops
from tests.helpers.budget import assert_within_budget
from tests.helpers.inputs import DTYPES, seeded, tokens

# batch, heads, tokens behind the prefix, rows of the table, channels, prefix; heads and images of the table
SHAPES = [
    (2, 3, 9, 12, 16, 1, (1, 1)),
    (2, 3, 70, 12, 20, 0, (3, 1)),
    (3, 2, 5, 7, 8, 2, (1, 3)),
    (1, 2, 4, 5, 6, 5, (2, 1)),
    (0, 2, 3, 5, 8, 1, (1, 1)),
    (2, 1, 0, 5, 8, 1, (1, 1)),
]


def table_of(rows, channels, sharing, dtype):
    heads, images = sharing
    angles = torch.randn(images, heads, rows, channels, generator=seeded(5))
    shape = (rows, channels) if heads == images == 1 else (heads, rows, channels) if images == 1 else angles.shape
    return angles.cos().to(dtype).reshape(shape), angles.sin().to(dtype).reshape(shape)


def heads_of(batch, heads, length, channels, dtype, seed=0):
    """Return heads as a view of a packed projection."""
    return (
        tokens(batch, length, 3 * heads * channels, dtype=dtype, seed=seed)
        .unflatten(2, (3, heads, channels))[:, :, 1]
        .transpose(1, 2)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize(("batch", "heads", "n", "rows", "channels", "prefix", "sharing"), SHAPES)
def test_forward_and_backward(batch, heads, n, rows, channels, prefix, sharing, layout, dtype):
    x = heads_of(batch, heads, prefix + n, channels, dtype)
    table = table_of(rows, channels, sharing, dtype)
    place = torch.randint(-1, rows, (batch, n), generator=seeded(3), dtype=torch.int32)
    grad = tokens(batch, heads, prefix + n, channels, dtype=dtype, seed=2)
    results = []
    for backend, cast in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        leaf = x.to(cast).detach().requires_grad_()
        cast_table = tuple(one.to(cast) for one in table)
        out = ops.rotate_tokens(leaf, cast_table, place, prefix=prefix, layout=layout, backend=backend)
        results.append([out, *torch.autograd.grad(out, leaf, grad.to(cast))])
    for triple in zip(*results, strict=True):
        assert_within_budget(*triple)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_in_order_without_places(layout):
    x, table = heads_of(2, 2, 8, 8, torch.float32), table_of(7, 8, (1, 1), torch.float32)
    order = torch.arange(7).expand(2, 7)
    found = ops.rotate_tokens(x, table, layout=layout, backend="triton")
    assert torch.equal(found, ops.rotate_tokens(x, table, order, layout=layout, backend="triton"))
    assert torch.equal(found[:, :, 0], x[:, :, 0])


def test_without_a_place_nothing_turns():
    x, table = heads_of(2, 2, 8, 8, torch.float16), table_of(7, 8, (1, 1), torch.float32)
    nowhere = torch.full((2, 7), -1)
    assert torch.equal(ops.rotate_tokens(x, table, nowhere, backend="triton"), x)


@pytest.mark.parametrize("sharing", [(1, 1), (2, 1), (1, 2)])
def test_a_learned_table(sharing):
    """A table of RoPE-ViT's mixed rotations is learned."""
    x, place = heads_of(2, 2, 6, 8, torch.float32), torch.tensor([[3, 3, -1, 0, 1], [2, 0, 4, 4, 4]])
    grads = []
    for backend in ("triton", "reference"):
        table = [one.requires_grad_() for one in table_of(5, 8, sharing, torch.float32)]
        out = ops.rotate_tokens(x, tuple(table), place, backend=backend)
        grads.append(torch.autograd.grad(out, table, tokens(*out.shape, seed=4)))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)
