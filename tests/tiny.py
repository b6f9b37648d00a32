"""Tiny timm models with random weights under which tokens differ enough for every decision to be a clear one."""

from typing import Any

import timm
import torch
from torch import Tensor, nn

from .inputs import seeded

SMALL = {"depth": 4, "embed_dim": 48, "num_heads": 3, "num_classes": 7}
AT = (1, 2, 3)

# name: arguments of fastreduce.patch and of PlainModel, without the schedule
METHODS: dict[str, dict[str, Any]] = {
    "topk": {"method": "topk"},
    "evit": {"method": "evit"},
    "evit-normalized": {"method": "evit", "normalize": True},
    "tome": {"method": "tome"},
    "tome-exact": {"method": "tome", "rounds": "exact"},
    "radial": {"method": "radial", "norm": "l2"},
}


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that no block leaves idle: LayerScale, biases, class token and positions all matter."""
    generator = seeded(seed)

    def normal(shape: torch.Size, std: float) -> Tensor:
        return std * torch.randn(shape, generator=generator)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = parameter.shape
            if name.endswith("gamma") or (parameter.ndim == 1 and name.endswith("weight")):
                parameter.copy_(0.7 + 0.6 * torch.rand(shape, generator=generator))
            elif parameter.ndim == 1:
                parameter.copy_(normal(shape, 0.2))
            elif name.endswith(("_embed", "token", "latent")):
                parameter.copy_(normal(shape, 0.5))
            else:
                parameter.copy_(normal(shape, 1.5 * shape[1:].numel() ** -0.5))
    return model


def build(name: str = "vit_tiny_patch16_224", seed: int = 0, **changes: Any) -> nn.Module:
    """A timm model by name, four blocks deep and 48 wide, in evaluation mode and float32."""
    return randomize(timm.create_model(name, **{**SMALL, "img_size": 64, **changes}), seed).eval()


def images(model: nn.Module, batch: int = 2, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random images of the model's own size."""
    return torch.randn(batch, 3, *model.patch_embed.img_size, generator=seeded(seed)).to(dtype)
