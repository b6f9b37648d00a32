"""An image's result does not depend on its batch, nor on whether gradients are recorded: bit for bit, on the CPU.

What is promised is the reference's part: every operator, with one thread or several, for float32, 16-bit and float64.
Whole models add PyTorch's linear layers and convolutions, whose rounding PyTorch decides; here they run image by image.
"""

import functools

import pytest
import torch

import fastreduce
from bench.proof import tiny
from fastreduce import ops
from tests.helpers.inputs import distinct_indices, seeded

BATCHES = (1, 3, 8)
SHAPES = ((50, 48, 3), (17, 192, 3), (10, 64, 1))  # tokens, channels, heads
CASES = (
    (SHAPES[0], torch.float32, "dense"),
    (SHAPES[0], torch.bfloat16, "behind a prefix"),
    (SHAPES[0], torch.float64, "sliced"),
    (SHAPES[1], torch.float32, "sliced"),
    (SHAPES[1], torch.float64, "dense"),
    (SHAPES[2], torch.float32, "behind a prefix"),
)


@pytest.fixture(params=[1, pytest.param(2, marks=pytest.mark.slow)], autouse=True)
def _threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def _heads(x):
    """Return (B, H, N, D) as a third of a packed projection."""
    batch, heads, tokens, width = x.shape
    packed = x.new_zeros(batch, tokens, 3, heads, width)
    packed[:, :, 1] = x.transpose(1, 2)
    return packed[:, :, 1].transpose(1, 2)


def _behind_prefix(x):
    return torch.cat([torch.zeros_like(x[:, :1]), x], dim=1)[:, 1:]


def _sliced(x):
    return torch.cat([x, torch.zeros_like(x), x[..., :1]], dim=-1)[..., : x.shape[-1]]


def _laid_out(x, layout):
    if layout == "dense" or x.ndim < 3 or not x.is_floating_point():
        return x
    if x.ndim == 4:
        return _heads(x)
    return _sliced(x) if layout == "sliced" else _behind_prefix(x)


@functools.cache
def _operators(tokens, channels, heads, dtype):
    """Return name: the operator, and tensors (8, ...) of which it takes some images."""
    batch, patches, keep = 8, tokens - 1, (tokens - 1) // 2

    def normal(seed, *shape):
        return torch.randn(*shape, generator=seeded(seed)).to(dtype)

    x, after = normal(1, batch, patches, channels), normal(2, batch, keep, channels)
    whole, kept = normal(3, batch, tokens, channels), normal(4, batch, 1 + keep, channels)
    fused = normal(5, batch, 2 + keep, channels)
    q, k, v = (normal(seed, batch, heads, tokens, channels // heads) for seed in (6, 7, 8))
    bias, policy, scores = (torch.rand(batch, n, generator=seeded(n)) for n in (tokens, tokens, patches))
    valid = torch.rand(batch, tokens, generator=seeded(9)) > 0.3
    valid[:, 0] = True
    index, order = distinct_indices(batch, keep, patches), distinct_indices(batch, patches, patches, seed=1)
    slot = torch.randint(0, keep, (batch, patches), generator=seeded(10))
    layer, bias_1 = normal(11, 1, channels) * 0.05, normal(12, 1)
    centers, logits = normal(13, keep, channels), normal(14, batch, patches, keep)
    transport = {"eps": 0.5, "iters": 3}
    return {
        "attention": (ops.attention, q, k, v),
        "attention, bias": (lambda q, k, v, b: ops.attention(q, k, v, bias=b), q, k, v, bias),
        "attention, policy": (lambda q, k, v, p: ops.attention_policy(q, k, v, p.round()), q, k, v, policy),
        "attention, index": (lambda q, k, v, i: ops.attention(q, k, v, index=i, prefix=1), q, k, v, index),
        "attention_cls_scores": (ops.attention_cls_scores, q, k, v),
        "attention_received_scores": (
            lambda q, k, v, b: ops.attention_received_scores(q, k, v, bias=b),
            *(q, k, v, bias),
        ),
        "cls_scores": (lambda q, k: ops.cls_scores(q[:, :, 0], k), q, k),
        "cls_value_scores": (lambda q, k, v, m: ops.cls_value_scores(q[:, :, 0], k, v, valid=m), q, k, v, valid),
        "cluster_dpc_knn": (lambda x: ops.cluster_dpc_knn(x, keep), x),
        "cluster_k_medoids": (lambda x, w: ops.cluster_k_medoids(x, w, keep), x, scores),
        "cluster_k_medoids, members": (
            lambda x, w: ops.cluster_k_medoids(x, w, keep, cost="members"),
            *(x, scores),
        ),
        "cluster_k_medoids, equal": (lambda x: ops.cluster_k_medoids(x, None, keep), x),
        "fuse_tokens": (
            lambda x, o, s, r: ops.fuse_tokens(x, o, s, keep, residual=r),
            *(whole, order, scores, fused),
        ),
        "gather_tokens": (lambda x, i, r: ops.gather_tokens(x, i, residual=r), whole, index, kept),
        "match_tokens": (lambda x: ops.match_tokens(x, keep), whole),
        "match_tokens, keys": (lambda k: ops.match_tokens(k, keep), k),
        "merge_tokens": (lambda x, s, r: ops.merge_tokens(x, s, keep, residual=r), x, slot, after),
        "merge_tokens, size": (lambda x, s, z: ops.merge_tokens(x, s, keep, size=z + 0.5), x, slot, scores),
        "merge_tokens, log_size": (
            lambda x, s: ops.merge_tokens(x, s, keep, log_size=(layer, bias_1), eps=1e-6),
            *(x, slot),
        ),
        "received_scores": (ops.received_scores, q, k),
        "sample_tokens": (lambda s: ops.sample_tokens(s, keep), scores),
        "select_topk": (lambda s: ops.select_topk(s, keep), scores),
        "sinkhorn_merge": (lambda x: ops.sinkhorn_merge(x, centers, **transport), x),
        "sinkhorn_merge, not kept": (lambda x: ops.sinkhorn_merge(x, centers, **transport, similarity=False), x),
        "soft_merge": (ops.soft_merge, logits, x),
        "unmerge_tokens": (ops.unmerge_tokens, after, slot),
    }


def _results(function, tensors, batch, grad):
    inputs = [tensor[:batch] for tensor in tensors]
    if grad:
        inputs = [one.detach().requires_grad_() if one.is_floating_point() else one for one in inputs]
    with torch.set_grad_enabled(grad):
        outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [output.detach() for output in outputs if output is not None]


def _differences(function, tensors):
    """Return the modes and batches in which an image is not what it is alone without gradients."""
    alone = [_results(function, [tensor[image:] for tensor in tensors], 1, False) for image in range(8)]
    for grad in (False, True):
        for batch in BATCHES:
            for output, firsts in zip(_results(function, tensors, batch, grad), zip(*alone, strict=True), strict=True):
                if not torch.equal(output, torch.cat(firsts[:batch])):
                    yield "with gradient" if grad else "without", batch


@pytest.mark.parametrize("name", list(_operators(*SHAPES[0], torch.float32)))
def test_operators(name):
    differences = {}
    for shape, dtype, layout in CASES:
        function, *tensors = _operators(*shape, dtype)[name]
        found = list(_differences(function, [_laid_out(tensor, layout) for tensor in tensors]))
        if found:
            differences[shape, dtype, layout] = found
    assert not differences


@pytest.fixture
def _invariant_backbone(monkeypatch):
    """Give a model linear layers and convolutions that do not depend on the batch, as PyTorch's own may on the CPU."""

    def one_by_one(function):
        def call(x, *args, **kwargs):
            return torch.cat([function(image, *args, **kwargs) for image in x.split(1)])

        return call

    for name in ("linear", "conv2d"):
        monkeypatch.setattr(torch.nn.functional, name, one_by_one(getattr(torch.nn.functional, name)))


@pytest.mark.parametrize("name", tiny.METHODS)
@pytest.mark.usefixtures("_invariant_backbone")
def test_models(name):
    """Models are in float32; images of ATS have as many tokens as could be kept, whatever the others keep."""
    arguments = {"trim": False} if name == "ats" else {}
    model = tiny.build()
    fastreduce.patch(model, keep_rate=0.5, at=tiny.AT, **tiny.METHODS[name], **arguments)
    if hasattr(model, "reducers"):
        tiny.randomize(model.reducers, seed=7)
    assert not list(_differences(model, [tiny.images(model, batch=8)]))


@pytest.mark.parametrize("method", ["sit", "patchmerger", "sinkhorn"])
@pytest.mark.usefixtures("_invariant_backbone")
def test_soft_merges_some_clusters_at_a_time(method, monkeypatch):
    """Inputs are long, with gradients as without."""
    monkeypatch.setattr(fastreduce.reducers._soft, "LOGITS", 100)
    monkeypatch.setattr(fastreduce.reference._blocks, "MATRIX", 100)
    model = fastreduce.patch(tiny.build(), method, keep=(14, 9), at=(1, 2))
    tiny.randomize(model.reducers, seed=7)
    assert not list(_differences(model, [tiny.images(model, batch=8)]))
