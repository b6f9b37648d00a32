"""Kernels compiled ahead of time, as they are really launched, and their resources. No GPU needed.

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

from bench.primitives import Inputs, Outputs, Primitive, differentiate
from fastreduce import backends
from fastreduce.ops import _library

from .buffers import overwritten

__all__ = [
    "SHARED_LIMIT",
    "CompileOnlyDriver",
    "KernelReport",
    "compiled_for",
    "dispatch_to_triton",
    "every_launch",
    "occupancy",
]

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, "gfx942": 64 << 10}  # bytes a block may ask for
_SHARED_OF_ALL = {80: 164 << 10, 90: 228 << 10}  # bytes of a multiprocessor


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
        warpgroup_ops: how many of ``mma_ops`` take four warps together (sm_90).
        overwrites: writes to a shared buffer that an asynchronous dot may still be reading (``bench.proof.buffers``).
        serial: whether the assembler made every product of four warps wait for the one before, since it takes
            accumulators for being used under way.
        hash: of the compiled kernel.
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
    serial: bool = False
    hash: str = ""


def _occupancy_nvidia(arch: int, num_warps: int, registers: int, shared_bytes: int) -> float:
    """Return the share of warps on NVIDIA.

    A warp takes registers in steps of 256, and each of four schedulers has as many warps. A block takes 1 KiB of shared
    memory more than it asks for.
    """
    warps_by_registers = (65536 // (-(-registers * 32 // 256) * 256)) // 4 * 4
    shared = -(-shared_bytes // 128) * 128 + 1024
    blocks = min(64 // num_warps, 32, warps_by_registers // num_warps, _SHARED_OF_ALL[arch] // shared)
    return blocks * num_warps / 64


def _occupancy_amd(num_warps: int, registers: int, shared_bytes: int) -> float:
    """Return the share of warps on AMD.

    Four units share 64 KiB of memory. Each has 512 registers a lane, and 8 warps.
    """
    warps = 4 * min(8, 512 // (-(-max(registers, 1) // 8) * 8))
    blocks = warps // num_warps
    if shared_bytes:
        blocks = min(blocks, (64 << 10) // shared_bytes)
    return blocks * num_warps / 32


def occupancy(arch: int | str, num_warps: int, registers: int, shared_bytes: int) -> float:
    """Return the share of a multiprocessor's warps that can be active."""
    if isinstance(arch, str):
        return _occupancy_amd(num_warps, registers, shared_bytes)
    return _occupancy_nvidia(arch, num_warps, registers, shared_bytes)


class CompileOnlyDriver:
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
    """Return whether a dot takes half precision, or float32 that may be rounded to tf32."""
    dots = re.findall(r"tt\.dot\b.*", ttir)
    return any("tf32" in dot or re.search(r":.*x(?:f16|bf16)>", dot.split("->")[0]) for dot in dots)


def _is_serial(ptx: str, sass: str) -> bool:
    """Return whether there is a wait after every product of four warps, though the kernel asks for fewer.

    ptxas tells of it with the numbers C7510 to C7515, which Triton does not pass on.
    """
    products, waits = len(re.findall(r"\bwgmma\.mma_async\b", ptx)), len(re.findall(r"\bwgmma\.wait_group\b", ptx))
    return waits < products and sass.count("WARPGROUP.DEPBAR") >= sass.count("HGMMA.") > 0


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
        serial=_is_serial(ptx, sass),
        hash=compiled.hash,
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
    """Compile launches inside the block for ``sm_<arch>``, or AMD's ``arch``, and report them in the list.

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

    driver.set_active(CompileOnlyDriver(arch))
    JITFunction.run = compile_only
    try:
        yield reports
    finally:
        JITFunction.run = run
        driver._active = active


@contextlib.contextmanager
def dispatch_to_triton() -> Iterator[None]:
    """Let ``backend="triton"`` take CPU tensors within the block, as in a process that interprets."""
    modules = (backends, _library)
    before = [module.INTERPRETING for module in modules]
    for module in modules:
        module.INTERPRETING = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.INTERPRETING = value


def every_launch(primitive: Primitive, inputs: Inputs) -> None:
    """Run forward without gradients, then with them, and backward."""

    def call(arguments: Inputs) -> Outputs:
        return primitive.call(**arguments, backend="triton")

    call(inputs)
    if primitive.gradients:
        backward, _ = differentiate(call, inputs, primitive.gradients)
        backward()
