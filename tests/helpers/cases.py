"""Cases of parametrised tests, of which some run by ``python -m tests --slow`` alone."""

import pytest


def slow_but(values, *names):
    """Return the values as cases, all marked as slow but these."""
    assert set(values).issuperset(names), f"no such case: {set(names) - set(values)}"
    return [value if value in names else pytest.param(value, marks=pytest.mark.slow) for value in values]


def quick(cases, *names):
    """Return the cases, all marked as slow but those of these names."""
    known = {case.id for case in cases}
    assert known.issuperset(names), f"no such case: {set(names) - known}"
    return [
        case if case.id in names else pytest.param(*case.values, id=case.id, marks=pytest.mark.slow) for case in cases
    ]
