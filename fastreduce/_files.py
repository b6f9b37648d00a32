"""Files: written whole or not at all; others' files read with an error that names them. No torch is imported here."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import reprlib
import secrets
import shutil
import stat
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import IO, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = [
    "PICTURES",
    "check_weights_file",
    "from_json",
    "is_picture",
    "natural_key",
    "one_line",
    "parse_json",
    "pictures_in",
    "printable",
    "read_json",
    "safetensors_header",
    "silent",
    "write_atomically",
]

Data = TypeVar("Data")

PICTURES = frozenset([".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"])


def _is_device(path: Path) -> bool:
    """Tell whether the path is no plain file, or another name of one that is held open (``/dev/stdout``)."""
    try:
        return not stat.S_ISREG(path.stat().st_mode) or path.absolute().parts[1:2] in (("dev",), ("proc",))
    except FileNotFoundError:
        return False


def _fill(path: Path, write: Callable[[Path], object] | str | bytes) -> None:
    if isinstance(write, (str, bytes)):
        path.write_bytes(write.encode() if isinstance(write, str) else write)
    else:
        write(path)


def _fill_device(path: Path, write: Callable[[Path], object] | str | bytes) -> None:
    """Write to a file elsewhere and copy that: libraries rename onto the path that they are given, a device's too."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / f"part{path.suffix}"
        part.touch()
        _fill(part, write)
        with open(part, "rb") as source, open(path, "wb") as device:
            shutil.copyfileobj(source, device)


def _create_beside(path: Path) -> tuple[Path, int]:
    """Make an empty file in the same folder -> the file, and the permissions that it is to end with."""
    part = path.with_name(f".fastreduce-{secrets.token_hex(6)}{path.suffix}")
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return part, stat.S_IMODE((path if path.exists() else part).stat().st_mode)


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object] | str | bytes) -> Path:
    """Write a file beside its place and rename it, so that no reader finds half of it and no content is lost.

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
            _fill_device(path, write)
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


def is_picture(path: str) -> bool:
    """Tell by its ending whether a file is a picture; hidden ones, and those in hidden folders, are none."""
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return os.path.splitext(path)[1].lower() in PICTURES and not any(part.startswith(".") for part in parts)


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Return the key that sorts names with numbers by these (dog9 before dog10), letters of either case alike."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def pictures_in(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the pictures in a folder and in folders in it, by their endings; hidden files and folders are left out.

    Raises:
        ValueError: no such folder, or no picture in it.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"there is no folder {os.fspath(folder)!r}")
    found = False
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(place, name)
            if is_picture(name) and path.is_file():
                found = True
                yield path
    if not found:
        endings = ", ".join(sorted(PICTURES))
        raise ValueError(f"there is no picture in {os.fspath(folder)!r} (endings: {endings})")


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind if there is none."""
    lines = str(error).strip().splitlines()
    return printable(" ".join(lines[0].split())) if lines else type(error).__name__


_filters = threading.Lock()  # Python keeps one list of warning filters for all threads


@contextmanager
def silent() -> Iterator[None]:
    """Keep from the user what a library warns of while it reads a file: the end is the file's content, or an error."""
    with _filters, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def printable(text: str) -> str:
    """Escape what would break a line, or cannot be printed: names in files can hold anything."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object; raise where a name occurs twice, of which Python would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} occurs twice in one object")
    return found


def parse_json(text: str | bytes, source: str | os.PathLike[str]) -> Any:
    """Parse JSON (in bytes: UTF-8, with or without a byte order mark).

    Raises:
        ValueError: it is none; the message begins with ``source``.
    """
    try:
        words = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        return json.loads(words, object_pairs_hook=_without_repeats)
    except RecursionError:
        raise ValueError(f"{os.fspath(source)} is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{os.fspath(source)} is not JSON: {one_line(error)}") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is not JSON; the message begins with the path.
    """
    return parse_json(Path(path).read_bytes(), path)


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether parsed JSON is of an annotated type; an integer is a float too."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, dict) and all(_fits(one, arguments[1]) for one in value.values())
    if origin is not None:  # list[float], tuple[float, ...]
        return isinstance(value, list) and all(_fits(one, arguments[0]) for one in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def from_json(kind: type[Data], value: Any, source: str | os.PathLike[str]) -> Data:
    """Make a dataclass of plain fields (numbers, strings, lists and dicts of them) from parsed JSON.

    Raises:
        ValueError: fields that are missing, unknown or of another type; the message begins with ``source``.
    """
    where, name = os.fspath(source), kind.__name__
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {name} must be an object, got a {type(value).__name__}")
    fields, hints = {field.name: field for field in dataclasses.fields(kind)}, get_type_hints(kind)  # type: ignore[arg-type]
    if unknown := [key for key in value if key not in fields]:
        raise ValueError(f"{where}: {name} has no field {unknown[0]!r}")
    nothing = dataclasses.MISSING
    for key, field in fields.items():
        if key not in value and field.default is nothing and field.default_factory is nothing:
            raise ValueError(f"{where}: {name} lacks the field {key!r}")
        if key in value and not _fits(value[key], hints[key]):
            raise ValueError(f"{where}: {key} of {name} must be {field.type}, got {reprlib.repr(value[key])}")
    return kind(**value)


_LONGEST_HEADER = 100_000_000  # as the safetensors library has it


def safetensors_header(file: IO[bytes], path: str | os.PathLike[str]) -> tuple[dict[str, Any], int]:
    """Read the header of a safetensors file -> its entries, and the position at which the tensors begin.

    Raises:
        ValueError: it has none; the message begins with ``path``.
    """
    length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
    if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
        raise ValueError(f"{os.fspath(path)} has no header of a .safetensors file")
    header = parse_json(file.read(length), path)
    if not isinstance(header, dict):
        raise ValueError(f"{os.fspath(path)} has a header that is a {type(header).__name__}, not an object")
    return header, 8 + length


def check_weights_file(path: str | os.PathLike[str]) -> str:
    """Tell from a file's beginning whether it may hold weights, without importing torch.

    Returns:
        ``"safetensors"`` or ``"torch"``.

    Raises:
        OSError: it cannot be opened.
        ValueError: a folder, the index or one part of several files, or no file of weights.
    """
    path = Path(path)
    if path.is_dir():
        inside = sorted(
            child.name for child in path.iterdir() if child.suffix in (".safetensors", ".pth", ".pt", ".bin")
        )
        raise ValueError(f"{path} is a folder; give a file" + (f", such as {inside[0]}" if inside else ""))
    if (part := re.search(r"-(\d{5})-of-(\d{5})\.", path.name)) and int(part[2]) > 1:
        raise ValueError(f"{path} is part {int(part[1])} of {int(part[2])} files: join them into one first")
    with open(path, "rb") as file:
        start = file.read(1024)
    if start[:4] == b"PK\x03\x04":
        return _check_archive(path)
    if start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"):  # a pickle: torch before 1.6
        return "torch"
    if 2 <= int.from_bytes(start[:8], "little") <= _LONGEST_HEADER and start[8:].lstrip()[:1] == b"{":
        return "safetensors"
    if start.lstrip()[:1] == b"{" and b'"weight_map"' in path.read_bytes():
        raise ValueError(f"{path} is the index of weights in several files: join them into one first")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a pointer of Git LFS, not the file itself: run git lfs pull")
    raise ValueError(f"{path} is not a .safetensors or torch.save file of weights")


def _check_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.rpartition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise ValueError(f"{path} is a damaged or incomplete torch.save file") from error
    if "data.pkl" not in members:
        raise ValueError(f"{path} is not a .safetensors or torch.save file of weights, but another zip archive")
    if "constants.pkl" in members:
        raise ValueError(f"{path} is a TorchScript program: save its state_dict() with torch.save")
    return "torch"
