"""Launches of Triton kernels, emulated: inside ``emulated_for`` a launcher that gets CPU tensors runs its kernels."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bench.proof.compiler import CompileOnlyDriver

from .faults import EmulationError, Finding
from .kernel import Kernel, float_bits
from .machine import Schedule
from .memory import GlobalMemory

__all__ = ["Emulation", "emulated_for", "poisoned_outputs"]

_kernels: dict[tuple[int, str], Kernel] = {}  # by architecture and the compiled kernel's hash


def _kernel(compiled: Any, arch: int) -> Kernel:
    key = (arch, compiled.hash)
    if key not in _kernels:
        _kernels[key] = Kernel(compiled.asm["ptx"], compiled.metadata.num_warps * 32, compiled.metadata.shared)
    return _kernels[key]


def _bits(value: Any, kind: Any, memory: GlobalMemory) -> Iterator[int]:
    """Yield the bits of an argument of a launch, by its type in the compiled kernel's signature; constants have none.

    A tuple has a type for each of its entries.
    """
    if isinstance(kind, tuple):
        for one, of_one in zip(value, kind, strict=True):
            yield from _bits(one, of_one, memory)
    elif kind.startswith("*"):
        yield 0 if value is None else memory.address(value)
    elif kind != "constexpr":
        yield float_bits(value) if kind in ("fp32", "f32") else int(value)


@dataclasses.dataclass
class Emulation:
    """The findings of one block.

    Attributes:
        findings: races and other undefined uses, each once.
        programs: how many programs ran.
        watch: called after every launch with the compiled kernel's hash, the kernel, and what its first thread
            executed, if given.
    """

    arch: int
    schedule: Schedule
    findings: list[Finding] = dataclasses.field(default_factory=list)
    programs: int = 0
    watch: Callable[[str, Kernel, list[tuple[int, int]]], None] | None = None

    def launch(self, compiled: Any, names: list[str], bound: dict[str, Any], grid: tuple[int, int, int]) -> None:
        """Run a compiled kernel on the tensors among its arguments."""
        kinds = compiled.src.signature
        memory = GlobalMemory([value for value in bound.values() if isinstance(value, torch.Tensor)])
        arguments = [bits for name in names if name in kinds for bits in _bits(bound.get(name), kinds[name], memory)]
        kernel = _kernel(compiled, self.arch)
        visits: list[tuple[int, int]] | None = None if self.watch is None else []
        found = kernel.launch(grid, arguments, memory, self.schedule, visits)
        memory.copy_back()
        self.findings += [finding for finding in found if finding not in self.findings]
        self.programs += grid[0] * grid[1] * grid[2]
        if self.watch is not None and visits is not None:
            self.watch(compiled.hash, kernel, visits)

    def check(self) -> None:
        """Raise EmulationError if anything was found."""
        if self.findings:
            raise EmulationError("; ".join(str(finding) for finding in self.findings))


@contextlib.contextmanager
def emulated_for(arch: int, schedule: Schedule | None = None) -> Iterator[Emulation]:
    """Compile launches inside the block for ``sm_<arch>`` and run them on the emulator, on CPU tensors.

    Raises:
        EmulationError: from a launch that touches what it must not, see the package.
    """
    emulation = Emulation(arch, schedule or Schedule())
    active, run = driver._active, JITFunction.run

    def emulate(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        names = self.arg_names
        bound = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
        sizes = tuple(grid(bound) if callable(grid) else grid)
        if 0 not in sizes:
            emulation.launch(compiled, names, bound, (*sizes, 1, 1, 1)[:3])
        return compiled

    driver.set_active(CompileOnlyDriver(arch))
    JITFunction.run = emulate
    try:
        yield emulation
    finally:
        JITFunction.run = run
        driver._active = active


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Let ``torch.empty`` give NaN and the largest integers within the block."""
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills
