"""Repeated launches, executed: the same bits as by the launcher itself, for other tensors of the same kind."""

import pytest
import torch

from bench.proof.emulator import poisoned_outputs
from fastreduce import ops
from fastreduce.kernels import _direct, _repeat
from tests.emulated.device import emulated_gpu
from tests.helpers.operators import CASES, as_arguments, flat


@pytest.fixture
def gpu(monkeypatch):
    with emulated_gpu(monkeypatch, 90) as found:
        yield found
    found.emulation.check()


@pytest.fixture
def by_python(monkeypatch):
    """Count the launches that went through a launcher."""
    found, launch = [], _direct._Direct._launch

    def noted(self, *args, **options):
        found.append(self.__name__)
        return launch(self, *args, **options)

    monkeypatch.setattr(_direct._Direct, "_launch", noted)
    return found


def by_launchers(call, arguments):
    """Return the results without anything repeated, out of poisoned memory."""
    repeated = _repeat.Repeated.__call__
    _repeat.Repeated.__call__ = lambda self, *args: self.launcher(*args)
    try:
        with poisoned_outputs():
            return call(arguments)
    finally:
        _repeat.Repeated.__call__ = repeated


def same_bits(call, turns):
    """Call for the arguments of every turn, and hold the results against the launchers'."""
    for arguments in turns:
        for ours, theirs in zip(call(arguments), by_launchers(call, arguments), strict=True):
            assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def other_values(values, turn):
    """Return arguments of the same kind with other numbers in them, in another order."""
    found = {}
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value = value.flatten().roll(turn).view(value.shape) * (1 + turn / 4)
        elif isinstance(value, torch.Tensor) and value.dtype == torch.int64:
            value = value.roll(turn, 0)
        found[name] = value
    return found


def operator(case, training):
    """Return a call of an operator that gives its results, and the gradients of its arguments."""

    def call(values):
        values = dict(values)
        wanted = [name for name in case.differentiable if training and values[name] is not None]
        for name in wanted:
            values[name] = values[name].clone().requires_grad_()
        results = flat(getattr(ops, case.operator)(**as_arguments(values), backend="triton"))
        rows = [one for one in results if one.requires_grad]
        if not rows:
            return results
        upstream = [torch.linspace(-1, 1, one.numel(), dtype=one.dtype).view(one.shape) for one in rows]
        grads = torch.autograd.grad(rows, [values[name] for name in wanted], upstream, allow_unused=True)
        return [*(one.detach() for one in results), *(one for one in grads if one is not None)]

    return call


_WAYS = [
    (name, training) for name, case in CASES.items() for training in ([False, True][: 1 + bool(case.differentiable)])
]


@pytest.mark.parametrize(
    ("name", "training"),
    [pytest.param(*way, marks=[pytest.mark.slow] if turn % 4 else []) for turn, way in enumerate(_WAYS)],
)
def test_repeated_calls_compute_the_same(gpu, monkeypatch, name, training):
    repeats, repeat = [], _repeat._Plan.repeat
    monkeypatch.setattr(_repeat._Plan, "repeat", lambda *given: repeats.append(1) or repeat(*given))
    values = CASES[name].arguments(2, 2, 9, 16, dtype=torch.bfloat16)
    same_bits(operator(CASES[name], training), [other_values(values, turn) for turn in range(4)])
    assert len(repeats) >= 2 or "members" in name  # the reference's, on every device


def test_views_that_are_less_aligned(gpu, by_python):
    """A key apart: what was compiled for 16 bytes would read at the wrong width."""
    room, index = torch.randn(2 * 9 * 16 + 4), torch.tensor([[0, 5], [7, 2]])
    turns = [{"x": room[first : first + 2 * 9 * 16].view(2, 9, 16)} for first in (0, 4, 1, 2, 0, 4, 1, 2) * 3]
    same_bits(lambda values: flat(ops.gather_tokens(**values, index=index, backend="triton")), turns)
    del by_python[:]
    ops.gather_tokens(turns[2]["x"], index, backend="triton")
    assert not by_python


def test_parts_of_one_tensor_after_tensors_of_their_own(gpu, by_python):
    def packed():
        return dict(zip("qkv", torch.randn(2, 9, 3, 2, 16).permute(2, 0, 3, 1, 4), strict=True))

    def apart():
        return {name: torch.randn(2, 9, 6, 16)[:, :, :2].transpose(1, 2) for name in "qkv"}

    def one():
        tensor = torch.randn(2, 9, 6, 16)[:, :, :2].transpose(1, 2)
        return dict.fromkeys("qkv", tensor)

    turns = [make() for make in (one, one, apart, packed, one, apart, packed)]
    assert len({values["k"].stride() for values in turns}) == 1
    same_bits(lambda values: flat(ops.received_scores(values["q"], values["k"], backend="triton")), turns)
    del by_python[:]
    ops.received_scores(turns[2]["q"], turns[2]["k"], backend="triton")
    assert not by_python
