"""The log of who touched which bytes since when: races between warps, programs, copies and products.

Two accesses of different warps of a program are ordered if a barrier stands between them. Nothing orders accesses of
different programs. A copy in flight (``cp.async``) owns the bytes that it fills, and a product in flight (``wgmma``)
the bytes that it reads, until the wait; nobody may touch these meanwhile. This does not depend on the order in which
the emulator happens to run.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["GlobalLog", "SharedLog"]

_NOBODY, _SEVERAL = -1, -2

Numbers = NDArray[np.int64]
Tell = Callable[[str], None]


class _Log:
    """Last writer and readers of every granule, by warp, each with the barrier epoch of its program.

    Args:
        size: bytes of the memory.
        granule: bytes that are told apart: the narrowest access of the kernel.
        tell: called with every finding.
    """

    def __init__(self, size: int, granule: int, tell: Tell):
        self.granule, self.tell = granule, tell
        count = size // granule + 1
        self.writer = np.full(count, _NOBODY, np.int32)
        self.written = np.zeros(count, np.int32)
        self.reader = np.full(count, _NOBODY, np.int32)
        self.read = np.zeros(count, np.int32)

    def granules(self, offsets: Numbers, size: int) -> Numbers:
        """Return (n, k) granules of n accesses of ``size`` bytes."""
        return (offsets // self.granule)[:, None] + np.arange(max(1, size // self.granule))

    def _note_read(self, cells: Numbers, warps: Numbers, epochs: Numbers) -> None:
        reader = self.reader[cells]
        shared = (reader != _NOBODY) & (reader != warps) & (self.read[cells] == epochs)
        self.reader[cells] = np.where(shared, _SEVERAL, warps)
        self.read[cells] = epochs
        clash = self.reader[cells] != warps  # several warps in one instruction
        self.reader[cells[clash]] = _SEVERAL

    def _check_write(self, cells: Numbers, warps: Numbers, epochs: Numbers) -> None:
        writer, reader = self.writer[cells], self.reader[cells]
        if ((writer != _NOBODY) & (writer != warps) & (self.written[cells] == epochs)).any():
            self.tell("two warps write without a barrier between them")
        if ((reader != _NOBODY) & (reader != warps) & (self.read[cells] == epochs)).any():
            self.tell("a warp overwrites what another reads, without a barrier between them")

    def _check_read(self, cells: Numbers, warps: Numbers, epochs: Numbers) -> None:
        writer = self.writer[cells]
        if ((writer != _NOBODY) & (writer != warps) & (self.written[cells] == epochs)).any():
            self.tell("a warp reads what another writes, without a barrier between them")


class SharedLog(_Log):
    """Shared memory of the programs that run together; epochs are the programs' own."""

    def __init__(self, size: int, granule: int, tell: Tell):
        super().__init__(size, granule, tell)
        self.filling = np.zeros(self.writer.size, np.int16)  # copies in flight into the granule
        self.feeding = np.zeros(self.writer.size, np.int16)  # products in flight that read the granule

    def load(self, cells: Numbers, warps: Numbers, epochs: Numbers) -> None:
        """Note reads of (n, k) granules by (n,) warps in (n,) epochs."""
        cells, warps, epochs = _flat(cells, warps, epochs)
        if self.filling[cells].any():
            self.tell("reads what an asynchronous copy still fills")
        self._check_read(cells, warps, epochs)
        self._note_read(cells, warps, epochs)

    def store(self, cells: Numbers, warps: Numbers, epochs: Numbers) -> None:
        """Note writes."""
        cells, warps, epochs = _flat(cells, warps, epochs)
        self._check_owned(cells)
        self._check_write(cells, warps, epochs)
        self._note_write(cells, warps, epochs)

    def _check_owned(self, cells: Numbers) -> None:
        if self.feeding[cells].any():
            self.tell("overwrites what an asynchronous product still reads")
        if self.filling[cells].any():
            self.tell("writes where an asynchronous copy still writes")

    def _note_write(self, cells: Numbers, warps: Numbers, epochs: Numbers) -> None:
        self.writer[cells] = warps
        self.written[cells] = epochs

    def begin_copy(self, cells: Numbers, warps: Numbers, epochs: Numbers) -> None:
        """Note that copies into the granules begin; ``end_copy`` takes the same granules."""
        cells, warps, epochs = _flat(cells, warps, epochs)
        self._check_owned(cells)
        self._check_write(cells, warps, epochs)
        self.filling[cells] += 1  # once, even if several threads fill it with the same

    def end_copy(self, cells: Numbers, warps: Numbers, epochs: Numbers) -> None:
        """Note that the warps that issued the copies waited for them: from here on they wrote."""
        cells, warps, epochs = _flat(cells, warps, epochs)
        self.filling[cells] = np.maximum(self.filling[cells] - 1, 0)
        self._note_write(cells, warps, epochs)

    def begin_product(self, cells: Numbers, turns: Numbers, epochs: Numbers) -> None:
        """Note that products that read (n, k) granules begin; every warp's earlier writes need a barrier.

        Args:
            cells: no granule twice in a row.
            turns: (n,) numbers of the warp groups within their programs: only different ones share a granule.
            epochs: (n,) of the programs.
        """
        self._feed(cells, turns, 1)
        cells, _, epochs = _flat(cells, epochs, epochs)
        if self.filling[cells].any():
            self.tell("multiplies what an asynchronous copy still fills")
        if ((self.writer[cells] != _NOBODY) & (self.written[cells] == epochs)).any():
            self.tell("multiplies what a warp writes, without a barrier between them")

    def _feed(self, cells: Numbers, turns: Numbers, by: int) -> None:
        for turn in range(int(turns.max(initial=-1)) + 1):
            self.feeding[cells[turns == turn]] += by

    def end_product(self, cells: Numbers, turns: Numbers, epochs: Numbers) -> None:
        """Note that the warp groups waited for their products: from here on they have read."""
        self._feed(cells, turns, -1)
        cells, _, epochs = _flat(cells, epochs, epochs)
        self.reader[cells] = _SEVERAL
        self.read[cells] = epochs


class GlobalLog(_Log):
    """Global memory of one launch; warps are numbered through all programs.

    Args:
        warps_per_program: how many warps a program has.
    """

    def __init__(self, size: int, granule: int, tell: Tell, warps_per_program: int):
        super().__init__(size, granule, tell)
        self._share = warps_per_program
        self._reading = np.full(self.writer.size, _NOBODY, np.int32)  # the program, or several

    def load(self, cells: Numbers, warps: Numbers, epochs: Numbers) -> None:
        """Note reads of (n, k) granules by (n,) warps in (n,) epochs of their programs."""
        cells, warps, epochs = _flat(cells, warps, epochs)
        same = self._same_program(cells, warps, "a program reads what another writes in the same launch")
        self._check_read(cells[same], warps[same], epochs[same])
        self._note_read(cells, warps, epochs)
        programs = warps // self._share
        before = self._reading[cells]
        self._reading[cells] = np.where((before != _NOBODY) & (before != programs), _SEVERAL, programs)
        clash = self._reading[cells] != programs
        self._reading[cells[clash]] = _SEVERAL

    def store(self, cells: Numbers, warps: Numbers, epochs: Numbers) -> None:
        """Note writes."""
        cells, warps, epochs = _flat(cells, warps, epochs)
        same = self._same_program(cells, warps, "two programs write to one address")
        reading = self._reading[cells]
        if ((reading != _NOBODY) & (reading != warps // self._share)).any():
            self.tell("a program overwrites what another reads in the same launch")
        self._check_write(cells[same], warps[same], epochs[same])
        self.writer[cells] = warps
        self.written[cells] = epochs
        if (self.writer[cells] // self._share != warps // self._share).any():
            self.tell("two programs write to one address")

    def _same_program(self, cells: Numbers, warps: Numbers, what: str) -> NDArray[np.bool_]:
        """Say which granules no other program wrote; tell of the others."""
        writer = self.writer[cells]
        other = (writer != _NOBODY) & (writer // self._share != warps // self._share)
        if other.any():
            self.tell(what)
        return ~other


def _flat(cells: Numbers, warps: Numbers, epochs: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    width = cells.shape[1]
    return cells.ravel(), np.repeat(warps, width), np.repeat(epochs, width)
