"""``fastreduce tune``: what it prints, writes and refuses."""

import json
import re

import pytest

import fastreduce
from fastreduce.integrations.timm import create_model
from fastreduce.quality.tuning import run as engine
from fastreduce.quality.tuning.times import TimeTable
from tests.helpers.commands import run

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--speed-up 1", "speed-up must be above 1, got 1"),
        ("--speed-up 1.5 --at-least 0.9", "one of --speed-up"),
        ("--measure speed", "unknown measure 'speed'"),
        ("--measure kl --at-least 0.9", "kl is not"),
        ("--image-count 1", "at least 2"),
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
