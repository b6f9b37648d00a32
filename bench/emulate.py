"""Run compiled kernels without a GPU and hold them against float64: the rung between the compile report and a GPU.

python -m bench.emulate [--all] [--arch sm_80,sm_90] [--primitives ...] [--dtypes ...] [--shapes ...] [--groups ...]
                        [--jobs N] [--counts]

It runs every primitive, forward and backward, at 50 tokens, on both architectures: with copies as early and products
as late as may be, and the reverse. Then it runs special paths, and integer arguments of 0 and 1. The exit code is not
zero if anything is wrong. Without ``--all`` some dtypes are left out, for continuous integration.
``bench.proof.emulator`` says what is modelled. TRITON_CACHE_DIR says where compiled kernels are kept.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported

import torch

from fastreduce.arguments import counted

from .primitives import DTYPES, Shape, parse_shapes
from .proof.emulator.counts import count_kernels
from .proof.emulator.ladder import ARCHES, GROUPS, Climb, Task, choices, climb
from .proof.gates import check_words, table

__all__ = ["main", "tasks"]

_SHAPE = "deit_tiny-50-2"
_DTYPES = {"primitives": ("bfloat16", "float32"), "special": ("bfloat16",), "edge": ("bfloat16",)}
_ALL_DTYPES = {"primitives": tuple(DTYPES), "special": ("bfloat16", "float32"), "edge": ("bfloat16", "float32")}
_ALL_SHAPES = f"{_SHAPE},deit_small-50-1,deit_tiny-65-2"


def tasks(options: argparse.Namespace) -> list[Task]:
    """Return what to run, by the command's options.

    Raises:
        ValueError: an architecture, primitive, dtype, shape or group that there is not.
    """
    arches = tuple(options.arch.split(",")) if options.arch else tuple(ARCHES)
    groups = options.groups.split(",") if options.groups else GROUPS[:1] if options.primitives else GROUPS
    names = options.primitives.split(",") if options.primitives else None
    check_words(arches, ARCHES, "architecture")
    check_words(groups, GROUPS, "group")
    shapes = parse_shapes(options.shapes or (_ALL_SHAPES if options.all else _SHAPE), torch.bfloat16)
    found = []
    for group in groups:
        own = options.dtypes.split(",") if options.dtypes else (_ALL_DTYPES if options.all else _DTYPES)[group]
        check_words(own, DTYPES, "dtype")
        for dtype, shape in itertools.product(own, shapes if group == "primitives" else shapes[:1]):
            known = choices(group, DTYPES[dtype])
            if names is not None:
                check_words(names, known, "primitive")
            point = Shape(shape.model, shape.tokens, shape.batch, DTYPES[dtype])
            found += [Task(group, name, point, arches) for name in (known if names is None else names)]
    return found


def _run(task: Task) -> list[Climb]:
    return list(climb(task))


def _results(found: list[Task], jobs: int) -> Iterator[list[Climb]]:
    """Run the tasks, in as many processes; results come as they are ready."""
    if jobs == 1:
        yield from map(_run, found)
        return
    with multiprocessing.get_context("spawn").Pool(min(jobs, len(found))) as pool:
        yield from pool.imap_unordered(_run, found)


def _climb_all(found: list[Task], jobs: int) -> int:
    """Run and print; return how many are red."""
    start, red, total = time.perf_counter(), 0, 0
    for climbs in _results(found, jobs):
        total += len(climbs)
        for one in climbs:
            if one.wrong is not None:
                red += 1
                print(f"RED  {one}", flush=True)
        task, seconds = climbs[0].task, sum(one.seconds for one in climbs)
        dtype = str(task.shape.dtype).removeprefix("torch.")
        print(f"{task.name} {dtype}: {counted(len(climbs), 'run')}, {seconds:.1f} s", file=sys.stderr, flush=True)
    print(f"{counted(total, 'run')}, {red} red, {time.perf_counter() - start:.0f} s")
    return red


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.emulate", description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every dtype, more shapes")
    parser.add_argument("--arch", help=f"of {', '.join(ARCHES)}, comma separated (default: both)")
    parser.add_argument("--primitives", help="names, comma separated (default: all)")
    parser.add_argument("--dtypes", help=f"of {', '.join(DTYPES)}, comma separated")
    parser.add_argument("--shapes", help=f"MODEL-TOKENS-BATCH, comma separated (default: {_SHAPE})")
    parser.add_argument("--groups", help=f"of {', '.join(GROUPS)}, comma separated (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--counts", action="store_true", help="print what a program of each kernel executes instead")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Emulate, print, judge; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        found = tasks(options)
        if options.jobs < 1:
            raise ValueError(f"--jobs must be at least 1, got {options.jobs}")
    except ValueError as error:
        parser.error(str(error))
    if options.counts:
        rows = [row for task in found if task.group == "primitives" for row in count_kernels(task)]
        print(table(rows, tuple(rows[0])))
        return 0
    return 1 if _climb_all(found, options.jobs) else 0


if __name__ == "__main__":
    sys.exit(main())
