"""Results where standard output, a file or a folder fails, and tables that must fit."""

import io
import json
import os
import re
import subprocess
import sys

import pytest

from fastreduce import draw
from fastreduce.cli import tables
from fastreduce.cli.screen import Page, progress_bar, shortened, write
from fastreduce.speed import comparison as engine
from fastreduce.speed import payoff
from tests.helpers.commands import run

QUICK = ["compare", "--model", "test_vit", "--batch", "1", "--rounds", "1", "--methods", "topk", "--keep-rate", "0.5"]
QUICK += ["--random", "--no-fidelity"]
PLAN = ["plan", "--model", "test_vit", "--batch", "1", "--rounds", "1", "--keep-rate", "0.5", "--round-to", "none"]


def start(*arguments, **environment):
    """Start a real process, all of whose streams are pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "fastreduce", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


class Letters(io.StringIO):
    encoding = "ascii"


class Broken(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def flush(self):
        raise self.error


def test_a_closed_pipe_costs_neither_json_nor_pictures(tmp_path):
    """Standard output is closed as by ``| head``, amid letters that ASCII does not have."""
    process = start(*QUICK, "--out", tmp_path, "--json", tmp_path / "result.json", PYTHONIOENCODING="ascii")
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(120) == 0, errors
    assert [line.split()[0] for line in errors.splitlines()] == ["checking", "measuring", "drawing"]
    assert sorted(os.listdir(tmp_path)) == ["index.html", "result.json", "topk-0.5.png"]
    row = json.loads((tmp_path / "result.json").read_text())["methods"][0]
    assert row["picture"] == str(tmp_path / "topk-0.5.png")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_under_stdout_costs_nothing(tmp_path):
    """The tables go to stderr instead."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fastreduce", *QUICK, "--out", tmp_path, "--json", tmp_path / "result.json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert sorted(os.listdir(tmp_path)) == ["index.html", "result.json", "topk-0.5.png"]
    assert "keep rate 0.5" in done.stderr
    assert done.stderr.endswith("\nerror: the tables cannot be written: No space left on device\n")
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("command", ["methods", "--help", "--version"])
def test_short_answers_to_a_full_disk(command):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fastreduce", command], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (2, "error: the output cannot be written: No space left on device\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_under_the_json_costs_neither_tables_nor_pictures(tmp_path):
    done = run(*QUICK, "--out", tmp_path, "--json", "/dev/full")
    assert done.exit_code == 2
    assert "keep rate 0.5" in done.stdout
    assert "1 picture in" in done.stdout
    assert done.stderr.endswith("\nerror: '/dev/full' cannot be written: No space left on device\n")
    assert sorted(os.listdir(tmp_path)) == ["index.html", "topk-0.5.png"]


def test_a_picture_that_fails_costs_no_other(tmp_path, monkeypatch):
    save = draw.save_panels

    def fails_once(file, panels, title, *rest):
        if "Top-K" in title:
            file.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        save(file, panels, title, *rest)

    monkeypatch.setattr(draw, "save_panels", fails_once)
    file = tmp_path / "result.json"
    done = run(*QUICK, "--methods", "tome", "--out", tmp_path / "out", "--json", file)
    assert done.exit_code == 2
    assert sorted(os.listdir(tmp_path / "out")) == ["index.html", "tome-0.5.png"]
    assert "1 picture in" in done.stdout
    assert f"error: '{tmp_path}/out/topk-0.5.png' cannot be written: No space left on device\n" in done.stderr
    topk, tome = json.loads(file.read_text())["methods"]
    assert "picture" not in topk
    assert tome["picture"] == str(tmp_path / "out" / "tome-0.5.png")


def test_json_to_stdout_and_tables_to_stderr():
    for arguments in (QUICK, PLAN):
        done = run(*arguments, "--no-pictures", "--json", "-")
        assert done.exit_code == 0, done.output
        result = json.loads(done.stdout)
        assert result["format"] == f"fastreduce {arguments[0]}"
        assert result["format_version"] == 2
        assert "unreduced" in done.stderr


def test_no_plain_algorithm_is_called_official(tmp_path):
    file = tmp_path / "result.json"
    for arguments in (QUICK, PLAN):
        done = run(*arguments, "--no-pictures", "--json", file)
        assert "official" not in done.output + file.read_text()
        assert "GFLOP" not in done.output


def test_a_file_that_is_there_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    file.write_text("of yesterday")
    monkeypatch.setattr(engine.Comparison, "result", lambda self: {"bad": object()})
    monkeypatch.setattr("fastreduce.cli.output.doubts", lambda result: [])
    assert run(*QUICK, "--no-pictures", "--json", file).exception
    assert file.read_text() == "of yesterday"
    assert os.listdir(tmp_path) == ["result.json"]


def stop_after(monkeypatch, calls):
    """Have Ctrl-C come with this many calls of a clock."""
    clock, left = engine.seconds_of, iter(range(calls))

    def stopped(call, device):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return clock(call, device)

    monkeypatch.setattr(engine, "seconds_of", stopped)
    monkeypatch.setattr("fastreduce.measure.seconds_of", stopped)


def test_ctrl_c_leaves_the_rounds_that_were_finished(tmp_path, monkeypatch):
    stop_after(monkeypatch, 2 * 5 + 3)  # five turns a round: unreduced twice, slice, method, plain
    monkeypatch.setattr(engine.Comparison, "_choose_threads", lambda self: None)
    file = tmp_path / "result.json"
    done = run(*QUICK, "--rounds", "9", "--out", tmp_path / "out", "--json", file)
    assert done.exit_code == 130
    assert done.stdout.startswith("Stopped after 2 rounds: these are the rounds that were finished.\n")
    assert "batch 1, 2 rounds" in done.stdout
    result = json.loads(file.read_text())
    assert result["interrupted"]
    assert result["rounds"] == 2
    for row in [result["unreduced"], *result["methods"], *result["free_slices"]]:
        assert len(row["seconds"]) == 2
    assert not (tmp_path / "out").exists()


def test_ctrl_c_before_a_round_is_one_line(tmp_path, monkeypatch):
    stop_after(monkeypatch, 4)
    monkeypatch.setattr(engine.Comparison, "_choose_threads", lambda self: None)
    for arguments in (QUICK, PLAN):
        done = run(*arguments, "--out", tmp_path / "out", "--json", tmp_path / "result.json")
        assert done.exit_code == 130
        assert done.stdout == ""
        assert done.stderr.endswith("\nerror: stopped before a round was finished: there is nothing to show\n")
    assert os.listdir(tmp_path) == []


def test_ctrl_c_while_models_are_built(monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.Comparison, "__init__", stopped)
    done = run(*QUICK, "--no-pictures")
    assert (done.exit_code, done.stderr) == (130, "error: stopped while building models\n")


def test_ctrl_c_in_a_plan_keeps_the_batches_that_were_measured(tmp_path, monkeypatch):
    """Six rounds of the first batch, none of the second, of three turns each."""
    stop_after(monkeypatch, 6 * 3 + 2)
    monkeypatch.setattr(engine.Comparison, "_choose_threads", lambda self: None)
    file = tmp_path / "result.json"
    done = run(*PLAN, "--batch", "2", "--rounds", "6", "--no-pictures", "--json", file)
    assert done.exit_code == 130
    result = json.loads(file.read_text())
    assert result["interrupted"]
    assert [(row["batch"], row["rounds"]) for row in result["batches"]] == [(1, 6)]
    assert done.stdout.startswith("Stopped after 6 rounds")


def doubtful(**changes):
    """Return a result of which nothing is wrong, with changes."""
    unreduced = {"gmacs": 2.0, "drift": 1.01, "drift_quartiles": [0.99, 1.02]}
    row = {"label": "topk", "keep_rate": 0.5, "speedup": 1.9, "gmacs": 1.0, "counts": [3]}
    free = {"counts": [98, 49], "speedup": 1.8, "gmacs": 1.1}
    return {
        **{"load_at_start": 0.1, "cpus": 2, "unreduced": unreduced, "methods": [row], "free_slices": [free]},
        **changes,
    }


def test_a_quiet_machine_gets_no_doubts():
    assert tables.doubts(doubtful()) == []
    assert tables.doubts(doubtful(load_at_start=None)) == []


def test_a_load_a_drift_and_more_speed_than_work_are_doubts():
    assert tables.doubts(doubtful(load_at_start=1.5)) == ["the machine was busy when this began (load 1.5 on 2 CPUs)"]
    drifting = {**doubtful()["unreduced"], "drift": 1.2, "drift_quartiles": [1.1, 1.3]}
    assert tables.doubts(doubtful(unreduced=drifting)) == [
        "the unreduced model's time changed by 20% between start and end of a round"
    ]
    fast = {**doubtful()["methods"][0], "speedup": 2.1}
    assert tables.doubts(doubtful(methods=[fast] * 5)) == [
        "topk 0.5 came out 2.10 times as fast where the saved work allows 2.00, topk 0.5 came out 2.10 times as fast "
        "where the saved work allows 2.00, topk 0.5 came out 2.10 times as fast where the saved work allows 2.00 and 2 "
        "more, which is noise"
    ]


def test_doubts_come_first(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (17.0, 1.0, 1.0))
    for arguments in (QUICK, PLAN):
        done = run(*arguments, "--no-pictures")
        assert done.stdout.startswith("Read these speeds with care: the machine was busy when this began (load 17.0 on")


def test_a_plan_that_is_faster_than_the_saved_work_is_doubted_first(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    clock = {"unreduced": 9.0, "control": 9.0}
    monkeypatch.setattr(
        payoff, "take_turns", lambda calls, device, rounds: {name: [clock.get(name, 1.0)] * rounds for name in calls}
    )
    done = run(*PLAN, "--rounds", "5", "--no-pictures")
    first = done.stdout.splitlines()[0]
    assert first.startswith("Read these speeds with care: 0.5 at batch 1 came out 9.00 times as fast where the saved")


def test_below_five_rounds_there_is_no_spread_and_no_bold():
    page = Page(Terminal())
    for rounds, spread in ((4, False), (5, True)):
        speed = {"images_per_second": 12.0, "images_per_second_quartiles": [11.0, 13.0], "seconds": [1.0] * rounds}
        assert ("±" in tables._spread(speed)) == spread
    assert page.terminal


@pytest.mark.parametrize("rounds", [4, 5])
def test_bold_takes_five_rounds(rounds, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    settings = engine.Settings(model="test_vit", methods=("topk",), keep_rates=(0.5,), batch=1, rounds=rounds)
    comparison = engine.Comparison(settings)
    comparison.check(lambda *_: None)
    comparison.measure(lambda *_: None)
    page = Page(terminal := Terminal())
    tables.print_comparison(page, {**comparison.result(), "interrupted": False})
    page.write()
    (line,) = (line for line in terminal.getvalue().splitlines() if " topk " in line)
    assert ("\x1b[1m" in line) == ("±" in line) == (rounds == 5)


COUNTS = list(range(190, 70, -10))


def test_schedules_are_shortened_in_the_middle():
    assert shortened(COUNTS, 100) == " ".join(map(str, COUNTS))
    assert shortened(COUNTS, 40) == "190 180 170 160 150 … 120 110 100 90 80"
    assert shortened(COUNTS, 8) == "190 … 80"
    assert shortened(COUNTS, 0) == "190 … 80"
    assert shortened([100, 50], 1) == "100 50"
    for width in range(8, 60):
        assert len(shortened(COUNTS, width)) <= width


def printed(stream, columns=None, monkeypatch=None):
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", "50")
    page = Page(stream)
    rows = [["free slice", COUNTS, "12345.67 ± 0.12"], ["topk", [3], "1.00 ± 0.01"]]
    page.table("keep rate 0.5", ("method", "tokens", "images/s"), rows, sections=[0])
    assert page.write() is None
    return re.sub("\x1b[^m]*m", "", stream.getvalue())


@pytest.mark.parametrize("columns", [20, 40, 60, 80])
def test_numbers_are_not_cut_on_a_terminal(columns, monkeypatch):
    text = printed(Terminal(), columns, monkeypatch)
    assert "12345.67 ± 0.12" in text
    assert "190 " in text
    assert " 80 " in text
    if columns >= 40:
        assert max(map(len, text.splitlines())) <= columns


def test_nothing_is_cut_where_there_is_no_terminal():
    assert " ".join(map(str, COUNTS)) in printed(io.StringIO())


def test_an_ascii_stream_gets_ascii_in_columns():
    text = printed(Letters())
    assert text.isascii()
    assert "12345.67 +- 0.12" in text
    assert "1.00 +- 0.01" in text
    lines = [line for line in text.splitlines() if "+-" in line and "." in line]
    assert len({len(line) for line in lines}) == 1, "columns stand under one another"


def test_no_markup_is_read_in_names():
    page = Page(stream := io.StringIO())
    page.line("weights [/bold] of [red]x[/red].pth")
    page.write()
    assert stream.getvalue() == "weights [/bold] of [red]x[/red].pth\n"


def test_writing_to_what_is_broken():
    assert write(None, "x") is None
    assert write(Broken(BrokenPipeError(32, "gone")), "x") is None
    error = OSError(28, "No space left on device")
    assert write(Broken(error), "x") is error
    write(letters := Letters(), "\udcff – x")
    assert letters.getvalue() == "? ? x"


def test_progress_is_one_line_a_phase(capsys):
    with progress_bar(lines=True) as move:
        for what in ("checking", "checking topk 0.5", "measuring", "measuring", "measuring batch 4", "drawing"):
            move(what, 0, 1)
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["checking", "measuring", "drawing"]
    with progress_bar() as move:
        move("checking", 0, 1)
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_is_one_bar_with_the_time_left(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar() as move:
        move("checking", 1, 2)
        move("measuring", 3, 4)
    text = terminal.getvalue()
    assert "measuring" in text
    assert " 75 %" in text
    assert "left" in text


def test_json_holds_no_number_that_json_does_not_know(tmp_path, monkeypatch):
    result = engine.Comparison.result
    monkeypatch.setattr(engine.Comparison, "result", lambda self: {**result(self), "load_at_start": float("nan")})
    file = tmp_path / "result.json"
    assert run(*QUICK, "--no-pictures", "--json", file).exit_code == 0
    assert json.loads(file.read_text(), parse_constant=pytest.fail)["load_at_start"] is None
