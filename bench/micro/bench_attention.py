"""Attention under a policy that hides keys softly, as every block of DynamicViT computes it in training."""

from __future__ import annotations

import math
from typing import Any

import torch

from bench.primitive import Inputs, Outputs, Primitive, Shape, nbytes, packed_qkv
from fastreduce import ops


def _make(shape: Shape, generator: torch.Generator) -> Inputs:
    """Seven of ten keys are seen, the class token always."""
    q, k, v = packed_qkv(shape, generator)
    policy = torch.rand(shape.batch, shape.tokens, generator=generator, device=generator.device) < 0.7
    policy[:, 0] = True
    return {"q": q, "k": k, "v": v, "policy": policy.to(shape.dtype)}


def _plain(inputs: Inputs) -> Outputs:
    """The whole matrix, its softmax with the policy in float32 at least, as the released code has it."""
    q, k, v, policy = inputs.values()
    tokens, wide = k.shape[2], torch.promote_types(q.dtype, torch.float32)
    logits = (q @ k.transpose(2, 3)) * k.shape[-1] ** -0.5
    seen = policy[:, None, None, :].to(wide)
    seen = seen + (1 - seen) * torch.eye(tokens, dtype=wide, device=q.device)
    grown = (logits - logits.amax(dim=-1, keepdim=True)).to(wide).exp() * seen
    weights = (grown + 1e-6 / tokens) / (grown.sum(dim=-1, keepdim=True) + 1e-6)
    return (weights.to(v.dtype) @ v,)


def _floor(inputs: Inputs, outputs: Outputs) -> int:
    return nbytes(*inputs.values(), *outputs)


def _backward_floor(inputs: Inputs, outputs: Outputs, gradients: Outputs) -> int:
    """All inputs once more, the upstream gradient, and four gradients."""
    return nbytes(*inputs.values(), *outputs, *gradients)


def _tiled(inputs: Inputs) -> int:
    """Q and the result once; K, V and every head's copy of the policy once a tile of queries."""
    from fastreduce.kernels.attention import attention_tiles

    q, k, v, policy = inputs.values()
    sweeps = math.ceil(q.shape[2] / attention_tiles(q.shape[3], q.dtype, aligned=True).forward.own)
    return 2 * nbytes(q) + sweeps * (nbytes(k, v) + q.shape[1] * nbytes(policy))


def _backward_tiled(inputs: Inputs) -> int:
    """First K, V and the policy once a tile of queries, then Q and the upstream gradient once a tile of keys."""
    from fastreduce.kernels.attention import attention_tiles

    q, k, v, policy = inputs.values()
    tiles = attention_tiles(q.shape[3], q.dtype, aligned=True)
    over_keys = math.ceil(q.shape[2] / tiles.grad_queries.own)
    over_queries = math.ceil(k.shape[2] / tiles.grad_keys.own)
    policies = (over_keys + 1) * q.shape[1] * nbytes(policy) + nbytes(policy)
    return (1 + over_queries) * 2 * nbytes(q) + (1 + over_keys) * nbytes(k, v) + nbytes(q, k, v) + policies


def _call(**arguments: Any) -> Outputs:
    return (ops.attention(**arguments),)


ATTENTION = Primitive(
    "attention",
    make=_make,
    call=_call,
    plain=_plain,
    floor=_floor,
    gradients=("q", "k", "v", "policy"),
    backward_floor=_backward_floor,
    tiled=_tiled,
    backward_tiled=_backward_tiled,
)


def test_attention(speed): ...


test_attention.primitive = ATTENTION
