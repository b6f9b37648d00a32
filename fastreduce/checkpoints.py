"""Weights from files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def official_state(weights: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Any]:
    """What :func:`load_official` reads, under the names that it has here: a method's own layers under ``reducers.``."""
    state: Mapping[str, Any] = read_weights(weights) if isinstance(weights, (str, os.PathLike)) else weights
    for wrapper in ("model", "state_dict", "model_ema"):
        if wrapper in state and isinstance(state[wrapper], Mapping):
            state = state[wrapper]
            break
    own = ("score_predictor.", "cluster_layers.")
    keys = {key: key.removeprefix("module.") for key in state}
    return {f"reducers.{new}" if new.startswith(own) else new: state[key] for key, new in keys.items()}


def load_official(model: Model, weights: Mapping[str, Any] | str | os.PathLike[str]) -> Model:
    """Load weights of the paper's released code (TokenReduction, timm 0.4.12 names) into a patched or plain timm model.

    Args:
        model: a timm Vision Transformer of the checkpoint's geometry; for a method with layers of its own
            (``score_predictor.*``, ``cluster_layers.*``) patched with that method.
        weights: a state dict, a ``.safetensors`` file, or a ``torch.save`` file (read with ``weights_only=True``).
            A dict that holds it under ``"model"``, ``"state_dict"`` or ``"model_ema"``, and keys with a ``module.``
            prefix, are understood.

    Returns:
        The model itself.

    Raises:
        ValueError: keys or shapes that do not fit; the message names them and the model is as it was.
    """
    state = official_state(weights)
    own = model.state_dict()
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    for key in own:
        found = state.get(key, own[key])
        if not isinstance(found, Tensor):
            problems.append(f"{key} is a {type(found).__name__}, not a tensor")
        elif found.shape != own[key].shape:
            problems.append(f"{key} is {tuple(found.shape)}, the model needs {tuple(own[key].shape)}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"the checkpoint does not fit {type(model).__name__}: {'; '.join(problems[:5])}{more}")
    model.load_state_dict(state)
    return model


def read_weights(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a ``.safetensors`` file, or a pickled checkpoint with ``weights_only=True``.

    Raises:
        ValueError: if the file cannot be read as either; OSError if it cannot be opened.
    """
    path = os.fspath(path)
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read with weights_only=True: {error}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state dict")
    return dict(state)
