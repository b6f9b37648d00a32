"""Compilations of reduced models, counted, and the tables of them."""

import pytest

from bench import compiled, deploy_tables


@pytest.mark.parametrize("method", ["topk", "tome"])
def test_once_for_the_first_batch_and_once_for_all_others(method):
    found = compiled.count(method)
    assert list(found.values()) == [1, 1, 0, 1, 0]


def test_blocks_are_compiled_for_what_they_do_not_for_where_they_stand():
    """Four blocks: two before the first stage or behind the last one, two with a stage."""
    found = compiled.count("evit", "blocks")
    assert found["first batch"] == 4
    assert found["a third batch"] == found["another backend"] == 0


def test_a_pattern_made_for_its_schedule_is_refused():
    assert compiled.count("radial", norm="l2")["another keep rate"] is None


def test_tables():
    (_, _, line) = deploy_tables.count_lines(
        [{"method": "radial", "form": "whole", **dict.fromkeys(deploy_tables.CHANGES, 1), "another keep rate": None}]
    )
    assert line == "| radial | whole | 1 | 1 | 1 | refused | 1 |"
    rows = [
        {"method": "topk", "way": "eager", "ratio": 1.5},
        {"method": "topk", "way": "whole", "ratio": 1.716, "over_plain": 1.02},
        {"method": "evit", "way": "eager", "ratio": 1.4},
    ]
    assert deploy_tables.time_lines(rows)[2:] == ["| Top-K | 1.50 | 1.72 | 1.02 |", "| EViT | 1.40 |  |  |"]


@pytest.mark.parametrize("wrong", [["--methods", "topq"], ["--rounds", "0"], ["--timed", "tpk"]])
def test_what_it_refuses(wrong, capsys):
    with pytest.raises(SystemExit) as end:
        compiled.main(wrong)
    assert end.value.code == 2
    assert wrong[1] in capsys.readouterr().err
