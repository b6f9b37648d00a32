"""Global memory made of the tensors of a launch, and the shared memory of the programs that run together."""

from __future__ import annotations

import ctypes
import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray

from .bits import UNSIGNED, Bits
from .faults import EmulationError

__all__ = ["POISON", "GlobalMemory", "SharedMemory"]

POISON = 0xFF  # every byte of it: NaN in each floating dtype, -1 as an integer
_BASE = 0x7F0000000000  # where the emulated addresses begin
_GAP = 4096  # bytes that belong to nobody between two storages
_ALIGNED = 512

Addresses = NDArray[np.int64]


def _typed(memory: NDArray[np.uint8]) -> dict[int, Bits]:
    """Return views of memory, its size a multiple of 8 bytes, by the width of an element in bits."""
    return {bits: memory.view(dtype) for bits, dtype in UNSIGNED.items()}


@dataclasses.dataclass(frozen=True)
class _Region:
    """The storage of some of the tensors: its bytes on the host, and where they stand in the emulated memory."""

    pointer: int
    host: NDArray[np.uint8]
    offset: int


def _storage(tensor: torch.Tensor) -> tuple[int, NDArray[np.uint8]]:
    storage = tensor.untyped_storage()
    size, pointer = storage.nbytes(), storage.data_ptr()
    return pointer, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))


class GlobalMemory:
    """Copies of the storages of tensors, far apart; valid addresses are those that a tensor itself spans.

    Args:
        tensors: arguments of the launch. Tensors that share a storage share it here too.
    """

    def __init__(self, tensors: list[torch.Tensor]):
        tensors = [tensor for tensor in tensors if tensor.numel()]
        storages = dict(_storage(tensor) for tensor in tensors)
        self._regions, end = [], _GAP
        for pointer, host in sorted(storages.items()):
            offset = end + pointer % _ALIGNED  # as aligned as the tensor is
            self._regions.append(_Region(pointer, host, offset))
            end = -(-(offset + host.size + _GAP) // _ALIGNED) * _ALIGNED
        self.bytes = np.full(end, POISON, np.uint8)
        self.typed = _typed(self.bytes)
        self._valid = np.zeros(end, bool)
        for region in self._regions:
            self.bytes[region.offset : region.offset + region.host.size] = region.host
        for tensor in tensors:
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            first = self.address(tensor) - _BASE
            self._valid[first : first + (last + 1) * tensor.element_size()] = True

    def address(self, tensor: torch.Tensor) -> int:
        """Return the emulated address of a tensor's first element; 0 for an empty one, which nobody may read."""
        if not tensor.numel():
            return 0
        pointer = tensor.untyped_storage().data_ptr()
        region = next(region for region in self._regions if region.pointer == pointer)
        return _BASE + region.offset + tensor.data_ptr() - pointer

    def offsets(self, addresses: Addresses, size: int) -> Addresses:
        """Turn addresses of accesses of ``size`` bytes into offsets.

        Raises:
            EmulationError: an address that is not a multiple of ``size``, or outside of every tensor.
        """
        if (addresses & (size - 1)).any():
            raise EmulationError(f"misaligned: an access of {size} bytes at an address that is no multiple of {size}")
        offsets = addresses - _BASE
        inside = (offsets >= 0) & (offsets + size <= self.bytes.size)
        if inside.all():
            inside = self._valid[offsets] & self._valid[offsets + (size - 1)]
        if not inside.all():
            raise EmulationError(f"out of bounds: {int((~inside).sum())} of {inside.size} addresses are in no tensor")
        return offsets

    def copy_back(self) -> None:
        """Write what the kernel stored into the tensors."""
        for region in self._regions:
            region.host[:] = self.bytes[region.offset : region.offset + region.host.size]


class SharedMemory:
    """Shared memory of programs that run together, one after another in one array, poisoned.

    Args:
        programs: how many.
        size: bytes that each may use.
    """

    def __init__(self, programs: int, size: int):
        self.size = size
        self.stride = max(16, -(-size // 16) * 16)
        self.bytes = np.full(programs * self.stride, POISON, np.uint8)
        self.typed = _typed(self.bytes)

    def offsets(self, programs: NDArray[np.int64], addresses: Addresses, size: int) -> Addresses:
        """Turn the addresses within each program's shared memory into offsets.

        Raises:
            EmulationError: an address that is not a multiple of ``size`` or outside of the program's shared memory.
        """
        if (addresses & (size - 1)).any():
            raise EmulationError(f"misaligned: a shared access of {size} bytes at no multiple of {size}")
        if addresses.size and (addresses.min() < 0 or addresses.max() + size > self.size):
            raise EmulationError(f"out of bounds: shared address {addresses.max()} of {self.size} bytes")
        return programs * self.stride + addresses
