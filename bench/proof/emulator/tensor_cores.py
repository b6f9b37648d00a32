"""Products of matrices: ``mma.sync`` of a warp, and ``wgmma`` of four warps, which reads shared memory later."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .bits import TO_FLOAT, Bits, Floats, halves
from .exchange import whole_groups
from .faults import EmulationError
from .machine import Batch, Mask, Pending, Step
from .operands import Decoder, Operands, Reader, Writer, integer, vector
from .ptx import Instruction

__all__ = ["DECODERS"]

Index = NDArray[np.int64]
_WARP, _GROUP = 32, 128
_SWIZZLED_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a row, by the descriptor's two highest bits
_SWIZZLE = {1: 7, 2: 3, 3: 1}  # which of the address bits 7 to 9 are mixed into 4 to 6


def _accumulate(start: Floats, product: NDArray[np.float64], worst: bool) -> Floats:
    """Add the product to the accumulators: rounded to nearest, or at worst cut off as tensor cores do."""
    exact = start + product
    rounded = exact.astype(np.float32)
    if worst:
        too_far = np.abs(rounded) > np.abs(exact)
        rounded = (rounded.view(np.uint32) - too_far).astype(np.uint32).view(np.float32)
    return rounded


@dataclasses.dataclass(frozen=True)
class _Fragment:
    """A layout of a matrix's elements in the registers of a group of threads.

    Attributes:
        rows: (registers, parts) of (threads,) rows.
        columns: the same of columns.
        shape: of the matrix.
        packed: whether a register holds two halves.
    """

    rows: list[list[Index]]
    columns: list[list[Index]]
    shape: tuple[int, int]
    packed: bool

    def matrix(self, registers: list[Bits], kind: str) -> Floats:
        """Collect (groups, *shape) from (all threads,) registers."""
        threads = self.rows[0][0].size
        groups = registers[0].size // threads
        found = np.zeros((groups, *self.shape), np.float32)
        for register, rows, columns in zip(registers, self.rows, self.columns, strict=True):
            parts = halves(register) if self.packed else (register,)
            for part, row, column in zip(parts, rows, columns, strict=True):
                found[:, row, column] = TO_FLOAT[kind](part).reshape(groups, threads)
        return found


def _left(threads: int, bits: int) -> _Fragment:
    """Return A of one warp: 16 rows, 16 columns of halves or 8 of tf32."""
    thread = np.arange(threads)
    lane, top = thread % 32, thread // 32 * 16
    rows = [top + lane // 4 + 8 * (register % 2) for register in range(4)]
    if bits == 16:
        columns = [[lane % 4 * 2 + half + 8 * (register // 2) for half in range(2)] for register in range(4)]
        return _Fragment([[row, row] for row in rows], columns, (threads // 2, 16), True)
    columns = [[lane % 4 + 4 * (register // 2)] for register in range(4)]
    return _Fragment([[row] for row in rows], columns, (threads // 2, 8), False)


def _right(bits: int) -> _Fragment:
    """Return B of one warp: 8 columns, 16 rows of halves or 8 of tf32."""
    lane = np.arange(_WARP)
    if bits == 16:
        rows = [[lane % 4 * 2 + half + 8 * register for half in range(2)] for register in range(2)]
        return _Fragment(rows, [[lane // 4] * 2] * 2, (16, 8), True)
    return _Fragment([[lane % 4 + 4 * register] for register in range(2)], [[lane // 4]] * 2, (8, 8), False)


def _accumulator_place(threads: int, register: int) -> tuple[Index, Index]:
    """Return rows and columns of what the threads hold of C and D in their register."""
    thread = np.arange(threads)
    lane, top = thread % 32, thread // 32 * 16
    return top + lane // 4 + 8 * (register // 2 % 2), register // 4 * 8 + lane % 4 * 2 + register % 2


def _add_product(
    batch: Batch, product: NDArray[np.float64], starts: list[Floats], writers: list[Writer], group: int, mask: Mask
) -> None:
    """Write D = start + product, (groups, rows, columns), to the registers of groups of threads."""
    for register, (start, write) in enumerate(zip(starts, writers, strict=True)):
        row, column = _accumulator_place(group, register)
        result = _accumulate(start, product[:, row, column].reshape(-1), batch.schedule.worst)
        write(batch, result.view(np.uint32), mask)


def _product(instruction: Instruction, operands: Operands) -> Step:
    """Execute ``mma.sync.aligned.m16n8k….row.col.f32.kind.kind.f32 {D}, {A}, {B}, {C}``."""
    shape, kind = instruction.words[3], instruction.words[7]
    if shape not in ("m16n8k16", "m16n8k8") or (kind == "tf32") != (shape == "m16n8k8"):
        raise NotImplementedError(instruction.text)
    bits = 32 if kind == "tf32" else 16
    left, right = _left(_WARP, bits), _right(bits)
    target, a, b, c = (vector(text) for text in instruction.operands)
    a_readers, b_readers, c_readers = ([operands.read(name, 32) for name in names] for names in (a, b, c))
    writers = [operands.write(name) for name in target]

    def registers(batch: Batch, readers: list[Reader]) -> list[Bits]:
        return [np.ascontiguousarray(np.broadcast_to(read(batch), (batch.threads,))) for read in readers]

    def step(batch: Batch, mask: Mask) -> None:
        whole_groups(batch, mask, _WARP)
        a_matrix = left.matrix(registers(batch, a_readers), kind).astype(np.float64)
        b_matrix = right.matrix(registers(batch, b_readers), kind).astype(np.float64)
        starts = [register.view(np.float32) for register in registers(batch, c_readers)]
        _add_product(batch, np.matmul(a_matrix, b_matrix), starts, writers, _WARP, mask)

    return step


@dataclasses.dataclass(frozen=True)
class _InShared:
    """A matrix that a descriptor tells the place of.

    Attributes:
        rows: of M or N.
        depth: elements along K.
        kind: of an element.
        transposed: whether M or N is the contiguous side.
    """

    rows: int
    depth: int
    kind: str
    transposed: bool

    @property
    def bytes(self) -> int:
        """Return the size of an element."""
        return 4 if self.kind == "tf32" else 2

    def places(self, descriptors: NDArray[np.uint64]) -> Index:
        """Return (groups, rows, depth) shared addresses."""
        start, leading, stride = (_field(descriptors, bit)[:, None, None] for bit in (0, 16, 32))
        mode = int(descriptors[0] >> np.uint64(62))
        if (descriptors >> np.uint64(62) != np.uint64(mode)).any():
            raise NotImplementedError("descriptors of different swizzles in one instruction")
        width = _SWIZZLED_BYTES[mode]
        row, column = np.meshgrid(np.arange(self.rows), np.arange(self.depth), indexing="ij")
        slow, fast = (column, row) if self.transposed else (row, column)
        across = width // self.bytes
        places = start + slow // 8 * stride + slow % 8 * width + fast // across * leading + fast % across * self.bytes
        if mode:
            places = places ^ (((places >> 7) & _SWIZZLE[mode]) << 4)
        return places

    def offsets(self, batch: Batch, descriptors: NDArray[np.uint64]) -> Index:
        """Return (groups, rows × depth) offsets into the batch's shared memory."""
        places = self.places(descriptors).reshape(descriptors.size, -1)
        programs = batch.program[::_GROUP][: descriptors.size, None]
        return batch.shared.offsets(programs, places, self.bytes)

    def read(self, batch: Batch, offsets: Index) -> Floats:
        """Return (groups, rows, depth) numbers."""
        bits = batch.shared.typed[8 * self.bytes][offsets // self.bytes]
        return TO_FLOAT[self.kind](bits).reshape(-1, self.rows, self.depth)


def _field(descriptors: NDArray[np.uint64], bit: int) -> Index:
    return (((descriptors >> np.uint64(bit)) & np.uint64(0x3FFF)) << np.uint64(4)).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class _Multiply:
    """A decoded ``wgmma.mma_async``.

    Attributes:
        kind: of an element.
        left: A in shared memory, or None.
        fragment: A in registers, or None.
        right: B.
    """

    kind: str
    left: _InShared | None
    fragment: _Fragment | None
    right: _InShared
    a_readers: list[Reader]
    b_reader: Reader
    keeps: Reader
    d_readers: list[Reader]
    writers: list[Writer]

    def __call__(self, batch: Batch, mask: Mask) -> None:
        """Issue the product."""
        if batch.program_threads % _GROUP:
            raise EmulationError("a product of four warps in a program of fewer")
        whole_groups(batch, mask, _GROUP)
        sources = [self._offsets(batch, self.right, self.b_reader, mask)]
        if self.left is not None:
            sources.append(self._offsets(batch, self.left, self.a_readers[0], mask))
        held = [read(batch) for read in self.a_readers] if self.fragment is not None else []
        keeps = np.array(np.broadcast_to(self.keeps(batch), (batch.threads,)))
        taking, early = batch.full(mask), batch.schedule.products_early
        self._log(batch, sources, taking, begins=True)
        if early:
            self._multiply(batch, sources, held, keeps, taking)

        def finish(threads: NDArray[np.bool_]) -> None:
            if not early:
                self._multiply(batch, sources, held, keeps, threads)
            self._log(batch, sources, threads, begins=False)

        batch.products.add(Pending(taking, finish))

    def _offsets(self, batch: Batch, matrix: _InShared, reader: Reader, mask: Mask) -> Index:
        descriptors = np.broadcast_to(reader(batch), (batch.threads,))[::_GROUP]
        if mask is not None:
            on = mask[::_GROUP]
            descriptors = np.where(on, descriptors, descriptors[on][0])
        return matrix.offsets(batch, descriptors)

    def _log(self, batch: Batch, sources: list[Index], threads: NDArray[np.bool_], *, begins: bool) -> None:
        if (log := batch.shared_log) is None:
            return
        on = threads[::_GROUP]
        first = np.nonzero(threads)[0][::_GROUP]
        matrices = [self.right] if self.left is None else [self.right, self.left]
        for matrix, offsets in zip(matrices, sources, strict=True):
            cells = log.granules(offsets[on].ravel(), matrix.bytes).reshape(first.size, -1)
            note = log.begin_product if begins else log.end_product
            note(cells, first // _GROUP % (batch.program_threads // _GROUP), batch.epochs(first))

    def _multiply(
        self, batch: Batch, sources: list[Index], held: list[Bits], keeps: NDArray[np.bool_], threads: NDArray[np.bool_]
    ) -> None:
        right = self.right.read(batch, sources[0]).astype(np.float64)
        if self.left is not None:
            left = self.left.read(batch, sources[1])
        else:
            assert self.fragment is not None
            left = self.fragment.matrix(held, self.kind)
        product = np.matmul(left.astype(np.float64), right.transpose(0, 2, 1))
        starts = [np.where(keeps, read(batch).view(np.float32), np.float32(0)) for read in self.d_readers]
        _add_product(batch, product, starts, self.writers, _GROUP, None if threads.all() else threads)


def _asynchronous_product(instruction: Instruction, operands: Operands) -> Step:
    """Execute ``wgmma.mma_async.sync.aligned.m64n…k….f32.kind.kind {D}, A, B, keeps, 1, 1, transposed…``."""
    shape, kind = re.fullmatch(r"m64n(\d+)k(\d+)", instruction.words[4]), instruction.words[6]
    target, a, b, keeps, *rest = instruction.operands
    if shape is None or instruction.words[5] != "f32" or rest[:2] != ["1", "1"]:
        raise NotImplementedError(instruction.text)
    columns, depth = int(shape[1]), int(shape[2])
    transposed = [integer(text) != 0 for text in rest[2:]] or [False]
    in_registers = a.startswith("{")
    return _Multiply(
        kind,
        None if in_registers else _InShared(64, depth, kind, len(transposed) > 1 and transposed[0]),
        _left(_GROUP, 32 if kind == "tf32" else 16) if in_registers else None,
        _InShared(columns, depth, kind, transposed[-1]),
        [operands.read(name, 32 if in_registers else 64) for name in vector(a)],
        operands.read(b, 64),
        operands.predicate(keeps),
        [operands.read(name, 32) for name in vector(target)],
        [operands.write(name) for name in vector(target)],
    )


def _in_groups(instruction: Instruction, operands: Operands) -> Step:
    word = instruction.words[1]
    steps: dict[str, Callable[[], Step]] = {
        "fence": lambda: lambda batch, mask: None,
        "commit_group": lambda: lambda batch, mask: batch.products.commit(mask),
        "wait_group": lambda: _wait(integer(instruction.operands[0])),
        "mma_async": lambda: _asynchronous_product(instruction, operands),
    }
    return steps[word]()


def _wait(pending: int) -> Step:
    return lambda batch, mask: batch.products.wait(pending, mask)


DECODERS: dict[str, Decoder] = {"mma": _product, "wgmma": _in_groups}
