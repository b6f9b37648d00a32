"""The fourth rung of the ladder: our launchers' kernels, compiled and executed, against float64."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping

import torch

from bench.microbenchmark import DIRECTIONS, Microbenchmark
from bench.primitives import Inputs, Outputs, Primitive, Shape, load_primitives
from bench.proof.compiler import dispatch_to_triton

from .cases import edge_cases, special_cases
from .launch import emulated_for, poisoned_outputs
from .machine import Schedule

__all__ = ["ARCHES", "GROUPS", "SCHEDULES", "Climb", "Task", "climb"]

ARCHES = {"sm_80": 80, "sm_90": 90}
SCHEDULES = {
    "copies early, products late": Schedule(),
    "copies late, products early": Schedule(copies_early=False, products_early=True, worst=False, races=False),
}
_WORST = 16 * 2.0**-23  # of the largest value: a few approximations of two units each, one after another
GROUPS = ("primitives", "special", "edge")


@dataclasses.dataclass(frozen=True)
class Task:
    """One primitive or case in one dtype, on all the architectures asked for.

    Attributes:
        group: one of ``GROUPS``.
        name: within the group.
        shape: where, with its dtype; of a case only the dtype counts.
        arches: names of architectures.
    """

    group: str
    name: str
    shape: Shape
    arches: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Climb:
    """The result of one direction of a task, on one architecture, in one schedule.

    Attributes:
        wrong: the fault in words; None if all is well.
        seconds: that it took.
    """

    task: Task
    arch: str
    direction: str
    schedule: str
    wrong: str | None
    seconds: float

    def __str__(self) -> str:
        shape = self.task.shape
        point = str(shape) if self.task.group == "primitives" else str(shape.dtype).removeprefix("torch.")
        return f"{self.task.name} {point} {self.arch} {self.direction}, {self.schedule}: {self.wrong or 'ok'}"


def choices(group: str, dtype: torch.dtype) -> Mapping[str, Primitive]:
    """Return the primitives or cases of a group by name."""
    if group == "primitives":
        return load_primitives()
    return special_cases(dtype) if group == "special" else edge_cases(dtype)


def _emulate(benchmark: Microbenchmark, arch: str, schedule: Schedule) -> str | None:
    """Return what is wrong with one direction, or None."""
    more = _WORST if schedule.worst else 0.0
    try:
        with poisoned_outputs(), dispatch_to_triton(), emulated_for(ARCHES[arch], schedule) as emulation:
            wrong = benchmark.parity("triton", more)
    except Exception as error:  # a kernel that does not compile, an address, an unknown instruction
        text = " ".join(str(error).split())
        return f"{type(error).__name__}: {text if len(text) < 400 else f'… {text[-400:]}'}"
    races = dict.fromkeys(f"{found.kernel} ({found.line}): {found.what}" for found in emulation.findings)
    return "; ".join([*([wrong] if wrong else []), *races]) or None


def climb(task: Task) -> Iterator[Climb]:
    """Run a task: every architecture, direction and schedule."""
    torch.set_num_threads(1)
    primitive = choices(task.group, task.shape.dtype)[task.name]

    def ours(inputs: Inputs) -> Outputs:
        return primitive.call(**inputs, backend="triton")

    for direction in DIRECTIONS[: 2 if primitive.gradients else 1]:
        benchmark = Microbenchmark(primitive, task.shape, torch.device("cpu"), direction)
        benchmark.contenders["triton"] = ours
        for arch in task.arches:
            for name, schedule in SCHEDULES.items():
                if task.group == "edge":  # exact zeros among the results: no room for approximations
                    schedule = dataclasses.replace(schedule, worst=False)
                start = time.perf_counter()
                wrong = _emulate(benchmark, arch, schedule)
                yield Climb(task, arch, direction, name, wrong, time.perf_counter() - start)
