"""The orchestra of bench.gpu: what crashes, hangs or is wrong takes nothing else with it."""

import json
import subprocess
import sys
import time

import pytest

from bench import gpu

CHILD = """
import json, os, sys, time
for index, item in enumerate(json.load(sys.stdin)):
    print(json.dumps({"begins": index}), flush=True)
    if item["what"] == "crash":
        print("illegal memory access", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 9)
    if item["what"] == "hang":
        time.sleep(60)
    if item["what"] == "break":
        print(json.dumps({"row": {**item, "failed": "told"}}), flush=True)
        os._exit(3)
    print(json.dumps({"row": {**item, "phase": sys.argv[1]}}), flush=True)
"""


@pytest.fixture
def session(tmp_path):
    made = gpu._Session(tmp_path / "result.json", "cpu", 20.0)
    made.command = [sys.executable, "-c", CHILD]
    return made


def saved(session):
    return json.loads(session.path.read_text())


@pytest.mark.parametrize("workers", [1, 2])
def test_a_crash_is_written_down_and_the_rest_goes_on(session, workers):
    items = [{"number": number, "what": "crash" if number in (1, 4) else "work"} for number in range(6)]
    session.run("micro", [items[worker::workers] for worker in range(workers)], session.end)
    rows = sorted(saved(session)["micro"], key=lambda row: row["number"])
    assert [row["number"] for row in rows] == list(range(6))
    for row in rows:
        if row["what"] == "crash":
            assert row["failed"] == "the process ended with -9: illegal memory access"
        else:
            assert row["phase"] == "micro"
    assert saved(session)["left_out"] == {"micro": 0}


def test_the_time_ends_what_hangs(session):
    items = [{"what": "work"}, {"what": "hang"}, {"what": "work"}]
    started = time.perf_counter()
    session.run("parity", [items], started + 2.0)
    assert time.perf_counter() - started < 20.0
    assert [row["what"] for row in saved(session)["parity"]] == ["work"]
    assert saved(session)["left_out"] == {"parity": 2}


def test_what_hangs_alone_is_written_down(session):
    session.patience = {"parity": 1.5}
    session.run("parity", [[{"what": "work"}, {"what": "hang"}, {"what": "work"}]], session.end)
    assert [row.get("failed") for row in saved(session)["parity"]] == [None, "no result within 1.5 s", None]


def test_a_broken_device_costs_a_process_and_one_row(session):
    session.run("parity", [[{"what": "work"}, {"what": "break"}, {"what": "work"}]], session.end)
    assert [row.get("failed") for row in saved(session)["parity"]] == [None, "told", None]
    assert saved(session)["left_out"] == {"parity": 0}


def test_a_child_that_cannot_start_is_written_down(session):
    session.command = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    session.run("parity", [[{"what": "work"}]], session.end)
    (row,) = saved(session)["parity"]
    assert row["failed"] == "the process ended with 1: no such thing"


def test_a_child_goes_on_after_an_error():
    items = [{"primitive": "nothing", "shape": ["deit_tiny", 26, 2, "float32"], "direction": "forward"}]
    items.append({**items[0], "primitive": "cls_scores"})
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--child", "parity"]
    done = subprocess.run(command, input=json.dumps(items), capture_output=True, text=True)
    first, failed, second, right = map(json.loads, done.stdout.splitlines())
    assert (first, second) == ({"begins": 0}, {"begins": 1})
    assert failed["row"]["failed"].startswith("KeyError: 'nothing'")
    assert right["row"] == {**items[1], "wrong": None}


def test_every_check_is_dealt_once_and_first_shapes_first():
    groups = gpu._parity_items(False)
    dealt = gpu._dealt(groups, 5)
    names = [json.dumps(item) for part in dealt for item in part]
    assert sorted(names) == sorted(json.dumps(item) for group in groups for item in group)
    for part in dealt:
        shapes = [tuple(item["shape"][:3]) for item in part]
        assert list(dict.fromkeys(shapes)) == gpu._PARITY_SHAPES
        assert shapes == sorted(shapes, key=gpu._PARITY_SHAPES.index)


def test_what_is_wrong_is_not_timed():
    ours = _timed(True, {("cls_scores", "forward", "float32")})
    assert ("cls_scores", "forward") not in ours
    assert ("cls_scores", "backward") in ours


def _timed(quick, wrong):
    items = gpu._micro_items(quick, wrong)
    return {(item["primitive"], item["direction"]) for item in items if item["contender"] == "fastreduce"}


def test_a_dtype_that_is_wrong_costs_no_other_its_time(session):
    """Times are of bfloat16 (float32 in the quick run): only its parity decides."""
    rows = [("cls_scores", "forward", "bfloat16", "off"), ("attention", "backward", "float32", "off by 2 %")]
    rows += [("attention", "backward", "bfloat16", None), ("soft_merge", "forward", "float16", "off")]
    for primitive, direction, dtype, wrong in rows:
        shape = ["deit_small", 197, 2, dtype]
        session.add("parity", {"primitive": primitive, "direction": direction, "shape": shape, "wrong": wrong})
    found = gpu._wrong_kernels(session.result)
    assert found == {row[:3] for row in rows if row[3]}
    timed, quick = _timed(False, found), _timed(True, found)
    assert ("cls_scores", "forward") not in timed
    assert {("attention", "backward"), ("soft_merge", "forward"), ("cls_scores", "backward")} <= timed
    assert ("attention", "backward") not in quick
    assert ("cls_scores", "forward") in quick


def test_without_a_gpu_it_says_so(capsys):
    if gpu.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_the_tables_show_every_outcome(session):
    session.add("parity", {"primitive": "a", "direction": "forward", "shape": ["s", 1, 2, "float32"], "wrong": None})
    session.add("parity", {"primitive": "b", "direction": "forward", "shape": ["s", 1, 2, "float32"], "wrong": "off"})
    row = {"primitive": "a", "direction": "forward", "model": "s", "tokens": 5, "batch": 2, "parity": None}
    facts = {"gigabytes_per_second": 7.0, "share_of_copy_bandwidth": 0.5, "launches": 2, "peak_bytes": 3000000}
    session.add("micro", {**row, "contender": "fastreduce", "seconds": 1e-5, **facts})
    session.add("micro", {**row, "contender": "plain", "seconds": 3e-5, **facts})
    session.add("micro", {**row, "contender": "reference", "failed": "out of memory"})
    group = {"model": "m", "batch": 2, "keep_rate": 0.5, "step": "forward", "mode": "eager"}
    session.add("models", {**group, "reason": "the time was up"})
    text = gpu.markdown(saved(session))
    assert "1 of 2 checks" in text
    assert "**b** forward, s-1-2-float32: off" in text
    assert "| a | forward | s-5-2 | 10.0 | 7 | 0.50 | 2 | 3.0 |  |  | 3.00 |" in text
    assert "a forward reference: out of memory" in text
    assert "model m, batch 2, keep_rate 0.5, step forward, mode eager: the time was up" in text
