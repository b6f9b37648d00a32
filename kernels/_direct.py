"""A short way from a launcher to the compiled kernel, and arithmetic that Triton's own takes 2 µs for on the host."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

__all__ = ["cdiv", "direct", "is_compiled", "next_power_of_2"]

_MOST_KEPT = 4096  # argument lists of a kernel


def direct(kernel: Any) -> Any:
    """Decorate a kernel, above ``@triton.jit``: what Triton decided for arguments like these is kept and launched.

    This launch takes a third of the time of Triton's own. Interpreted kernels stay as they are.
    """
    return _Direct(kernel) if isinstance(kernel, JITFunction) else kernel


def is_compiled(kernel: Any) -> bool:
    """Return whether a kernel is compiled; the interpreter's have no target and take no settings of one."""
    return isinstance(kernel, (_Direct, JITFunction))


class _Direct:
    """A kernel that is launched by ``kernel[grid](...)``; whatever else is asked of it is Triton's."""

    def __init__(self, kernel: JITFunction):
        self.kernel = kernel
        self.signature = inspect.signature(kernel.fn)
        self.driver: Any = None
        self.kept: dict[Any, tuple[Any, ...]] = {}
        self.places: dict[tuple[type, ...], tuple[int, ...]] = {}  # of the tensors, by the arguments' types
        self.__name__, self.__doc__ = kernel.fn.__name__, kernel.fn.__doc__

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **options: Any) -> Any:
        if JITFunction.run.__module__ != JITFunction.__module__:  # a harness runs the kernels itself
            return self.kernel.run(*args, grid=grid, warmup=False, **options)
        active = driver.active
        if active is not self.driver:
            self.driver, self.kept = active, {}
        device = active.get_current_device()
        # All that Triton specialises by: dtype and alignment of a pointer, and numbers, here each value by itself.
        kinds = tuple(map(type, args))
        places = self.places.get(kinds)
        if places is None:
            places = self.places[kinds] = tuple(i for i, one in enumerate(args) if isinstance(one, torch.Tensor))
        values: list[Any] = [*args, device, kinds, *options, *options.values()]
        for place in places:
            one = args[place]
            values[place] = one.dtype
            values.append(one.data_ptr() & 15)
        key = tuple(values)
        kept = self.kept.get(key)
        if kept is None or _watched(self.kernel):
            return self._first_launch(key, grid, args, options)
        run, function, metadata, rest = kept
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        # Without hooks, and so without the metadata that is for them.
        run(x, y, z, active.get_current_stream(device), function, metadata, None, None, None, *args, *rest)
        return None

    def _first_launch(self, key: Any, grid: tuple[int, ...], args: Any, options: Any) -> Any:
        compiled = self.kernel.run(*args, grid=grid, warmup=False, **options)
        # An AMD kernel is specialised by the sizes of tensors too. In a harness that compiles only there is no kernel.
        kept = isinstance(compiled, CompiledKernel) and self.driver.get_current_target().backend == "cuda"
        if kept and not _watched(self.kernel):
            named = {name: value for name, value in options.items() if name in self.signature.parameters}
            bound = self.signature.bind(*args, **named)
            bound.apply_defaults()
            if len(self.kept) >= _MOST_KEPT:
                self.kept.clear()
            rest = tuple(bound.arguments.values())[len(args) :]
            self.kept[key] = compiled.run, compiled.function, compiled.packed_metadata, rest
        return compiled


def _watched(kernel: JITFunction) -> bool:
    """Return whether somebody wants to see launches, or has them compiled in another way: then Triton launches."""
    runtime = knobs.runtime
    return (
        bool(getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook))
        or bool(getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook))
        or bool(runtime.debug or knobs.compilation.instrumentation_mode or kernel.pre_run_hooks)
        or getattr(runtime, "add_stages_inspection_hook", None) is not None
    )


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up; ``triton.cdiv`` takes 2 µs on the host."""
    return -(-a // b)


def next_power_of_2(number: int) -> int:
    """Return the smallest power of 2 that is at least ``number``; ``triton.next_power_of_2`` takes 2 µs."""
    return 1 << max(0, number - 1).bit_length()
