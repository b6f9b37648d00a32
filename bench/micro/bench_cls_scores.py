"""Class attention averaged over heads (Top-K, EViT), and weighted by the lengths of the values (ATS)."""

from __future__ import annotations

from typing import Any

import torch

from bench.primitive import Inputs, Outputs, Primitive, Shape, nbytes, packed_qkv
from fastreduce import ops


def _make(shape: Shape, generator: torch.Generator) -> Inputs:
    q, k, _ = packed_qkv(shape, generator)
    return {"q": q[:, :, 0], "k": k}


def _make_value(shape: Shape, generator: torch.Generator) -> Inputs:
    q, k, v = packed_qkv(shape, generator)
    return {"q": q[:, :, 0], "k": k, "value": v}


def _plain(inputs: Inputs) -> Outputs:
    """The class row of the softmax as the released codes take it, without the rows that nobody reads."""
    q, k = inputs["q"], inputs["k"]
    attention = ((q.unsqueeze(2) @ k.transpose(2, 3)) * k.shape[-1] ** -0.5).softmax(dim=-1)
    return (attention[:, :, 0, 1:].mean(dim=1),)


def _plain_value(inputs: Inputs) -> Outputs:
    q, k, value = inputs["q"], inputs["k"], inputs["value"]
    attention = ((q.unsqueeze(2) @ k.transpose(2, 3)) * k.shape[-1] ** -0.5).softmax(dim=-1)
    return ((attention[:, :, 0, 1:] * value.norm(dim=-1)[:, :, 1:]).sum(dim=1),)


def _floor(inputs: Inputs, outputs: Outputs) -> int:
    return nbytes(*inputs.values(), *outputs)


def _backward_floor(inputs: Inputs, outputs: Outputs, gradients: Outputs) -> int:
    """K once more, q, the upstream gradient, and both gradients."""
    return nbytes(*inputs.values(), *outputs, *gradients)


def _call(**arguments: Any) -> Outputs:
    return (ops.cls_scores(**arguments),)


CLS_SCORES = Primitive(
    "cls_scores",
    make=_make,
    call=_call,
    plain=_plain,
    floor=_floor,
    gradients=("q", "k"),
    backward_floor=_backward_floor,
)
CLS_VALUE_SCORES = Primitive("cls_scores_value", make=_make_value, call=_call, plain=_plain_value, floor=_floor)


def test_cls_scores(speed): ...


def test_cls_scores_value(speed): ...


test_cls_scores.primitive = CLS_SCORES
test_cls_scores_value.primitive = CLS_VALUE_SCORES
