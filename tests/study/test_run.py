"""The command that makes a study, from training to report, on the real digits but with a few thousand weights."""

import csv
import dataclasses
import html
import html.parser
import json
import math
import os
import re
import stat
import statistics

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("typer")

import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from fastreduce.cli.app import app
from fastreduce.cli.study import study as commands
from fastreduce.cli.study_options import make_backbone, make_recipe
from fastreduce.names import FAMILIES, TITLES
from fastreduce.study import pages
from fastreduce.study import recipe as recipes
from fastreduce.study import run as running
from fastreduce.study.comparison import TokenStatistics
from fastreduce.study.data import open_data
from fastreduce.study.evaluate import time_in_turns
from fastreduce.study.findings import Floors, find
from fastreduce.study.protocol import Backbone
from fastreduce.study.recipe import DIGITS, Capacity, Recipe, reductions
from fastreduce.study.record import Recording, Run
from fastreduce.study.report import Section, Table, write_report
from fastreduce.study.run import run_study

RUNS = [("topk", 0.5), ("kmedoids", 0.5), ("topk", 0.9), ("kmedoids", 0.9), ("tome", 0.9), ("radial_l2", 0.9)]


def small() -> Recipe:
    backbone = Backbone(
        "vit_tiny_patch16_224", {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 4, "num_heads": 2}
    )
    narrow = dataclasses.replace(backbone, options={**backbone.options, "embed_dim": 8})
    one = dataclasses.replace(DIGITS.fine_tuning, epochs=1, warmup_epochs=0, batch_size=256)
    return dataclasses.replace(
        DIGITS,
        image_size=16,
        backbone=backbone,
        training=one,
        fine_tuning=one,
        reductions=reductions(("topk", "kmedoids"), (0.5,))
        + reductions(("topk", "kmedoids", "tome", "radial"), (0.9,)),
        capacities=(Capacity("narrow", narrow, reductions(("topk",), (0.5, 0.9))),),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def study(folder):
    """Return what ``fastreduce study run --quick`` finds, where quick is as small as can be."""
    found = []

    def kept(*arguments, **options):
        found.append(run_study(*arguments, **options))
        return found[-1]

    top = typer.Typer(cls=app.info.cls)
    top.add_typer(commands, name="study")
    options = ["--quick", "--cpu", "--jobs", "1", "--out", str(folder)]
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(recipes, "DIGITS_QUICK", small())
        patches.setattr(running, "run_study", kept)
        patches.setattr(running, "_ROUNDS", 3)
        done = CliRunner().invoke(top, ["study", "run", *options])
    assert done.exit_code == 0, done.output
    for finding in found[0].findings:
        assert finding.claim in " ".join(done.stdout.split())
    return found[0]


def test_every_model_is_there(study, folder):
    runs = [recording.run for recording in study.recordings]
    wanted = [("none", None), *RUNS, ("none", None), ("topk", 0.5), ("topk", 0.9)]
    assert [(run.method, run.keep_rate) for run in runs] == wanted
    assert [run.backbone for run in runs] == ["vit_tiny_patch16_224"] * 7 + ["narrow"] * 3
    assert [(result.method, result.keep_rate) for result in study.results] == RUNS
    for recording, evaluation in zip(study.recordings, study.evaluations, strict=True):
        assert recording.images == 602
        assert recording.run.accuracy == pytest.approx(evaluation.accuracy["top1"], abs=1e-4)
        assert evaluation.images_per_second > 0
    assert study.evaluations[1].gmacs < study.evaluations[3].gmacs < study.evaluations[0].gmacs
    stored = json.loads((folder / "results.json").read_text())
    assert [model["accuracy"]["top1"] for model in stored["models"]] == [
        evaluation.accuracy["top1"] for evaluation in study.evaluations
    ]


def test_every_model_is_held_against_the_unreduced_one_of_its_backbone(study, folder):
    right = [one.outputs["prediction"][:, 0] == one.outputs["target"] for one in study.recordings]
    stored = json.loads((folder / "results.json").read_text())["models"]
    for index, (gap, model) in enumerate(zip(study.gaps, stored, strict=True)):
        if index in (0, 7):
            assert gap is model["gap"] is None
            continue
        difference = 100 * (right[index].mean() - right[7 * (index > 7)].mean())
        assert gap.mean == model["gap"]["mean"] == pytest.approx(difference)
        assert gap.low <= gap.mean <= gap.high
    assert study.gaps[1].words in (folder / "summary.md").read_text()


def test_tables(study, folder):
    with open(folder / "tables" / "method.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(study.rows["method"])
    row = next(row for row in rows if (row["method_a"], row["method_b"]) == ("topk", "kmedoids"))
    assert 0 < float(row["iou_1"]) < 1
    assert float(row["difference"]) == pytest.approx(float(row["accuracy_a"]) - float(row["accuracy_b"]))
    assert {path.name for path in (folder / "tables").iterdir()} == {
        "correlations.csv", "depth-keep-rate.csv", "depth-method.csv", "keep-rate.csv", "method.csv",
        "backbone.csv", "depth-backbone.csv",
    }  # fmt: skip


def test_the_smaller_backbone_is_compared_and_stays_out_of_the_rest(study):
    rows, ends = study.rows["backbone"], ("vit_tiny_patch16_224", "narrow")
    assert {(row["backbone_a"], row["backbone_b"]) for row in rows} == {ends}
    assert [(row["method_a"], row["keep_rate_a"]) for row in rows] == [("none", None), ("topk", 0.5), ("topk", 0.9)]
    assert {row["backbone_b"] for axis in ("keep_rate", "method") for row in study.rows[axis]} == {ends[0]}
    chance = [study.tokens[index].share[0] for index in (1, 3)]
    beyond = [(row["ioa_1"] - share) / (1 - share) for row, share in zip(rows[1:], chance, strict=True)]
    own, anywhere = study.recordings[:7], Floors(0.0, dict.fromkeys(ends, 0.0))
    counted = find(own, study.tokens, study.rows, anywhere)[6]
    assert counted.evidence.endswith(f"Top-K {sum(beyond) / 2:.2f}")


def test_models_that_learned_nothing_decide_nothing(study, folder):
    """All models are at chance after one epoch; the report says so."""
    assert study.floors.chance == pytest.approx(100 * 61 / 602)
    assert max(one.run.accuracy for one in study.recordings) < min(study.floors.by_backbone.values())
    assert {finding.verdict for finding in study.findings} <= {"undecided", "not examined"}
    assert study.findings[6].evidence.startswith("too few of its models are above the floor: Unreduced (")
    stored = json.loads((folder / "results.json").read_text())["floors"]
    assert stored == {"chance": study.floors.chance, "by_backbone": dict(study.floors.by_backbone)}
    for page in ("report.html", "summary.md"):
        assert f"chance ({study.floors.chance:.2f} %)" in (folder / page).read_text()


def test_several_matchings_are_said(study):
    assert "ToMe" not in pages._accuracy_table(study, small()).caption
    exact = dataclasses.replace(small(), reductions=reductions(("tome",), (0.25, 0.3, 0.5)))
    assert pages._accuracy_table(study, exact).caption.endswith(
        "; ToMe at 0.25, 0.3 with as many matchings as reach its number of tokens"
    )


def test_speeds_are_measured_in_turns(study, folder, monkeypatch):
    stored = json.loads((folder / "models" / "speed.json").read_text())["images_per_second"]
    assert list(stored) == [model.place for model in small().models]
    for evaluation, speeds in zip(study.evaluations, stored.values(), strict=True):
        assert len(speeds) == evaluation.rounds == 3
        assert evaluation.images_per_second == pytest.approx(statistics.median(speeds))
    order = []

    class Named(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name, self.weight = name, torch.nn.Parameter(torch.zeros(1))

        def forward(self, images):
            order.append((self.name, len(images)))

    models = {name: Named(name) for name in "abc"}
    found = time_in_turns(models, open_data("digits"), batch_size=5, rounds=3)
    forwards, backwards = [("a", 5), ("b", 5), ("c", 5)], [("c", 5), ("b", 5), ("a", 5)]
    assert order == forwards + backwards + forwards + backwards + forwards  # two to warm up, then three
    assert {name: len(speeds) for name, speeds in found.items()} == {"a": 3, "b": 3, "c": 3}
    with pytest.raises(ValueError, match="rounds must be at least 3, since fewer say nothing of the spread, got 2"):
        time_in_turns(models, open_data("digits"), rounds=2)


def test_files_have_the_mode_of_the_umask(study, folder):
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "recording.safetensors":
            assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path
    assert not [path for path in folder.rglob(".*")]  # no lock, nothing half-written


def test_what_cannot_be_written_costs_nothing_else(study, folder, tmp_path, monkeypatch):
    (tmp_path / "results.json").mkdir()
    (tmp_path / "tables").write_text("a file")
    other = dataclasses.replace(study, unwritten=[])
    pages.write_study(other, small(), small().open(), tmp_path, torch.device("cpu"))
    assert "results.json (Is a directory)" in other.unwritten[0]
    assert len(other.unwritten) == 8
    assert all("/tables" in line for line in other.unwritten[1:])
    assert (tmp_path / "report.html").stat().st_size == pytest.approx((folder / "report.html").stat().st_size, rel=0.1)
    assert (tmp_path / "pictures" / "depth-maps.png").exists()


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.cells, self.drawings = [], [], 0

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)
        self.drawings += tag == "svg"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells.append(data.strip())


def test_the_page_holds_all_of_it(study, folder):
    page = Page()
    page.feed((folder / "report.html").read_text())
    assert not page.open
    drawn = list((folder / "pictures").glob("*.png"))
    assert page.drawings == len(drawn) == 8
    summary = (folder / "summary.md").read_text()
    for finding in study.findings:
        assert finding.claim in page.cells
        assert f"| {finding.claim} | {finding.verdict} | {finding.evidence} |" in summary
    for recording in study.recordings[1:]:
        assert f"{recording.run.accuracy:.2f}" in page.cells
    own, other = (study.recordings[index].run for index in (0, 7))
    of_both = (f"{run.backbone}, {run.parameters:,} weights, unreduced {run.accuracy:.2f}" for run in (own, other))
    assert "A: {}; B: {}".format(*of_both) in summary


def test_a_second_call_trains_nothing_again(study, folder, monkeypatch):
    def fail(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr("fastreduce.study.train._Trainer", fail)
    monkeypatch.setattr("fastreduce.study.run.record_images", fail)
    again = run_study(small(), folder, cpu=True)
    assert [one.run for one in again.recordings] == [one.run for one in study.recordings]
    assert again.findings == study.findings


def test_another_study_is_not_mixed_in(study, folder):
    other = dataclasses.replace(small(), training=dataclasses.replace(small().training, seed=1))
    with pytest.raises(ValueError, match="another training"):
        run_study(other, folder, cpu=True)


def test_further_backbones_are_chosen_by_name(tmp_path):
    weights = tmp_path / "weights.safetensors"
    save_file({"head.bias": torch.zeros(10)}, weights)

    def chosen(dataset, capacities, methods=None, **backbone):
        named = {"model": None, "checkpoint": None, "pretrained": False, **backbone}
        recipe = make_recipe(dataset, False, methods, None, 0, make_backbone(dataset, **named), None, {}, capacities)
        return {one.name: list(dict.fromkeys(each.method for each in one.reductions)) for one in recipe.capacities}

    assert chosen("digits", None) == {"width-24": list(FAMILIES["Pruning"])}
    assert chosen("digits", ["width-24"], ["tome,ats"]) == {"width-24": ["ats"]}
    assert chosen("digits", None, ["tome"]) == chosen("digits", ["none"]) == {}
    assert chosen("digits", None, checkpoint=weights) == chosen("coco", None, pretrained=True) == {}
    further = ["deit_tiny_patch16_224,deit_base_patch16_224"]
    assert chosen("coco", further, ["sit"], pretrained=True) == {name: ["sit"] for name in further[0].split(",")}
    with pytest.raises(ValueError, match="unknown capacity 'width-25'; expected width-24, none"):
        chosen("digits", ["width-25"])


@pytest.mark.parametrize(
    "name", ["a|b", "a\\", "<i>x</i>", "`x`", "*x*", "[x](y)", "_x_", "a\nb\r\nc\u2028d", "&lt;", "$x$"]
)
def test_a_cell_is_shown_as_it_is(name):
    """Read back as GitHub reads it: a row has its cells, and nothing in them is markup."""
    lines = Table([name, "n"], [[name, 1.0]], name).markdown().splitlines()
    assert len(lines) == 5
    for line in (lines[2], lines[4]):
        first, _ = re.split(r"(?<!\\)(?:\\\\)*\|", line.removeprefix("| ").removesuffix(" |"), maxsplit=1)
        shown = html.unescape(re.sub(r"\\([\\|`*_\[\]])", r"\1", first.strip()))
        assert shown == " ".join(name.splitlines())
        assert not re.search(r"(?<!\\)[`*\[<]", first)


def test_a_page_says_what_it_was_given_and_nothing_else(tmp_path):
    table = Table(["a <name>", "x"], [["<script>", 1.0], ["b", math.nan], ["c", None]], digits=1)
    write_report(tmp_path / "deep" / "p.html", "A & B", [("k", "<v>")], [Section("S", ["p < q"], [table])])
    text = (tmp_path / "deep" / "p.html").read_text()
    assert "<script>" not in text
    assert "p &lt; q" in text
    assert text.count('<td class="number">–</td>') == 2
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        write_report(tmp_path / "p.html", "t", [], [Section("S", (), [Table(["a", "b"], [[1]])])])


RUN_FIELDS = ("dataset", "backbone", "method", "keep_rate", "accuracy")


class TestFindings:
    """Findings on recordings whose accuracies are chosen."""

    @staticmethod
    def recording(method, rate, right, images=2000):
        wrong = np.arange(images) % 1000 >= round(10 * right)
        target = np.arange(images) % 10
        run = Run("digits", "small", method, rate, right)
        outputs = {"prediction": np.where(wrong, 10, target)[:, None], "target": target}
        return Recording(run, (2, 2), 4, outputs=outputs)

    def verdicts(self, accuracies, rows=None):
        recordings = [self.recording(method, rate, right) for (method, rate), right in accuracies.items()]
        return [finding.verdict for finding in find(recordings, [], rows or {})]

    def test_nothing_is_claimed_of_nothing(self):
        assert set(self.verdicts({("none", None): 90.0})) == {"not examined"}

    def accuracies(self, **gaps):
        rates = (0.25, 0.5, 0.7, 0.9)
        methods = [method for methods in FAMILIES.values() for method in methods if method in TITLES]
        return {("none", None): 80.0} | {
            (method, rate): 80.0 + gaps.get(method, 0.0) for method in methods for rate in rates
        }

    def test_as_in_the_paper(self):
        soft = dict.fromkeys(FAMILIES["Soft merging"], -20.0)
        hard = dict.fromkeys(FAMILIES["Hard merging"], -10.0)
        rates = self.accuracies(topk=5, evit=8, **soft, **hard)
        rates["evit", 0.25] += 4
        found = self.verdicts(rates)
        assert found[1:5] == ["holds"] * 4
        assert found[8] == "holds"
        assert found[0] == "does not hold"  # EViT is above: never best, always second
        rates = self.accuracies(topk=5, **soft, **hard)
        assert self.verdicts(rates)[0] == "holds"

    def test_the_other_way_round(self):
        soft = dict.fromkeys(FAMILIES["Soft merging"], 15.0)
        hard = dict.fromkeys(FAMILIES["Hard merging"], 10.0)
        assert self.verdicts(self.accuracies(evit=-5, **soft, **hard))[1:5] == ["does not hold"] * 4

    def test_models_below_the_floor_do_not_vote(self):
        """Soft merging at chance level would make all others look good."""
        soft = dict.fromkeys(FAMILIES["Soft merging"], -69.0)
        found = find([self.recording(*key, right) for key, right in self.accuracies(**soft).items()], [], {})
        assert [found[index].verdict for index in (3, 4)] == ["undecided"] * 2
        assert "above the floor: SiT at 0.25 (11.00 %), SiT at 0.5" in found[3].evidence
        assert found[3].evidence.endswith("and 8 more")
        assert found[2].verdict == "undecided"  # pruning and hard merging are equal
        several = self.accuracies(**(soft | {"sit": -20.0}))  # above the floor: it alone speaks for soft merging
        assert self.verdicts(several)[3:5] == ["holds"] * 2

    def test_a_study_that_failed_says_nothing(self):
        failed = {key: 19.0 if key[0] == "topk" else 12.0 for key in self.accuracies()}
        assert set(self.verdicts(failed)) == {"undecided", "not examined"}
        assert self.verdicts({key: 19.0 + 40.0 * (key[0] == "topk") for key in self.accuracies()})[0] == "undecided"

    def test_floors(self):
        runs = [("none", None, 80.0), ("topk", 0.5, 44.9), ("evit", 0.5, 45.1)]
        recordings = [self.recording(*run) for run in runs]
        floors = Floors.of(recordings)
        assert (floors.chance, dict(floors.by_backbone)) == (10.0, {"small": 45.0})
        assert [run.method for run in floors.below(recordings)] == ["topk"]
        assert Floors.of(recordings[1:]).by_backbone["small"] == pytest.approx((10 + 45.1) / 2)
        assert Floors.of([self.recording("none", None, 25.0)]).by_backbone["small"] == 20.0
        labels = {"scores": np.zeros((4, 5), np.float32), "target": np.eye(5, dtype=np.uint8)[:4]}
        several = dataclasses.replace(recordings[0], outputs=labels)
        assert Floors.of([several]).chance == pytest.approx(20.0)
        assert "Below it: Top-K at 0.5 (44.90 %)." in floors.words(recordings)

    def test_small_gaps_decide_nothing(self):
        assert self.verdicts(self.accuracies(evit=0.1))[1] == "undecided"
        found = self.verdicts(self.accuracies())
        assert [found[0], *found[2:5]] == ["undecided"] * 4

    def test_methods_are_averaged_over_the_same_keep_rates(self):
        rates = self.accuracies(topk=-10)
        only_light = {key: value for key, value in rates.items() if key[0] not in FAMILIES["Pruning"] or key[1] == 0.9}
        assert self.verdicts(only_light)[2] == "does not hold"
        none_shared = {key: value for key, value in only_light.items() if key[0] != "tome" or key[1] != 0.9}
        assert self.verdicts(none_shared)[2] == "not examined"

    @pytest.mark.parametrize(
        ("axis", "other", "column", "chance", "finding"),
        [("method", {"method": "radial_l2"}, "iou_1", 1 / 3, 7), ("backbone", {"backbone": "tiny"}, "ioa_1", 0.5, 6)],
    )
    def test_what_chance_alone_would_give_is_no_agreement(self, axis, other, column, chance, finding):
        first = {"dataset": "digits", "backbone": "small", "method": "topk", "keep_rate": 0.5, "accuracy": 90.0}
        ends = {"a": first, "b": first | other}
        row = {f"{name}_{end}": value for end, of in ends.items() for name, value in of.items()}
        half, none = np.array([0.5]), np.zeros(1)
        tokens = [TokenStatistics(Run(**end), (1,), half, none, None, None, (0.0, 0.0)) for end in ends.values()]
        for value, beyond, verdict in ((chance, 0, "holds"), (1.0, 1, "does not hold")):
            found = find([], tokens, {axis: [row | {column: value, "difference": 0.0}]})[finding]
            assert found.verdict == verdict
            assert found.evidence.endswith(f"beyond chance: Top-K {beyond:.2f}")

    def test_backbones_of_two_depths_have_no_first_stage_in_common(self):
        """At block 2 stands the second stage of the shallow model: chance expects 0.25 of it, not 0.5."""
        runs = [Run("digits", name, "topk", 0.5, 90.0) for name in ("shallow", "deep")]
        shares = np.array([0.5, 0.25])
        tokens = [
            TokenStatistics(run, blocks, shares, shares, None, None, (0.0, 0.0))
            for run, blocks in zip(runs, ((1, 2), (2, 4)), strict=True)
        ]
        row = {f"{name}_{end}": getattr(run, name) for end, run in zip("ab", runs, strict=True) for name in RUN_FIELDS}
        assert find([], tokens, {"backbone": [row | {"ioa_2": 0.25, "difference": 0.0}]})[6].verdict == "not examined"
        tokens = [dataclasses.replace(entry, blocks=(1, 2)) for entry in tokens]
        found = find([], tokens, {"backbone": [row | {"ioa_1": 0.5, "ioa_2": 0.9, "difference": 0.0}]})[6]
        assert (found.verdict, found.evidence[-10:]) == ("holds", "Top-K 0.00")
