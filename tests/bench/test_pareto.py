"""The front of accuracy against speed, and timm's columns."""

import csv
import io

import pytest
import torch
from torch import nn

from bench import pareto
from bench.pareto import Point, front
from bench.proof import tiny
from fastreduce.speed.timm_table import COLUMNS, as_csv, count_macts, row_of, tagged, work_of


def test_front():
    points = [Point("slow", 1, 90), Point("fast", 10, 70), Point("beaten", 5, 60), Point("middle", 5, 80)]
    assert [point.model for point in front(points)] == ["fast", "middle", "slow"]
    assert [point.model for point in front([Point("a", 1, 80), Point("b", 1, 81)])] == ["b"]


def test_names():
    assert tagged("deit_small_patch16_224") == "deit_small_patch16_224"
    assert tagged("deit_small_patch16_224", "topk", 0.5) == "deit_small_patch16_224.topk_0.5"
    assert tagged("vit_base.augreg_in1k", "radial l2", 0.7) == "vit_base.augreg_in1k_radial_l2_0.7"


def test_activations_are_what_products_give():
    layers = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.Flatten(2), nn.Linear(16, 5), nn.GELU())
    assert count_macts(layers, torch.randn(2, 3, 8, 8)) == pytest.approx((4 * 16 + 4 * 5) / 1e6)


def test_columns():
    model = tiny.build(depth=1)
    image = tiny.images(model)
    work = work_of(model, image)
    row = row_of("tiny", 4, image.shape[-1], 0.5, work)
    (read,) = csv.DictReader(io.StringIO(as_csv([row])))
    assert tuple(read) == COLUMNS
    assert float(read["infer_samples_per_sec"]) == 8
    assert float(read["infer_step_time"]) == 500
    assert float(read["param_count"]) == round(sum(p.numel() for p in model.parameters()) / 1e6, 2)


def _write(folder, name, text):
    file = folder / name
    file.write_text(text)
    return str(file)


def test_a_reduced_model_that_is_a_new_point(tmp_path, capsys):
    accuracy = _write(tmp_path, "accuracy.csv", "model,top1\ndeit_s.in1k,79.9\nother.a,79.0\nslow.b,85.0\n")
    speed = _write(tmp_path, "speed.csv", "model,infer_samples_per_sec\ndeit_s,1000\nother,1500\nslow,100\n")
    ours = "model,infer_samples_per_sec,infer_batch_size\ndeit_s,10,8\ndeit_s.topk_0.5,19,8\ndeit_s.topk_0.9,11,8\n"
    reduced = _write(tmp_path, "reduced.csv", ours)
    files = ["--accuracy", accuracy, "--speed", speed, "--reduced", reduced]
    assert pareto.main([*files, "--accuracy-loss", "0.5"]) == 0
    half, most = capsys.readouterr().out.splitlines()[2:]
    assert half == "| deit_s.topk_0.5 | 1,900 | 79.40 | yes: no model is as fast |"
    assert most == "| deit_s.topk_0.9 | 1,100 | 79.40 | no: +0.40 on other.a |"
    losses = _write(tmp_path, "losses.csv", "model,loss\ndeit_s.topk_0.5,0.25\n")
    pareto.main([*files, "--losses", losses])
    assert "| deit_s.topk_0.5 | 1,900 | 79.65 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model,top5\na,1\n", "lacks the column 'top1'; it has model, top5"),
        ("model,top1\n", "holds no model"),
        ("model,top1\nz,1\n", "none of the reduced models"),
        (None, "cannot be read"),
    ],
)
def test_tables_that_do_not_serve(tmp_path, capsys, text, message):
    accuracy = tmp_path / "accuracy.csv"
    if text is not None:
        accuracy.write_text(text)
    speed = _write(tmp_path, "speed.csv", "model,infer_samples_per_sec\nz,1000\n")
    reduced = _write(tmp_path, "reduced.csv", "model,infer_samples_per_sec,infer_batch_size\na,10,8\n")
    with pytest.raises(SystemExit) as end:
        pareto.main(["--accuracy", str(accuracy), "--speed", speed, "--reduced", reduced])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
