"""Microbenchmarks: every contender does the same work, and one that does not is not timed."""

import dataclasses
import functools

import pytest
import torch

from bench.microbenchmark import DIRECTIONS, Microbenchmark, copy_bandwidth, device_clock
from bench.primitives import Shape, disagreement, load_primitives, shaken
from bench.proof.operator_counts import OperatorCounts
from fastreduce import ops

PRIMITIVES = load_primitives()
CPU = torch.device("cpu")
SMALL = Shape("deit_tiny", 38, 2)
CASES = [(name, way) for name, value in PRIMITIVES.items() for way in DIRECTIONS if way == "forward" or value.gradients]


def contenders(name):
    return "fastreduce", "plain", *(who for who, other in PRIMITIVES[name].others.items() if other.on_cpu)


def public_primitives():
    return {name for name in ops.__all__ if not name.endswith(("_groups", "group_slots", "prepare_merge"))}


def test_every_primitive_is_described():
    described = {name for name in public_primitives() if any(key.startswith(name) for key in PRIMITIVES)}
    assert described == public_primitives()


@pytest.mark.parametrize(
    ("name", "direction", "contender"), [(*case, who) for case in CASES for who in contenders(case[0])]
)
def test_contenders_agree_with_float64(name, direction, contender):
    bench = Microbenchmark(PRIMITIVES[name], SMALL, CPU, direction)
    assert bench.parity(contender) is None


@pytest.mark.parametrize(("name", "direction"), CASES)
def test_the_floor_is_of_the_size_of_what_goes_in_and_out(name, direction):
    bench = Microbenchmark(PRIMITIVES[name], SMALL, CPU, direction)
    one, two = (
        Microbenchmark(PRIMITIVES[name], dataclasses.replace(SMALL, batch=batch), CPU, direction)
        .prepare("fastreduce")
        .floor
        for batch in (1, 2)
    )
    assert one < two <= 2 * one
    run = bench.prepare("fastreduce")
    assert run.floor >= sum(output.numel() * output.element_size() for output in run.once())


@pytest.mark.parametrize(("name", "direction"), CASES)
def test_a_wrong_contender_gets_no_time(name, direction):
    right = PRIMITIVES[name]

    def wrong(**arguments):
        return tuple(
            output * 1.001 if output.is_floating_point() else (output + 1) % 2 for output in right.call(**arguments)
        )

    bench = Microbenchmark(dataclasses.replace(right, call=wrong), SMALL, CPU, direction)
    bench.__dict__["_truth"] = Microbenchmark(right, SMALL, CPU, direction)._truth
    row = bench.measure("fastreduce", rounds=1)
    assert row["parity"]
    assert "seconds" not in row


class TestBudget:
    """Budgets: a result may be off from float64 by a few roundings, and by what float32 cannot tell apart."""

    EXACT = (torch.linspace(-1, 1, 64, dtype=torch.float64),)

    def _off(self, by):
        return tuple(one + by for one in self.EXACT)

    def test_errors_of_the_others_add_up(self):
        assert disagreement(self._off(3e-6), self.EXACT, (), 1e-6) is not None
        assert disagreement(self._off(3e-6), self.EXACT, (self._off(2.1e-6),), 1e-6) is None
        assert disagreement(self._off(3e-6), self.EXACT, (self._off(1e-6), self._off(1.1e-6)), 1e-6) is None
        assert disagreement(self._off(3.2e-6), self.EXACT, (self._off(1e-6), self._off(1.1e-6)), 1e-6) is not None
        assert disagreement(self._off(float("nan")), self.EXACT, (self._off(1.0),), 1.0) is not None

    def test_terms_that_cancel_leave_their_roundings(self):
        assert disagreement(self._off(3e-6), self.EXACT, (), 1e-6, floor=4.0) is None
        assert disagreement(self._off(5e-6), self.EXACT, (), 1e-6, floor=4.0) is not None
        assert disagreement(self._off(3e-6), self.EXACT, (), 4e-6, floor=0.1) is None  # never less than the largest

    def test_inputs_are_shaken_by_one_rounding_and_no_more(self):
        inputs = {"x": torch.randn(50), "index": torch.arange(3), "k": 4}
        first, second = shaken(inputs), shaken(inputs)
        relative = (first["x"] / inputs["x"].double() - 1).abs()
        torch.testing.assert_close(relative, torch.full_like(relative, 2**-23))
        assert (first["x"] > inputs["x"].double()).float().mean().item() == pytest.approx(0.5, abs=0.3)
        assert torch.equal(first["x"], second["x"])
        assert torch.equal(first["index"], inputs["index"])
        assert first["k"] == 4

    def test_a_kernel_that_rounds_its_inputs_passes_and_one_that_rounds_further_does_not(self):
        right = PRIMITIVES["attention_policy"]
        bench = Microbenchmark(right, SMALL, CPU, "backward")
        allowed = [
            max((one - exact).abs().max().item() for one, exact in zip(other, bench._truth[1], strict=True))
            for other in bench._truth[2]
        ]
        assert all(0 < one < 1e-4 for one in allowed)

        def rounded(step, **arguments):
            changed = {
                name: value * (1 + step) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
                for name, value in arguments.items()
            }
            return right.call(**changed)

        for step, passes in ((2**-23, True), (2**-15, False)):
            call = functools.partial(rounded, step)
            off = Microbenchmark(dataclasses.replace(right, call=call), SMALL, CPU, "backward")
            off.__dict__["_truth"] = bench._truth
            assert (off.parity("fastreduce") is None) == passes


def test_a_row_says_what_was_measured():
    row = Microbenchmark(PRIMITIVES["cls_scores"], SMALL, CPU, "forward").measure("fastreduce", rounds=3)
    assert row["parity"] is None
    assert row["floor_bytes"] == 4 * 2 * (3 * 64 * 38 + 3 * 64 + 37)
    assert row["gigabytes_per_second"] == pytest.approx(row["floor_bytes"] / row["seconds"] / 1e9)
    assert row["share_of_copy_bandwidth"] == pytest.approx(row["floor_bytes"] / row["seconds"] / copy_bandwidth(CPU))
    assert row["operators"] > 0
    assert row["peak_bytes"] >= 4 * 2 * 3 * 64 * 38  # the product


def test_only_what_does_work_counts_as_an_operator():
    x = torch.randn(3, 4)
    with OperatorCounts() as counted:
        (x.t()[1:] + 1).exp().t().unsqueeze(0)
    assert counted.counts == {"add": 1, "exp": 1}


def test_a_backward_pass_that_is_none_is_refused():
    with pytest.raises(ValueError, match="only decides"):
        Microbenchmark(PRIMITIVES["cls_value_scores"], SMALL, CPU, "backward")


def test_the_clock_runs():
    assert device_clock(CPU) < device_clock(CPU)
