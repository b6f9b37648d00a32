"""Models of the commands: found, built, and given weights from the network, a folder or a checkpoint."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoints import load_official, read_checkpoint
from ..integrations.hub import hub_tried_once
from ..integrations.timm import create_model, create_pretrained, model_names
from ..names import nearest
from .settings import DTYPES as DTYPE_NAMES
from .settings import device_name, library_of

__all__ = ["DTYPES", "Built", "build_model", "device_of", "empty_copy", "plain_view", "share"]

DTYPES = {name: getattr(torch, name) for name in DTYPE_NAMES}


def device_of(name: str | None) -> torch.device:
    """Return the device named; raise ValueError if torch does not see it."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = device_name(name)
    kind, _, index = name.partition(":")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {name!r} was asked for, but torch sees no CUDA device here")
        if index and int(index) >= torch.cuda.device_count():
            raise ValueError(
                f"device {name!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA device(s)"
            )
    return torch.device(name)


class Built(NamedTuple):
    """A model, where its weights come from in words, and what a checkpoint has for the layers of a method.

    ``random`` says whether the weights are; ``note`` why, if others were wanted.
    """

    model: Any
    weights: str
    layers: dict[str, Tensor]
    random: bool = False
    note: str = ""


def build_model(settings: Any) -> Built:
    """Build the model of the settings. Where pretrained weights are only wished for, random ones will do."""
    if library_of(settings.model) == "transformers":
        return _build_hugging_face(settings)
    name, note, wanted = settings.model.removeprefix("timm:"), "", settings.pretrained
    if os.path.isdir(name):
        name = f"local-dir:{name}"
    if name.startswith("local-dir:"):
        wanted = True  # nothing is downloaded
    torch.manual_seed(settings.seed)
    if wanted is not False:
        logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it logs every retry; we tell how it ended
    if wanted is None and settings.checkpoint is None:
        model, reason = create_pretrained(name)
        if model is not None:
            return Built(model.eval(), "pretrained weights", {})
        note = f"pretrained weights cannot be had ({reason}), so they are random"
        torch.manual_seed(settings.seed)
    pretrained = bool(wanted) and settings.checkpoint is None
    trouble = None
    try:
        asked = pretrained and not name.startswith("local-dir:")
        with hub_tried_once() if asked else contextlib.nullcontext() as trouble:
            model = create_model(name, pretrained=pretrained).eval()
    except Exception as error:
        names = model_names()
        if ":" not in name and name.split(".", 1)[0] not in names:
            raise ValueError(f"unknown model {name!r}{nearest(name, names)}") from error
        what = "pretrained weights" if pretrained else "model"
        raise ValueError(f"the {what} {name!r} cannot be had: {trouble or error}") from error
    if settings.checkpoint is not None:
        read = read_checkpoint(settings.checkpoint)
        state = read.state
        layers = {key: state.pop(key) for key in list(state) if key.startswith("reducers.")}
        _fit_head(model, state.get("head.weight"))
        load_official(model, state)
        chosen = f" ({read.taken})" if len(read.sets) > 1 else ""
        return Built(model, f"checkpoint {Path(settings.checkpoint).name}{chosen}", layers)
    if pretrained:
        return Built(model, "pretrained weights", {})
    return Built(model, f"random weights (seed {settings.seed})", {}, True, note)


def _fit_head(model: Any, weight: Any) -> None:
    """Give a model a head of as many classes as the checkpoint's, which may be trained for others than ImageNet's."""
    own = model.get_classifier() if hasattr(model, "get_classifier") else None
    if isinstance(own, nn.Linear) and isinstance(weight, Tensor) and weight.ndim == 2:
        classes, width = weight.shape
        if width == own.in_features and classes != own.out_features:
            model.reset_classifier(classes)


def _build_hugging_face(settings: Any) -> Built:
    """Build a model of transformers; its own weights are wanted unless there is a checkpoint."""
    from ..integrations.hf.folders import open_named
    from ..integrations.hf.images import ImageModel

    torch.manual_seed(settings.seed)
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    try:
        opened = open_named(settings.model)
    except ImportError as error:
        raise ValueError(f"the model {settings.model!r} cannot be had: {error}") from error
    state, weights, layers = opened.model.state_dict(), "pretrained weights", {}
    missing = opened.missing
    if settings.checkpoint is not None:
        read = read_checkpoint(settings.checkpoint)
        layers = {key: value for key, value in read.state.items() if key.startswith("reducers.")}
        given = {key: value for key, value in read.state.items() if key not in layers}
        strange = sorted(set(given) - set(state)) or sorted(
            key for key, value in given.items() if value.shape != state[key].shape
        )
        if strange:
            raise ValueError(
                f"the checkpoint does not fit {settings.model!r}: {strange[0]!r} is not in it in this shape"
            )
        opened.model.load_state_dict(given, strict=False)
        missing = tuple(sorted(set(missing) - set(given)))
        weights = f"checkpoint {Path(settings.checkpoint).name}"
    note = ""
    if missing:
        note = f"{missing[0]}{' and others are' if len(missing) > 1 else ' is'} not in the file of weights: random"
    try:
        model = ImageModel(opened.model, opened.config)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the model {settings.model!r} does not run on images: {' '.join(str(error).split())}"
        ) from error
    return Built(model, weights, layers, note=note)


def plain_view(model: Any) -> nn.Module:
    """Return the model as the plain algorithms take it: one of timm as it is."""
    return model.plain() if hasattr(model, "plain") else model


def share(model: nn.Module) -> Any:
    """Return a copy of the modules that shares every parameter and buffer."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def empty_copy(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters and buffers have shapes and no content."""
    memo: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    memo |= {id(weight): nn.Parameter(weight.detach().to("meta"), False) for weight in model.parameters()}
    return copy.deepcopy(model, memo)
