"""Census of timm's isotropic vision transformers: which can be reduced, and why others cannot: python -m bench.census.

A name counts as isotropic if the model's tokens keep their number and width from block to block: its blocks hold an
attention, stand in one container, and there is one patch embedding. Models are made on the meta device, so that this
takes minutes, not gigabytes. ``--refused`` prints the reason for every name that is refused. ``--kinds`` prints one
name of every structure and how many names share it: the test tries these, two blocks deep.
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
from fastreduce.arguments import counted
from fastreduce.integrations.registry import hosted

__all__ = ["FAMILIES", "census", "isotropic", "kind_of", "kinds", "outcome"]

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


def _make(name: str, depth: int | None) -> Any:
    """Return a model without weights, with so many blocks or its own."""
    with torch.device("meta"):
        if depth is not None:
            try:
                return timm.create_model(name, pretrained=False, depth=depth)
            except AssertionError:  # Sapiens 2 has a setting for each of its blocks
                pass
        return timm.create_model(name, pretrained=False)


def kind_of(name: str) -> tuple[Any, ...]:
    """Return what the reducers look at: classes of model, embedding, blocks and attentions, pooling, prefix."""
    model = _make(name, 2)
    inside = getattr(model, "encoder", model)
    blocks = [(type(block).__name__, type(getattr(block, "attn", None)).__name__) for block in inside.blocks]
    embedding = type(getattr(inside, "patch_embed", None)).__name__
    facts = [getattr(model, fact, None) for fact in ("global_pool", "num_prefix_tokens")]
    token, rope = (getattr(inside, fact, None) is not None for fact in ("cls_token", "rope"))
    return type(model).__name__, type(inside).__name__, embedding, *blocks, *facts, token, rope


def kinds(names: list[str]) -> dict[tuple[Any, ...], list[str]]:
    """Group names by :func:`kind_of`."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for name in names:
        found.setdefault(kind_of(name), []).append(name)
    return found


def outcome(name: str, method: str = "topk", depth: int | None = None) -> str | None:
    """Return why a model cannot be reduced with a method, or None if it can; ``depth`` gives it other than its own."""
    model = _make(name, depth)
    try:
        fastreduce.patch(model, method, keep_rate=0.5, at=None if depth is None else depth - 1)
    except (TypeError, ValueError) as error:
        inner = next(hosted(model), None)
        if inner is None or inner[1] is model:
            return str(error)
        return _inside(inner[1], method, depth)
    return None


def _inside(model: nn.Module, method: str, depth: int | None) -> str | None:
    """Return the same for the model that a refusal points at."""
    try:
        fastreduce.patch(model, method, keep_rate=0.5, at=None if depth is None else depth - 1)
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
    parser.add_argument("--kinds", action="store_true", help="print one name of every structure, and stop")
    arguments = parser.parse_args()
    if arguments.kinds:
        for group in kinds(isotropic(arguments.pattern)).values():
            print(f"{len(group):4}  {min(group, key=len)}")
        return 0
    found = census(isotropic(arguments.pattern))
    counts = {name: checkpoints(name) for name in found}
    reduced = [name for name, reason in found.items() if reason is None]
    share, total = len(reduced) / max(1, len(found)), sum(counts.values())
    kept = sum(counts[name] for name in reduced)
    print(f"timm {timm.__version__}: {len(reduced)} of {counted(len(found), 'name')} ({share:.1%})")
    print(f"{kept} of {counted(total, 'checkpoint')} ({kept / max(1, total):.1%})")
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
