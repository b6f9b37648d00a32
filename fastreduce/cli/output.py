"""Output of the commands: where their findings go, and how they end."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from .._files import write_atomically
from . import options as given
from .options import UserError
from .screen import Page, write
from .tables import doubts

__all__ = ["INTERRUPTED", "Output", "measure", "print_error", "stoppable", "with_ending"]

_MESSAGE_LENGTH = 400
INTERRUPTED = 130  # the exit code of a process that Ctrl-C ended


def print_error(message: str) -> None:
    """Write one line to stderr, red on a terminal."""
    line = " ".join(message.split())
    if len(line) > _MESSAGE_LENGTH:
        line = line[: _MESSAGE_LENGTH - 1] + "…"
    console = Console(stderr=True)
    if console.is_terminal:
        console.print(Text.assemble(("error: ", "bold red"), line), soft_wrap=True, highlight=False)
    else:
        write(sys.stderr, f"error: {line}\n")


def finite_numbers(value: Any) -> Any:
    """Return what JSON has words for: null for a number that is none."""
    if isinstance(value, dict):
        return {key: finite_numbers(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_numbers(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Output:
    """A command's results: first the JSON, then the tables, then the pictures, so that no failure costs another's.

    Args:
        json_file: what ``--json`` was given.
        folder: of the pictures, or None for none.
        inputs: files that must not be written to.

    Raises:
        ValueError: a file or folder that cannot be written.
    """

    def __init__(self, json_file: str | None, folder: str | None, inputs: tuple[str | None, ...]):
        self.to_stdout = json_file == "-"
        self.folder = None if folder is None else given.output_folder("--out", folder)
        self.json_file = None
        if json_file is not None and not self.to_stdout:
            self.json_file = given.output_file("--json", json_file, inputs, "a file, or - for standard output")
        self.troubles: list[str] = []

    def make(self, file: Path, content: Callable[[Path], object] | str) -> bool:
        """Write a file whole -> whether that went well."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, content)
        except OSError as error:
            self.troubles.append(f"{str(file)!r} cannot be written: {error.strerror or error}")
            return False
        return True

    def write_json(self, result: Mapping[str, Any]) -> None:
        """Write the result to the file, or to standard output."""
        text = json.dumps(finite_numbers(result), indent=1, allow_nan=False) + "\n"
        if self.to_stdout:
            if (error := write(sys.stdout, text)) is not None:
                self.troubles.append(f"the JSON cannot be written to standard output: {error.strerror}")
        elif self.json_file is not None and not self.make(self.json_file, text):
            self.json_file = None

    def rewrite_json(self, result: Mapping[str, Any]) -> None:
        """Write the result once more, with what came later; a pipe or a device has had it."""
        if self.json_file is not None and self.json_file.is_file():
            self.write_json(result)

    def write_page(self, fill: Callable[[Page], None]) -> None:
        """Print what ``fill`` puts on a page; on stderr where standard output is taken by the JSON, or broken."""
        page = Page(sys.stderr if self.to_stdout else sys.stdout)
        fill(page)
        if (error := page.write()) is not None:
            self.troubles.append(f"the tables cannot be written: {error.strerror}")
            if not self.to_stdout:
                page.write(sys.stderr)

    def draw(self, name: str, save: Callable[[Path], object]) -> Path | None:
        """Make a picture in the folder -> its path, or None if that failed."""
        assert self.folder is not None
        file = self.folder / name
        return file if self.make(file, save) else None

    def end(self) -> None:
        """Raise UserError with the first of what went wrong."""
        if self.troubles:
            more = f", and {len(self.troubles) - 1} more like this" if len(self.troubles) > 1 else ""
            raise UserError(self.troubles[0] + more)


@contextmanager
def _one_line_troubles() -> Iterator[None]:
    """Turn what can go wrong while measuring into one line: no memory, no compilation, no graph."""
    from ..measure import usual_troubles

    try:
        yield
    except usual_troubles() as error:
        raise UserError(str(error) or "there is too little memory") from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise UserError("there is too little memory: give a smaller --batch") from error


def measure(measured: Any, progress: Any, between: Callable[[], None] = lambda: None) -> bool:
    """Check, do what comes ``between``, measure -> whether it came to the end: Ctrl-C leaves the finished rounds."""
    try:
        with _one_line_troubles():
            measured.check(progress)
            between()
            measured.measure(progress)
    except KeyboardInterrupt:
        if not measured.rounds:
            print_error("stopped before a round was finished: there is nothing to show")
            raise typer.Exit(INTERRUPTED) from None
        return False
    return True


def tell(note: str) -> None:
    """Write a note of one line to stderr, if there is one."""
    if note:
        write(sys.stderr, f"note: {' '.join(note.split())}\n")


def with_ending(measured: Any, finished: bool) -> dict[str, Any]:
    """Return the result, with how the run ended and what speaks against its speeds."""
    result = measured.result()
    return {**result, "doubts": doubts(result), "interrupted": not finished, "wall_seconds": measured.elapsed}


@contextmanager
def stoppable(what: str) -> Iterator[None]:
    """Turn Ctrl-C into one line."""
    try:
        yield
    except KeyboardInterrupt:
        print_error(f"stopped while {what}")
        raise typer.Exit(INTERRUPTED) from None
