"""Dense features of a reduced model: timm's ``forward_intermediates``, on the full grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...tokens import Tokens
from ..block import reduced_block
from ..registry import host_of
from .grid import feature_size

__all__ = ["ForwardIntermediates"]


def _forward_intermediates(
    model: Any,
    x: Tensor,
    indices: int | Sequence[int] | None = None,
    return_prefix_tokens: bool = False,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
    intermediates_only: bool = False,
    output_dict: bool = False,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Any:
    """Return timm's intermediates on the full grid.

    Every patch shows the token that it is in, a dropped one what it was, or zeros.
    """
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
    if attn_mask is not None or is_causal:
        raise ValueError("a reduced model takes no attn_mask and no is_causal: its tokens are not the input's")
    take, last = feature_take_indices(
        len(model.blocks), indices if indices is None or isinstance(indices, int) else list(indices)
    )
    host: Any = host_of(model)
    prefix, final_norm = host.prefix(model), getattr(model, "norm", None) or nn.Identity()
    state: Tensor | Tokens
    state, beside = host.embed(model, x)
    spatial: list[Tensor] = []
    heads: list[Tensor] = []
    final = None
    for index, block in enumerate(model.blocks):
        if stop_early and index > last:
            break
        reduced = reduced_block(block)
        if reduced is not None:
            final = reduced
            if not isinstance(state, Tokens):
                state = reduced.start(state, whole=True)
        state = _run(block, state, beside[index], host.is_checkpointing(model))
        if index in take:
            if isinstance(state, Tokens):
                full = _full(state, final_norm if norm else None, model.reducers.fill)
            else:
                full = final_norm(state) if norm else state
            heads.append(full[:, :prefix])
            spatial.append(full[:, prefix:])
    if output_fmt == "NCHW":
        rows, columns = feature_size(host.embedding(model), x.shape[-2:])
        spatial = [y.reshape(len(y), rows, columns, -1).permute(0, 3, 1, 2).contiguous() for y in spatial]
    with_prefix = return_prefix_tokens and prefix > 0

    def features() -> Tensor:
        return host.features(
            model, final.finish(state) if final is not None and isinstance(state, Tokens) else state, x
        )

    if output_dict:
        result: dict[str, Any] = {"image_intermediates": spatial}
        if with_prefix:
            result["image_intermediates_prefix"] = heads
        if not intermediates_only:
            result["image_features"] = features()
        return result
    intermediates = list(zip(spatial, heads, strict=True)) if with_prefix else spatial
    return intermediates if intermediates_only else (features(), intermediates)


def _run(block: nn.Module, state: Any, beside: dict[str, Any], checkpoints: bool) -> Any:
    """Call a block, twice where the model checkpoints: the second time in the backward pass."""
    if checkpoints:
        return checkpoint(block, state, use_reentrant=False, **beside)
    return block(state, **beside)


def _full(tokens: Tokens, norm: nn.Module | None, fill: str) -> Tensor:
    """Return (B, prefix + P, C) on the full grid, behind the norm if there is one; zeros stay zeros."""
    if norm is None:
        return tokens.dense(fill)
    return norm(tokens.dense(fill)) if fill == "last" else tokens.replace(norm(tokens.x)).dense(fill)


class ForwardIntermediates:
    """A model's own ``forward_intermediates`` while it is patched; it is copied and pickled with the model."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See timm's ``forward_intermediates``."""
        return _forward_intermediates(self.model, *args, **kwargs)
