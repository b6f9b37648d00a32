"""A compiled kernel, decoded once and ready to be launched."""

from __future__ import annotations

import numpy as np

from . import arithmetic, exchange, tensor_cores, transfers
from .faults import Finding
from .machine import Batch, Launch, Mask, Schedule, Step
from .memory import GlobalMemory
from .operands import Decoder, Operands
from .ptx import Instruction, parse
from .transfers import access_bytes

__all__ = ["Kernel", "float_bits"]

_CONTROL = frozenset(("bra", "ret", "exit"))


def _nothing(batch: Batch, mask: Mask) -> None:
    """Do nothing: everything that this instruction orders happens in order here."""


_DECODERS: dict[str, Decoder] = {
    **arithmetic.DECODERS,
    **transfers.DECODERS,
    **exchange.DECODERS,
    **tensor_cores.DECODERS,
    **{name: lambda instruction, operands: _nothing for name in ("fence", "membar", "griddepcontrol")},
}


def _is_control(instruction: Instruction) -> bool:
    """Say whether an instruction changes the flow of control, or waits for other warps."""
    return instruction.words[0] in _CONTROL or _is_barrier(instruction)


def _is_barrier(instruction: Instruction) -> bool:
    return instruction.words[0] in ("bar", "barrier") and instruction.words[1] != "warp"


class Kernel:
    """A kernel that Triton compiled.

    Args:
        ptx: its text.
        threads: of a program.
        shared_bytes: shared memory of a program.

    Raises:
        NotImplementedError: an instruction that the emulator does not know.
    """

    def __init__(self, ptx: str, threads: int, shared_bytes: int):
        self.listing, self.threads, self.shared_bytes = parse(ptx), threads, shared_bytes
        operands = Operands(self.listing)
        self._steps = [self._decode(instruction, operands) for instruction in self.listing.instructions]
        self._granules = (self._narrowest("global"), self._narrowest("shared"))

    def _decode(self, instruction: Instruction, operands: Operands) -> Step | None:
        if _is_control(instruction):
            self._check_barrier(instruction)
            return None
        first = instruction.words[0]
        if first in ("bar", "barrier"):
            return _nothing  # of a warp, whose threads go together
        if first not in _DECODERS:
            raise NotImplementedError(f"{self.listing.name}: {instruction.text}")
        return operands.guarded(_DECODERS[first](instruction, operands), instruction.guard)

    def _check_barrier(self, instruction: Instruction) -> None:
        """Raise unless all threads of a program meet at the barrier: no other kind is known."""
        if _is_barrier(instruction):
            everyone = instruction.words[1] in ("sync", "cta") and instruction.operands in (("0",), ())
            if not everyone or instruction.guard is not None:
                raise NotImplementedError(f"{self.listing.name}: {instruction.text}")

    def _narrowest(self, space: str) -> int:
        """Return the bytes of the narrowest access to a memory."""
        names = ("ldmatrix", "stmatrix", "cp") if space == "shared" else ("cp",)
        widths = []
        for instruction in self.listing.instructions:
            words = instruction.words
            plain = words[0] in ("ld", "st") and words[1].split("::")[0] == space
            if plain or (words[0] in names and "commit_group" not in words and "wait_group" not in words):
                widths.append(access_bytes(instruction))
            elif words[0] == "wgmma" and words[1] == "mma_async" and space == "shared":
                widths.append(2)
        return min(widths, default=4)

    def launch(
        self,
        grid: tuple[int, int, int],
        arguments: list[int],
        memory: GlobalMemory,
        schedule: Schedule,
        visits: list[tuple[int, int]] | None = None,
    ) -> list[Finding]:
        """Run every program of the grid; return the races that were found.

        Args:
            grid: programs along x, y and z.
            arguments: bits of the parameters, in order; further parameters (scratch memory) are null.
            memory: the tensors.
            schedule: how to run.
            visits: filled with what the first thread executes, if given.

        Raises:
            EmulationError: an address out of bounds or misaligned, a deadlock, an endless loop.
            ValueError: more arguments than parameters.
        """
        names = self.listing.parameters
        if not len(arguments) <= len(names) <= len(arguments) + 2:
            raise ValueError(f"{self.listing.name} takes {len(names)} parameters, got {len(arguments)} arguments")
        values = dict(zip(names, [*arguments, 0, 0], strict=False))
        launch = Launch(
            self.listing, self._steps, grid, self.threads, self.shared_bytes, values, memory, schedule, self._granules
        )
        launch.visits = visits
        launch.run()
        return list(launch.findings.values())


def float_bits(value: float) -> int:
    """Return the bits of a number in float32, as a parameter takes them."""
    return int(np.float32(value).view(np.uint32))
