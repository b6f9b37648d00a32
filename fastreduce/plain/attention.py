"""Attention with its whole matrix, as the released code has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .walk import Walk, rotated

__all__ = ["PlainAttention"]


class PlainAttention(nn.Module):
    """A model, its method's options and schedule, and the attention of its blocks."""

    model: Any
    method: str
    at: tuple[int, ...]
    keep_rate: float | Sequence[float] | None
    keep: Sequence[int] | None
    options: dict[str, Any]
    layers: dict[str, Tensor]
    prefix: int
    late_class: bool  # CaiT's class token comes behind the blocks

    def _layer(self, stage: int, name: str) -> Tensor:
        return self.layers[f"{'score_predictor' if self.method == 'dynamicvit' else 'cluster_layers'}.{stage}.{name}"]

    def _count(self, stage: int, patches: int) -> int:
        """Patch tokens that a stage keeps."""
        if self.keep is not None:
            return self.keep[stage]
        rate: Any = self.keep_rate
        # Of a small image at least one stays.
        return max(1, int(patches * (rate ** (stage + 1) if isinstance(rate, (int, float)) else rate[stage])))

    def _move_home(self, walk: Walk, slot: Tensor) -> None:
        """Let every patch be in the token that its own went into, slot (B, tokens before)."""
        walk.home = slot if walk.home is None else slot.gather(1, walk.home)

    def _share_out(self, walk: Walk, weights: Tensor) -> None:
        """Let every token's patches be in the new ones in proportion to its weights, (B, tokens before, tokens)."""
        self._move_home(walk, weights.argmax(dim=2))
        shares = (weights / weights.sum(dim=2, keepdim=True)).detach()
        mass = shares.new_ones(shares.shape[:2]) if walk.mass is None else walk.mass
        walk.mass = torch.einsum("bn,bnk->bk", mass, shares)

    def _normed(self, block: Any, x: Tensor) -> Tensor:
        """Return what attention gets of (B, N, C): blocks with their norms behind them take the tokens as they are."""
        return x if self._is_post_norm(block) else block.norm1(x)

    def _is_post_norm(self, block: Any) -> bool:
        return type(block).__name__ in ("ResPostBlock", "EvaBlockPostNorm")

    def _query_key_value(self, block: Any, walk: Walk, normed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Project (B, N, C) to queries, keys, values and what ToMe compares, (B, H, N, D) each."""
        attn = block.attn
        batch, tokens, _ = normed.shape
        if getattr(attn, "qkv", None) is None:
            parts = [layer(normed) for layer in (attn.q_proj, attn.k_proj, attn.v_proj)]
            q, k, v = (part.reshape(batch, tokens, -1, attn.head_dim).transpose(1, 2) for part in parts)
        else:
            made = attn.qkv(normed)
            if getattr(attn, "q_bias", None) is not None:
                made = made + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
            q, k, v = made.reshape(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if hasattr(attn, "sub_norm"):  # the two maps of a head are heads of their own here
            q, k = (one.unflatten(3, (2, -1)).transpose(2, 3).flatten(1, 2) for one in (q, k))
            v = v.repeat_interleave(2, dim=1)
        if hasattr(attn, "proj_l"):
            return q, k, v, k
        q, k = attn.q_norm(q), attn.k_norm(k)
        metric = k
        if walk.tables is not None and walk.place is not None:
            table = walk.tables[[one is block for one in self.model.blocks].index(True)]
            half = getattr(attn, "rotate_half", False)
            q, k = (rotated(one, table, walk.place, self.prefix, half) for one in (q, k))
            if self.options.get("metric") == "after":
                metric = k
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return q, k, v, metric

    def _weights(self, block: Any, walk: Walk, q: Tensor, k: Tensor) -> Tensor:
        """Return the attention matrix (B, H, N, N), before dropout."""
        logits = (q @ k.transpose(-2, -1)) * block.attn.scale
        if hasattr(block.attn, "proj_l"):
            logits = torch.einsum("hg,bgmn->bhmn", block.attn.proj_l.weight, logits)
            logits = logits + block.attn.proj_l.bias[:, None, None]
        if walk.size is not None and self.options["prop_attn"]:
            logits = logits + walk.size.log()[:, None, None, :]
        if walk.valid is not None:
            seen = walk.valid[:, None, :, None] & walk.valid[:, None, None, :]
            logits = logits.masked_fill(~seen, -torch.finfo(logits.dtype).max)
        if self.method != "dynamicvit" or not self.training:
            return logits.softmax(dim=-1)
        tokens = q.shape[2]
        policy = F.pad(walk.decisions[-1], (self.prefix, 0), value=1.0) if walk.decisions else q.new_ones(1, tokens)
        policy = policy.to(torch.promote_types(q.dtype, torch.float32))[:, None, None, :]
        seen = policy + (1 - policy) * torch.eye(tokens, dtype=policy.dtype, device=q.device)
        logits = logits.to(policy.dtype)
        grown = (logits - logits.amax(dim=-1, keepdim=True)).exp() * seen
        return (grown + 1e-6 / tokens) / (grown.sum(dim=-1, keepdim=True) + 1e-6)

    def _project(self, block: Any, out: Tensor, normed: Tensor) -> Tensor:
        """Project attention's result (B, H, M, D) to (B, M, C), ready to be added."""
        attn = block.attn
        if hasattr(attn, "sub_norm"):
            first, second = out[:, ::2], out[:, 1::2]
            out = attn.sub_norm(first - attn._compute_lambda() * second) * (1 - attn.lambda_init)
        out = out.transpose(1, 2).flatten(2)
        if getattr(attn, "norm", None) is not None:
            out = attn.norm(out)
        if getattr(attn, "gate", None) is not None:
            out = out * attn.gate(normed).sigmoid()
        return self._branch(block, attn.proj_drop(attn.proj(out)))

    def _branch(self, block: Any, out: Tensor) -> Tensor:
        """Return what is added to the tokens, for what the attention gives, (B, M, C)."""
        if self._is_post_norm(block):
            out = block.norm1(out)
        elif getattr(block, "gamma_1", None) is not None:
            out = block.gamma_1 * out
        drop = block.drop_path1 if hasattr(block, "drop_path1") else block.drop_path
        return drop(block.ls1(out) if hasattr(block, "ls1") else out)

    def _mlp(self, block: Any, x: Tensor) -> Tensor:
        """Return what the MLP adds to (B, N, C)."""
        if self._is_post_norm(block):
            return block.drop_path2(block.norm2(block.mlp(x)))
        made = block.mlp(block.norm2(x))
        if getattr(block, "gamma_2", None) is not None:
            made = block.gamma_2 * made
        drop = block.drop_path2 if hasattr(block, "drop_path2") else block.drop_path
        return drop(block.ls2(made) if hasattr(block, "ls2") else made)

    def _attention(self, block: Any, walk: Walk) -> Tensor:
        """Compute ``x + proj(softmax(q k^T + log size) v)``, keep the matrix, and return what ToMe compares."""
        attn, normed = block.attn, self._normed(block, walk.x)
        q, k, v, metric = self._query_key_value(block, walk, normed)
        weights = self._weights(block, walk, q, k)
        walk.matrix = weights if self.method == "dynamicvit" else attn.attn_drop(weights)
        mixed = walk.matrix
        if hasattr(attn, "proj_w"):
            each = attn.proj_w.bias[:, None, None]  # what every key gets, a merged one for each of its tokens
            if walk.size is not None and self.options["prop_attn"]:
                each = each * walk.size[:, None, None, :]
            mixed = torch.einsum("hg,bgmn->bhmn", attn.proj_w.weight, mixed) + each
        out = mixed.to(v.dtype) @ v
        walk.x = walk.x + self._project(block, out, normed)
        return metric
