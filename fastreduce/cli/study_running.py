"""Start and end of the study's commands: what is missing, what went wrong, Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import typer

from .options import UserError, user_errors
from .screen import write

if TYPE_CHECKING:
    pass

__all__ = ["EXTRA", "training_errors", "trouble_of", "working"]

BACKENDS = ("auto", "triton", "reference")
EXTRA = {"accelerate": "accelerate", "scipy": "scipy", "ot": "POT", "jinja2": "jinja2"}


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # a None in sys.modules
        return False


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


def _terminate(*_: Any) -> None:
    raise _Terminated


@contextmanager
def _stops_in_one_line(stays: str) -> Iterator[None]:
    """Answer Ctrl-C and SIGTERM with one line that says what stays.

    Processes that ``accelerate launch`` started die of SIGTERM at once: an exception would not get them out of a
    collective operation.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 and threading.current_thread() is threading.main_thread()
    # A shell that starts a command in the background of a script has it ignore SIGINT, which may be meant for it alone.
    handlers: dict[int, Any] = {signal.SIGTERM: _terminate, signal.SIGINT: signal.default_int_handler} if alone else {}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    except KeyboardInterrupt as error:
        write(sys.stderr, f"stopped{stays}\n")
        raise typer.Exit(143 if isinstance(error, _Terminated) else 130) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def working(stays: str = "") -> Iterator[None]:
    """Turn errors into a one-line message, and refuse to work without the packages of the extra.

    Args:
        stays: what to say of the files when the command is stopped.
    """
    if missing := [package for name, package in EXTRA.items() if not _is_there(name)]:
        raise UserError(f'{", ".join(missing)} missing; pip install "fastreduce[study]"')
    given = os.environ.get("FASTREDUCE_BACKEND", "auto")
    if given not in BACKENDS:
        raise UserError(f"FASTREDUCE_BACKEND={given!r}; expected one of {', '.join(map(repr, BACKENDS))}")
    with _stops_in_one_line(stays), training_errors():
        yield


@contextmanager
def training_errors() -> Iterator[None]:
    """Turn users' errors, a loss that is not finite and a lack of memory into one line."""
    try:
        with user_errors():
            yield
    except UserError as error:
        # Raised by a worker that loads images, it is the end of that one's traceback.
        raise UserError(str(error).rsplit("\nValueError: ", 1)[-1].strip()) from error
    except (ArithmeticError, MemoryError, RuntimeError) as error:
        if (message := trouble_of(error)) is None:
            raise
        raise UserError(message) from error


def trouble_of(error: Exception) -> str | None:
    """Return what to say of an error that is no mistake in the code."""
    from ..study._workers import WorkerLost

    text = str(error)
    if isinstance(error, (FloatingPointError, WorkerLost)):
        return text
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text or type(error).__name__ == "OutOfMemoryError":
        return f"there is too little memory; a smaller --batch-size needs less ({text.splitlines()[0] if text else ''})"
    if text.startswith("DataLoader worker"):
        return f"a process that loads images was killed; fewer --workers need less memory ({text.splitlines()[0]})"
    return None
