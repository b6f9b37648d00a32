"""Reading the golden numbers, and the model that they belong to. README.md explains the keys."""

import functools
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn

AT = (1, 3, 4)
RATES = (0.25, 0.5, 0.7, 0.9)


@functools.cache
def read(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return all tensors of one file (integers as int64) and its metadata."""
    with safe_open(Path(__file__).parent / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = {}
        for key, text in file.metadata().items():
            try:
                metadata[key] = json.loads(text)
            except ValueError:
                metadata[key] = text
    return {key: value if value.is_floating_point() else value.long() for key, value in tensors.items()}, metadata


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors under a prefix, by the rest of their keys."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def weights() -> dict[str, Tensor]:
    return below(read("base")[0], "sd/")


def extra(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the method's own layers for ``<method>/r<rate>/`` or ``<variant>/``, under their official names."""
    found = below(tensors, f"{prefix}extra/")
    if not found and prefix.count("/") == 2:
        method, rate = prefix.rstrip("/").split("/")
        every = below(tensors, f"{method.removesuffix('_eps0.05')}/extra/")  # both eps have the same centres
        found = {key.removeprefix(f"{rate}/"): value for key, value in every.items() if key.startswith(f"{rate}/")}
        found = found or {key: value for key, value in every.items() if not key.startswith("r0.")}
    return found


def images() -> Tensor:
    return read("base")[0]["input"].clone()


def empty_model(**changes: Any) -> nn.Module:
    """Return the golden geometry with timm's own random weights."""
    arguments = {"img_size": 28, "patch_size": 2, "embed_dim": 48, "depth": 6, "num_heads": 3, "num_classes": 10}
    norm_layer = functools.partial(nn.LayerNorm, eps=1e-6)
    return timm.models.vision_transformer.VisionTransformer(norm_layer=norm_layer, **{**arguments, **changes}).eval()


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = empty_model()
    model.load_state_dict(weights())
    return model.to(dtype)


def projection(name: str, shape: torch.Size) -> np.ndarray:
    """Return the random direction on which the gradient of a parameter was projected."""
    seed = read("train")[1]["projection_seed"]
    return np.random.RandomState(zlib.crc32(f"{seed}/dot/{name}".encode())).standard_normal(tuple(shape))


def training(key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the file that holds the training golden of a key."""
    return read("train" if f"{key}/names" in read("train")[1] else "train_learned")


def gradient_differences(key: str, gradients: dict[str, Tensor], relative: float, absolute: float) -> list[str]:
    """Return what differs from the training golden under ``key``; ``absolute`` in units of the largest entry."""
    tensors, metadata = training(key)
    slack = absolute * metadata[f"{key}/largest"]
    names, differences = metadata[f"{key}/names"], []
    gradients = {name.removeprefix("reducers."): gradient for name, gradient in gradients.items()}
    assert set(names) == set(gradients), set(names) ^ set(gradients)
    for name, (norm, projected, projected64) in zip(names, tensors[f"{key}/gradstats"].tolist(), strict=True):
        if name in metadata.get(f"{key}/near_zero", ()):  # zero by construction: what is there is rounding
            continue
        gradient = gradients[name].double()
        expected = projected64 if gradients[name].dtype == torch.float64 else projected
        found = float((gradient.numpy() * projection(name, gradient.shape)).sum())
        if abs(gradient.norm().item() - norm) > relative * norm + slack:
            differences.append(f"{name}: norm {gradient.norm().item()} for {norm}")
        if abs(found - expected) > relative * norm + slack:
            differences.append(f"{name}: projection {found} for {expected}")
        whole, rows = tensors.get(f"{key}/grad/{name}"), tensors.get(f"{key}/gradrows4/{name}")
        if whole is not None and not torch.allclose(gradient, whole.double(), rtol=relative, atol=slack):
            differences.append(f"{name}: by {(gradient - whole).abs().max().item()}")
        if rows is not None:
            sample = gradient.reshape(-1, gradient.shape[-1])[::4]
            if not torch.allclose(sample, rows.double(), rtol=relative, atol=slack):
                differences.append(f"{name}: by {(sample - rows).abs().max().item()}")
    return differences
