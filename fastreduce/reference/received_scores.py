"""Attention that every key receives, summed over heads and queries."""

from __future__ import annotations

import torch
from torch import Tensor

from ._rows import accumulator

__all__ = ["received_scores"]


def received_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """``out[b, n] = sum_h sum_m softmax_n(scale * q[b, h, m] . k[b, h, n])``; one head's matrix in memory at a time.

    q (B, H, M, D), k (B, H, N, D) -> (B, N).
    """
    dtype = accumulator(k.dtype)
    total = torch.zeros(k.shape[0], k.shape[2], dtype=dtype, device=k.device)
    for q_head, k_head in zip(q.unbind(1), k.unbind(1), strict=True):
        logits = q_head.to(dtype) @ k_head.to(dtype).transpose(1, 2)
        total = total + torch.softmax(logits * scale, dim=-1).sum(1)
    return total
