"""Loads, stores, asynchronous copies, and matrices of 8 × 8 halves to and from shared memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bits import SIGNED, UNSIGNED, Bits, type_bits
from .faults import EmulationError
from .machine import Batch, Mask, Pending, Step
from .memory import Addresses
from .operands import Decoder, Operands, integer, vector
from .ptx import Instruction

__all__ = ["DECODERS", "access_bytes", "load_shared", "store_shared"]

Values = list[Bits]


def _load_global(batch: Batch, addresses: Addresses, bits: int, count: int, mask: Mask) -> Values:
    """Return (threads,) arrays, one for each element; what threads outside of the mask get is poison."""
    size = bits // 8
    threads = batch.taken(mask)
    offsets = batch.memory.offsets(addresses if mask is None else addresses[threads], size * count)
    if (log := batch.launch.log) is not None:
        log.load(log.granules(offsets, size * count), batch.warp[threads], batch.epochs(threads))
    return _gather(batch.memory.typed[bits], offsets // size, count, batch.threads, threads, mask)


def _store_global(batch: Batch, addresses: Addresses, bits: int, values: Values, mask: Mask) -> None:
    size, threads = bits // 8, batch.taken(mask)
    offsets = batch.memory.offsets(addresses if mask is None else addresses[threads], size * len(values))
    if (log := batch.launch.log) is not None:
        log.store(log.granules(offsets, size * len(values)), batch.warp[threads], batch.epochs(threads))
    _scatter(batch, batch.memory.typed[bits], offsets // size, values, threads)


def _gather(memory: Bits, places: Addresses, count: int, size: int, threads: NDArray[np.int64], mask: Mask) -> Values:
    if mask is None:
        return [memory[places + place] for place in range(count)]
    found = []
    for place in range(count):
        value = np.full(size, -1, np.int64).astype(memory.dtype)
        value[threads] = memory[places + place]
        found.append(value)
    return found


def _scatter(batch: Batch, memory: Bits, places: Addresses, values: Values, threads: NDArray[np.int64]) -> None:
    """Store; two warps that store different values to one address in one instruction are a finding."""
    everyone = threads.size == batch.threads
    for place, value in enumerate(values):
        own = value if value.ndim == 0 or everyone else value[threads]
        memory[places + place] = own
        if batch.schedule.races and (lost := memory[places + place] != own).any():
            _check_warps(batch, places, np.broadcast_to(own, places.shape), lost, threads)


def _check_warps(
    batch: Batch, places: Addresses, values: NDArray[Any], lost: NDArray[np.bool_], threads: NDArray[np.int64]
) -> None:
    """Tell of it where warps store different values to one address.

    Warps that store the same values lane by lane are copies of one another: then it is a matter of lanes, which is not
    modelled. A sum of products may differ by a rounding between the lanes of a warp, as each fuses its own product.
    """
    contested = np.isin(places, places[lost])
    stored: dict[int, dict[int, list[Any]]] = {}
    warps = batch.warp[threads[contested]].tolist()
    for place, warp, value in zip(places[contested].tolist(), warps, values[contested].tolist(), strict=True):
        stored.setdefault(place, {}).setdefault(warp, []).append(value)
    for of_warps in stored.values():
        first, *others = of_warps.values()
        if any(other != first for other in others):
            batch.launch.tell("two warps store different values to one address at once")
            return


def load_shared(batch: Batch, addresses: Addresses, bits: int, count: int, mask: Mask) -> Values:
    """Load ``count`` elements of ``bits`` a thread from shared memory."""
    size, threads = bits // 8, batch.taken(mask)
    addresses = addresses if mask is None else addresses[threads]
    offsets = batch.shared.offsets(batch.program[threads], addresses, size * count)
    if (log := batch.shared_log) is not None:
        log.load(log.granules(offsets, size * count), batch.warp[threads], batch.epochs(threads))
    return _gather(batch.shared.typed[bits], offsets // size, count, batch.threads, threads, mask)


def store_shared(batch: Batch, addresses: Addresses, bits: int, values: Values, mask: Mask) -> None:
    """Store elements of ``bits`` to shared memory."""
    size, threads = bits // 8, batch.taken(mask)
    addresses = addresses if mask is None else addresses[threads]
    offsets = batch.shared.offsets(batch.program[threads], addresses, size * len(values))
    if (log := batch.shared_log) is not None:
        log.store(log.granules(offsets, size * len(values)), batch.warp[threads], batch.epochs(threads))
    _scatter(batch, batch.shared.typed[bits], offsets // size, values, threads)


def access_bytes(instruction: Instruction) -> int:
    """Return how many bytes of memory the smallest piece of a load, store or copy has that may stand alone."""
    if instruction.words[0] in ("ldmatrix", "stmatrix"):
        return 2
    return 4 if instruction.words[0] == "cp" else type_bits(instruction.type) // 8


def _load(instruction: Instruction, operands: Operands) -> Step:
    if instruction.words[1] == "param":
        return _parameter(instruction, operands)
    bits, count = type_bits(instruction.type), instruction.vector
    names = vector(instruction.operands[0])
    writers = [operands.write(name) for name in names]
    address = operands.address(instruction.operands[1])
    load = {"shared": load_shared, "global": _load_global}[instruction.words[1].split("::")[0]]
    signed = instruction.type[0] == "s"
    widths = [operands.widths.get(name, bits) for name in names]

    def step(batch: Batch, mask: Mask) -> None:
        values = load(batch, address(batch), bits, count, mask)
        for write, value, width in zip(writers, values, widths, strict=True):
            if signed and width > bits:
                value = value.view(SIGNED[bits]).astype(SIGNED[width]).view(UNSIGNED[width])
            write(batch, value, mask)

    return step


def _parameter(instruction: Instruction, operands: Operands) -> Step:
    write, bits = operands.write(instruction.operands[0]), type_bits(instruction.type)
    width, name = operands.widths[instruction.operands[0]], instruction.operands[1].strip("[] ")
    signed = instruction.type[0] == "s"

    def step(batch: Batch, mask: Mask) -> None:
        value = batch.launch.arguments[name] & ((1 << bits) - 1)
        if signed and value >> (bits - 1):
            value -= 1 << bits
        write(batch, np.asarray(value & ((1 << width) - 1), UNSIGNED[width]), mask)

    return step


def _store(instruction: Instruction, operands: Operands) -> Step:
    bits = type_bits(instruction.type)
    address = operands.address(instruction.operands[0])
    readers = [operands.read(name, bits) for name in vector(instruction.operands[1])]
    store = {"shared": store_shared, "global": _store_global}[instruction.words[1].split("::")[0]]

    def step(batch: Batch, mask: Mask) -> None:
        store(batch, address(batch), bits, [np.asarray(read(batch)) for read in readers], mask)

    return step


@dataclasses.dataclass
class _Copy:
    """One ``cp.async`` of the threads: from global to shared memory, zeros for threads that copy nothing.

    Attributes:
        target: (threads,) shared addresses.
        source: (threads,) global addresses.
        size: bytes that a thread fills.
        reading: (threads,) threads that read their source.
    """

    batch: Batch
    target: Addresses
    source: Addresses
    size: int
    reading: NDArray[np.bool_]

    def cells(self, threads: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the granules of the race log that the threads fill."""
        assert self.batch.shared_log is not None
        offsets = self.batch.shared.offsets(self.batch.program[threads], self.target[threads], self.size)
        return self.batch.shared_log.granules(offsets, self.size)

    def begin(self, mask: Mask) -> None:
        """Note that the copy begins; check both addresses."""
        batch, threads = self.batch, self.batch.taken(mask)
        batch.shared.offsets(batch.program[threads], self.target[threads], self.size)
        if (log := batch.shared_log) is not None:
            log.begin_copy(self.cells(threads), batch.warp[threads], batch.epochs(threads))

    def move(self, mask: NDArray[np.bool_]) -> None:
        """Move the bytes."""
        batch, count, reading = self.batch, self.size // 4, mask & self.reading
        values = [np.zeros(batch.threads, np.uint32) for _ in range(count)]
        if reading.any():
            loaded = _load_global(batch, self.source, 32, count, reading)
            values = [np.where(reading, value, np.uint32(0)) for value in loaded]
        threads = np.nonzero(mask)[0]
        offsets = batch.shared.offsets(batch.program[threads], self.target[threads], self.size)
        _scatter(batch, batch.shared.typed[32], offsets // 4, values, threads)

    def end(self, mask: NDArray[np.bool_]) -> None:
        """Note that its threads waited for it."""
        batch, threads = self.batch, np.nonzero(mask)[0]
        if (log := batch.shared_log) is not None:
            log.end_copy(self.cells(threads), batch.warp[threads], batch.epochs(threads))


def _copy(instruction: Instruction, operands: Operands) -> Step:
    what = instruction.words[2]
    if what == "commit_group":
        return lambda batch, mask: batch.copies.commit(mask)
    if what == "wait_group":
        pending = integer(instruction.operands[0])
        return lambda batch, mask: batch.copies.wait(pending, mask)
    if what not in ("ca", "cg"):
        raise NotImplementedError(instruction.text)
    target, source = (operands.address(text) for text in instruction.operands[:2])
    size = integer(instruction.operands[2])
    length = operands.read(instruction.operands[3], 32) if len(instruction.operands) > 3 else None

    def step(batch: Batch, mask: Mask) -> None:
        given = np.full(batch.threads, size) if length is None else np.broadcast_to(length(batch), (batch.threads,))
        if not ((given == 0) | (given == size))[batch.full(mask)].all():
            raise EmulationError("an asynchronous copy of part of its bytes")
        copy = _Copy(batch, target(batch), source(batch), size, given > 0)
        copy.begin(mask)
        taking = batch.full(mask)
        early = batch.schedule.copies_early
        if early:
            copy.move(taking)

        def finish(threads: NDArray[np.bool_]) -> None:
            if not early:
                copy.move(threads)
            copy.end(threads)

        batch.copies.add(Pending(taking, finish))

    return step


def _matrix(instruction: Instruction, operands: Operands) -> Step:
    """Execute ``ldmatrix`` or ``stmatrix``: the threads 8 j … 8 j + 7 give the addresses of the rows of matrix j."""
    loading = instruction.words[0] == "ldmatrix"
    names, place = instruction.operands if loading else instruction.operands[::-1]
    registers, address = vector(names), operands.address(place)
    readers = [operands.read(name, 32) for name in registers]
    writers = [operands.write(name) for name in registers]
    one = _transposed if "trans" in instruction.words else _straight

    def step(batch: Batch, mask: Mask) -> None:
        rows = address(batch)
        for matrix, (read, write) in enumerate(zip(readers, writers, strict=True)):
            if (rows[(batch.lane // 8 == matrix) & batch.full(mask)] % 16).any():
                raise EmulationError("misaligned: a row of a matrix at no multiple of 16 bytes")
            found = one(batch, rows, matrix, None if loading else np.asarray(read(batch)), mask)
            if found is not None:
                write(batch, found, mask)

    return step


def _straight(batch: Batch, rows: Addresses, matrix: int, value: Bits | None, mask: Mask) -> Bits | None:
    """Move two neighbours of a row for each thread."""
    lane = batch.lane
    addresses = rows[batch.warp_start + 8 * matrix + lane // 4] + (lane % 4) * 4
    if value is None:
        return load_shared(batch, addresses, 32, 1, mask)[0]
    store_shared(batch, addresses, 32, [value], mask)
    return None


def _transposed(batch: Batch, rows: Addresses, matrix: int, value: Bits | None, mask: Mask) -> Bits | None:
    """Move two neighbours of a column for each thread."""
    lane, found = batch.lane, np.zeros(batch.threads, np.uint32)
    for half in range(2):
        addresses = rows[batch.warp_start + 8 * matrix + (lane % 4) * 2 + half] + (lane // 4) * 2
        shift = np.uint32(16 * half)
        if value is None:
            found |= load_shared(batch, addresses, 16, 1, mask)[0].astype(np.uint32) << shift
        else:
            store_shared(batch, addresses, 16, [(value >> shift).astype(np.uint16)], mask)
    return found if value is None else None


DECODERS: dict[str, Decoder] = {"ld": _load, "st": _store, "cp": _copy, "ldmatrix": _matrix, "stmatrix": _matrix}
