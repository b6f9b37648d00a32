"""Faults of a kernel that the emulator reports."""

from __future__ import annotations

import dataclasses

__all__ = ["EmulationError", "Finding"]


class EmulationError(AssertionError):
    """A fault that ends the launch: an address, an alignment, a deadlock, an instruction that is not known."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """A race or another undefined use, once for each instruction that shows it.

    Attributes:
        kernel: name of the kernel.
        what: the fault in words.
        line: file and line of the Python source.
        instruction: the PTX instruction.
    """

    kernel: str
    what: str
    line: str
    instruction: str

    def __str__(self) -> str:
        return f"{self.kernel} ({self.line}): {self.what}: {self.instruction}"
