"""Bits and numbers: a register holds bits, and an instruction computes with the numbers that they stand for."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["FROM_FLOAT", "SIGNED", "TO_FLOAT", "UNSIGNED", "Bits", "Floats", "halves", "rounded_to_tf32", "type_bits"]

Bits = NDArray[np.unsignedinteger]
Floats = NDArray[np.float32]

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_TF32 = np.uint32(0xFFFFE000)  # sign, exponent and ten bits


def type_bits(name: str) -> int:
    """Return the width of a PTX type like ``s32``, ``bf16x2``, ``tf32`` or ``pred`` in bits."""
    if name == "pred":
        return 1
    if name in ("bf16x2", "f16x2", "tf32"):
        return 32
    found = re.fullmatch(r"(?:b|u|s|f|bf)(\d+)", name)
    if found is None:
        raise NotImplementedError(f"PTX type {name!r}")
    return int(found[1])


def _from_float32(bits: Bits) -> Floats:
    return bits.view(np.float32)


def _to_float32(values: Floats) -> Bits:
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


def _from_bfloat16(bits: Bits) -> Floats:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_bfloat16(values: Floats) -> Bits:
    bits = _to_float32(values)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)  # nearest even
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def _from_float16(bits: Bits) -> Floats:
    return bits.view(np.float16).astype(np.float32)


def _to_float16(values: Floats) -> Bits:
    return np.asarray(values, np.float32).astype(np.float16).view(np.uint16)


TO_FLOAT: dict[str, Callable[[Bits], Floats]] = {
    "f32": _from_float32,
    "bf16": _from_bfloat16,
    "f16": _from_float16,
    "tf32": lambda bits: (bits & _TF32).view(np.float32),  # what a tensor core reads of a float32
}
FROM_FLOAT: dict[str, Callable[[Floats], Bits]] = {"f32": _to_float32, "bf16": _to_bfloat16, "f16": _to_float16}


def rounded_to_tf32(bits: Bits) -> Bits:
    """Round float32 to tf32, ties away from zero (``cvt.rna``)."""
    return (bits + np.uint32(0x1000)) & _TF32


def halves(bits: Bits) -> tuple[Bits, Bits]:
    """Split 32 bits into the lower and the upper 16."""
    return (bits & np.uint32(0xFFFF)).astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)
