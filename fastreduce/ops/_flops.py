"""Counts of ``FlopCounterMode`` for an operator: the matrix products of its reference, whatever the backend.

Only Top-K and ATS differ: with kernels the queries of all tokens are projected at once, on the CPU only the queries of
kept tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from .._flops import count_fused_attention

__all__ = ["count_by_reference"]

# Operators that repeat the products of another operator, where the reference reads the matrix that it still has.
_COUNTED_BEFORE = frozenset({"attention_scores"})


def _without_content(value: Any) -> Any:
    return value.detach().to("meta") if isinstance(value, Tensor) else value


def _products(reference: Callable[..., Any], args: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        reference(*args)
    return counter.get_total_flops()


def count_by_reference(name: str, reference: Callable[..., Any]) -> None:
    """Count an operator by the products of its reference, so that both backends count alike.

    The reference runs on tensors without content; if it has to read some (packed images), on the real arguments.
    An operator whose products were counted with another one adds none.

    Args:
        name: name of the operator in ``torch.ops.fastreduce``.
        reference: function that takes the operator's arguments.
    """

    def formula(*args: Any, out_val: Any = None) -> int:
        if name in _COUNTED_BEFORE:
            return 0
        try:
            return _products(reference, tree_map(_without_content, args))
        except (RuntimeError, NotImplementedError):
            return _products(reference, args)

    register_flop_formula(getattr(torch.ops.fastreduce, name), get_raw=True)(formula)


count_fused_attention()
