"""Operators that a piece of code calls, counted."""

from __future__ import annotations

import collections
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["VIEWS", "OperatorCounts"]

# Operators that only look at their input in another way, or reserve memory.
# fmt: off
VIEWS = frozenset((
    "alias", "as_strided", "chunk", "detach", "empty", "empty_like", "empty_strided", "expand", "is_same_size",
    "lift_fresh", "movedim", "narrow", "new_empty", "new_empty_strided", "permute", "promote_types", "select",
    "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze",
    "view", "view_as", "_reshape_alias", "_unsafe_view",
))
# fmt: on


class OperatorCounts(TorchDispatchMode):
    """Operators called within the block, views left out, by name; one of ours counts once, whatever it launches."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.split("::")[1]
        if name not in VIEWS:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))
