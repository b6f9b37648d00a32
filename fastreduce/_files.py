"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

__all__ = ["write_atomically"]


def _is_device(path: Path) -> bool:
    """Whether the path is no plain file, or another name of one that somebody holds open (``/dev/stdout``)."""
    try:
        return not stat.S_ISREG(path.stat().st_mode) or path.absolute().parts[1:2] in (("dev",), ("proc",))
    except FileNotFoundError:
        return False


def _fill(path: Path, write: Callable[[Path], object] | str | bytes) -> None:
    if isinstance(write, (str, bytes)):
        path.write_bytes(write.encode() if isinstance(write, str) else write)
    else:
        write(path)


def _create_beside(path: Path) -> tuple[Path, int]:
    """Make an empty file in the same folder -> the file, and the permissions that it is to end with."""
    part = path.with_name(f".fastreduce-{secrets.token_hex(6)}{path.suffix}")
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return part, stat.S_IMODE((path if path.exists() else part).stat().st_mode)


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object] | str | bytes) -> Path:
    """Write a file beside its place and rename it, so that nobody ever finds half of it, nor loses what was there.

    A new file gets the permissions that ``open`` would give it, whatever ``write`` made of them; an existing one keeps
    its own. Links are followed. A pipe or a device is written to directly.

    Args:
        path: where the file is to be; its folder must exist.
        write: text (written as UTF-8), bytes, or a function that writes to the path that it is called with. That path
            has the suffix of ``path``, and there is an empty file.

    Returns:
        The path.

    Raises:
        OSError: the file cannot be written. The message names ``path``; what was there before is still there.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if _is_device(path):
            _fill(path, write)
            return path
        place = Path(os.path.realpath(path))
        if place.exists() and not os.access(place, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        part, mode = _create_beside(place)
        try:
            _fill(part, write)
            part.chmod(mode)
            part.replace(place)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise OSError(error.errno or errno.EIO, reason, os.fspath(path)) from error
    return path
