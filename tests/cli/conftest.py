"""Tests of the commands are collected where the extra ``cli`` is installed."""

from importlib.util import find_spec

collect_ignore_glob = [] if all(map(find_spec, ("typer", "matplotlib", "sklearn"))) else ["test_*.py"]
