"""The command runs primitives and cases, says what is red, and counts."""

import dataclasses
import json

import pytest
import torch

from bench import compile_report, emulate
from bench.primitives import Shape
from bench.proof.emulator import counts, ladder
from bench.proof.emulator.ladder import SCHEDULES, Task, climb
from bench.proof.emulator.ptx import parse

SHAPE = Shape("deit_tiny", 20, 1, torch.bfloat16)


def test_a_primitive_climbs():
    climbs = list(climb(Task("primitives", "gather_tokens_norm", SHAPE, ("sm_80", "sm_90"))))
    assert [one.wrong for one in climbs] == [None] * 8
    assert {(one.arch, one.direction, one.schedule) for one in climbs} == {
        (arch, direction, schedule)
        for arch in ("sm_80", "sm_90")
        for direction in ("forward", "backward")
        for schedule in SCHEDULES
    }


@pytest.mark.parametrize("name", ["sample_tokens budget 1", "unmerge_tokens 1"])
def test_an_edge_climbs(name):
    assert [one.wrong for one in climb(Task("edge", name, SHAPE, ("sm_90",)))] == [None] * 2


def test_a_special_case_climbs():
    case = Task("special", "select_topk NaN and ties", SHAPE, ("sm_80",))
    assert [one.wrong for one in climb(case)] == [None] * 2


def _with(monkeypatch, change):
    """Let the ladder find gather_tokens with another call of its kernels."""
    primitive = ladder.load_primitives()["gather_tokens"]

    def call(backend, **inputs):
        found = primitive.call(**inputs, backend=backend)
        return change(found) if backend == "triton" else found

    changed = dataclasses.replace(primitive, call=call)
    monkeypatch.setattr(ladder, "choices", lambda group, dtype: {"gather_tokens": changed})


def _wrong(found):
    return tuple(output * 2 for output in found)


def _failing(found):
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(("change", "words"), [(_wrong, "is off by"), (_failing, "RuntimeError: no such kernel")])
def test_a_wrong_result_is_red(monkeypatch, change, words):
    _with(monkeypatch, change)
    climbs = list(climb(Task("primitives", "gather_tokens", SHAPE, ("sm_90",))))
    assert all(one.wrong is not None and words in one.wrong for one in climbs), climbs


def test_the_command_s_exit(monkeypatch, capsys):
    arguments = [
        "--primitives",
        "gather_tokens",
        "--arch",
        "sm_90",
        "--dtypes",
        "float32",
        "--shapes",
        "deit_tiny-20-1",
    ]
    assert emulate.main([*arguments, "--jobs", "1"]) == 0
    assert "4 runs, 0 red" in capsys.readouterr().out
    _with(monkeypatch, _wrong)
    assert emulate.main([*arguments, "--jobs", "1"]) == 1
    assert "RED  gather_tokens deit_tiny-20-1-float32 sm_90 forward" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arch", "sm_70"], "unknown architecture 'sm_70'"),
        (["--primitives", "nothing"], "unknown primitive 'nothing'"),
        (["--dtypes", "int8"], "unknown dtype 'int8'"),
        (["--groups", "some"], "unknown group 'some'"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
    ],
)
def test_bad_options(arguments, words, capsys):
    with pytest.raises(SystemExit):
        emulate.main(arguments)
    assert words in capsys.readouterr().err


def test_all_takes_what_the_default_leaves_out():
    few, many = (emulate.tasks(emulate._parser().parse_args(words)) for words in ([], ["--all"]))
    assert set(few) < set(many)
    assert {task.arches for task in few} == {tuple(ladder.ARCHES)}
    assert {task.shape.dtype for task in many if task.group == "primitives"} == {
        torch.bfloat16,
        torch.float16,
        torch.float32,
    }
    assert {task.group for task in few} == set(ladder.GROUPS)


_PTX = """
.visible .entry one(.param .u64 one_param_0)
{
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<9>;
	ld.param.b64 	%rd1, [one_param_0];
	ld.global.b32 	%r1, [%rd1];
	ld.global.b32 	%r2, [%rd1+4];
	add.s32 	%r3, %r1, %r2;
	ld.global.b32 	%r4, [%rd1+8];
	bar.sync 	0;
	cvt.u64.u32 	%rd2, %r4;
	ld.global.b32 	%r5, [%rd2];
	ret;
}
"""


def test_counts():
    listing = parse(_PTX)
    found = counts.count_visits(listing, [(0, 6), (6, 9)])
    assert (found["instructions"], found["loads"], found["barriers"]) == (9, 4, 1)
    assert found["waits"] == 2  # two loads together, then one whose value is the address of the last


def test_the_counts_of_a_primitive():
    rows = counts.count_kernels(Task("primitives", "gather_tokens", SHAPE, ("sm_90",)))
    assert [row["arch"] for row in rows] == ["sm_90"] * len(rows)
    assert all(row["instructions"] > 20 and row["loads"] and row["stores"] and row["waits"] for row in rows), rows


def test_the_compile_report_counts(tmp_path, capsys):
    """Every kernel by itself, those of one name too: with and without a norm other instructions are executed."""
    path = tmp_path / "report.json"
    chosen = ["--primitives", "gather_tokens,gather_tokens_norm", "--arch", "sm_90", "--shapes", "deit_tiny-20-1"]
    assert compile_report.main([*chosen, "--counts", "--json", str(path)]) == 0
    rows = [row for row in json.loads(path.read_text())["kernels"] if row["kernel"] == "gather_tokens_kernel"]
    assert len({row["hash"] for row in rows}) == len(rows) >= 2
    assert all(row["instructions"] > 20 and row["waits"] for row in rows)
    assert len({row["instructions"] for row in rows}) > 1
    assert "instructions  barriers  waits  gate" in capsys.readouterr().out
    compile_report.main([*chosen, "--json", str(path)])
    assert all("waits" not in row for row in json.loads(path.read_text())["kernels"])
    assert "waits" not in capsys.readouterr().out
