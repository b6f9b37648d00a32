"""The orchestra of bench.gpu: its order, and that what crashes, hangs or is wrong takes nothing else with it."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import gpu, microbenchmark
from bench.gpu_tables import RULE_PRIMITIVES, markdown
from bench.primitives import load_primitives

CPU = torch.device("cpu")
SERVE = """
import os, subprocess, sys, time
from bench.children import serve

def work(asked):
    item, phase = asked["item"], asked["phase"]
    what = item.get("what", "work")
    if what == "crash":
        print("illegal memory access", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 9)
    if what == "start":
        yield {"pids": [os.getpid(), subprocess.Popen(["sleep", "60"]).pid]}
    if what in ("hang", "start"):
        time.sleep(60)
    if what == "break":
        broken.append(item)
        raise RuntimeError("told")
    time.sleep(item.get("sleep", 0.0))
    yield {**item, "phase": phase, "pid": os.getpid()}

broken = []
serve(work, lambda: not broken)
"""
PARENT = """
import sys
from bench.children import Child
child = Child([sys.executable, "-c", sys.argv[1]], {})
child.do({"phase": "micro", "item": {"what": "start"}}, 60.0, lambda row: print(*row["pids"], flush=True))
"""


@pytest.fixture
def session(tmp_path):
    made = gpu._Session(tmp_path / "result.json", "cpu", 20.0)
    made.command, made.grace = [sys.executable, "-c", SERVE], 0.0
    yield made
    made.finish()


def saved(session):
    return json.loads(session.path.read_text())


def left_out(session):
    return [part["left_out"] for part in saved(session)["parts"]]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_crash_is_written_down_and_the_rest_goes_on(session, workers):
    items = [{"number": number, "what": "crash" if number in (1, 4) else "work"} for number in range(6)]
    session.run("kernels", "micro", [items[worker::workers] for worker in range(workers)], session.end)
    rows = sorted(saved(session)["micro"], key=lambda row: row["number"])
    assert [row["number"] for row in rows] == list(range(6))
    for row in rows:
        if row["what"] == "crash":
            assert row["failed"] == "the process ended with -9: illegal memory access"
        else:
            assert row["phase"] == "micro"
    assert left_out(session) == [0]


def test_the_time_ends_what_hangs(session):
    items = [{"what": "work"}, {"what": "hang"}, {"what": "work"}]
    started = time.perf_counter()
    session.run("checks", "parity", [items], started + 2.0)
    assert time.perf_counter() - started < 20.0
    assert [row["what"] for row in saved(session)["parity"]] == ["work"]
    assert left_out(session) == [2]


def test_what_hangs_alone_is_written_down(session):
    session.patience = {"parity": 1.5}
    session.run("checks", "parity", [[{"what": "work"}, {"what": "hang"}, {"what": "work"}]], session.end)
    assert [row.get("failed") for row in saved(session)["parity"]] == [None, "no result within 1.5 s", None]


def test_what_was_begun_may_end_a_little_late(session):
    session.grace = 15.0
    items = [{"sleep": 1.0}, {}]
    session.run("kernels", "micro", [items], time.perf_counter() + 0.5)
    assert len(saved(session)["micro"]) == 1
    assert left_out(session) == [1]
    assert session.children[0].lives


def test_a_broken_device_costs_a_process_and_one_row(session):
    session.run("checks", "parity", [[{"what": "work"}, {"what": "break"}, {"what": "work"}]], session.end)
    first, told, last = saved(session)["parity"]
    assert told["failed"] == "RuntimeError: told"
    assert first["pid"] != last["pid"]
    assert left_out(session) == [0]


def test_a_child_that_cannot_start_is_written_down(session):
    session.command = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    session.run("checks", "parity", [[{"what": "work"}]], session.end)
    (row,) = saved(session)["parity"]
    assert row["failed"] == "the process ended with 1: no such thing"


def test_a_child_serves_every_part_and_those_without_work_end(session):
    session.run("checks", "parity", [[{}], [{}]], session.end)
    first, second = session.children
    session.run("kernels", "micro", [[{}]], session.end)
    session.run("models", "models", [[{}]], session.end)
    result = saved(session)
    assert {row["pid"] for phase in ("micro", "models") for row in result[phase]} == {first.process.pid}
    assert first.lives
    assert not second.lives


def test_a_child_goes_on_after_an_error():
    items = [{"primitive": "nothing", "shape": ["deit_tiny", 26, 2, "float32"], "direction": "forward"}]
    items.append({**items[0], "primitive": "cls_scores"})
    asked = "".join(json.dumps({"phase": "parity", "item": item}) + "\n" for item in items) + "null\n"
    done = subprocess.run(gpu._child_command("cpu"), input=asked, capture_output=True, text=True)
    failed, first, right, second = map(json.loads, done.stdout.splitlines())
    assert first == second == {"done": True}
    assert failed["row"]["failed"].startswith("KeyError: 'nothing'")
    assert right["row"] == {**items[1], "wrong": None}
    assert done.returncode == 0


def test_the_command_does_every_phase(tmp_path, monkeypatch, capsys):
    """Every phase runs in one process, from parity to the tables."""
    parts, kept = gpu._quick_parts("cpu", 1), {"cls_scores", None}

    def fewer(items):
        return lambda *a: [[item for item in part if item.get("primitive") in kept] for part in items(*a)]

    few = [part if part.phase == "racecheck" else dataclasses.replace(part, items=fewer(part.items)) for part in parts]
    monkeypatch.setattr(gpu, "_quick_parts", lambda device, workers: few)
    assert gpu.main(["--device", "cpu", "--quick", "--workers", "1", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert [part["name"] for part in result["parts"]] == [part.name for part in parts]
    assert {part["left_out"] for part in result["parts"]} == {0}
    for phase in gpu._PHASES:
        assert result[phase]
        assert not any(row.get("failed") or row.get("reason") for row in result[phase])
    assert [(group["model"], group["batch"]) for group in result["models"]] == [("test_vit", 2), ("test_vit", 1)]
    assert path.with_suffix(".md").read_text() == markdown(result)
    assert "parity in float32: 2 results, 0 of 2 left out" in capsys.readouterr().out


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait_for(condition):
    until = time.perf_counter() + 20.0
    while not condition() and time.perf_counter() < until:
        time.sleep(0.05)
    return condition()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux which processes run")
def test_children_end_with_their_parent():
    """Killed by a signal that it cannot see, and in the middle of an item."""
    with subprocess.Popen([sys.executable, "-c", PARENT, SERVE], stdout=subprocess.PIPE, text=True) as parent:
        pids = list(map(int, parent.stdout.readline().split()))
        assert len(pids) == 2
        assert all(map(_runs, pids))
        parent.kill()
        assert _wait_for(lambda: not any(map(_runs, pids)))


def test_an_interrupt_ends_everything_at_once(session):
    """Results that exist by then are kept."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background would ignore it
    interrupt = threading.Timer(2.0, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    interrupt.start()
    started = time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt):
            session.run("checks", "parity", [[{}, {"what": "hang"}, {}], [{"what": "hang"}]], started + 60.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.perf_counter() - started < 40.0
    assert not any(child.lives for child in session.children)
    assert len(saved(session)["parity"]) <= 1


def _part(name, share, items):
    return gpu.Part(name, "micro", share, items)


class TestShares:
    """Shares of the time."""

    @pytest.mark.parametrize("parts", [gpu._full_parts("cuda", 4), gpu._quick_parts("cpu", 1)])
    def test_they_make_up_the_whole(self, parts):
        assert sum(part.share for part in parts) == pytest.approx(1.0)
        assert min(part.share for part in parts) > 0

    def test_a_part_that_takes_long_leaves_the_others_theirs(self, session):
        session.started, session.end = time.perf_counter(), time.perf_counter() + 16.0
        slow, quick = [{"sleep": 0.2, "of": "slow"}] * 100, [{"of": "quick"}] * 3
        session.run_all([_part("slow", 0.25, lambda *_: [slow]), _part("quick", 0.75, lambda *_: [quick])])
        ran = [row["of"] for row in saved(session)["micro"]]
        assert 0 < ran.count("slow") < 100
        assert ran.count("quick") == 3
        assert left_out(session) == [100 - ran.count("slow"), 0]

    def test_what_a_part_leaves_goes_to_the_next(self, session):
        lefts = []

        def nothing(result, left):
            lefts.append(left)
            return [[]]

        session.run_all([_part("one", 0.5, nothing), _part("two", 0.25, nothing), _part("three", 0.25, nothing)])
        one, two, three = lefts
        assert one <= 10.0 < two <= 15.0 < three <= 20.0


def test_what_matters_comes_first(session, monkeypatch):
    ran = []
    session.command = [sys.executable, "-c", SERVE]
    session.started, session.end = time.perf_counter(), time.perf_counter() + 600.0
    monkeypatch.setattr(session, "save", lambda: None)
    monkeypatch.setattr(session, "add", lambda phase, row: ran.append((phase, row)))
    session.run_all(gpu._full_parts("cuda", 2))

    def shape(row):
        return row.get("shape", [None] * 4)

    def micro(row, *who, model="deit_small"):
        return "contender" in row and row["contender"] in who and shape(row)[0] == model

    def models(row, name, batches, **more):
        wanted = {"models": [name], "batches": batches, "keep_rates": [0.5], **more}
        return wanted.items() <= row.items()

    small, base = gpu._SMALL, gpu._BASE
    order = {
        "bfloat16 parity": lambda p, r: p == "parity" and shape(r) == ["deit_small", 197, 4, "bfloat16"],
        "equal bits": lambda p, r: p == "repeat" and shape(r)[3] == "bfloat16" and r["calls"] == 20,
        "first passes": lambda p, r: p == "warm",
        "kernels": lambda p, r: micro(r, "fastreduce", "sdpa") and shape(r)[1:3] == [197, 256],
        "DeiT-S": lambda p, r: p == "models" and models(r, small, [256], modes=["graphed"], steps=["forward"]),
        "small batches": lambda p, r: p == "models" and models(r, small, [1, 8, 32]),
        "the rule": lambda p, r: micro(r, "fastreduce", "sdpa") and shape(r)[1] > 197,
        "DeiT-B": lambda p, r: p == "models" and models(r, base, [256, 1]),
        "kernels of DeiT-B": lambda p, r: micro(r, "fastreduce", "sdpa", model="deit_base"),
        "other parity": lambda p, r: p == "parity" and shape(r)[3] in ("float32", "float16"),
        "racecheck": lambda p, r: p == "racecheck",
        "training": lambda p, r: p == "models" and "training" in r["steps"],
        "references": lambda p, r: micro(r, "plain", "reference"),
        "flex": lambda p, r: micro(r, "flex"),
        "compiled": lambda p, r: micro(r, "compiled"),
        "compiled models": lambda p, r: p == "models" and "compiled" in r["modes"],
    }
    end = -1
    for name, matches in order.items():
        places = [place for place, (phase, row) in enumerate(ran) if matches(phase, row)]
        assert places, name
        assert places[0] > end, name
        end = places[-1]
    assert {row["primitive"] for phase, row in ran if phase == "repeat"} == set(load_primitives())
    assert {row["methods"][0] for phase, row in ran if phase == "warm"} == set(gpu._methods())


def test_every_check_is_dealt_once_and_first_shapes_first():
    points = [*gpu._FIRST_SHAPES, *gpu._OTHER_SHAPES]
    groups = gpu._checks([("float32", points), ("float16", points)])
    dealt = gpu._dealt(groups, 5)
    names = [json.dumps(item) for part in dealt for item in part]
    assert sorted(names) == sorted(json.dumps(item) for group in groups for item in group)
    for part in dealt:
        shapes = [tuple(item["shape"][:3]) for item in part]
        assert list(dict.fromkeys(shapes)) == points
        assert shapes == sorted(shapes, key=points.index)


def _timed(dtype, result):
    shapes = gpu._FULL if dtype == "bfloat16" else gpu._QUICK_SHAPES
    (items,) = gpu._timings(["first"], shapes, "cpu", dtype, list(load_primitives()), result)
    return {(item["primitive"], item["direction"]) for item in items if item["contender"] == "fastreduce"}


def _checked(primitive, direction, dtype, wrong):
    return {"primitive": primitive, "direction": direction, "shape": ["deit_small", 197, 2, dtype], "wrong": wrong}


def test_what_is_wrong_is_not_timed_in_its_dtype_and_costs_no_other_its_time(session):
    rows = [("cls_scores", "forward", "bfloat16", "off"), ("attention_policy", "backward", "float32", "off by 2 %")]
    rows += [("attention_policy", "backward", "bfloat16", None), ("soft_merge", "forward", "float16", "off")]
    for row in rows:
        session.add("parity", _checked(*row))
    session.add("repeat", _checked("merge_tokens", "backward", "bfloat16", "output 0: 3 of 9 elements differ"))
    found = gpu._wrong_kernels(session.result)
    assert found == {("merge_tokens", "backward", "bfloat16"), *(row[:3] for row in rows if row[3])}
    timed, quick = _timed("bfloat16", session.result), _timed("float32", session.result)
    assert not {("cls_scores", "forward"), ("merge_tokens", "backward")} & timed
    assert {("attention_policy", "backward"), ("soft_merge", "forward"), ("cls_scores", "backward")} <= timed
    assert ("attention_policy", "backward") not in quick
    assert {("cls_scores", "forward"), ("merge_tokens", "backward")} <= quick


class _Racing(torch.autograd.Function):
    """The identity, of which every seventh pass in one direction changes the last bit of five elements."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.turns = backward
        return _Racing.spoiled(x, forward)

    @staticmethod
    def backward(ctx, gradient):
        return _Racing.spoiled(gradient, ctx.turns), None, None

    @staticmethod
    def spoiled(x, turns):
        x = x.clone()
        if turns is not None and next(turns) % 7 == 5:
            x.view(torch.int32).flatten()[:5] ^= 1
        return x


@pytest.fixture
def planted(monkeypatch):
    """Plant a race into gather_tokens, in the direction given."""
    right = load_primitives()["gather_tokens"]

    def plant(direction):
        turns = {"forward": None, "backward": None, direction: itertools.count()}

        def racing(**arguments):
            return (_Racing.apply(right.call(**arguments)[0], *turns.values()),)

        broken = dataclasses.replace(right, call=racing)
        monkeypatch.setattr(gpu, "load_primitives", lambda: {**load_primitives(), "gather_tokens": broken})
        gpu._prepared.cache_clear()

    yield plant
    gpu._prepared.cache_clear()


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_race_is_found(planted, session, direction):
    """A race is in the result, in the tables and in the exit code, and the kernel is not timed."""
    planted(direction)
    groups = [g for g in gpu._checks([("float32", gpu._QUICK_SHAPES)], calls=20) if "gather_tokens" in str(g)]
    for item in itertools.chain(*groups):
        for row in gpu._repeat(item, CPU):
            session.add("repeat", row)
    wrong = [row for row in saved(session)["repeat"] if row["wrong"]]
    assert [(row["primitive"], row["direction"]) for row in wrong] == [("gather_tokens", direction)]
    differing = wrong[0]["differing"][0]
    assert differing["output"] == 0
    assert differing["elements"] == 5
    assert differing["of"] > 5
    assert differing["calls"] == 3
    assert wrong[0]["wrong"].split("; ")[0] == f"output 0: 5 of {differing['of']} elements differ, in 3 of 19 calls"
    timed = _timed("float32", session.result)
    assert ("gather_tokens", direction) not in timed
    assert ("gather_tokens", {"forward": "backward", "backward": "forward"}[direction]) in timed
    assert gpu._wrong(session.result) == wrong
    assert f"**gather_tokens** {direction}, deit_tiny-26-2-float32: output 0: 5 of" in markdown(session.result)


def test_the_profiler_is_for_ours_only(monkeypatch):
    """The profiler takes its time, and on CUDA it has crashed beside graphs."""
    bench = microbenchmark.Microbenchmark(
        load_primitives()["cls_scores"], gpu.Shape("deit_tiny", 26, 2), CPU, "forward"
    )
    runs = {who: bench.prepare(who) for who in ("fastreduce", "plain")}
    monkeypatch.setattr(microbenchmark, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(bench, "_launches", lambda once: {"launches": 1})
    for counted, who in ((True, "fastreduce"), (False, "plain")):
        assert microbenchmark._is_counted(who, torch.device("cuda")) == counted
        assert microbenchmark._is_counted(who, CPU)
        run = dataclasses.replace(runs[who], counted=counted)
        assert ("launches" in bench.facts(run, 1.0)) == counted
    assert not microbenchmark._is_counted("compiled", CPU)


def test_contenders_are_asked_where_they_can_be(monkeypatch):
    received, bias = load_primitives()["received_scores"], load_primitives()["attention_bias"]
    assert gpu._contenders(bias, "first", "cuda", "backward") == ["fastreduce", "sdpa"]
    assert gpu._contenders(bias, "flex", "cuda", "forward") == ["flex"]
    assert gpu._contenders(bias, "flex", "cpu", "forward") == []
    for found, device, way, last in (
        (True, "cuda", "forward", "flash-colreduce"),
        (True, "cuda", "backward", "fastreduce"),
        (True, "cpu", "forward", "fastreduce"),
        (None, "cuda", "forward", "fastreduce"),
    ):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=found: found)
        assert gpu._contenders(received, "first", device, way)[-1] == last
        assert gpu._absent() == ([] if found else ["flash-colreduce"])


def test_flash_colreduce_is_asked_for_the_same(monkeypatch):
    """Its page says that it gives the sum over the queries of each head."""

    def flash_colreduce(q, k, reduction):
        assert reduction == "sum"
        return torch.softmax(q @ k.mT / 8, -1).sum(2)

    monkeypatch.setitem(sys.modules, "flash_colreduce", SimpleNamespace(flash_colreduce=flash_colreduce))
    received = load_primitives()["received_scores"]
    inputs = received.make(gpu.Shape("deit_tiny", 26, 2), torch.Generator().manual_seed(0))
    (theirs,) = received.others["flash-colreduce"].call(inputs)
    torch.testing.assert_close(theirs, received.plain(inputs)[0])


def test_equal_bits_tell_what_equal_values_hide():
    bits = microbenchmark._bits
    nan = torch.tensor([float("nan"), 0.0])
    assert torch.equal(bits(nan), bits(nan.clone()))
    assert not torch.equal(bits(torch.tensor(0.0)), bits(torch.tensor(-0.0)))
    assert bits(torch.tensor([True])).tolist() == [1]


SANITIZER = """#!/bin/sh
echo "$@" > {folder}/asked
cat > {folder}/input
echo "{said}"
"""


@pytest.mark.parametrize(
    ("said", "key", "words"),
    [
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "wrong", None),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", "wrong", "(1 error, 0 warnings)"),
        ("no permission", "skipped", "compute-sanitizer came to no verdict: no permission"),
    ],
)
def test_racecheck(tmp_path, monkeypatch, said, key, words):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER.format(folder=tmp_path, said=said))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (row,) = gpu._racecheck(gpu._RACECHECK, torch.device("cuda"))
    assert row[key] == words or words in row[key]
    assert (tmp_path / "asked").read_text().startswith("--tool racecheck ")
    asked, end = map(json.loads, (tmp_path / "input").read_text().splitlines())
    assert asked == {"phase": "launch", "item": gpu._RACECHECK}
    assert end is None


def test_racecheck_says_why_it_is_skipped(monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    (row,) = gpu._racecheck(gpu._RACECHECK, torch.device("cuda"))
    assert row["skipped"] == "compute-sanitizer is not installed"
    monkeypatch.setattr(gpu.shutil, "which", lambda name: "/bin/true")
    (row,) = gpu._racecheck(gpu._RACECHECK, CPU)
    assert row["skipped"] == "there is no CUDA device"
    assert gpu._wrong({"parity": [], "repeat": [], "racecheck": [row]}) == []


def test_what_racecheck_launches_runs():
    item = {**gpu._RACECHECK, "shape": ["deit_tiny", 26, 2, "float32"]}
    assert list(gpu._launch(item, CPU)) == [item]


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def _time(primitive, tokens, batch, contender, seconds):
    row = {"primitive": primitive, "direction": "forward", "model": "deit_small", "tokens": tokens, "batch": batch}
    facts = {"gigabytes_per_second": 7.0, "share_of_copy_bandwidth": 0.5, "peak_bytes": 3000000}
    facts |= {"launches": 2} if contender == "fastreduce" else {}
    return {**row, "parity": None, "contender": contender, "seconds": seconds, **facts}


def test_the_tables_show_every_outcome(session):
    shape = ["s", 1, 2, "float32"]
    for name, wrong in (("a", None), ("b", "off")):
        session.add("parity", {"primitive": name, "direction": "forward", "shape": shape, "wrong": wrong})
    session.add("repeat", {"primitive": "c", "direction": "backward", "shape": shape, "failed": "no result within 1 s"})
    session.add("racecheck", {**gpu._RACECHECK, "skipped": "compute-sanitizer is not installed"})
    session.add("micro", _time("a", 5, 2, "fastreduce", 1e-5))
    session.add("micro", _time("a", 5, 2, "plain", 3e-5))
    failed = {"primitive": "a", "direction": "forward", "model": "deit_small", "tokens": 5, "batch": 2, "parity": None}
    session.add("micro", {**failed, "contender": "reference", "failed": "out of memory"})
    group = {"model": "m", "batch": 2, "keep_rate": 0.5, "step": "forward", "mode": "eager"}
    session.add("models", {**group, "reason": "the time was up"})
    session.result["absent"] = ["flash-colreduce"]
    session.result["parts"] = [{"name": "kernels", "results": 3, "left_out": 4, "seconds": 5.2}]
    session.save()
    text = markdown(saved(session))
    assert "| kernels | 3 | 4 | 5 |" in text
    assert "Checks that agree with float64: 1 of 2." in text
    assert "**b** forward, s-1-2-float32: off" in text
    assert "Kernels that gave the same bits at every call: 0 of 1." in text
    assert "**c** backward, s-1-2-float32: no result within 1 s" in text
    assert "deit_tiny-50-2-bfloat16: compute-sanitizer is not installed" in text
    assert "| a | forward | deit_small-5-2 | 10.0 | 7 | 0.50 | 2 | 3.0 | 3.00 |  |  |" in text
    assert "a forward reference: out of memory" in text
    assert "not installed: flash-colreduce" in text
    assert "model m, batch 2, keep_rate 0.5, step forward, mode eager: the time was up" in text


def test_the_table_of_the_rule_names_the_slower_side(session):
    index, scores = RULE_PRIMITIVES
    for name, tokens, ours, theirs in ((index, 197, 1e-5, 2e-5), (index, 2049, 3e-5, 4e-5), (scores, 577, 5e-5, 4e-5)):
        session.add("micro", _time(name, tokens, 16, "fastreduce", ours))
        session.add("micro", _time(name, tokens, 16, "sdpa", theirs))
    session.add("micro", _time(scores, 1025, 16, "fastreduce", 1e-5))
    text = markdown(saved(session))
    assert f"| {index} | 197 | 16 | 10.0 | 20.0 | 2.00 | ours |" in text
    assert f"| {index} | 2049 | 16 | 30.0 | 40.0 | 1.33 | SDPA, the slower |" in text
    assert f"| {scores} | 577 | 16 | 50.0 | 40.0 | 0.80 | ours, the slower |" in text
    assert f"| {scores} | 1025" not in text
    assert f"slower side for {scores} at 577 keys, batch 16; {index} at 2049 keys, batch 16." in text
