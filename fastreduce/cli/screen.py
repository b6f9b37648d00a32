"""Standard output and standard error, as they are: a terminal, a file, a pipe that is closed, a disk that is full."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

__all__ = ["Page", "hush", "is_full", "progress_bar", "shortened", "write"]

Cell = str | Sequence[int]

_STARTED = time.perf_counter()

_WIDTH = 80  # columns of running text where there is no terminal
_NO_LIMIT = 10_000
_PLAIN = {
    **{"±": "+-", "×": "x", "·": "*", "÷": "/", "…": "...", "–": "-", "−": "-", "ℓ": "l", "∞": "inf", "⁹": "^9"},
    **{"₁": "1", "₂": "2", "“": '"', "”": '"', "’": "'"},
}


def is_full(error: OSError) -> bool:
    """Return whether the error is of the output: a full disk, a file that may not grow, a closed pipe."""
    return error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EPIPE)


def hush(stream: TextIO | None) -> None:
    """Send what is left in a broken stream nowhere, so that it does not fail again when the process ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]
        os.close(nowhere)


def write(stream: TextIO | None, text: str) -> OSError | None:
    """Write the text, with replacements for what the encoding does not have -> what kept it from being written.

    A reader that has gone away (``| head``) has had enough, which is no error.
    """
    if stream is None:
        return None
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(text.encode(encoding, "replace").decode(encoding))
        stream.flush()
    except BrokenPipeError:
        hush(stream)
    except OSError as error:
        hush(stream)
        return error
    return None


class _Sheet(io.StringIO):
    """Text in memory that rich takes for the stream it is written to in the end."""

    def __init__(self, stream: TextIO | None):
        super().__init__()
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()


def shortened(words: Sequence[Any], width: int) -> str:
    """Return the words with spaces between, as many from both ends as fit, at least the first and the last."""
    whole = " ".join(map(str, words))
    if len(whole) <= width or len(words) < 3:
        return whole
    for left_out in range(1, len(words) - 1):
        head = (len(words) - left_out + 1) // 2
        text = " ".join([*map(str, words[:head]), "…", *map(str, words[head + left_out :])])
        if len(text) <= width or left_out == len(words) - 2:
            return text
    return whole


class Page:
    """A page that a command prints, laid out for a stream and written to it as one.

    Args:
        stream: ``sys.stdout``, say.

    Attributes:
        terminal: whether it is one; elsewhere tables have the width that they need.
    """

    def __init__(self, stream: TextIO | None):
        self.stream = stream
        self._sheet = _Sheet(stream)
        self.terminal = self._sheet.isatty()
        self._console = Console(file=self._sheet, **({} if self.terminal else {"width": _WIDTH}))  # type: ignore[arg-type]
        self._wide = Console(file=self._sheet, width=_NO_LIMIT)  # so wide that it cuts nothing
        self.width = self._console.width if self.terminal else _NO_LIMIT
        try:
            "".join(_PLAIN).encode(self._sheet.encoding)
            self._letters: dict[int, str] = {}
        except UnicodeEncodeError:
            self._letters = str.maketrans(_PLAIN)

    def _in_letters(self, text: str) -> str:
        """Return the text with what an ASCII stream has in place of other signs, before it is laid out."""
        return text.translate(self._letters)

    def line(self, text: str = "", style: str = "", wrap: bool = True) -> None:
        """Add a line; no markup is read in it."""
        self._console.print(Text(self._in_letters(text), style), highlight=False, soft_wrap=not wrap)

    def table(
        self,
        title: str,
        headings: Sequence[str],
        rows: Sequence[Sequence[Cell]],
        sections: Sequence[int] = (),
        bold: Callable[[int, int], bool] = lambda row, column: False,
    ) -> None:
        """Add a table of which no number is cut, whatever the width; a long schedule is shortened on a terminal.

        Args:
            title: above it.
            headings: one for each column; the first stands to the left, the others to the right.
            rows: cells; a schedule is a list of its counts.
            sections: rows that a line follows.
            bold: of row and column, both from 0.
        """

        def build(longest: int) -> Table:
            style: dict[str, Any] = {"title_style": "bold", "title_justify": "left", "padding": (0, 1, 0, 0)}
            table = Table(box=box.SIMPLE_HEAD, title=Text(self._in_letters(title)), pad_edge=False, **style)
            for index, heading in enumerate(headings):
                justify: Any = "right" if index else "left"
                table.add_column(Text(self._in_letters(heading)), justify=justify, no_wrap=True)
            for index, row in enumerate(rows):
                cells = [
                    Text(self._cell(cell, longest), "bold" if bold(index, column) else "")
                    for column, cell in enumerate(row)
                ]
                table.add_row(*cells, end_section=index in sections)
            return table

        table = build(_NO_LIMIT)
        if (too_wide := Measurement.get(self._wide, self._wide.options, table).maximum - self.width) > 0:
            schedules = [cell for row in rows for cell in row if not isinstance(cell, str)]
            longest = max((len(" ".join(map(str, cell))) for cell in schedules), default=0)
            table = build(max(0, longest - too_wide))
        self._wide.print(table, soft_wrap=True)

    def _cell(self, cell: Cell, longest: int) -> str:
        return self._in_letters(cell if isinstance(cell, str) else shortened(cell, longest))

    def write(self, stream: TextIO | None = None) -> OSError | None:
        """Write the page to its stream, or another -> what kept it from being written."""
        return write(self.stream if stream is None else stream, self._sheet.getvalue())


class _Lines:
    """Progress without a terminal: a line for each phase, with the seconds since the start."""

    def __init__(self) -> None:
        self._phase = ""

    def __call__(self, what: str, done: float, total: float) -> None:
        phase = what.split(" ", 1)[0]
        if phase != self._phase:
            self._phase = phase
            write(sys.stderr, f"{phase} ({time.perf_counter() - _STARTED:.0f} s)\n")


class _Bar:
    """Progress on a terminal: one bar, with the time that is left of the phase."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._task = progress.add_task("building models", total=None)
        self._phase = ""

    def __call__(self, what: str, done: float, total: float) -> None:
        phase = what.split(" ", 1)[0]
        if phase != self._phase:
            self._progress.reset(self._task)  # else another phase's pace would count in the time left
            self._phase = phase
        self._progress.update(self._task, description=what, completed=done, total=total)


@contextmanager
def progress_bar(lines: bool = False) -> Iterator[Any]:
    """Give a function ``(what, done, total)`` that moves a bar on stderr; the first word of ``what`` names the phase.

    Args:
        lines: where stderr is no terminal, write a line for each phase.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines() if lines else lambda what, done, total: None
        return
    words = TextColumn("{task.description:<26}", markup=False)
    numbers = (TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(words, BarColumn(30), *numbers, console=console, transient=True) as bar:
        yield _Bar(bar)
