"""Compile kernels ahead of time, as they are really launched, and read their resources. No GPU needed.

python -m bench.compile_report [--quick] [--arch sm_80,sm_90,gfx942] [--shapes ...] [--primitives ...] [--options]
                               [--json FILE]

Every kernel at every shape class that it is launched with. Non-zero exit if a gate is missed that is not among the
known exceptions, or if one of these is not needed any more. TRITON_CACHE_DIR says where compiled kernels are kept.

``compiled_for(arch)`` makes every launch inside the block compile instead of run: the launcher is called with CPU
tensors, Triton's JIT specialises by itself (alignment, divisibility, dtype), and nothing is executed. It needs a
process without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastreduce import backends
from fastreduce.ops import _library
from fastreduce.speed.measure import environment

from .primitives import MODELS, TOKENS, Inputs, Outputs, Primitive, Shape, attention, differentiate, parse_shapes
from .proof.buffers import overwritten
from .proof.gates import Gate, Known, check_words, choose_primitives, table

__all__ = ["ARCHES", "SHARED_LIMIT", "KernelReport", "compiled_for", "dispatch_to_triton", "main", "occupancy"]

ARCHES: dict[str, int | str] = {"sm_80": 80, "sm_90": 90, "gfx942": "gfx942"}
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, "gfx942": 64 << 10}  # bytes a block may ask for
_SHARED_OF_ALL = {80: 164 << 10, 90: 228 << 10}  # bytes of a multiprocessor
_OTHER_TOKENS = (256, 1024)  # multiples of 16 compile apart, and so do the odd numbers of tokens kept of these


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """Resources of one compiled kernel.

    Attributes:
        arch: 80, 90 or "gfx942".
        registers: of a thread; on AMD vector registers, those for accumulation included.
        spill_ops: instructions that spill; on AMD registers spilled.
        occupancy: warps that can be active at a time, as a share of those that the hardware can hold.
        mma_ops: instructions of tensor cores.
        tensor_dots: whether there is a dot of half precision, or of float32 rounded to tf32.
        load_bytes: width of a thread's global load in bytes -> how many such instructions.
        store_bytes: the same of stores.
        warpgroup_ops: of ``mma_ops``, those of four warps together (sm_90).
        overwrites: writes to a shared buffer that an asynchronous dot may still be reading (``bench.proof.buffers``).
    """

    name: str
    arch: int | str
    num_warps: int
    registers: int
    shared_bytes: int
    spill_ops: int
    atomics: int
    float64_ops: int
    mma_ops: int
    load_bytes: dict[int, int]
    store_bytes: dict[int, int]
    occupancy: float
    tensor_dots: bool
    warpgroup_ops: int = 0
    overwrites: int = 0


def _occupancy_nvidia(arch: int, num_warps: int, registers: int, shared_bytes: int) -> float:
    """A warp's registers are given out by 256, to four schedulers alike; a block costs 1 KiB of shared memory more."""
    warps_by_registers = (65536 // (-(-registers * 32 // 256) * 256)) // 4 * 4
    shared = -(-shared_bytes // 128) * 128 + 1024
    blocks = min(64 // num_warps, 32, warps_by_registers // num_warps, _SHARED_OF_ALL[arch] // shared)
    return blocks * num_warps / 64


def _occupancy_amd(num_warps: int, registers: int, shared_bytes: int) -> float:
    """Four units of 512 registers a lane, given out by 8, and of 8 warps each, share 64 KiB."""
    warps = 4 * min(8, 512 // (-(-max(registers, 1) // 8) * 8))
    blocks = warps // num_warps
    if shared_bytes:
        blocks = min(blocks, (64 << 10) // shared_bytes)
    return blocks * num_warps / 32


def occupancy(arch: int | str, num_warps: int, registers: int, shared_bytes: int) -> float:
    """Warps of one multiprocessor that can be active, as a share of those that it can hold."""
    if isinstance(arch, str):
        return _occupancy_amd(num_warps, registers, shared_bytes)
    return _occupancy_nvidia(arch, num_warps, registers, shared_bytes)


class _CompileOnlyDriver:
    """Just enough of a driver for the JIT to specialise and compile."""

    def __init__(self, arch: int | str):
        self.arch = arch

    def get_current_device(self) -> int | str:
        return self.arch

    def get_current_stream(self, device: int | str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        if isinstance(self.arch, str):
            return GPUTarget("hip", self.arch, 64)
        return GPUTarget("cuda", self.arch, 32)


def _tool(tool: Any, *args: str) -> str:
    return subprocess.run([tool.path, *args], capture_output=True, text=True, check=True).stdout


def _access_widths(ptx: str, kind: str) -> dict[int, int]:
    widths: collections.Counter[int] = collections.Counter()
    for suffix in re.findall(rf"\b{kind}\.(?:\w+\.)*?global((?:[.:]+\w+)*)", ptx):
        vector = re.search(r"\.v(\d)", suffix)
        bits = re.search(r"\.[busf](\d+)$", suffix)
        if bits:
            widths[(int(vector[1]) if vector else 1) * int(bits[1]) // 8] += 1
    if kind == "ld":  # asynchronous copies count as loads
        for width in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\],\s*(\w+)", ptx):
            widths[int(width, 0)] += 1
    return dict(widths)


def _tensor_dots(ttir: str) -> bool:
    """Whether a dot takes half precision, or float32 that may be rounded to tf32."""
    dots = re.findall(r"tt\.dot\b.*", ttir)
    return any("tf32" in dot or re.search(r":.*x(?:f16|bf16)>", dot.split("->")[0]) for dot in dots)


def _nvidia_report(compiled: Any, arch: int) -> KernelReport:
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool(knobs.nvidia.cuobjdump, "--dump-resource-usage", str(cubin))
        sass = _tool(knobs.nvidia.nvdisasm, "-c", "-ndf", str(cubin))  # no dataflow analysis: a quarter faster
    opcodes = collections.Counter(
        op.split(".")[0] for op in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass)
    )
    found = re.search(r"REG:(\d+)", usage)
    assert found is not None, usage
    num_warps, registers, shared = compiled.metadata.num_warps, int(found[1]), compiled.metadata.shared
    return KernelReport(
        name=compiled.metadata.name,
        arch=arch,
        num_warps=num_warps,
        registers=registers,
        shared_bytes=shared,
        spill_ops=opcodes["LDL"] + opcodes["STL"],
        atomics=len(re.findall(r"\b(?:atom|red)\.", ptx)),
        float64_ops=len(re.findall(r"\.f64\b", ptx)),
        mma_ops=opcodes["HMMA"] + opcodes["HGMMA"],
        load_bytes=_access_widths(ptx, "ld"),
        store_bytes=_access_widths(ptx, "st"),
        occupancy=occupancy(arch, num_warps, registers, shared),
        tensor_dots=_tensor_dots(compiled.asm["ttir"]),
        warpgroup_ops=opcodes["HGMMA"],
        overwrites=len(overwritten(compiled.asm["ttgir"])),
    )


_AMD_BYTES = {"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2, "dword": 4}


def _amd_widths(assembly: str, kind: str) -> dict[int, int]:
    widths: collections.Counter[int] = collections.Counter()
    for word, count in re.findall(rf"\b(?:buffer|global|flat)_{kind}_([a-z]+)(?:x(\d))?(?:_d16\w*)?\b", assembly):
        widths[_AMD_BYTES[word] * int(count or 1)] += 1
    return dict(widths)


def _amd_report(compiled: Any, arch: str) -> KernelReport:
    assembly = compiled.asm["amdgcn"]

    def figure(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found is not None, name
        return int(found[1])

    num_warps, registers, shared = compiled.metadata.num_warps, figure("vgpr_count"), compiled.metadata.shared
    return KernelReport(
        name=compiled.metadata.name,
        arch=arch,
        num_warps=num_warps,
        registers=registers,
        shared_bytes=shared,
        spill_ops=figure("vgpr_spill_count") + figure("sgpr_spill_count"),
        atomics=len(re.findall(r"\b(?:buffer|global|flat)_atomic_", assembly)),
        float64_ops=len(re.findall(r"\bv_\w+_f64\b", assembly)),
        mma_ops=len(re.findall(r"\bv_mfma_", assembly)),
        load_bytes=_amd_widths(assembly, "load"),
        store_bytes=_amd_widths(assembly, "store"),
        occupancy=occupancy(arch, num_warps, registers, shared),
        tensor_dots=_tensor_dots(compiled.asm["ttir"]),
    )


_reports: dict[
    tuple[int | str, str], KernelReport
] = {}  # by the kernel's hash: to disassemble takes as long as to compile


def _report(compiled: Any, arch: int | str) -> KernelReport:
    key = (arch, compiled.hash)
    if key not in _reports:
        _reports[key] = _amd_report(compiled, arch) if isinstance(arch, str) else _nvidia_report(compiled, arch)
    return _reports[key]


@contextlib.contextmanager
def compiled_for(arch: int | str, failures: dict[str, str] | None = None) -> Iterator[list[KernelReport]]:
    """Launches inside the block are compiled for ``sm_<arch>``, or AMD's ``arch``, and reported in the list.

    Nothing runs. If ``failures`` is given, a kernel that does not compile is put there with the reason.
    """
    reports: list[KernelReport] = []
    active, run = driver._active, JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        try:
            compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:
            if failures is None:
                raise
            failures[self.__name__] = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
            return None
        reports.append(_report(compiled, arch))
        return compiled

    driver.set_active(_CompileOnlyDriver(arch))
    JITFunction.run = compile_only
    try:
        yield reports
    finally:
        JITFunction.run = run
        driver._active = active


@contextlib.contextmanager
def dispatch_to_triton() -> Iterator[None]:
    """Within the block ``backend="triton"`` takes CPU tensors, as in a process that interprets."""
    modules = (backends, _library)
    before = [module.INTERPRETING for module in modules]
    for module in modules:
        module.INTERPRETING = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.INTERPRETING = value


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
        "assign_again_kernel": Known(8, _INDICES),
        "assign_slots_kernel": Known(4, _INDICES),
        "best_match_kernel": Known(4, _INDICES),
        "cheapest_of_each_kernel": Known(8, _INDICES),
        "class_kernel": Known(4, _SCORES),
        "class_logits_kernel": Known(4, _SCORES),
        "cluster_biases_again_kernel": Known(4, _SCORES),
        "cluster_kernel": Known(8, _INDICES),
        "column_sum_kernel": Known(4, _SCORES),
        "density_kernel": Known(4, _SCORES),
        "first_biases_again_kernel": Known(4, _SCORES),
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
        "token_biases_again_kernel": Known(4, _SCORES),
        "token_costs_kernel": Known(8, _SCORES),
        "token_offsets_kernel": Known(4, "one number an image"),
    },
    "tensor cores": {},
}


class _Gates:
    """What is held on NVIDIA; what compiles for AMD is shown only."""

    def __init__(self) -> None:
        self.spills = Gate("spills", 0, KNOWN["spills"])
        self.atomics = Gate("atomics", 0)
        self.float64 = Gate("float64 instructions", 0)
        self.shared = Gate("share of the shared memory", 1)
        self.loads = Gate("widest load", 16, KNOWN["loads"], at_least=True)
        self.stores = Gate("widest store", 16, KNOWN["stores"], at_least=True)
        self.overwrites = Gate("buffers overwritten under an asynchronous dot", 0)
        self.tensor = Gate("tensor-core instructions", 1, KNOWN["tensor cores"], at_least=True)

    def all(self) -> list[Gate]:
        return list(vars(self).values())

    def check(self, key: str, report: KernelReport, *, wide: bool = True) -> str:
        """The worst of ``"ok"``, ``"known"`` and ``"MISSED"``; widths are held only if inputs are aligned."""
        verdicts = [
            self.spills.check(key, report.spill_ops),
            self.atomics.check(key, report.atomics),
            self.float64.check(key, report.float64_ops),
            self.shared.check(key, report.shared_bytes / SHARED_LIMIT[report.arch]),
            self.overwrites.check(key, report.overwrites),
        ]
        if wide:
            verdicts.append(self.loads.check(key, max(report.load_bytes, default=0)))
            verdicts.append(self.stores.check(key, max(report.store_bytes, default=0)))
        if report.tensor_dots:
            verdicts.append(self.tensor.check(key, report.mma_ops))
        return next(verdict for verdict in ("MISSED", "known", "ok") if verdict in verdicts)


def every_launch(primitive: Primitive, inputs: Inputs) -> None:
    """Forward without gradients, then with them, and backward."""

    def call(arguments: Inputs) -> Outputs:
        return primitive.call(**arguments, backend="triton")

    call(inputs)
    if primitive.gradients:
        backward, _ = differentiate(call, inputs, primitive.gradients)
        backward()


def _worst(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a kernel and architecture."""
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
        "load_bytes": report.load_bytes,
        "store_bytes": report.store_bytes,
    }


class _Run:
    """What was compiled so far, every kernel once, and what could not be.

    Args:
        shapes: where to launch.
        arches: names of the architectures to compile for.
        tell: called with a line of progress after every shape.
    """

    def __init__(self, shapes: Sequence[Shape], arches: Sequence[str], tell: Callable[[str], object]):
        self.shapes, self.arches, self.tell = shapes, arches, tell
        self.gates = _Gates()
        self.rows: list[dict[str, Any]] = []
        self.impossible: dict[tuple[str, str, str], list[str]] = {}  # kernel, architecture, reason -> shapes
        self._seen: set[int] = set()

    def compile(self, primitive: Primitive) -> list[dict[str, Any]]:
        """Rows of the kernels that no earlier launch had compiled."""
        before = len(self.rows)
        for shape in self.shapes:
            inputs = primitive.make(shape, torch.Generator().manual_seed(0))
            for arch in self.arches:
                self._compile(primitive, shape, inputs, arch)
            self.tell(f"{primitive.name} {shape}: {len(self.rows) - before} kernels")
        return self.rows[before:]

    def compile_options(self) -> list[dict[str, Any]]:
        """The same of attention's options at other head dimensions, also of rows that are not aligned; for NVIDIA."""
        before, told = len(self.rows), ""
        for name, dtype, aligned, launch in attention.every_launch():
            for arch in (arch for arch in self.arches if not isinstance(ARCHES[arch], str)):
                self._gather("attention", name, dtype, arch, launch, wide=aligned)
            if told != (told := f"{name.split('-')[1]} {dtype}"):
                self.tell(f"attention's options, head dimension {told}: {len(self.rows) - before} kernels")
        return self.rows[before:]

    def _compile(self, primitive: Primitive, shape: Shape, inputs: Inputs, arch: str) -> None:
        point = f"{shape.model}-{shape.tokens}"
        self._gather(primitive.name, point, shape.dtype, arch, lambda: every_launch(primitive, inputs))

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

    run = _Run(shapes, arches, tell)
    columns = ("kernel", "arch", "primitive", "shape", "dtype", "warps", "registers", "spills", "shared", "occupancy")
    for primitive in primitives.values():
        if new := run.compile(primitive):
            print(table(new, (*columns, "load", "store", "tensor", "gate")), end="\n\n", flush=True)
    if options.options:
        print(table(run.compile_options(), (*columns, "load", "store", "tensor", "gate")), end="\n\n", flush=True)
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
    print(f"\n{len(run.rows)} kernels, {time.perf_counter() - start:.0f} s, {len(misses)} failures")
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
