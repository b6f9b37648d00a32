"""Models of Hugging Face by the name of a folder, with what their images must be like."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..hub import HUB_SECONDS, hub_tried_once

__all__ = ["Opened", "answer_of", "open_folder", "open_named"]

_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


class Opened(NamedTuple):
    """A model from a folder.

    Attributes:
        model: in evaluation, ready for :func:`fastreduce.patch`. Of its output, :func:`answer_of` gives a tensor.
        config: what it takes, in timm's words: ``input_size`` (3, height, width), ``mean``, ``std``,
            ``interpolation``, ``crop_pct``, ``crop_mode``.
        missing: parameters that the file of weights does not have, which are random.
    """

    model: nn.Module
    config: dict[str, Any]
    missing: tuple[str, ...] = ()


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
    told = _read_json(file) if file.is_file() else {}
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


def _read_json(file: Path) -> dict[str, Any]:
    """Read one of the library's files, or raise ValueError."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{str(file)!r} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(file)!r} holds no configuration")
    return found


def _class_of(config: dict[str, Any], where: str) -> Any:
    """Return the class that a configuration names; of models of images and text that of their image tower."""
    import transformers

    name = (config.get("architectures") or [""])[0]
    if not name:
        if "model_type" not in config:
            raise ValueError(f"config.json in {where!r} names neither an architecture nor a model_type")
        return transformers.AutoModel
    tower = name.removesuffix("Model") + "VisionModel" if name.endswith("Model") else ""
    for one in (f"{tower}WithProjection", tower, name):
        if tower or one == name:
            kind = getattr(transformers, one, None)
            if kind is not None:
                return kind
    raise ValueError(f"config.json in {where!r} names {name!r}, which is no class of transformers")


def open_folder(path: str | os.PathLike[str]) -> Opened:
    """Build the model that ``save_pretrained`` wrote to a folder. Nothing is downloaded.

    Args:
        path: a folder with ``config.json`` and weights; ``hf:`` may stand before it.

    Returns:
        The model, of the class that its configuration names, and what it takes. Of CLIP and other models of images and
        text it is the class of the image tower.

    Raises:
        ValueError: no such folder, or none with a configuration that names a class of transformers, or weights that
            cannot be read.
        ImportError: transformers is not installed.
    """
    folder = Path(str(path).removeprefix("hf:"))
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{str(folder)!r} is no folder that save_pretrained wrote: it has no config.json")
    return _open(str(folder), folder)


def open_named(name: str, seconds: float = HUB_SECONDS) -> Opened:
    """Build a model of transformers from a folder, from this machine's cache, or from the hub, which is tried once.

    Args:
        name: a folder, or a name on the hub (``owner/name``); ``hf:`` may stand before it.
        seconds: how long the hub may take to answer.

    Raises:
        ValueError: as :func:`open_folder`; or the hub cannot be reached and the cache does not have the model.
        ImportError: transformers is not installed.
    """
    name = name.removeprefix("hf:")
    if os.path.isdir(name):
        return open_folder(name)
    from huggingface_hub import snapshot_download

    with hub_tried_once(seconds) as trouble:
        try:
            patterns = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"]
            folder = snapshot_download(name, allow_patterns=patterns, local_files_only=trouble is not None)
        except Exception as error:
            reason = trouble or " ".join(str(error).split())
            raise ValueError(f"the model {f'hf:{name}'!r} cannot be had: {reason}") from error
        return _open(name, Path(folder))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Load without the library's progress bars and reports, and those of what it imports."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        from transformers.utils import logging as its_own

        shown = its_own.is_progress_bar_enabled()
        its_own.disable_progress_bar()
        yield
        if shown:
            its_own.enable_progress_bar()
    finally:
        logging.disable(disabled)


def _open(name: str, folder: Path) -> Opened:
    """Build the model of a folder that is there; messages call it by ``name``."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"the model {name!r} has no config.json")
    config = _read_json(folder / "config.json")
    own: dict[str, Any] = {}
    with _quietly():
        kind = _class_of(config, name)
        if kind.__name__.endswith("WithProjection") and "vision_config" in config and "projection_dim" in config:
            own["projection_dim"] = config["projection_dim"]  # of images and texts; the tower's own may say otherwise
        try:
            model, about = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True, **own)
        except Exception as error:
            raise ValueError(f"the model {name!r} cannot be loaded: {' '.join(str(error).split())}") from error
    vision = getattr(model.config, "vision_config", model.config)
    missing = tuple(sorted(about["missing_keys"]))
    return Opened(model.eval(), _config_of(folder, getattr(vision, "image_size", None)), missing)
