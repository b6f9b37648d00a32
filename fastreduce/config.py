"""Settings of :func:`fastreduce.patch` in a file: found by ``fastreduce tune``, saved beside a model, or one's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ._files import read_json

__all__ = ["read_config"]


def read_config(config: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of :func:`fastreduce.patch`.

    Args:
        config: a JSON file of ``fastreduce tune`` or :func:`fastreduce.save_config`, or one with the arguments in it
            (``method``, ``at``, ``keep`` or ``keep_rate``, and options of the method); or such a mapping, say of
            :func:`fastreduce.config_of`.

    Raises:
        ValueError: no such file, a file that is not JSON, or one without a method; the message says which.
        TypeError: something that is neither a path nor a mapping.
    """
    found: Any = config
    name = "config"
    if not isinstance(config, Mapping):
        if not isinstance(config, (str, os.PathLike)):
            raise TypeError(f"config must be a path or a mapping, got {config!r}")
        name = os.fspath(config)
        if not os.path.isfile(name):
            raise ValueError(f"there is no file {name!r}")
        found = read_json(name)
    if isinstance(found, Mapping) and "config" in found:
        if found["config"] is None:
            raise ValueError(f"{name!r} says that no schedule pays: leave the model as it is")
        found = found["config"]
    if not isinstance(found, Mapping) or not isinstance(found.get("method"), str):
        raise ValueError(f"{name!r} names no method: it needs the arguments of fastreduce.patch, with 'method'")
    if odd := [one for one in ("config", "model") if one in found]:
        raise ValueError(f"{name!r} has {odd[0]!r} among the arguments of fastreduce.patch: leave it out")
    return dict(found)
