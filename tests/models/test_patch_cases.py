"""Changes that users make to models work or are refused: some of the cases of tests/helpers/patch_cases.py."""

import random
import warnings

import pytest

from tests.helpers.patch_cases import CHANGES, PARTS, REPLACEMENTS, Case, all_cases, outcome

SOME = random.Random(20).sample(all_cases(), 240)


@pytest.mark.slow  # cases at random; the next test has every part and every change
@pytest.mark.parametrize("group", range(12))
def test_no_silent_difference(group):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = [(case, found) for case in SOME[group::12] if (found := outcome(case)).kind == "wrong"]
    assert not wrong


@pytest.mark.parametrize("part", PARTS)
def test_every_part_with_every_change(part):
    """Top-K, whose stage takes the attention apart, on a model that has all the parts."""
    counts = {"same": 0, "refused": 0, "absent": 0}
    for change in (*CHANGES, *REPLACEMENTS):
        case = Case("full", part, change, before=change != "hook", method="topk", fused=False, train=False, rate=0.5)
        found = outcome(case)
        assert found.kind != "wrong", (case, found)
        counts[found.kind] += 1
    assert counts["same"] >= 3 or part == "attn.gate"  # which only models of newer timm can have


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("block", "own forward", "block 2 has a forward of its own"),
        ("block", "own class", "block 2 is a Own"),
        ("block", "backward hook", "block 2 has backward hooks"),
        ("block", "hook", r"fastreduce\.Tokens"),
        ("blocks", "own class", "its Own of blocks has a forward of its own"),
        ("attn", "own forward", "attention, but that has a forward of its own"),
        ("attn", "own class", "block 2 has a Own attention"),
        ("attn.attn_drop", "hook", ""),
    ],
)
def test_refusals_say_what_is_in_the_way(part, change, words):
    method = "dynamicvit" if part == "attn.attn_drop" else "topk"
    case = Case("plain", part, change, before=True, method=method, fused=False, train=not words, rate=0.5)
    found = outcome(case)
    assert found.kind == "refused"
    assert __import__("re").search(words or r"attn_drop of block 2 \(Dropout\)", found.why)
