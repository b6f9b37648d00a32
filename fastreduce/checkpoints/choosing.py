"""The set of weights to take of a checkpoint, under the names that parameters have here."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .._files import printable
from .reading import read_weights, words_of

__all__ = ["Checkpoint", "plain_key", "read_checkpoint"]

_log = logging.getLogger("fastreduce")

# Names under which a checkpoint holds weights, and their moving average; the first that is there is taken.
_RAW = ("model", "state_dict", "model_state_dict", "module")
_EMA = ("model_ema", "state_dict_ema", "ema", "ema_state_dict")
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # they stand anywhere in a key
_OUTER_WRAPPERS = ("module", "model")  # only at its start
_OWN_LAYERS = ("score_predictor.", "cluster_layers.")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The weights of a checkpoint, ready to be loaded.

    Attributes:
        state: tensors (or whatever stands in their place) by the name that the parameter has here.
        taken: the set that they are, such as ``"model_ema"``; empty where the checkpoint is one plain set.
        sets: all the sets that the checkpoint holds.
    """

    state: dict[str, Any]
    taken: str
    sets: tuple[str, ...]


def _sets(content: Mapping[Any, Any]) -> dict[str, Mapping[Any, Any]]:
    """Find the sets of weights in a checkpoint, by name; none if it is one itself."""
    found = {
        name: value
        for name, value in content.items()
        if isinstance(name, str)
        and isinstance(value, Mapping)
        and (name in _RAW or name in _EMA or any(isinstance(part, Tensor) for part in value.values()))
    }
    known = any(name in _RAW or name in _EMA for name in found)
    return found if known or not any(isinstance(value, Tensor) for value in content.values()) else {}


def _is_true(flag: Any) -> bool:
    try:
        return bool(flag) if not isinstance(flag, str) else {"true": True, "false": False}[flag.strip().lower()]
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"'ema_best' of the checkpoint must be true or false, got {flag!r}") from error


def _choose(content: Mapping[Any, Any], held: Mapping[str, Any], weights: str) -> str:
    """Return the name of the set to take."""
    raw = next((name for name in _RAW if name in held), None)
    ema = next((name for name in _EMA if name in held), None)
    if weights != "auto":
        name = {"model": raw, "ema": ema}.get(weights, weights if weights in held else None)
        if name is None:
            known = "'auto', 'model', 'ema' or a set of the checkpoint"
            raise ValueError(f"weights must be {known}, got {weights!r}: it holds {printable(', '.join(held))}")
        return name
    if "ema_best" in content and _is_true(content["ema_best"]):
        if ema is None:
            raise ValueError(
                f"the checkpoint says that its moving average is best (ema_best), but holds only {', '.join(held)}: "
                "say weights='model' for the plain weights"
            )
        return ema
    if raw is not None and ema is not None and "ema_best" not in content:
        _log.warning("the checkpoint holds %r and %r; took %r (weights='ema' takes the other)", raw, ema, raw)
    if (name := raw or ema or (next(iter(held)) if len(held) == 1 else None)) is None:
        raise ValueError(
            f"the checkpoint holds several sets of weights: say which, weights={' or '.join(map(repr, held))}"
        )
    return name


def plain_key(key: Any) -> str:
    """Strip a key of the names of wrappers: of compiled, parallel and averaged models, in any order."""
    if not isinstance(key, str):
        raise ValueError(f"the checkpoint's keys must be strings, got {key!r}")
    parts = [part for part in key.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] in _OUTER_WRAPPERS:
        del parts[0]
    return ".".join(parts)


def _by_plain_key(state: Mapping[Any, Any], what: str) -> dict[str, Any]:
    """Rename all values by :func:`plain_key`, and put a method's own layers under ``reducers.``."""
    named: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for key, value in state.items():
        plain = plain_key(key)
        if plain == "n_averaged" and what == "checkpoint":  # torch's AveragedModel counts its updates there
            continue
        if plain.startswith(_OWN_LAYERS):
            plain = f"reducers.{plain}"
        if plain in named:
            raise ValueError(f"the {what} holds {printable(plain)} twice: as {origins[plain]!r} and as {key!r}")
        named[plain], origins[plain] = value, key
    return named


def read_checkpoint(checkpoint: Mapping[str, Any] | str | os.PathLike[str], weights: str = "auto") -> Checkpoint:
    """Read weights, from a file or from what was read from one, and give them the names that they have here.

    Args:
        checkpoint: a file (see :func:`read_weights`), a state dict, or a dict that holds some, as training scripts
            write it: ``model`` and ``model_ema`` (the paper's code, DeiT's), ``state_dict`` and ``state_dict_ema``
            (timm's). Prefixes of wrappers (``module.``, ``_orig_mod.``, in any order) are removed. The methods' own
            layers (``score_predictor.*``, ``cluster_layers.*``) are put under ``reducers.``.
        weights: which set to take. ``"auto"``: the one that the paper's validate.py evaluates, which is the moving
            average where the file says ``ema_best``, else the model; a warning is logged where there are both and the
            file does not say. ``"model"``, ``"ema"``, or the name of a set in the file.

    Returns:
        The weights; which set they are is logged too, at the level INFO.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it cannot be read, holds no such set, or keys that are no strings or the same without prefixes.
        TypeError: a checkpoint that is neither a path nor a dict.
    """
    if not isinstance(weights, str):
        raise TypeError(f"weights must be 'auto', 'model', 'ema' or the name of a set in the file, got {weights!r}")
    if isinstance(checkpoint, (str, os.PathLike)):
        content, source = read_weights(checkpoint), os.fspath(checkpoint)
    elif isinstance(checkpoint, Mapping):
        content, source = dict(checkpoint), "the state dict"
    else:
        raise TypeError(f"the checkpoint must be a path or a dict of tensors, got a {type(checkpoint).__name__}")
    state: Mapping[Any, Any] = content
    taken: list[str] = []
    sets: tuple[str, ...] = ()
    while held := _sets(state):
        sets = sets or tuple(held)
        taken.append(_choose(state, held, weights if not taken else "auto"))
        state = held[taken[-1]]
    if not taken and weights not in ("auto", "model"):
        raise ValueError(f"weights={weights!r}: {source} holds one plain set of weights; say 'auto'")
    if state and not taken and not any(isinstance(value, Tensor) for value in state.values()):
        entries = [f"{name} ({words_of(value)})" for name, value in list(state.items())[:5]]
        raise ValueError(f"{source} holds no weights, but {printable(', '.join(entries))}")
    named = _by_plain_key(state, "checkpoint")
    if taken:
        _log.info("%s: took the weights %r", source, "/".join(taken))
    return Checkpoint(named, "/".join(taken), sets)
