"""Cases of parametrised tests, of which some run by ``python -m tests --slow`` alone."""

import pytest


def quick(cases, *names):
    """Return the cases, all marked as slow but those of these names."""
    known = {case.id for case in cases}
    assert known.issuperset(names), f"no such case: {set(names) - known}"
    return [
        case if case.id in names else pytest.param(*case.values, id=case.id, marks=pytest.mark.slow) for case in cases
    ]
