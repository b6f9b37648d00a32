"""Padding: no row or column past the end wins an argmin, an argmax, a minimum or a maximum, however its dot rounds.

Tiles repeat their last row where the image ends. On a GPU equal rows round alike, but nothing promises it: here every
row or column that repeats the one before gets another dot, by far, so that it wins wherever it is not masked.
"""

import pytest
import torch
import triton.runtime.interpreter as interpreter

from fastreduce import ops
from fastreduce.kernels import cluster_dpc_knn
from fastreduce.kernels._distances import squared_lengths
from tests.helpers.density_peaks import separated
from tests.helpers.inputs import seeded, tokens


@pytest.fixture(params=[1.5, 0.5], ids=["padding nearer", "padding farther"])
def repeated(request, monkeypatch):
    """Count the repeated rows and columns, whose dots are multiplied."""
    create_dot, counted = interpreter.InterpreterBuilder.create_dot, []

    def dot(self, a, b, acc, *rest):
        before = acc.data.copy()
        result = create_dot(self, a, b, acc, *rest)
        rows = (a.data[1:] == a.data[:-1]).all(1)
        columns = (b.data[:, 1:] == b.data[:, :-1]).all(0)
        factor = torch.ones(result.data.shape).numpy()
        factor[1:][rows] = request.param
        factor[:, 1:][:, columns] = request.param
        result.data = (before + (result.data - before) * factor).astype(result.data.dtype)
        counted.append(int(rows.sum() + columns.sum()))
        return result

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    return counted


@pytest.mark.parametrize("most", [256, 0], ids=["one program an image", "several"])
@pytest.mark.parametrize(("num_tokens", "k"), [(9, 2), (21, 9), (70, 3), (70, 66)])
def test_dpc_knn(num_tokens, k, most, repeated, monkeypatch):
    monkeypatch.setattr(cluster_dpc_knn, "most_tokens", lambda dtype: most)
    x = separated(2, num_tokens, 12, 5).flip(1)
    centers, label = ops.cluster_dpc_knn(x, k, backend="triton")
    expected = ops.cluster_dpc_knn(x, k, backend="reference")
    assert torch.equal(centers, expected[0])
    assert torch.equal(label, expected[1])
    assert max(repeated) > 0


@pytest.mark.usefixtures("repeated")
def test_the_largest_distance_of_dpc_knn(monkeypatch):
    seen = {}
    kernel = cluster_dpc_knn.cluster_kernel

    class Spy:
        def __getitem__(self, grid):
            def launch(x, squares, density, farthest, *rest, **settings):
                seen["farthest"] = farthest.clone()
                kernel[grid](x, squares, density, farthest, *rest, **settings)

            return launch

    monkeypatch.setattr(cluster_dpc_knn, "cluster_kernel", Spy())
    x = tokens(1, 9, 12)
    cluster_dpc_knn.cluster_dpc_knn(x, 3, 5, None)
    torch.testing.assert_close(seen["farthest"], torch.cdist(x, x).square().amax(2), rtol=1e-4, atol=1e-4)


def test_k_medoids(repeated):
    x = tokens(2, 37, 12, seed=4).mul(8).round()
    weights = torch.rand(2, 37, generator=seeded(5))
    ours, plain = (ops.cluster_k_medoids(x, weights, 5, backend=b) for b in ("triton", "reference"))
    for result, expected in zip(ours, plain, strict=True):
        assert torch.equal(result, expected)
    assert max(repeated) > 0


@pytest.mark.usefixtures("repeated")
@pytest.mark.parametrize("shape", [(2, 37, 16), (1, 3, 37, 16), (1, 150, 80)])
def test_match_tokens(shape):
    metric = tokens(*shape)
    assert torch.equal(*(ops.match_tokens(metric, 9, backend=b)[0] for b in ("triton", "reference")))


def test_sinkhorn_merge(repeated):
    x, centers = tokens(2, 37, 12), torch.nn.functional.normalize(tokens(5, 12, seed=2), dim=1)
    ours, plain = (ops.sinkhorn_merge(x, centers, backend=b)[0] for b in ("triton", "reference"))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    assert max(repeated) > 0


@pytest.mark.usefixtures("repeated")
def test_received_scores():
    q, k = tokens(2, 2, 37, 16), tokens(2, 2, 37, 16, seed=1)
    ours, plain = (ops.received_scores(q, k, backend=b) for b in ("triton", "reference"))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_lengths_of_any_rows():
    x = tokens(3, 7, 1500)[:, 2:, 3:1400]
    torch.testing.assert_close(squared_lengths(x), x.square().sum(2))
    torch.testing.assert_close(squared_lengths(x, reciprocal=True), 1 / x.norm(dim=2))
    zeros = squared_lengths(torch.zeros(1, 2, 4), reciprocal=True)
    torch.testing.assert_close(zeros, torch.full((1, 2), 1e12))
