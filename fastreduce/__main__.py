"""``python -m fastreduce``: the command line."""

from .cli import main

main()
