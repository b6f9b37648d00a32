"""Kernels that Triton has compiled are launched without it, with the arguments that it would have passed."""

import importlib
import pkgutil

import pytest
import torch
from triton import knobs
from triton.runtime.jit import JITFunction

from bench.proof import idle
from bench.proof.compiler import compiled_for
from fastreduce import ops
from fastreduce.kernels import _direct, gather_tokens, select_topk
from fastreduce.kernels._launch import Tile, row_tile
from fastreduce.ops import unchecked
from tests.compiled.launches import noting
from tests.helpers.operators import CASES, as_arguments


@pytest.fixture
def launches(monkeypatch):
    with noting(monkeypatch) as found:
        yield found


@pytest.fixture
def by_triton(monkeypatch):
    """Count how often Triton itself launches."""
    count = []
    first = _direct._Direct._first_launch

    def counted(self, *args):
        count.append(self.__name__)
        return first(self, *args)

    monkeypatch.setattr(_direct._Direct, "_first_launch", counted)
    return count


X, INDEX = torch.randn(2, 9, 16), torch.zeros(2, 4, dtype=torch.int64)
KERNEL = "gather_tokens_kernel"


def gather(x=X, index=INDEX, **options):
    return ops.gather_tokens(x, index, **options, backend="triton")


def test_the_second_launch_passes_what_the_first_did(launches, by_triton):
    kernel = gather_tokens.gather_tokens_kernel
    out = torch.empty(2, 5, 16)
    strides = X.stride()[:2], INDEX.stride(), (0, 0)
    for _ in range(3):
        kernel[(1, 2)](
            X, INDEX, None, out, None, None, None, None, 5, 16, *strides,
            NORM_EPS=None, PREFIX=1, ROWS=8, BLOCK_C=16, num_warps=4,
        )  # fmt: skip
    assert by_triton == [KERNEL]
    assert len(launches) == 3
    assert launches[0] == launches[1] == launches[2]
    grid, arguments = launches[0].grid, launches[0].arguments
    assert grid == (1, 2, 1)
    assert arguments[:4] == (X.data_ptr(), INDEX.data_ptr(), None, out.data_ptr())
    assert arguments[-4:] == (None, 1, 8, 16)
    assert len(arguments) == len(kernel.arg_names)


@pytest.mark.parametrize(
    "change",
    [
        {"x": X.half()},
        {"index": INDEX.int()},
        {"x": torch.randn(2 * 9 * 16 + 1)[1:].view(2, 9, 16)},  # not aligned to 16 bytes
        {"x": torch.randn(2, 9, 15)},
        {"x": torch.randn(2, 8, 16)},
        {"residual": torch.randn(2, 5, 16)},
        {"prefix": 0},
    ],
    ids=["dtype", "index", "alignment", "channels", "tokens", "residual", "constant"],
)
def test_whatever_triton_specialises_by_goes_to_triton_again(launches, by_triton, change):
    gather()
    gather()
    assert by_triton == [KERNEL]
    gather(**change)
    gather(**change)
    assert by_triton == [KERNEL] * 2
    gather()
    assert by_triton == [KERNEL] * 2
    assert len(launches) == 5


def test_one_and_true_and_one_point_zero_are_three_things(launches):
    """Equal and of one hash, but Triton compiles them apart."""
    kernel = _direct._Direct(gather_tokens.gather_tokens_kernel.kernel)
    seen = []
    kernel._first_launch = lambda key, *others: seen.append(key)
    for value in (1, True, 1.0):
        kernel[(1,)](value, CONSTANT=0)
        kernel[(1,)](0, CONSTANT=value)
        kernel[(1,)]((value, 2), CONSTANT=0)
    assert len(set(seen)) == 9


def test_tensors_in_a_tuple_are_left_to_triton(launches, monkeypatch):
    """An address within is neither in the key nor in the record."""
    seen = []

    def run(self, *args, **options):
        seen.append(args)

    run.__module__ = JITFunction.__module__  # no harness
    monkeypatch.setattr(JITFunction, "run", run)
    kernel = _direct._Direct(gather_tokens.gather_tokens_kernel.kernel)
    record = []
    with _direct.recording(record):
        for _ in range(3):
            kernel[(1,)]((X, 1), CONSTANT=0)
    assert len(seen) == 3
    assert not kernel.kept
    assert [one.run for one in record] == [None] * 3


def test_hooks_of_a_profiler_see_every_launch(launches, by_triton):
    gather()
    seen = []
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        gather()
        gather()
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    gather()
    assert by_triton == [KERNEL] * 3
    assert len(launches) == 4


def test_a_harness_that_replaces_triton_sees_every_launch(launches, monkeypatch):
    gather()
    seen = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: seen.append(self))
    gather()
    gather()
    assert len(seen) == 2
    assert len(launches) == 1


def test_another_driver_has_kernels_of_its_own(launches, by_triton):
    gather()
    with idle.idle_driver():
        gather()
        gather()
    assert by_triton == [KERNEL] * 2


def test_what_is_kept_is_bounded(launches, by_triton, monkeypatch):
    monkeypatch.setattr(_direct, "_MOST_KEPT", 2)
    for tokens in (8, 9, 10, 11):
        gather(torch.randn(2, tokens, 16))
    assert len(gather_tokens.gather_tokens_kernel.kept) <= 2


def test_triton_attributes_are_at_hand():
    kernel = gather_tokens.gather_tokens_kernel
    assert kernel.__name__ == KERNEL
    assert kernel.arg_names[0] == "x"


@pytest.mark.parametrize("name", ["gather_tokens_norm", "select_topk", "merge_tokens", "attention of chosen queries"])
def test_checked_and_unchecked_launch_the_same(launches, name):
    case = CASES[name]
    values = as_arguments(case.arguments(dtype=torch.float32))
    getattr(ops, case.operator)(**values, backend="triton")
    first = [one.grid for one in launches]
    getattr(unchecked, case.operator)(**values, backend="triton")
    assert [one.grid for one in launches] == first * 2


@pytest.mark.parametrize(("a", "b"), [(0, 4), (1, 4), (4, 4), (5, 4), (197, 16)])
def test_arithmetic_is_triton_s(a, b):
    import triton

    assert _direct.cdiv(a, b) == triton.cdiv(a, b)
    assert _direct.next_power_of_2(max(1, a)) == triton.next_power_of_2(max(1, a))


def test_a_tile_cannot_be_changed():
    tile = row_tile(384)
    with pytest.raises(TypeError, match="other launches use it"):
        tile["ROWS"] = 1
    assert Tile(tile, num_warps=8) == {**tile, "num_warps": 8}
    assert row_tile(384)["num_warps"] == 4


@pytest.mark.parametrize(("target", "passed"), [(90, True), ("gfx942", False)])
def test_registers_are_limited_on_nvidia_only(monkeypatch, target, passed):
    seen = []
    with compiled_for(target), monkeypatch.context() as replaced:
        replaced.setattr(JITFunction, "run", lambda self, *args, **options: seen.append("maxnreg" in options))
        select_topk.sort_scores_kernel[(1,)](X[0], X[0], 9, 3, (16, 1), BLOCK=32, num_warps=1, maxnreg=255)
    assert seen == [passed]


def test_every_kernel_is_launched_directly():
    """A kernel that is not would be missing from what a launcher is repeated by."""
    from fastreduce import kernels

    launched = {}
    for module in pkgutil.iter_modules(kernels.__path__):
        found = vars(importlib.import_module(f"fastreduce.kernels.{module.name}"))
        launched |= {name: one for name, one in found.items() if name.endswith("_kernel")}
    assert len(launched) > 30
    assert [name for name, one in launched.items() if not isinstance(one, _direct._Direct)] == []
