"""``fastreduce tune``: what it prints, writes and refuses."""

import importlib
import io
import json
import re

import pytest
import torch

import fastreduce
from fastreduce.cli.screen import Page
from fastreduce.integrations.timm import create_model
from fastreduce.quality import paired_accuracy
from fastreduce.quality.tuning import run as engine
from fastreduce.quality.tuning.times import TimeTable
from tests.helpers.commands import run

tune_command = importlib.import_module("fastreduce.cli.tune")  # the package has the function under this name
QUICK = ["tune", "--model", "test_vit", "--random", "--methods", "topk,tome", "--image-count", "2", "--batch", "1"]


def _table(decision):
    """Make times of a device on which a block costs its tokens, in place of this machine's."""

    def measured(calibration, methods, batch, counts, **_):
        stages = [[100.0, 50.0, decision], [100.0, 90.0, decision], [50.0, 25.0, decision], [50.0, 45.0, decision]]
        block = [count / 100 for count in counts]
        after = {name: [[100.0, 0.0], [10.0, 0.0]] for name in methods}
        return TimeTable(batch, 6, list(counts), block, 0.1, dict.fromkeys(methods, stages), after)

    return measured


def test_from_the_command_to_the_model(monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "measure_times", _table(0.05))
    monkeypatch.setattr(engine, "LEVELS", 10)
    monkeypatch.setattr(engine.Tuner, "speed_up", lambda self, choice: choice.predicted[0])
    done = run(*QUICK, "--speed-up", "1.4", "--rounds", "1", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "tune.json").read_text())
    assert {file.name for file in tmp_path.iterdir()} == {"tune.json", "tables.json", "tune.png"}
    assert [row["origin"] for row in result["choices"]] == ["tuned", "paper"] * 2
    assert result["wanted"]["speed_up"] == 1.4
    assert not set(result["images"]["seen"]) & set(result["images"]["unseen"])
    words = " ".join(done.stdout.split())
    for row in result["choices"]:
        assert f"{row['unseen']['pooled_cosine']['mean']:.3f}" in words
        assert row["predicted"]["speedup"] > 1.39
    assert f'fastreduce.patch(model, config="{tmp_path / "tune.json"}")' in done.stdout
    chosen = result["chosen"]
    stages = " ".join(f"{block}:{tokens}" for block, tokens in zip(chosen["at"], chosen["tokens"], strict=True))
    assert f"Chosen: {chosen['method']} at {stages}, {chosen['measured']['speedup']:.2f} times as fast" in words
    model = fastreduce.patch(create_model("test_vit"), config=tmp_path / "tune.json")
    assert fastreduce.reduced_counts(model) == result["chosen"]["tokens"]


def test_where_nothing_pays_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "measure_times", _table(2.0))
    monkeypatch.setattr(engine, "LEVELS", 6)
    done = run(*QUICK, "--speed-up", "20", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    words = " ".join(done.stdout.split())
    assert "Do not reduce: nothing here pays" in words
    assert re.search(r"no schedule is more than [\d.]+ times as fast at this batch", words)
    assert json.loads((tmp_path / "tune.json").read_text())["config"] is None
    with pytest.raises(ValueError, match="says that no schedule pays"):
        fastreduce.patch(create_model("test_vit"), config=tmp_path / "tune.json")


def test_where_nothing_keeps_enough_it_says_so(monkeypatch, tmp_path):
    """Schedules that the table of times calls fast are there, so their speed is not the reason."""
    monkeypatch.setattr(engine, "measure_times", _table(0.05))
    monkeypatch.setattr(engine, "LEVELS", 6)
    done = run(*QUICK, "--at-least", "1", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    words = " ".join(done.stdout.split())
    assert "no schedule was found with fidelity at least 1 on the images of the search." in words
    assert "times as fast at this batch" not in words


def _row(origin, cosine, right, speedup=1.5):
    same = fastreduce.Fidelity({"pooled_cosine": torch.full((10,), cosine)}, paired_accuracy([True] * 10, right))
    return {
        **{"method": "tome", "origin": origin, "target": "at most 10 points lost", "config": {}, "at": [1]},
        **{"tokens": [50], "predicted": {"speedup": 1.5, "fidelity": cosine}, "measured": {"speedup": speedup}},
        **{"seen": same.summary(), "unseen": same.summary()},
    }


@pytest.mark.parametrize(
    ("cosines", "words"),
    [
        ((0.9, 0.8), "tome, at most 10 points lost: beats the paper's schedule on unseen images by 0.100, 1.00 times"),
        ((0.8, 0.9), "does not beat the paper's schedule on unseen images (-0.100, 1.00 times as fast)."),
        ((0.8001, 0.8), "as close on unseen images as the paper's schedule, 1.00 times as fast as it."),
        ((0.8, 0.8001), "as close on unseen images as the paper's schedule, 1.00 times as fast as it."),
    ],
)
def test_accuracy_stands_in_the_table_and_equals_are_called_so(cosines, words):
    choices = [_row("tuned", cosines[0], [True] * 9 + [False]), _row("paper", cosines[1], [True] * 10)]
    result = {
        **{"model": "x", "weights": "y", "dtype": "float32", "batch": 1, "rounds": 3, "measure": "pooled_cosine"},
        **{"images_seen": 10, "images_unseen": 10, "images": {"source": "of 20 in z"}, "environment": {}},
        **{"choices": choices, "chosen": None, "config": None, "refused": {}, "random_weights": False},
        **{"untrained": ["sit"]},
    }
    result["environment"]["device_name"] = "cpu"
    page = Page(io.StringIO())
    tune_command._print(page, result, None)
    page.write()
    printed = " ".join(page.stream.getvalue().split())
    assert words in printed
    assert "points lost unseen block:tokens" in printed
    assert "Layers of their own, with random weights: sit." in printed
    assert f"{cosines[0]:.3f} 10.0 10.0 1:50" in printed
    assert f"{cosines[1]:.3f} 0.0 0.0 1:50" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--speed-up 1", "speed-up must be above 1, got 1"),
        ("--speed-up 1.5 --at-least 0.9", "one of --speed-up"),
        ("--measure speed", "unknown measure 'speed'"),
        ("--measure kl --at-least 0.9", "kl is not"),
        ("--image-count 1", "at least 2"),
        ("--json=", "--json got '': give a file, or - for standard output"),
    ],
)
def test_wrong_input_gets_one_line(arguments, message, tmp_path):
    done = run(*QUICK, *arguments.split(), "--out", tmp_path)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.output


def test_patterns_that_follow_from_the_grid_have_no_schedule_to_tune(tmp_path):
    done = run("tune", "--model", "test_vit", "--random", "--methods", "radial", "--out", tmp_path)
    assert done.exit_code == 2
    assert "nothing to tune" in done.stderr
