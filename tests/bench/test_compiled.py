"""Compilations of reduced models, counted, and the tables of them."""

import pytest
import torch

import fastreduce
from bench import compiled, deploy_tables


@pytest.mark.parametrize("form", ["whole", "blocks"])
def test_compilations_of_every_change(form):
    """Four blocks: one before the first stage, two with a stage, one behind; two see the rate, one asks the backend."""
    expected = {"whole": [1, 1, 0, 1, 1], "blocks": [4, 4, 0, 2, 1]}[form]
    assert list(compiled.count("topk", form).values()) == expected


def test_a_compiled_pattern_follows_the_keep_rate():
    model = compiled._small("radial", {"norm": "l2"}, 0.6)
    run, images = torch.compile(model, backend="eager", fullgraph=True), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = run(images)
        fastreduce.set_keep_rate(model, 0.4)
        after = run(images)
        torch.testing.assert_close(after, model(images))
    assert not torch.allclose(before, after)


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
