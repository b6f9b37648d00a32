"""The reduction of a model in a small JSON file beside its weights, applied again by one call."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from .._files import safetensors_header, write_atomically
from .._version import __version__
from ..arguments import plain
from ..config import read_config
from ..recording import patched_model, reducer_of
from .patching import config_of, patch, unpatch

__all__ = ["load_config", "save_config"]

NAME = "fastreduce.json"

Model = TypeVar("Model", bound=nn.Module)


def _file(path: str | os.PathLike[str]) -> Path:
    """Return the file itself, or the usual one in a folder."""
    file = Path(path)
    return file if file.suffix == ".json" else file / NAME


def _plain(name: str, value: Any) -> Any:
    """Return a value as JSON has it; raise ValueError for one that no file can hold."""
    if isinstance(value, torch.Generator):
        raise ValueError(
            f"{name}={value!r} cannot be written to a file: patch the model without a generator of its own"
        )
    if isinstance(value, (list, tuple, range)) or (hasattr(value, "ndim") and value.ndim):
        return [_plain(name, one) for one in value]
    return plain(value)


def save_config(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write what :func:`fastreduce.patch` was called with, and what :func:`fastreduce.set_keep_rate` made of it.

    The layers that a learned method brought go into a file of the same name that ends in ``.safetensors``, since
    Hugging Face's ``save_pretrained`` renames some keys and ``from_pretrained`` passes over those it does not know::

        model.save_pretrained(folder)
        fastreduce.save_config(model, folder)

    Args:
        model: patched.
        path: a folder, which is made if it is not there, for its ``fastreduce.json``; or a file that ends in ``.json``.

    Returns:
        The file.

    Raises:
        ValueError: if the model is not patched, with a generator, which no file can hold, or where a ``.safetensors``
            of another kind stands in the way (a model's weights).
    """
    given = {name: _plain(name, value) for name, value in config_of(model).items() if value is not None}
    text = json.dumps({"fastreduce": __version__, "config": given}, indent=2)
    file = _file(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    _save_layers(patched_model(model).reducers, file.with_suffix(".safetensors"))
    return write_atomically(file, text + "\n")


def _save_layers(reducer: nn.Module, file: Path) -> None:
    """Write the layers of a method, or take away what a method saved there before; no other file is touched."""
    layers = {name: value.contiguous() for name, value in reducer.state_dict().items()}
    ours = file.is_file() and _is_ours(file)
    if layers:
        from safetensors.torch import save_file

        if file.exists() and not ours:
            raise ValueError(
                f"{str(file)!r} holds something else than layers of a method: give another name than {file.stem!r}"
            )
        write_atomically(file, lambda beside: save_file(layers, beside, {"fastreduce": __version__}))
    elif ours:
        file.unlink()


def _is_ours(file: Path) -> bool:
    """Return whether :func:`save_config` wrote a file."""
    try:
        with file.open("rb") as opened:
            header, _ = safetensors_header(opened, file)
    except ValueError:
        return False
    return "fastreduce" in header.get("__metadata__", {})


def load_config(model: Model, path: str | os.PathLike[str], **changes: Any) -> Model:
    """Reduce a model as :func:`save_config` recorded, in place.

    ::

        model = AutoModelForImageClassification.from_pretrained(folder)
        fastreduce.load_config(model, folder)

    The layers of a learned method get their weights from the ``.safetensors`` beside the file. A state dict of the
    reduced model can be loaded after this call.

    Args:
        model: not patched yet, of the same shape.
        path: the folder, or the file.
        **changes: arguments of :func:`fastreduce.patch` that replace those recorded (``backend="triton"``).

    Returns:
        The model itself.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it names no method, or the layers are another model's; and whatever :func:`fastreduce.patch`
            raises. Whatever is raised, the model is as it was.
    """
    file = _file(path)
    if not file.is_file():
        raise FileNotFoundError(f"no reduction is recorded at {file}: fastreduce.save_config writes it")
    patch(model, **(read_config(file) | changes))
    try:
        _load_layers(model, file.with_suffix(".safetensors"))
    except Exception:
        unpatch(model)
        raise
    return model


def _load_layers(model: nn.Module, file: Path) -> None:
    """Give the layers of a learned method the weights that were saved of them, if there are any."""
    reducer = reducer_of(model)
    if not reducer.state_dict() or not file.is_file():
        return
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        reducer.load_state_dict(load_file(file))
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} cannot be read: {error}") from error
    except RuntimeError as error:  # torch's list of keys and shapes
        raise ValueError(f"{str(file)!r} does not hold the layers of {reducer.name} on this model: {error}") from error
