"""Entry point of the ``fastreduce`` command. Commands: :mod:`fastreduce.cli.app`, :mod:`fastreduce.cli.study`."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from importlib.util import find_spec

__all__ = ["main"]

_STOPPED = (130, 143)  # by SIGINT and SIGTERM
_EXTRA = ("typer", "rich", "matplotlib", "sklearn", "PIL", "safetensors")


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # a None in sys.modules
        return False


def _close_output() -> None:
    """Write out what is left, and say in one line where that fails: python itself would with four."""
    from .screen import write

    if (error := write(sys.stdout, "")) is not None:
        write(sys.stderr, f"error: the output cannot be written: {error.strerror}\n")
        sys.exit(2)


def _run() -> None:
    missing = [name for name in _EXTRA if not _is_there(name)]
    if missing:
        print(f'fastreduce: {", ".join(missing)} missing; pip install "fastreduce[cli]"', file=sys.stderr)
        sys.exit(2)
    from .app import app
    from .study import study

    app.add_typer(study, name="study")
    try:
        app(prog_name="fastreduce")
    finally:
        _close_output()


def main() -> None:
    """Run the command line; without the packages of the extra ``cli`` say how to get them and exit with 2."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    # Tables and legends say both, of every method that was asked for.
    warnings.filterwarnings("ignore", r"\w+ (adds layers with random weights|keeps \[)", UserWarning)
    try:
        _run()
    except KeyboardInterrupt:
        print("error: stopped", file=sys.stderr)
        _leave(130)
    except SystemExit as error:
        if error.code in _STOPPED:
            _leave(error.code)
        raise


def _leave(code: int | str | None) -> None:
    """End the process at once: to take torch apart lasts seconds on a busy machine, and the user wants it to stop."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else 1)
