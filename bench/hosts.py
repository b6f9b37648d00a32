"""Encoders of other libraries: how much faster they are reduced, each against itself, interleaved in one run.

python -m bench.hosts [--models vit-s,clip-b32,...] [--methods topk,tome] [--keep-rate 0.5] [--rounds 5] [--threads 2]

Random weights: they show speed, never quality. Before anything is timed, a keep rate of 1 must give the unreduced
model's output bit for bit.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastreduce
from fastreduce.measure import keep_memory, load_average, quartiles, take_turns

__all__ = ["MODELS", "main"]

SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}


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


# Name: what makes the model and what it is given.
MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "vit-s": _vit_s,
    "siglip-s": _siglip_s,
    "clip-b32": _clip_b32,
    "videomae-b": _videomae_b,
    "ast-b": _ast_b,
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
def _measure(name: str, methods: list[str], keep_rate: float, rounds: int) -> None:
    torch.manual_seed(0)
    model, given = MODELS[name]()
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
    counts = fastreduce.reduced_counts(models[methods[0]])
    plain = statistics.median(seconds["unreduced"]) * 1e3
    line = f"{name:12s} {'x'.join(map(str, given.shape)):>16s} {plain:8.1f} ms"
    for method in methods:
        ratios = [a / b for a, b in zip(seconds["unreduced"], seconds[method], strict=True)]
        low, high = quartiles(ratios)
        line += f"   {method} {statistics.median(ratios):.2f} ({low:.2f}–{high:.2f})"
    print(f"{line}   tokens {counts}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--methods", default="topk,tome")
    parser.add_argument("--keep-rate", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_memory()
    load = load_average()
    busy = "unknown" if load is None else f"{load:.1f}"
    print(f"times the unreduced model's speed at keep rate {options.keep_rate}, median (quartiles), load {busy}")
    for name in options.models.split(","):
        if name not in MODELS:
            raise SystemExit(f"--models must be some of {', '.join(MODELS)}, got {name!r}")
        _measure(name, options.methods.split(","), options.keep_rate, options.rounds)


if __name__ == "__main__":
    main()
