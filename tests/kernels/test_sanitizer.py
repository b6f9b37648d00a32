"""Sanitizer: what watches over every other test here sees what it is there for."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def copy_kernel(source, target, loaded, stored, step, BLOCK: tl.constexpr):
    """Let program p copy elements p * step .. p * step + BLOCK, as many of all as are to be loaded and stored."""
    offsets = tl.program_id(0) * step + tl.arange(0, BLOCK)
    elements = tl.load(source + offsets, mask=offsets < loaded, other=0.0)
    tl.store(target + offsets, elements, mask=offsets < stored)


@triton.jit
def sum_kernel(source, target, size, BLOCK: tl.constexpr):
    """Sum; what its masked lanes load is undefined."""
    offsets = tl.arange(0, BLOCK)
    tl.store(target, tl.sum(tl.load(source + offsets, mask=offsets < size)))


def copy(source, target, programs=2, loaded=8, stored=8, step=4):
    copy_kernel[(programs,)](source, target, loaded, stored, step, BLOCK=4)
    return target


def test_nothing_to_find():
    numbers = torch.arange(8.0)
    assert torch.equal(copy(numbers, torch.empty(8)), numbers)
    copy(numbers, torch.empty(8), stored=0)


def test_addresses_out_of_bounds():
    numbers = torch.arange(12.0)
    with pytest.raises(Exception, match="load: 1 of 1 addresses out of bounds in program"):
        copy(numbers[:8], torch.empty(8), programs=3, loaded=9)  # of the view, not of its storage
    with pytest.raises(Exception, match="store: 1 of 1 addresses out of bounds in program"):
        copy(numbers[:8], torch.empty(8), programs=3, stored=9)


def test_two_programs_store_one_address():
    with pytest.raises(Exception, match="write race: 2 addresses"):
        copy(torch.arange(8.0), torch.empty(8), step=2)


def test_a_program_reads_what_another_stores():
    numbers = torch.arange(12.0)
    with pytest.raises(Exception, match="reads an address that another program writes"):
        copy(numbers[:8], numbers[4:])


def test_undefined_lanes():
    target = torch.zeros(1)
    sum_kernel[(1,)](torch.ones(4), target, 3, BLOCK=4)
    assert target.isnan()
