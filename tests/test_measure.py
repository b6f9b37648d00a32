"""Clocks: who takes a turn when, and what is left of an interrupted round."""

import pytest
import torch

from fastreduce import measure

CPU = torch.device("cpu")


def turns(rounds, fails=(), **options):
    """Let four calls take turns -> the order of their calls, and the seconds, 1, 2, 3 and so on."""
    order = []

    def call(name):
        def run():
            order.append(name)
            if len(order) in fails:
                raise RuntimeError(f"call {len(order)}")

        return run

    def clock(run, device):
        run()
        return float(len(order))

    calls = {name: call(name) for name in "abcd"}
    return order, lambda: measure.take_turns(calls, CPU, rounds, clock=clock, **options)


def test_every_second_round_is_backwards():
    order, run = turns(3)
    assert run() == {"a": [1, 8, 9], "b": [2, 7, 10], "c": [3, 6, 11], "d": [4, 5, 12]}
    assert "".join(order) == "abcddcbaabcd"


def test_ends_stay_where_they_are():
    order, run = turns(2, ends=True)
    run()
    assert "".join(order) == "abcdacbd"


def test_rounds_are_asked_for_one_by_one_and_told():
    asked, told = [], []
    order, run = turns(lambda done: asked.append(done) or done < 2, moved=told.append)
    run()
    assert asked == [0, 1, 2]
    assert len(order) == 8
    assert told == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]


def test_a_call_that_fails_takes_no_more_turns():
    failures = []
    order, run = turns(3, fails=(3,), failed=lambda name, error: failures.append((name, str(error))))
    assert run() == {"a": [1, 7, 8], "b": [2, 6, 9], "c": [], "d": [4, 5, 10]}
    assert failures == [("c", "call 3")]
    assert order.count("c") == 1


def test_an_interrupted_round_is_cut_away():
    seconds = {"of before": [1.0]}
    _, run = turns(3, fails=(6,), seconds=seconds)
    with pytest.raises(RuntimeError, match="call 6"):
        run()
    assert seconds == {"a": [1], "b": [2], "c": [3], "d": [4, 5]}
    measure.cut_to_whole_rounds(seconds)
    assert seconds == {"a": [1], "b": [2], "c": [3], "d": [4]}


def test_the_clock_is_looked_up_when_it_is_needed(monkeypatch):
    monkeypatch.setattr(measure, "seconds_of", lambda call, device: 7.0)
    assert measure.take_turns({"a": lambda: None}, CPU, 2) == {"a": [7.0, 7.0]}
    assert measure.processor_seconds_of(lambda: None, CPU) >= 0
