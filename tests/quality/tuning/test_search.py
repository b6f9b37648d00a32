"""The search finds what trying every schedule finds."""

import itertools

import numpy as np
import pytest

from fastreduce.quality.tuning.search import Schedule, count_levels, fastest_within, front_of, pareto_rows

COUNTS = (16, 12, 8, 4)
DEPTH = 4


def _tables(seed):
    """Make times and losses that follow no pattern, so that no greedy search would find the front."""
    generator = np.random.default_rng(seed)
    stage = generator.uniform(0.7, 1.3, (17, 17)) * np.arange(17)[:, None]
    lost = generator.uniform(0.0, 1.0, (DEPTH, 17, 17)) * np.arange(17)[:, None]
    plain = generator.uniform(0.7, 1.3, (17, 2)) * np.arange(17)[:, None]
    return (
        lambda count, reduced: plain[count, int(reduced)],
        lambda before, after: stage[before, after],
        lambda block, before, after: lost[block, before, after],
    )


def _every_schedule(block, stage, lost, fixed, allowed):
    found = []
    for path in itertools.product(COUNTS, repeat=DEPTH):
        seconds, loss, before, at, keep = fixed, 0.0, COUNTS[0], [], []
        for index, after in enumerate(path):
            if after > before or (after < before and not allowed(before, after)):
                break
            if after < before:
                seconds, loss = seconds + stage(before, after), loss + lost(index, before, after)
                at.append(index)
                keep.append(after)
            else:
                seconds += block(before, before < COUNTS[0])
            before = after
        else:
            found.append(Schedule(tuple(at), tuple(keep), seconds, loss))
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("half", [False, True])
def test_front_is_that_of_all_schedules(seed, half, monkeypatch):
    monkeypatch.setattr("fastreduce.quality.tuning.search._STEPS", 10**9)
    block, stage, lost = _tables(seed)

    def allowed(before, after):
        return not half or 2 * after >= before

    every = _every_schedule(block, stage, lost, 0.25, allowed)
    rows = pareto_rows(np.array([one.seconds for one in every]), np.array([one.loss for one in every]))
    found = front_of(DEPTH, COUNTS, block, stage, lost, fixed_seconds=0.25, allowed=allowed)
    assert len(found) == len(rows) >= 3
    for one, row in zip(found, rows, strict=True):
        assert (one.at, one.keep) == (every[row].at, every[row].keep)
        assert one.seconds == pytest.approx(every[row].seconds)
        assert one.loss == pytest.approx(every[row].loss)
    assert min(found, key=lambda one: one.loss).loss == 0


def test_no_stage_stands_where_its_loss_is_infinite(monkeypatch):
    """A schedule with such a stage is none: the front is that of all others."""
    monkeypatch.setattr("fastreduce.quality.tuning.search._STEPS", 10**9)
    block, stage, lost = _tables(2)

    def first_is_none(index, before, after):
        return np.inf if index == 0 else lost(index, before, after)

    every = [one for one in _every_schedule(block, stage, lost, 0.25, lambda *_: True) if 0 not in one.at]
    rows = pareto_rows(np.array([one.seconds for one in every]), np.array([one.loss for one in every]))
    found = front_of(DEPTH, COUNTS, block, stage, first_is_none, fixed_seconds=0.25)
    assert [(one.at, one.keep) for one in found] == [(every[row].at, every[row].keep) for row in rows]


def test_steps_of_time_cost_no_more_than_a_step_a_block():
    block, stage, lost = _tables(7)
    exact = _every_schedule(block, stage, lost, 0.0, lambda before, after: True)
    found = front_of(DEPTH, COUNTS, block, stage, lost)
    slack = DEPTH * DEPTH * block(COUNTS[0], False) / 400
    for one in found:
        rival = min((other.loss for other in exact if other.seconds <= one.seconds - slack), default=np.inf)
        assert one.loss <= rival + 1e-12


def test_a_step_in_time_is_used():
    """The largest is taken of counts that cost the same, and the stage stands where it loses least."""
    seconds = {16: 4.0, 12: 2.0, 8: 2.0, 4: 1.0}
    found = front_of(
        3,
        COUNTS,
        lambda count, reduced: seconds[count],
        lambda before, after: seconds[before],
        lambda block, before, after: (before - after) / 10 + (0.5 if block == 0 else 0.0),
    )
    within = fastest_within(found, seconds=10.0)
    assert (within.at, within.keep, within.seconds) == ((1,), (12,), 10.0)
    assert fastest_within(found, loss=0.0).at == ()
    fastest = fastest_within(found, loss=10.0)
    assert (fastest.at, fastest.keep, fastest.seconds) == ((0,), (4,), 6.0)


def test_counts_told_apart():
    assert count_levels(256, 8) == (256, 224, 192, 160, 128, 96, 64, 32)
    assert count_levels(196, 4, least=0.3) == (196, 147, 98)
    assert count_levels(3) == (3, 2, 1)


def test_what_cannot_be_had_is_said():
    front = [Schedule((1,), (4,), 2.0, 0.5), Schedule((), (), 4.0, 0.1)]
    with pytest.raises(ValueError, match="at most 1 s; the fastest takes 2 s"):
        fastest_within(front, seconds=1.0)
    with pytest.raises(ValueError, match=r"loses at most 0\.05"):
        fastest_within(front, loss=0.05)
    with pytest.raises(ValueError, match="either"):
        fastest_within(front)
