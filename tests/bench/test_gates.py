"""The gates of bench.traffic and bench.compile_report: exceptions are needed, kept to and explained."""

import json
import os

import pytest
import torch

from bench import compile_report
from bench.primitives import Shape, parse_shapes
from bench.proof import compiler
from bench.proof.compiler import compiled_for, dispatch_to_triton, occupancy
from bench.proof.gates import Gate, Known, choose_primitives, table
from fastreduce import ops

compiles = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreting process cannot compile"
)
KNOWN = {"slow": Known(2.0, "it has to be"), "slow backward": Known(3.0, "twice the work")}
SLOW_TOO = {"slow too": Known(2.0, "it has to be")}


def test_a_gate_holds_or_is_missed():
    gate = Gate("ratio", 1.15, KNOWN)
    assert gate.check("fast forward", 1.15) == "ok"
    assert gate.check("fast backward", 1.16) == "MISSED"
    (failure,) = gate.failures(stale="none")
    assert failure == "ratio: fast backward has 1.16, at most 1.15 is allowed"
    assert gate.reasons() == []


def test_an_exception_is_needed_kept_to_and_explained():
    gate = Gate("ratio", 1.15, KNOWN | SLOW_TOO)
    assert gate.check("slow too", 1.2) == gate.check("slow forward", 2.0) == "known"
    assert gate.check("slow backward", 2.9) == "known"  # the exception that says more
    assert gate.failures() == []
    assert gate.reasons() == ["slow (2), slow too (2): it has to be", "slow backward (3): twice the work"]


def test_an_exception_that_is_exceeded_fails():
    gate = Gate("ratio", 1.15, KNOWN)
    assert gate.check("slow forward", 2.1) == "MISSED"
    assert gate.check("slow forward", 1.0) == "ok"  # the worst figure stays
    assert gate.failures(stale="none") == ["ratio: slow forward has 2.1, its known exception allows at most 2"]


def test_an_exception_that_nothing_needs_is_stale():
    gate = Gate("ratio", 1.15, KNOWN)
    gate.check("slow backward", 1.1)
    assert gate.failures(stale="none") == []
    assert gate.failures(stale="seen") == ["ratio: the exception of slow backward is stale"]
    assert gate.failures() == [f"ratio: the exception of {key} is stale" for key in KNOWN]
    gate.check("slow backward", 1.3)
    gate.check("slow forward", 1.3)
    assert gate.failures() == []


def test_an_exception_covers_whole_words_only():
    gate = Gate("ratio", 1.15, KNOWN)
    assert gate.check("slower forward", 1.3) == "MISSED"


def test_a_gate_from_below():
    gate = Gate("widest load", 16, {"scores": Known(4, "few")}, at_least=True)
    assert [gate.check("rows", 16), gate.check("scores", 4), gate.check("scores", 2)] == ["ok", "known", "MISSED"]
    assert gate.failures() == ["widest load: scores has 2, its known exception allows at least 4"]


def test_a_table_is_aligned():
    rows = [{"name": "a", "value": 1.5}, {"name": "long", "value": None}]
    assert table(rows, ("name", "value")).splitlines() == ["name  value", "a     1.500", "long"]
    assert table([], ("name",)) == "name"


def test_shapes_are_parsed():
    half, single = parse_shapes("deit_small-197-2-float16,vit_large-50-1", torch.float32)
    assert (half, single) == (Shape("deit_small", 197, 2, torch.float16), Shape("vit_large", 50, 1))
    assert parse_shapes(str(half), torch.float32) == [half]


@pytest.mark.parametrize(
    "words",
    ["deit-197-1", "deit_small-197", "deit_small-x-1", "deit_small-1-1", "deit_small-9-0", "deit_small-9-1-int8"],
)
def test_other_shapes_are_refused(words):
    with pytest.raises(ValueError, match=words):
        parse_shapes(words, torch.float32)


def test_unknown_primitives_are_refused():
    with pytest.raises(ValueError, match="unknown primitive 'sort_tokens'; expected one of attention_policy, "):
        choose_primitives("gather_tokens,sort_tokens")


@pytest.mark.parametrize(
    ("arch", "num_warps", "registers", "shared_bytes", "expected"),
    [
        (80, 4, 32, 0, 64 / 64),  # all of everything
        (80, 4, 33, 0, 48 / 64),  # 40 registers each: 51 warps, of which each scheduler has 12
        (80, 4, 128, 0, 16 / 64),
        (80, 8, 255, 0, 8 / 64),
        (80, 1, 32, 0, 32 / 64),  # no more than 32 blocks
        (80, 4, 32, 48 << 10, 3 * 4 / 64),  # of 49 KiB each, in 164
        (90, 4, 32, 48 << 10, 4 * 4 / 64),  # in 228
        (90, 8, 32, 227 << 10, 8 / 64),
        (80, 16, 129, 0, 0.0),  # 14 warps have room: not one block
        ("gfx942", 4, 64, 0, 32 / 32),
        ("gfx942", 4, 128, 0, 16 / 32),
        ("gfx942", 8, 129, 0, 8 / 32),  # 136 registers each: 12 warps, so one block
        ("gfx942", 4, 64, 32 << 10, 8 / 32),
        ("gfx942", 4, 512, 0, 4 / 32),
    ],
)
def test_occupancy(arch, num_warps, registers, shared_bytes, expected):
    assert occupancy(arch, num_warps, registers, shared_bytes) == expected


@compiles
def test_only_the_context_sends_cpu_tensors_to_the_kernels():
    x, index = torch.zeros(2, 9, 16), torch.zeros(2, 3, dtype=torch.int64)
    with compiled_for(80) as reports:
        with dispatch_to_triton():
            ops.gather_tokens(x, index, backend="triton")
        with pytest.raises(RuntimeError, match="on the CPU"):
            ops.gather_tokens(x, index, backend="triton")
    assert [report.name for report in reports] == ["gather_tokens_kernel"]


@compiles
@pytest.mark.parametrize("arch", [80, "gfx942"])
def test_a_report_reads_widths_and_dots(arch):
    reports = {}
    for dtype in (torch.float16, torch.float32):
        x, logits = torch.zeros(2, 32, 64, dtype=dtype), torch.zeros(2, 32, 16, dtype=dtype)
        with dispatch_to_triton(), compiled_for(arch) as compiled:
            ops.soft_merge(logits, x, backend="triton")
        (reports[dtype],) = compiled
    half, single = reports.values()
    assert (half.tensor_dots, single.tensor_dots) == (True, False)
    assert half.mma_ops > 0
    for report in (half, single):
        assert min(max(report.load_bytes), max(report.store_bytes)) >= (16 if arch == 80 else 8)
        assert 0 < report.registers <= 255
        assert (report.spill_ops, report.atomics, report.float64_ops) == (0, 0, 0)
        assert report.occupancy == occupancy(arch, report.num_warps, report.registers, report.shared_bytes)


@compiles
def test_a_kernel_that_does_not_compile_is_reported(monkeypatch):
    def broken(self, *args, **kwargs):
        raise RuntimeError("no such instruction\nin detail")

    monkeypatch.setattr(compiler.JITFunction, "run", broken)
    failures = {}
    with dispatch_to_triton(), compiled_for("gfx942", failures) as reports:
        ops.gather_tokens(torch.zeros(2, 9, 16), torch.zeros(2, 3, dtype=torch.int64), backend="triton")
    assert (reports, failures) == ([], {"gather_tokens_kernel": "no such instruction"})


COMMAND = ["--arch", "sm_80", "--shapes", "deit_tiny-50-2-float16", "--primitives", "gather_tokens"]


@compiles
def test_the_report_ends_well(capsys, tmp_path):
    assert compile_report.main([*COMMAND, "--json", str(tmp_path / "report.json")]) == 0
    assert "group_slots_kernel" in capsys.readouterr().out
    kernels = json.loads((tmp_path / "report.json").read_text())["kernels"]
    assert {kernel["kernel"]: kernel["gate"] for kernel in kernels} == {
        "gather_tokens_kernel": "ok",
        "group_slots_kernel": "known",
        "reduce_slots_kernel": "ok",
    }


@compiles
def test_the_report_fails_without_the_exceptions(capsys, monkeypatch):
    monkeypatch.setitem(compile_report.KNOWN, "loads", {})
    assert compile_report.main(COMMAND) == 1
    assert "FAILED widest load: group_slots_kernel float16 sm_80 deit_tiny-50 has 8" in capsys.readouterr().out


def test_an_unknown_architecture_is_refused(capsys):
    with pytest.raises(SystemExit):
        compile_report.main(["--arch", "sm_70"])
    assert "unknown architecture 'sm_70'; expected one of sm_80, sm_90, gfx942" in capsys.readouterr().err
