"""Tables, choices and their file: right values on a small model, without a clock that a test would wait for."""

import json

import numpy as np
import pytest
import torch

import fastreduce
from bench.proof.tiny import randomize
from fastreduce.config import read_config
from fastreduce.integrations.timm import create_model
from fastreduce.quality.tuning import run, times
from fastreduce.quality.tuning.losses import Calibration, LossTable
from fastreduce.quality.tuning.run import Tuner
from fastreduce.quality.tuning.times import TimeTable, measure_times
from tests.helpers.inputs import seeded

METHODS = {"tome": {"method": "tome"}, "evit": {"method": "evit"}}


@pytest.fixture(scope="module")
def model():
    return randomize(
        create_model("vit_tiny_patch16_224", img_size=64, depth=6, embed_dim=48, num_heads=3, num_classes=5)
    ).eval()


def _images(count, seed=0):
    return torch.randn(count, 3, 64, 64, generator=seeded(seed))


def _table(methods=METHODS, decision=0.1):
    """Make times as they would be without surprises: a block costs its tokens, a decision a tenth of a block."""
    counts = tuple(range(16, 0, -1))
    stages = [[float(a), float(b), decision] for a in (16, 8) for b in (a // 4, a // 2, a - 1)]
    return TimeTable(
        batch=2,
        depth=6,
        counts=counts,
        block=[count / 16 for count in counts],
        fixed=0.5,
        stages={name: stages for name in methods},
        after={name: [[16.0, 0.0], [2.0, 0.0]] for name in methods},
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "topk", "at": (2,), "keep": [8]},
        {"method": "kmedoids", "at": (3,), "keep": [6]},
        {"method": "ats", "at": (2, 4), "keep": [10, 5]},
        {"method": "evit", "at": (5,), "keep": [4]},
        {"method": "tome", "at": (0, 1), "keep": [12, 9]},
    ],
)
def test_passes_that_start_late_give_what_whole_passes_give(model, arguments):
    images = _images(11)
    found, before, after = Calibration(model, images).measured(**arguments)
    reduced = fastreduce.patch(create_copy(model), **arguments)
    wanted = fastreduce.fidelity(reduced, images)
    for name, values in wanted.values.items():
        assert torch.allclose(found[name], values, atol=1e-5), name
    with torch.no_grad():
        assert torch.equal(before, model(images).argmax(1))
        assert torch.equal(after, reduced(images).argmax(1))
    assert not fastreduce.is_patched(model)


def create_copy(model):
    import copy

    return copy.deepcopy(model)


def test_curves_go_through_what_was_measured():
    table = LossTable(100, {0: [0.01, 0.03, 0.2, 0.5]})
    for share, loss in zip(table.shares, [0.01, 0.03, 0.2, 0.5], strict=True):
        assert table.curve(0, share) == pytest.approx(loss)
    assert table.curve(0, 1.0) == 0
    falling = [table.curve(0, share) for share in np.linspace(0.25, 1, 40)]
    assert falling == sorted(falling, reverse=True)
    noisy = LossTable(100, {0: [0.02, 0.01, 0.2, 0.5]})
    assert noisy.curve(0, 0.75) == pytest.approx(0.02), "less of the tokens is never taken for a smaller loss"


def test_scale_and_depletion_are_found_again():
    losses = {block: [0.01 * (block + 1), 0.04, 0.2, 0.6] for block in range(4)}
    truth = LossTable(100, losses, scale=1.7, depletion=-0.6)
    schedules = [((0, 1, 2), (80, 60, 40)), ((1, 3), (70, 30)), ((0, 3), (50, 25)), ((2,), (60,))]
    table = LossTable(100, losses)
    table.fit([(at, keep, truth.of(at, keep)) for at, keep in schedules])
    assert (table.scale, table.depletion) == (pytest.approx(1.7), pytest.approx(-0.6))
    for at, keep in schedules:
        assert table.of(at, keep) == pytest.approx(truth.of(at, keep))


def test_times_add_up():
    table = _table()
    assert table.unreduced == 6.5
    assert table.of("tome", (), ()) == 6.5
    # Blocks 0 and 1 whole, a stage in block 2 that ends with 8 tokens, three blocks of 8.
    assert table.of("tome", (2,), (8,)) == pytest.approx(0.5 + 2 + (0.5 + 0.1) + 3 * 0.5)
    assert table.stage_seconds("tome", 16, 8) == pytest.approx(0.6)
    assert table.stage_seconds("tome", 12, 6) == pytest.approx(6 / 16 + 0.1)


def test_noise_makes_no_block_free():
    """Extras measured on a busy machine were below zero, and a schedule was 19 times as fast by the table."""
    table = _table(decision=-5.0)
    table.after["tome"] = [[16.0, 0.0], [2.0, -5.0]]
    assert table.stage_seconds("tome", 16, 8) == table.block_seconds("tome", 4, True) == min(table.block)
    assert table.of("tome", (0,), (2,)) >= table.fixed + table.depth * min(table.block)


@pytest.mark.parametrize("method", ["tome", "ats"])
def test_a_stage_takes_no_less_than_a_block_of_its_output(model, method):
    """The clock here says less. For ATS that may be, since an image may keep fewer tokens than the count."""
    table = TimeTable(2, 6, [16, 8, 4], [1.0, 1.0, 1.0], 0.0)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        seconds = {"stage": 0.5, "after": 0.25, "plain": 1.0, "before": 1.0}
        patch.setattr(times, "_rounds", lambda calls, *_: {name: seconds[name] for name in calls})
        tokens = Calibration(model, _images(2)).entering[0][3]
        times._measure_method(table, model, method, {"method": method}, tokens, 3, 1, None, {})
    assert {extra for _, _, extra in table.stages[method]} == ({-0.5} if method == "ats" else {0.0})
    assert {extra for _, extra in table.after[method]} == ({-0.75} if method == "ats" else {0.0})


def test_table_of_times_on_this_device(model):
    table = measure_times(Calibration(model, _images(2)), METHODS, 2, (16, 8, 4), rounds=1)
    assert (table.batch, table.depth, table.counts) == (2, 6, [16, 8, 4])
    assert all(seconds > 0 for seconds in table.block)
    assert {before for before, _, _ in table.stages["tome"]} == {16.0, 8.0}
    assert all(0 < after < before for rows in table.stages.values() for before, after, _ in rows)
    assert not fastreduce.is_patched(model)


@pytest.fixture
def tuner(model, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "measure_times", lambda *_, **__: _table())
    monkeypatch.setattr(run, "LEVELS", 8)
    tuner = Tuner(model, _images(3), _images(2, seed=1), METHODS, 2, saved=tmp_path / "tables.json", key={"a": 1})
    tuner.tabulate()
    return tuner


def test_a_choice_is_as_fast_as_asked_and_measured_on_both_halves(tuner, model):
    tuner.look_for(speed_up=1.5)
    assert [choice.origin for choice in tuner.choices] == ["tuned", "paper"] * 2
    for tuned, paper in tuner.pairs():
        assert tuned.method == paper.method
        assert tuner.times.of(tuned.method, tuned.at, tuned.keep) <= tuner.times.unreduced / 1.5 + 1e-9
        assert paper.at == (1, 3, 4)
        reduced = fastreduce.patch(create_copy(model), **tuned.config)
        assert tuple(fastreduce.reduced_counts(reduced)) == tuned.keep
        wanted = fastreduce.fidelity(reduced, _images(2, seed=1))
        assert tuner.fidelity_of(tuned, unseen=True) == pytest.approx(wanted.mean(), abs=1e-5)
        losses = tuner.losses[tuned.method]
        assert tuned.predicted[1] == pytest.approx(1 - losses.of(tuned.at, tuned.keep))
        assert losses.of(tuned.at, tuned.keep) <= losses.of(paper.at, paper.keep) + 1e-9


def test_at_least_is_held_on_the_images_of_the_search(tuner):
    tuner.look_for(at_least=0.9)
    assert tuner.choices
    for tuned, _ in tuner.pairs():
        assert tuner.fidelity_of(tuned, unseen=False) >= 0.9


def test_the_more_points_may_be_lost_the_faster(tuner, monkeypatch):
    """The first budget was kept whatever was asked for: 100 points gave the schedule of one that loses 0.05."""
    tuner.labels = ([0, 1, 2], [3, 4])
    tuner.look_for(at_most_lost=100)
    for tuned, _ in tuner.pairs():
        fastest = tuner.fronts[tuned.method][0]
        assert (tuned.at, tuned.keep) == (fastest.at, fastest.keep)
    # Points that follow the loss of the table: the fastest that keeps them is between half of the budget and all of it.
    monkeypatch.setattr(Tuner, "keeps", lambda self, choice, _, points: 100 * (1 - choice.predicted[1]) <= points)
    for points in (1, 3, 20):
        tuner.look_for(at_most_lost=points)
        for tuned, _ in tuner.pairs():
            half = run.fastest_within(tuner.fronts[tuned.method], loss=points / 200)
            assert 100 * (1 - tuned.predicted[1]) <= points
            assert tuner.times.of(tuned.method, tuned.at, tuned.keep) <= half.seconds + 1e-9


def test_the_file_is_what_patch_takes(tuner, model, tmp_path):
    tuner.look_for(speed_up=1.5)
    tuner.measure(rounds=1)
    for choice in tuner.choices:  # no clock in a test
        choice.seconds = [1.0 if choice.method == "evit" else 2.0]
    tuner.unreduced = [2.0]
    result = tuner.result(speed_up=1.5)
    assert result["chosen"]["method"] == "evit"
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps(result))
    reduced = fastreduce.patch(create_copy(model), config=file)
    assert fastreduce.reduced_counts(reduced) == result["chosen"]["tokens"]
    again = fastreduce.patch(create_copy(model), config=fastreduce.config_of(reduced))
    with torch.no_grad():
        assert torch.equal(reduced(_images(2)), again(_images(2)))
    assert tuner.best(speed_up=3.0) is None


def test_every_method_has_stages_where_it_can(model, monkeypatch):
    """K-Medoids weighs tokens by the attention of the block before, and block 0 has none."""
    methods = {name: {"method": name} for name in sorted(set(fastreduce.REDUCERS) - {"radial"})}
    methods["equal"] = {"method": "kmedoids", "equal_weight": True}
    monkeypatch.setattr(run, "measure_times", lambda *_, **__: _table(methods))
    monkeypatch.setattr(run, "LEVELS", 4)
    tuner = Tuner(model, _images(2), _images(1, seed=1), methods, 2)
    tuner.tabulate()
    assert tuner.untrained == ["dpcknn", "dynamicvit", "patchmerger", "sinkhorn", "sit"]
    blocks = {name: sorted(table.losses) for name, table in tuner.losses.items()}
    assert blocks == {name: list(range(name == "kmedoids", 6)) for name in methods}
    assert not any(0 in one.at for one in tuner.fronts["kmedoids"])
    tuner.look_for(speed_up=1.5)
    for choice in tuner.choices:
        fastreduce.patch(create_copy(model), **choice.config)


@pytest.mark.parametrize("method", ["evit", "topk", "ats", "tome"])
def test_every_schedule_of_a_front_can_stand(model, monkeypatch, method):
    """Where few patches are left, one token of EViT would be the fused one alone, and patch refuses to keep none."""
    methods = {method: {"method": method}}
    monkeypatch.setattr(run, "measure_times", lambda *_, **__: _table(methods))
    tuner = Tuner(model, _images(2), _images(1, seed=1), methods, 2)
    tuner.tabulate()
    fewest = min(count for one in tuner.fronts[method] for count in one.keep)
    assert fewest == (2 if method == "evit" else 1)
    for one in tuner.fronts[method]:
        if one.at:
            config = tuner._choice(method, one, "").config
            assert fastreduce.reduced_counts(fastreduce.patch(create_copy(model), **config)) == list(one.keep)


def test_a_run_goes_on_from_its_tables(tuner, model, monkeypatch, tmp_path):
    def forbidden(*_, **__):
        raise AssertionError("measured again")

    losses = {name: table.losses for name, table in tuner.losses.items()}
    monkeypatch.setattr(run, "measure_times", forbidden)
    monkeypatch.setattr(Tuner, "_loss_of", forbidden)
    again = Tuner(model, _images(3), _images(2, seed=1), METHODS, 2, saved=tmp_path / "tables.json", key={"a": 1})
    again.tabulate()
    assert {name: table.losses for name, table in again.losses.items()} == losses
    other = Tuner(model, _images(3), _images(2, seed=1), METHODS, 2, saved=tmp_path / "tables.json", key={"a": 2})
    with pytest.raises(AssertionError, match="measured again"):
        other.tabulate()


@pytest.mark.parametrize("changed", ["weights", "images"])
def test_tables_of_other_weights_or_images_are_not_taken(tuner, model, monkeypatch, tmp_path, changed):
    """A checkpoint of the same name after more training, or other pictures under the same names."""
    other, images = create_copy(model), _images(3, seed=int(changed == "images"))
    if changed == "weights":
        other.blocks[3].mlp.fc1.bias.data[0] += 1
    again = Tuner(other, images, _images(2, seed=1), METHODS, 2, saved=tmp_path / "tables.json", key={"a": 1})
    again.tabulate()
    fresh = Tuner(other, images, _images(2, seed=1), METHODS, 2)
    fresh.tabulate()
    losses = {name: table.losses for name, table in again.losses.items()}
    assert losses == {name: table.losses for name, table in fresh.losses.items()}
    assert losses != {name: table.losses for name, table in tuner.losses.items()}


def test_without_a_target_a_divergence_is_kept_small(tuner):
    """0.99 is a fidelity: of two schedules the one with a divergence above it was taken."""
    tuner.look_for(speed_up=1.5)
    tuner.measure_name, tuner.unreduced = "kl", [2.0]
    for choice, kl, seconds in zip(tuner.choices, (0.1, 3.0, 0.5, 2.0), (1.5, 1.0, 1.4, 1.2), strict=True):
        choice.seen = fastreduce.Fidelity({"kl": torch.full((3,), kl)})
        choice.seconds = [seconds]
    assert tuner.best() is tuner.choices[0]


def test_wrong_arguments_are_said(model):
    with pytest.raises(ValueError, match="0 and 2"):
        Tuner(model, _images(0), _images(2), METHODS, 2)
    with pytest.raises(ValueError, match="unknown measure 'speed'"):
        Tuner(model, _images(1), _images(1), METHODS, 2, "speed")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "x.json is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"method": "topk", "method": "tome"}', "'method' occurs twice"),
        ('{"config": null}', "no schedule pays"),
        ('{"at": [1]}', "names no method"),
        ("[1]", "names no method"),
    ],
)
def test_wrong_files_are_said(tmp_path, content, words):
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=words):
        read_config(file)


def test_a_byte_order_mark_is_no_content(tmp_path):
    """Some editors put one before every file."""
    file = tmp_path / "x.json"
    file.write_text('{"method": "topk"}', encoding="utf-8-sig")
    assert read_config(file) == {"method": "topk"}


def test_config_stands_alone(model):
    with pytest.raises(ValueError, match=r"there is no file 'nowhere\.json'"):
        fastreduce.patch(create_copy(model), config="nowhere.json")
    with pytest.raises(TypeError, match="path or a mapping, got 7"):
        fastreduce.patch(create_copy(model), config=7)
    with pytest.raises(ValueError, match="either config or method, at"):
        fastreduce.patch(create_copy(model), "topk", at=3, config={"method": "topk"})
    with pytest.raises(TypeError, match="give a method, or a config"):
        fastreduce.patch(create_copy(model))
