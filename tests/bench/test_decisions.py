"""Decisions that near-ties may change are judged by value: one that is wrong by more has to be seen."""

import dataclasses

import pytest
import torch

from bench.microbenchmark import Microbenchmark
from bench.primitives import Shape, load_primitives

PRIMITIVES = load_primitives()
SHAPE = Shape("deit_tiny", 38, 2)


def two_places_swapped(index):
    index[0, [3, 4]] = index[0, [4, 3]]


def one_token_twice(index):
    index[0, 3] = index[0, 4]


def next_token_taken(index, valid):
    gap = int((index[0].diff() > 1).nonzero()[0])
    index[0, gap] += 1


def last_token_dropped(index, valid):
    last = int(valid[0, 1:].sum()) - 1
    index[0, last] = 0
    valid[0, 1 + last] = False


def a_hole_in_valid(index, valid):
    valid[0, 2] = False


def other_partner(slot):
    merging = int((slot[0, ::2] >= slot[0, 1]).nonzero()[0])
    slot[0, 2 * merging] = slot[0, 1] + (slot[0, 2 * merging] - slot[0, 1] + 1) % slot[0, 1::2].numel()


def one_stays_that_should_merge(slot):
    even = slot[0, ::2]
    moves = even >= slot[0, 1]
    moves[moves.nonzero()[0]] = False
    even[~moves] = torch.arange(int((~moves).sum()))


def even_tokens_out_of_order(slot):
    staying = (slot[0, ::2] < slot[0, 1]).nonzero().flatten()[:2]
    slot[0, 2 * staying] = slot[0, 2 * staying.flip(0)]


def odd_tokens_out_of_order(slot):
    slot[0, [1, 3]] = slot[0, [3, 1]]


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("select_topk", two_places_swapped),
        ("select_topk", one_token_twice),
        ("select_topk_all", two_places_swapped),
        ("sample_tokens", next_token_taken),
        ("sample_tokens", last_token_dropped),
        ("sample_tokens", a_hole_in_valid),
        ("match_tokens", other_partner),
        ("match_tokens", one_stays_that_should_merge),
        ("match_tokens", even_tokens_out_of_order),
        ("match_tokens", odd_tokens_out_of_order),
    ],
)
def test_one_wrong_decision_is_seen(name, spoil):
    right = PRIMITIVES[name]

    def wrong(**arguments):
        outputs = tuple(output.clone() for output in right.call(**arguments))
        spoil(*outputs)
        return outputs

    bench = Microbenchmark(right, SHAPE, torch.device("cpu"), "forward")
    assert bench.parity("fastreduce") is None
    bench.contenders["fastreduce"] = lambda inputs: wrong(**inputs, backend="reference")
    assert bench.parity("fastreduce") is not None


def test_equal_scores_may_change_places():
    right = PRIMITIVES["select_topk"]

    def tied(shape, generator):
        inputs = right.make(shape, generator)
        inputs["scores"].fill_(0.5)
        return inputs

    def last_first(*, scores, k, backend):
        return (torch.arange(scores.shape[1] - 1, -1, -1).expand(len(scores), -1)[:, :k],)

    bench = Microbenchmark(dataclasses.replace(right, make=tied), SHAPE, torch.device("cpu"), "forward")
    bench.contenders["fastreduce"] = lambda inputs: last_first(**inputs, backend="reference")
    assert bench.parity("fastreduce") is None


def test_another_shape_is_wrong_before_anything_is_compared():
    bench = Microbenchmark(PRIMITIVES["match_tokens"], SHAPE, torch.device("cpu"), "forward")
    bench.contenders["fastreduce"] = lambda inputs: (torch.zeros(2, 3, dtype=torch.int64),)
    assert "shape" in bench.parity("fastreduce")
