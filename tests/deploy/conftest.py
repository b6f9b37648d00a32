"""Tests that take long are marked, so that they run where they are asked for."""


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: run by `python -m tests --slow`")
