"""Dense features of a reduced model: timm's ``forward_intermediates``, on the full grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...tokens import Tokens
from .block import reduced_block

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
    """As timm's, on the full grid: every patch shows the token that it is in, dropped patches zeros."""
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
    if attn_mask is not None or is_causal:
        raise ValueError("a reduced model takes no attn_mask and no is_causal: its tokens are not the input's")
    take, last = feature_take_indices(
        len(model.blocks), indices if indices is None or isinstance(indices, int) else list(indices)
    )
    height, width = x.shape[-2:]
    prefix = model.num_prefix_tokens
    state: Tensor | Tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    spatial: list[Tensor] = []
    heads: list[Tensor] = []

    def run(function: Callable[[Any], Any], value: Any) -> Any:
        return checkpoint(function, value, use_reentrant=False) if model.grad_checkpointing else function(value)

    final = None
    for index, block in enumerate(model.blocks):
        if stop_early and index > last:
            break
        reduced = reduced_block(block)
        if reduced is not None:
            final = reduced
            if not isinstance(state, Tokens):
                state = reduced.start(state, whole=True)
        state = run(block, state)
        if index in take:
            if isinstance(state, Tokens):
                normed = state.replace(model.norm(state.x)) if norm else state
                full = normed.dense()
            else:
                full = model.norm(state) if norm else state
            heads.append(full[:, :prefix])
            spatial.append(full[:, prefix:])
    if output_fmt == "NCHW":
        rows, columns = model.patch_embed.dynamic_feat_size((height, width))
        spatial = [y.reshape(len(y), rows, columns, -1).permute(0, 3, 1, 2).contiguous() for y in spatial]
    with_prefix = return_prefix_tokens and prefix > 0

    def features() -> Tensor:
        return model.norm(final.finish(state) if final is not None and isinstance(state, Tokens) else state)

    if output_dict:
        result: dict[str, Any] = {"image_intermediates": spatial}
        if with_prefix:
            result["image_intermediates_prefix"] = heads
        if not intermediates_only:
            result["image_features"] = features()
        return result
    intermediates = list(zip(spatial, heads, strict=True)) if with_prefix else spatial
    return intermediates if intermediates_only else (features(), intermediates)


class ForwardIntermediates:
    """A model's own ``forward_intermediates`` while it is patched; it is copied and pickled with the model."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See timm's ``forward_intermediates``."""
        return _forward_intermediates(self.model, *args, **kwargs)
