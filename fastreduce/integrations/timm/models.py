"""Models that timm makes, and what they take."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from typing import Any

import timm
from torch import nn

__all__ = ["create_model", "create_pretrained", "imagenet_indices", "input_config", "model_names"]

create_model = timm.create_model


_HUB_SECONDS = 5.0


def _hub_trouble(seconds: float) -> str | None:
    """Try the hub once -> why it cannot be reached, or None. Looking up its name has no time limit of its own."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    found: list[str | None] = [f"the hub did not answer within {seconds:g} seconds"]

    def knock() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=seconds):
                found[0] = None
        except urllib.error.HTTPError:
            found[0] = None  # somebody is there
        except (OSError, ValueError) as error:
            found[0] = f"the hub cannot be reached: {getattr(error, 'reason', error)}"

    knocking = threading.Thread(target=knock, daemon=True)
    knocking.start()
    knocking.join(seconds)
    return found[0]


def create_pretrained(name: str, seconds: float = _HUB_SECONDS) -> tuple[nn.Module | None, str]:
    """Return a model with timm's weights, from this machine's cache or the hub, or None and the reason in words.

    Args:
        name: of timm's models.
        seconds: how long the hub may take to answer; it is tried once.
    """
    from huggingface_hub import constants

    trouble, before = _hub_trouble(seconds), constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = before or trouble is not None
        return timm.create_model(name, pretrained=True), ""
    except Exception as error:
        return None, trouble or " ".join(str(error).split())
    finally:
        constants.HF_HUB_OFFLINE = before


def model_names() -> list[str]:
    """Return the names of all models that timm knows, reducible or not."""
    return timm.list_models()


def input_config(model: nn.Module) -> dict[str, Any]:
    """Return what a model takes: ``input_size`` (3, height, width), ``mean``, ``std``, ``crop_pct``, ``crop_mode``."""
    return timm.data.resolve_model_data_config(model)


def imagenet_indices(classes: int) -> dict[str, int] | None:
    """Return the class index of each of ImageNet's names (``n01440764``) in a head of so many classes, None for others.

    Heads of 1,000 (ImageNet-1K), 11,821, 21,841 and the like (parts of ImageNet-21K) are known to timm.
    """
    for name in ("imagenet-1k", "imagenet-12k", "imagenet-21k", "imagenet-21k-goog", "imagenet-22k"):
        info = timm.data.ImageNetInfo(name)
        if info.num_classes() == classes:
            return {word: index for index, word in enumerate(info.label_names())}
    return None
