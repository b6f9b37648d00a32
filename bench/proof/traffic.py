"""Bytes that kernels request, counted in Triton's interpreter."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton.runtime.interpreter as interpreter

__all__ = ["Traffic", "traffic"]


@dataclasses.dataclass
class Traffic:
    """Requests of kernels, by name.

    Attributes:
        loads: bytes of the active lanes of loads.
        stores: bytes of the active lanes of stores.
        launches: number of launches.
    """

    loads: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    stores: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    launches: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def requested(self) -> int:
        """Bytes loaded and stored."""
        return self.loads.total() + self.stores.total()


def _active_bytes(pointers: Any, mask: Any) -> int:
    lanes = np.count_nonzero(np.broadcast_to(mask.data, pointers.data.shape))
    return int(lanes) * max(1, pointers.get_element_ty().primitive_bitwidth // 8)


@contextlib.contextmanager
def traffic() -> Iterator[Traffic]:
    """Count the loads and stores of every launch within the block; needs a process that interprets."""
    counted, running = Traffic(), [""]
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    masked_load, masked_store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        counted.loads[running[-1]] += _active_bytes(pointers, mask)
        return masked_load(self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        counted.stores[running[-1]] += _active_bytes(pointers, mask)
        return masked_store(self, pointers, value, mask, *rest)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        running.append(self.fn.__name__)
        counted.launches[running[-1]] += 1
        try:
            return launch(self, *args, **kwargs)
        finally:
            running.pop()

    builder.create_masked_load, builder.create_masked_store, executor.__call__ = load, store, call
    try:
        yield counted
    finally:
        builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
        executor.__call__ = launch
