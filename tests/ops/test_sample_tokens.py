"""sample_tokens in an ordinary process: operator, numbers against loops, compilation, errors."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastreduce import ops
from fastreduce.reference.sample_tokens import nearest_tokens, sampling_grid, search_nearest
from tests.helpers.inputs import DTYPES, seeded

OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def brute_force(cdf, grid):
    """Compare everything, (B, K, N); argmin takes the first."""
    return (grid.unsqueeze(2) - cdf.unsqueeze(1)).abs().argmin(2)


def slow_sample(row, budget, number):
    """Sample one image, token by token, in the numpy type ``number``.

    The sum of these scores is exact in any order.
    """
    row = [number(s) if 0.0 < s < math.inf else number(0) for s in row]
    with np.errstate(over="ignore"):
        total = number(math.fsum(row)) + number(1e-6)
    cdf, reached = [], 0.0
    for score in row:
        reached += float(score / total)
        cdf.append(number(reached))
    kept = set()
    for i in range(budget):
        point = number((2 * i + 1) / (2 * budget + 2))
        distances = [abs(point - value) for value in cdf]
        kept.add(distances.index(min(distances)))
    return sorted(kept)


def unpacked(index, valid, prefix):
    return [row[keep].tolist() for row, keep in zip(index, valid[:, prefix:], strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("budget", "prefix"), [(1, 0), (4, 1), (20, 3)])
def test_opcheck(budget, prefix, dtype):
    for scores in (torch.rand(3, 9, generator=seeded()), torch.rand(9, 3, generator=seeded()).t()):
        torch.library.opcheck(
            torch.ops.fastreduce.sample_tokens.default, (scores.to(dtype), budget, prefix), test_utils=OPCHECKS
        )


def test_grid():
    assert sampling_grid(3).tolist() == [1 / 8, 3 / 8, 5 / 8]  # and not 7 / 8
    for budget in (1, 98, 4096):
        grid = sampling_grid(budget).float()
        expected = [np.float32(2 * i + 1) / np.float32(2 * budget + 2) for i in range(budget)]
        assert torch.equal(grid, torch.tensor(np.array(expected)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("budget", [1, 2, 7, 40, 250])
def test_nearest_is_the_first_argmin(budget, dtype):
    grid = sampling_grid(budget).to(dtype).expand(40, -1).contiguous()
    rows = torch.rand(40, 61, generator=seeded(budget))
    unit = torch.finfo(dtype).eps
    for cdf in (
        rows.sort(1)[0],
        (rows * 8).floor().sort(1)[0] / 8,  # plateaus, and points in the middle of two
        (30 * torch.randn(40, 61, generator=seeded(1))).exp().clamp(max=1.0).sort(1)[0],  # many magnitudes
        torch.cat([rows[:, :30] * unit, rows[:, 30:]], 1).sort(1)[0],  # below half a rounding step of any distance
        torch.cat([(rows[:, :50] * 64).floor() * unit / 16, rows[:, 50:] * 0.01 + 0.99], 1).sort(1)[0],
        rows.sort(1)[0] * 0.2,  # no cdf reaches the last points
        torch.cat([grid[:, :1].expand(-1, 3), rows.sort(1)[0] * 0.5 + 0.5], 1).sort(1)[0].to(dtype),
    ):
        values = cdf.to(dtype).contiguous()
        expected = brute_force(values, grid)
        assert torch.equal(search_nearest(values, grid), expected)
        assert torch.equal(nearest_tokens(values, grid), expected)


def test_nearest_at_midpoints_of_rounding():
    """Cdfs whose exact distance lies halfway between two floats: rounding to even decides whether they tie."""
    for budget in (1, 2, 3, 10):
        grid = sampling_grid(budget).float()
        last = grid[-1].item()
        step = float(np.spacing(np.float32(last)))
        cdf = torch.tensor([[m * step / 4 for m in range(0, 24)]] * 2, dtype=torch.float32)
        cdf = torch.cat([cdf, torch.full((2, 1), 3.0)], 1)
        points = grid.expand(2, -1).contiguous()
        assert torch.equal(search_nearest(cdf, points), brute_force(cdf, points))


SCORES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 0.25, 1024.0]),
    st.integers(0, 7).map(float),
    st.sampled_from([math.nan, math.inf, -math.inf, -1.0]),
)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    batch=st.integers(0, 3),
    num_tokens=st.integers(1, 12),
    budget=st.integers(1, 20),
    prefix=st.integers(0, 2),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    transposed=st.booleans(),
)
def test_against_loops(data, batch, num_tokens, budget, prefix, dtype, transposed):
    count = batch * num_tokens
    values = data.draw(st.lists(SCORES, min_size=count, max_size=count))
    scores = torch.tensor(values, dtype=torch.float64).view(batch, num_tokens).to(dtype)
    if transposed:
        scores = scores.t().contiguous().t()
    number = np.float64 if dtype == torch.float64 else np.float32
    expected = [slow_sample(row, budget, number) for row in scores.tolist()]
    for index, valid in (
        ops.sample_tokens(scores, budget, prefix=prefix),
        torch.ops.fastreduce.sample_tokens(scores, budget, prefix),
    ):
        assert (index.dtype, index.shape) == (torch.int64, (batch, budget))
        assert (valid.dtype, valid.shape) == (torch.bool, (batch, prefix + budget))
        assert valid[:, :prefix].all()
        assert unpacked(index, valid, prefix) == expected
        assert not index[~valid[:, prefix:]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_tokens_against_brute_force(dtype):
    generator = seeded(4)
    scores = torch.rand(6, 196, generator=generator, dtype=dtype).pow(4)
    for budget in (3, 49, 98, 176, 300):
        weights = scores / (scores.sum(1, keepdim=True, dtype=torch.float64).to(dtype) + 1e-6)
        grid = sampling_grid(budget).to(dtype).expand(6, -1)
        nearest = brute_force(weights.cumsum(1), grid)
        index, valid = ops.sample_tokens(scores, budget)
        assert unpacked(index, valid, 1) == [row.unique().tolist() for row in nearest]


def test_tokens_without_weight():
    scores = torch.rand(4, 60, generator=seeded(5))
    scores[:, 41:] = 0.0
    index, valid = ops.sample_tokens(scores, 50)
    assert index.max() <= 40
    cut = ops.sample_tokens(scores[:, :41], 50)
    assert torch.equal(index, cut[0])
    assert torch.equal(valid, cut[1])
    for row in ([0.0] * 5, [math.nan] * 5, [math.inf, 0.0, 0.0, 0.0, 0.0], [3e38] * 5):
        assert unpacked(*ops.sample_tokens(torch.tensor([row]), 4), 1) == [[0]]
    assert unpacked(*ops.sample_tokens(torch.tensor([[math.nan, 1.0, -2.0, 1.0]]), 4), 1) == [[0, 1]]


def test_scores_of_the_class_token_with_values_go_in_as_they_are():
    """ATS: the sum over heads of attention times value length, normalised and cumulated."""
    qkv = torch.randn(2, 30, 3, 3, 8, generator=seeded(6))
    q, k, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    valid = torch.arange(30) < torch.tensor([[30], [22]])
    scores = ops.cls_value_scores(q[:, :, 0], k, value, valid=valid)
    logits = (q @ k.transpose(2, 3) * 8**-0.5).masked_fill(~valid[:, None, None], -torch.inf)
    weights = (logits.softmax(-1)[:, :, 0] * value.norm(dim=-1)).sum(1)[:, 1:]
    weights = weights / (weights.sum(1, keepdim=True) + 1e-6)
    nearest = brute_force(weights.cumsum(1), sampling_grid(12).float().expand(2, -1))
    index, kept = ops.sample_tokens(scores, 12)
    assert unpacked(index, kept, 1) == [row.unique().tolist() for row in nearest]
    assert index[1].max() < 21


def test_no_gradient_and_batch_invariance():
    scores = torch.rand(4, 23, generator=seeded(7)).requires_grad_()
    whole = ops.sample_tokens(scores, 9)
    assert not whole[0].requires_grad
    for first, alone in zip(whole, ops.sample_tokens(scores[2:3], 9), strict=True):
        assert torch.equal(first[2:3], alone)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("sample", [ops.sample_tokens, lambda s, k: torch.ops.fastreduce.sample_tokens(s, k, 1)])
def test_compile_fullgraph(sample, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(lambda s: sample(s, s.shape[1] // 2), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((2, 8), (3, 8), (3, 20)) if dynamic else ((2, 8),):
        scores = torch.rand(shape, generator=seeded(8))
        for ours, expected in zip(compiled(scores), ops.sample_tokens(scores, shape[1] // 2), strict=True):
            assert torch.equal(ours, expected)


def raises(kind, message, call, *args, **kwargs):
    with pytest.raises(kind, match=message):
        call(*args, **kwargs)


def test_refuses():
    scores = torch.zeros(2, 5)
    refuse = functools.partial(raises, call=ops.sample_tokens)
    raises(TypeError, r"scores must be a tensor of shape \(B, N\), got list", ops.sample_tokens, [1.0], 1)
    raises(ValueError, r"scores must have shape \(B, N\), got \(5,\)", ops.sample_tokens, scores[0], 1)
    raises(TypeError, "scores must be floating point, got torch.int64", ops.sample_tokens, scores.long(), 1)
    raises(ValueError, r"at least one token, got shape \(2, 0\)", ops.sample_tokens, scores[:, :0], 1)
    refuse(ValueError, "budget must be between 1 and .*, got 0", scores=scores, budget=0)
    refuse(TypeError, "budget must be an integer, got 2.0", scores=scores, budget=2.0)
    refuse(ValueError, "prefix must be between 0 and .*, got -1", scores=scores, budget=1, prefix=-1)
    refuse(TypeError, "prefix must be an integer, got True", scores=scores, budget=1, prefix=True)
    refuse(ValueError, "unknown backend 'gpu'", scores=scores, budget=1, backend="gpu")
    refuse(RuntimeError, "'triton' was asked for", scores=scores, budget=1, backend="triton")
