"""Options that commands share, and what reads and checks them."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..names import METHODS
from ..speed.settings import DTYPES

__all__ = [
    "UserError",
    "check_fidelity",
    "names",
    "number",
    "numbers",
    "optional_number",
    "output_file",
    "output_folder",
    "split",
    "user_errors",
    "whole_number",
    "wish",
]


class UserError(Exception):
    """Something that the user can mend; shown as one line, like the errors of typer."""

    def format_message(self) -> str:
        """Return the message, under the name that typer's errors have for it."""
        return str(self)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors in what was given into a one-line message. Wrap argument checking only."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise UserError(str(error)) from error


def _starting_with(words: list[str]) -> Callable[[str], list[str]]:
    """Return what completes the last of the words that commas separate."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{word}" for word in words if word.startswith(last.lower())]

    return complete


_METHODS = _starting_with([name.replace("_", "-") for name in METHODS])

Model = Annotated[
    str, typer.Option(help="A Vision Transformer of timm, or with hf: of transformers: its name, or a folder.")
]
Checkpoint = Annotated[
    str | None, typer.Option(help="Weights: a .safetensors file, or a torch.save file (read with weights_only).")
]
Pretrained = Annotated[
    bool | None,
    typer.Option(
        "--pretrained/--random", help="timm's own weights, or random ones. (default: timm's if they can be had)"
    ),
]
Images = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Pictures for fidelity; class folders give labels. (default: photographs of scikit-learn, scikit-image)",
    ),
]
ImageCount = Annotated[
    str | None, typer.Option(metavar="N", help="How many of them. (default: as many as fit into the time)")
]
Fidelity = Annotated[bool, typer.Option(help="Whether to measure what is lost, too.")]
AtLeast = Annotated[
    str | None, typer.Option(metavar="FIDELITY", help="The fidelity that a setting must keep. (default: 0.99)")
]
AtMostLost = Annotated[
    str | None, typer.Option(metavar="POINTS", help="Instead: the points of accuracy that a setting may lose.")
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--methods",
        "--method",
        help="Methods, like topk,tome; radial-l1 for one norm; see `fastreduce methods`. (default: all)",
        autocompletion=_METHODS,
    ),
]
OneMethod = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        "--methods",
        help="The method, like topk; radial-l1 for a norm; see `fastreduce methods`. (default: topk)",
        autocompletion=_METHODS,
    ),
]
MethodOption = Annotated[
    list[str] | None,
    typer.Option("--method-option", help="An option of a method, like tome.rounds=exact; may be given several times."),
]
At = Annotated[list[str] | None, typer.Option(help="Blocks. (default: a quarter, half, three quarters; 3,6,9 of 12)")]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda or cuda:N. (default: cuda if there is one)", autocompletion=_starting_with(["cpu", "cuda"])
    ),
]
Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16.", autocompletion=_starting_with(list(DTYPES)))]
Backend = Annotated[
    str,
    typer.Option(help="auto, triton or reference.", autocompletion=_starting_with(["auto", "triton", "reference"])),
]
Compile = Annotated[bool, typer.Option("--compile", help="torch.compile every model; takes long.")]
Threads = Annotated[
    str | None, typer.Option(metavar="N", help="CPU threads. (default: torch's choice; 1 if that is faster)")
]
Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write everything measured to this file; - for standard output."),
]


def split(words: list[str] | None) -> tuple[str, ...]:
    """Split ``["a,b", "c"]`` into ``("a", "b", "c")``."""
    return tuple(part.strip() for word in words or [] for part in word.split(",") if part.strip())


def names(option: str, words: list[str] | None) -> tuple[str, ...]:
    """Split as :func:`split` does; ValueError where the option was given without a name."""
    found = split(words)
    if words and not found:
        raise ValueError(f"{option} got {','.join(words)!r}: give names, like topk,tome; see fastreduce methods")
    return found


def check_fidelity(fidelity: bool, **wishes: object) -> None:
    """Raise ValueError for an option of fidelity beside --no-fidelity; ``wishes`` are what they were given."""
    for name, value in wishes.items():
        if not fidelity and value is not None:
            raise ValueError(f"give either --no-fidelity or --{name.replace('_', '-')}")


def numbers(option: str, example: str, words: list[str] | None, kind: Callable[[str], Any]) -> tuple[Any, ...] | None:
    """Turn ``["0.7,0.5", "0.3"]`` into ``(0.7, 0.5, 0.3)``, None if the option was not given."""
    if not words:
        return None
    try:
        return tuple(kind(part) for word in words for part in word.split(","))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{option} takes {what}, like {example}, got {','.join(words)!r}") from None


def whole_number(option: str, word: str | None) -> Any:
    """Return the integer that was given, or None if the option was not."""
    try:
        return None if word is None else int(word)
    except ValueError:
        raise ValueError(f"{option} takes a whole number, got {word!r}") from None


def optional_number(option: str, word: str | None) -> float | None:
    """Return the number that was given, or None if the option was not."""
    return None if word is None else number(option, word)


def wish(pretrained: bool | None, checkpoint: str | None) -> bool | None:
    """Return whether pretrained weights are wanted: None if they will do where nothing was said of weights."""
    return False if pretrained is None and checkpoint is not None else pretrained


def number(option: str, word: str) -> float:
    """Return the number that was given."""
    try:
        return float(word)
    except ValueError:
        raise ValueError(f"{option} takes a number, got {word!r}") from None


def _existing(folder: Path) -> Path:
    """Return the nearest folder above, or itself, that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _check_folder(option: str, folder: Path) -> None:
    """Raise unless files can be made in a folder that may still have to be made; nothing is left there."""
    there = _existing(folder)
    if not there.is_dir():
        raise ValueError(f"{option}: {str(there)!r} is a file, not a folder")
    with tempfile.TemporaryFile(dir=there):
        pass


def _check_file(option: str, path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{option}: {str(path)!r} is a folder, not a file")
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{option}: {str(path)!r} cannot be written: it is read-only")
    if path.is_file() or not path.exists():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()  # raises for a name that is too long
        _check_folder(option, path.parent)


def _output(option: str, given: str, what: str, check: Callable[[str, Path], None]) -> Path:
    if not given.strip():
        raise ValueError(f"{option} got {given!r}: give {what}")
    try:
        check(option, Path(given))
    except OSError as error:
        raise ValueError(f"{option}: {given!r} cannot be written: {error.strerror or error}") from error
    return Path(given)


def output_folder(option: str, given: str) -> Path:
    """Return the folder, which need not be there yet; ValueError, before minutes of work, if it cannot be written."""
    return _output(option, given, "a folder", _check_folder)


def output_file(option: str, given: str, inputs: Iterable[str | None] = (), what: str = "a file") -> Path:
    """Return the path of a file to write, whose folder need not be there yet.

    Args:
        option: under which it was given.
        given: the path.
        inputs: files that must not be written to.
        what: the option takes, in words.

    Raises:
        ValueError: it cannot be written, or is one of the ``inputs``.
    """
    if given == "-":
        raise ValueError(f"{option} got '-': give {what}")
    path = _output(option, given, what, _check_file)
    for other in inputs:
        if other is not None and os.path.exists(other) and path.exists() and path.samefile(other):
            raise ValueError(f"{option}: {given!r} is what is read here; it would be lost")
    return path
