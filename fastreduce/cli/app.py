"""The commands of ``fastreduce``. What they compute is imported when they run, so that ``--help`` is quick."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..names import FAMILIES
from .compare import compare
from .export import export
from .options import UserError
from .output import INTERRUPTED, print_error
from .plan import plan
from .screen import Page, hush, is_full
from .tables import print_methods
from .tune import tune

__all__ = ["app"]


def _message(error: Any, arguments: list[str]) -> str:
    """Return what typer says of a wrong option, with the value that it does not show."""
    message: str = error.format_message()
    names = getattr(getattr(error, "param", None), "opts", ())
    for index, word in enumerate(arguments):
        name, sign, value = word.partition("=")
        if name in names and (sign or index + 1 < len(arguments)):
            value = value if sign else arguments[index + 1]
            return message if repr(value) in message else f"{message}, got {value!r}"
    return message


class _OneLineErrors(TyperGroup):
    """One line on stderr and exit code 2 for every user error, typer's own (an unknown option) included."""

    def main(self, *args: Any, **extra: Any) -> Any:
        standalone = extra.pop("standalone_mode", True)
        arguments = list((args[0] if args else extra.get("args")) or sys.argv[1:])
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except Exception as error:
            if not standalone or (message := self._of_user(error, arguments)) is None:
                raise
            print_error(message)
            sys.exit(INTERRUPTED if type(error).__name__ == "Abort" else 2)
        if standalone:
            sys.exit(code if isinstance(code, int) else 0)
        return code

    @staticmethod
    def _of_user(error: Exception, arguments: list[str]) -> str | None:
        """Return what to say of an error that is no mistake in the code."""
        # Typer has had click outside and inside; its errors have these names in both.
        if type(error).__name__ == "Abort":
            return "stopped"
        if hasattr(error, "format_message"):
            return _message(error, arguments)
        if isinstance(error, OSError) and is_full(error):
            hush(sys.stdout)
            return f"the output cannot be written: {error.strerror}"
        # backends.py reads the variable when it is imported, which every command does in its own place.
        return str(error) if str(error).startswith("FASTREDUCE_BACKEND=") else None


app = typer.Typer(
    cls=_OneLineErrors,
    help="Token reduction for Vision Transformers that is actually faster.",
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .._version import __version__

        print(f"fastreduce {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def methods() -> None:
    """List the methods: what they train, their options, and when to choose which."""
    page = Page(sys.stdout)
    print_methods(page, FAMILIES)
    if (error := page.write()) is not None:
        raise UserError(f"the output cannot be written: {error.strerror}")


app.command()(compare)
app.command()(plan)
app.command()(tune)
app.command()(export)
