"""The gates that every kernel passes when compiled ahead of time."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.proof.compiler import SHARED_LIMIT, KernelReport, compiled_for

ARCHES = (80, 90)


def with_dtypes(classes: Sequence[Any]) -> list[tuple[Any, torch.dtype]]:
    """Return every shape class in half precision, one of them in bfloat16, and the extreme ones in float32."""
    cases = [(shape, torch.float16) for shape in classes[:-1]]
    return [*cases, (classes[-1], torch.bfloat16), *((shape, torch.float32) for shape in (classes[0], classes[-1]))]


def check_gates(
    arch: int, launches: Callable[[], object], *, wide: bool = True, mma: bool = False
) -> list[KernelReport]:
    """Compile all that ``launches`` launches; no spill, no atomic, no float64, shared memory within the limit.

    No shared buffer is overwritten that an asynchronous dot may still be reading. No such dots wait for one another.
    ``wide``: at least one load and one store of the last kernel are 16 bytes a thread. ``mma``: tensor cores are used.
    """
    with compiled_for(arch) as reports:
        launches()
    assert reports, "nothing was launched"
    for report in reports:
        assert report.spill_ops == 0, report
        assert report.atomics == 0, report
        assert report.float64_ops == 0, report
        assert report.shared_bytes <= SHARED_LIMIT[arch], report
        assert report.overwrites == 0, report
        assert not report.serial, report
    if wide:
        assert 16 in reports[-1].load_bytes, reports[-1]
        assert 16 in reports[-1].store_bytes, reports[-1]
    if mma:
        assert any(report.mma_ops for report in reports), reports
    return reports
