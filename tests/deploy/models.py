"""Tiny models for everything that is exported: an export takes seconds whatever their size."""

import warnings

import torch
from timm.models.vision_transformer import VisionTransformer

import fastreduce

CARRYING = ("topk", "evit", "ats", "tome", "kmedoids")  # whose second stage may see what the first one left
METHODS = {
    "topk": {},
    "evit": {},
    "dynamicvit": {},
    "ats": {"trim": False},
    "tome": {},
    "kmedoids": {},
    "dpcknn": {},
    "sit": {},
    "patchmerger": {},
    "sinkhorn": {"eps": 0.1},
    "radial": {"norm": "l2"},  # another norm is another constant in the same graph
}
# Other options, without a class token or with two prefix tokens: where the graph is another one.
VARIANTS = {
    "tome-exact-registers": {"rounds": "exact", "reg_tokens": 2},
    "kmedoids-members": {"cost": "members"},
    "kmedoids-equal": {"equal_weight": True, "first": 1, "keep": [5]},
    "evit-received": {"class_token": False, "global_pool": "avg"},
}


def build(depth=3, **options):
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=32, depth=depth, num_heads=2, num_classes=7, **options
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def patched(name):
    options = dict({**METHODS, **VARIANTS}[name])
    of_model = {key: options.pop(key) for key in ("reg_tokens", "class_token", "global_pool") if key in options}
    at = (1, 2) if name in CARRYING else (1,)
    if name != "radial" and "keep" not in options:
        options["keep_rate"] = 0.6
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of random weights
        return fastreduce.patch(build(1 + len(at), **of_model), name.split("-")[0], at=at, **options).eval()


def images(batch, seed=5):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
