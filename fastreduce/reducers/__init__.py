"""The token reduction methods, and their registry."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from typing import Any

from .ats import ATS
from .base import AttentionBlock, ModelShape, Reducer, attend_all
from .dpcknn import DPCKNN
from .dynamicvit import DynamicViT
from .evit import EViT
from .kmedoids import KMedoids
from .radial import Radial
from .schedule import Keep, KeepRate
from .soft import PatchMerger, Sinkhorn, SiT
from .tome import ToMe
from .topk import TopK

__all__ = [
    "ATS",
    "DPCKNN",
    "REDUCERS",
    "AttentionBlock",
    "DynamicViT",
    "EViT",
    "KMedoids",
    "ModelShape",
    "PatchMerger",
    "Radial",
    "Reducer",
    "SiT",
    "Sinkhorn",
    "ToMe",
    "TopK",
    "attend_all",
    "make_reducer",
]

REDUCERS: dict[str, type[Reducer]] = {
    cls.name: cls for cls in (TopK, EViT, DynamicViT, ATS, ToMe, KMedoids, DPCKNN, SiT, PatchMerger, Sinkhorn, Radial)
}


def _options(cls: type[Reducer]) -> set[str]:
    """Names of the options that are the method's own."""
    common = {"self", "cls", "shape", "channels", "blocks", "at", "keep_rate", "keep", "backend"}
    common |= {"options", "arguments"}
    names = {*inspect.signature(cls.make).parameters, *inspect.signature(cls).parameters}
    own = names - common
    # A schedule object is what `make` turns keep_rate and keep into, unless `make` itself has an option of that name.
    return own if "schedule" in inspect.signature(cls.make).parameters else own - {"schedule"}


def make_reducer(
    method: str,
    shape: ModelShape,
    /,
    *,
    at: int | Sequence[int] | None = None,
    keep_rate: KeepRate = None,
    keep: Keep = None,
    backend: str = "auto",
    **options: Any,
) -> Reducer:
    """Build a reducer by name.

    Raises:
        ValueError: unknown method (the nearest name is suggested), or values out of range.
        TypeError: an option that the method does not have, or a value of the wrong kind.
    """
    if method not in REDUCERS:
        near = difflib.get_close_matches(str(method), REDUCERS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown method {method!r}{hint} Known: {', '.join(sorted(REDUCERS))}")
    cls = REDUCERS[method]
    allowed = _options(cls)
    for name in options:
        if name not in allowed:
            known = f"its options are {', '.join(sorted(allowed))}" if allowed else "it has none"
            raise TypeError(f"{method!r} has no option {name!r}; {known}")
    return cls.make(shape, at=at, keep_rate=keep_rate, keep=keep, backend=backend, **options)
