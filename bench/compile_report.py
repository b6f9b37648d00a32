"""Compile kernels ahead of time, as they are really launched, and read their resources. No GPU needed.

python -m bench.compile_report [--quick] [--arch sm_80,sm_90,gfx942] [--shapes ...] [--primitives ...] [--options]
                               [--counts] [--json FILE]

Every kernel at every shape class that it is launched with. With ``--counts`` the compiled kernels are run too, on the
emulator, and the report says what one program executes: instructions, barriers, and how often it waits for global
memory. ``python -m bench.emulate --counts`` counts loads, stores, shuffles and products besides.

Non-zero exit if a gate is missed that is not among the known exceptions, or if one of these is not needed any more.
TRITON_CACHE_DIR says where compiled kernels are kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported

import torch

from fastreduce.arguments import counted
from fastreduce.measure import environment

from .primitives import MODELS, TOKENS, Inputs, Primitive, Shape, attention, parse_shapes
from .proof.compiler import SHARED_LIMIT, KernelReport, compiled_for, dispatch_to_triton, every_launch
from .proof.emulator.counts import count_launches
from .proof.gates import Gate, Known, check_words, choose_primitives, table

__all__ = ["ARCHES", "main"]

ARCHES: dict[str, int | str] = {"sm_80": 80, "sm_90": 90, "gfx942": "gfx942"}
_COUNTED = ("instructions", "barriers", "waits")
_OTHER_TOKENS = (256, 1024)  # multiples of 16 compile apart, and so do the odd numbers of tokens kept of these


_INDICES = "indices only, one or two a token"
_SCORES = "one number a token, in rows that begin wherever the last one ended"
# Kernel and, where only some are meant, dtype, architecture, model and tokens: the spills or bytes it may come to.
KNOWN: dict[str, dict[str, Known]] = {
    "spills": {},
    "loads": {
        "assign_slots_kernel": Known(4, _SCORES),
        "group_slots_kernel": Known(8, _INDICES),
        "head_mean_kernel": Known(4, _SCORES),
        "sample_tokens_kernel": Known(4, _SCORES),
        "sort_scores_kernel": Known(4, _SCORES),
        "sum_heads_kernel": Known(4, _SCORES),
        "token_offsets_kernel": Known(1, "one flag a token, in rows that begin wherever the last one ended"),
    },
    "stores": {
        "assign_slots_kernel": Known(4, _INDICES),
        "best_match_kernel": Known(4, _INDICES),
        "class_kernel": Known(4, _SCORES),
        "class_logits_kernel": Known(4, _SCORES),
        "cluster_kernel": Known(8, _INDICES),
        "column_sum_kernel": Known(4, _SCORES),
        "density_kernel": Known(4, _SCORES),
        "group_slots_kernel": Known(4, _INDICES),
        "head_mean_kernel": Known(4, _SCORES),
        "iterate_clusters_kernel": Known(8, _INDICES),
        "label_kernel": Known(8, _INDICES),
        "mean_values_kernel": Known(4, "one row a head: V's mean"),
        "plan_biases_backward_kernel": Known(4, _SCORES),
        "plan_biases_kernel": Known(4, _SCORES),
        "row_delta_kernel": Known(4, _SCORES),
        "received_kernel": Known(4, _SCORES),
        "row_softmax_kernel": Known(4, _SCORES),
        "sample_tokens_kernel": Known(8, _INDICES),
        "score_kernel": Known(4, _SCORES),
        "sort_scores_kernel": Known(8, _INDICES),
        "squared_lengths_kernel": Known(4, _SCORES),
        "sum_heads_kernel": Known(2, _SCORES),
        "sum_parts_kernel": Known(4, _SCORES),
        "token_offsets_kernel": Known(4, "one number an image"),
    },
    "tensor cores": {},
}


class _Gates:
    """Gates held on NVIDIA; what compiles for AMD is shown only."""

    def __init__(self) -> None:
        self.spills = Gate("spills", 0, KNOWN["spills"])
        self.atomics = Gate("atomics", 0)
        self.float64 = Gate("float64 instructions", 0)
        self.shared = Gate("share of the shared memory", 1)
        self.loads = Gate("widest load", 16, KNOWN["loads"], at_least=True)
        self.stores = Gate("widest store", 16, KNOWN["stores"], at_least=True)
        self.overwrites = Gate("buffers overwritten under an asynchronous dot", 0)
        self.serial = Gate("asynchronous products that wait for each other", 0)
        self.tensor = Gate("tensor-core instructions", 1, KNOWN["tensor cores"], at_least=True)

    def all(self) -> list[Gate]:
        return list(vars(self).values())

    def check(self, key: str, report: KernelReport, *, wide: bool = True) -> str:
        """Return the worst of ``"ok"``, ``"known"`` and ``"MISSED"``; widths are held only if inputs are aligned."""
        verdicts = [
            self.spills.check(key, report.spill_ops),
            self.atomics.check(key, report.atomics),
            self.float64.check(key, report.float64_ops),
            self.shared.check(key, report.shared_bytes / SHARED_LIMIT[report.arch]),
            self.overwrites.check(key, report.overwrites),
            self.serial.check(key, int(report.serial)),
        ]
        if wide:
            verdicts.append(self.loads.check(key, max(report.load_bytes, default=0)))
            verdicts.append(self.stores.check(key, max(report.store_bytes, default=0)))
        if report.tensor_dots:
            verdicts.append(self.tensor.check(key, report.mma_ops))
        return next(verdict for verdict in ("MISSED", "known", "ok") if verdict in verdicts)


def _worst(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Reduce the rows to the worst of every kernel and architecture."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["arch"]), []).append(row)
    most, least = ("registers", "spills", "shared"), ("occupancy", "load", "store")
    return [
        {"kernel": kernel, "arch": arch, "compiled": len(group)}
        | {name: max(row[name] for row in group) for name in most}
        | {name: min(row[name] for row in group) for name in least}
        for (kernel, arch), group in sorted(groups.items())
    ]


def _row(report: KernelReport, arch: str, primitive: str, shape: str, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "kernel": report.name,
        "arch": arch,
        "primitive": primitive,
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "warps": report.num_warps,
        "registers": report.registers,
        "spills": report.spill_ops,
        "shared": report.shared_bytes,
        "occupancy": report.occupancy,
        "load": max(report.load_bytes, default=0),
        "store": max(report.store_bytes, default=0),
        "tensor": report.mma_ops,
        "tensor_dots": report.tensor_dots,
        "overwrites": report.overwrites,
        "serial": report.serial,
        "hash": report.hash,
        "load_bytes": report.load_bytes,
        "store_bytes": report.store_bytes,
    }


class _Run:
    """Kernels compiled so far, every one once, and what could not be compiled.

    Args:
        shapes: where to launch.
        arches: names of the architectures to compile for.
        tell: called with a line of progress after every shape.
        counts: whether to run the kernels of NVIDIA's architectures on the emulator, and count.
    """

    def __init__(
        self, shapes: Sequence[Shape], arches: Sequence[str], tell: Callable[[str], object], *, counts: bool = False
    ):
        self.shapes, self.arches, self.tell, self.counts = shapes, arches, tell, counts
        self.gates = _Gates()
        self.rows: list[dict[str, Any]] = []
        self.impossible: dict[tuple[str, str, str], list[str]] = {}  # kernel, architecture, reason -> shapes
        self._seen: set[int] = set()

    def compile(self, primitive: Primitive) -> list[dict[str, Any]]:
        """Return the rows of the kernels that no earlier launch had compiled."""
        before = len(self.rows)
        for shape in self.shapes:
            inputs = primitive.make(shape, torch.Generator().manual_seed(0))
            for arch in self.arches:
                self._compile(primitive, shape, inputs, arch)
            self.tell(f"{primitive.name} {shape}: {counted(len(self.rows) - before, 'kernel')}")
        return self.rows[before:]

    def compile_options(self) -> list[dict[str, Any]]:
        """Compile attention's options at other head dimensions, also of rows that are not aligned; for NVIDIA."""
        before, told = len(self.rows), ""
        for name, dtype, aligned, launch in attention.every_launch():
            for arch in (arch for arch in self.arches if not isinstance(ARCHES[arch], str)):
                self._gather("attention", name, dtype, arch, launch, wide=aligned)
            if told != (told := f"{name.split('-')[1]} {dtype}"):
                self.tell(f"attention's options, head dimension {told}: {counted(len(self.rows) - before, 'kernel')}")
        return self.rows[before:]

    def _compile(self, primitive: Primitive, shape: Shape, inputs: Inputs, arch: str) -> None:
        point = f"{shape.model}-{shape.tokens}"
        before = len(self.rows)
        self._gather(primitive.name, point, shape.dtype, arch, lambda: every_launch(primitive, inputs))
        name = ARCHES[arch]
        if self.counts and isinstance(name, int) and len(self.rows) > before:
            found = count_launches(primitive, inputs, name)
            for row in self.rows[before:]:
                row.update((one, found[row["hash"]][one]) for one in _COUNTED)

    def _gather(
        self, primitive: str, shape: str, dtype: torch.dtype, arch: str, launch: Callable[[], None], wide: bool = True
    ) -> None:
        on_amd = isinstance(ARCHES[arch], str)
        failures: dict[str, str] = {}
        with dispatch_to_triton(), compiled_for(ARCHES[arch], failures if on_amd else None) as reports:
            launch()
        for report in reports:
            if id(report) not in self._seen:
                self._seen.add(id(report))
                row = _row(report, arch, primitive, shape, dtype)
                key = f"{report.name} {row['dtype']} {arch} {row['shape']}"
                self.rows.append(row | {"gate": "shown" if on_amd else self.gates.check(key, report, wide=wide)})
        for name, reason in failures.items():
            self.impossible.setdefault((name, arch, reason), []).append(f"{shape} {dtype}")


def _shape_classes(*, quick: bool) -> list[Shape]:
    if quick:
        return [Shape("deit_small", 197, 2, torch.float16)]
    classes = [*itertools.product(MODELS, TOKENS), *itertools.product(["deit_small"], _OTHER_TOKENS)]
    grid = itertools.product(classes, (torch.float16, torch.float32))
    return [Shape("deit_small", 197, 2, torch.bfloat16), *(Shape(*point, 2, dtype) for point, dtype in grid)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.compile_report", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="DeiT-S at 197 tokens in float16, for sm_80 and sm_90")
    parser.add_argument("--arch", help=f"of {', '.join(ARCHES)}, comma separated (default: all)")
    parser.add_argument("--shapes", help="MODEL-TOKENS-BATCH[-DTYPE], comma separated (default: all)")
    parser.add_argument("--primitives", help="names, comma separated (default: all)")
    parser.add_argument(
        "--options",
        action="store_true",
        help="attention with every option at every head dimension too, aligned or not, NVIDIA only: an hour or more",
    )
    parser.add_argument(
        "--counts",
        action="store_true",
        help="run the kernels too and count what a program executes, NVIDIA only: some minutes more",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was read")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, judge; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    arches = options.arch.split(",") if options.arch else list(ARCHES)[: 2 if options.quick else 3]
    try:
        check_words(arches, ARCHES, "architecture")
        primitives = choose_primitives(options.primitives)
        shapes = _shape_classes(quick=options.quick)
        if options.shapes is not None:
            shapes = parse_shapes(options.shapes, torch.float16)
    except ValueError as error:
        parser.error(str(error))
    start = time.perf_counter()

    def tell(line: str) -> None:
        if not options.quick:
            print(f"{line}, {time.perf_counter() - start:.0f} s", file=sys.stderr)

    run = _Run(shapes, arches, tell, counts=options.counts)
    columns: tuple[str, ...] = ("kernel", "arch", "primitive", "shape", "dtype", "warps", "registers", "spills")
    columns = (*columns, "shared", "occupancy", "load", "store", "tensor")
    for primitive in primitives.values():
        if new := run.compile(primitive):
            numbers = _COUNTED if options.counts else ()
            print(table(new, (*columns, *numbers, "gate")), end="\n\n", flush=True)
    if options.options:
        print(table(run.compile_options(), (*columns, "gate")), end="\n\n", flush=True)
    worst = ("kernel", "arch", "compiled", "registers", "spills", "shared", "occupancy", "load", "store")
    print(table(_worst(run.rows), worst), end="\n\n")
    for (name, arch, reason), where in run.impossible.items():
        print(f"does not compile: {name} for {arch} at {len(where)} of {len(shapes)} shapes: {reason}")
    for gate in run.gates.all():
        for reason in gate.reasons():
            print(f"known {gate.name}: {reason}")
    chosen = options.arch is not None or options.shapes is not None
    stale: Any = "none" if chosen else "seen" if options.quick or options.primitives is not None else "all"
    misses = [miss for gate in run.gates.all() for miss in gate.failures(stale)]
    for miss in misses:
        print(f"FAILED {miss}")
    print(
        f"\n{counted(len(run.rows), 'kernel')}, {time.perf_counter() - start:.0f} s, {counted(len(misses), 'failure')}"
    )
    if options.json is not None:
        made = {
            "environment": environment(torch.device("cpu")),
            "kernels": run.rows,
            "does_not_compile": [[*key, where] for key, where in run.impossible.items()],
            "failures": misses,
        }
        options.json.write_text(json.dumps(made, indent=1))
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
