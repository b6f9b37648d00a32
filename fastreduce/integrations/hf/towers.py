"""Towers of Hugging Face: its encoders of images, videos and sounds, their layers and their tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

__all__ = ["TOWERS", "Tower", "images_in", "layers_at", "towers_in"]

Axes = Callable[[Any], tuple[int, ...]]


def _pair(size: Any) -> tuple[int, int]:
    rows, columns = size if isinstance(size, (tuple, list)) else (size, size)
    return int(rows), int(columns)


def _image(config: Any) -> tuple[int, ...]:
    """Return (rows, columns)."""
    sizes = zip(_pair(config.image_size), _pair(config.patch_size), strict=True)
    return tuple(size // patch for size, patch in sizes)


def _most(config: Any) -> tuple[int, ...]:
    """Return (rows, columns) of the largest square; of SigLIP 2 every image brings its own."""
    side = math.isqrt(config.num_patches)
    return (side, side) if side * side == config.num_patches else (1, config.num_patches)


def _spectrogram(config: Any) -> tuple[int, ...]:
    """Return (bands, times), whose patches overlap."""
    bands = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
    return bands, (config.max_length - config.patch_size) // config.time_stride + 1


def _video(config: Any) -> tuple[int, ...]:
    """Return (frames, rows, columns) of VideoMAE."""
    return config.num_frames // config.tubelet_size, *_image(config)


def _tubelets(config: Any) -> tuple[int, ...]:
    """Return (frames, rows, columns) of ViViT."""
    frames, rows, columns = config.tubelet_size
    height, width = _pair(config.image_size)
    return config.num_frames // frames, height // rows, width // columns


def _clip(config: Any) -> tuple[int, ...]:
    """Return (frames, rows, columns) of V-JEPA 2."""
    side = config.crop_size // config.patch_size
    return config.frames_per_clip // config.tubelet_size, side, side


class Tower(NamedTuple):
    """Facts about a class of encoders.

    Attributes:
        layers: the attributes that lead to its layers; in other versions of the library ``encoder.layer`` does.
        owner: those that lead to the module in it that hands out hidden states.
        leading: class and distillation tokens; the first is the class token. Registers follow them.
        axes: makes the grid of patches of its configuration.
        rotary: whether its layers look at where a token is.
    """

    layers: str
    owner: str = ""
    leading: int = 1
    axes: Axes = _image
    rotary: bool = False


def layers_at(tower: Any, known: Tower) -> str:
    """Return the attributes that lead to an encoder's layers in this version of the library."""
    first = known.layers.partition(".")[0]
    return known.layers if first in tower._modules else "encoder.layer"


TOWERS = {
    "ViTModel": Tower("layers"),
    "ViTMSNModel": Tower("layers"),
    "DeiTModel": Tower("layers", leading=2),
    "IJepaModel": Tower("layers", leading=0),
    "VivitModel": Tower("layers", axes=_tubelets),
    "ASTModel": Tower("layers", leading=2, axes=_spectrogram),
    "CLIPVisionModel": Tower("encoder.layers"),
    "MetaClip2VisionModel": Tower("encoder.layers"),
    "SiglipVisionModel": Tower("encoder.layers", leading=0),
    "Siglip2VisionModel": Tower("encoder.layers", leading=0, axes=_most),
    "Aimv2VisionModel": Tower("encoder.layers", leading=0),
    "VideoMAEModel": Tower("encoder.layer", leading=0, axes=_video),
    "VJEPA2Model": Tower("encoder.layer", leading=0, axes=_clip, rotary=True),
}
for _name in ("Dinov2Model", "Dinov2Backbone", "Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"):
    TOWERS[_name] = Tower("encoder.layer", owner="encoder")
for _name in ("DINOv3ViTModel", "DINOv3ViTBackbone"):
    TOWERS[_name] = Tower("model.layer", owner="model", rotary=True)


def towers_in(model: nn.Module) -> Iterator[tuple[str, Any, Tower]]:
    """Yield the encoders in a model, itself among them: the attributes that lead there, the module, what is known."""
    for path, module in model.named_modules():
        kind = type(module)
        if kind.__name__ in TOWERS and kind.__module__.startswith("transformers."):
            yield path, module, TOWERS[kind.__name__]


def images_in(tower: nn.Module) -> bool:
    """Return whether an encoder takes images (B, 3, height, width), not videos, sounds or patches of many sizes."""
    return TOWERS[type(tower).__name__].axes is _image
