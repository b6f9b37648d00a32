"""Files that the package writes: whole, or not there."""

import dataclasses
import errno
import json
import os
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Literal

import pytest

from fastreduce._files import from_json, read_json, write_atomically


def _mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def _private(path):
    """Write beside the file and rename, as libraries do: a file of another mode takes its place."""
    other = path.with_name("other")
    other.write_bytes(b"made")
    other.chmod(0o600)
    other.replace(path)


@pytest.mark.parametrize("write", ["text é\n", b"\0bytes", _private, lambda path: path.write_text("made")])
def test_a_new_file_has_the_mode_of_the_umask(tmp_path, umask, write):
    path = tmp_path / "a.json"
    assert write_atomically(path, write) == path
    assert _mode(path) == 0o666 & ~umask
    wanted = {str: lambda: write.encode(), bytes: lambda: write}.get(type(write), lambda: b"made")()
    assert path.read_bytes() == wanted
    assert list(tmp_path.iterdir()) == [path]


def test_an_existing_file_keeps_its_mode_and_its_links(tmp_path):
    path, link = tmp_path / "a.txt", tmp_path / "link"
    path.write_text("before")
    path.chmod(0o640)
    link.symlink_to(path)
    assert write_atomically(str(link), "after") == link
    assert link.is_symlink()
    assert (path.read_text(), _mode(path)) == ("after", 0o640)


def test_the_path_that_is_written_to_has_the_suffix(tmp_path):
    seen = []
    write_atomically(tmp_path / "a.tar.png", lambda path: seen.append((path.suffix, path.parent, path.read_bytes())))
    assert seen == [(".png", tmp_path, b"")]
    long = tmp_path / ("x" * 250 + ".json")  # as long as a name may be
    write_atomically(long, "a")
    assert long.read_text() == "a"


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), OSError("no number")])
def test_what_fails_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("before")

    def fail(part):
        part.write_text("half")
        raise error

    with pytest.raises(type(error), match=r"mine|no number|^$"):
        write_atomically(path, fail)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path, kind in (
        (tmp_path, IsADirectoryError),
        (tmp_path / "none" / "a.txt", FileNotFoundError),
        (tmp_path / "file" / "a.txt", NotADirectoryError),
        (tmp_path / ("x" * 300), OSError),
    ):
        with pytest.raises(kind) as raised:
            write_atomically(path, "text")
        assert raised.value.filename == str(path)
        assert str(path) in str(raised.value)
        assert len(str(raised.value).splitlines()) == 1


def test_a_protected_file_stays(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("before")
    monkeypatch.setattr(os, "access", lambda place, mode: False)  # as for all but root
    with pytest.raises(PermissionError, match=r"a\.txt"):
        write_atomically(path, "after")
    assert path.read_text() == "before"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_devices_and_pipes_are_written_to(tmp_path):
    with pytest.raises(OSError, match="/dev/full") as raised:
        write_atomically("/dev/full", "text")
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="/dev/full"):
        write_atomically("/dev/full", lambda path: _private(path))
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)  # and not renamed away
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    write_atomically(pipe, "through")
    reader.join(10)
    assert got == ["through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    script = "from fastreduce._files import write_atomically; write_atomically('/dev/stdout', 'out')"
    with open(tmp_path / "out", "w") as out:
        subprocess.run([sys.executable, "-c", script], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "out"  # the file that was opened, not another of its name


def test_a_full_disk_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"a\.txt"):
            write_atomically(path, b"x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_readers_see_one_of_the_writers(tmp_path):
    """Two threads write, one reads: it finds every time the whole of either."""
    path, texts = tmp_path / "a.txt", ["a" * 70_000, "b" * 70_000]
    path.write_text(texts[0])
    writers = [
        threading.Thread(target=lambda text=text: [write_atomically(path, text) for _ in range(50)]) for text in texts
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]


@dataclasses.dataclass(frozen=True)
class Held:
    losses: list[float]
    accuracy: dict[str, float]
    form: Literal["soft", "hard"] | None = None
    blocks: tuple[int, ...] = ()
    done: bool = False


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"losses": [1, 2.5, NaN], "accuracy": {"top1": 3}, "form": "hard", "blocks": [3], "done": true}', None),
        ('{"losses": [], "accuracy": {}}', None),
        ('{"losses": [], "accuracy": {}, "form": null}', None),
        ('{"accuracy": {}}', "Held lacks the field 'losses'"),
        ('{"losses": [], "accuracy": {}, "x": 1}', "Held has no field 'x'"),
        ('{"losses": [true], "accuracy": {}}', "losses of Held must be"),
        ('{"losses": 3, "accuracy": {}}', "losses of Held must be"),
        ('{"losses": [], "accuracy": {"top1": "9"}}', "accuracy of Held must be"),
        ('{"losses": [], "accuracy": []}', "accuracy of Held must be"),
        ('{"losses": [], "accuracy": {}, "form": "firm"}', "form of Held must be"),
        ('{"losses": [], "accuracy": {}, "blocks": [1.5]}', "blocks of Held must be"),
        ('{"losses": [], "accuracy": {}, "done": 1}', "done of Held must be"),
        ("[]", "Held must be an object, got a list"),
        ('{"losses": [], "losses": [1]}', "is not JSON: 'losses' occurs twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"losses": ', "is not JSON"),
        ("", "is not JSON"),
        ("9" * 5000, "is not JSON"),
    ],
)
def test_results_are_read_by_their_kind(tmp_path, text, words):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())  # the mark that Windows' editors put there
    if words is None:
        found, held = from_json(Held, read_json(path), path), json.loads(text)
        assert repr(found.losses) == repr(held["losses"])
        assert (found.accuracy, found.form, found.done) == (held["accuracy"], held.get("form"), "done" in held)
        return
    with pytest.raises(ValueError, match=words) as raised:
        from_json(Held, read_json(path), path)
    assert str(raised.value).startswith(str(path))
    assert len(str(raised.value).splitlines()) == 1
