"""Reduce the tokens of a timm Vision Transformer, in place and reversibly. The only module that imports timm."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import timm
import torch
import torch.nn.functional as F
from timm.models import vision_transformer as vit
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..backends import check_backend, resolve
from ..ops.attention import MAX_HEAD_DIM
from ..reducers import ModelShape, Reducer, make_reducer
from ..reducers.base import Norm, is_bare, is_unhooked
from ..reducers.schedule import Keep, KeepRate
from ..tokens import Packing, Plan, Tokens, compose_kept, compose_slots, compose_sources, unmerge

__all__ = [
    "Record",
    "Stage",
    "create_model",
    "input_config",
    "load_official",
    "model_names",
    "patch",
    "record",
    "reduced_counts",
    "unpatch",
]

create_model = timm.create_model
# timm before 1.0.15 has no such switch: there checkpoint_seq was always reentrant.
_reentrant_checkpoints = getattr(timm.layers, "use_reentrant_ckpt", lambda: True)


def model_names() -> list[str]:
    """Names of all models that timm knows, reducible or not."""
    return timm.list_models()


def input_config(model: nn.Module) -> dict[str, Any]:
    """What a model takes: ``input_size`` (3, height, width), ``mean``, ``std``, ``crop_pct`` and ``crop_mode``."""
    return timm.data.resolve_model_data_config(model)


# Our attention reads chosen queries where they are, and gives the class token's scores for one launch instead of two,
# but takes longer a logit than PyTorch's: an estimate from bytes and operations. bench.gpu times both at 197 to 2,049.
MOST_KEYS_BY_OURS = 1024


class _SameGrid:
    """Hook on the patch embedding of a model of any image size: patterns that belong to one grid meet no other."""

    def __init__(self, method: str, grid: tuple[int, int]):
        self.method, self.grid = method, grid

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if (grid := tuple(output.shape[1:3])) != self.grid:  # (B, rows, columns, C)
            raise ValueError(f"the {self.method} patterns were made for a grid of {self.grid}, got {grid}")


def _check_pooling(model: Any, method: str) -> None:
    """Raise unless tokens that do not count can be kept out of the pooling: a mean that no norm comes before."""
    if model.global_pool != "avg" or not isinstance(model.norm, nn.Identity):
        raise ValueError(
            f"{method} keeps another number of tokens in every image, which global_pool={model.global_pool!r} of this "
            "model cannot respect; it can with global_pool='token', or 'avg' with the norm after it (fc_norm=True)"
        )


class ReducedBlock(nn.Module):
    """A timm ``Block`` that takes and gives :class:`~fastreduce.tokens.Tokens`; it shares the block's own submodules.

    The first of them also takes a tensor, and the last gives one, so that ``model.blocks`` keeps its interface however
    it is called: as a whole, one by one, or through timm's ``checkpoint_seq``.
    """

    norm1: nn.Module
    attn: Any  # timm's Attention, whose attributes nn.Module does not type
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module
    _model: Any
    _reducer: Reducer

    def __init__(self, block: vit.Block, index: int, model: Any, reducer: Reducer):
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        self.index = index
        self.training = block.training
        self.has_class_token = model.cls_token is not None
        self.first = index == reducer.first
        self.last = index == len(model.blocks) - 1
        self.stage = reducer.blocks.index(index) if index in reducer.blocks else None
        self.recorder: Record | None = None
        # Not registered: neither may appear a second time in the state dict.
        object.__setattr__(self, "_model", model)
        object.__setattr__(self, "_reducer", reducer)

    @property
    def scale(self) -> float:
        """Factor of the attention logits."""
        return self.attn.scale

    @property
    def commutes(self) -> bool:
        """Whether merging may come before the output projection."""
        dropout = self.training and self.attn.proj_drop.p > 0
        return is_bare(self.attn.proj) and not dropout

    def norm(self, x: Tensor) -> Tensor:
        """The norm before attention."""
        return self.norm1(x)

    def _fusible(self, norm: Any, x: Tensor) -> Norm | None:
        """A norm whose work a kernel can do as it is; half-precision autocast would have it in float32."""
        if resolve(self._reducer.backend, x) == "reference" or torch.is_autocast_enabled(x.device.type):
            return None
        known = type(norm) in (nn.LayerNorm, timm.layers.LayerNorm) and len(norm.normalized_shape) == 1
        if not known or not is_unhooked(norm):
            return None
        return Norm(norm.weight, norm.bias, norm.eps)

    def attention_norm(self, x: Tensor) -> Norm | None:
        """The norm before attention, where a kernel may apply it to what it makes of x."""
        return self._fusible(self.norm1, x)

    def mlp_norm(self, x: Tensor) -> Norm | None:
        """The norm before the MLP, likewise."""
        return self._fusible(self.norm2, x)

    def _heads(self, projected: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, N, parts * H * D) -> ``parts`` views of (B, H, N, D)."""
        batch, tokens, width = projected.shape
        heads = self.attn.num_heads
        return projected.view(batch, tokens, parts, heads, width // (parts * heads)).permute(2, 0, 3, 1, 4).unbind(0)

    def _project(self, normed: Tensor, start: int, stop: int) -> tuple[Tensor, ...]:
        """Thirds ``start`` to ``stop`` of the packed query, key, value projection."""
        qkv = self.attn.qkv
        if not is_bare(qkv):  # somebody's adapter or quantised layer: call it whole
            return self._heads(qkv(normed), 3)[start:stop]
        width = qkv.out_features // 3
        rows = slice(start * width, stop * width)
        bias = None if qkv.bias is None else qkv.bias[rows]
        return self._heads(F.linear(normed, qkv.weight[rows], bias), stop - start)

    def _linear(self, layer: nn.Module, x: Tensor, packing: Packing | None) -> Tensor:
        """A layer; where kernels run, one that is a linear map passes over the room behind packed tokens."""
        if packing is None or resolve(self._reducer.backend, x) == "reference" or not is_bare(layer):
            return layer(x)
        weight: Any = layer.weight
        if weight.dtype != x.dtype or torch.is_autocast_enabled(x.device.type):
            return layer(x)
        bias: Any = layer.bias
        return ops.linear_packed(x, weight, bias, packing.offsets, backend=self._reducer.backend)

    def query_key_value(self, normed: Tensor, packing: Packing | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) -> three of (B, H, N, D)."""
        q, k, v = self._heads(self._linear(self.attn.qkv, normed, packing), 3)
        return self.attn.q_norm(q), self.attn.k_norm(k), v

    def query(self, normed: Tensor) -> Tensor:
        """(B, M, C) -> (B, H, M, D)."""
        return self.attn.q_norm(self._project(normed, 0, 1)[0])

    def key_value(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, C) -> two of (B, H, N, D)."""
        k, v = self._project(normed, 1, 3)
        return self.attn.k_norm(k), v

    def early_query_key_value(self, normed: Tensor, packing: Packing | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """All three from one product where a launch costs more than a few rows of it, else no query without need."""
        fewer_launches = resolve(self._reducer.backend, normed) == "triton"
        if fewer_launches or not self.has_class_token or not is_bare(self.attn.qkv):
            return self.query_key_value(normed, packing)
        first = normed[:, :1] if packing is None else normed.index_select(1, packing.offsets[:-1])
        return self.query(first), *self.key_value(normed)

    def attend_kept(self, q: Tensor, k: Tensor, v: Tensor, normed: Tensor, kept: Tensor, keys: Tokens) -> Tensor:
        """Attention of the prefix and of the kept patch tokens -> (B, prefix + M, H * D)."""
        backend, rows = self._reducer.backend, None
        late = q.shape[2] < normed.shape[1]
        if late or getattr(self.attn, "gate", None) is not None:
            rows = ops.gather_tokens(normed, kept, prefix=keys.prefix, backend=backend)
        if late:
            assert rows is not None
            q = self.query(rows)
        elif self._has_kernel(q, keys) and (keys.bias is not None or k.shape[2] <= MOST_KEYS_BY_OURS):
            out = ops.attention(
                q, k, v, bias=keys.bias, index=kept, prefix=keys.prefix, scale=self.scale, backend=backend
            )
            return self._attended(out, rows)
        else:
            packed = q.transpose(1, 2).flatten(2)  # (B, N, H * D), a view
            picked = ops.gather_tokens(packed, kept, prefix=keys.prefix, backend=backend)
            q = picked.unflatten(2, q.shape[1::2]).transpose(1, 2)
        return self.attention(q, k, v, rows, keys)

    def attend_packed(
        self, q: Tensor, k: Tensor, v: Tensor, normed: Tensor, kept: Tensor, keys: Tokens, queries: Packing, rows: int
    ) -> Tensor:
        """Attention of the prefix and of the kept patch tokens, packed -> (1, rows, H * D)."""
        assert keys.packing is not None
        picked, offsets = None, (keys.packing.offsets, queries.offsets)
        late = q.shape[2] < normed.shape[1]
        if late or getattr(self.attn, "gate", None) is not None:
            picked = ops.gather_packed(
                normed, kept, offsets, num_out=rows, prefix=keys.prefix, backend=self._reducer.backend
            )
        if late:
            assert picked is not None
            return self.attention(self.query(picked), k, v, picked, keys, queries)
        chosen: dict[str, Any] = {"index": kept, "prefix": keys.prefix, "num_out": rows}
        return self._attended(self._packed_attention(q, k, v, keys.packing, queries, **chosen), picked)

    def _is_plain(self, keys: Tokens) -> bool:
        """Whether attention is a softmax over the keys with at most a bias: our own cannot drop weights."""
        dropout = self.training and self.attn.attn_drop.p > 0
        return keys.packing is None and keys.policy is None and not dropout

    def _has_kernel(self, q: Tensor, keys: Tokens) -> bool:
        """Whether plain attention can run on our own kernel."""
        fits = resolve(self._reducer.backend, q) == "triton" and q.shape[3] <= MAX_HEAD_DIM
        return fits and self._is_plain(keys)

    def _bias(self, q: Tensor, keys: Tokens) -> Tensor | None:
        """(B, 1, 1, N) what is added to the logits of every key."""
        if keys.bias is None:
            return None
        # Half precision would round log 98 by a hundredth; on the CPU SDPA takes a float32 bias beside half inputs.
        dtype = q.dtype if q.is_cuda else torch.promote_types(q.dtype, keys.bias.dtype)
        return keys.bias[:, None, None, :].to(dtype)

    def _packed_attention(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Packing, queries: Packing, **chosen: Any
    ) -> Tensor:
        """Every query, or the chosen ones, over the keys of its own image -> (1, H, T, D)."""
        return ops.attention(
            q,
            k,
            v,
            # A view: torch.compile lets no autograd.Function take one tensor twice.
            offsets=(queries.offsets, keys.offsets.view(-1)),
            longest=(queries.longest, keys.longest),
            scale=self.scale,
            backend=self._reducer.backend,
            **chosen,
        )

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, normed: Tensor | None, keys: Tokens, queries: Packing | None = None
    ) -> Tensor:
        """Attention of M queries over N keys, timm's optional norm and gate -> (B, M, H * D).

        Of packed keys the queries are packed too: as ``queries`` says, or as the keys.
        """
        attn = self.attn
        dropout = attn.attn_drop.p if self.training else 0.0
        if keys.packing is not None:
            out = self._packed_attention(q, k, v, keys.packing, queries or keys.packing)
        elif keys.policy is not None:
            out = ops.attention(q, k, v, policy=keys.policy, scale=attn.scale, backend=self._reducer.backend)
        elif keys.bias is not None and self._has_kernel(q, keys):  # SDPA's fastest kernels take no bias
            out = ops.attention(q, k, v, bias=keys.bias, scale=attn.scale, backend=self._reducer.backend)
        elif attn.fused_attn:
            bias = self._bias(q, keys)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=attn.scale)
        else:
            logits = (q * attn.scale) @ k.transpose(-2, -1)
            if (bias := self._bias(q, keys)) is not None:
                logits = logits + bias
            out = attn.attn_drop(logits.softmax(dim=-1).to(v.dtype)) @ v
        return self._attended(out, normed)

    def attention_and_class(
        self, q: Tensor, k: Tensor, v: Tensor, normed: Tensor | None, keys: Tokens
    ) -> tuple[Tensor, Tensor]:
        """:meth:`attention`, and (B, N - prefix) the class token's, from the same pass where that is cheaper."""
        options: dict[str, Any] = {"prefix": keys.prefix, "scale": self.scale, "backend": self._reducer.backend}
        if self._has_kernel(q, keys) and k.shape[2] <= MOST_KEYS_BY_OURS:
            out, scores = ops.attention_scores(q, k, v, kind="class", bias=keys.bias, **options)
            return self._attended(out, normed), scores
        assert keys.bias is None  # cls_scores has none
        return self.attention(q, k, v, normed, keys), ops.cls_scores(q[:, :, 0], k, **options)

    def attention_and_received(
        self, q: Tensor, k: Tensor, v: Tensor, normed: Tensor | None, keys: Tokens, *, differentiable: bool
    ) -> tuple[Tensor, Tensor]:
        """:meth:`attention`, and (B, N) what every key got, from the same pass where that is cheaper."""
        options: dict[str, Any] = {"scale": self.scale, "backend": self._reducer.backend}
        # The CPU computes the matrix once, a head at a time, with a gradient as without; for long inputs not at all.
        on_cpu = not q.is_cuda and k.shape[2] <= MOST_KEYS_BY_OURS and self._is_plain(keys)
        if on_cpu or self._has_kernel(q, keys):
            out, received = ops.attention_scores(q, k, v, kind="received", bias=keys.bias, **options)
            return self._attended(out, normed), received if differentiable else received.detach()
        assert keys.bias is None  # received_scores has none
        scored = (q, k) if differentiable else (q.detach(), k.detach())
        return self.attention(q, k, v, normed, keys), ops.received_scores(*scored, **options)

    def _attended(self, out: Tensor, normed: Tensor | None) -> Tensor:
        """(B, H, M, D) -> (B, M, H * D), through timm's optional norm and gate."""
        attn, out = self.attn, out.transpose(1, 2).flatten(2)
        if (norm := getattr(attn, "norm", None)) is not None:
            out = norm(out)
        if (gate := getattr(attn, "gate", None)) is not None:
            out = out * gate(normed).sigmoid()
        return out

    @property
    def drops_paths(self) -> bool:
        """Whether drop path is active."""
        return self.training and getattr(self.drop_path1, "drop_prob", 0.0) > 0

    @property
    def branch_bias(self) -> Tensor | None:
        """What becomes of the projection's bias."""
        bias = self.attn.proj.bias
        return None if bias is None else self.drop_path1(self.ls1(self.attn.proj_drop(bias)))

    def _drop_path(self, drop_path: nn.Module, x: Tensor, packing: Packing | None) -> Tensor:
        """Drop path leaves whole images out; of packed tokens the rows of these, by the same draw."""
        if packing is None or not drop_path.training or not getattr(drop_path, "drop_prob", 0.0):
            return drop_path(x)
        scale = drop_path(x.new_ones(packing.batch, 1, 1))
        return x * packing.spread(scale[:, 0], x.shape[1])

    def branch(self, attended: Tensor, packing: Packing | None = None) -> Tensor:
        """Output projection, dropout, layer scale and drop path: (B, M, H * D) -> (B, M, C)."""
        projected = self.ls1(self.attn.proj_drop(self._linear(self.attn.proj, attended, packing)))
        return self._drop_path(self.drop_path1, projected, packing)

    def _mlp(self, x: Tensor, packing: Packing | None) -> Tensor:
        """The MLP; of packed tokens timm's own in its two products."""
        mlp: Any = self.mlp
        known = type(mlp) is vit.Mlp and is_unhooked(mlp)
        if packing is None or not known or resolve(self._reducer.backend, x) == "reference":
            return mlp(x)
        hidden = mlp.norm(mlp.drop1(mlp.act(self._linear(mlp.fc1, x, packing))))
        return mlp.drop2(self._linear(mlp.fc2, hidden, packing))

    def step(self, tokens: Tokens) -> Tokens:
        """One block: reduction, attention, MLP."""
        if self.stage is None:
            tokens = self._reducer.attend_between(self, tokens)
        else:
            entered = tokens
            tokens = self._reducer.before(self, tokens, self.stage)
            tokens = self._reducer.attend(self, tokens, self.stage)
            if self.recorder is not None:
                self.recorder._add(entered, tokens)
        x, packing = tokens.x, tokens.packing
        normed = self.norm2(x) if tokens.normed is None else tokens.normed
        made = self.ls2(self._mlp(normed, packing))
        return tokens.replace(x + self._drop_path(self.drop_path2, made, packing))

    def start(self, x: Tensor | Tokens) -> Tokens:
        """Take what the block before gave."""
        if self._model.grad_checkpointing and self.training and self._reducer.generator is not None:
            raise ValueError(
                f"gradient checkpointing runs blocks twice, and {self._reducer.name} would draw other noise from its "
                "own generator the second time: use torch's global one, which checkpointing restores, or no noise"
            )
        if self._reducer.packed and self.training and self.attn.attn_drop.p > 0:
            raise ValueError(
                f"packed tokens cannot be trained with attention dropout, and block {self.index} has "
                f"attn_drop={self.attn.attn_drop.p}: patch the model with packed=False"
            )
        if isinstance(x, Tokens):
            return x
        if not self.first:
            raise TypeError(
                f"block {self.index} of a reduced model takes fastreduce.Tokens, as block {self.index - 1} gives them, "
                f"got {type(x).__name__}"
            )
        made_for, grid = self._reducer.grid, tuple(self._model.patch_embed.grid_size)
        if made_for not in (None, grid):
            raise ValueError(f"the {self._reducer.name} patterns were made for a grid of {made_for}, got {grid}")
        prefix = self._model.num_prefix_tokens
        return Tokens(x, prefix=prefix, patches=x.shape[1] - prefix)

    def finish(self, tokens: Tokens) -> Tensor:
        """What ``model.norm`` and the pooling get. Where pooling looks at patches, each patch counts once."""
        tokens = tokens.unpacked(backend=self._reducer.backend)
        if self._model.global_pool in ("", "token"):
            return tokens.x
        if any(plan.slot is not None for plan in tokens.plans):
            return tokens.dense(backend=self._reducer.backend)
        present = tokens.valid if tokens.policy is None else tokens.policy
        if present is None:
            return tokens.x
        _check_pooling(self._model, self._reducer.name)
        # The pooling divides by the number of rows: scaled rows make that the mean over those that count.
        outside = 0 if getattr(self._model, "pool_include_prefix", False) else tokens.prefix
        counted = present[:, outside:].to(tokens.x.dtype)
        scale = counted * (counted.shape[1] / counted.sum(1, keepdim=True))
        return tokens.x * F.pad(scale, (outside, 0), value=1.0).unsqueeze(-1)

    def forward(self, x: Tensor | Tokens, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor | Tokens:
        """Tokens to Tokens; the first reduced block also takes a tensor (B, N, C), the last block returns one."""
        if attn_mask is not None or is_causal:
            raise ValueError("a reduced model takes no attn_mask and no is_causal: its tokens are not the input's")
        if self._model.grad_checkpointing and _reentrant_checkpoints():
            raise ValueError(
                "timm's reentrant gradient checkpointing would lose the gradients of a reduced model: "
                "call timm.layers.set_reentrant_ckpt(False) first (timm 1.0.15 or newer)"
            )
        tokens = self.step(self.start(x))
        return self.finish(tokens) if self.last else tokens


class ReducedBlocks(nn.Sequential):
    """Stands in for ``model.blocks``, with the same child names; keeps the original for :func:`unpatch`."""

    _original: nn.Sequential
    _reducer: Reducer

    def _attach(self, original: nn.Sequential, reducer: Reducer) -> ReducedBlocks:
        object.__setattr__(self, "_original", original)
        object.__setattr__(self, "_reducer", reducer)
        return self

    def __getitem__(self, index: Any) -> Any:
        """One block. A slice would lose what :func:`unpatch` needs, and its last block would hand on Tokens."""
        if isinstance(index, slice):
            raise TypeError("the blocks of a reduced model cannot be sliced; call fastreduce.unpatch(model) first")
        return super().__getitem__(index)


def _reduced_blocks(model: Any, reducer: Reducer) -> ReducedBlocks:
    blocks = [
        block if index < reducer.first else ReducedBlock(block, index, model, reducer)
        for index, block in enumerate(model.blocks)
    ]
    return ReducedBlocks(*blocks)._attach(model.blocks, reducer)


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
    backend = model.blocks._reducer.backend
    state: Tensor | Tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    spatial: list[Tensor] = []
    heads: list[Tensor] = []
    final: Tensor | None = None

    def run(function: Callable[[Any], Any], value: Any) -> Any:
        return checkpoint(function, value, use_reentrant=False) if model.grad_checkpointing else function(value)

    for index, block in enumerate(model.blocks):
        if stop_early and index > last:
            break
        if isinstance(block, ReducedBlock):
            tokens = run(block.step, block.start(state))
            state, final = tokens, block.finish(tokens)
        else:
            final = run(block, state)
            state = final
        if index in take:
            if isinstance(state, Tokens):
                normed = state.replace(model.norm(state.x)) if norm else state
                full = normed.dense(backend=backend)
            else:
                full = model.norm(state) if norm else state
            heads.append(full[:, :prefix])
            spatial.append(full[:, prefix:])
    if output_fmt == "NCHW":
        rows, columns = model.patch_embed.dynamic_feat_size((height, width))
        spatial = [y.reshape(len(y), rows, columns, -1).permute(0, 3, 1, 2).contiguous() for y in spatial]
    with_prefix = return_prefix_tokens and prefix > 0
    if output_dict:
        result: dict[str, Any] = {"image_intermediates": spatial}
        if with_prefix:
            result["image_intermediates_prefix"] = heads
        if not intermediates_only:
            result["image_features"] = model.norm(final)
        return result
    intermediates = list(zip(spatial, heads, strict=True)) if with_prefix else spatial
    return intermediates if intermediates_only else (model.norm(final), intermediates)


class _ForwardIntermediates:
    """A model's own ``forward_intermediates`` while it is patched; copies and pickles with the model."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _forward_intermediates(self.model, *args, **kwargs)


_REASONS = {
    "Eva": "its attention uses rotary positions, which would be attached to the wrong tokens",
    "VisionTransformerRelPos": "its attention uses relative positions, which need the full grid",
    "Beit": "its attention uses relative positions, which need the full grid",
    "SwinTransformer": "its windows need the full grid",
    "SwinTransformerV2": "its windows need the full grid",
}


def _check_model(model: Any) -> None:
    """Raise, with the reason, unless every part that a reducer relies on is the one it knows."""
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise ValueError("the model is compiled already: call fastreduce.patch first and torch.compile after it")
    name = type(model).__name__
    if not isinstance(model, vit.VisionTransformer):
        reason = _REASONS.get(name, "it is not a timm VisionTransformer")
        raise TypeError(f"{name} cannot be reduced: {reason}")
    if type(model).forward_features is not vit.VisionTransformer.forward_features:
        raise TypeError(f"{name} cannot be reduced: it has a forward_features of its own")
    if isinstance(model.blocks, ReducedBlocks):
        raise ValueError(
            f"the model is already patched with {model.blocks._reducer.name!r}; call fastreduce.unpatch(model) first"
        )
    for index, block in enumerate(model.blocks):
        if type(block) is not vit.Block:
            raise TypeError(f"{name} cannot be reduced: block {index} is a {type(block).__name__}, not a timm Block")
        if type(block.attn) is not vit.Attention:
            raise TypeError(
                f"{name} cannot be reduced: block {index} has a {type(block.attn).__name__} attention, "
                "of which the reducers do not know whether it depends on positions"
            )


def _check_bare(module: nn.Module, name: str) -> None:
    """Raise if somebody changed what calling a module does: a reduced block does not call it, so that would be lost."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise ValueError(
            f"{name} has hooks or a forward of its own, which a reduced model would not call: "
            "remove them, or register hooks after patching"
        )


def _reduced(model: nn.Module) -> ReducedBlocks:
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, ReducedBlocks):
        raise ValueError("the model is not patched; call fastreduce.patch first")
    return blocks


def _shape_of(model: Any) -> ModelShape:
    return ModelShape(
        depth=len(model.blocks),
        grid=tuple(model.patch_embed.grid_size),
        prefix=model.num_prefix_tokens,
        has_class_token=model.cls_token is not None,
        channels=model.embed_dim,
    )


Model = TypeVar("Model", bound=nn.Module)


def patch(
    model: Model,
    method: str,
    *,
    keep_rate: KeepRate = None,
    keep: Keep = None,
    at: int | Sequence[int] | None = None,
    backend: str = "auto",
    **options: Any,
) -> Model:
    """Reduce the tokens of a timm Vision Transformer, in place.

    Weights, checkpoint keys and the calling interface stay as they are; :func:`unpatch` undoes it.

    Args:
        model: a timm ``VisionTransformer`` (DeiT, AugReg, DeiT-III, DINOv2, CLIP, SigLIP, ...).
        method: ``"topk"``, ``"evit"``, ``"dynamicvit"``, ``"ats"``, ``"tome"``, ``"kmedoids"``, ``"dpcknn"``,
            ``"sit"``, ``"patchmerger"``, ``"sinkhorn"`` or ``"radial"``. DynamicViT, DPC-KNN, SiT, PatchMerger and
            Sinkhorn add parameters, under ``model.reducers``, which have to be trained (or loaded:
            :func:`load_official`).
        keep_rate: a rate r: stage i keeps ``int(patches * r ** (i + 1))`` tokens; or a sequence of absolute fractions,
            one for each stage. In (0, 1]. The default is 0.7 (none for radial, whose default schedule is contiguous).
        keep: instead, the numbers of patch tokens kept, one for each stage.
        at: blocks at which the stages stand, from 0; the default is a quarter, half and three quarters of the depth.
        backend: ``"auto"`` (Triton on CUDA, the PyTorch reference elsewhere), ``"triton"`` or ``"reference"``.
        **options: the method's own. ``evit``: ``normalize``. ``dynamicvit``: ``generator``. ``ats``: ``trim``,
            ``packed`` (no padding between images), ``points``. ``tome``: ``r``, ``rounds``, ``prop_attn``.
            ``kmedoids``: ``iters``, ``cost``, ``equal_weight``, ``first``. ``dpcknn``: ``k_neighbors``,
            ``equal_weight``, ``noise``. ``patchmerger``: ``scaled``. ``sinkhorn``: ``eps``, ``iters``, ``gradient``.
            ``radial``: ``norm``, ``schedule``, ``min_radius``. See the classes in :mod:`fastreduce.reducers`.

    Returns:
        The model itself.

    Raises:
        ValueError: unknown method, values out of range, a model that is patched or compiled already, or whose blocks
            have hooks that would no longer be called.
        TypeError: a model that cannot be reduced (the message says why), unknown options, values of the wrong kind.
            Whatever is raised, the model is as it was.

    Notes:
        Models without a class token (SigLIP) are scored by the attention that a token receives, averaged over heads and
        queries, where the others use the attention of the class token. Scores are those before attention dropout.
    """
    check_backend(backend)
    _check_model(model)
    shape = _shape_of(model)
    reducer = make_reducer(method, shape, at=at, keep_rate=keep_rate, keep=keep, backend=backend, **options)
    method = reducer.name
    if reducer.grid is not None and not isinstance(model.patch_drop, nn.Identity):
        raise ValueError(f"{method} patterns need every patch in its place, but the model has a patch_drop_rate")
    if reducer.ragged and model.global_pool not in ("", "token"):
        _check_pooling(model, method)
    blocks: Any = model.blocks
    for index in range(reducer.first, len(blocks)):
        _check_bare(blocks[index], f"block {index}")
        _check_bare(blocks[index].attn, f"the attention of block {index}")
    weight = next(model.parameters())
    reducer.to(weight.device, weight.dtype).train(model.training)
    reducer.warn(shape)
    if reducer.grid is not None and model.dynamic_img_size:
        embed: Any = model.patch_embed
        embed.register_forward_hook(_SameGrid(method, reducer.grid))
    model.blocks = _reduced_blocks(model, reducer)
    object.__setattr__(model, "forward_intermediates", _ForwardIntermediates(model))
    model.reducers = reducer
    return model


def unpatch(model: Model) -> Model:
    """Undo :func:`patch`: the model gets its very own blocks back. Returns the model.

    Raises:
        ValueError: if the model is not patched.
    """
    blocks = _reduced(model)
    if isinstance(model, torch._dynamo.OptimizedModule):
        unpatch(model._orig_mod)
        return model
    original = blocks._original
    for block, reduced in zip(original, blocks, strict=True):
        if isinstance(reduced, ReducedBlock):
            for name, child in reduced.named_children():  # whatever was replaced meanwhile stays replaced
                setattr(block, name, child)
            block.training = reduced.training
    original.training = blocks.training
    embed: Any = model.patch_embed
    hooks = embed._forward_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, _SameGrid)]:
        del hooks[key]
    model.blocks = original
    object.__delattr__(model, "forward_intermediates")
    if hasattr(model, "reducers"):
        del model.reducers
    return model


def reduced_counts(model: nn.Module) -> list[int]:
    """Patch tokens after each stage of a patched model, at its own image size."""
    return _reduced(model)._reducer.counts(_shape_of(model))


class Stage:
    """What one stage did with one batch. Indices never count the prefix tokens (class, distillation, registers).

    Attributes:
        block: index of the transformer block.
        num_in: patch tokens before, ``num_out`` after the stage.
        kept: (B, num_out) index of the input token that each output token is (K-Medoids, DPC-KNN: its centre), -1 for
            EViT's fused one and for ATS's padding; None for ToMe and soft merges.
        kept_patches: (B, num_out) the same in original patches; None after a merge.
        sources: (B, num_out) of a soft merge, the original patch that weighs most in each output token; of the other
            methods as ``kept_patches``.
        slot: (B, num_in) output token that each input token went into, -1 for dropped ones; of a soft merge the one
            that it weighs most in.
        patch_slot: (B, P) output token that each original patch is in, -1 for dropped ones.
        sizes: (B, num_out) how many original patches each output token stands for.
        fused: whether the last output token is made of all that were not kept (EViT).
        merges: whether ``slot`` says what was merged (ToMe, K-Medoids, DPC-KNN).
        weights: (B, num_in, num_out) float32, the weight of each input token in each output token of a soft merge, made
            when it is asked for; None for the other methods.
    """

    def __init__(self, plans: Sequence[Plan], batch: int, prefix: int):
        self._plans, self._prefix = tuple(plans), prefix
        plan = plans[-1]
        self.block, self.num_in, self.num_out = plan.block, plan.num_in, plan.num_out
        kept = plan.kept_indices(batch)
        self.kept = None if kept is None else kept.clone()  # not a view of radial's own pattern
        self.kept_patches = compose_kept(plans, batch)
        self.sources = compose_sources(plans, batch)
        self.fused = plan.fused
        self.merges = plan.slot is not None
        self.slot = plan.slots(batch)
        self.patch_slot = compose_slots(plans, batch)
        counts = torch.zeros(batch, self.num_out + 1, dtype=torch.int64, device=self.slot.device)
        ones = torch.ones_like(self.patch_slot)
        self.sizes = counts.scatter_add(1, self.patch_slot + 1, ones)[:, 1:]

    @property
    def weights(self) -> Tensor | None:
        """See the class."""
        weights = self._plans[-1].weights
        return None if weights is None else weights.log().exp()

    def unmerge(self, features: Tensor) -> Tensor:
        """Bring this stage's features to the full grid: (B, num_out, C) -> (B, P, C), zeros where a patch was dropped.

        (B, prefix + num_out, C) works too and keeps its prefix: (B, prefix + P, C).
        """
        rows = features.shape[1]
        if rows not in (self.num_out, self.num_out + self._prefix):
            raise ValueError(
                f"features must have {self.num_out} tokens (or {self.num_out + self._prefix} with the prefix), "
                f"got {rows}"
            )
        return unmerge(features, self._plans, rows - self.num_out)


class Record:
    """What the latest forward pass inside :func:`record` did.

    Attributes:
        stages: every stage that reduced something, in order.
        decisions: (B, P) each, the keep decisions of DynamicViT's stages in training, 1 for kept, differentiable.
    """

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.decisions: list[Tensor] = []

    def _add(self, entered: Tokens, left: Tokens) -> None:
        if torch._C._current_graph_task_id() != -1:  # gradient checkpointing runs the block again
            return
        if not entered.plans and not entered.decisions:
            self.stages, self.decisions = [], []
        self.decisions.extend(left.decisions[len(entered.decisions) :])
        if len(left.plans) > len(entered.plans):
            self.stages.append(Stage(left.plans, left.batch, left.prefix))


@contextmanager
def record(model: nn.Module) -> Iterator[Record]:
    """Record what a patched model keeps and merges.

    Example::

        with fastreduce.record(model) as seen:
            model(images)
        seen.stages[0].kept_patches      # (B, num_out)

    A stage that reduces nothing (keep rate 1) leaves no entry.

    Raises:
        ValueError: if the model is not patched.
    """
    reduced = [block for block in _reduced(model) if isinstance(block, ReducedBlock)]
    outer = reduced[0].recorder
    recorder = Record()
    for block in reduced:
        block.recorder = recorder
    try:
        yield recorder
    finally:
        for block in reduced:
            block.recorder = outer


def official_state(weights: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Any]:
    """What :func:`load_official` reads, under the names that it has here: a method's own layers under ``reducers.``."""
    state: Mapping[str, Any] = read_weights(weights) if isinstance(weights, (str, os.PathLike)) else weights
    for wrapper in ("model", "state_dict", "model_ema"):
        if wrapper in state and isinstance(state[wrapper], Mapping):
            state = state[wrapper]
            break
    own = ("score_predictor.", "cluster_layers.")
    keys = {key: key.removeprefix("module.") for key in state}
    return {f"reducers.{new}" if new.startswith(own) else new: state[key] for key, new in keys.items()}


def load_official(model: Model, weights: Mapping[str, Any] | str | os.PathLike[str]) -> Model:
    """Load weights of the paper's released code (TokenReduction, timm 0.4.12 names) into a patched or plain timm model.

    Args:
        model: a timm Vision Transformer of the checkpoint's geometry; for a method with layers of its own
            (``score_predictor.*``, ``cluster_layers.*``) patched with that method.
        weights: a state dict, a ``.safetensors`` file, or a ``torch.save`` file (read with ``weights_only=True``).
            A dict that holds it under ``"model"``, ``"state_dict"`` or ``"model_ema"``, and keys with a ``module.``
            prefix, are understood.

    Returns:
        The model itself.

    Raises:
        ValueError: keys or shapes that do not fit; the message names them and the model is as it was.
    """
    state = official_state(weights)
    own = model.state_dict()
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    for key in own:
        found = state.get(key, own[key])
        if not isinstance(found, Tensor):
            problems.append(f"{key} is a {type(found).__name__}, not a tensor")
        elif found.shape != own[key].shape:
            problems.append(f"{key} is {tuple(found.shape)}, the model needs {tuple(own[key].shape)}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"the checkpoint does not fit {type(model).__name__}: {'; '.join(problems[:5])}{more}")
    model.load_state_dict(state)
    return model


def read_weights(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a ``.safetensors`` file, or a pickled checkpoint with ``weights_only=True``.

    Raises:
        ValueError: if the file cannot be read as either; OSError if it cannot be opened.
    """
    path = os.fspath(path)
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read with weights_only=True: {error}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state dict")
    return dict(state)
