"""The machine: threads of many programs in lockstep, registers as arrays over threads, and the flow of control.

Threads that stand at the same instruction execute it together. Where they part, those furthest behind go first, so that
they meet again as early as they can. A barrier holds a program's threads until all that live have come to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .bits import UNSIGNED, Bits
from .faults import EmulationError, Finding
from .memory import GlobalMemory, SharedMemory
from .ptx import Guard, Instruction, Listing
from .races import GlobalLog, SharedLog

__all__ = ["Batch", "Launch", "Mask", "Pending", "Schedule", "Step"]

Mask = NDArray[np.bool_] | None  # which threads take part; None: all
_POISON = {1: False, 16: 0x7FC1, 32: 0x7FC00BAD, 64: 0x7FC00BAD7FC00BAD}  # NaN, and nobody's address
_MOST_THREADS = 8192  # that run together: their registers stay in a core's cache
_MOST_STEPS = 20_000_000


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Times of things that the architecture leaves open.

    Attributes:
        copies_early: whether ``cp.async`` reads and writes when it is issued; otherwise when it is waited for.
        products_early: the same of ``wgmma``.
        worst: whether approximations (``ex2.approx``, ``div.full``, …) err by as much as the hardware may.
        races: whether to keep the log of who touched what.
    """

    copies_early: bool = True
    products_early: bool = False
    worst: bool = True
    races: bool = True


Step = Callable[["Batch", Mask], None]


@dataclasses.dataclass
class Pending:
    """One asynchronous piece of work.

    Attributes:
        threads: those that issued it.
        finish: does what is left to be done, for the threads of a mask.
    """

    threads: NDArray[np.bool_]
    finish: Callable[[NDArray[np.bool_]], None]


class Groups:
    """Asynchronous work in the groups in which threads commit it."""

    def __init__(self, threads: int):
        self._threads = threads
        self._open: list[Pending] = []
        self._committed: list[tuple[NDArray[np.bool_], list[Pending]]] = []

    def add(self, work: Pending) -> None:
        """Put work into the open group."""
        self._open.append(work)

    def commit(self, mask: Mask) -> None:
        """Close the open group of the threads."""
        taking = np.ones(self._threads, bool) if mask is None else mask.copy()
        if mask is None or all((work.threads <= taking).all() for work in self._open):
            own, self._open = self._open, []
        else:
            own = [Pending(work.threads & taking, work.finish) for work in self._open]
            self._open = [Pending(work.threads & ~taking, work.finish) for work in self._open]
            self._open = [work for work in self._open if work.threads.any()]
        self._committed.append((taking, own))

    def wait(self, pending: int, mask: Mask) -> None:
        """Finish all but the threads' latest ``pending`` groups."""
        newer = np.zeros(self._threads, np.int64)
        waiting = np.ones(self._threads, bool) if mask is None else mask
        due = []
        for taking, group in reversed(self._committed):
            due.append((taking & waiting & (newer >= pending), group))
            newer += taking
        for ready, group in reversed(due):
            if ready.any():
                for work in group:
                    if (now := work.threads & ready).any():
                        work.threads = work.threads & ~ready
                        work.finish(now)
        groups = zip(self._committed, reversed(due), strict=True)
        left = [(taking & ~ready, group) for (taking, group), (ready, _) in groups]
        self._committed = [(taking, group) for taking, group in left if taking.any()]


@dataclasses.dataclass
class Launch:
    """One launch: what all its programs share.

    Attributes:
        listing: the kernel.
        steps: one for each instruction, None for those that change the flow of control.
        grid: programs along x, y and z.
        threads: of a program.
        shared_bytes: shared memory of a program.
        arguments: bits of the parameters by name.
        memory: the tensors.
        schedule: how to run.
        granules: narrowest access to global and to shared memory in bytes.
        findings: races found, by place, each once.
        visits: instructions that the first thread executed, in order, as half-open ranges; kept if not None.
    """

    listing: Listing
    steps: list[Step | None]
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: dict[str, int]
    memory: GlobalMemory
    schedule: Schedule
    granules: tuple[int, int] = (1, 1)
    findings: dict[tuple[str, int], Finding] = dataclasses.field(default_factory=dict)
    visits: list[tuple[int, int]] | None = None
    log: GlobalLog | None = None
    place: int = 0  # the instruction that is executed

    def tell(self, what: str) -> None:
        """Note a finding at the instruction that is executed."""
        instruction = self.listing.instructions[self.place]
        finding = Finding(self.listing.name, what, instruction.line, instruction.text)
        self.findings.setdefault((what, self.place), finding)

    def run(self) -> None:
        """Execute every program.

        Raises:
            EmulationError: an access that is out of bounds or misaligned, a deadlock, an endless loop.
        """
        if self.schedule.races:
            size = self.memory.bytes.size
            self.log = GlobalLog(size, self.granules[0], self.tell, max(1, self.threads // 32))
        programs = np.arange(self.grid[0] * self.grid[1] * self.grid[2])
        together = max(1, _MOST_THREADS // self.threads)
        for first in range(0, programs.size, together):
            batch = Batch(self, programs[first : first + together], self.visits if first == 0 else None)
            try:
                with np.errstate(all="ignore"):
                    batch.run()
            except EmulationError as error:
                instruction = self.listing.instructions[self.place]
                where = f"{self.listing.name} ({instruction.line}), {instruction.text}"
                raise EmulationError(f"{error} in {where}") from None


class Batch:
    """Programs that run in lockstep.

    Args:
        launch: what they share.
        programs: (P,) their numbers within the grid.
        visits: where to keep what the first thread executes, or None.
    """

    def __init__(self, launch: Launch, programs: NDArray[np.int64], visits: list[tuple[int, int]] | None = None):
        self.visits = visits
        self.launch, self.schedule, self.memory = launch, launch.schedule, launch.memory
        self.program_threads = launch.threads
        self.threads = programs.size * launch.threads
        self.lane = np.arange(self.threads) % 32
        self.warp_start = np.arange(self.threads) - self.lane
        self.program = np.repeat(np.arange(programs.size), launch.threads)  # within the batch
        self.warp = np.repeat(programs, launch.threads) * (launch.threads // 32)  # within the launch
        self.warp += np.tile(np.arange(launch.threads) // 32, programs.size)
        self.epoch = np.zeros(programs.size, np.int64)
        self.shared = SharedMemory(programs.size, launch.shared_bytes)
        self.shared_log = None
        if launch.schedule.races:
            self.shared_log = SharedLog(self.shared.bytes.size, launch.granules[1], launch.tell)
        self.copies, self.products = Groups(self.threads), Groups(self.threads)
        self.special = self._special(programs)
        poison = {
            bits: np.full(self.threads, value, bool if bits == 1 else UNSIGNED[bits]) for bits, value in _POISON.items()
        }
        self.registers: list[Bits] = [poison[bits] for bits in launch.listing.registers.values()]
        self._index = {name: place for place, name in enumerate(launch.listing.registers)}

    def _special(self, programs: NDArray[np.int64]) -> dict[str, Bits]:
        x, y, z = self.launch.grid
        thread = np.arange(self.threads) % self.program_threads
        found = {"%tid.x": thread, "%laneid": thread % 32, "%warpid": thread // 32}
        found |= {"%tid.y": 0 * thread, "%tid.z": 0 * thread}
        found |= {"%ntid.x": 0 * thread + self.program_threads, "%ntid.y": 0 * thread + 1, "%ntid.z": 0 * thread + 1}
        own = (programs % x, programs // x % y, programs // (x * y))
        for axis, place, size in zip("xyz", own, (x, y, z), strict=True):
            found[f"%ctaid.{axis}"] = np.repeat(place, self.program_threads)
            found[f"%nctaid.{axis}"] = np.full(self.threads, size)
        return {name: values.astype(np.uint32) for name, values in found.items()}

    def epochs(self, threads: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many barriers the programs of the threads have passed."""
        return self.epoch[self.program[threads]]

    def taken(self, mask: Mask) -> NDArray[np.int64]:
        """Return the numbers of the threads of a mask."""
        return np.arange(self.threads) if mask is None else np.nonzero(mask)[0]

    def full(self, mask: Mask) -> NDArray[np.bool_]:
        """Return the mask as an array."""
        return np.ones(self.threads, bool) if mask is None else mask

    def run(self) -> None:
        """Execute from the first instruction until every thread has returned."""
        self._place = np.zeros(self.threads, np.int64)
        self._live = np.ones(self.threads, bool)
        self._waiting = np.zeros(self.threads, bool)
        self._together: int | None = 0  # the instruction at which all threads stand, or None
        steps = 0
        while self._live.any():
            if self._together is not None:
                self._together = self._straight(self._together, None, None)
                self._control(self._together, None)
            else:
                self._part()
            steps += 1
            if steps > _MOST_STEPS:
                raise EmulationError("endless loop")

    def _part(self) -> None:
        """Let the threads that are furthest behind go on, up to the next place where others stand."""
        ready = self._live & ~self._waiting
        if not ready.any():
            if not self._release():
                raise EmulationError("deadlock: threads wait at a barrier for others that wait elsewhere")
            return
        places = self._place[ready]
        place = int(places.min())
        mask = ready & (self._place == place)
        if mask.all():
            self._together = place
            return
        others = places[places > place]
        stop = int(others.min()) if others.size else None
        end = self._straight(place, stop, mask)
        self._place[mask] = end
        if end != stop:
            self._control(end, mask)

    def _straight(self, place: int, stop: int | None, mask: Mask) -> int:
        """Execute until ``stop`` or an instruction that changes the flow of control; return where that is."""
        launch, steps, start = self.launch, self.launch.steps, place
        while place != stop:
            step = steps[place]
            if step is None:
                break
            launch.place = place
            step(self, mask)
            place += 1
        if self.visits is not None and (mask is None or mask[0]):
            self.visits.append((start, place + 1 if place != stop else place))
        return place

    def _control(self, place: int, mask: Mask) -> None:
        self.launch.place = place
        instruction = self.launch.listing.instructions[place]
        first = instruction.words[0]
        if first == "bra":
            self._branch(place, instruction, mask)
        elif first in ("ret", "exit"):
            self._return(place, instruction, mask)
        else:
            self._barrier(place, mask)

    def holds(self, guard: Guard) -> NDArray[np.bool_]:
        """Return the threads for which the predicate of an instruction holds."""
        value = self.registers[self._index[guard.register]]
        return ~value if guard.negated else value

    def _go(self, mask: Mask, place: int | NDArray[np.int64]) -> None:
        """Send the threads of a mask to a place, or each to its own."""
        if mask is None and isinstance(place, int):
            self._together = place
            return
        self._together = None
        self._place = np.where(self.full(mask), place, self._place)

    def _branch(self, place: int, instruction: Instruction, mask: Mask) -> None:
        target = self.launch.listing.labels[instruction.operands[0]]
        if instruction.guard is None:
            self._go(mask, target)
            return
        jumps = self.holds(instruction.guard)
        asked = jumps if mask is None else jumps[mask]
        if asked.all():
            self._go(mask, target)
        elif not asked.any():
            self._go(mask, place + 1)
        else:
            self._go(mask, np.where(jumps, target, place + 1))

    def _return(self, place: int, instruction: Instruction, mask: Mask) -> None:
        leaving = self.full(mask)
        if instruction.guard is not None:
            leaving = leaving & self.holds(instruction.guard)
        self._go(mask, np.full(self.threads, place + 1))
        self._live = self._live & ~leaving

    def _barrier(self, place: int, mask: Mask) -> None:
        if mask is None:
            self.epoch += 1
            self._go(None, place + 1)
            return
        self._go(mask, place + 1)
        self._waiting = self._waiting | mask
        self._release()

    def _release(self) -> bool:
        """Let the threads go on of programs whose living threads all wait; say whether there are any."""
        waiting = self._waiting.reshape(-1, self.program_threads)
        live = self._live.reshape(-1, self.program_threads)
        free = (waiting | ~live).all(1) & waiting.any(1)
        self.epoch[free] += 1
        self._waiting[np.repeat(free, self.program_threads)] = False
        return bool(free.any())
