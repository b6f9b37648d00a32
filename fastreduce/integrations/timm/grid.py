"""The patch grid of the pass at hand, for methods whose decision depends on where a patch is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...arguments import counted

__all__ = ["feature_size", "forget_grid", "grid_of", "watch_grid"]


def feature_size(embedding: Any, size: Sequence[int]) -> tuple[int, int]:
    """Return (rows, columns) that a patch embedding makes of images of (height, width)."""
    known = getattr(embedding, "dynamic_feat_size", None)
    if known is not None:
        return known(tuple(size))
    height, width = embedding.patch_size
    return size[0] // height, size[1] // width


class _Grid:
    """A forward hook on a patch embedding that keeps the grid which the latest images came to."""

    def __init__(self) -> None:
        self.grid: tuple[int, int] | None = None

    def __call__(self, module: Any, inputs: Any, output: Tensor) -> None:
        if not isinstance(output, torch.fx.Proxy):  # of which the blocks say that they cannot be traced
            self.grid = feature_size(module, inputs[0].shape[-2:])


def watch_grid(embedding: Any) -> None:
    """Keep the grid of every pass from now on."""
    embedding.register_forward_hook(_Grid())


def forget_grid(embedding: Any) -> None:
    """Undo :func:`watch_grid`."""
    hooks = embedding._forward_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Grid)]:
        del hooks[key]


def grid_of(embedding: Any, patches: int) -> tuple[int, int]:
    """Return (rows, columns) of the pass at hand, which has so many patches.

    Raises:
        ValueError: if the patch embedding is not the one that was there when the model was patched, or is not called.
    """
    for hook in embedding._forward_hooks.values():
        if isinstance(hook, _Grid):
            for grid in (hook.grid, tuple(getattr(embedding, "grid_size", None) or ())):
                if grid and grid[0] * grid[1] == patches:
                    return grid
    raise ValueError(
        f"the grid of {counted(patches, 'patch')} is not known, since model.patch_embed was replaced after patching or "
        "did not make them: call fastreduce.unpatch and fastreduce.patch again"
    )
