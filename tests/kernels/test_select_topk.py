"""select_topk: both kernels against reference in the interpreter, under the sanitizer. Indices are compared exactly."""

import pytest
import torch

from fastreduce import ops
from fastreduce.kernels import select_topk as kernels
from tests.helpers.inputs import DTYPES, seeded, tokens

NAN, INF = float("nan"), float("inf")
SPECIAL = [0.0, NAN, -0.0, INF, 1.0, -INF, -1.0, NAN, 0.0, INF, -INF, 1e-45, -1e-45, 1.0]


@pytest.fixture(params=["sort", "rank"])
def route(request, monkeypatch):
    """Give every input to both kernels; the shape alone would send all of these to the sort."""
    if request.param == "rank":
        monkeypatch.setattr(kernels, "MAX_SORT", 0)
    return request.param


def check(scores, k):
    ours = ops.select_topk(scores, k, backend="triton")
    assert ours.dtype == torch.int64
    assert ours.is_contiguous()
    assert torch.equal(ours, ops.select_topk(scores, k, backend="reference"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "num_tokens", "k"), [(2, 17, 5), (1, 1, 1), (3, 32, 32), (0, 5, 2), (1, 9, 0)])
def test_shapes(batch, num_tokens, k, dtype, route):
    check(tokens(batch, num_tokens, dtype=dtype), k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_and_ties(dtype, route):
    scores = torch.tensor([SPECIAL, SPECIAL[::-1], [NAN] * len(SPECIAL), [2.0] * len(SPECIAL)]).to(dtype)
    for k in (1, 6, len(SPECIAL)):
        check(scores, k)


def test_every_bit_pattern_of_half_precision_is_ordered(route):
    patterns = torch.arange(-(2**15), 2**15, 613, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        scores = patterns.view(dtype).unsqueeze(0)
        check(scores, scores.shape[1])


def test_any_strides(route):
    wide = torch.randint(0, 6, (3, 40), generator=seeded()).float()
    for scores in (wide[:, 1::2], wide[:1].expand(3, -1), wide.t(), wide.flip(0)[:, 3:20]):
        check(scores, scores.shape[1] // 2)


def test_several_blocks_of_ranks(monkeypatch):
    monkeypatch.setattr(kernels, "MAX_SORT", 0)
    scores = torch.randint(0, 25, (1, 2 * kernels.RANK_TILE["BLOCK_J"] + 3), generator=seeded()).float()
    check(scores, 77)
    check(scores, scores.shape[1])


def test_a_large_sort_and_the_route_beyond_it():
    scores = torch.randint(0, 200, (1, 1500), generator=seeded()).float()
    check(scores, 700)
    assert kernels.sort_tile(kernels.MAX_SORT)["BLOCK"] == kernels.MAX_SORT
    assert kernels.sort_tile(kernels.MAX_SORT)["num_warps"] <= 32


def test_the_route_beyond_the_largest_sort(monkeypatch):
    monkeypatch.setattr(kernels, "MAX_SORT", 64)
    for num_tokens in (64, 65):
        check(tokens(2, num_tokens), num_tokens)


def test_batch_invariance(route):
    scores = torch.randint(0, 9, (4, 50), generator=seeded()).float()
    assert torch.equal(
        ops.select_topk(scores, 20, backend="triton")[2:3], ops.select_topk(scores[2:3], 20, backend="triton")
    )
