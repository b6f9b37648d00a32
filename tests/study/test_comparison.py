"""Tables of the study, against those that the paper's scripts made of the same recordings."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fastreduce.study.comparison import (
    TokenStatistics,
    compare,
    compare_depth_maps,
    correlate,
    token_statistics,
    write_csv,
)
from fastreduce.study.measures import distinct_labels, map_similarities
from fastreduce.study.record import Recording, Run

FOLDER = Path(__file__).parent.parent / "golden" / "metrics"
INPUTS = load_file(FOLDER / "inputs.safetensors")
METHODS = {"deit": "none", "heuristic": "radial_l2"}
SIZES = {"tiny": 5, "small": 22}


def parse(official):
    """Turn ``topk_small_patch16_224-3_6_9-_0.9`` into method, backbone and keep rate."""
    method, size = official.split("_")[:2]
    rate = official.rsplit("_", 1)[1]
    return METHODS.get(method, method), size, float(rate) if rate else None


def official_run(official, dataset="IM", accuracy=math.nan):
    method, size, rate = parse(official)
    return Run(dataset, size, method, rate, accuracy, SIZES[size])


def official_recording(content):
    """Read one of the paper's JSON recordings."""
    rate = "" if content["Model"].startswith("deit") else content["Ratio"][0]
    images = [value for key, value in content.items() if key.endswith(".JPEG")]
    kept, slots = {}, {}
    for block in content["Location"]:
        stages = [image.get(f"Stage-{block}", {}) for image in images]
        if "Kept_Token" in stages[0]:
            rows = [stage["Kept_Token"] for stage in stages]
            width = max(map(len, rows))  # ATS keeps another number in every image
            kept[block] = np.array([row + [-1] * (width - len(row)) for row in rows], np.int16)
        if "Assignment_Maps" in stages[0]:
            new = np.array([stage["Assignment_Maps"] for stage in stages], np.int16)
            if slots:  # of the tokens that the last stage left; ours are of the original patches
                new = np.take_along_axis(new, slots[list(slots)[-1]].astype(np.intp), 1)
            slots[block] = new
    run = official_run(f"{content['Model']}-_{rate}", accuracy=content["Top1-Acc"])
    return Recording(run, (14, 14), 12, kept, slots)


OFFICIAL = json.loads((FOLDER / "recordings.json").read_text())
RECORDINGS = {name: official_recording(content) for name, content in OFFICIAL.items()}


def read_csv(name):
    with open(FOLDER / f"{name}.csv") as file:
        return list(csv.DictReader(file, delimiter=";"))


def number(text):
    return float(text) if text else math.nan


def pair_of(row):
    return tuple((row[f"method_{side}"], row[f"backbone_{side}"], row[f"keep_rate_{side}"]) for side in ("a", "b"))


def our_columns(official):
    """Turn ``Stage-3-Mean-IoA`` or ``NMI-Stage-3-std`` into ``ioa_3``, ``nmi_std_3``; None for what is no measure."""
    parts = official.split("-")
    if "Stage" not in parts:
        return None
    position = parts.index("Stage")
    block, kind = parts[position + 1 : position + 3]
    name = parts[0] if position else parts[-1] if len(parts) == 4 else "iou"
    return f"{name.lower()}{'_std' if kind == 'std' else ''}_{block}"


@pytest.mark.parametrize(("table", "axis"), [("rates", "keep_rate"), ("capacity", "backbone"), ("models", "method")])
def test_kept_and_merged_tables_golden(table, axis):
    # The paper's script for methods takes one backbone.
    recordings = [found for name, found in RECORDINGS.items() if axis != "method" or "small" in name]
    rows = {pair_of(row): row for row in compare(recordings, axis)}
    for family, measure in (("pruning", "iou_3"), ("merging", "nmi_3")):
        official = {(parse(row["Model A"]), parse(row["Model B"])): row for row in read_csv(f"{family}_{table}")}
        assert official.keys() == {pair for pair, row in rows.items() if measure in row}
        for pair, theirs in official.items():
            expected = {ours: float(value) for name, value in theirs.items() if (ours := our_columns(name))}
            assert len(expected) in (6, 12, 18)
            found = {name: rows[pair][name] for name in expected}
            assert found == pytest.approx(expected, abs=1e-13), pair


def test_feature_table_golden():
    recordings = []
    for rate in (0.9, 0.5, 0.25):
        features = {block: INPUTS[f"features/topk-small-{rate}/{block}"].T for block in (3, 6, 9, 11)}
        recordings.append(Recording(Run("IM", "small", "topk", rate), (14, 14), 12, features=features))
    rows = compare(recordings, "keep_rate")
    names = {"PWCCA": "pwcca", "mean_cca_corr": "cca", "mean_sq_cca_corr": "cca_squared"}
    names |= {"CKA": "cka", "Procrustes": "procrustes"}
    for row, theirs in zip(rows, read_csv("cls_rates"), strict=True):
        assert pair_of(row) == (parse(theirs["Model A"]), parse(theirs["Model B"]))
        for block in (3, 6, 9, 11):
            found = {name: row[f"{ours}_{block}"] for name, ours in names.items()}
            assert found == pytest.approx({name: float(theirs[f"{block}-{name}"]) for name in names}, abs=1e-12)


def test_token_statistics_golden():
    official = json.loads((FOLDER / "token_stats.json").read_text())
    found = {recording.run: token_statistics(recording) for recording in RECORDINGS.values()}
    assert len(found) == len(official)
    for name, theirs in official.items():
        ours = found[official_run(name, accuracy=theirs["Acc-Top1"])]
        if ours.run.method == "tome":
            assert ours.depth is None
            continue
        if ours.run.method != "none":
            assert list(ours.blocks) == theirs["Loc"]
            np.testing.assert_allclose(ours.share, theirs["Mean-Reduction"], rtol=0, atol=1e-15)
            np.testing.assert_allclose(ours.share_std, theirs["Std-Reduction"], rtol=0, atol=1e-15)
        np.testing.assert_allclose(ours.depth.ravel(), theirs["Mean-Token-Depth-Spatial"], rtol=0, atol=1e-14)
        np.testing.assert_allclose(ours.depth_std.ravel(), theirs["Std-Token-Depth-Spatial"], rtol=0, atol=1e-14)
        assert ours.pooled == pytest.approx((theirs["Mean-Token-Depth"], theirs["Std-Token-Depth"]), abs=1e-13)


@pytest.mark.parametrize("name", [name for name in OFFICIAL if name.startswith("tome")])
def test_shares_of_merging_golden(name):
    """The paper counts the labels of a stage's own input: made-up ones leave slots without a patch of the image."""
    content, (size, rate) = OFFICIAL[name], name.split("-")[1:]
    official = json.loads((FOLDER / "token_stats.json").read_text())[f"tome_{size}_patch16_224-3_6_9-_{rate}"]
    images = [value for key, value in content.items() if key.endswith(".JPEG")]
    for index, block in enumerate((3, 6, 9)):
        shares = distinct_labels(np.array([image[f"Stage-{block}"]["Assignment_Maps"] for image in images])) / 196
        assert shares.mean() == pytest.approx(official["Mean-Reduction"][index], abs=1e-15)
        assert shares.std() == pytest.approx(official["Std-Reduction"][index], abs=1e-15)
    assert token_statistics(RECORDINGS[name]).share[0] == pytest.approx(official["Mean-Reduction"][0], abs=1e-15)


MAP_COLUMNS = {"KLD12": "kl", "KLD21": "kl_reverse", "JSD": "js"}
MAP_COLUMNS |= {name: name.lower() for name in ("PCC", "SCC", "EMD", "SIM")}


def statistics(dataset, official):
    depth = INPUTS[f"depth/{dataset}/{official}"]
    empty = np.zeros(0)
    return TokenStatistics(official_run(official, dataset), (), empty, empty, depth, depth, (0.0, 0.0))


def test_depth_maps_across_data_sets_golden():
    datasets = {key.split("/")[1] for key in INPUTS if key.startswith("depth/")}
    models = {key.split("/")[2] for key in INPUTS if key.startswith("depth/")}
    order = ("IM", "NAB", "COCO", "NUS")
    assert datasets == {*order}
    entries = [statistics(dataset, model) for dataset in order for model in sorted(models)]
    rows = {
        (row["dataset_a"], row["dataset_b"], pair_of(row)[0]): row for row in compare_depth_maps(entries, "dataset")
    }
    official = read_csv("heatmap_comparison_default")
    assert len(rows) == len(official)
    for theirs in official:
        ours = rows[theirs["Dataset1"], theirs["Dataset2"], parse(theirs["Model1"])]
        expected = {column: float(theirs[column]) for column in MAP_COLUMNS}
        assert {column: ours[name] for column, name in MAP_COLUMNS.items()} == pytest.approx(expected, abs=1e-12)


def test_depth_maps_across_everything_golden():
    for theirs in read_csv("heatmap_comparison_all_every7th"):
        maps = (INPUTS[f"depth/{theirs[f'Dataset{side}']}/{theirs[f'Model{side}']}"] for side in (1, 2))
        found = map_similarities(*maps)
        expected = {column: float(theirs[column]) for column in MAP_COLUMNS}
        assert {column: found[name] for column, name in MAP_COLUMNS.items()} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("table", "axis"), [("rates", "keep_rate"), ("capacity", "backbone"), ("models_small", "method")]
)
def test_correlations_golden(table, axis):
    rows = []
    for theirs in read_csv(f"collated_comparison_{table}_IM"):
        rates = {side: number(theirs.get(f"Ratio {side}", theirs.get("Ratio", ""))) for side in "AB"}
        a, b = (parse(theirs[f"Model {side}"].rstrip("x"))[0] for side in "AB")
        row = {"dataset_a": "IM", "backbone_a": "small", "method_a": a, "method_b": b}
        row |= {f"keep_rate_{side.lower()}": None if math.isnan(rate) else rate for side, rate in rates.items()}
        row["difference"] = float(theirs["Acc Diff"])
        row |= {name: number(theirs[name]) for name in ("3-CKA", "Stage-3-Mean-IoU", "NMI-Stage-3-Mean")}
        rows.append(row)
    anchors = ("none", "topk", "evit", "dpcknn")
    columns = ["3-CKA", "Stage-3-Mean-IoU", "NMI-Stage-3-Mean"]
    found = {
        (row["method"], row["keep_rate"], row["measure"]): row
        for row in correlate(rows, axis, anchors=anchors, columns=columns)
    }
    seen = 0
    for theirs in read_csv(f"correlations_comparison_{table}_IM"):
        name = theirs["Model"]
        method = METHODS.get(name.split("_")[0], name.split("_")[0])
        rate = float(name.rsplit("_", 1)[1]) if axis == "method" else None
        for column in columns:
            ours = found.get((method, rate, column), {"spearman": math.nan, "kendall": math.nan})
            for kind in ("Spearman", "Kendall"):
                expected = number(theirs[f"{column}-{kind}"])
                assert ours[kind.lower()] == pytest.approx(expected, abs=1e-12, nan_ok=True), (name, column)
                seen += not math.isnan(expected)
    assert seen == {"keep_rate": 18, "backbone": 18, "method": 30}[axis]


def made_up(method, rate, accuracy, **changes):
    rng = np.random.default_rng(len(method) + int(10 * (rate or 0)))
    run = Run("digits", changes.pop("backbone", "small"), method, rate, accuracy, changes.pop("parameters", 22))
    features = {3: rng.normal(size=(9, 3))}
    return Recording(run, (4, 4), 4, features=features, **changes)


def test_the_unreduced_model_meets_every_method_and_rate(tmp_path):
    recordings = [made_up("none", None, 98.0), made_up("topk", 0.5, 97.0), made_up("topk", 0.9, 97.5)]
    recordings += [made_up("evit", 0.5, 96.0), made_up("evit", 0.9, 97.7), made_up("tome", 0.5, 95.0)]
    rows = compare(recordings, "method")
    assert len(rows) == 2 * (5 + 3 + 1)
    first = {pair_of(row): row for row in rows}[("none", "small", None), ("tome", "small", 0.5)]
    back = {pair_of(row): row for row in rows}[("tome", "small", 0.5), ("none", "small", None)]
    assert first["difference"] == 3.0 == -back["difference"]
    assert first["pwcca_3"] == back["pwcca_reverse_3"] != back["pwcca_3"]
    table = correlate(rows, "method")
    groups = {(row["method"], row["keep_rate"]): row["pairs"] for row in table if row["measure"] == "cka_3"}
    assert groups == {("none", 0.5): 3, ("none", 0.9): 2, ("topk", 0.5): 2, ("topk", 0.9): 1}
    write_csv(rows, tmp_path / "methods.csv")
    with open(tmp_path / "methods.csv") as file:
        read = list(csv.DictReader(file))
    assert [float(row["procrustes_3"]) for row in read] == [row["procrustes_3"] for row in rows]


def test_what_cannot_be_compared_is_said():
    first, second = made_up("topk", 0.5, 1.0), made_up("evit", 0.5, 1.0)
    fewer = Recording(second.run, second.grid, second.depth, features={3: second.features[3][:8]})
    with pytest.raises(ValueError, match=r"topk small 0.5 \(9 images.*evit small 0.5 \(8"):
        compare([first, fewer], "method")
    with pytest.raises(ValueError, match="got 'dataset'"):
        compare([first, second], "dataset")
    with pytest.raises(ValueError, match="got 'colour'"):
        compare_depth_maps([], "colour")
