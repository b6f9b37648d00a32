"""Exchange within a warp: shuffles and reductions."""

from __future__ import annotations

import numpy as np

from .bits import UNSIGNED
from .machine import Batch, Mask, Step
from .operands import Decoder, Operands
from .ptx import Instruction

__all__ = ["DECODERS", "whole_groups"]


def whole_groups(batch: Batch, mask: Mask, size: int) -> None:
    """Note it where some threads of a group of ``size`` take part and others do not."""
    if mask is not None:
        groups = mask.reshape(-1, size)
        if (groups.any(1) & ~groups.all(1)).any():
            batch.launch.tell("only some threads of a warp come to an instruction of all")


def _shuffle(instruction: Instruction, operands: Operands) -> Step:
    mode = instruction.words[2]
    if "|" in instruction.operands[0]:
        raise NotImplementedError(instruction.text)
    value, other, clamps = (operands.read(text, 32) for text in instruction.operands[1:4])
    write = operands.write(instruction.operands[0])

    def step(batch: Batch, mask: Mask) -> None:
        lane = batch.lane
        own = np.broadcast_to(value(batch), (batch.threads,))
        by, clamp = np.asarray(other(batch)).astype(np.int64), np.asarray(clamps(batch)).astype(np.int64)
        segment, bound = (clamp >> 8) & 0x1F, clamp & 0x1F
        lowest = lane & segment
        last = lowest | (bound & ~segment)
        source = {"bfly": lane ^ by, "idx": lowest | (by & ~segment), "up": lane - by, "down": lane + by}[mode]
        within = source >= last if mode == "up" else source <= last
        source = batch.warp_start + np.where(within, source, lane)
        if mask is not None and not mask[source][mask].all():
            batch.launch.tell("a shuffle reads a thread that takes no part")
        write(batch, own[source], mask)

    return step


_REDUCTIONS = {"add": np.add, "max": np.maximum, "min": np.minimum}
_REDUCTIONS |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def _reduce(instruction: Instruction, operands: Operands) -> Step:
    function, signed = _REDUCTIONS[instruction.words[2]], instruction.type == "s32"
    value, write = operands.read(instruction.operands[1], 32), operands.write(instruction.operands[0])

    def step(batch: Batch, mask: Mask) -> None:
        whole_groups(batch, mask, 32)
        numbers = np.broadcast_to(value(batch), (batch.threads,)).reshape(-1, 32)
        numbers = numbers.view(np.int32) if signed else numbers
        total = function.reduce(numbers, axis=1, dtype=numbers.dtype)
        write(batch, np.repeat(total, 32).view(UNSIGNED[32]), mask)

    return step


DECODERS: dict[str, Decoder] = {"shfl": _shuffle, "redux": _reduce}
