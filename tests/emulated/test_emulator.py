"""The emulator finds planted faults, computes right, and passes what is right."""

import numpy as np
import pytest
import torch

from bench.proof.emulator import EmulationError, Kernel, Schedule, emulated_for, launch, poisoned_outputs
from bench.proof.emulator.memory import GlobalMemory
from tests.emulated import kernels

ARCHES = (80, 90)
EARLY, LATE = Schedule(worst=False), Schedule(copies_early=False, products_early=True, worst=False)


def run(arch, call, schedule=EARLY):
    """Return what was found while ``call`` launched its kernels."""
    with emulated_for(arch, schedule) as emulation:
        call()
    assert emulation.programs
    return [finding.what for finding in emulation.findings]


@pytest.mark.parametrize("arch", ARCHES)
def test_a_race_between_warps(arch):
    x, out = torch.randn(256), torch.zeros(512)
    found = run(arch, lambda: kernels.reverse_kernel[(1,)](x, out, 256, False))
    assert any("a warp reads what another writes" in what for what in found), found
    assert not run(arch, lambda: kernels.reverse_kernel[(1,)](x, out, 256, True))
    assert torch.equal(out[256:], (x + 1).flip(0))


@pytest.mark.parametrize("arch", ARCHES)
def test_a_race_between_programs(arch):
    x, out = torch.randn(4, 64), torch.zeros(4 * 64 + 4)
    found = run(arch, lambda: kernels.neighbour_kernel[(4,)](x, out, 64, 1))
    assert any("program" in what and "another" in what for what in found), found
    assert not run(arch, lambda: kernels.neighbour_kernel[(4,)](x, out, 64, 0))
    torch.testing.assert_close(out[256:], x.sum(1))


def test_two_programs_that_write_to_one_address():
    assert "two programs write to one address" in run(
        90, lambda: kernels.same_address_kernel[(3,)](torch.ones(3), torch.zeros(1))
    )


@pytest.mark.parametrize("where", ["load", "store"])
def test_out_of_bounds(where):
    x, out = torch.randn(100), torch.zeros(100)
    short, long = (x, torch.zeros(128)) if where == "load" else (torch.zeros(128), out)
    with pytest.raises(EmulationError, match=r"out of bounds.*copy_kernel \(kernels.py:\d+\)"):
        run(90, lambda: kernels.copy_kernel[(1,)](short, long, 100, 128, False))
    assert not run(90, lambda: kernels.copy_kernel[(1,)](x, out, 100, 128, True))
    assert torch.equal(out, x)


def test_bounds_are_the_view_s():
    storage, out = torch.randn(128), torch.zeros(128)
    with pytest.raises(EmulationError, match="out of bounds"):
        run(90, lambda: kernels.copy_kernel[(1,)](storage[:100], out, 100, 128, False))


def test_misaligned():
    x, out = torch.randn(600), torch.zeros(512)
    with pytest.raises(EmulationError, match=r"misaligned.*shifted_kernel"):
        run(90, lambda: kernels.shifted_kernel[(1,)](x, out, 3, 512, True))
    assert not run(90, lambda: kernels.shifted_kernel[(1,)](x, out, 3, 512, False))
    assert torch.equal(out, x[3:515])


def test_memory_that_nobody_wrote():
    out = torch.zeros(64)
    with poisoned_outputs():
        empty = torch.empty(64)
    run(90, lambda: kernels.copy_kernel[(1,)](empty, out, 64, 64, False))
    assert out.isnan().all()


def _compiled(call):
    """Return the compiled kernel that a launch makes."""
    kept = []
    kernel_of = launch._kernel

    def keep(compiled, arch):
        kept.append(compiled)
        return kernel_of(compiled, arch)

    launch._kernel = keep
    try:
        run(90, call)
    finally:
        launch._kernel = kernel_of
    return kept[0]


def _run_edited(edit):
    """Run the sum kernel with its PTX edited, and return what is found, and the sum."""
    x, out = torch.arange(256.0), torch.zeros(1)
    compiled = _compiled(lambda: kernels.sum_kernel[(1,)](x, out, 256))
    assert out.item() == x.sum().item()
    out.zero_()
    ptx = edit(compiled.asm["ptx"])
    kernel = Kernel(ptx, compiled.metadata.num_warps * 32, compiled.metadata.shared)
    memory = GlobalMemory([x, out])
    found = kernel.launch((1, 1, 1), [memory.address(x), memory.address(out)], memory, EARLY)
    memory.copy_back()
    return [finding.what for finding in found], out.item()


def _without(word):
    return lambda ptx: "\n".join(line for line in ptx.splitlines() if word not in line)


def test_shared_memory_without_a_barrier():
    found, _ = _run_edited(_without("bar.sync"))
    assert any("without a barrier" in what for what in found), found
    assert _run_edited(lambda ptx: ptx) == ([], 256 * 255 / 2)


def test_shared_memory_that_nobody_wrote():
    _, total = _run_edited(_without("st.shared"))
    assert np.isnan(total)


def test_shared_memory_out_of_bounds():
    def far(ptx):
        return ptx.replace(", global_smem;", ", 65536;").replace("[global_smem]", "[global_smem+65536]")

    with pytest.raises(EmulationError, match="out of bounds: shared"):
        _run_edited(far)


def _dots(dtype, twice, arch, schedule, stages=3):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 256, generator=generator).to(dtype) for _ in range(2))
    out, squares = torch.zeros(64, 64), torch.zeros(64)
    found = run(
        arch,
        lambda: kernels.dots_kernel[(1,)](a, b, out, squares, 256, 64, 32, twice, num_stages=stages),
        schedule,
    )
    exact = a.double() @ b.double().T
    error = (out.double() - exact).abs().max().item() / exact.abs().max().item()
    torch.testing.assert_close(squares.double(), b.double().square().sum(1), rtol=1e-5, atol=0)
    return found, error


def test_a_copy_into_what_a_product_reads():
    """Triton issue 6691: a load that feeds a dot and something else gets a buffer too few."""
    found, error = _dots(torch.bfloat16, False, 90, EARLY)
    assert "overwrites what an asynchronous product still reads" in found
    assert error > 1e-2
    found, error = _dots(torch.bfloat16, False, 90, LATE)
    assert "overwrites what an asynchronous product still reads" in found  # whatever the schedule
    assert error < 1e-5


@pytest.mark.parametrize("schedule", [EARLY, LATE], ids=["early", "late"])
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_product_with_loads_of_its_own(dtype, arch, schedule):
    found, error = _dots(dtype, True, arch, schedule)
    assert not found
    assert error < 1e-5


def test_a_copy_that_is_not_waited_for():
    """A pipelined loop without its waits multiplies what has not come."""
    a = torch.randn(64, 256).bfloat16()
    out, squares = torch.zeros(64, 64), torch.zeros(64)
    compiled = _compiled(lambda: kernels.dots_kernel[(1,)](a, a, out, squares, 256, 64, 32, True, num_stages=3))
    kernel = Kernel(_without("cp.async.wait_group")(compiled.asm["ptx"]), 128, compiled.metadata.shared)
    memory = GlobalMemory([a, out, squares])
    arguments = [memory.address(tensor) for tensor in (a, a, out, squares)]
    found = kernel.launch((1, 1, 1), [*arguments, 256][: len(kernel.listing.parameters)], memory, LATE)
    assert any("asynchronous copy still fills" in finding.what for finding in found), found


def test_programs_that_part():
    numbers = torch.arange(1, 40, dtype=torch.int32)
    out = torch.zeros(39, dtype=torch.int32)
    assert not run(80, lambda: kernels.collatz_kernel[(39,)](numbers, out, 128))

    def steps(number):
        return 0 if number == 1 else 1 + steps(number // 2 if number % 2 == 0 else 3 * number + 1)

    assert out.tolist() == [steps(number) for number in range(1, 40)]


def test_approximations_at_their_worst():
    x, out = torch.linspace(-20, 20, 256), torch.zeros(256)
    exact = x.double().exp2()
    run(90, lambda: kernels.exponentials_kernel[(1,)](x, out, 256))
    assert ((out / exact - 1).abs() <= 2.0**-24).all()
    run(90, lambda: kernels.exponentials_kernel[(1,)](x, out, 256), Schedule())
    errors = out / exact - 1
    assert (errors.abs() <= 2.0**-22.5).all()
    assert (errors > 2.0**-22.7).any()
    assert (errors < -(2.0**-22.7)).any()


def test_a_division_at_its_worst():
    x, y = torch.rand(256) + 0.5, torch.rand(256) + 0.5
    out = torch.zeros(256)
    run(90, lambda: kernels.quotients_kernel[(1,)](x, y, out, 256), Schedule())
    exact = x.double() / y.double()
    units = (out - exact).abs() / torch.from_numpy(np.spacing(exact.float().numpy())).double()
    assert (units <= 2).all()
    assert (units > 1.5).any()


_PTX = """
.visible .entry one(
	.param .u64 .ptr .global .align 1 one_param_0,
	.param .u64 .ptr .global .align 1 one_param_1
)
{{
	.reg .pred 	%p<4>;
	.reg .b16 	%rs<8>;
	.reg .b32 	%r<16>;
	.reg .b64 	%rd<16>;
	ld.param.b64 	%rd1, [one_param_0];
	ld.param.b64 	%rd2, [one_param_1];
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd3, %r1, 16;
	add.s64 	%rd4, %rd1, %rd3;
	add.s64 	%rd5, %rd2, %rd3;
	ld.global.v2.b64 	{{%rd6, %rd7}}, [%rd4];
	cvt.u32.u64 	%r2, %rd6;
	cvt.u32.u64 	%r3, %rd7;
	mov.b64 	%rd8, 0;
	mov.b32 	%r4, 0;
	{instruction};
	{widen};
	st.global.b64 	[%rd5], %rd8;
	ret;
}}
"""
_A = np.array([0, 1, 2, 31, 33, 7, -1, -7, -2147483648, 2147483647, 0x3F800000, -1082130432] * 3, np.int64)[:32]
_B = np.roll(_A, 5)


def _as(values, dtype):
    return values.astype(np.int64).astype(dtype)


def _trunc_div(a, b):
    return np.where(b == 0, -1, np.trunc(a / np.where(b == 0, 1, b).astype(np.float64))).astype(np.int64)


_FIELD = (_as(_A, np.uint32) >> np.uint32(3)) & np.uint32(31)
_EXPECTED = {
    "add.s32 %r4, %r2, %r3": _as(_A, np.int32) + _as(_B, np.int32),
    "sub.s32 %r4, %r2, %r3": _as(_A, np.int32) - _as(_B, np.int32),
    "mul.lo.s32 %r4, %r2, %r3": _as(_A, np.int32) * _as(_B, np.int32),
    "mul.hi.u32 %r4, %r2, %r3": ((_as(_A, np.uint32).astype(np.uint64) * _as(_B, np.uint32)) >> np.uint64(32)),
    "mad.lo.s32 %r4, %r2, %r3, %r2": _as(_A, np.int32) * _as(_B, np.int32) + _as(_A, np.int32),
    "min.s32 %r4, %r2, %r3": np.minimum(_as(_A, np.int32), _as(_B, np.int32)),
    "max.u32 %r4, %r2, %r3": np.maximum(_as(_A, np.uint32), _as(_B, np.uint32)),
    "div.s32 %r4, %r2, 7": _trunc_div(_A, np.full(32, 7)),
    "rem.s32 %r4, %r2, 7": _A - 7 * _trunc_div(_A, np.full(32, 7)),
    "div.u32 %r4, %r2, 7": _as(_A, np.uint32) // np.uint32(7),
    "shl.b32 %r4, %r2, 33": np.zeros(32),
    "shr.u32 %r4, %r2, 3": _as(_A, np.uint32) >> np.uint32(3),
    "shr.s32 %r4, %r2, 40": _as(_A, np.int32) >> 31,
    "bfe.u32 %r4, %r2, 3, 5": _FIELD,
    "bfe.s32 %r4, %r2, 3, 5": np.where(_FIELD >= 16, _FIELD.astype(np.int64) - 32, _FIELD),
    "and.b32 %r4, %r2, %r3": _A & _B,
    "xor.b32 %r4, %r2, %r3": _A ^ _B,
    "not.b32 %r4, %r2": ~_A,
    "neg.s32 %r4, %r2": -_as(_A, np.int32),
    "abs.s32 %r4, %r2": np.abs(_as(_A, np.int32)),
    "prmt.b32 %r4, %r2, %r3, 0x0123": _as(_A, np.uint32).byteswap(),
    "popc.b32 %r4, %r2": [bin(value & 0xFFFFFFFF).count("1") for value in _A.tolist()],
    "setp.lt.s32 %p1, %r2, %r3; selp.b32 %r4, 1, 2, %p1": np.where(_A < _B, 1, 2),
    "setp.lt.u32 %p1, %r2, %r3; selp.b32 %r4, 1, 2, %p1": np.where(_as(_A, np.uint32) < _as(_B, np.uint32), 1, 2),
    "setp.eq.s32 %p1, %r2, 7; @%p1 mov.b32 %r4, 5": np.where(_A == 7, 5, 0),
    "setp.eq.s32 %p1, %r2, 7; @!%p1 mov.b32 %r4, 5": np.where(_A == 7, 0, 5),
    "cvt.rn.f32.s32 %r4, %r2": _A.astype(np.float32).view(np.uint32),
    "cvt.rzi.s32.f32 %r4, 0f40200000": np.full(32, 2),
    "cvt.rni.s32.f32 %r4, 0fC0200000": np.full(32, -2),
    "cvt.rzi.s32.f32 %r4, 0f7F800000": np.full(32, 2147483647),
    "cvt.rna.tf32.f32 %r4, 0f3F801000": np.full(32, 0x3F802000),
    "cvt.rn.bf16x2.f32 %r4, 0f3F800000, 0f40000000": np.full(32, 0x3F804000),
    "cvt.s64.s32 %rd8, %r2": _A,
    "cvt.u64.u32 %rd8, %r2": _as(_A, np.uint32).astype(np.int64),
    "mul.wide.s32 %rd8, %r2, %r3": _A * _B,
    "mad.wide.s32 %rd8, %r2, %r3, %rd6": _A * _B + _A,
    "fma.rn.f32 %r4, 0f40000000, 0f40400000, 0f3F800000": np.full(32, 0x40E00000),
    "fma.rn.bf16x2 %r4, 0x40004000, 0x40404040, 0x3F803F80": np.full(32, 0x40E040E0),
    "max.f32 %r4, 0f7FC00000, 0f3F800000": np.full(32, 0x3F800000),
    "setp.num.f32 %p1, 0f7FC00000, 0f3F800000; selp.b32 %r4, 1, 2, %p1": np.full(32, 2),
    "setp.neu.f32 %p1, 0f7FC00000, 0f3F800000; selp.b32 %r4, 1, 2, %p1": np.full(32, 1),
    "mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r4, {%rs2, %rs1}": [
        ((value & 0xFFFF) << 16 | (value >> 16 & 0xFFFF)) for value in _A.tolist()
    ],
    "shfl.sync.bfly.b32 %r4, %r2, 4, 31, -1": _A[np.arange(32) ^ 4],
    "shfl.sync.up.b32 %r4, %r2, 3, 0, -1": _A[np.where(np.arange(32) >= 3, np.arange(32) - 3, np.arange(32))],
    "shfl.sync.idx.b32 %r4, %r2, 9, 31, -1": _A[np.full(32, 9)],
    "redux.sync.add.s32 %r4, %r2, -1": np.full(32, _A.sum()),
    "redux.sync.max.s32 %r4, %r2, -1": np.full(32, _A.max()),
}


@pytest.mark.parametrize("instruction", _EXPECTED)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_instruction(instruction):
    wide = "%rd8" in instruction
    ptx = _PTX.format(instruction=instruction, widen="mov.b32 %r5, 0" if wide else "cvt.u64.u32 %rd8, %r4")
    inputs = torch.from_numpy(np.stack([_A, _B], 1).copy())
    out = torch.zeros(32, 2, dtype=torch.int64)
    memory = GlobalMemory([inputs, out])
    Kernel(ptx, 32, 0).launch((1, 1, 1), [memory.address(inputs), memory.address(out)], memory, EARLY)
    memory.copy_back()
    expected = np.asarray(_EXPECTED[instruction]).astype(np.int64)
    assert out[:, 0].tolist() == (expected if wide else expected & 0xFFFFFFFF).tolist()


def test_an_instruction_that_is_not_known():
    ptx = _PTX.format(instruction="atom.global.add.u32 %r4, [%rd5], %r2", widen="ret")
    with pytest.raises(NotImplementedError, match=r"one: atom\.global\.add"):
        Kernel(ptx, 32, 0)
