"""Models that timm makes, and what they take."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from ..hub import HUB_SECONDS, hub_tried_once

__all__ = ["create_model", "create_pretrained", "imagenet_indices", "input_config", "model_names"]

create_model = timm.create_model


def create_pretrained(name: str, seconds: float = HUB_SECONDS) -> tuple[nn.Module | None, str]:
    """Return a model with timm's weights, from this machine's cache or the hub, or None and the reason in words.

    Args:
        name: of timm's models.
        seconds: how long the hub may take to answer; it is tried once.
    """
    with hub_tried_once(seconds) as trouble:
        try:
            return timm.create_model(name, pretrained=True), ""
        except Exception as error:
            return None, trouble or " ".join(str(error).split())


def model_names() -> list[str]:
    """Return the names of all models that timm knows, reducible or not."""
    return timm.list_models()


def input_config(model: nn.Module) -> dict[str, Any]:
    """Return what a model takes: ``input_size`` (3, height, width), ``mean``, ``std``, ``crop_pct``, ``crop_mode``."""
    own: Any = getattr(model, "input_config", None)  # of a model of another library, see ImageModel
    return timm.data.resolve_model_data_config(model) if own is None else dict(own)


def imagenet_indices(classes: int) -> dict[str, int] | None:
    """Return the class index of each of ImageNet's names (``n01440764``) in a head of so many classes, None for others.

    Timm knows the heads of ImageNet-1K and of several parts of ImageNet-21K, by their number of classes.
    """
    for name in ("imagenet-1k", "imagenet-12k", "imagenet-21k", "imagenet-21k-goog", "imagenet-22k"):
        info = timm.data.ImageNetInfo(name)
        if info.num_classes() == classes:
            return {word: index for index, word in enumerate(info.label_names())}
    return None
