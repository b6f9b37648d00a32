"""The reduced block, written once over the parts of any block: what it calls, in which order, and what may move.

``reduced_class(BlockClass)`` is a subclass of the block's own class whose instances share everything with the block
that they stand for. A reduced block takes and gives :class:`~fastreduce.tokens.Tokens`; the first also takes a tensor,
and the last gives one. A block in which nothing has to be done in parts runs its own class's ``forward``.

For the writer of another library's bridge: give the layout of a block as :class:`~.parts.Parts`, the model as a
:class:`~.registry.Host`, register both by class, and this file is all that runs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import counted
from ..backends import resolve
from ..ops import unchecked as ops
from ..ops.attention import MAX_HEAD_DIM
from ..recording import ACTIVE, note
from ..reducers import Reducer
from ..reducers.block import Heads, Norm, Scores, Then, importance, is_unhooked, received
from ..tokens import Packing, Tokens
from .parts import Beside, Geometry, Parts, linear_layer
from .positions import pairs_at, rows_at, table_at
from .registry import Host, parts_of

__all__ = ["MOST_KEYS_BY_OURS", "ReducedBlock", "Site", "check_block", "reduced_block", "reduced_class"]

# Our attention reads chosen queries where they are, and gives the class token's scores for one launch instead of two,
# but takes longer a logit than PyTorch's: an estimate from bytes and operations. bench.gpu times both at 197 to 2,049.
MOST_KEYS_BY_OURS = 1024

_NO_BACKWARD_HOOKS = (
    "backward hooks, which torch calls for tensors only, and the blocks of a reduced model hand on fastreduce.Tokens: "
    "register them on its parts (norm1, mlp, ...)"
)


@dataclasses.dataclass(frozen=True)
class Site:
    """A reduced block's place in the model.

    Attributes:
        index: number of the block, from 0.
        stage: number of the stage that stands in it, or None.
        model: the model that was patched; its ``reducers`` are what runs.
        original: the block that stood here before.
        host: what knows the model's class.
        prefix: leading tokens that are never reduced.
        has_class_token: whether the first token is a class token.
        positions: whether the model's blocks look at where a token is.
    """

    index: int
    stage: int | None
    model: Any
    original: nn.Module
    host: Host
    prefix: int
    has_class_token: bool
    positions: bool


def check_block(block: nn.Module, index: int, model: str, *, opened: bool) -> None:
    """Raise, with the reason, if a block cannot be reduced; ``opened``: its attention will be done in parts."""
    kind: Any = type(block)
    parts = parts_of(kind)
    if parts is None:
        raise TypeError(
            f"{model} cannot be reduced: block {index} is a {type(block).__name__}, of which the reducers do not know "
            "what it is made of"
        )
    strange = parts.strange(block, opened=opened)
    if strange is not None:
        error, reason = strange
        raise error(reason.format(model=model, index=index))
    if "forward" in block.__dict__:
        raise ValueError(f"block {index} has a forward of its own, which a reduced block would not call")
    if block._backward_hooks or block._backward_pre_hooks:
        raise ValueError(f"block {index} has {_NO_BACKWARD_HOOKS}")


@functools.cache
def reduced_class(kind: Any) -> Any:
    """Return the subclass of a class of blocks whose instances reduce tokens."""
    members: dict[str, Any] = {"__module__": __name__, "kind": kind, "parts": parts_of(kind)}
    if members["parts"].returns_tuple:
        members["forward"] = _forward_tuple
    return type(f"Reduced{kind.__name__}", (ReducedBlock, kind), members)


@functools.cache
def _in_parts_class(kind: Any) -> Any:
    """Return the subclass of a class of attentions whose forward is done by the reduced block."""
    members = {"__module__": __name__, "__slots__": ("block", "made", "tokens")}
    return type(f"InParts{kind.__name__}", (_InParts, kind), members)


def _again(kind: type) -> Any:
    """Make an empty reduced block of a class, for copies and pickles."""
    made = reduced_class(kind)
    return made.__new__(made)


class _InParts:
    """The attention of a block with all its hooks, done in parts: it lives for one call and shares the state."""

    __slots__ = ()
    block: Any
    tokens: Tokens

    def forward(self, normed: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the attention itself returns for (B, N, C); ``made`` keeps queries, keys and values."""
        heads = self.block._project(normed, self.tokens, self.block.parts.geometry(self.block), late=False)
        object.__setattr__(self, "made", heads)
        return self.block.parts.as_returned(self.block._projected(self.block.attend(heads), heads.tokens.packing))


class ReducedBlock:
    """A block that takes and gives :class:`~fastreduce.tokens.Tokens`; see :func:`reduced_class`.

    It has the parts, parameters, buffers, hooks and attributes of the block that it stands for, in the very same
    dictionaries: what is replaced or registered on either is so on both.
    """

    kind: ClassVar[Any]
    parts: ClassVar[Parts]
    _site: Site

    def __init__(self, block: nn.Module, site: Site):
        self.__dict__.update(block.__dict__)
        object.__setattr__(self, "_site", site)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _again, (self.kind,), self.__dict__

    def move_to(self, model: Any) -> None:
        """Belong to another model from now on, a replica of the one before."""
        object.__setattr__(self, "_site", dataclasses.replace(self._site, model=model))

    def restored(self) -> nn.Module:
        """Return the block that stood here before, with what was set on this one since."""
        original = self._site.original
        left = {"_site"} if self._forward_of_a_library() is None else {"_site", "forward"}
        original.__dict__.update({name: value for name, value in self.__dict__.items() if name not in left})
        return original

    def _forward_of_a_library(self) -> Any:
        """Return a forward set on this block that calls its own, as libraries leave behind that watched it; or None."""
        forward = inner = self.__dict__.get("forward")
        while inner is not None and getattr(inner, "__self__", None) is not self:
            inner = getattr(inner, "__wrapped__", None)
        return forward if inner is not None else None

    @property
    def index(self) -> int:
        """Number of the block, from 0."""
        return self._site.index

    def extra_repr(self) -> str:
        """Say what reduces here."""
        site = self._site
        reducer: Reducer = site.model.reducers
        if site.stage is None:
            return f"tokens of {reducer.name}"
        shape = site.host.shape(site.model)
        counts = [shape.patches, *reducer.counts(shape)]
        left = counted(counts[site.stage + 1], "patch token")
        return f"stage {site.stage} of {reducer.name}: {counts[site.stage]} -> {left}"

    def attention_norm(self, tokens: Tokens) -> Norm | None:
        """Return the norm before attention, where a kernel may apply it to what it makes of the tokens."""
        parts = self.parts
        return None if tokens.backend == "reference" else _fusible(parts.norm1(self), tokens, parts.layer_norms)

    def mlp_norm(self, tokens: Tokens) -> Norm | None:
        """Return the norm before the MLP, where a kernel may apply it likewise."""
        parts = self.parts
        return None if tokens.backend == "reference" else _fusible(parts.norm2(self), tokens, parts.layer_norms)

    def heads(self, tokens: Tokens, then: Then = "add") -> Heads:
        """Return query, key and value of every token, and what attention adds where it has to run as it stands."""
        parts, normed = self.parts, tokens.normed
        if normed is None:
            norm = parts.norm1(self)
            normed = tokens.x if norm is None else norm(tokens.x)
        now = parts.geometry(self)
        module = now.module
        in_order = True
        if then == "select":
            in_order = parts.is_rowwise(self)
        elif then != "add":
            in_order = parts.is_linear(self) and (then == "merge" or not self.drops_paths)
        # What hangs on the attention, as _hangs_on says.
        free = module is None or not (module._forward_hooks or module._forward_pre_hooks)
        if in_order and free and (module is None or not (module._backward_hooks or module._backward_pre_hooks)):
            return self._project(normed, tokens, now, late=then == "select")
        heads, added = self._heads_and_branch(tokens, normed, now)
        return heads._replace(added=added)

    def _heads_and_branch(self, tokens: Tokens, normed: Tensor, now: Geometry) -> tuple[Heads, Tensor]:
        """Return the heads of every token, and what attention adds to each, calling the attention if it is hooked."""
        module = now.module
        if module is None or not _hangs_on(module):
            heads = self._project(normed, tokens, now, late=False)
            return heads, self.branch(self.attend(heads), tokens.packing)
        self._check(now)
        kind: Any = type(module)
        called = object.__new__(_in_parts_class(kind))
        for name, value in (("__dict__", module.__dict__), ("block", self), ("tokens", tokens)):
            object.__setattr__(called, name, value)
        projected = self.parts.as_added(called(normed))
        return called.made, self._added(projected, tokens.packing)

    def _check(self, now: Geometry) -> None:
        """Raise where somebody changed, since the model was patched, what calling the attention does."""
        if now.strange is not None:
            raise ValueError(
                f"{self._site.model.reducers.name} does the attention of block {self.index} in parts, but it "
                f"{now.strange}"
            )

    def _project(self, normed: Tensor, tokens: Tokens, now: Geometry, *, late: bool) -> Heads:
        """Project query, key and value.

        One product makes all three where a launch costs more than a few rows of it, else no query without need.
        """
        parts, packing, beside = self.parts, tokens.packing, tokens.beside
        if now.strange is not None:
            self._check(now)
        by_class, linear = self._site.has_class_token, _call
        if packing is not None:
            linear = functools.partial(linear_layer, packing=packing, backend=tokens.backend)
        if late and by_class and tokens.backend != "triton" and parts.splits(self):
            first = normed[:, :1] if packing is None else normed.index_select(1, packing.offsets[:-1])
            k, v = parts.project(self, normed, 1, 3, linear)
            (q,) = parts.project(self, first, 0, 1, linear)
        else:
            q, k, v = parts.project(self, normed, 0, 3, linear)
        metric, pair = k, None
        if beside is not None:
            if beside.table is not None:
                k = self._rotated(k, tokens, now)
                q = self._rotated(q, tokens, now) if q.shape[2] == k.shape[2] else q
            if beside.pair is not None:
                pair = pairs_at(beside.pair(), tokens)
        if now.groups > 1:
            k, v = k.repeat_interleave(now.groups, 1), v.repeat_interleave(now.groups, 1)
        mix = functools.partial(parts.mixed_logits, self) if parts.mixes_heads else None
        return Heads(tokens, normed, q, k, v, metric, now.scale, by_class, pair, mix)

    def _rotated(self, x: Tensor, tokens: Tokens, now: Geometry, kept: Tensor | None = None) -> Tensor:
        """Return queries or keys (B, H, prefix + n, D) turned by the places of all tokens, or of the kept (B, K)."""
        table, place = table_at(tokens)
        if kept is not None:
            place = kept if place is None else place.gather(1, kept.long())
        layout: Literal["interleaved", "half"] = "half" if now.half else "interleaved"
        return ops.rotate_tokens(x, table, place, prefix=tokens.prefix, layout=layout, backend=tokens.backend)

    def attend(
        self,
        heads: Heads,
        kept: Tensor | None = None,
        *,
        scores: Scores | None = None,
        queries: Packing | None = None,
        rows: int = 0,
    ) -> Any:
        """Attend for all tokens, or for the prefix and the kept ones, with what every key gets if asked for."""
        parts, tokens = self.parts, heads.tokens
        if scores is not None:
            out, found = self._with_scores(heads, scores)
            return parts.inner(self, out.transpose(1, 2).flatten(2), heads.normed), found
        if kept is None:
            out = self._attention(heads, heads.q)
            return parts.inner(self, out.transpose(1, 2).flatten(2), heads.normed)
        late = heads.q.shape[2] < heads.normed.shape[1]
        picked = None
        if late or parts.gated(self):
            if tokens.packing is None:
                picked = ops.gather_tokens(heads.normed, kept, prefix=tokens.prefix, backend=tokens.backend)
            else:
                picked = self._picked(heads, kept, queries, rows)
        if late:
            assert picked is not None
            (q,) = parts.project(self, picked, 0, 1, _call)
            if tokens.beside is not None and tokens.beside.table is not None:
                q = self._rotated(q, tokens, parts.geometry(self), kept)
            out = self._attention(heads, q, kept, queries)
        else:
            out = self._of_kept(heads, kept, queries, rows)
        return parts.inner(self, out.transpose(1, 2).flatten(2), picked)

    def _of_kept(self, heads: Heads, kept: Tensor, queries: Packing | None, rows: int) -> Tensor:
        """Return the attention (B, H, prefix + K, D) of kept tokens, whose queries are there already."""
        tokens = heads.tokens
        if tokens.packing is not None:
            chosen: dict[str, Any] = {"index": kept, "prefix": tokens.prefix, "num_out": rows}
            return self._packed(heads, heads.q, queries, **chosen)
        if self._has_kernel(heads) and (tokens.bias is not None or heads.k.shape[2] <= MOST_KEYS_BY_OURS):
            return ops.attention(
                heads.q,
                heads.k,
                heads.v,
                bias=tokens.bias,
                index=kept,
                prefix=tokens.prefix,
                scale=heads.scale,
                backend=tokens.backend,
            )
        together = heads.q.transpose(1, 2).flatten(2)  # (B, N, H * D), of a packed projection a view
        q = ops.gather_tokens(together, kept, prefix=tokens.prefix, backend=tokens.backend)
        return self._attention(heads, q.unflatten(2, heads.q.shape[1::2]).transpose(1, 2), kept)

    def _picked(self, heads: Heads, kept: Tensor, queries: Packing | None, rows: int) -> Tensor:
        """Return the normed rows (1, rows, C) of the prefix and of the kept tokens, packed as ``queries`` says."""
        tokens = heads.tokens
        assert tokens.packing is not None
        assert queries is not None
        offsets = tokens.packing.offsets, queries.offsets
        return ops.gather_packed(
            heads.normed, kept, offsets, num_out=rows, prefix=tokens.prefix, backend=tokens.backend
        )

    def _is_plain(self, heads: Heads) -> bool:
        """Return whether attention is a softmax over the keys with at most a bias of each.

        Our own attention cannot drop weights.
        """
        tokens = heads.tokens
        plain = tokens.packing is None and tokens.policy is None and heads.pair is None and heads.mix is None
        return plain and heads.v.shape[3] == heads.k.shape[3] and self.parts.softmax(self)[1] == 0.0

    def _has_kernel(self, heads: Heads) -> bool:
        """Return whether plain attention can run on our own kernel."""
        return heads.tokens.backend == "triton" and heads.q.shape[3] <= MAX_HEAD_DIM and self._is_plain(heads)

    def _packed(self, heads: Heads, q: Tensor, queries: Packing | None, **chosen: Any) -> Tensor:
        """Attend for every query, or the chosen ones, over the keys of its own image -> (1, H, T, D)."""
        keys = heads.tokens.packing
        assert keys is not None
        if self.parts.softmax(self)[1] != 0.0:  # also outside of training, of a module that the user put there
            drop = self._attention_dropout()
            raise ValueError(
                f"packed tokens have no matrix of attention weights, which the attn_drop of block {self.index} "
                f"({type(drop).__name__}) would see: patch the model with packed=False"
            )
        queries = queries or keys
        if heads.v.shape[3] > heads.k.shape[3]:  # a width of keys at a time
            parts = heads.v.split(heads.k.shape[3], dim=3)
            return torch.cat([self._packed(heads._replace(v=one), q, queries, **chosen) for one in parts], dim=3)
        return ops.attention_packed(
            q,
            heads.k,
            heads.v,
            # A view: torch.compile lets no autograd.Function take one tensor twice.
            offsets=(queries.offsets, keys.offsets.view(-1)),
            longest=(queries.longest, keys.longest),
            scale=heads.scale,
            backend=heads.tokens.backend,
            **chosen,
        )

    def _attention(self, heads: Heads, q: Tensor, kept: Tensor | None = None, queries: Packing | None = None) -> Tensor:
        """Return attention of queries q (B, H, M, D), of all tokens or of the kept, over all keys -> (B, H, M, D)."""
        tokens, k, v, scale = heads.tokens, heads.k, heads.v, heads.scale
        if tokens.packing is not None:
            return self._packed(heads, q, queries)
        parts = self.parts
        fused, dropout = parts.softmax(self)
        if tokens.policy is not None:
            self._check_policy(heads, dropout)
            # Values as wide as several keys, a width of keys at a time.
            made = [
                ops.attention_policy(q, k, values, tokens.policy, scale=scale, backend=tokens.backend)
                for values in v.split(k.shape[3], dim=3)
            ]
            return made[0] if len(made) == 1 else torch.cat(made, dim=3)
        if tokens.bias is not None and self._has_kernel(heads):  # SDPA's fastest kernels take no bias
            return ops.attention(q, k, v, bias=tokens.bias, scale=scale, backend=tokens.backend)
        bias = None if tokens.bias is None and heads.pair is None else _bias(heads, q, kept)
        if fused:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout or 0.0, scale=scale)
        logits = (q * scale) @ k.transpose(-2, -1)
        if heads.mix is not None:
            logits = heads.mix(logits)
        if bias is not None:
            logits = logits + bias
        if heads.mix is not None:
            sizes = None if tokens.bias is None else tokens.sizes
            return parts.mixed_weights(self, logits.softmax(dim=-1).to(v.dtype), sizes) @ v
        return parts.dropped(self, logits.softmax(dim=-1).to(v.dtype)) @ v

    def _attention_dropout(self) -> Any:
        """Return the module that drops attention weights, for messages, or None."""
        return getattr(self.parts.attention(self), "attn_drop", None)

    def _check_policy(self, heads: Heads, dropout: float | None) -> None:
        """Raise where attention that is masked in training would leave something out."""
        reducer: Reducer = self._site.model.reducers
        if heads.mix is not None:
            raise ValueError(
                f"{reducer.name} masks attention in training, of which the heads of block {self.index} mix their "
                "weights: train another method, or use it in evaluation"
            )
        if heads.pair is not None:
            raise ValueError(
                f"{reducer.name} masks attention in training, which leaves no room for the bias that this model adds "
                f"to every pair of tokens in block {self.index}: train another method, or use it in evaluation"
            )
        if dropout is None:
            drop = self._attention_dropout()
            raise ValueError(
                f"{reducer.name} masks attention in training, whose weights the attn_drop of block "
                f"{self.index} ({type(drop).__name__}) would not see"
            )

    def _with_scores(self, heads: Heads, scores: Scores) -> tuple[Tensor, Tensor]:
        """Return attention (B, H, N, D) and scores, from the same pass where that is cheaper."""
        tokens, (q, k, v) = heads.tokens, heads[2:5]
        short = k.shape[2] <= MOST_KEYS_BY_OURS
        options: dict[str, Any] = {"scale": heads.scale, "backend": tokens.backend}
        if scores == "class":
            if short and self._has_kernel(heads):
                return ops.attention_cls_scores(q, k, v, bias=tokens.bias, prefix=tokens.prefix, **options)
            assert tokens.bias is None or tokens.valid is not None  # importance knows of padding alone
            return self._attention(heads, q), importance(heads)
        if scores == "constant":
            heads = heads._replace(q=q.detach(), k=k.detach())
        if tokens.valid is not None:
            return self._attention(heads, q), received(heads)
        # The CPU computes the matrix once, a head at a time, with a gradient as without; for long inputs not at all.
        if (short and not q.is_cuda and self._is_plain(heads)) or self._has_kernel(heads):
            return ops.attention_received_scores(q, k, v, bias=tokens.bias, **options)
        assert tokens.bias is None
        return self._attention(heads._replace(k=k), q), received(heads)

    def whole(self, tokens: Tokens) -> Tensor:
        """Return what attention adds to every token, (B, N, C), by calling the module itself wherever that gives it."""
        parts, beside, normed = self.parts, tokens.beside, tokens.normed
        if normed is None:
            norm = parts.norm1(self)
            normed = tokens.x if norm is None else norm(tokens.x)
        as_it_is = tokens.packing is None and tokens.policy is None and tokens.bias is None
        if as_it_is and beside is not None and len(tokens.plans) > 0:
            # Where kernels run, one turns the rows at their places; the module would need a table of them.
            module = parts.attention(self)
            calls = tokens.backend != "triton" or (module is not None and _hangs_on(module))
            as_it_is = beside.pair is None and calls
            beside = rows_at(tokens) if as_it_is else None
        if as_it_is:
            out = parts.whole_attention(self, normed, beside)
            if out is not None:
                return self._added(out, None)
        return self._heads_and_branch(tokens, normed, parts.geometry(self))[1]

    def branch(self, attended: Tensor, packing: Packing | None = None) -> Tensor:
        """Apply output projection, dropout, layer scale and drop path: (B, M, H * D) -> (B, M, C)."""
        if packing is None:
            return self.parts.branch(self, attended)
        return self._added(self._projected(attended, packing), packing)

    def _projected(self, attended: Tensor, packing: Packing | None) -> Tensor:
        linear = _call
        if packing is not None:
            backend = resolve(self._site.model.reducers.backend, attended)
            linear = functools.partial(linear_layer, packing=packing, backend=backend)
        return self.parts.project_out(self, attended, linear)

    def _added(self, projected: Tensor, packing: Packing | None) -> Tensor:
        """Return what is added to the tokens, for what the attention's module gives."""
        parts = self.parts
        return self._drop_path(parts.path1(self), parts.tail(self, projected), packing)

    def _drop_path(self, drop_path: nn.Module | None, x: Tensor, packing: Packing | None) -> Tensor:
        """Drop path leaves whole images out; of packed tokens the rows of these, by the same draw."""
        if drop_path is None:
            return x
        if packing is None or type(drop_path) is nn.Identity:
            return drop_path(x)
        if type(drop_path) not in self.parts.scales:
            raise ValueError(
                f"packed tokens lie in one row, of which the {type(drop_path).__name__} in block {self.index} cannot "
                "know the images: patch the model with packed=False"
            )
        scale = drop_path(x.new_ones(packing.batch, 1, 1))
        return x * packing.spread(scale[:, 0], x.shape[1]) if drop_path.training else x

    @property
    def drops_paths(self) -> bool:
        """True if drop path is active."""
        drop: Any = self.parts.path1(self)
        return drop is not None and drop.training and getattr(drop, "drop_prob", 0.0) > 0

    @property
    def branch_bias(self) -> Tensor | None:
        """Return what becomes of the projection's bias where the branch commutes."""
        bias, drop = self.parts.bias(self), self.parts.path1(self)
        return bias if bias is None or drop is None else drop(bias)

    def _packed_mlp(self, tokens: Tokens) -> Tokens:
        """Apply the half behind attention to tokens of all images in one row."""
        x, packing, parts = tokens.x, tokens.packing, self.parts
        backend = resolve(self._site.model.reducers.backend, x)
        made = parts.mlp(self, x, tokens.normed, functools.partial(linear_layer, packing=packing, backend=backend))
        return tokens.replace(x + self._drop_path(parts.path2(self), made, packing))

    def start(self, x: Tensor, *, whole: bool = False) -> Tokens:
        """Take what the model has made of its patches; with ``whole`` the last block will give Tokens too."""
        site = self._site
        model, host = site.model, site.host
        reducer: Reducer = model.reducers
        if self.__dict__.get("_is_replica") and not model.__dict__.get("_is_replica"):
            raise ValueError("call the replicas of nn.DataParallel as models: their blocks alone would use the first's")
        first = torch.compiler.is_compiling() and self._site.index == reducer.first
        # A block that is compiled by itself must not come upon itself in the tree.
        if not torch.compiler.is_compiling():
            if reducer.generator is not None and host.is_checkpointing(model):
                self._check_noise()
            for block in getattr(model, host.container) if host.container else host.blocks(model):
                if isinstance(block, ReducedBlock) or not _WRAPPED.isdisjoint(block._modules):
                    reduced = block if isinstance(block, ReducedBlock) else reduced_block(block)
                    if reduced is not None:
                        first = reduced is self
                        break
        if not first:
            if host.is_checkpointing(model):  # some ways of it make a plain tuple of Tokens
                host.check_checkpointing(model)
            raise TypeError(
                f"block {self.index} of a reduced model takes fastreduce.Tokens, as the block before it gives them, "
                f"got {type(x).__name__}"
            )
        prefix = site.prefix
        patches = x.shape[1] - prefix
        grid = None if reducer.grid is None else host.grid(model, patches)
        place = None
        if site.positions:
            place = torch.arange(patches, dtype=torch.int32, device=x.device).expand(x.shape[0], -1)
        recorded = ACTIVE.records
        asked = whole or recorded or host.needs_grid
        if not asked and type(host).asks_for_inputs is not Host.asks_for_inputs:
            asked = host.asks_for_inputs(model)
        inputs = () if asked else None
        backend = resolve(reducer.backend, x)
        tokens = Tokens(
            x, prefix=prefix, patches=patches, backend=backend, whole=whole, grid=grid, place=place, inputs=inputs
        )
        if recorded:
            note(model, tokens)
        return tokens

    def _padded(self, tokens: Tokens, beside: Beside) -> tuple[Tokens, Beside | None]:
        """Let tokens know which of them are padding, if the method can leave it alone."""
        reducer: Reducer = self._site.model.reducers
        if not reducer.leaves_padding or reducer.packed:
            how = f"{reducer.name} with packed=True" if reducer.leaves_padding else reducer.name
            raise ValueError(
                f"{how} cannot tell padding from patches: give batches of images of one size, or reduce with topk, "
                "evit or ats"
            )
        valid, rest = beside.valid, beside._replace(valid=None)
        assert valid is not None
        tokens = tokens.replace(tokens.x, valid=valid, bias=valid.float().log())  # 0 and -inf
        return tokens, None if rest.table is None and rest.pair is None and rest.call is None else rest

    def _check_training(self) -> None:
        """Raise where training would go wrong."""
        site = self._site
        model, host = site.model, site.host
        reducer: Reducer = model.reducers
        if reducer.packed and self.parts.softmax(self)[1] != 0.0:
            drop = self._attention_dropout()
            raise ValueError(
                f"packed tokens cannot be trained with attention dropout, and block {self.index} has "
                f"attn_drop={getattr(drop, 'p', drop)}: patch the model with packed=False"
            )
        if host.is_checkpointing(model):
            self._check_noise()
            host.check_checkpointing(model)
        if self._backward_hooks or self._backward_pre_hooks:  # type: ignore[attr-defined]
            raise ValueError(f"block {self.index} has {_NO_BACKWARD_HOOKS}")

    def _check_noise(self) -> None:
        """Raise where blocks that run again in the backward pass would draw other noise."""
        reducer: Reducer = self._site.model.reducers
        draws = self.training or (reducer.draws_in_evaluation and torch.is_grad_enabled())  # type: ignore[attr-defined]
        if draws and reducer.generator is not None:
            raise ValueError(
                f"gradient checkpointing runs blocks twice, and {reducer.name} would draw other noise from its "
                "own generator the second time: use torch's global one, which checkpointing restores, or no noise"
            )

    def _is_last(self, blocks: Any) -> bool:
        """Return whether no reduced block comes after this one in the container."""
        if torch.compiler.is_compiling():  # a block that is compiled by itself must not come upon itself in the tree
            return next(reversed(blocks._modules)) == str(self._site.index)
        for index in range(len(blocks) - 1, -1, -1):
            if (other := reduced_block(blocks[index])) is not None:
                return other is self
        return True

    def finish(self, tokens: Tokens) -> Tensor:
        """Return what the model's own code behind the blocks gets."""
        site = self._site
        return site.host.finish(site.model, tokens)

    def forward(self, x: Tensor | Tokens, *args: Any, **kwargs: Any) -> Any:
        """Turn Tokens into Tokens; the first reduced block takes a tensor (B, N, C) too, the last returns one."""
        if isinstance(x, torch.fx.Proxy) or (
            kwargs and any(isinstance(one, torch.fx.Proxy) for one in kwargs.values())
        ):
            raise TypeError("a reduced model cannot be traced by torch.fx.symbolic_trace: use torch.export")
        parts, beside = self.parts, None
        if args or kwargs or parts.reads_itself:
            beside = parts.beside(self, args, kwargs)
        if self.training or self._backward_hooks or self._backward_pre_hooks:  # type: ignore[attr-defined]
            self._check_training()
        tokens = x if isinstance(x, Tokens) else self.start(x)
        if beside is not None and beside.valid is not None:
            tokens, beside = self._padded(tokens, beside)
        if beside is not None or tokens.beside is not None:
            if beside is not None:
                beside = beside._replace(positions=self._site.model.reducers.positions)
            tokens = tokens.replace(tokens.x, normed=tokens.normed, beside=beside)
        site = self._site
        model = site.model
        as_it_is = site.stage is None and (beside is None or len(tokens.plans) == 0) and tokens.normed is None
        as_it_is = as_it_is and tokens.packing is None and tokens.policy is None and tokens.bias is None
        if as_it_is and not model.reducers.opens(site.index):
            if len(tokens.plans) > 0 and (args or kwargs):
                args, kwargs = parts.of_fewer(args, kwargs)
            made = self.kind.forward(self, tokens.x, *args, **kwargs)
            tokens = tokens.replace(made[0] if parts.returns_tuple else made)
        else:
            reducer: Reducer = model.reducers
            if site.stage is None:
                tokens = reducer.attend_between(self, tokens)
            else:
                if getattr(type(reducer), "before", None) is not Reducer.before:
                    tokens = reducer.before(self, tokens, site.stage)
                tokens = reducer.attend(self, tokens, site.stage)
                if ACTIVE.records:
                    note(model, tokens)
            if tokens.packing is None:
                tokens = tokens.replace(parts.second_half(self, tokens.x, tokens.normed))
            else:
                tokens = self._packed_mlp(tokens)
        if tokens.whole:
            return tokens
        blocks = getattr(model, site.host.container) if site.host.container else site.host.blocks(model)
        if not torch.compiler.is_compiling():
            last = next(reversed(blocks._modules.values()))
            if isinstance(last, ReducedBlock):
                return site.host.finish(model, tokens) if last is self else tokens
        return site.host.finish(model, tokens) if self._is_last(blocks) else tokens


def _forward_tuple(self: ReducedBlock, x: Tensor | Tokens, *args: Any, **kwargs: Any) -> tuple[Any, None]:
    """Stand in for the forward of a block that returns its tokens with something else, which nobody takes."""
    return ReducedBlock.forward(self, x, *args, **kwargs), None


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def _hangs_on(module: nn.Module) -> bool:
    """Return whether hooks of the user's hang on a module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _fusible(norm: Any, tokens: Tokens, known: tuple[type, ...]) -> Norm | None:
    """Return a norm whose work a kernel can do as it is, else None.

    Half-precision autocast would have the norm in float32.
    """
    if norm is None or torch.is_autocast_enabled(tokens.x.device.type):
        return None
    if type(norm) not in known or len(norm.normalized_shape) != 1 or not is_unhooked(norm):
        return None
    return Norm(norm.weight, norm.bias, norm.eps)


def _bias(heads: Heads, q: Tensor, kept: Tensor | None) -> Tensor:
    """Return what is added to the logits, (B or 1, 1 or H, 1 or M, N), for the queries of all or of the kept tokens."""
    tokens, pair, bias = heads.tokens, heads.pair, None
    if pair is not None and kept is not None:
        rows = torch.arange(tokens.prefix, device=kept.device).expand(len(kept), -1)
        rows = torch.cat([rows, kept.long() + tokens.prefix], dim=1)
        pair = pair.expand(len(kept), -1, -1, -1)
        pair = pair.gather(2, rows[:, None, :, None].expand(-1, pair.shape[1], -1, pair.shape[3]))
    if tokens.bias is not None:
        batch, num_keys = tokens.bias.shape
        bias = tokens.bias.view(batch, 1, 1, num_keys)  # one operator: an index with None is three
        if bias.dtype == q.dtype and pair is None:
            return bias
    if pair is not None:
        bias = pair if bias is None else pair + bias
    assert bias is not None
    # Half precision would round log 98 by a hundredth; on the CPU SDPA takes a float32 bias beside half inputs.
    wide = not q.is_cuda and heads.pair is None
    return bias.to(torch.promote_types(q.dtype, bias.dtype) if wide else q.dtype)


# Names under which wrappers keep the module that they stand for.
_WRAPPED = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"})


def reduced_block(module: nn.Module) -> Any:
    """Return a reduced block, or the one in a wrapper (compiled by itself, checkpointed); None for any other module."""
    while not isinstance(module, ReducedBlock):
        inner = [module._modules[name] for name in _WRAPPED if name in module._modules]
        if not inner or inner[0] is None:
            return None
        module = inner[0]
    return module
