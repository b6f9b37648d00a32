"""Tiny timm models with random weights under which tokens differ enough for every decision to be a clear one."""

import copy
from typing import Any

import timm
import torch
from torch import Tensor, nn

import fastreduce
from fastreduce.plain import PlainModel

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
    "dynamicvit": {"method": "dynamicvit"},
    "ats": {"method": "ats"},
    "kmedoids": {"method": "kmedoids"},
    "kmedoids-members": {"method": "kmedoids", "cost": "members"},
    "kmedoids-equal": {"method": "kmedoids", "equal_weight": True, "first": 1},
    "dpcknn": {"method": "dpcknn"},
    "dpcknn-equal": {"method": "dpcknn", "equal_weight": True, "k_neighbors": 3},
    "sit": {"method": "sit"},
    "patchmerger": {"method": "patchmerger"},
    "patchmerger-scaled": {"method": "patchmerger", "scaled": True},
    "sinkhorn": {"method": "sinkhorn", "eps": 0.1},
    "sinkhorn-exact": {"method": "sinkhorn", "gradient": "exact"},
}
# What changes the model even at a keep rate of 1: ATS samples, the soft methods mix.
NEVER_IDLE = ("ats", "sit", "patchmerger", "sinkhorn")


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a model weights that no block leaves idle: LayerScale, biases, class token and positions all matter."""
    generator = _seeded(seed)

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


def reduced_and_plain(model: nn.Module, **arguments: Any) -> tuple[Any, PlainModel]:
    """Patch the model in place, and copy it with the method done plainly; both share random layers."""
    copied = copy.deepcopy(model)
    fastreduce.patch(model, **arguments)
    layers = {}
    if hasattr(model, "reducers"):
        layers = dict(randomize(model.reducers, seed=7).named_parameters())
    return model, PlainModel(copied, layers=layers, **arguments)


def can_sample(model: nn.Module) -> bool:
    """Return whether ATS can be used: it needs a class token, and a pooling that can leave padding out."""
    plain_mean = model.global_pool == "avg" and isinstance(model.norm, nn.Identity)
    return model.cls_token is not None and (model.global_pool in ("", "token") or plain_mean)


def build(name: str = "vit_tiny_patch16_224", seed: int = 0, **changes: Any) -> nn.Module:
    """Return a timm model by name, four blocks deep and 48 wide, in evaluation mode and float32."""
    return randomize(timm.create_model(name, **{**SMALL, "img_size": 64, **changes}), seed).eval()


def images(model: nn.Module, batch: int = 2, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw random images of the model's own size."""
    return torch.randn(batch, 3, *model.patch_embed.img_size, generator=_seeded(seed)).to(dtype)
