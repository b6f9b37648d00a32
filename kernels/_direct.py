"""Launches that go straight to the compiled kernel, and two functions of Triton's that take 2 µs on the host."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

__all__ = [
    "INTERPRETED",
    "Launch",
    "cdiv",
    "direct",
    "is_compiled",
    "is_recorded",
    "is_replaced",
    "is_watched",
    "next_power_of_2",
    "recording",
]

INTERPRETED = knobs.runtime.interpret  # as Triton decides when a kernel is decorated
_MOST_KEPT = 4096  # argument lists that are kept for a kernel
_NUMBERS = frozenset({int, float, bool, type(None)})


@dataclasses.dataclass(frozen=True)
class Launch:
    """A launch: the compiled kernel and its arguments, in the order of the kernel's parameters.

    Attributes:
        kernel: the kernel under ``@triton.jit``.
        compiled: the kernel compiled for these arguments. Triton unloads it once nobody holds it.
        run: the function that launches it; None where Triton alone can launch.
    """

    kernel: Any
    compiled: Any
    run: Callable[..., Any] | None
    grid: tuple[int, int, int]
    function: Any
    metadata: Any
    arguments: tuple[Any, ...]


_records: dict[int, list[Launch]] = {}  # by thread


@contextlib.contextmanager
def recording(launches: list[Launch]) -> Iterator[None]:
    """Append every launch of this thread within the block."""
    thread = threading.get_ident()
    _records[thread] = launches
    try:
        yield
    finally:
        del _records[thread]


def direct(kernel: Any) -> Any:
    """Decorate a kernel, above ``@triton.jit``: its compiled form is kept for arguments of one kind, and launched.

    A launch then takes a third of the time of Triton's own. Interpreted kernels are not changed.
    """
    return _Direct(kernel) if isinstance(kernel, JITFunction) else kernel


def is_compiled(kernel: Any) -> bool:
    """Return whether a kernel is compiled; an interpreted one has no target, and takes no settings of one."""
    return isinstance(kernel, (_Direct, JITFunction))


class _Direct:
    """A kernel that is launched by ``kernel[grid](...)``; other attributes are taken from Triton's kernel."""

    def __init__(self, kernel: JITFunction):
        self.kernel = kernel
        self.signature = inspect.signature(kernel.fn)
        self.driver: Any = None
        self.on_nvidia = False
        self.kept: dict[Any, tuple[Any, ...]] = {}
        # Places of the tensors and of the tuples, by the types of the arguments.
        self.places: dict[tuple[type, ...], tuple[list[int], list[int]]] = {}
        self.__name__, self.__doc__ = kernel.fn.__name__, kernel.fn.__doc__

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **options: Any) -> Any:
        active = driver.active
        if active is not self.driver:
            self.on_nvidia, self.kept = active.get_current_target().backend == "cuda", {}
            self.driver = active  # last, since another thread may be reading
        if not self.on_nvidia:
            options.pop("maxnreg", None)  # AMD's compiler has no such setting
        if is_replaced():
            return self.kernel.run(*args, grid=grid, warmup=False, **options)
        if _records and is_recorded():
            with torch._C.DisableTorchFunction():  # the record is of the launch, not of its questions to tensors
                return self._run(grid, args, options, _records[threading.get_ident()])
        return self._run(grid, args, options, None)

    def _run(self, grid: tuple[int, ...], args: Any, options: Any, record: list[Launch] | None) -> Any:
        active = self.driver
        device = active.get_current_device()
        # Triton specialises by dtype and alignment of a pointer, and by numbers; here each value of a number counts.
        kinds = tuple(map(type, args))
        places = self.places.get(kinds)
        if places is None:
            tensors, tuples = ([i for i, one in enumerate(args) if isinstance(one, of)] for of in (torch.Tensor, tuple))
            places = self.places[kinds] = tensors, tuples
        tensors, tuples = places
        values: list[Any] = [*args, device, kinds, *options, *options.values(), *map(type, options.values())]
        for place in tensors:
            one = args[place]
            values[place] = one.dtype
            values.append(one.data_ptr() & 15)
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        for place in tuples:
            inner = tuple(map(type, args[place]))
            values.append(inner)
            if not _NUMBERS.issuperset(inner):  # the alignment of a tensor inside is not checked here
                if record is not None:
                    record.append(Launch(self.kernel, None, None, (x, y, z), None, None, ()))
                return self.kernel.run(*args, grid=grid, warmup=False, **options)
        key = tuple(values)
        kept = self.kept.get(key)
        if kept is None or is_watched((self.kernel,)):
            compiled = self._first_launch(key, grid, args, options)
            kept = self.kept.get(key, (None, None, None, None, ()))
        else:
            compiled, run, function, metadata, rest = kept
            # There are no hooks here, so the metadata for them is left out.
            stream = active.get_current_stream(device)
            run(x, y, z, stream, function, metadata, None, None, None, *args, *rest)
        if record is not None:
            own, run, function, metadata, rest = kept
            record.append(Launch(self.kernel, own, run, (x, y, z), function, metadata, (*args, *rest)))
        return compiled

    def _first_launch(self, key: Any, grid: tuple[int, ...], args: Any, options: Any) -> Any:
        compiled = self.kernel.run(*args, grid=grid, warmup=False, **options)
        # An AMD kernel is specialised by the sizes of tensors too. A harness that only compiles returns no kernel.
        if isinstance(compiled, CompiledKernel) and self.on_nvidia and not is_watched((self.kernel,)):
            named = {name: value for name, value in options.items() if name in self.signature.parameters}
            bound = self.signature.bind(*args, **named)
            bound.apply_defaults()
            if len(self.kept) >= _MOST_KEPT:
                self.kept.clear()
            rest = tuple(bound.arguments.values())[len(args) :]
            self.kept[key] = compiled, compiled.run, compiled.function, compiled.packed_metadata, rest
        return compiled


def is_recorded() -> bool:
    """Return whether this thread is within a block of :func:`recording`."""
    return bool(_records) and threading.get_ident() in _records


def is_replaced() -> bool:
    """Return whether a harness has replaced Triton's launch and runs the kernels itself."""
    return JITFunction.run.__module__ != JITFunction.__module__


def is_watched(kernels: Sequence[JITFunction] = ()) -> bool:
    """Return whether launches are watched, or compiled in another way: then Triton itself must launch."""
    for kernel in kernels:
        if kernel.pre_run_hooks:
            return True
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        return True
    if runtime.debug or knobs.compilation.instrumentation_mode:
        return True
    return getattr(runtime, "add_stages_inspection_hook", None) is not None


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up; ``triton.cdiv`` takes 2 µs on the host."""
    return -(-a // b)


def next_power_of_2(number: int) -> int:
    """Return the smallest power of 2 that is at least ``number``; ``triton.next_power_of_2`` takes 2 µs."""
    return 1 << max(0, number - 1).bit_length()
