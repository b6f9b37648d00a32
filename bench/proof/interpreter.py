"""Triton's interpreter made trustworthy: repairs of its known faults, and a sanitizer for the bugs that it hides.

Import before the first launch, in a process started with ``TRITON_INTERPRET=1``. ``install_fixes()`` mends what is
wrong in Triton 3.6 to 3.9; ``sanitized()`` makes a launch fail on addresses out of bounds, on lanes that a masked load
left undefined, and on two programs that touch the same address while one of them writes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

__all__ = ["KernelBug", "install_fixes", "sanitized"]

Builder = interpreter.InterpreterBuilder
Executor = interpreter.GridExecutor


class KernelBug(AssertionError):
    """A finding of the sanitizer."""


def _bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # to nearest even
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


@functools.cache
def install_fixes() -> None:
    """Repair range() over a loaded scalar, bfloat16 rounding, dots, and the slow path of tl.sort. Once."""
    patch_tensor, convert = interpreter._patch_lang_tensor, interpreter._convert_float
    create_dot, reduce_apply = Builder.create_dot, interpreter.ReduceOps.apply_impl

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def convert_float(values, source, target, mode):
        if source == tl.bfloat16 and target == tl.float32:
            return _bfloat16_to_float32(values.view(np.uint16)).view(np.uint32)
        if source == tl.float32 and target == tl.bfloat16:
            return _float32_to_bfloat16(values.view(np.float32))
        return convert(values, source, target, mode)

    def dot(self, a, b, d, *rest):
        # In float64 and rounded once to float32: numpy adds up in an order of its CPU, of which no GPU knows.
        precise = interpreter.TensorHandle(np.zeros_like(d.data, np.float64), tl.float64)

        def widen(handle):
            data = _bfloat16_to_float32(handle.data) if _is_bfloat16(handle) else handle.data
            return interpreter.TensorHandle(data.astype(np.float64), tl.float64)

        if d.dtype.scalar != tl.float32:
            return create_dot(self, a, b, d, *rest)
        product = create_dot(self, widen(a), widen(b), precise, *rest).data.astype(np.float32)
        return interpreter.TensorHandle(product + d.data, tl.float32)

    def apply_impl(self, args):
        # tl.sort and tl.topk xor-reduce at every step; the interpreter would do it element by element.
        if self.combine_fn is tl.standard._xor_combine:
            data = np.bitwise_xor.reduce(args[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
            return self.to_tensor(data, args[0].dtype)
        return reduce_apply(self, args)

    interpreter._patch_lang_tensor, interpreter._convert_float = patch_lang_tensor, convert_float
    Builder.create_dot, interpreter.ReduceOps.apply_impl = dot, apply_impl


def _extents(values: tuple[Any, ...]) -> np.ndarray:
    """Return (T, 2) address ranges of the tensors among the arguments: of the view, not of its storage."""
    ranges = set()
    for value in values:
        tensor = interpreter._unwrap_tensor(value) if hasattr(value, "data_ptr") else None
        if tensor is not None and tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            ranges.add((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()))
    return np.array(sorted(ranges), dtype=np.uint64).reshape(-1, 2)


class _Launch:
    """Accesses of one launch, read and written, by program."""

    def __init__(self, extents: np.ndarray):
        self.extents = extents
        self.writes: list[tuple[tuple[int, ...], np.ndarray]] = []
        self.reads: list[tuple[tuple[int, ...], np.ndarray]] = []

    def addresses(self, builder: Any, pointers: Any, mask: Any, what: str) -> np.ndarray:
        active = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.uint64).ravel()
        width = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        inside = ((active[:, None] >= self.extents[:, 0]) & (active[:, None] + width <= self.extents[:, 1])).any(1)
        if not inside.all():
            bad = int((~inside).sum())
            raise KernelBug(f"{what}: {bad} of {active.size} addresses out of bounds in program {builder.grid_idx}")
        return active

    def check_races(self) -> None:
        if not any(a.size for _, a in self.writes):
            return
        programs: dict[tuple[int, ...], int] = {}
        addresses = np.concatenate([a for _, a in self.writes])
        writers = np.concatenate([np.full(a.size, programs.setdefault(p, len(programs))) for p, a in self.writes])
        unique, inverse = np.unique(addresses, return_inverse=True)
        first, last = np.full(unique.size, len(programs)), np.full(unique.size, -1)
        np.minimum.at(first, inverse, writers)
        np.maximum.at(last, inverse, writers)
        if (first != last).any():
            raise KernelBug(f"write race: {int((first != last).sum())} addresses stored by more than one program")
        for program, read in self.reads:
            if read.size:
                nearest = np.searchsorted(unique, read).clip(max=unique.size - 1)
                if ((unique[nearest] == read) & (first[nearest] != programs.get(program, -1))).any():
                    raise KernelBug(f"program {program} reads an address that another program writes")


@contextlib.contextmanager
def sanitized() -> Iterator[None]:
    """Check every launch within the block; raise KernelBug, or an InterpreterError that quotes it."""
    launches: list[_Launch] = []
    masked_load, masked_store = Builder.create_masked_load, Builder.create_masked_store
    start, finish = Executor._init_args_hst, Executor._restore_args_dev

    def init_args(self, args, kwargs):
        host_args, host_kwargs = start(self, args, kwargs)
        launches.append(_Launch(_extents((*host_args, *host_kwargs.values()))))
        return host_args, host_kwargs

    def load(self, pointers, mask, other, *rest):
        launches[-1].reads.append((self.grid_idx, launches[-1].addresses(self, pointers, mask, "load")))
        result = masked_load(self, pointers, mask, other, *rest)
        if other is not None or mask.data.all():
            return result
        data, masked = result.data.copy(), ~np.broadcast_to(mask.data, result.data.shape)
        if data.dtype.kind == "f":
            data[masked] = np.nan
        elif _is_bfloat16(result):
            data[masked] = 0x7FC1
        else:
            data[masked] = True if data.dtype.kind == "b" else np.iinfo(data.dtype).max // 3
        return interpreter.TensorHandle(data, result.dtype)

    def store(self, pointers, value, mask, *rest):
        launches[-1].writes.append((self.grid_idx, launches[-1].addresses(self, pointers, mask, "store")))
        return masked_store(self, pointers, value, mask, *rest)

    def restore_args(self, *args):
        launches.pop().check_races()
        return finish(self, *args)

    Builder.create_masked_load, Builder.create_masked_store = load, store
    Executor._init_args_hst, Executor._restore_args_dev = init_args, restore_args
    try:
        yield
    finally:
        Builder.create_masked_load, Builder.create_masked_store = masked_load, masked_store
        Executor._init_args_hst, Executor._restore_args_dev = start, finish
