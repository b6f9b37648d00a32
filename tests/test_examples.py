"""Every script of examples/ runs as it stands, and prints what it promises."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
# What makes it short, what it must print, and what it must write.
RUNS = {
    "patch_and_time": (["--batch", "2", "--rounds", "2"], r"\[137, 96, 67\]\n\d+\.\d\d times as fast", None),
    "finetune_dynamicvit": (["--steps", "3"], r"loss \d+\.\d+, kept \[(0\.\d+(, )?){3}\]", None),
    "dense_features": ([], r"^67 tokens became a grid of \(2, 192, 14, 14\), by hand \(2, 196, 192\)\n.* 0\.\d", None),
    "draw_what_stays": (["--out", "kept.png"], r"^written: kept\.png", "kept.png"),
    "own_method": ([], r"^\[137, 96, 67\] tokens stay; the first to go in image 0: \d+\n", None),
    "export": (["--out", "reduced.onnx"], r"^written: reduced\.onnx; .*(\d\.\de-0[5-9]|0\.0e\+00)\n", "reduced.onnx"),
}


def test_each_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(RUNS)


# Exporting a whole DeiT-T takes longer than all other scripts; tests/cli does the same with one block.
NAMES = [pytest.param(name, marks=pytest.mark.slow if name == "export" else ()) for name in RUNS]


@pytest.mark.parametrize("name", NAMES)
def test_example(name, monkeypatch, tmp_path, capsys):
    if name == "export":
        pytest.importorskip("onnxruntime", reason="this example runs what it wrote in ONNX Runtime")
        pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    arguments, printed, written = RUNS[name]
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 40
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    with torch.random.fork_rng():
        runpy.run_path(str(path), run_name="__main__")
    assert re.search(printed, capsys.readouterr().out)
    assert written is None or (tmp_path / written).stat().st_size > 10_000
