"""Reduce the tokens of timm's Vision Transformers, in place and reversibly. The only package that imports timm."""

from ...recording import Record, Stage, is_patched, record, reducer_of
from ..patching import config_of, patch, reduced_counts, set_keep_rate, unpatch
from .models import create_model, create_pretrained, imagenet_indices, input_config, model_names

__all__ = [
    "Record",
    "Stage",
    "config_of",
    "create_model",
    "create_pretrained",
    "imagenet_indices",
    "input_config",
    "is_patched",
    "model_names",
    "patch",
    "record",
    "reduced_counts",
    "reducer_of",
    "set_keep_rate",
    "unpatch",
]
