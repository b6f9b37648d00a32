"""References that work in blocks of rows above some size decide there what they decide with the whole matrix."""

import pytest
import torch

import fastreduce
from bench.proof import tiny
from fastreduce import ops, reference
from fastreduce.ops import unchecked
from fastreduce.reducers import _soft as soft
from fastreduce.reference import _blocks, _images
from tests.helpers.density_peaks import on_a_line
from tests.helpers.inputs import DTYPES, seeded, tokens


def in_blocks(call, monkeypatch, numbers):
    """Return results with everything at once, and with so many numbers of a matrix at a time."""
    whole = call()
    with monkeypatch.context() as patched:
        patched.setattr(_blocks, "MATRIX", numbers)
        return whole, call()


def assert_same(call, monkeypatch, numbers):
    for one, other in zip(*in_blocks(call, monkeypatch, numbers), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("numbers", [1, 100, 41 * 40])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
class TestSameDecisions:
    def test_match_tokens(self, dtype, numbers, monkeypatch):
        exact = torch.randint(-1, 2, (2, 83, 1), generator=seeded()).to(
            dtype
        )  # cosines of -1, 0 and 1, most of them tied
        exact[:, 40] = float("nan")
        for metric in (exact, tokens(2, 83, 24, dtype=dtype)):
            assert_same(lambda m=metric: [ops.match_tokens(m, 20, prefix=3)], monkeypatch, numbers)

    def test_cluster_dpc_knn(self, dtype, numbers, monkeypatch):
        noise = torch.rand(2, 60, generator=seeded())
        for x in (on_a_line(2, 60, dtype=dtype), tokens(2, 60, 24, dtype=dtype)):
            assert_same(lambda x=x: ops.cluster_dpc_knn(x, 9, neighbors=7, noise=noise), monkeypatch, numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_merge_in_blocks(dtype, monkeypatch):
    logits, x = tokens(2, 30, 11, dtype=dtype), tokens(2, 31, 8, dtype=dtype)
    whole, parts = in_blocks(lambda: ops.soft_merge(logits, x[:, 1:], head=x[:, :1]), monkeypatch, 4 * 30)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinkhorn_merge_of_some_images_at_a_time(dtype, monkeypatch):
    monkeypatch.setattr(_images, "WORKSPACE", 2 * 16 * 30 * 5)
    x, centers = tokens(3, 31, 8, dtype=dtype), torch.nn.functional.normalize(tokens(5, 8, dtype=dtype, seed=1), dim=1)
    for iters in (1, 3):
        options = {"eps": 0.1, "iters": iters, "head": x[:, :1]}
        whole = ops.sinkhorn_merge(x[:, 1:], centers, **options)
        merged, none, *_ = ops.sinkhorn_merge(x[:, 1:], centers.clone().requires_grad_(), similarity=False, **options)
        assert merged.requires_grad
        assert none is None
        with torch.no_grad():
            merged, none, *biases = ops.sinkhorn_merge(x[:, 1:], centers, similarity=False, **options)
        assert none is None
        for one, other in zip((merged, *biases), (whole[0], *whole[2:]), strict=True):
            assert torch.equal(one, other)


def logits_and_weights(model, images):
    with torch.no_grad(), fastreduce.record(model) as seen:
        logits = model(images)
    return [logits, *(stage.weights for stage in seen.stages)]


def test_sinkhorn_without_gradient_keeps_no_similarities(monkeypatch):
    model = tiny.build()
    images = tiny.images(model)
    fastreduce.patch(model, "sinkhorn", eps=0.1, keep=[9, 5, 2], at=tiny.AT)
    whole = logits_and_weights(model, images)
    monkeypatch.setattr(soft, "LOGITS", 0)
    monkeypatch.setattr(_images, "WORKSPACE", 1)
    monkeypatch.setattr(reference, "sinkhorn_merge", None)
    with pytest.raises(TypeError):  # a gradient needs them
        model(images)
    for one, other in zip(logits_and_weights(model, images), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["sit", "patchmerger"])
def test_soft_methods_do_some_clusters_at_a_time(method, monkeypatch):
    model = tiny.build()
    images = tiny.images(model)
    fastreduce.patch(model, method, keep=[9, 5, 2], at=tiny.AT)
    calls = []
    merge = unchecked.soft_merge
    monkeypatch.setattr(
        unchecked,
        "soft_merge",
        lambda logits, *args, **kwargs: calls.append(logits.shape[2]) or merge(logits, *args, **kwargs),
    )
    whole = logits_and_weights(model, images)
    monkeypatch.setattr(soft, "LOGITS", 17 * 4)
    for one, other in zip(logits_and_weights(model, images), whole, strict=True):
        torch.testing.assert_close(one, other)
    assert calls == [9, 5, 2, 4, 4, 1, 5, 2]  # fewer tokens come in at the later stages
    model(images).sum().backward()
    assert calls[8:] == [4, 4, 1, 5, 2]  # with a gradient too: the same bits


def test_an_empty_batch_in_blocks(monkeypatch):
    monkeypatch.setattr(_blocks, "MATRIX", 40)
    x = torch.zeros(0, 30, 8)
    assert ops.match_tokens(x, 5, prefix=1).shape == (0, 30)
    for found in (ops.cluster_dpc_knn(x, 4), ops.cluster_k_medoids(x, None, 4)):
        assert [part.shape for part in found] == [(0, 4), (0, 30)]


def test_usual_sizes_are_one_block():
    assert _blocks.row_blocks(1024, 1024) == [slice(None)]
    assert [part.start for part in _blocks.row_blocks(4096, 4096)] == list(range(0, 4096, 256))
