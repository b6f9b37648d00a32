"""Inputs by hand, for paths that the shapes of the microbenchmarks do not take.

``special_cases`` takes the kernels' other routes: many tokens, few neighbours, odd head widths, packed rows and index.
``edge_cases`` has integer arguments of 0 and 1, which Triton's JIT makes constants of: code that the interpreter never
sees. Every case is a ``Primitive``, so that it is checked against float64 as all others are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.primitives import Inputs, Outputs, Primitive, Shape
from bench.primitives.match_tokens import MATCH_TOKENS
from bench.primitives.sample_tokens import SAMPLE_TOKENS
from fastreduce import ops
from fastreduce.kernels import _workspace

__all__ = ["edge_cases", "special_cases"]


def _tensors(found: Any) -> Outputs:
    """Turn what an operator returns into a tuple of tensors."""
    return tuple(one for one in (found if isinstance(found, tuple) else (found,)) if isinstance(one, Tensor))


def _compare_matches(inputs: Inputs, outputs: Outputs, exact: Outputs) -> str | None:
    """Judge slots as the primitive's description does, whether or not the metric has heads."""
    metric = inputs["metric"] if inputs["metric"].dim() == 4 else inputs["metric"].unsqueeze(1)
    assert MATCH_TOKENS.compare is not None
    return MATCH_TOKENS.compare({**inputs, "metric": metric}, outputs, exact)


# Decisions that near-ties may change are judged by their values; all others must be equal.
_COMPARED = {ops.match_tokens: _compare_matches, ops.sample_tokens: SAMPLE_TOKENS.compare}


def _case(name: str, call: Callable[..., Any], gradients: str = "", *, terms: float = 0.0, **inputs: Any) -> Primitive:
    """Make a case of an operator: ``call(**inputs, backend=)``, and the names of the inputs that get a gradient."""

    def ours(**arguments: Any) -> Outputs:
        return _tensors(call(**arguments))

    def plain(arguments: Inputs) -> Outputs:
        return ours(**arguments, backend="reference")

    def make(shape: Shape, generator: torch.Generator) -> Inputs:
        return dict(inputs)

    names = tuple(gradients.split())
    compare = None if inputs.get("prefix") == 0 else _COMPARED.get(call)  # they take one prefix token for granted
    return Primitive(name, make, ours, plain, lambda *_: 0, names, compare=compare, terms=terms)


class _Draw:
    """Random tensors of one dtype, the same at every call.

    Args:
        dtype: of the tokens.
        seed: of the generator.
    """

    def __init__(self, dtype: torch.dtype, seed: int = 0):
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def tokens(self, *size: int) -> Tensor:
        """Draw normal numbers."""
        return torch.randn(*size, generator=self.generator).to(self.dtype)

    def whole(self, *size: int) -> Tensor:
        """Draw small whole numbers: exact distances, equal ones too."""
        return torch.randn(*size, generator=self.generator).mul(3).round().to(self.dtype)

    def weights(self, *size: int) -> Tensor:
        """Draw numbers from 0 to 1 in float32."""
        return torch.rand(*size, generator=self.generator)

    def order(self, batch: int, count: int) -> Tensor:
        """Draw permutations, (batch, count)."""
        return self.weights(batch, count).argsort(1)


def in_parts(call: Callable[..., Any], workspace: int) -> Callable[..., Any]:
    """Return the call under a workspace of so many bytes: then launches take some images at a time."""

    @functools.wraps(call)
    def within(**arguments: Any) -> Any:
        with mock.patch.object(_workspace, "WORKSPACE", workspace):
            return call(**arguments)

    return within


def _normed(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the call with the weight and bias of a norm, or neither, as arguments of their own."""
    return lambda *, weight=None, bias=None, **arguments: call(**arguments, norm=(weight, bias, 1e-6))


def _clusters(draw: _Draw) -> list[Primitive]:
    few, many, weights = draw.whole(2, 50, 64), draw.whole(1, 1030, 64), draw.weights(2, 50)
    medoids, peaks = ops.cluster_k_medoids, ops.cluster_dpc_knn
    tokens, noise = draw.whole(1, 300, 192), draw.weights(1, 300) * 1e-2
    return [
        _case("k_medoids in parts", in_parts(medoids, 50 * 64 * 4), x=few, weights=weights, k=20),
        _case("k_medoids 1030", medoids, x=many, weights=draw.weights(1, 1030), k=40, iters=1),
        _case("dpc_knn 300", peaks, x=tokens, k=100, noise=noise),
        _case("dpc_knn 20 neighbours", peaks, x=tokens[:, :70], k=30, neighbors=20, noise=noise[:, :70]),
    ]


def _matches(draw: _Draw) -> list[Primitive]:
    keys = draw.tokens(2, 3, 300, 64)
    call = ops.match_tokens
    return [
        _case("match_tokens 300", call, metric=keys, r=100),
        _case("match_tokens one metric", call, metric=keys[:, 0], r=60),
        _case("match_tokens 1024 channels", call, metric=draw.tokens(1, 66, 1024), r=16),
        _case("match_tokens 700", call, metric=draw.tokens(1, 1, 700, 32), r=200),
        _case("match_tokens 1100", call, metric=draw.tokens(1, 2, 1100, 16), r=200),
    ]


def _choices(draw: _Draw) -> list[Primitive]:
    odd = torch.tensor([[0.0, -0.0, float("nan"), 1, 1, float("-inf"), float("inf"), 2] * 8])
    return [
        _case("sample_tokens 1300", ops.sample_tokens, scores=draw.weights(2, 1300), budget=700),
        _case("select_topk 4000", ops.select_topk, scores=draw.weights(1, 4000), k=100),
        _case("select_topk 5000", ops.select_topk, scores=draw.weights(1, 5000), k=100),
        _case("select_topk NaN and ties", ops.select_topk, scores=odd, k=40),
    ]


def _fusions(draw: _Draw) -> list[Primitive]:
    x, weight, bias = draw.tokens(2, 900, 192), draw.tokens(192), draw.tokens(192)
    order, scores = draw.order(2, 899), draw.weights(2, 899).softmax(1)
    short = {"x": x[:, :300], "order": draw.order(2, 299), "scores": scores[:, :299], "k": 100}
    norm = {"weight": weight, "bias": bias}
    return [
        _case("fuse_tokens_norm 900", _normed(ops.fuse_tokens), x=x, order=order, scores=scores, k=100, **norm),
        _case(
            "fuse_tokens_norm 300",
            _normed(ops.fuse_tokens),
            residual=x[:, 600:702],
            residual_bias=bias,
            **short,
            **norm,
        ),
    ]


def _transport(draw: _Draw) -> list[Primitive]:
    x, centers = draw.tokens(2, 130, 192), torch.nn.functional.normalize(draw.tokens(40, 192).float(), dim=-1)
    near = centers.to(draw.dtype)

    def merged(**arguments: Any) -> Any:
        return ops.sinkhorn_merge(**arguments)[0]

    return [
        _case("sinkhorn_merge in parts", in_parts(merged, 136 * 48 * 4), x=x, centers=near, similarity=False),
        _case("sinkhorn_merge float32 centres", merged, x=x, centers=centers),
    ]


def _attentions(draw: _Draw) -> list[Primitive]:
    packed = dict(zip("qkv", (draw.tokens(1, 3, 160, 64) for _ in range(3)), strict=True))
    index = torch.stack([draw.order(1, 29)[0].sort().values for _ in range(3)])
    offsets = (torch.tensor([0, 11, 31, 56], dtype=torch.int32), torch.tensor([0, 30, 95, 150], dtype=torch.int32))
    found = [
        _case(
            "attention packed, indexed",
            ops.attention_packed,
            index=index,
            prefix=1,
            num_out=70,
            offsets=offsets,
            longest=(30, 65),
            **packed,
        )
    ]
    for dim, size in ((72, (2, 3, 70, 72)), (33, (2, 3, 70, 33)), (128, (1, 2, 70, 128))):
        parts = dict(zip("qkv", (draw.tokens(*size) for _ in range(3)), strict=True))
        extra = {"bias": draw.weights(2, 70)} if dim == 72 else {}
        found.append(_case(f"attention D={dim}", ops.attention, "q k v", **parts, **extra))
    # A step of 64 keys in a loop, and a narrower one behind it.
    steps = dict(zip("qkv", (draw.tokens(1, 2, 65, 64) for _ in range(3)), strict=True))
    found.append(_case("attention 65", ops.attention, "q k v", **steps))
    q, k = draw.tokens(2, 3, 70, 72), draw.tokens(2, 3, 70, 72)
    return [*found, _case("received_scores D=72", ops.received_scores, "q k", q=q, k=k)]


def _rotations(draw: _Draw) -> list[Primitive]:
    """Return both layouts, odd widths, tables for each head or image, tokens without a place."""
    x = draw.tokens(2, 3, 21, 88)
    place = torch.randint(-1, 30, (2, 20), generator=draw.generator, dtype=torch.int32)
    shared, mixed, own = (draw.tokens(*shape, 30, 88) for shape in ((), (3,), (2, 1)))
    return [
        _case("rotate_tokens half", ops.rotate_tokens, "x", x=x, table=(shared, shared), place=place, layout="half"),
        _case("rotate_tokens heads", ops.rotate_tokens, "x", x=x, table=(mixed, mixed), place=place),
        _case("rotate_tokens images", ops.rotate_tokens, "x", x=x, table=(own, own), place=place),
        _case("rotate_tokens in order", ops.rotate_tokens, "x", x=x[:, :, :20], table=(shared[:20],) * 2, prefix=0),
    ]


def special_cases(dtype: torch.dtype) -> dict[str, Primitive]:
    """Return the cases of the kernels' other routes, by name."""
    draw = _Draw(dtype)
    groups = (_clusters, _matches, _choices, _fusions, _transport, _attentions, _rotations)
    return {case.name: case for group in groups for case in group(draw)}


def _edge_choices(draw: _Draw) -> list[Primitive]:
    return [
        _case("sample_tokens budget 1", ops.sample_tokens, scores=draw.weights(2, 196), budget=1),
        _case("sample_tokens one token", ops.sample_tokens, scores=draw.weights(2, 1), budget=1, prefix=0),
        _case("select_topk 1 of 1", ops.select_topk, scores=draw.weights(2, 1), k=1),
    ]


def _edge_rows(draw: _Draw, none: Tensor) -> list[Primitive]:
    one, wide, score = draw.tokens(1, 1, 1), draw.tokens(1, 1, 64), draw.weights(1, 1)
    two, head, size = draw.tokens(1, 2, 64), draw.tokens(1, 1, 64), draw.weights(1, 1) + 1
    fuse, merge = _normed(ops.fuse_tokens), _normed(ops.merge_tokens)
    fused = {"order": none, "scores": score}
    return [
        _case("rotate_tokens 1", ops.rotate_tokens, x=draw.tokens(1, 1, 2, 2), table=(draw.tokens(1, 2),) * 2),
        _case("gather_tokens 1", ops.gather_tokens, x=draw.tokens(1, 2, 1), index=none),
        _case(
            "gather_tokens_norm 1",
            _normed(ops.gather_tokens),
            "x residual",
            x=wide,
            index=none,
            prefix=0,
            residual=head,
        ),
        _case("merge_tokens 1", ops.merge_tokens, x=one, slot=none, num_out=1),
        _case(
            "merge_tokens_norm 1",
            merge,
            "x size weight",
            x=wide,
            slot=none,
            num_out=1,
            size=size,
            weight=draw.weights(64).to(draw.dtype),
            head=head,
        ),
        _case("unmerge_tokens 1", ops.unmerge_tokens, x=one, slot=none),
        _case("fuse_tokens none kept", ops.fuse_tokens, x=two, k=0, prefix=1, **fused),
        _case("fuse_tokens_norm 1 kept", fuse, x=two, k=1, prefix=1, **fused),
        _case("fuse_tokens_norm no prefix", fuse, "x scores", x=wide, k=0, prefix=0, **fused),
    ]


def _edge_clusters(draw: _Draw) -> list[Primitive]:
    medoids, peaks, found = ops.cluster_k_medoids, ops.cluster_dpc_knn, []
    five, weights = draw.whole(2, 5, 64), draw.weights(2, 5)
    for k in (1, 2):
        found += [
            _case(f"dpc_knn 2 tokens k={k}", peaks, x=draw.whole(2, 2, 64), k=k, neighbors=1),
            _case(f"dpc_knn 300 tokens k={k}", peaks, x=draw.whole(1, 300, 64), k=k, neighbors=1),
            _case(f"k_medoids k={k}", medoids, x=five, weights=weights, k=k, iters=1),
        ]
    match = ops.match_tokens
    return [
        *found,
        _case("k_medoids one token", medoids, x=draw.whole(2, 1, 64), weights=weights[:, :1], k=1, iters=1),
        _case("dpc_knn one token", peaks, x=draw.whole(2, 1, 64), k=1),
        _case("match_tokens r=0", match, metric=draw.tokens(1, 1, 2, 64), r=0, prefix=1),
        _case("match_tokens r=1", match, metric=draw.tokens(1, 1, 3, 64), r=1, prefix=1),
        _case("match_tokens two heads", match, metric=draw.tokens(1, 2, 3, 64), r=1, prefix=1),
    ]


def _edge_attentions(draw: _Draw) -> list[Primitive]:
    one = {name: draw.tokens(1, 1, 1, 64) for name in "qkv"}
    pair = {name: one[name] for name in "qk"}
    two = draw.tokens(1, 1, 2, 64)
    cancelling: dict[str, Any] = {"terms": 4.0, **one}  # gradients of 0 and scores of 1 come of logits and values
    return [
        _case("cls_scores 1", ops.cls_scores, "q k", q=one["q"][:, :, 0], k=one["k"], prefix=0),
        _case(
            "cls_value_scores",
            ops.cls_value_scores,
            q=draw.tokens(1, 1, 64),
            k=two,
            prefix=1,
            value=draw.tokens(1, 1, 2, 64),
        ),
        _case("received_scores 1", ops.received_scores, "q k", **pair),
        _case("attention 1", ops.attention, "q k v", **one),
        _case("attention policy", ops.attention_policy, "q k v policy", policy=torch.ones(1, 1), **cancelling),
        _case("attention_cls_scores 1", ops.attention_cls_scores, "q k v", prefix=0, **cancelling),
        _case("attention_received_scores 1", ops.attention_received_scores, "q k v", **cancelling),
    ]


def _edge_soft(draw: _Draw) -> list[Primitive]:
    x, center, one = draw.tokens(1, 1, 64), draw.tokens(1, 64), draw.tokens(1, 1, 1)

    def merged(**arguments: Any) -> Any:
        return ops.sinkhorn_merge(**arguments)[0]

    return [
        _case("soft_merge 1", ops.soft_merge, "logits x", logits=one, x=draw.tokens(1, 1, 1)),
        _case("soft_merge head", ops.soft_merge, logits=one, x=one, head=draw.tokens(1, 1, 1)),
        _case("sinkhorn_merge 1", merged, "x centers", x=x, centers=center, iters=1),
        _case("sinkhorn_merge head", merged, x=x, centers=center, iters=1, head=draw.tokens(1, 1, 64)),
    ]


def _edge_packed(draw: _Draw, none: Tensor) -> list[Primitive]:
    offsets, one = torch.tensor([0, 1], dtype=torch.int32), draw.tokens(1, 1, 1)
    both, parts = (offsets, offsets), {name: draw.tokens(1, 1, 1, 64) for name in "qkv"}
    linear = {"x": one, "weight": draw.tokens(1, 1), "bias": draw.tokens(1), "offsets": offsets}
    return [
        _case("token_offsets 1", ops.token_offsets, valid=torch.ones(1, 1, dtype=torch.bool)),
        _case("gather_packed 1", ops.gather_packed, x=one, index=none, offsets=both, num_out=1, prefix=0),
        _case("unpack_tokens 1", ops.unpack_tokens, x=one, offsets=offsets, longest=1),
        _case("linear_packed 1", ops.linear_packed, "x weight bias", **linear),
        _case("attention packed 1", ops.attention_packed, offsets=both, longest=(1, 1), **parts),
        _case(
            "attention packed, indexed 1",
            ops.attention_packed,
            index=none,
            prefix=0,
            num_out=1,
            offsets=both,
            longest=(1, 1),
            **parts,
        ),
    ]


def edge_cases(dtype: torch.dtype) -> dict[str, Primitive]:
    """Return the cases whose integer arguments are 0 and 1, by name."""
    draw, none = _Draw(dtype), torch.zeros(1, 1, dtype=torch.int64)
    found = [*_edge_choices(draw), *_edge_rows(draw, none), *_edge_clusters(draw), *_edge_attentions(draw)]
    found += [*_edge_soft(draw), *_edge_packed(draw, none)]
    return {case.name: case for case in found}
