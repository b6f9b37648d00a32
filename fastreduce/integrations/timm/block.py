"""A timm block that reduces tokens: it shares everything with the block that it stands for, and calls its parts."""

from __future__ import annotations

import dataclasses
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import vision_transformer as vit
from torch import Tensor, nn

from ...backends import resolve
from ...ops import unchecked as ops
from ...ops.attention import MAX_HEAD_DIM
from ...recording import note
from ...reducers import ModelShape, Reducer
from ...reducers.base import Norm, is_bare, is_unhooked
from ...tokens import Packing, Tokens
from .grid import grid_of

__all__ = ["ReducedBlock", "Site", "check_block", "check_pooling", "reduced_block", "shape_of"]

# timm before 1.0.15 has no such switch: there checkpoint_seq was always reentrant.
_reentrant_checkpoints = getattr(timm.layers, "use_reentrant_ckpt", lambda: True)

# Our attention reads chosen queries where they are, and gives the class token's scores for one launch instead of two,
# but takes longer a logit than PyTorch's: an estimate from bytes and operations. bench.gpu times both at 197 to 2,049.
MOST_KEYS_BY_OURS = 1024

# Layers that treat every row alike and on its own: rows may be chosen before them instead of behind them. Whatever else
# stands in a block is called as the block calls it, on all rows.
_NORMS = tuple(
    getattr(timm.layers, name)
    for name in ("LayerNorm", "LayerNormFp32", "RmsNorm", "RmsNormFp32", "SimpleNorm")
    if hasattr(timm.layers, name)
)
_ROW_BY_ROW = (nn.Identity, nn.Linear, nn.Dropout, nn.LayerNorm, vit.LayerScale, timm.layers.DropPath, *_NORMS)


_NO_BACKWARD_HOOKS = (
    "backward hooks, which torch calls for tensors only, and the blocks of a reduced model hand on fastreduce.Tokens: "
    "register them on its parts (norm1, mlp, ...)"
)


def shape_of(model: Any) -> ModelShape:
    """Return what a reducer may know of a model."""
    return ModelShape(
        depth=len(model.blocks),
        grid=tuple(model.patch_embed.grid_size),
        prefix=model.num_prefix_tokens,
        has_class_token=model.cls_token is not None,
        channels=model.embed_dim,
    )


def _is_row_by_row(module: nn.Module | None) -> bool:
    """Whether a part of a block treats every row alike and nothing was hung on it."""
    return module is None or (type(module) in _ROW_BY_ROW and is_unhooked(module))


def _is_timms(module: nn.Module, known: type) -> bool:
    """Whether a module is of a class of timm's, whose forward nobody has replaced."""
    return type(module) is known and known.forward.__module__.startswith("timm.")


def _strange_attention(attn: nn.Module) -> str | None:
    """Say why the parts of an attention cannot stand for its forward, or None if they can."""
    if type(attn) is not vit.Attention:
        return f"is a {type(attn).__name__}, of which the reducers do not know whether it depends on positions"
    own = "forward" in attn.__dict__ or not _is_timms(attn, vit.Attention)
    return "has a forward of its own, which would not be called" if own else None


class _InParts(vit.Attention):
    """The attention of a block with all its hooks, done in parts: it lives for one call and shares the state."""

    __slots__ = ("block", "heads", "tokens")

    block: ReducedBlock  # type: ignore[assignment]
    heads: tuple[Tensor, Tensor, Tensor]
    tokens: Tokens

    def forward(self, normed: Tensor) -> Tensor:  # type: ignore[override]
        """(B, N, C) -> (B, N, C), as the attention itself; queries, keys and values are kept in ``heads``."""
        block, tokens = self.block, self.tokens
        heads = block._query_key_value(normed, tokens.packing)
        object.__setattr__(self, "heads", heads)
        return block._projected(block.attention(*heads, normed, tokens), tokens.packing)


def check_block(block: nn.Module, index: int, model: str, *, opened: bool) -> None:
    """Raise, with the reason, if a block cannot be reduced; ``opened``: its attention will be done in parts."""
    if type(block) is not vit.Block:
        raise TypeError(f"{model} cannot be reduced: block {index} is a {type(block).__name__}, not a timm Block")
    if type(block.attn) is not vit.Attention:
        raise TypeError(
            f"{model} cannot be reduced: block {index} has a {type(block.attn).__name__} attention, "
            "of which the reducers do not know whether it depends on positions"
        )
    strange = _strange_attention(block.attn) if opened else None
    if strange:
        raise ValueError(f"block {index} is to be reduced in its attention, but that {strange}")
    if not _is_timms(block, vit.Block) or "forward" in block.__dict__:
        raise ValueError(f"block {index} has a forward of its own, which a reduced block would not call")
    if block._backward_hooks or block._backward_pre_hooks:
        raise ValueError(f"block {index} has {_NO_BACKWARD_HOOKS}")


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a reduced block stands.

    Attributes:
        index: number of the block, from 0.
        stage: number of the stage that stands in it, or None.
        model: the model that was patched; its ``reducers`` are what runs.
        original: the block that stood here before.
    """

    index: int
    stage: int | None
    model: Any
    original: vit.Block


class ReducedBlock(vit.Block):
    """A timm ``Block`` that takes and gives :class:`~fastreduce.tokens.Tokens`.

    Its parts, parameters, buffers, hooks and attributes are those of the block that it stands for, in the very same
    dictionaries: what is replaced or registered on either is so on both. The first reduced block of a model also takes
    a tensor, and the last gives one, so that ``model.blocks`` keeps its interface however it is called: as a whole, one
    by one, or through timm's ``checkpoint_seq``.
    """

    attn: Any  # timm's Attention, whose attributes nn.Module does not type
    _site: Site

    def __init__(self, block: vit.Block, site: Site):
        self.__dict__.update(block.__dict__)
        object.__setattr__(self, "_site", site)

    def move_to(self, model: Any) -> None:
        """Belong to another model from now on, a replica of the one before."""
        object.__setattr__(self, "_site", dataclasses.replace(self._site, model=model))

    def restored(self) -> vit.Block:
        """Return the block that stood here before, with what was set on this one since."""
        original = self._site.original
        original.__dict__.update({name: value for name, value in self.__dict__.items() if name != "_site"})
        return original

    @property
    def index(self) -> int:
        """Number of the block, from 0."""
        return self._site.index

    @property
    def _reducer(self) -> Reducer:
        return self._site.model.reducers

    @property
    def has_class_token(self) -> bool:
        """Whether the first token is a class token."""
        return self._site.model.cls_token is not None

    @property
    def scale(self) -> float:
        """Factor of the attention logits."""
        return self.attn.scale

    def extra_repr(self) -> str:
        """Say what reduces here."""
        site, reducer = self._site, self._reducer
        if site.stage is None:
            return f"tokens of {reducer.name}"
        shape = shape_of(site.model)
        counts = [shape.patches, *reducer.counts(shape)]
        return f"stage {site.stage} of {reducer.name}: {counts[site.stage]} -> {counts[site.stage + 1]} patch tokens"

    # ---- what may be done in another order

    @property
    def rowwise(self) -> bool:
        """Whether what comes between attention and residual treats every row alike: then a selection may come first."""
        attn = self.attn
        tail = (getattr(attn, "norm", None), getattr(attn, "gate", None), attn.proj, attn.proj_drop)
        return not self.hooked and all(_is_row_by_row(part) for part in (*tail, self.ls1, self.drop_path1))

    @property
    def hooked(self) -> bool:
        """Whether something hangs on the attention, which then has to be called."""
        attn = self.attn
        return bool(attn._forward_hooks or attn._forward_pre_hooks or attn._backward_hooks or attn._backward_pre_hooks)

    @property
    def commutes(self) -> bool:
        """Whether the branch is linear in each row now: then a merge may come before it."""
        attn, drop = self.attn, self.attn.proj_drop
        idle = type(drop) is nn.Identity or (type(drop) is nn.Dropout and (drop.p == 0 or not drop.training))
        linear = idle and is_unhooked(drop) and is_bare(attn.proj)
        scaled = type(self.ls1) in (nn.Identity, vit.LayerScale) and is_unhooked(self.ls1)
        path = type(self.drop_path1) in (nn.Identity, timm.layers.DropPath) and is_unhooked(self.drop_path1)
        return linear and scaled and path and not self.hooked

    @property
    def drops_paths(self) -> bool:
        """Whether drop path is active."""
        return self.drop_path1.training and getattr(self.drop_path1, "drop_prob", 0.0) > 0

    @property
    def branch_bias(self) -> Tensor | None:
        """Return what becomes of the projection's bias where the branch commutes."""
        bias = self.attn.proj.bias
        return None if bias is None else self.drop_path1(self.ls1(self.attn.proj_drop(bias)))

    @property
    def weight_dropout(self) -> float | None:
        """Probability that attention drops a weight now; None where a module of the user's has to see the weights."""
        attn, drop = self.attn, self.attn.attn_drop
        if attn.fused_attn:  # timm reads the number, and does not call the module
            return getattr(drop, "p", 0.0) if attn.training else 0.0
        idle = type(drop) is nn.Identity or (type(drop) is nn.Dropout and (drop.p == 0 or not drop.training))
        return 0.0 if idle and is_unhooked(drop) else None

    # ---- norms

    def norm(self, x: Tensor) -> Tensor:
        """The norm before attention."""
        return self.norm1(x)

    def _fusible(self, norm: Any, tokens: Tokens) -> Norm | None:
        """A norm whose work a kernel can do as it is; half-precision autocast would have it in float32."""
        if tokens.backend == "reference" or torch.is_autocast_enabled(tokens.x.device.type):
            return None
        known = type(norm) in (nn.LayerNorm, timm.layers.LayerNorm) and len(norm.normalized_shape) == 1
        if not known or not is_unhooked(norm):
            return None
        return Norm(norm.weight, norm.bias, norm.eps)

    def attention_norm(self, tokens: Tokens) -> Norm | None:
        """The norm before attention, where a kernel may apply it to what it makes of the tokens."""
        return self._fusible(self.norm1, tokens)

    def mlp_norm(self, tokens: Tokens) -> Norm | None:
        """The norm before the MLP, likewise."""
        return self._fusible(self.norm2, tokens)

    # ---- queries, keys, values

    def _heads(self, projected: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, N, parts * H * D) -> ``parts`` views of (B, H, N, D)."""
        batch, tokens, width = projected.shape
        heads = self.attn.num_heads
        return projected.view(batch, tokens, parts, heads, width // (parts * heads)).permute(2, 0, 3, 1, 4).unbind(0)

    def _project(self, normed: Tensor, start: int, stop: int) -> tuple[Tensor, ...]:
        """Thirds ``start`` to ``stop`` of the packed query, key, value projection, which is bare."""
        qkv = self.attn.qkv
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
        return ops.linear_packed(x, weight, bias, packing.offsets, backend="triton")

    def query_key_value(self, normed: Tensor, packing: Packing | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) -> three of (B, H, N, D)."""
        self._check_attention()
        return self._query_key_value(normed, packing)

    def _query_key_value(self, normed: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._heads(self._linear(self.attn.qkv, normed, packing), 3)
        return self.attn.q_norm(q), self.attn.k_norm(k), v

    def query(self, normed: Tensor) -> Tensor:
        """(B, M, C) -> (B, H, M, D)."""
        return self.attn.q_norm(self._project(normed, 0, 1)[0])

    def early_query_key_value(self, normed: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """All three from one product where a launch costs more than a few rows of it, else no query without need."""
        self._check_attention()
        attn = self.attn
        packing, fewer_launches = tokens.packing, tokens.backend == "triton"
        splits = is_bare(attn.qkv) and _is_row_by_row(attn.q_norm)
        if fewer_launches or not self.has_class_token or not splits:
            return self.query_key_value(normed, packing)
        first = normed[:, :1] if packing is None else normed.index_select(1, packing.offsets[:-1])
        k, v = self._project(normed, 1, 3)
        return self.query(first), attn.k_norm(k), v

    # ---- attention

    def whole_branch(self, normed: Tensor, tokens: Tokens) -> Tensor:
        """Return what attention adds to every token, (B, N, C), by calling the module itself wherever that gives it."""
        if tokens.packing is None and tokens.policy is None and tokens.bias is None:
            return self.drop_path1(self.ls1(self.attn(normed)))
        return self.heads_and_branch(normed, tokens)[1]

    def heads_and_branch(self, normed: Tensor, tokens: Tokens) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Return query, key and value of every token, three of (B, H, N, D), and what attention adds to each."""
        if not self.hooked:
            heads = self.query_key_value(normed, tokens.packing)
            return heads, self.branch(self.attention(*heads, normed, tokens), tokens.packing)
        self._check_attention()
        called = object.__new__(_InParts)
        for name, value in (("__dict__", self.attn.__dict__), ("block", self), ("tokens", tokens)):
            object.__setattr__(called, name, value)
        projected = called(normed)
        return called.heads, self._drop_path(self.drop_path1, self.ls1(projected), tokens.packing)

    def _check_attention(self) -> None:
        """Raise where somebody changed, since the model was patched, what calling the attention does."""
        if strange := _strange_attention(self.attn):
            raise ValueError(
                f"{self._reducer.name} does the attention of block {self.index} in parts, but it {strange}"
            )

    def attend_kept(self, q: Tensor, k: Tensor, v: Tensor, normed: Tensor, kept: Tensor, keys: Tokens) -> Tensor:
        """Attention of the prefix and of the kept patch tokens -> (B, prefix + M, H * D)."""
        backend, rows = keys.backend, None
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
            picked = ops.gather_packed(normed, kept, offsets, num_out=rows, prefix=keys.prefix, backend=keys.backend)
        if late:
            assert picked is not None
            return self.attention(self.query(picked), k, v, picked, keys, queries)
        chosen: dict[str, Any] = {"index": kept, "prefix": keys.prefix, "num_out": rows}
        return self._attended(self._packed_attention(q, k, v, keys.packing, queries, **chosen), picked)

    def _is_plain(self, keys: Tokens) -> bool:
        """Whether attention is a softmax over the keys with at most a bias: our own cannot drop weights."""
        return keys.packing is None and keys.policy is None and self.weight_dropout == 0.0

    def _has_kernel(self, q: Tensor, keys: Tokens) -> bool:
        """Whether plain attention can run on our own kernel."""
        fits = keys.backend == "triton" and q.shape[3] <= MAX_HEAD_DIM
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
        return ops.attention_packed(
            q,
            k,
            v,
            # A view: torch.compile lets no autograd.Function take one tensor twice.
            offsets=(queries.offsets, keys.offsets.view(-1)),
            longest=(queries.longest, keys.longest),
            scale=self.scale,
            backend=resolve(self._reducer.backend, q),
            **chosen,
        )

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, normed: Tensor | None, keys: Tokens, queries: Packing | None = None
    ) -> Tensor:
        """Attention of M queries over N keys, timm's optional norm and gate -> (B, M, H * D).

        Of packed keys the queries are packed too: as ``queries`` says, or as the keys.
        """
        attn = self.attn
        if keys.packing is not None:
            out = self._packed_attention(q, k, v, keys.packing, queries or keys.packing)
        elif keys.policy is not None:
            if self.weight_dropout is None:
                raise ValueError(
                    f"{self._reducer.name} masks attention in training, whose weights the attn_drop of block "
                    f"{self.index} ({type(attn.attn_drop).__name__}) would not see"
                )
            out = ops.attention_policy(q, k, v, keys.policy, scale=attn.scale, backend=keys.backend)
        elif keys.bias is not None and self._has_kernel(q, keys):  # SDPA's fastest kernels take no bias
            out = ops.attention(q, k, v, bias=keys.bias, scale=attn.scale, backend=keys.backend)
        elif attn.fused_attn:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=self._bias(q, keys), dropout_p=self.weight_dropout or 0.0, scale=attn.scale
            )
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
        options: dict[str, Any] = {"prefix": keys.prefix, "scale": self.scale, "backend": keys.backend}
        if self._has_kernel(q, keys) and k.shape[2] <= MOST_KEYS_BY_OURS:
            out, scores = ops.attention_cls_scores(q, k, v, bias=keys.bias, **options)
            return self._attended(out, normed), scores
        assert keys.bias is None  # cls_scores has none
        return self.attention(q, k, v, normed, keys), ops.cls_scores(q[:, :, 0], k, **options)

    def attention_and_received(
        self, q: Tensor, k: Tensor, v: Tensor, normed: Tensor | None, keys: Tokens, *, differentiable: bool
    ) -> tuple[Tensor, Tensor]:
        """:meth:`attention`, and (B, N) what every key got, from the same pass where that is cheaper."""
        options: dict[str, Any] = {"scale": self.scale, "backend": keys.backend}
        # The CPU computes the matrix once, a head at a time, with a gradient as without; for long inputs not at all.
        on_cpu = not q.is_cuda and k.shape[2] <= MOST_KEYS_BY_OURS and self._is_plain(keys)
        if on_cpu or self._has_kernel(q, keys):
            out, received = ops.attention_received_scores(q, k, v, bias=keys.bias, **options)
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

    # ---- branches

    def _drop_path(self, drop_path: nn.Module, x: Tensor, packing: Packing | None) -> Tensor:
        """Drop path leaves whole images out; of packed tokens the rows of these, by the same draw."""
        if packing is None or type(drop_path) is nn.Identity:
            return drop_path(x)
        if type(drop_path) is not timm.layers.DropPath:
            raise ValueError(
                f"packed tokens lie in one row, of which the {type(drop_path).__name__} in block {self.index} cannot "
                "know the images: patch the model with packed=False"
            )
        scale = drop_path(x.new_ones(packing.batch, 1, 1))
        return x * packing.spread(scale[:, 0], x.shape[1]) if drop_path.training else x

    def branch(self, attended: Tensor, packing: Packing | None = None) -> Tensor:
        """Output projection, dropout, layer scale and drop path: (B, M, H * D) -> (B, M, C)."""
        return self._drop_path(self.drop_path1, self.ls1(self._projected(attended, packing)), packing)

    def _projected(self, attended: Tensor, packing: Packing | None) -> Tensor:
        return self.attn.proj_drop(self._linear(self.attn.proj, attended, packing))

    def _mlp(self, x: Tensor, packing: Packing | None) -> Tensor:
        """The MLP; of packed tokens timm's own in its two products."""
        mlp: Any = self.mlp
        if packing is None or resolve(self._reducer.backend, x) == "reference":
            return mlp(x)
        if not _is_timms(mlp, vit.Mlp) or not is_unhooked(mlp):
            return mlp(x)
        hidden = mlp.norm(mlp.drop1(mlp.act(self._linear(mlp.fc1, x, packing))))
        return mlp.drop2(self._linear(mlp.fc2, hidden, packing))

    # ---- the block

    def _step(self, tokens: Tokens) -> Tokens:
        """Reduction, attention, MLP."""
        site, reducer = self._site, self._reducer
        if site.stage is None:
            tokens = reducer.attend_between(self, tokens)
        else:
            tokens = reducer.before(self, tokens, site.stage)
            tokens = reducer.attend(self, tokens, site.stage)
            note(site.model, tokens)
        x, packing = tokens.x, tokens.packing
        normed = self.norm2(x) if tokens.normed is None else tokens.normed
        made = self.ls2(self._mlp(normed, packing))
        return tokens.replace(x + self._drop_path(self.drop_path2, made, packing))

    def start(self, x: Tensor, *, whole: bool = False) -> Tokens:
        """Take what the model has made of its patches; with ``whole`` the last block will give Tokens too."""
        model = self._site.model
        if self.__dict__.get("_is_replica") and not model.__dict__.get("_is_replica"):
            raise ValueError("call the replicas of nn.DataParallel as models: their blocks alone would use the first's")
        if not self.is_first:
            raise TypeError(
                f"block {self.index} of a reduced model takes fastreduce.Tokens, as the block before it gives them, "
                f"got {type(x).__name__}"
            )
        prefix = model.num_prefix_tokens
        backend = resolve(self._reducer.backend, x)
        tokens = Tokens(x, prefix=prefix, patches=x.shape[1] - prefix, backend=backend, whole=whole)
        if self._reducer.grid is not None:
            tokens = tokens.replace(x, grid=grid_of(model, x.shape[1] - prefix))
        note(model, tokens)
        return tokens

    def _check_training(self) -> None:
        """Raise where training would go wrong."""
        model, reducer = self._site.model, self._reducer
        if model.grad_checkpointing and self.training and reducer.generator is not None:
            raise ValueError(
                f"gradient checkpointing runs blocks twice, and {reducer.name} would draw other noise from its "
                "own generator the second time: use torch's global one, which checkpointing restores, or no noise"
            )
        if reducer.packed and self.weight_dropout != 0.0:
            raise ValueError(
                f"packed tokens cannot be trained with attention dropout, and block {self.index} has "
                f"attn_drop={getattr(self.attn.attn_drop, 'p', self.attn.attn_drop)}: patch the model with packed=False"
            )
        if model.grad_checkpointing and _reentrant_checkpoints():
            raise ValueError(
                "timm's reentrant gradient checkpointing would lose the gradients of a reduced model: "
                "call timm.layers.set_reentrant_ckpt(False) first (timm 1.0.15 or newer)"
            )
        if self._backward_hooks or self._backward_pre_hooks:
            raise ValueError(f"block {self.index} has {_NO_BACKWARD_HOOKS}")

    @property
    def is_last(self) -> bool:
        """Whether no reduced block comes after this one."""
        blocks = self._site.model.blocks
        if torch.compiler.is_compiling():  # a block that is compiled by itself must not come upon itself in the tree
            return next(reversed(blocks._modules)) == str(self.index)
        for index in range(len(blocks) - 1, -1, -1):
            if (other := reduced_block(blocks[index])) is not None:
                return other is self
        return True

    @property
    def is_first(self) -> bool:
        """Whether no reduced block comes before this one."""
        if torch.compiler.is_compiling():
            return self.index == self._reducer.first
        reduced = (reduced_block(block) for block in self._site.model.blocks)
        return next((block for block in reduced if block is not None), self) is self

    def finish(self, tokens: Tokens) -> Tensor:
        """Return what ``model.norm`` and the pooling get. Where pooling looks at patches, each patch counts once."""
        model, reducer = self._site.model, self._reducer
        tokens = tokens.unpacked()
        if model.global_pool in ("", "token"):
            return tokens.x
        if any(plan.slot is not None for plan in tokens.plans):
            return tokens.dense()
        present = tokens.valid if tokens.policy is None else tokens.policy
        if present is None:
            return tokens.x
        check_pooling(model, reducer.name)
        # The pooling divides by the number of rows: scaled rows make that the mean over those that count.
        outside = 0 if getattr(model, "pool_include_prefix", False) else tokens.prefix
        counted = present[:, outside:].to(tokens.x.dtype)
        scale = counted * (counted.shape[1] / counted.sum(1, keepdim=True))
        return tokens.x * F.pad(scale, (outside, 0), value=1.0).unsqueeze(-1)

    def forward(  # type: ignore[override]
        self, x: Tensor | Tokens, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor | Tokens:
        """Tokens to Tokens; the first reduced block also takes a tensor (B, N, C), the last block returns one."""
        if isinstance(x, torch.fx.Proxy) or isinstance(attn_mask, torch.fx.Proxy):
            raise TypeError("a reduced model cannot be traced by torch.fx.symbolic_trace: use torch.export")
        if attn_mask is not None or is_causal:
            raise ValueError("a reduced model takes no attn_mask and no is_causal: its tokens are not the input's")
        self._check_training()
        tokens = self._step(x if isinstance(x, Tokens) else self.start(x))
        return self.finish(tokens) if self.is_last and not tokens.whole else tokens


# Names under which wrappers keep the module that they stand for.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module")


def reduced_block(module: nn.Module) -> ReducedBlock | None:
    """A reduced block, or the one in a wrapper (compiled by itself, checkpointed); None for any other module."""
    while not isinstance(module, ReducedBlock):
        inner = [module._modules[name] for name in _WRAPPED if name in module._modules]
        if not inner or inner[0] is None:
            return None
        module = inner[0]
    return module


def check_pooling(model: Any, method: str) -> None:
    """Raise unless tokens that do not count can be kept out of the pooling: a mean that no norm comes before."""
    if model.global_pool != "avg" or not isinstance(model.norm, nn.Identity):
        raise ValueError(
            f"{method} keeps another number of tokens in every image, which global_pool={model.global_pool!r} of this "
            "model cannot respect; it can with global_pool='token', or 'avg' with the norm after it (fc_norm=True)"
        )
