"""The token reduction methods, and their registry."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from typing import Any

from ..names import METHODS, TITLES, Method, Option
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
    "register",
]

REDUCERS: dict[str, type[Reducer]] = {
    cls.name: cls for cls in (TopK, EViT, DynamicViT, ATS, ToMe, KMedoids, DPCKNN, SiT, PatchMerger, Sinkhorn, Radial)
}


def register(cls: type[Reducer]) -> type[Reducer]:
    """Make a method of one's own known by its name, as a decorator of its class.

    From then on it is patched, recorded, compared and planned like the others: ``fastreduce.patch(model, cls.name)``.

    Args:
        cls: a subclass of :class:`Reducer` (or :class:`ScheduledReducer`) with a ``name`` of lower-case letters and
            digits. The first line of its docstring says when to choose it; arguments of its constructor with defaults
            are its options.

    Returns:
        The class.

    Raises:
        TypeError: not a subclass of Reducer, or one that is still abstract.
        ValueError: a name that is taken by another class, or is not made of lower-case letters and digits.
    """
    if not (isinstance(cls, type) and issubclass(cls, Reducer)):
        raise TypeError(f"a method is a subclass of fastreduce.reducers.Reducer, got {cls!r}")
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        raise TypeError(f"{cls.__name__} has no {' and no '.join(missing)}, which a method must have")
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not name.isalnum() or name != name.lower():
        raise ValueError(
            f"the name of a method must be lower-case letters and digits, got {cls.__name__}.name = {name!r}"
        )
    taken = REDUCERS.get(name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"the name {name!r} is taken by {taken.__module__}.{taken.__qualname__}")
    REDUCERS[name] = cls
    line = (inspect.getdoc(cls) or cls.__name__).splitlines()[0]
    parameters = inspect.signature(cls).parameters
    options = {one: _as_option(parameters[one].default) for one in sorted(_options(cls)) if one in parameters}
    METHODS[name] = Method("its own, if it has some", line, options)
    TITLES.setdefault(name, cls.__name__)
    return cls


def _as_option(default: Any) -> Option:
    """Describe an option of a method of one's own by its default."""
    if type(default) in (bool, int, float):
        return Option(default, type(default))
    return Option(default, "of its own", instead="it is of the method's own kind: give it to fastreduce.patch")


def _options(cls: type[Reducer]) -> set[str]:
    """Return the names of the options that are the method's own."""
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
