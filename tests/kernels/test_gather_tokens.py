"""gather_tokens: kernel against reference in the interpreter, under the sanitizer."""

import pytest
import torch

from fastreduce import ops
from tests.helpers.budget import assert_within_budget
from tests.helpers.inputs import DTYPES, distinct_indices, tokens

SHAPES = [(2, 17, 5, 24, 1), (1, 2, 1, 1, 1), (3, 9, 4, 33, 0), (2, 12, 0, 16, 5), (0, 9, 3, 8, 1), (1, 9, 3, 1030, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["dense", "sliced", "expanded"])
@pytest.mark.parametrize(("batch", "num_in", "keep", "channels", "prefix"), SHAPES)
def test_forward_and_backward(batch, num_in, keep, channels, prefix, layout, dtype):
    x = tokens(batch, num_in, channels, dtype=dtype, layout=layout)
    index = distinct_indices(batch, keep, num_in - prefix)
    residual = tokens(batch, prefix + keep, channels, dtype=dtype, seed=1, layout=layout)
    grad = tokens(batch, prefix + keep, channels, dtype=dtype, seed=2, layout=layout)
    results = []
    for backend, cast in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        leaves = [x.to(cast).detach().requires_grad_(), residual.to(cast).detach().requires_grad_()]
        out = ops.gather_tokens(leaves[0], index, prefix=prefix, residual=leaves[1], backend=backend)
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(cast))])
    for triple in zip(*results, strict=True):
        assert_within_budget(*triple)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_residual_rows_are_copied_bit_for_bit(dtype):
    x, index = tokens(2, 20, 40, dtype=dtype), distinct_indices(2, 7, 19).int()
    ours = ops.gather_tokens(x, index, backend="triton")
    assert torch.equal(ours, ops.gather_tokens(x, index, backend="reference"))


def test_index_of_any_stride():
    x, index = tokens(3, 20, 8), distinct_indices(1, 6, 19).expand(3, 6)
    wide = distinct_indices(3, 12, 19)[:, ::2]
    for chosen in (index, wide):
        assert torch.equal(
            ops.gather_tokens(x, chosen, backend="triton"), ops.gather_tokens(x, chosen, backend="reference")
        )


def test_repeated_indices_add_their_gradients():
    x = tokens(1, 6, 8).requires_grad_()
    index = torch.tensor([[2, 2, 0, 2]])
    out = ops.gather_tokens(x, index, backend="triton")
    grad = tokens(*out.shape, seed=3)
    (ours,) = torch.autograd.grad(out, x, grad)
    expected = torch.zeros_like(ours)
    for row, source in enumerate([0, 3, 3, 1, 3]):
        expected[:, source] += grad[:, row]
    torch.testing.assert_close(ours, expected)


def test_mixed_dtypes_promote():
    x, residual = tokens(1, 5, 8), tokens(1, 3, 8, dtype=torch.bfloat16)
    index = torch.tensor([[3, 1]])
    ours = ops.gather_tokens(x, index, residual=residual, backend="triton")
    assert ours.dtype == torch.float32
    assert torch.equal(ours, ops.gather_tokens(x, index, residual=residual, backend="reference"))


def test_batch_invariance_bitwise():
    x, index = tokens(4, 11, 48, dtype=torch.float16), distinct_indices(4, 5, 10)
    residual = tokens(4, 6, 48, dtype=torch.float16, seed=1)
    whole = ops.gather_tokens(x, index, residual=residual, backend="triton")
    alone = ops.gather_tokens(x[2:3], index[2:3], residual=residual[2:3], backend="triton")
    assert torch.equal(whole[2:3], alone)
