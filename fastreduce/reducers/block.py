"""Verbs that a method may ask of a transformer block, and what the methods have in common when they ask.

A reducing block has an attention half and an MLP. A method acts on the first, through three verbs:

* ``heads = block.heads(tokens)``: query, key and value of every token, as :class:`Heads`;
* ``attended = block.attend(heads, kept)``: what attention makes of the prefix and of the kept tokens, or of all;
* ``residual = block.branch(attended)``: what the block adds to these rows for it.

``heads.added`` is not None where the block's own attention had to be called as it stands, for all tokens at once (a
hook of the user's may look at more than one row): then it is what attention adds to each row, and nothing is left to
be attended. :func:`keep_tokens` does the last two for a method that selects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ..ops import unchecked as ops
from ..tokens import Packing, Tokens

__all__ = [
    "AttentionBlock",
    "Heads",
    "Norm",
    "Scores",
    "Then",
    "attend_all",
    "attend_with_importance",
    "class_attention",
    "fuse",
    "gather",
    "importance",
    "is_bare",
    "is_captured",
    "is_plain_tensor",
    "is_unhooked",
    "keep_tokens",
    "merge",
    "needs_matrix",
    "received",
]

Scores = Literal["class", "received", "constant"]
Then = Literal["add", "select", "merge", "sum"]


class Norm(NamedTuple):
    """A layer normalisation that the kernel which makes its rows can apply in the same launch."""

    weight: Tensor | None
    bias: Tensor | None
    norm_eps: float


class Heads(NamedTuple):
    """Input of attention: query, key and value of the tokens that enter a block.

    Attributes:
        tokens: the tokens (B, N, C) that they come from: their ``bias``, ``policy`` and ``packing`` are the
            keys'. Packed, B is 1 and N the length of the row.
        normed: (B, N, C) what the norm before attention made of them.
        q: (B, H, N, D); or (B, H, 1, D), the class token's row alone (packed, the row of each image), which is what a
            method needs that decides before it attends.
        k: (B, H, N, D), rotated where the model rotates, repeated for every query head that shares it.
        v: (B, H, N, D), likewise.
        metric: (B, H or less, N, D) the keys as they were before rotation.
        scale: factor of the attention logits.
        by_class: whether the first token is a class token, by whose attention tokens are scored.
        pair: (1 or B, H, N, N) what the model adds to the logit of every pair, or None.
        mix: what the model makes of the logits (B, H, M, N) of all heads together, or None.
        added: (B, N, C) what attention adds to every token, where it has run already, else None.
    """

    tokens: Tokens
    normed: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    metric: Tensor
    scale: float
    by_class: bool
    pair: Tensor | None = None
    mix: Callable[[Tensor], Tensor] | None = None
    added: Tensor | None = None


class AttentionBlock(Protocol):
    """The attention half of a transformer block, in the pieces between which a reducer can act.

    Shapes: tokens (B, N, C); H heads of dimension D; M query rows.
    """

    @property
    def index(self) -> int:
        """Number of the block, from 0."""
        ...

    def heads(self, tokens: Tokens, then: Then = "add") -> Heads:
        """Return query, key and value of every token.

        Args:
            tokens: (B, N, C), as they enter the block.
            then: what the caller does with the rows between :meth:`attend` and :meth:`branch`: nothing (``"add"``),
                ``"select"`` some, ``"merge"`` rows with weights that sum to one, ``"sum"`` rows with any weights. Where
                that does not commute with what the block does there, all tokens attend now: see ``Heads.added``. A
                caller that selects may get the class token's query alone.
        """
        ...

    def attend(
        self,
        heads: Heads,
        kept: Tensor | None = None,
        *,
        scores: Scores | None = None,
        queries: Packing | None = None,
        rows: int = 0,
    ) -> Any:
        """Return attention over all keys -> (B, M, H * D), before the output projection.

        Args:
            heads: of this block, with ``added`` None.
            kept: (B, K) indices of the patch tokens that query, behind the prefix: M is prefix + K; None for all N.
            scores: also return ``"class"``, (B, N - prefix) the class token's attention to every patch averaged over
                heads, or ``"received"``, (B, N) what every key gets, summed over heads and queries, or the same as a
                ``"constant"`` without gradient. Then the result is the pair of both. Not with ``kept``.
            queries: of packed keys, how the kept rows are to lie: (1, rows, H * D).
            rows: the length of that row.
        """
        ...

    def branch(self, attended: Tensor, packing: Packing | None = None) -> Tensor:
        """Apply output projection, layer scale and drop path: (B, M, H * D) -> (B, M, C), packed as ``packing``."""
        ...

    def whole(self, tokens: Tokens) -> Tensor:
        """Return what attention adds to every token, (B, N, C), by calling the block's own wherever that gives it."""
        ...

    def attention_norm(self, tokens: Tokens) -> Norm | None:
        """Return the norm before attention if the kernel that reduces the tokens may apply it (``Tokens.normed``)."""
        ...

    def mlp_norm(self, tokens: Tokens) -> Norm | None:
        """Return the norm before the MLP, likewise."""
        ...

    @property
    def branch_bias(self) -> Tensor | None:
        """(C,): what the branch adds to every row alike while no path is dropped, or None."""
        ...


def is_captured() -> bool:
    """Return whether tensors stand for others, under torch.compile or torch.func.

    Then there is nothing to wait for and nothing to keep.
    """
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def is_unhooked(module: nn.Module) -> bool:
    """Return whether calling a module does what its class does: no hook on it, and no forward of its own.

    Hooks on all modules (``register_module_forward_hook``) do not count: counters of operations use them, and are to
    count what is done without them.
    """
    forward = module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__
    backward = module._backward_pre_hooks or module._backward_hooks
    return not forward and not backward


# Subclasses of Tensor that stand for one while a graph is captured; others (quantised, sharded) multiply on their own.
_PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)


def is_plain_tensor(weight: object) -> bool:
    """Return whether a weight is no tensor of its own kind (quantised, sharded)."""
    return type(weight) in _PLAIN_TENSORS


def is_bare(layer: nn.Module) -> bool:
    """Return whether a layer is a linear map and nothing else.

    Hooks may compute its weight (pruning) or change its output.

    A subclass (parametrised, quantised, an adapter, sharded) is not, nor a weight that is a tensor of its own kind.
    """
    if type(layer) is not nn.Linear or type(layer.weight) not in _PLAIN_TENSORS:
        return False
    # As is_unhooked, which this is asked instead of in every pass.
    forward = layer._forward_pre_hooks or layer._forward_hooks or "forward" in layer.__dict__
    return not forward and not (layer._backward_pre_hooks or layer._backward_hooks)


def attend_all(block: AttentionBlock, tokens: Tokens) -> Tokens:
    """Run the attention half of a block that reduces nothing."""
    return tokens.replace(tokens.x + block.whole(tokens))


def gather(norm: Norm | None, x: Tensor, index: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Call :func:`ops.gather_tokens`, and return also what the norm makes of its rows if there is one."""
    if norm is None:
        return ops.gather_tokens(x, index, **options), None
    return ops.gather_tokens(x, index, norm=norm, **options)


def fuse(
    norm: Norm | None, x: Tensor, order: Tensor, scores: Tensor, k: int, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Call :func:`ops.fuse_tokens`, and return also what the norm makes of its rows if there is one."""
    if norm is None:
        return ops.fuse_tokens(x, order, scores, k, **options), None
    return ops.fuse_tokens(x, order, scores, k, norm=norm, **options)


def merge(
    norm: Norm | None, x: Tensor, slot: Tensor, num_out: int, **options: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Call :func:`ops.merge_tokens`, and return also what the norm makes of its rows if there is one."""
    if norm is None:
        return *ops.merge_tokens(x, slot, num_out, **options), None
    return ops.merge_tokens(x, slot, num_out, norm=norm, **options)


def keep_tokens(block: AttentionBlock, heads: Heads, kept: Tensor) -> tuple[Tensor, Tensor | None]:
    """Let the prefix and the kept tokens attend, and return them with what that adds, and what the next norm makes.

    Args:
        block: whose attention half this ends.
        heads: of all tokens, from ``block.heads(tokens, "select")``.
        kept: (B, K) indices of patch tokens.

    Returns:
        (B, prefix + K, C), and the same normed where the kernel did that too, else None.
    """
    tokens = heads.tokens
    options: dict[str, Any] = {"prefix": tokens.prefix, "backend": tokens.backend}
    norm = None if tokens.backend == "reference" else block.mlp_norm(tokens)
    x = tokens.x
    if heads.added is None:
        options["residual"] = block.branch(block.attend(heads, kept))
    else:
        x = x + heads.added
    if norm is None:
        return ops.gather_tokens(x, kept, **options), None
    return ops.gather_tokens(x, kept, norm=norm, **options)


def importance(heads: Heads) -> Tensor:
    """Score of every patch token, (B, N - prefix): class attention, or what it receives where there is no class token.

    Both are averages over heads of softmax weights, the second also over queries; each sums to at most one per image.
    Scores are those before attention dropout.
    """
    q, k, tokens = heads.q, heads.k, heads.tokens
    if not heads.by_class:
        return _mean_of(received(heads), heads)
    if heads.pair is not None or heads.mix is not None:  # needs_matrix, without a call in every pass
        return class_attention(heads).mean(1)
    return ops.cls_scores(
        q[:, :, 0], k, prefix=tokens.prefix, scale=heads.scale, valid=tokens.valid, backend=tokens.backend
    )


def needs_matrix(heads: Heads) -> bool:
    """Return whether logits are more than products of queries and keys, so that no kernel knows them."""
    return heads.pair is not None or heads.mix is not None


def class_attention(heads: Heads) -> Tensor:
    """Return the class token's attention (B, H, N - prefix) to every patch, where the whole matrix is needed."""
    logits, valid = _logits(heads, 1)[:, :, 0], heads.tokens.valid
    if valid is not None:
        logits = logits.masked_fill(~valid.unsqueeze(1), float("-inf"))
    return logits.softmax(-1)[:, :, heads.tokens.prefix :]


def received(heads: Heads) -> Tensor:
    """Return the attention (B, N) that every token gets, summed over heads and queries, before attention dropout."""
    valid = heads.tokens.valid
    if valid is not None:  # padding neither gives nor gets
        logits = _logits(heads, heads.q.shape[2]).masked_fill(~valid[:, None, None], float("-inf"))
        return (logits.softmax(-1) * valid[:, None, :, None]).sum((1, 2))
    if needs_matrix(heads):
        return _logits(heads, heads.q.shape[2]).softmax(-1).sum((1, 2))
    return ops.received_scores(heads.q, heads.k, scale=heads.scale, backend=heads.tokens.backend)


def _logits(heads: Heads, queries: int) -> Tensor:
    """Return the logits (B, H, queries, N) of the first queries, in float32 or wider: mixed, with a bias of pairs."""
    logits = (heads.q[:, :, :queries] * heads.scale) @ heads.k.transpose(-2, -1)
    if heads.mix is not None:
        logits = heads.mix(logits)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if heads.pair is None else logits + heads.pair[:, :, :queries]


def attend_with_importance(block: AttentionBlock, heads: Heads) -> tuple[Tensor, Tensor]:
    """Return attention of all tokens (B, N, H * D), and their :func:`importance`."""
    if heads.by_class:
        return block.attend(heads, scores="class")
    attended, received_ = block.attend(heads, scores="received")
    return attended, _mean_of(received_, heads)


def _mean_of(received_: Tensor, heads: Heads) -> Tensor:
    """Return what patches receive (B, N - prefix), averaged over heads and over the queries that are no padding."""
    found, valid = received_[:, heads.tokens.prefix :] / heads.q.shape[1], heads.tokens.valid
    return found / (heads.q.shape[2] if valid is None else valid.sum(1, keepdim=True))
