"""Tests here run kernels in Triton's interpreter: a process of their own, started with TRITON_INTERPRET=1."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    from bench.proof.interpreter import install_fixes, sanitized

    install_fixes()

    @pytest.fixture(autouse=True)
    def _sanitized():
        """Check every launch of every test here for bounds, undefined lanes and races."""
        with sanitized():
            yield

else:
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header():
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "tests/kernels left out: they need TRITON_INTERPRET=1 (`python -m tests` runs both kinds)"
    return None
