"""Compile kernels ahead of time, as they are really launched, and read their resources. No GPU needed.

``compiled_for(arch)`` makes every launch inside the block compile instead of run: the launcher is called with CPU
tensors, Triton's JIT specialises by itself (alignment, divisibility, dtype), and nothing is executed. It needs a
process without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

__all__ = ["SHARED_LIMIT", "KernelReport", "compiled_for"]

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}  # bytes a block may ask for


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """Resources of one compiled kernel."""

    name: str
    arch: int
    num_warps: int
    registers: int
    shared_bytes: int
    spill_ops: int
    atomics: int
    float64_ops: int
    mma_ops: int
    load_bytes: dict[int, int]  # width of a thread's global load in bytes -> how many such instructions
    store_bytes: dict[int, int]


class _CompileOnlyDriver:
    """Just enough of a driver for the JIT to specialise and compile."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
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


def _report(compiled: Any, arch: int) -> KernelReport:
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool(knobs.nvidia.cuobjdump, "--dump-resource-usage", str(cubin))
        sass = _tool(knobs.nvidia.nvdisasm, "-c", str(cubin))
    opcodes = collections.Counter(
        op.split(".")[0] for op in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass)
    )
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return KernelReport(
        name=compiled.metadata.name,
        arch=arch,
        num_warps=compiled.metadata.num_warps,
        registers=int(registers[1]),
        shared_bytes=compiled.metadata.shared,
        spill_ops=opcodes["LDL"] + opcodes["STL"],
        atomics=len(re.findall(r"\b(?:atom|red)\.", ptx)),
        float64_ops=len(re.findall(r"\.f64\b", ptx)),
        mma_ops=opcodes["HMMA"] + opcodes["HGMMA"],
        load_bytes=_access_widths(ptx, "ld"),
        store_bytes=_access_widths(ptx, "st"),
    )


@contextlib.contextmanager
def compiled_for(arch: int) -> Iterator[list[KernelReport]]:
    """Launches inside the block are compiled for ``sm_<arch>`` and reported in the list; nothing runs."""
    reports: list[KernelReport] = []
    active, run = driver._active, JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        reports.append(_report(compiled, arch))
        return compiled

    driver.set_active(_CompileOnlyDriver(arch))
    JITFunction.run = compile_only
    try:
        yield reports
    finally:
        JITFunction.run = run
        driver._active = active
