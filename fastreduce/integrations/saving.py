"""The reduction of a model in a small JSON file beside its weights, applied again by one call."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from .._version import __version__
from ..config import read_config
from ..recording import patched_model
from .patching import config_of, patch

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
    if isinstance(value, (list, tuple)):
        return [_plain(name, one) for one in value]
    if hasattr(value, "tolist"):  # numbers and arrays of numpy and torch
        return value.tolist()
    return value


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
        ValueError: if the model is not patched, or with a generator, which no file can hold.
    """
    given = {name: _plain(name, value) for name, value in config_of(model).items() if value is not None}
    text = json.dumps({"fastreduce": __version__, "config": given}, indent=2)
    file = _file(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n", encoding="utf-8")
    layers = {name: value.contiguous() for name, value in patched_model(model).reducers.state_dict().items()}
    if layers:
        from safetensors.torch import save_file

        save_file(layers, file.with_suffix(".safetensors"))
    return file


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
        ValueError: if it names no method; and whatever :func:`fastreduce.patch` raises.
    """
    file = _file(path)
    if not file.is_file():
        raise FileNotFoundError(f"no reduction is recorded at {file}: fastreduce.save_config writes it")
    patch(model, **(read_config(file) | changes))
    _load_layers(model, file.with_suffix(".safetensors"))
    return model


def _load_layers(model: nn.Module, file: Path) -> None:
    """Give the layers of a learned method the weights that were saved of them, if there are any."""
    if file.is_file():
        from safetensors.torch import load_file

        patched_model(model).reducers.load_state_dict(load_file(file))
