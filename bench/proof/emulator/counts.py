"""Counts of what one program executes: instructions, barriers, and how often it waits for global memory."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator
from typing import Any

import torch

from bench.primitives import Inputs, Primitive, load_primitives
from bench.proof.compiler import dispatch_to_triton, every_launch

from .kernel import Kernel
from .launch import emulated_for
from .machine import Schedule
from .ptx import Instruction, Listing

__all__ = ["count_kernels", "count_launches", "count_visits"]

_REGISTER = re.compile(r"%[a-z]+\d+")
Visits = list[tuple[int, int]]


def _executed(listing: Listing, visits: Visits) -> Iterator[Instruction]:
    for first, last in visits:
        yield from listing.instructions[first:last]


def _waits(instructions: Iterator[Instruction]) -> int:
    """Count the waits for global memory.

    A wait is an instruction that needs what a load brings that has not come yet, or a wait for asynchronous copies; all
    loads that are on their way come with it.
    """
    coming: set[str] = set()
    waits, copies = 0, False
    for instruction in instructions:
        loading = instruction.kind == "ld.global"
        names = _REGISTER.findall(" ".join(instruction.operands[1:] if loading else instruction.operands))
        if instruction.guard is not None:
            names.append(instruction.guard.register)
        if coming.intersection(names) or (copies and instruction.kind == "cp.async.wait_group"):
            waits, copies = waits + 1, False
            coming.clear()
        if loading:
            coming.update(_REGISTER.findall(instruction.operands[0]))
        copies = copies or instruction.kind == "cp.async"
    return waits


def count_visits(listing: Listing, visits: Visits) -> dict[str, int]:
    """Count what the first thread of a launch executed.

    Returns:
        ``instructions``, ``barriers``, ``waits`` for global memory one after another, ``loads``, ``stores`` and
        ``copies`` of global memory, ``shared`` accesses, ``shuffles``, ``products`` of tensor cores.
    """
    kinds = collections.Counter(instruction.kind for instruction in _executed(listing, visits))
    return {
        "instructions": sum(kinds.values()),
        "barriers": kinds["bar"] + kinds["barrier"],
        "waits": _waits(_executed(listing, visits)),
        "loads": kinds["ld.global"],
        "stores": kinds["st.global"],
        "copies": kinds["cp.async"],
        "shared": kinds["ld.shared"] + kinds["st.shared"] + kinds["ldmatrix"] + kinds["stmatrix"],
        "shuffles": kinds["shfl"] + kinds["redux"],
        "products": kinds["mma"] + kinds["wgmma.mma_async"],
    }


def count_launches(primitive: Primitive, inputs: Inputs, arch: int) -> dict[str, dict[str, Any]]:
    """Run the kernels of a primitive, forward and backward, and count; the first launch of every compiled kernel.

    Returns:
        By the compiled kernel's hash: ``kernel``, its name, ``warps``, and what :func:`count_visits` returns.
    """
    found: dict[str, dict[str, Any]] = {}

    def watch(compiled: str, kernel: Kernel, visits: Visits) -> None:
        if compiled not in found:
            head = {"kernel": kernel.listing.name, "warps": kernel.threads // 32}
            found[compiled] = head | count_visits(kernel.listing, visits)

    schedule = Schedule(copies_early=False, products_early=True, worst=False, races=False)
    with dispatch_to_triton(), emulated_for(arch, schedule) as emulation:
        emulation.watch = watch
        every_launch(primitive, inputs)
    return found


def count_kernels(task: Any) -> list[dict[str, Any]]:
    """Run the kernels of a task and count; one row for each kernel and architecture.

    Args:
        task: a task of the ladder's primitives.
    """
    primitive = load_primitives()[task.name]
    inputs = primitive.make(task.shape, torch.Generator().manual_seed(0))
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for arch in task.arches:
        for counted in count_launches(primitive, inputs, int(arch.removeprefix("sm_"))).values():
            head = {"kernel": counted["kernel"], "arch": arch, "primitive": task.name, "shape": str(task.shape)}
            rows.setdefault((counted["kernel"], arch), head | counted)
    return list(rows.values())
