"""A GPU that does nothing: kernels are compiled and launched for it, so that the host's time can be measured alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from .compiler import dispatch_to_triton

__all__ = ["IdleDriver", "Launcher", "idle_driver"]


class _Utils:
    """The part of a driver that Triton asks for when it loads a kernel."""

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024

    def unload_module(self, module: int) -> None:
        """Do nothing."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}


class Launcher:
    """Takes a launch and does nothing; counts them."""

    count = 0

    def __init__(self, source: Any, metadata: Any):
        pass

    def __call__(self, *args: Any) -> None:
        Launcher.count += 1


class IdleDriver:
    """A GPU of compute capability 9.0 that is never there."""

    utils, launcher_cls = _Utils(), Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)


@contextlib.contextmanager
def idle_driver() -> Iterator[None]:
    """Let ``backend="triton"`` take CPU tensors: kernels are compiled, and their launches do nothing."""
    active = driver._active
    driver.set_active(IdleDriver())
    try:
        with dispatch_to_triton():
            yield
    finally:
        driver._active = active
