"""Encoders of every library: how much faster they are reduced, each against itself, interleaved in one run.

python -m bench.hosts [--models deit-s,vit-s,clip-b32,...] [--methods topk,tome] [--keep-rate 0.5] [--rounds 5]
                      [--threads 2] [--json FILE]

Random weights: they show speed, never quality. Before anything is timed, a keep rate of 1 must give the unreduced
model's output bit for bit. The file is written anew after every model.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastreduce
from fastreduce.integrations.registry import shape_of
from fastreduce.measure import environment, keep_memory, load_average, quartiles, take_turns

__all__ = ["MODELS", "main"]

SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}


def _timm(name: str, **options: Any) -> tuple[nn.Module, Tensor]:
    """Make a model of timm, and 8 images of its size."""
    import timm

    model = timm.create_model(name, **options)
    return model, torch.randn(8, *timm.data.resolve_model_data_config(model)["input_size"])


def _vit_s() -> tuple[nn.Module, Tensor]:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**SMALL)), torch.randn(8, 3, 224, 224)


def _siglip_s() -> tuple[nn.Module, Tensor]:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(**SMALL, image_size=224, patch_size=16, num_hidden_layers=12)
    return SiglipVisionModel(config), torch.randn(8, 3, 224, 224)


def _clip_b32() -> tuple[nn.Module, Tensor]:
    from open_clip.transformer import VisionTransformer

    model = VisionTransformer(
        image_size=224, patch_size=32, width=768, layers=12, heads=12, mlp_ratio=4.0, output_dim=512
    )
    return model, torch.randn(8, 3, 224, 224)


def _videomae_b() -> tuple[nn.Module, Tensor]:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    return VideoMAEForVideoClassification(VideoMAEConfig()), torch.randn(1, 16, 3, 224, 224)


def _ast_b() -> tuple[nn.Module, Tensor]:
    from transformers import ASTConfig, ASTForAudioClassification

    return ASTForAudioClassification(ASTConfig()), torch.randn(1, 1024, 128)


# Name: how it is called in the table, and what makes the model and what it is given.
MODELS: dict[str, tuple[str, Callable[[], tuple[nn.Module, Tensor]]]] = {
    "deit-s": ("timm DeiT-S", functools.partial(_timm, "deit_small_patch16_224")),
    "dinov3-s": ("timm DINOv3-S", functools.partial(_timm, "vit_small_patch16_dinov3")),
    "eva02-s": ("timm EVA-02-S", functools.partial(_timm, "eva02_small_patch14_224")),
    "siglip": (
        "timm SigLIP, width 384",
        functools.partial(_timm, "vit_base_patch16_siglip_224", embed_dim=384, num_heads=6),
    ),
    "vit-s": ("Hugging Face ViT-S", _vit_s),
    "siglip-s": ("Hugging Face SigLIP, width 384", _siglip_s),
    "clip-b32": ("open_clip ViT-B/32", _clip_b32),
    "videomae-b": ("Hugging Face VideoMAE-B", _videomae_b),
    "ast-b": ("Hugging Face AST", _ast_b),
}


def _answer(output: Any) -> Tensor:
    """Return the logits, the pooled token or the embedding."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return output.pooler_output if logits is None else logits


def _check(model: nn.Module, method: str, given: Tensor, before: Tensor) -> None:
    """Raise unless a keep rate of 1 changes nothing."""
    fastreduce.patch(model, method, keep_rate=1)
    if not torch.equal(_answer(model(given)), before):
        raise SystemExit(f"{method} with keep_rate=1 is not the unreduced model: no time is told")
    fastreduce.unpatch(model)


@torch.inference_mode()
def _measure(name: str, methods: list[str], keep_rate: float, rounds: int) -> dict[str, Any]:
    """Time a model unreduced and reduced, in turns."""
    torch.manual_seed(0)
    title, make = MODELS[name]
    model, given = make()
    model.eval()
    before = _answer(model(given))
    models = {"unreduced": model}
    for method in methods:
        _check(model, method, given, before)
        models[method] = fastreduce.patch(copy.deepcopy(model), method, keep_rate=keep_rate)
    calls = {key: (lambda one=one: one(given)) for key, one in models.items()}
    for call in calls.values():
        call()
    seconds = take_turns(calls, given.device, rounds)
    counts = {method: fastreduce.reduced_counts(models[method]) for method in methods}
    speedups = {}
    for method in methods:
        ratios = [a / b for a, b in zip(seconds["unreduced"], seconds[method], strict=True)]
        low, high = quartiles(ratios)
        speedups[method] = {"median": statistics.median(ratios), "low": low, "high": high, "counts": counts[method]}
    return {
        "name": name,
        "title": title,
        "input": list(given.shape),
        "patches": shape_of(model).patches,
        "rounds": rounds,
        "milliseconds": statistics.median(seconds["unreduced"]) * 1e3,
        "methods": speedups,
    }


def _said(row: dict[str, Any]) -> str:
    """Return the line that is printed of a model."""
    line = f"{row['name']:12s} {'x'.join(map(str, row['input'])):>16s} {row['milliseconds']:8.1f} ms"
    for method, one in row["methods"].items():
        line += f"   {method} {one['median']:.2f} ({one['low']:.2f}–{one['high']:.2f})"
    return f"{line}   tokens {next(iter(row['methods'].values()))['counts']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--methods", default="topk,tome")
    parser.add_argument("--keep-rate", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    names, methods = options.models.split(","), options.methods.split(",")
    for name in names:
        if name not in MODELS:
            raise SystemExit(f"--models must be some of {', '.join(MODELS)}, got {name!r}")
    torch.set_num_threads(options.threads)
    keep_memory()
    load = load_average()
    busy = "unknown" if load is None else f"{load:.1f}"
    print(f"times the unreduced model's speed at keep rate {options.keep_rate}, median (quartiles), load {busy}")
    result: dict[str, Any] = {"environment": environment(torch.device("cpu"))}
    result |= {"keep_rate": options.keep_rate, "models": []}
    for name in names:
        row = _measure(name, methods, options.keep_rate, options.rounds)
        print(_said(row), flush=True)
        result["models"].append(row)
        if options.json is not None:
            part = options.json.with_name(f"{options.json.name}.part")  # nobody ever finds half a file
            part.write_text(json.dumps(result, indent=1) + "\n")
            part.replace(options.json)


if __name__ == "__main__":
    main()
