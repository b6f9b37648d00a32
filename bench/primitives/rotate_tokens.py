"""Rotary positions of the tokens that a stage has left, read from the table at the places of their patches."""

from __future__ import annotations

import math
from typing import Any

import torch

from bench.primitives import Inputs, Outputs, Primitive, Shape, nbytes, packed_qkv, randn
from fastreduce import ops


def _make(shape: Shape, generator: torch.Generator) -> Inputs:
    """Make queries as a view of the packed projection; half as many places as the table has rows, in no order."""
    q, _, _ = packed_qkv(shape, generator)
    patches = 2 * shape.patches
    angles = randn(generator, torch.float32, patches, 64)
    places = torch.rand(shape.batch, patches, generator=generator, device=generator.device).argsort(dim=1)
    return {
        "x": q,
        "cos": angles.cos().to(shape.dtype),
        "sin": angles.sin().to(shape.dtype),
        "place": places[:, : shape.patches].int(),
    }


def _call(x: Any, cos: Any, sin: Any, place: Any, **options: Any) -> Outputs:
    return (ops.rotate_tokens(x, (cos, sin), place, prefix=1, **options),)


def _plain(inputs: Inputs) -> Outputs:
    """Gather rows once for all heads, then rotate as timm writes it."""
    x, place = inputs["x"], inputs["place"].long()
    cos, sin = inputs["cos"][place].unsqueeze(1), inputs["sin"][place].unsqueeze(1)
    head, patches = x[:, :, :1], x[:, :, 1:]
    turned = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).reshape(patches.shape)
    return (torch.cat([head, patches * cos + turned * sin], dim=2),)


def _floor(inputs: Inputs, outputs: Outputs) -> int:
    """Count one row of each table for every token of an image."""
    place, cos = inputs["place"], inputs["cos"]
    rows = 2 * place.numel() * cos.shape[-1] * cos.element_size()
    return rows + nbytes(inputs["x"], place, *outputs)


def _tiled(inputs: Inputs) -> int:
    """Count rows of the table and places once for the heads that a program takes, which are few where images are."""
    from fastreduce.kernels.rotate_tokens import head_tile

    x, place, cos = inputs["x"], inputs["place"], inputs["cos"]
    batch, heads, tokens, channels = x.shape
    groups = math.ceil(heads / head_tile(batch, tokens, heads, channels, True)["HEADS"])
    rows = 2 * place.numel() * cos.shape[-1] * cos.element_size()
    return groups * (rows + nbytes(place)) + 2 * nbytes(x)


def _backward_floor(inputs: Inputs, outputs: Outputs, gradients: Outputs) -> int:
    return _floor(inputs, outputs)


ROTATE_TOKENS = Primitive(
    "rotate_tokens",
    make=_make,
    call=_call,
    plain=_plain,
    floor=_floor,
    tiled=_tiled,
    backward_tiled=_tiled,
    gradients=("x",),
    backward_floor=_backward_floor,
)
