"""Any number of images: no launch asks for a longer second or third axis than a GPU has, whatever the batch."""

import os

import pytest
import torch

from bench.primitives import Shape, differentiate, load_primitives
from fastreduce import ops
from fastreduce.kernels import _launch

MOST = 7  # for 65,535: larger than the other axes of these shapes
IMAGES = 2 * MOST + 3

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreting process has no launches to look at"
)


@pytest.fixture
def grids(monkeypatch):
    """Note kernel and grid of every launch; nothing is compiled or run."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from bench.proof.compiler import CompileOnlyDriver, dispatch_to_triton

    seen = []

    def launch(self, *args, grid, warmup, **kwargs):
        seen.append((self.__name__, tuple(grid)))

    monkeypatch.setattr(JITFunction, "run", launch)
    monkeypatch.setattr(_launch, "MOST_IMAGES", MOST)
    monkeypatch.setattr(driver, "_active", CompileOnlyDriver(90))
    with dispatch_to_triton():
        yield seen


def check(grids):
    assert grids
    for name, grid in grids:
        assert max(grid[1:], default=0) <= MOST, f"{name}: {grid}"
        assert min(grid) > 0, f"{name}: {grid}"


def test_the_limit():
    assert _launch.MOST_IMAGES == 65_535


@pytest.mark.parametrize("name", load_primitives())
@pytest.mark.parametrize("batch", [IMAGES, MOST])
def test_primitives(name, batch, grids):
    primitive = load_primitives()[name]
    inputs = primitive.make(Shape("deit_tiny", 6, batch, torch.float16), torch.Generator().manual_seed(0))

    def call(arguments):
        return primitive.call(**arguments, backend="triton")

    outputs = call(inputs)
    check(grids)
    launches = len(grids)
    if primitive.gradients:
        backward, _ = differentiate(call, inputs, primitive.gradients)
        backward()
        check(grids)
    plain = primitive.call(**inputs, backend="reference")
    assert [output.shape for output in outputs] == [output.shape for output in plain]
    images = [grid for kernel, grid in grids[:launches] if len(grid) > 1 and not kernel.endswith("_packed_kernel")]
    if batch == IMAGES and images:
        assert any(MOST in grid[1:] for grid in images), "the case does not reach the limit"


@pytest.mark.parametrize("chosen", [False, True])
def test_packed_attention(chosen, grids):
    qkv = [torch.zeros(1, 3, 5 * IMAGES, 64, dtype=torch.float16, requires_grad=True) for _ in range(3)]
    offsets = torch.arange(0, 5 * IMAGES + 1, 5, dtype=torch.int32)
    index = torch.zeros(IMAGES, 2, dtype=torch.int64) if chosen else None
    queries = torch.arange(0, 3 * IMAGES + 1, 3, dtype=torch.int32) if chosen else offsets
    options = {"index": index, "prefix": 1, "num_out": 3 * IMAGES} if chosen else {}
    out = ops.attention_packed(
        *qkv, offsets=(queries, offsets), longest=(3 if chosen else 5, 5), backend="triton", **options
    )
    out.sum().backward()
    check(grids)
    assert [grid[2] for name, grid in grids if name == "attention_kernel"] == [MOST, MOST, 3]
    assert [grid[2] for name, grid in grids if name == "grad_queries_kernel"] == [MOST, MOST, 3]
