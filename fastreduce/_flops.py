"""Formulas of ``FlopCounterMode`` for what torch's own table leaves out."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

__all__ = ["count_fused_attention"]


def count_fused_attention() -> None:
    """Have the fused attention of the CPU counted too, which torch's table of formulas leaves out.

    A model's attention would be missing on the CPU alone. Where torch has a formula, it stays.
    """
    aten = torch.ops.aten
    for name, formula in (("", _attention_products), ("_backward", _attention_backward_products)):
        packet = getattr(aten, f"_scaled_dot_product_flash_attention_for_cpu{name}", None)
        if packet is not None and packet not in flop_registry:
            register_flop_formula(packet)(formula)


def _attention_products(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **others: Any) -> int:
    """Count two products: queries (B, H, M, D) with keys (B, H, N, D), and weights with values (B, H, N, E)."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def _attention_backward_products(grad: Any, query: Any, key: Any, value: Any, *args: Any, **others: Any) -> int:
    """Count five products: the weights once more, and the gradients of weights, values, queries and keys."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (3 * width + 2 * value[3])
