"""sample_tokens: kernel against reference in the interpreter, under the sanitizer. Indices are compared exactly."""

import pytest
import torch

from fastreduce import ops
from fastreduce.kernels import sample_tokens as kernels
from fastreduce.kernels._launch import Tile
from tests.helpers.inputs import DTYPES, seeded

NAN, INF = float("nan"), float("inf")


def check(scores, budget, prefix=1):
    index, valid = ops.sample_tokens(scores, budget, prefix=prefix, backend="triton")
    assert (index.dtype, valid.dtype) == (torch.int64, torch.bool)
    assert index.is_contiguous()
    assert valid.is_contiguous()
    expected = ops.sample_tokens(scores, budget, prefix=prefix, backend="reference")
    assert torch.equal(index, expected[0])
    assert torch.equal(valid, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "num_tokens", "budget", "prefix"),
    [(2, 30, 11, 1), (1, 1, 1, 0), (1, 1, 5, 3), (3, 17, 40, 2), (0, 9, 4, 1), (2, 32, 32, 1), (1, 70, 1, 40)],
)
def test_shapes(batch, num_tokens, budget, prefix, dtype):
    check(torch.rand(batch, num_tokens, generator=seeded()).to(dtype), budget, prefix)


def test_peaked_scores_round_to_one_distance():
    # Weights far below the peak: many cdfs lie at the same rounded distance from a point, and the first one is taken.
    scores = (12 * torch.randn(4, 40, generator=seeded())).exp()
    scores[0, :20] = 1e-9
    scores[0, 20:] = 1.0
    for budget in (3, 40):
        check(scores, budget)


@pytest.mark.parametrize("high", [2, 3, 9])
def test_ties_and_plateaus(high):
    check(torch.randint(0, high, (4, 33), generator=seeded()).float(), 20)
    check(torch.ones(1, 64), 31)  # points halfway between two cdfs


def test_special_values():
    rows = [
        [0.0] * 6,
        [NAN] * 6,
        [INF] * 6,
        [3e38] * 6,
        [1.0, NAN, 2.0, INF, -5.0, 1.0],
        [0.0, 0.0, 1.0, 0.0, 0.0, 0.0],
    ]
    check(torch.tensor(rows), 4)
    check(torch.tensor(rows).half(), 4)


def test_any_strides():
    wide = torch.rand(3, 40, generator=seeded())
    for scores in (wide[:, 1::2], wide[:1].expand(3, -1), wide.t(), wide.flip(0)[:, 3:20]):
        check(scores, 7)


@pytest.mark.parametrize(("block_n", "block_k"), [(32, 32), (64, 32), (32, 64)])
def test_several_blocks(block_n, block_k, monkeypatch):
    whole = torch.rand(2, 150, generator=seeded())
    whole[1, 60:] = 0.0
    expected = kernels.sample_tokens(whole, 90, 3)
    monkeypatch.setattr(kernels, "sample_tile", lambda *_: Tile(BLOCK_N=block_n, BLOCK_K=block_k))
    check(whole, 90, 3)
    for ours, other in zip(kernels.sample_tokens(whole, 90, 3), expected, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize(("num_tokens", "budget"), [(600, 100), (100, 600), (1100, 1030), (4097, 2100)])
def test_large(num_tokens, budget):
    scores = torch.rand(1, num_tokens, generator=seeded(1)).square()
    scores[:, -num_tokens // 4 :] = 0.0
    check(scores, budget)


def test_tokens_without_weight_at_the_end_are_never_taken():
    scores = torch.rand(5, 90, generator=seeded(2))
    scores[:, 37:] = 0.0  # an odd place in the scan
    index, _ = ops.sample_tokens(scores, 80, backend="triton")
    assert index.max() == 36


def test_batch_invariance():
    scores = torch.rand(4, 50, generator=seeded(3))
    for whole, alone in zip(
        ops.sample_tokens(scores, 20, backend="triton"),
        ops.sample_tokens(scores[2:3], 20, backend="triton"),
        strict=True,
    ):
        assert torch.equal(whole[2:3], alone)


@pytest.mark.parametrize(("budget", "parts"), [(7, 7), (12, 12), (5, 40), (6, 7)])
def test_parts(budget, parts):
    """Points are as many as the released code's rounding gives, which can be as many as there are parts."""
    scores = torch.rand(2, 23, generator=seeded(budget))
    index, valid = ops.sample_tokens(scores, budget, parts=parts, backend="triton")
    expected, real = ops.sample_tokens(scores, budget, parts=parts, backend="reference")
    assert torch.equal(index, expected)
    assert torch.equal(valid, real)
    assert torch.equal(index, ops.sample_tokens(scores, budget, backend="triton")[0]) == (parts == budget + 1)
