"""Which of timm's isotropic vision transformers can be reduced, and why the rest cannot: python -m bench.census.

A name counts as isotropic if the model's tokens keep their number and width from block to block: its blocks hold an
attention, stand in one container, and there is one patch embedding. Models are made on the meta device, so that this
takes minutes, not gigabytes. ``--refused`` prints the reason for every name that is refused.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections import Counter
from typing import Any

import timm
import torch
from torch import nn

import fastreduce
from fastreduce.integrations.registry import hosted

__all__ = ["FAMILIES", "census", "isotropic", "outcome"]

# Modules of timm.models whose models are plain stacks of transformer blocks over patches of one grid.
FAMILIES = (
    *("vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos", "vision_transformer_sam", "deit"),
    *("eva", "beit", "naflexvit", "qwen3_vit", "deepseek_vit", "gemma4_vit", "cait", "convit"),
)


def isotropic(pattern: str = "*") -> list[str]:
    """Return the names of timm's isotropic vision transformers that match a pattern, sorted."""
    names = [name for family in FAMILIES for name in timm.list_models(module=family)]
    return sorted(name for name in set(names) if fnmatch.fnmatch(name, pattern))


def checkpoints(name: str) -> int:
    """Return how many pretrained checkpoints timm has under a name."""
    return len(timm.list_pretrained(f"{name}.*")) + (name in timm.list_pretrained(name))


def outcome(name: str, method: str = "topk") -> str | None:
    """Return why a model cannot be reduced with a method, or None if it can."""
    with torch.device("meta"):
        model: Any = timm.create_model(name, pretrained=False)
    try:
        fastreduce.patch(model, method, keep_rate=0.5)
    except (TypeError, ValueError) as error:
        inner = next(hosted(model), None)
        if inner is None or inner[1] is model:
            return str(error)
        return _inside(inner[1], method)
    return None


def _inside(model: nn.Module, method: str) -> str | None:
    """Return the same for the model that a refusal points at."""
    try:
        fastreduce.patch(model, method, keep_rate=0.5)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def census(names: list[str]) -> dict[str, str | None]:
    """Return why each model is refused, None for those that can be reduced."""
    return {name: outcome(name) for name in names}


def main() -> int:
    """Print the census."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pattern", default="*", help="names to try, with * and ?")
    parser.add_argument("--refused", action="store_true", help="print every refusal")
    arguments = parser.parse_args()
    found = census(isotropic(arguments.pattern))
    counts = {name: checkpoints(name) for name in found}
    reduced = [name for name, reason in found.items() if reason is None]
    share, total = len(reduced) / max(1, len(found)), sum(counts.values())
    kept = sum(counts[name] for name in reduced)
    print(f"timm {timm.__version__}: {len(reduced)} of {len(found)} names ({share:.1%})")
    print(f"{kept} of {total} checkpoints ({kept / max(1, total):.1%})")
    reasons = Counter(reason.partition(": ")[2] for reason in found.values() if reason is not None)
    for reason, count in reasons.most_common():
        print(f"{count:4}  {reason}")
    if arguments.refused:
        for name, reason in found.items():
            if reason is not None:
                print(f"{name}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
