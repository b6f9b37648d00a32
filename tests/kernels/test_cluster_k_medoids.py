"""cluster_k_medoids: both kernels against reference in the interpreter, under the sanitizer."""

import importlib

import pytest
import torch
import triton

from fastreduce import ops
from fastreduce.kernels import _workspace
from fastreduce.kernels import cluster_k_medoids as kernels
from fastreduce.kernels._distances import squared_lengths
from fastreduce.kernels._launch import Tile
from tests.helpers.budget import EPS, assert_within_budget
from tests.helpers.inputs import DTYPES, seeded, tokens

NAN, INF = float("nan"), float("inf")


def on_a_line(batch, num_tokens, channels, *, dtype=torch.float32, seed=0):
    """Draw whole numbers along one axis: every distance and every sum of distances is exact, and many are tied."""
    x = torch.zeros(batch, num_tokens, channels)
    x[..., channels // 2] = torch.randint(-9, 10, (batch, num_tokens), generator=seeded(seed)).float()
    return x.to(dtype)


def dyadic(batch, num_tokens, *, seed=1, high=9):
    """Draw few different weights, of which products and sums are exact."""
    return torch.randint(0, high, (batch, num_tokens), generator=seeded(seed)).float() / 4


def check(x, weights, k, **options):
    ours = ops.cluster_k_medoids(x, weights, k, backend="triton", **options)
    expected = ops.cluster_k_medoids(x, weights, k, backend="reference", **options)
    for kernel, reference in zip(ours, expected, strict=True):
        assert kernel.dtype == torch.int64
        assert kernel.is_contiguous()
        assert torch.equal(kernel, reference)
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "num_tokens", "channels", "k"), [(2, 17, 8, 5), (3, 5, 1, 1), (1, 70, 33, 21), (1, 40, 12, 40)]
)
def test_exact_distances_with_ties(batch, num_tokens, channels, k, dtype):
    x = on_a_line(batch, num_tokens, channels, dtype=dtype)
    weights = dyadic(batch, num_tokens)
    for iters in (0, 1, 3):
        check(x, weights.to(dtype), k, iters=iters)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "channels", "k"), [(30, 64, 7), (141, 20, 60)])
def test_random_tokens(num_tokens, channels, k, dtype):
    check(tokens(1, num_tokens, channels, dtype=dtype), torch.rand(1, num_tokens, generator=seeded()), k)


@pytest.mark.parametrize("k", [1, 3])
def test_few_tokens(k):
    check(on_a_line(2, k, 4), dyadic(2, k), k)


def test_empty_batch():
    centers, label = check(torch.zeros(0, 9, 4), torch.zeros(0, 9), 3)
    assert (centers.shape, label.shape) == ((0, 3), (0, 9))


def test_more_tokens_than_one_block(monkeypatch):
    monkeypatch.setattr(kernels, "cluster_tile", lambda num_tokens: Tile(BLOCK_N=16, BLOCK_J=4))
    check(on_a_line(1, 53, 4), dyadic(1, 53), 19)


def test_a_longer_sequence():
    assert kernels.cluster_tile(600)["BLOCK_N"] < 600
    check(on_a_line(1, 600, 4, dtype=torch.float16), dyadic(1, 600, high=400), 40, iters=1)


def test_all_tokens_equal():
    """The first center takes every token; every other cluster is empty and takes token 0."""
    centers, label = check(torch.ones(1, 9, 4), torch.arange(9.0).unsqueeze(0), 3)
    assert centers.tolist() == [[0, 0, 0]]
    assert label.tolist() == [[0] * 9]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_tokens_that_are_not_finite(bad, dtype):
    for places in ([3], [0, 30], list(range(31))):
        x = on_a_line(1, 31, 4, dtype=dtype)
        x[:, places, 1] = bad
        check(x, dyadic(1, 31), 8)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
def test_weights_that_are_not_usual():
    x = on_a_line(1, 29, 4)
    weights = dyadic(1, 29)
    weights[:, [2, 5]] = NAN
    weights[:, [4, 7]] = -0.0
    weights[:, [9, 10]] = -1.5
    weights[:, 11] = INF
    for k in (3, 20, 29):
        check(x, weights, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(dtype):
    wide, weights = on_a_line(2, 40, 24, dtype=dtype), dyadic(2, 80)
    by_sequence = on_a_line(19, 2, 8, dtype=dtype).transpose(0, 1)
    not_dense = on_a_line(2, 8, 19, dtype=dtype).mT
    for x in (wide[:, 1:20, 8:16], wide[:, ::2][:, :19, 5:20], by_sequence, not_dense, wide[:1, :19].expand(2, -1, -1)):
        for of_tokens in (weights[:, 3:22], weights[:, ::2][:, :19], weights[:1, :19].expand(2, -1)):
            check(x, of_tokens, 6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "channels"), [(37, 40), (70, 131)])
def test_distances(num_tokens, channels, dtype):
    x, weights = tokens(1, num_tokens, channels, dtype=dtype), torch.rand(1, num_tokens, generator=seeded(3))
    cost, centers = torch.empty(1, num_tokens), torch.empty(1, num_tokens, dtype=torch.int64)
    distance = torch.empty(1, num_tokens, triton.cdiv(num_tokens, 16) * 16)
    kernels.token_distances(x, squared_lengths(x), weights, distance, cost, centers, range(1))
    assert torch.isinf(distance[:, :, num_tokens:]).all()
    distance = distance[:, :, :num_tokens]
    # |a|^2 + |b|^2 - 2ab leaves the rounding of |a|^2 on the diagonal, in the released code too; its root is large.
    noise = distance.diagonal(dim1=1, dim2=2).square()
    assert (noise <= 8 * EPS[torch.float32] * x.float().square().sum(2)).all()
    apart = ~torch.eye(num_tokens, dtype=torch.bool)
    plain, exact = torch.cdist(x.float(), x.float()), torch.cdist(x.double(), x.double())
    assert_within_budget(distance[:, apart], plain[:, apart], exact[:, apart], steps=2)
    torch.testing.assert_close(cost, distance.sum(2) * weights)
    assert torch.equal(centers, ops.select_topk(weights, num_tokens, backend="reference"))


def test_batch_invariance_and_determinism():
    x = tokens(4, 35, 20, dtype=torch.float16)
    weights = torch.rand(4, 35, generator=seeded())

    def run(part):
        return ops.cluster_k_medoids(x[part], weights[part], 9, backend="triton")

    for whole, again, alone in zip(run(slice(None)), run(slice(None)), run(slice(2, 3)), strict=True):
        assert torch.equal(whole, again)
        assert torch.equal(whole[2:3], alone)


@pytest.mark.parametrize("images", [1, 2, 3])
def test_a_workspace_that_does_not_hold_all_images(images, monkeypatch):
    """The same bits, whatever the number of images at a time, and no more memory than the workspace."""
    x, weights = tokens(5, 35, 20, dtype=torch.float16), torch.rand(5, 35, generator=seeded())
    whole = ops.cluster_k_medoids(x, weights, 9, backend="triton")
    launched = []
    measure = kernels.token_distances

    def spy(x, squares, weights, distance, cost, centers, part):
        launched.append((len(part), distance.shape[0]))
        measure(x, squares, weights, distance, cost, centers, part)

    monkeypatch.setattr(kernels, "token_distances", spy)
    monkeypatch.setattr(_workspace, "WORKSPACE", images * 4 * 35 * 48 + 1)
    for one, other in zip(ops.cluster_k_medoids(x, weights, 9, backend="triton"), whole, strict=True):
        assert torch.equal(one, other)
    assert launched == [(min(images, 5 - first), images) for first in range(0, 5, images)]


@pytest.mark.parametrize(("weighted", "cost"), [(False, "all"), (True, "members")])
def test_options_without_kernels_are_the_reference(weighted, cost, monkeypatch):
    x, weights = on_a_line(2, 17, 8), dyadic(2, 17) if weighted else None
    monkeypatch.setattr(importlib.import_module("fastreduce.ops.cluster_k_medoids"), "_cluster", None)
    check(x, weights, 5, cost=cost, first=4)
