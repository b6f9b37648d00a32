"""Entry point of the ``fastreduce`` command. Commands: :mod:`fastreduce.commands`, :mod:`fastreduce.study_commands`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

__all__ = ["main"]

_EXTRA = ("typer", "rich", "matplotlib", "sklearn", "PIL", "safetensors")


def main() -> None:
    """Run the command line; without the packages of the extra ``cli`` say how to get them and exit with 2."""
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        print(f'fastreduce: {", ".join(missing)} missing; pip install "fastreduce[cli]"', file=sys.stderr)
        sys.exit(2)
    from .commands import app
    from .study_commands import study

    app.add_typer(study, name="study")
    app()


if __name__ == "__main__":
    main()
