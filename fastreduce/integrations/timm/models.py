"""Models that timm makes, and what they take."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

__all__ = ["create_model", "input_config", "model_names"]

create_model = timm.create_model


def model_names() -> list[str]:
    """Return the names of all models that timm knows, reducible or not."""
    return timm.list_models()


def input_config(model: nn.Module) -> dict[str, Any]:
    """Return what a model takes: ``input_size`` (3, height, width), ``mean``, ``std``, ``crop_pct``, ``crop_mode``."""
    return timm.data.resolve_model_data_config(model)
