"""A GPU whose kernels run on the emulator: it gets addresses, as a GPU does, and not only tensors."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from bench.proof.compiler import dispatch_to_triton
from bench.proof.emulator import Emulation, Schedule
from fastreduce.kernels import _repeat


class EmulatedDriver:
    """A GPU with one stream.

    Attributes:
        emulation: runs the kernels.
        known: tensors that an address may lie in.
    """

    def __init__(self, arch: int):
        self.arch, self.emulation = arch, Emulation(arch, Schedule(worst=False))
        self.known: list[torch.Tensor] = []

    def get_current_device(self) -> str:
        return f"emulated sm_{self.arch}"

    def get_current_stream(self, device: str) -> int:
        return 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def tensor_at(self, address: int) -> torch.Tensor | None:
        """Return the bytes from an address to the end of the known tensors that it lies in; None for 0.

        Raises:
            LookupError: if nobody knows it.
        """
        if not address:
            return None
        ends = {}
        for one in self.known:
            last = sum((size - 1) * step for size, step in zip(one.shape, one.stride(), strict=True))
            end = one.data_ptr() + (last + 1) * one.element_size()
            if one.numel() and one.data_ptr() <= address < end:
                ends[end] = one.untyped_storage()
        if not ends:
            raise LookupError(f"no tensor at {address:#x}")
        end = max(ends)
        begin = address - ends[end].data_ptr()
        return torch.empty(0, dtype=torch.uint8).set_(ends[end], begin, (end - address,), (1,))


class _Launcher:
    """Runs one compiled kernel on the active driver."""

    def __init__(self, compiled: CompiledKernel):
        self.compiled = compiled

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: Any, metadata: Any, for_hooks: Any, *args: Any
    ) -> None:
        active = driver.active
        assert (stream, function, metadata) == (7, 1, self.compiled.packed_metadata)
        signature, names = self.compiled.src.signature, self.compiled.src.fn.arg_names
        bound = dict(zip(names, args[2:], strict=True))
        for name, kind in signature.items():
            if isinstance(kind, str) and kind.startswith("*") and isinstance(bound[name], int):
                bound[name] = active.tensor_at(bound[name])
        if x * y * z:
            active.emulation.launch(self.compiled, names, bound, (x, y, z))


@contextlib.contextmanager
def emulated_gpu(monkeypatch: Any, arch: int) -> Iterator[EmulatedDriver]:
    """Let ``backend="triton"`` take CPU tensors; what launchers repeat runs on the emulator, in poisoned memory."""
    own = EmulatedDriver(arch)
    allocator, call = _repeat._allocator, _repeat.Repeated.__call__

    def load(self: CompiledKernel) -> None:
        self._run, self.function = _Launcher(self), 1

    def poisoning(device: torch.device) -> Any:
        allocate = allocator(device)

        def poisoned(*args: Any) -> torch.Tensor:
            found = allocate(*args)
            if found.numel():
                storage = found.untyped_storage()
                torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,)).fill_(0xFF)
            own.known.append(found)
            return found

        return poisoned

    def noted(self: Any, *args: Any) -> Any:
        own.known[:] = [one for one in args if isinstance(one, torch.Tensor)]
        return call(self, *args)

    monkeypatch.setattr(CompiledKernel, "_init_handles", load)
    monkeypatch.setattr(_repeat, "_allocator", poisoning)
    monkeypatch.setattr(_repeat.Repeated, "__call__", noted)
    active = driver._active
    driver.set_active(own)
    try:
        with dispatch_to_triton():
            yield own
    finally:
        driver._active = active
