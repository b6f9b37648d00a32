"""The gates find buffers overwritten while an asynchronous dot may still read them, and dots made to wait."""

import os

import pytest
import torch
import triton
import triton.language as tl

from bench.compile_report import _Gates
from bench.proof.buffers import overwritten
from bench.proof.compiler import compiled_for

BUFFERS = "!ttg.memdesc<{n}x64x64xf16, #shared, #smem, mutable>"
# A loop as the pipeline leaves it: a copy two steps ahead, a product that the next step waits for.
LOOP = """
module attributes {{ttg.target = "cuda:90"}} {{
  tt.func public @planted(%x: !tt.ptr<f16> loc("x"(#loc)), %n: i32 loc("n"(#loc))) attributes {{noinline = false}} {{
    %c0_i32 = arith.constant 0 : i32 loc(#loc1)
    %c1_i32 = arith.constant 1 : i32 loc(#loc1)
    %n_i32 = arith.constant {n} : i32 loc(#loc1)
    %start = arith.constant {start} : i32 loc(#loc1)
    %c-1_i32 = arith.constant -1 : i32 loc(#loc1)
    %a = ttg.local_alloc : () -> {buffers} loc(#loc2)
    %0:3 = scf.for %i = %c0_i32 to %n step %c1_i32 iter_args(%acc = %zero, %into = %start, %of = %c-1_i32) -> (f32) {{
      %1 = arith.addi %of, %c1_i32 : i32 loc(#loc3)
      %2 = arith.cmpi sge, %1, %n_i32 : i32 loc(#loc3)
      %3 = arith.select %2, %c0_i32, %1 : i32 loc(#loc3)
      %4 = ttg.memdesc_index %a[%3] : {buffers} -> !ttg.memdesc<64x64xf16> loc(#loc3)
      %5 = ttg.memdesc_trans %4 {{order = array<i32: 1, 0>}} : !ttg.memdesc<64x64xf16> loc(callsite(#loc1 at #loc4))
      %6 = ttng.warp_group_dot %4, %5, %acc {{isAsync = {dot}}} : tensor<64x64xf32> loc(#loc3)
      {early}
      %8 = arith.addi %into, %c1_i32 : i32 loc(#loc3)
      %9 = arith.cmpi sge, %8, %n_i32 : i32 loc(#loc3)
      %10 = arith.select %9, %c0_i32, %8 : i32 loc(#loc3)
      %11 = ttg.memdesc_index %a[%10] : {buffers} -> !ttg.memdesc<64x64xf16> loc(#loc3)
      %12 = ttg.async_copy_global_to_local %x, %11 mask %m other %z : tensor<64x64x!tt.ptr<f16>> loc(#loc3)
      {late}
      scf.yield %6, %10, %3 : f32, i32, i32 loc(#loc3)
    }} loc(#loc3)
    %13 = ttng.warp_group_dot_wait %0#0 {{pendings = 0 : i32}} : f32 loc(#loc3)
    tt.return loc(#loc1)
  }} loc(#loc)
}} loc(#loc)
"""


def wait(pendings):
    return f"%7 = ttng.warp_group_dot_wait %6 {{pendings = {pendings} : i32}} : f32 loc(#loc3)"


def loop(n, ahead, *, early="", late="", dot="true"):
    return LOOP.format(n=n, start=ahead - 1, early=early, late=late, dot=dot, buffers=BUFFERS.format(n=n))


@pytest.mark.parametrize(
    ("ttgir", "expected"),
    [
        (loop(3, 2, early=wait(1)), 0),  # as it should be: the copy goes where the product before was
        (loop(2, 2, early=wait(1)), 1),  # one buffer too few: into what this step's product reads
        (loop(2, 2, early=wait(0)), 0),  # which is over by then
        (loop(2, 2, dot="false"), 0),
        (loop(3, 2, late=wait(1)), 1),  # the product before may still read when the copy is made
        (loop(4, 2, late=wait(1)), 0),
        (loop(4, 2, late=wait(3)), 1),
        (loop(8, 7, early=wait(1)), 0),
        (loop(7, 7, early=wait(1)), 1),
    ],
)
def test_a_loop(ttgir, expected):
    assert len(overwritten(ttgir)) == expected


def test_the_line_names_copy_buffer_and_dot():
    assert overwritten(loop(2, 2, early=wait(1))) == ["ttg.async_copy_global_to_local into %a while %6 may read it"]


def test_a_buffer_that_is_not_known_may_be_any():
    text = loop(3, 2, early=wait(1)).replace("%a[%10]", "%a[%n]")
    assert overwritten(text)


def test_both_sides_of_a_condition_are_walked():
    text = loop(2, 2, early=wait(1))
    line = next(line for line in text.splitlines() if "async_copy" in line)
    inside = f"      scf.if %c {{\n        %x1 = arith.constant 1 : i32\n      }} else {{\n  {line}\n      }}"
    assert len(overwritten(text.replace(line, inside))) == 1


@triton.jit
def planted_kernel(x, out, channels, stride, TWICE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """Compute squared distances of rows of one tile; the idiom of the upstream issue, or with a load of its own."""
    rows = x + tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, BLOCK_C)[None, :]
    others = rows + BLOCK * stride
    dots = tl.zeros((BLOCK, BLOCK), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, channels, BLOCK_C):
        a = tl.load(rows + start)
        b = tl.load(others + start)
        summed = b
        if TWICE:
            summed = tl.load(others + start, cache_modifier=".ca")
        squares += tl.sum(summed.to(tl.float32) * summed.to(tl.float32), 1)
        dots = tl.dot(a, tl.trans(b), dots)
    targets = out + tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(targets, squares[None, :] - 2.0 * dots)


def planted(arch, *, twice, dtype=torch.float16):
    x, out = torch.zeros(128, 256, dtype=dtype), torch.zeros(64, 64)
    with compiled_for(arch) as reports:
        planted_kernel[(1,)](x, out, 256, 256, TWICE=twice, BLOCK=64, BLOCK_C=64, num_warps=8, num_stages=3)
    return reports[0]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreting process cannot compile")
def test_the_gate_finds_the_idiom():
    """If this fails because nothing is overwritten, Triton has mended its issue 6691."""
    report = planted(90, twice=False)
    assert report.overwrites == 1
    gates = _Gates()
    assert gates.check("planted_kernel", report) == "MISSED"
    assert gates.overwrites.failures() == [
        "buffers overwritten under an asynchronous dot: planted_kernel has 1, at most 0 is allowed"
    ]
    for other in (planted(90, twice=True), planted(80, twice=False)):
        assert other.overwrites == 0
        assert _Gates().check("planted_kernel", other) == "ok"


@triton.jit
def two_steps_kernel(x, out, count, SURE: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply tiles in a loop, scale what came of it, and add one product more."""
    rows = x + tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    first = tl.load(rows)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    if SURE:
        tl.assume(count > 0)
    for step in range(0, count):
        tile = tl.load(rows + step * BLOCK * BLOCK)
        weight = tl.exp2(tl.dot(first, tl.trans(tile)))
        acc = tl.dot(weight.to(tile.dtype), tile, acc * 0.5)
    tile = tl.load(rows + count * BLOCK * BLOCK)
    acc = tl.dot(first, tile, acc * 0.5)
    targets = out + tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(targets, acc)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreting process cannot compile")
def test_the_gate_finds_products_that_wait():
    """A loop that may be skipped, and a product behind it: the assembler takes the skipped loop's zeros for a use."""
    x, out = torch.zeros(4 * 64, 64, dtype=torch.float16), torch.zeros(64, 64)
    for arch, sure, expected in ((90, False, True), (90, True, False), (80, False, False)):
        with compiled_for(arch) as reports:
            two_steps_kernel[(1,)](x, out, 3, SURE=sure, BLOCK=64, num_warps=4, num_stages=2)
        assert reports[0].serial == expected
        assert _Gates().check("two_steps_kernel", reports[0]) == ("MISSED" if expected else "ok")
