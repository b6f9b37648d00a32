"""Every operator of ``fastreduce.ops`` with small arguments, for tests of what all of them promise."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch

from fastreduce import ops

from .inputs import seeded


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to call an operator.

    Attributes:
        operator: its name in ``fastreduce.ops``.
        arguments: shape of the problem (B, H, N, C) and dtype -> all tensors and numbers that it takes.
        differentiable: names of the arguments that may have a gradient.
        twice: whether the reference's gradient can be differentiated again (PyTorch's fused attention's cannot).
    """

    operator: str
    arguments: Callable[..., dict[str, Any]]
    differentiable: tuple[str, ...] = ()
    twice: bool = True

    def call(self, arguments: dict[str, Any], **options: Any) -> tuple[torch.Tensor, ...]:
        return flat(getattr(ops, self.operator)(**{**arguments, **options}))


def flat(result: Any) -> tuple[torch.Tensor, ...]:
    """Return all tensors of a result."""
    if isinstance(result, torch.Tensor):
        return (result,)
    return tuple(one for part in result or () for one in flat(part))


def _random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed + 7 * sum(shape)), dtype=torch.float64).to(dtype)


def _heads(b: int, h: int, n: int, c: int, dtype: torch.dtype) -> dict[str, Any]:
    return {name: _random(b, h, n, c, dtype=dtype, seed=seed) for seed, name in enumerate("qkv")}


def _index(b: int, n: int, k: int, seed: int = 0) -> torch.Tensor:
    rows = [torch.randperm(n, generator=seeded(seed + i))[:k] for i in range(b)]
    return torch.stack(rows) if b else torch.zeros(0, k, dtype=torch.int64)


def _norm(c: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"norm_weight": _random(c, dtype=dtype, seed=3), "norm_bias": _random(c, dtype=dtype, seed=4)}


def _gather(b=2, h=2, n=6, c=4, dtype=torch.float64):
    k = max(0, n - 1) // 2
    residual = _random(b, min(1, n) + k, c, dtype=dtype, seed=1)
    return {
        "x": _random(b, n, c, dtype=dtype),
        "index": _index(b, max(0, n - 1), k),
        "prefix": min(1, n),
        "residual": residual,
    }


def _rotate(b=2, h=2, n=6, c=4, dtype=torch.float64):
    prefix = min(1, n)
    angles = _random(7, c, dtype=dtype, seed=6)
    return {
        "x": _random(b, h, n, c, dtype=dtype),
        "table": (angles.cos(), angles.sin()),
        "place": _index(b, 7, 7).repeat(1, 1 + n // 7)[:, : n - prefix],
        "prefix": prefix,
    }


def _fuse(b=2, h=2, n=6, c=4, dtype=torch.float64):
    k = max(0, n - 1) // 2
    return {
        "x": _random(b, n, c, dtype=dtype),
        "order": _index(b, max(0, n - 1), max(0, n - 1)),
        "scores": _random(b, max(0, n - 1), dtype=dtype, seed=5).abs(),
        "k": k,
        "prefix": min(1, n),
        "residual": _random(b, min(1, n) + k + 1, c, dtype=dtype, seed=1),
        "residual_bias": _random(c, dtype=dtype, seed=2),
    }


def _slots(b, n, num_out):
    return torch.randint(num_out, (b, n), generator=seeded(n))


def _merge(b=2, h=2, n=6, c=4, dtype=torch.float64):
    return {
        "x": _random(b, n, c, dtype=dtype),
        "slot": _slots(b, n, 3),
        "num_out": 3,
        "size": _random(b, n, dtype=dtype, seed=6).abs() + 0.5,
        "residual": _random(b, 3, c, dtype=dtype, seed=1),
        "eps": 1e-3,
        "head": _random(b, 1, c, dtype=dtype, seed=2),
    }


def _merge_learned(b=2, h=2, n=6, c=4, dtype=torch.float64):
    rest = {name: value for name, value in _merge(b, h, n, c, dtype).items() if name != "size"}
    return {**rest, "log_weight": _random(1, c, dtype=dtype, seed=8), "log_bias": _random(1, dtype=dtype, seed=9)}


def _packed(b=2, h=2, n=6, c=4, dtype=torch.float64):
    x = _random(1, b * n, c, dtype=dtype)
    source = torch.arange(b + 1, dtype=torch.int32) * n
    k = max(0, n - 1) // 2
    target = torch.arange(b + 1, dtype=torch.int32) * (k + min(1, n))
    index = _index(b, max(0, n - 1), k).sort(1)[0]
    room = b * (k + min(1, n)) + 1
    return {
        "x": x,
        "index": index,
        "offsets": (source, target),
        "num_out": room,
        "prefix": min(1, n),
        "residual": _random(1, room, c, dtype=dtype, seed=1),
    }


def _cls(b=2, h=2, n=6, c=4, dtype=torch.float64):
    valid = torch.ones(b, n, dtype=torch.bool)
    valid[:, n // 2 + 1 : n - 1] = False
    heads = _heads(b, h, n, c, dtype)
    return {"q": _random(b, h, c, dtype=dtype), "k": heads["k"], "prefix": min(1, n), "scale": 0.4, "valid": valid}


def _cls_value(b=2, h=2, n=6, c=4, dtype=torch.float64):
    return {**_cls(b, h, n, c, dtype), "value": _heads(b, h, n, c, dtype)["v"]}


def _cls_value_packed(b=2, h=2, n=6, c=4, dtype=torch.float64):
    packed, rest = _attention_packed(b, h, n, c, dtype), _cls(b, h, n, c, dtype)
    return {
        "q": rest["q"],
        "k": packed["k"],
        "value": packed["v"],
        "offsets": packed["offsets"][0],
        "longest": n,
        "prefix": rest["prefix"],
        "scale": 0.4,
    }


def _attention(b=2, h=2, n=6, c=4, dtype=torch.float64):
    return {**_heads(b, h, n, c, dtype), "bias": _random(b, n, dtype=dtype, seed=5), "scale": 0.4}


def _attention_policy(b=2, h=2, n=6, c=4, dtype=torch.float64):
    return {**_heads(b, h, n, c, dtype), "policy": torch.full((b, n), 0.6, dtype=dtype), "eps": 1e-3, "scale": 0.4}


def _attention_index(b=2, h=2, n=6, c=4, dtype=torch.float64):
    return {**_attention(b, h, n, c, dtype), "index": _index(b, max(0, n - 1), max(0, n - 1) // 2), "prefix": min(1, n)}


def _attention_packed(b=2, h=2, n=6, c=4, dtype=torch.float64):
    offsets = torch.arange(b + 1, dtype=torch.int32) * n
    heads = {name: value.transpose(0, 1).reshape(1, h, b * n, c) for name, value in _heads(b, h, n, c, dtype).items()}
    return {**heads, "offsets": (offsets, offsets.clone()), "longest": (n, n), "scale": 0.4}


def _received(b=2, h=2, n=6, c=4, dtype=torch.float64):
    heads = _heads(b, h, n, c, dtype)
    return {"q": heads["q"], "k": heads["k"], "scale": 0.4}


def _attention_cls(b=2, h=2, n=6, c=4, dtype=torch.float64):
    return {**_attention(b, h, n, c, dtype), "prefix": 1}


def _soft(b=2, h=2, n=6, c=4, dtype=torch.float64):
    logits, head = _random(b, n, 3, dtype=dtype, seed=1), _random(b, 1, c, dtype=dtype, seed=2)
    return {"logits": logits, "x": _random(b, n, c, dtype=dtype), "head": head}


def _sinkhorn(b=2, h=2, n=6, c=4, dtype=torch.float64):
    centers = torch.nn.functional.normalize(_random(3, c, dtype=dtype, seed=1), dim=1)
    head = _random(b, 1, c, dtype=dtype, seed=2)
    return {"x": _random(b, n, c, dtype=dtype), "centers": centers, "eps": 0.7, "iters": 2, "head": head}


def _linear(b=2, h=2, n=6, c=4, dtype=torch.float64):
    offsets = torch.tensor([0, max(0, n - 2)], dtype=torch.int32)
    return {
        "x": _random(1, n, c, dtype=dtype),
        "weight": _random(3, c, dtype=dtype, seed=1),
        "bias": _random(3, dtype=dtype, seed=2),
        "offsets": offsets,
    }


def _unmerge(b=2, h=2, n=6, c=4, dtype=torch.float64):
    return {"x": _random(b, 3, c, dtype=dtype), "slot": _slots(b, n, 4) - 1}


def _unpack(b=2, h=2, n=6, c=4, dtype=torch.float64):
    offsets = torch.tensor([0, *([n - 1] if b > 1 else []), *([b * n - 1] * max(0, b - 1))], dtype=torch.int32)
    return {"x": _random(1, b * n, c, dtype=dtype), "offsets": offsets[: b + 1], "longest": (b - 1) * n if b > 1 else n}


def _dpc(b=2, h=2, n=6, c=4, dtype=torch.float64):
    return {
        "x": _random(b, n, c, dtype=dtype),
        "k": min(n, 2),
        "neighbors": 3,
        "noise": _random(b, n, dtype=dtype, seed=1) * 1e-3,
    }


def _medoids(b=2, h=2, n=6, c=4, dtype=torch.float64):
    weights = _random(b, n, dtype=dtype, seed=1).abs()
    return {"x": _random(b, n, c, dtype=dtype), "weights": weights, "k": min(n, 2), "iters": 2, "first": 0}


CASES = {
    "attention": Case("attention", _attention, ("q", "k", "v", "bias"), twice=False),
    "attention with a policy": Case("attention_policy", _attention_policy, ("q", "k", "v", "policy")),
    "attention of chosen queries": Case("attention", _attention_index, ("q", "k", "v", "bias"), twice=False),
    "attention of packed images": Case("attention_packed", _attention_packed, ("q", "k", "v"), twice=False),
    "attention_cls_scores": Case("attention_cls_scores", _attention_cls, ("q", "k", "v", "bias"), twice=False),
    "attention_received_scores": Case("attention_received_scores", _attention, ("q", "k", "v", "bias")),
    "cls_scores": Case("cls_scores", _cls, ("q", "k")),
    "cls_value_scores": Case("cls_value_scores", _cls_value),
    "cls_value_scores_packed": Case("cls_value_scores_packed", _cls_value_packed),
    "cluster_dpc_knn": Case("cluster_dpc_knn", _dpc),
    "cluster_dpc_knn_groups": Case("cluster_dpc_knn_groups", _dpc),
    "cluster_k_medoids": Case("cluster_k_medoids", _medoids),
    "cluster_k_medoids from the farthest, by members": Case(
        "cluster_k_medoids",
        lambda b=2, h=2, n=6, c=4, dtype=torch.float64: {
            **_medoids(b, h, n, c, dtype),
            "weights": None,
            "cost": "members",
        },
    ),
    "fuse_tokens": Case("fuse_tokens", _fuse, ("x", "scores", "residual", "residual_bias")),
    "fuse_tokens_norm": Case(
        "fuse_tokens",
        lambda b=2, h=2, n=6, c=4, dtype=torch.float64: {**_fuse(b, h, n, c, dtype), **_norm(c, dtype)},
        ("x", "scores", "residual", "residual_bias", "norm_weight", "norm_bias"),
    ),
    "gather_packed": Case("gather_packed", _packed, ("x", "residual")),
    "gather_tokens": Case("gather_tokens", _gather, ("x", "residual")),
    "gather_tokens_norm": Case(
        "gather_tokens",
        lambda b=2, h=2, n=6, c=4, dtype=torch.float64: {**_gather(b, h, n, c, dtype), **_norm(c, dtype)},
        ("x", "residual", "norm_weight", "norm_bias"),
    ),
    "group_slots": Case(
        "group_slots", lambda b=2, h=2, n=6, c=4, dtype=torch.float64: {"slot": _slots(b, n, 3), "num_out": 3}
    ),
    "linear_packed": Case("linear_packed", _linear, ("x", "weight", "bias")),
    "match_tokens": Case(
        "match_tokens",
        lambda b=2, h=2, n=6, c=4, dtype=torch.float64: {"metric": _random(b, n, c, dtype=dtype), "r": n // 4},
    ),
    "match_tokens_groups": Case(
        "match_tokens_groups",
        lambda b=2, h=2, n=6, c=4, dtype=torch.float64: {"metric": _random(b, h, n, c, dtype=dtype), "r": n // 4},
    ),
    "merge_tokens": Case("merge_tokens", _merge, ("x", "size", "residual", "head")),
    "merge_tokens without sizes": Case(
        "merge_tokens",
        lambda b=2, h=2, n=6, c=4, dtype=torch.float64: {**_merge(b, h, n, c, dtype), "size": None},
        ("x", "residual", "head"),
    ),
    "merge_tokens with sizes by a layer": Case(
        "merge_tokens", _merge_learned, ("x", "residual", "head", "log_weight", "log_bias")
    ),
    "merge_tokens_norm": Case(
        "merge_tokens",
        lambda b=2, h=2, n=6, c=4, dtype=torch.float64: {**_merge(b, h, n, c, dtype), **_norm(c, dtype)},
        ("x", "size", "residual", "head", "norm_weight", "norm_bias"),
    ),
    "prepare_merge": Case(
        "prepare_merge", lambda b=2, h=2, n=6, c=4, dtype=torch.float64: {"slot": _slots(b, n, 3), "num_out": 3}
    ),
    "received_scores": Case("received_scores", _received, ("q", "k")),
    "rotate_tokens": Case("rotate_tokens", _rotate, ("x",)),
    "sample_tokens": Case(
        "sample_tokens",
        lambda b=2, h=2, n=6, c=4, dtype=torch.float64: {"scores": _random(b, n, dtype=dtype).abs(), "budget": 3},
    ),
    "select_topk": Case(
        "select_topk",
        lambda b=2, h=2, n=6, c=4, dtype=torch.float64: {"scores": _random(b, n, dtype=dtype), "k": n // 2},
    ),
    "sinkhorn_merge": Case("sinkhorn_merge", _sinkhorn, ("x", "centers", "head")),
    "soft_merge": Case("soft_merge", _soft, ("logits", "x", "head")),
    "token_offsets": Case(
        "token_offsets", lambda b=2, h=2, n=6, c=4, dtype=torch.float64: {"valid": _random(b, n) > 0}
    ),
    "unmerge_tokens": Case("unmerge_tokens", _unmerge, ("x",)),
    "unpack_tokens": Case("unpack_tokens", _unpack, ("x",)),
}
assert {case.operator for case in CASES.values()} == set(ops.__all__)
DIFFERENTIABLE = [name for name, case in CASES.items() if case.differentiable]


def as_arguments(values: dict[str, Any]) -> dict[str, Any]:
    """Return what the operator takes: a layer's weight and bias as one."""
    values = dict(values)
    if "norm_weight" in values:
        values["norm"] = values.pop("norm_weight"), values.pop("norm_bias"), 1e-6
    if "log_weight" in values:
        values["log_size"] = values.pop("log_weight"), values.pop("log_bias")
    return values


def rows_of(case: Case, function: Callable[..., Any], values: dict[str, Any], **options: Any) -> list[torch.Tensor]:
    """Return the function's results that have a gradient, for values some of which require one."""
    return [one for one in flat(function(**as_arguments(values), **options)) if one.requires_grad]


def parameters(operator: str) -> dict[str, inspect.Parameter]:
    """Return the operator's arguments besides the backend."""
    found = dict(inspect.signature(getattr(ops, operator)).parameters)
    found.pop("backend")
    return found
