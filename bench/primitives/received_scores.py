"""The attention that every token receives (K-Medoids, models without a class token)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bench.primitives import Inputs, Other, Outputs, Primitive, Shape, nbytes, packed_qkv
from fastreduce import ops


def _make(shape: Shape, generator: torch.Generator) -> Inputs:
    q, k, _ = packed_qkv(shape, generator)
    return {"q": q, "k": k}


def _plain(inputs: Inputs) -> Outputs:
    """Sum the whole softmax over heads and queries."""
    q, k = inputs["q"], inputs["k"]
    attention = ((q @ k.transpose(2, 3)) * k.shape[-1] ** -0.5).softmax(dim=-1)
    return (attention.sum(dim=(1, 2)),)


def _flash_colreduce(inputs: Inputs) -> Outputs:
    """Call a kernel of others that gives what every key gets of each head: https://pypi.org/project/flash-colreduce."""
    from flash_colreduce import flash_colreduce

    return (flash_colreduce(inputs["q"], inputs["k"], reduction="sum").sum(1),)


def _floor(inputs: Inputs, outputs: Outputs) -> int:
    return nbytes(*inputs.values(), *outputs)


def _sweep(own: Tensor, other: Tensor, blocks: tuple[int, int], block_d: int, dots: int = 1) -> int:
    """Count rows in tiles of their own, each of which walks over all the others, for ``dots`` products with them.

    If one step of a product takes all channels, the own rows are read once; else at every step.
    """
    tiles, steps = math.ceil(own.shape[2] / blocks[0]), math.ceil(other.shape[2] / blocks[1])
    if own.shape[3] <= block_d:
        return nbytes(own) + dots * tiles * nbytes(other)
    return dots * steps * nbytes(own) + dots * tiles * nbytes(other)


def _tiled(inputs: Inputs) -> int:
    """Count K once a tile of queries, twice as often unless one tile holds all keys.

    Above MAX_PARTS blocks of queries a second sweep counts Q once a tile of keys.
    """
    from fastreduce.kernels.received_scores import MAX_PARTS, logit_tile

    q, k = inputs["q"], inputs["k"]
    batch, _, keys, head_dim = k.shape
    tile = logit_tile(head_dim, q.dtype, keys)
    block_m, block_n, block_d = (tile[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_D"))
    scores = batch * keys * torch.float32.itemsize
    if math.ceil(q.shape[2] / block_m) <= MAX_PARTS:
        return _sweep(q, k, (block_m, block_n), block_d, dots=1 if keys <= block_n else 2) + scores
    return _sweep(q, k, (block_m, block_n), block_d) + _sweep(k, q, (block_m, block_m), block_d) + scores


def _call(**arguments: Any) -> Outputs:
    return (ops.received_scores(**arguments),)


RECEIVED_SCORES = Primitive(
    "received_scores",
    make=_make,
    call=_call,
    plain=_plain,
    floor=_floor,
    tiled=_tiled,
    others={"flash-colreduce": Other(_flash_colreduce, on_cpu=False, backward=False, module="flash_colreduce")},
)
