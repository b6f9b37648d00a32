"""Tokens of all images in one row (ATS, packed): kept rows, back to padded rows, and where the images begin."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from bench.primitives import Inputs, Outputs, Primitive, Shape, nbytes, randn
from fastreduce import ops


def ragged_valid(shape: Shape, generator: torch.Generator) -> Tensor:
    """Return (B, 1 + kept) bool: of the kept tokens all are real, or seven, six or five eighths, image by image."""
    device = generator.device
    missing = (torch.arange(shape.batch, device=device) % 4).unsqueeze(1) * shape.kept // 8
    return torch.arange(1 + shape.kept, device=device) <= shape.kept - missing


def _make_offsets(shape: Shape, generator: torch.Generator) -> Inputs:
    return {"valid": ragged_valid(shape, generator)}


def _call_offsets(**arguments: Any) -> Outputs:
    return (ops.token_offsets(**arguments),)


def _plain_offsets(inputs: Inputs) -> Outputs:
    return (torch.nn.functional.pad(inputs["valid"].sum(1).cumsum(0), (1, 0)).int(),)


def _floor_offsets(inputs: Inputs, outputs: Outputs) -> int:
    return nbytes(inputs["valid"], *outputs)


def _make_gather(shape: Shape, generator: torch.Generator) -> Inputs:
    """Make whole images, each of which keeps its own number of tokens; there is room for the most."""
    batch, tokens, channels = shape.batch, shape.tokens, shape.channels
    device = generator.device
    valid = ragged_valid(shape, generator)
    chosen = torch.rand(batch, shape.patches, generator=generator, device=device).argsort(dim=1)[:, : shape.kept]
    ascending = chosen.masked_fill(~valid[:, 1:], shape.patches).sort(dim=1).values
    source = torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens
    num_out = batch * (1 + shape.kept)
    return {
        "x": randn(generator, shape.dtype, 1, batch * tokens, channels),
        "index": ascending.masked_fill(~valid[:, 1:], 0),
        "offsets": (source, ops.token_offsets(valid, backend="reference")),
        "num_out": num_out,
        "residual": randn(generator, shape.dtype, 1, num_out, channels),
    }


def _call_gather(**arguments: Any) -> Outputs:
    return (ops.gather_packed(**arguments),)


def _plain_gather(inputs: Inputs) -> Outputs:
    """Gather image by image, which waits for the device."""
    x, residual = inputs["x"], inputs["residual"]
    source, target = (bounds.tolist() for bounds in inputs["offsets"])
    pieces = []
    for image, index in enumerate(inputs["index"]):
        begin, end = target[image], target[image + 1]
        rows = torch.cat([index.new_zeros(1), 1 + index[: end - begin - 1]])
        pieces.append(x[:, source[image] + rows] + residual[:, begin:end])
    pieces.append(x.new_zeros(1, inputs["num_out"] - target[-1], x.shape[2]))
    return (torch.cat(pieces, dim=1),)


def _floor_gather(inputs: Inputs, outputs: Outputs) -> int:
    """Count the rows that stay of x and the residual, the real part of the index, and all rows of the result."""
    (out,), kept = outputs, int(inputs["offsets"][1][-1])
    rows = 2 * kept * out.shape[2] * out.element_size()
    indices = (kept - len(inputs["index"])) * inputs["index"].element_size()
    return rows + indices + nbytes(*inputs["offsets"], out)


def _backward_floor_gather(inputs: Inputs, outputs: Outputs, gradients: Outputs) -> int:
    """Count the rows that are there of the upstream gradient, which is the residual's too."""
    (out,), kept = outputs, int(inputs["offsets"][1][-1])
    indices = (kept - len(inputs["index"])) * inputs["index"].element_size()
    return kept * out.shape[2] * out.element_size() + indices + nbytes(*inputs["offsets"], gradients[0])


def _make_unpack(shape: Shape, generator: torch.Generator) -> Inputs:
    valid = ragged_valid(shape, generator)
    rows = shape.batch * (1 + shape.kept)
    return {
        "x": randn(generator, shape.dtype, 1, rows, shape.channels),
        "offsets": ops.token_offsets(valid, backend="reference"),
        "longest": 1 + shape.kept,
    }


def _call_unpack(**arguments: Any) -> Outputs:
    return (ops.unpack_tokens(**arguments),)


def _plain_unpack(inputs: Inputs) -> Outputs:
    offsets, longest = inputs["offsets"].tolist(), inputs["longest"]
    images = inputs["x"][0, : offsets[-1]].split([end - begin for begin, end in itertools.pairwise(offsets)])
    padded = torch.nn.utils.rnn.pad_sequence(images, batch_first=True)
    return (torch.nn.functional.pad(padded, (0, 0, 0, longest - padded.shape[1])),)


def _floor_unpack(inputs: Inputs, outputs: Outputs) -> int:
    real = int(inputs["offsets"][-1]) * inputs["x"].shape[2] * inputs["x"].element_size()
    return real + nbytes(inputs["offsets"], *outputs)


def _backward_floor_unpack(inputs: Inputs, outputs: Outputs, gradients: Outputs) -> int:
    return _floor_unpack(inputs, gradients)


TOKEN_OFFSETS = Primitive(
    "token_offsets", make=_make_offsets, call=_call_offsets, plain=_plain_offsets, floor=_floor_offsets
)
GATHER_PACKED = Primitive(
    "gather_packed",
    make=_make_gather,
    call=_call_gather,
    plain=_plain_gather,
    floor=_floor_gather,
    gradients=("x",),
    backward_floor=_backward_floor_gather,
)
UNPACK_TOKENS = Primitive(
    "unpack_tokens",
    make=_make_unpack,
    call=_call_unpack,
    plain=_plain_unpack,
    floor=_floor_unpack,
    gradients=("x",),
    backward_floor=_backward_floor_unpack,
)
