"""A folder that one process writes to at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["find_holder", "hold"]

_NAME = ".lock"
_GRACE = 1.0  # seconds that a worker has to die after its parent
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # some network file systems
_held: dict[Path, int] = {}  # locks of this process: the system's lock does not keep a process from itself
_mutex = threading.Lock()


def _lock(descriptor: int) -> bool:
    """Lock an open file for this process, until it dies or closes the file; False if another one has it."""
    try:
        if fcntl is not None:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # beyond the text, which others must be able to read
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError as error:
        return error.errno in _UNSUPPORTED
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _about(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    process, _, host = os.read(descriptor, 300).decode(errors="replace").strip().partition(" ")
    return f"process {process or '?'}" + (f" on {host}" if host and host != socket.gethostname() else "")


def _take(path: Path) -> str | None:
    """Take the lock and return None, or say who has it."""
    with _mutex:
        if path in _held:  # opening and closing the file would give the lock back
            return f"process {os.getpid()}"
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            if not _lock(descriptor):
                found = _about(descriptor)
                os.close(descriptor)
                return found
            if _is_at(path, descriptor):
                break
            os.close(descriptor)  # its holder removed the file meanwhile
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
        _held[path] = descriptor
        return None


def _give_back(path: Path) -> None:
    with _mutex, contextlib.suppress(OSError):
        if fcntl is not None:
            path.unlink()  # while it is locked: no other process can have it
    os.close(_held.pop(path))


def find_holder(folder: str | os.PathLike[str]) -> str | None:
    """Return who works in a folder, as words like ``"process 123"``, or None. Nothing is written."""
    path = Path(os.path.realpath(folder)) / _NAME
    with _mutex:
        if path in _held:
            return f"process {os.getpid()}"
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError:
            return None
        try:
            return None if _lock(descriptor) else _about(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def hold(folder: str | os.PathLike[str], waiting: Callable[[str], None]) -> Iterator[None]:
    """Keep other processes from a folder. The system gives it back when this one dies, however that happens.

    Args:
        folder: an existing one; a file ``.lock`` in it says who holds it.
        waiting: called once with the holder's name if there is one; unless it raises, its end is waited for.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = Path(os.path.realpath(folder)) / _NAME
    start, said = time.monotonic(), False
    while (holder := _take(path)) is not None:
        if not said and time.monotonic() - start > _GRACE:
            said = True
            waiting(holder)
        time.sleep(0.1)
    try:
        yield
    finally:
        _give_back(path)
