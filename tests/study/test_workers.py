"""Processes that train end with the one that started them; a folder has one process at a time."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

pytest.importorskip("accelerate")

from fastreduce.study._lock import find_holder, hold

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and /proc as on Linux")


def _script(tmp_path, text):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text))
    return path


@pytest.fixture
def run(tmp_path):
    """Start the workers' script; what is left of it is killed."""
    script = _script(tmp_path, WORKERS.replace("{root!r}", repr(ROOT)))
    started = []

    def start(**options):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([sys.executable, script], **pipes, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def _lines(process, count):
    return [process.stdout.readline().strip() for _ in range(count)]


def _gone(pids, seconds=20):
    """Return whether all of them are dead (or zombies of a parent that does not wait for them)."""

    def alive(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return False

    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


WORKERS = """
    import multiprocessing, os, signal, sys, time
    sys.path.insert(0, {root!r})
    from fastreduce.study._workers import Workers
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background would ignore it

    def started():
        pass

    def work(seconds):
        print(os.getpid(), flush=True)
        time.sleep(seconds)

    if __name__ == "__main__":
        with Workers(2, multiprocessing.get_context("spawn"), started) as workers:
            workers.submit("a", work, 60)
            workers.submit("b", work, 60)
            while True:
                workers.finished(0.5)
"""
ROOT = str(Path(__file__).parent.parent.parent)


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_workers_end_with_their_parent(run, how):
    process = run()
    pids = [int(line) for line in _lines(process, 2)]
    process.send_signal(getattr(signal, how))  # to this process alone
    assert process.wait(60) != 0
    assert _gone(pids)
    told = process.stderr.read()
    assert told.count("Traceback") == (how == "SIGINT")  # the parent's own; none of a worker


def test_ctrl_c_reaches_all_and_only_the_parent_answers(run):
    process = run(start_new_session=True)
    pids = [int(line) for line in _lines(process, 2)]
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    assert _gone(pids)
    assert process.stderr.read().count("KeyboardInterrupt") == 1


@pytest.mark.parametrize("which", [min, max])
def test_a_worker_that_is_killed_is_said(run, which):
    """The one that was started last too, which the pool itself may not be watching yet."""
    process = run()
    pids = [int(line) for line in _lines(process, 2)]
    os.kill(which(pids), signal.SIGKILL)
    process.wait(60)
    assert _gone(pids)
    assert "WorkerLost: a process that trains was killed" in process.stderr.read()


HOLDER = """
    import sys, time
    sys.path.insert(0, {root!r})
    from fastreduce.study._lock import hold
    with hold(sys.argv[1], lambda holder: print("waits for", holder, flush=True)):
        print("holds", flush=True)
        sys.stdin.readline()
"""


def _holder(tmp_path, folder):
    script = _script(tmp_path, HOLDER.replace("{root!r}", repr(ROOT)))
    command = [sys.executable, script, folder]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_folder_has_one_process_at_a_time(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    assert find_holder(folder) is None
    first = _holder(tmp_path, folder)
    assert _lines(first, 1) == ["holds"]
    assert find_holder(folder) == f"process {first.pid}"
    second = _holder(tmp_path, folder)
    assert _lines(second, 1) == [f"waits for process {first.pid}"]
    with pytest.raises(KeyError, match=str(first.pid)), hold(folder, lambda holder: {}[holder]):
        raise AssertionError("has what another process holds")
    first.communicate("\n", 20)
    assert _lines(second, 1) == ["holds"]
    assert find_holder(folder) == f"process {second.pid}"
    second.kill()
    second.wait()
    assert (folder / ".lock").exists()  # of a dead process: nothing holds it
    assert find_holder(folder) is None
    with hold(folder, lambda holder: pytest.fail(holder)):
        assert find_holder(folder) == f"process {os.getpid()}"
        with pytest.raises(KeyError), hold(folder / ".." / "folder", lambda holder: {}[holder]):
            pass
        assert find_holder(folder) == f"process {os.getpid()}"
    assert not list(folder.iterdir())
