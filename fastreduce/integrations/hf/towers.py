"""Towers of Hugging Face: its encoders of images, videos and sounds, their layers and their tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

__all__ = [
    *("TOWERS", "Tower", "holder_of", "images_in", "known_name", "known_of", "layers_at", "library_class", "owner_of"),
    "towers_in",
]

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
        layers: the attributes that lead to its layers; :func:`layers_at` knows those of other versions of the library.
        owner: those that lead to the module in it that hands out hidden states; see :func:`owner_of`.
        leading: class and distillation tokens; the first is the class token. Registers follow them.
        axes: makes the grid of patches of its configuration.
        rotary: whether its layers look at where a token is.
    """

    layers: str
    owner: str = ""
    leading: int = 1
    axes: Axes = _image
    rotary: bool = False


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


def library_class(kind: Any) -> Any:
    """Return the class of transformers that a subclass of the user's has its forward of; other classes as they are."""
    for base in kind.__mro__:
        if base.__module__.startswith("transformers.") and getattr(base, "forward", None) is kind.forward:
            return base
    return kind


def known_name(kind: type) -> str:
    """Return the name that a class of encoders, or a subclass with the same forward, has in :data:`TOWERS`.

    Up to transformers 5.4, ``CLIPVisionModel`` and its kin hold a ``CLIPVisionTransformer``, which models of images
    and text have without it.
    """
    name = library_class(kind).__name__
    return f"{name.removesuffix('Transformer')}Model" if name.endswith("VisionTransformer") else name


def known_of(module: nn.Module) -> Tower | None:
    """Return what is known of an encoder's class; None for other modules, and for what only holds an encoder."""
    kind = library_class(type(module))
    if not kind.__module__.startswith("transformers.") or (known := TOWERS.get(known_name(kind))) is None:
        return None
    return None if "vision_model" in module._modules else known


def layers_at(tower: Any, known: Tower) -> str:
    """Return the attributes that lead to an encoder's layers in this version of the library."""
    for path in (known.layers, "encoder.layer"):
        if path.partition(".")[0] in tower._modules:
            return path
    return "layer"  # of DINOv3 up to 5.0


def holder_of(model: nn.Module, path: str) -> str:
    """Return the path to the module that holds the encoder at a path and nothing else, or else the path itself."""
    above = path.rpartition(".")[0]
    holds = above and type(model.get_submodule(above)).__name__ == known_name(type(model.get_submodule(path)))
    return above if holds else path


def owner_of(model: Any, path: str, known: Tower) -> str:
    """Return the path to the module that hands out the hidden states of the encoder at a path in a model.

    Raises:
        TypeError: up to transformers 5.4 that may be the module that holds the encoder, which is not in the model.
    """
    kind: Any = library_class(type(tower := model.get_submodule(path)))
    if kind.__name__ != known_name(kind) and not hasattr(kind.forward, "__wrapped__"):  # the library decorates it
        if not path:
            raise TypeError(
                f"{kind.__name__} cannot be reduced: its hidden states are handed out by what holds it; give that"
            )
        return path.rpartition(".")[0]
    return ".".join(filter(None, (path, known.owner))) if known.owner in tower._modules else path


def towers_in(model: nn.Module) -> Iterator[tuple[str, Any, Tower]]:
    """Yield the encoders in a model, itself among them: the attributes that lead there, the module, what is known."""
    for path, module in model.named_modules():
        if (known := known_of(module)) is not None:
            yield path, module, known


def images_in(tower: nn.Module) -> bool:
    """Return whether an encoder takes images (B, 3, height, width), not videos, sounds or patches of many sizes."""
    known = known_of(tower)
    return known is not None and known.axes is _image
