"""Kernels with a planted fault each, and the same without it."""

import triton
import triton.language as tl


@triton.jit
def reverse_kernel(x, out, N: tl.constexpr, BARRIER: tl.constexpr):
    """Write a row, then read it backwards: other threads' numbers."""
    offsets = tl.arange(0, N)
    tl.store(out + offsets, tl.load(x + offsets) + 1.0)
    if BARRIER:
        tl.debug_barrier()
    tl.store(out + N + offsets, tl.load(out + (N - 1 - offsets)))


@triton.jit
def neighbour_kernel(x, out, N: tl.constexpr, AHEAD: tl.constexpr):
    """Write a row, then add the row of another program, or one's own."""
    row = tl.program_id(0)
    offsets = tl.arange(0, N)
    tl.store(out + row * N + offsets, tl.load(x + row * N + offsets))
    tl.debug_barrier()
    other = (row + AHEAD) % tl.num_programs(0)
    total = tl.sum(tl.load(out + other * N + offsets), 0)
    tl.store(out + tl.num_programs(0) * N + row, total)


@triton.jit
def same_address_kernel(x, out):
    """Write to the first number, every program."""
    tl.store(out, tl.load(x + tl.program_id(0)))


@triton.jit
def copy_kernel(x, out, size, N: tl.constexpr, MASKED: tl.constexpr):
    """Copy ``size`` numbers, or N."""
    offsets = tl.arange(0, N)
    inside = offsets < (size if MASKED else N)
    tl.store(out + offsets, tl.load(x + offsets, mask=inside, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["start"])
def shifted_kernel(x, out, start, N: tl.constexpr, LIE: tl.constexpr):
    """Copy from ``start`` on, which may be said to be a multiple of 16."""
    offsets = tl.arange(0, N)
    source = start + offsets
    if LIE:
        source = tl.max_contiguous(tl.multiple_of(source, 16), N)
    tl.store(out + offsets, tl.load(x + source))


@triton.jit
def dots_kernel(a, b, out, squares, size, N: tl.constexpr, BLOCK: tl.constexpr, TWICE: tl.constexpr):
    """Multiply (N, size) by (N, size), and sum the squares of b: of the load of the dot, or of one of its own."""
    rows = tl.arange(0, N)
    acc = tl.zeros((N, N), tl.float32)
    total = tl.zeros((N,), tl.float32)
    for start in range(0, size, BLOCK):
        offsets = rows[:, None] * size + start + tl.arange(0, BLOCK)[None, :]
        left = tl.load(a + offsets)
        right = tl.load(b + offsets)
        if TWICE:
            again = tl.load(b + offsets, cache_modifier=".ca").to(tl.float32)
        else:
            again = right.to(tl.float32)
        total += tl.sum(again * again, 1)
        acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee")
    tl.store(out + rows[:, None] * N + rows[None, :], acc)
    tl.store(squares + rows, total)


@triton.jit
def collatz_kernel(x, out, N: tl.constexpr):
    """Count the steps to 1, a program for each number: programs go round their loop a different number of times."""
    number = tl.load(x + tl.program_id(0))
    steps = 0
    while number != 1:
        number = tl.where(number % 2 == 0, number // 2, 3 * number + 1)
        steps += 1
    lanes = tl.arange(0, N)
    tl.store(out + tl.program_id(0), tl.sum(lanes * 0 + steps, 0) // N)


@triton.jit
def exponentials_kernel(x, out, N: tl.constexpr):
    """Take 2 to the power of N numbers."""
    offsets = tl.arange(0, N)
    tl.store(out + offsets, tl.exp2(tl.load(x + offsets)))


@triton.jit
def sum_kernel(x, out, N: tl.constexpr):
    """Add N numbers up, through shared memory."""
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, N)), 0))


@triton.jit
def quotients_kernel(x, y, out, N: tl.constexpr):
    """Divide N numbers by N others."""
    offsets = tl.arange(0, N)
    tl.store(out + offsets, tl.load(x + offsets) / tl.load(y + offsets))
