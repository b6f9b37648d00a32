"""Tests here compile kernels ahead of time: impossible in a process that runs the interpreter."""

import os
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["test_*.py"]

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before pytest reads the marks
def pytest_collection_modifyitems(config, items):
    """Keep one architecture of every case, in turn, and mark four of five cases as slow.

    ``bench.compile_report --quick``, which CI runs too, compiles the usual shapes for both architectures.
    """
    cases = {}
    for item in items:
        if item.path.parent == HERE and "arch" in item.fixturenames:
            others, _, arch = item.callspec.id.rpartition("-")
            assert arch == str(item.callspec.params["arch"]), f"{item.nodeid}: arch must be the outermost parameter"
            cases.setdefault((item.path.name, item.originalname, others), []).append(item)
    left_out = set()
    for turn, case in enumerate(cases.values()):
        kept = case[turn % len(case)]
        left_out.update(set(case) - {kept})
        if turn // len(case) % 5:
            kept.add_marker(pytest.mark.slow)
    items[:] = [item for item in items if item not in left_out]
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
