"""Operands, decoded once: how to read one, write one, and what to do with a predicate."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .bits import UNSIGNED, Bits
from .machine import Batch, Mask, Step
from .ptx import Guard, Instruction, Listing

__all__ = ["Decoder", "Operands", "Reader", "Writer"]

Reader = Callable[[Batch], Bits]
Writer = Callable[[Batch, Bits, Mask], None]
Decoder = Callable[[Instruction, "Operands"], Step]

_ADDRESS = re.compile(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\d+))?\s*\]")


class Operands:
    """The registers of a listing, by name.

    Args:
        listing: the kernel.
    """

    def __init__(self, listing: Listing):
        self.widths = listing.registers
        self._index = {name: place for place, name in enumerate(listing.registers)}

    def read(self, text: str, bits: int) -> Reader:
        """Return a reader of an operand as unsigned ``bits``; predicates come as booleans."""
        if bits == 1:
            return self.predicate(text)
        if text in self._index:
            place, width = self._index[text], self.widths[text]
            if width == bits:
                return lambda batch: batch.registers[place]
            return lambda batch: batch.registers[place].astype(UNSIGNED[bits])
        if text.startswith("%"):
            return lambda batch: batch.special[text].astype(UNSIGNED[bits])
        value = _constant(text, bits)
        return lambda batch: value

    def predicate(self, text: str) -> Reader:
        """Return a reader of a predicate, perhaps negated or constant."""
        if text.startswith("!"):
            place = self._index[text[1:]]
            return lambda batch: ~batch.registers[place]
        if text.startswith("%"):
            place = self._index[text]
            return lambda batch: batch.registers[place]
        value = np.bool_(int(text) != 0)
        return lambda batch: value

    def address(self, text: str) -> Callable[[Batch], NDArray[np.int64]]:
        """Return a reader of an address like ``[%rd3 + 16]``."""
        found = _ADDRESS.fullmatch(text)
        if found is None:
            raise NotImplementedError(f"address {text}")
        offset = int(found[2] or 0)
        if found[1] == "global_smem":
            return lambda batch: np.full(batch.threads, offset, np.int64)
        place = self._index[found[1]]
        if not offset:
            return lambda batch: batch.registers[place].astype(np.int64)
        return lambda batch: batch.registers[place].astype(np.int64) + offset

    def write(self, text: str) -> Writer:
        """Return a writer of a register: (batch, value, mask) -> None."""
        if text == "_":
            return lambda batch, value, mask: None
        place, bits = self._index[text], self.widths[text]
        dtype = bool if bits == 1 else UNSIGNED[bits]

        def write(batch: Batch, value: Bits, mask: Mask) -> None:
            if value.dtype != dtype:
                value = value.astype(dtype)
            if mask is not None:
                value = np.where(mask, value, batch.registers[place])
            elif value.ndim == 0:
                value = np.full(batch.threads, value, dtype)
            batch.registers[place] = value

        return write

    def guarded(self, step: Step, guard: Guard | None) -> Step:
        """Return the step for the threads only whose predicate holds."""
        if guard is None:
            return step
        holds = self.predicate(f"{'!' * guard.negated}{guard.register}")

        def guarded(batch: Batch, mask: Mask) -> None:
            taking = holds(batch)
            if mask is not None:
                taking = taking & mask
            if taking.all():
                step(batch, None)
            elif taking.any():
                step(batch, taking)

        return guarded


def vector(text: str) -> tuple[str, ...]:
    """Return the registers of ``{%r1, %r2}``, or of a lone one."""
    return tuple(part.strip() for part in text[1:-1].split(",")) if text.startswith("{") else (text,)


def integer(text: str) -> int:
    """Return the value of an integer constant."""
    return int(text.rstrip("U"), 0)


def _constant(text: str, bits: int) -> Bits:
    if text == "global_smem":
        value = 0
    elif text.startswith(("0f", "0d")):
        value = int(text[2:], 16)
    else:
        value = integer(text)
    return np.asarray(value & ((1 << bits) - 1), UNSIGNED[bits])
