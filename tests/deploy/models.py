"""Tiny models for everything that is exported: an export takes a second, and three more for a hundred nodes."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn.utils.parametrize import register_parametrization

import fastreduce

# Where the stages stand: two in a row where the second one sees what the first one left.
BLOCKS = {"topk": (0, 1), "evit": (0, 1), "ats": (0, 1), "tome": (0, 1), "kmedoids": (1,)}
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
    "kmedoids-stages": {"at": (1, 2)},
    "kmedoids-members": {"cost": "members", "at": (1,)},
    "kmedoids-equal": {"equal_weight": True, "first": 1, "keep": [5]},
    "dpcknn-parametrized": {},
    "evit-received": {"class_token": False, "global_pool": "avg"},
}
# PatchMerger's graph is SiT's with another projection, and a pattern is a selection without scores. EViT's graph has
# Top-K's selection and a fused token, DynamicViT's the same selection of other scores.
_SLOW = ("topk", "dynamicvit", "patchmerger", "radial", *VARIANTS)
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in _SLOW else ()) for name in (*METHODS, *VARIANTS)]


def build(depth=2, **options):
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=32, depth=depth, num_heads=2, num_classes=7, **options
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def patched(name):
    method, options = name.split("-")[0], dict({**METHODS, **VARIANTS}[name])
    of_model = {key: options.pop(key) for key in ("reg_tokens", "class_token", "global_pool") if key in options}
    at = options.pop("at", BLOCKS.get(name, (0,)))
    if name != "radial" and "keep" not in options:
        options["keep_rate"] = 0.6
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of random weights
        model = fastreduce.patch(build(at[-1] + 1, **of_model), method, at=at, **options).eval()
    if name == "dpcknn-parametrized":  # whose scores are made by the layer itself, not in the merge
        register_parametrization(model.reducers.cluster_layers[0].score, "weight", torch.nn.Tanh())
    return model


def images(batch, seed=5):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


_ALONE = """
import sys, torch
package = torch._inductor.aoti_load_package(sys.argv[1])
found = [package(batch) for batch in torch.load(sys.argv[2])]
assert not {"fastreduce", "timm", "transformers"} & set(sys.modules)
torch.save(found, sys.argv[3])
"""


def run_alone(file, batches, folder):
    """Run a ``.pt2`` file on batches of images in a process of torch alone -> its results."""
    given, found = folder / "batches", folder / "results"
    torch.save(batches, given)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", _ALONE, file, given, found]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(found)
