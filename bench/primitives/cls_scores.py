"""Class attention averaged over heads (Top-K, EViT), and weighted by the lengths of the values (ATS, also packed)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.primitives import Inputs, Outputs, Primitive, Shape, nbytes, packed_qkv, randn
from bench.primitives.gather_packed import ragged_valid
from fastreduce import ops


def _make(shape: Shape, generator: torch.Generator) -> Inputs:
    q, k, _ = packed_qkv(shape, generator)
    return {"q": q[:, :, 0], "k": k}


def _make_value(shape: Shape, generator: torch.Generator) -> Inputs:
    q, k, v = packed_qkv(shape, generator)
    return {"q": q[:, :, 0], "k": k, "value": v}


def _make_packed(shape: Shape, generator: torch.Generator) -> Inputs:
    """Make all images in one row, with room behind the last."""
    valid = ragged_valid(shape, generator)
    batch, longest = valid.shape
    packed = randn(generator, shape.dtype, 1, batch * longest, 3, shape.heads, 64)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    offsets = ops.token_offsets(valid, backend="reference")
    first = q[0].index_select(1, offsets[:-1]).transpose(0, 1)
    return {"q": first, "k": k, "value": v, "offsets": offsets, "longest": longest}


def _plain(inputs: Inputs) -> Outputs:
    """Take the class row of the softmax as the released codes do, without the rows that are never read."""
    q, k = inputs["q"], inputs["k"]
    attention = ((q.unsqueeze(2) @ k.transpose(2, 3)) * k.shape[-1] ** -0.5).softmax(dim=-1)
    return (attention[:, :, 0, 1:].mean(dim=1),)


def _plain_value(inputs: Inputs) -> Outputs:
    q, k, value = inputs["q"], inputs["k"], inputs["value"]
    attention = ((q.unsqueeze(2) @ k.transpose(2, 3)) * k.shape[-1] ** -0.5).softmax(dim=-1)
    return ((attention[:, :, 0, 1:] * value.norm(dim=-1)[:, :, 1:]).sum(dim=1),)


def _plain_packed(inputs: Inputs) -> Outputs:
    """Score image by image, which waits for the device."""
    k, value, offsets = inputs["k"], inputs["value"], inputs["offsets"].tolist()
    scores = k.new_zeros(len(offsets) - 1, inputs["longest"] - 1)
    for image, (begin, end) in enumerate(itertools.pairwise(offsets)):
        one = {"q": inputs["q"][image : image + 1], "k": k[:, :, begin:end], "value": value[:, :, begin:end]}
        scores[image, : end - begin - 1] = _plain_value(one)[0]
    return (scores,)


def _floor_packed(inputs: Inputs, outputs: Outputs) -> int:
    k, (scores,) = inputs["k"], outputs
    real = 2 * int(inputs["offsets"][-1]) * k.shape[1] * k.shape[3] * k.element_size()
    return real + nbytes(inputs["q"], inputs["offsets"], scores)


def _floor(inputs: Inputs, outputs: Outputs) -> int:
    return nbytes(*inputs.values(), *outputs)


def _backward_floor(inputs: Inputs, outputs: Outputs, gradients: Outputs) -> int:
    """Count K once more, q, the upstream gradient, and both gradients."""
    return nbytes(*inputs.values(), *outputs, *gradients)


def _call(operator: Callable[..., Tensor], **arguments: Any) -> Outputs:
    return (operator(**arguments),)


CLS_SCORES = Primitive(
    "cls_scores",
    make=_make,
    call=functools.partial(_call, ops.cls_scores),
    plain=_plain,
    floor=_floor,
    gradients=("q", "k"),
    backward_floor=_backward_floor,
)
CLS_VALUE_SCORES = Primitive(
    "cls_value_scores",
    make=_make_value,
    call=functools.partial(_call, ops.cls_value_scores),
    plain=_plain_value,
    floor=_floor,
)

CLS_VALUE_SCORES_PACKED = Primitive(
    "cls_value_scores_packed",
    make=_make_packed,
    call=functools.partial(_call, ops.cls_value_scores_packed),
    plain=_plain_packed,
    floor=_floor_packed,
)
