"""Models of Hugging Face by the name of a folder, with what their images must be like."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["Opened", "answer_of", "open_folder"]

_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


class Opened(NamedTuple):
    """A model from a folder.

    Attributes:
        model: in evaluation, ready for :func:`fastreduce.patch`. Of its output, :func:`answer_of` gives a tensor.
        config: what it takes, in timm's words: ``input_size`` (3, height, width), ``mean``, ``std``,
            ``interpolation``, ``crop_pct``, ``crop_mode``.
    """

    model: nn.Module
    config: dict[str, Any]


def answer_of(output: Any) -> Tensor:
    """Return what a model is asked for: logits, an embedding of the image, the pooled token, or all tokens.

    Raises:
        TypeError: an output that has none of these.
    """
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "image_embeds", "pooler_output", "last_hidden_state"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    raise TypeError(f"a {type(output).__name__} has neither logits nor an embedding")


def _pair(size: Any, otherwise: tuple[int, int]) -> tuple[int, int]:
    """Read (height, width) as the library writes them: a number, or a dictionary."""
    if isinstance(size, dict):
        side = size.get("shortest_edge")
        return (side, side) if side else (size.get("height", otherwise[0]), size.get("width", otherwise[1]))
    return (size, size) if size else otherwise


def _config_of(folder: Path, image_size: Any) -> dict[str, Any]:
    """Read what images must be like, from ``preprocessor_config.json`` where there is one."""
    file = folder / "preprocessor_config.json"
    told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    own = (image_size[0], image_size[1]) if isinstance(image_size, (list, tuple)) else _pair(image_size, (224, 224))
    resized = _pair(told.get("size"), own)
    cropped = _pair(told.get("crop_size"), own) if told.get("do_center_crop") else resized
    return {
        "input_size": (3, *cropped),
        "mean": tuple(told.get("image_mean", (0.5, 0.5, 0.5))),
        "std": tuple(told.get("image_std", (0.5, 0.5, 0.5))),
        "interpolation": _INTERPOLATIONS.get(told.get("resample", 2), "bicubic"),
        "crop_pct": cropped[0] / resized[0],
        "crop_mode": "center" if told.get("do_center_crop") else "squash",
    }


def open_folder(path: str | os.PathLike[str]) -> Opened:
    """Build the model that ``save_pretrained`` wrote to a folder. Nothing is downloaded.

    Args:
        path: a folder with ``config.json`` and weights; ``hf:`` may stand before it.

    Returns:
        The model, of the class that its configuration names, and what it takes.

    Raises:
        ValueError: no such folder, or none with a configuration that names a class of transformers.
        ImportError: transformers is not installed.
    """
    folder = Path(str(path).removeprefix("hf:"))
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{str(folder)!r} is no folder that save_pretrained wrote: it has no config.json")
    import transformers

    names = json.loads(file.read_text(encoding="utf-8")).get("architectures") or [""]
    kind = getattr(transformers, names[0], None)
    if kind is None:
        raise ValueError(f"config.json in {str(folder)!r} names {names[0]!r}, which is no class of transformers")
    model = kind.from_pretrained(folder, local_files_only=True).eval()
    vision = getattr(model.config, "vision_config", model.config)
    return Opened(model, _config_of(folder, getattr(vision, "image_size", None)))
