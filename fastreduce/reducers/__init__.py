"""The token reduction methods, and their registry."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from typing import Any

from .ats import ATS
from .base import ModelShape, Reducer, ScheduledReducer
from .block import AttentionBlock, Heads, attend_all
from .dpcknn import DPCKNN
from .dynamicvit import DynamicViT
from .evit import EViT
from .kmedoids import KMedoids
from .patchmerger import PatchMerger
from .radial import Radial
from .schedule import Keep, KeepRate
from .sinkhorn import Sinkhorn
from .sit import SiT
from .tome import ToMe
from .topk import TopK

__all__ = [
    "ATS",
    "DPCKNN",
    "REDUCERS",
    "AttentionBlock",
    "DynamicViT",
    "EViT",
    "Heads",
    "KMedoids",
    "ModelShape",
    "PatchMerger",
    "Radial",
    "Reducer",
    "ScheduledReducer",
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


def _find_method(method: object) -> str:
    """Return the registered name that is meant: upper and lower case, hyphens and blanks do not matter."""
    known = ", ".join(sorted(REDUCERS))
    if not isinstance(method, str):
        raise TypeError(f"method must be the name of a method, got {method!r}; one of {known}")
    plain = "".join(character for character in method.lower() if character not in "-_ ")
    if plain in REDUCERS:
        return plain
    near = difflib.get_close_matches(plain, REDUCERS, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"unknown method {method!r}{hint} Known: {known}")


def _unknown_option(method: str, name: str, allowed: set[str]) -> str:
    """Return the message about an option that a method does not have."""
    near = difflib.get_close_matches(name, {*allowed, "keep_rate", "keep", "at", "backend"}, n=1, cutoff=0.6)
    if near:
        return f"{method!r} has no option {name!r}; did you mean {near[0]!r}?"
    known = f"its options are {', '.join(sorted(allowed))}" if allowed else "it has none"
    return f"{method!r} has no option {name!r}; {known}"


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
    """Build a reducer by name, in any case.

    Raises:
        ValueError: unknown method (the nearest name is suggested), or values out of range.
        TypeError: an option that the method does not have, or a value of the wrong kind.
    """
    method = _find_method(method)
    cls = REDUCERS[method]
    allowed = _options(cls)
    for name in options:
        if name not in allowed:
            raise TypeError(_unknown_option(method, name, allowed))
    return cls.make(shape, at=at, keep_rate=keep_rate, keep=keep, backend=backend, **options)
