"""Parts of a transformer block, as a reduced block asks for them; one subclass for each layout of blocks.

A :class:`Parts` has no state: every method is given the block, and reads the module tree as it is at that moment. So
what users hang on modules, or put in their place, is called. A layout says with its methods

* where the norms, the three slices of the query, key and value projection, the norms of queries and keys, the norm or
  gate between attention and projection, the output projection, the tail (layer scale, post-norm), the two drop paths
  and the MLP are;
* what may be done in another order: :meth:`Parts.is_rowwise`, :meth:`Parts.is_linear`, :meth:`Parts.splits`;
* what the model hands the block beside the tokens: :meth:`Parts.beside`.

To add a layout, subclass, override what differs, and register an instance for the class of the blocks
(:func:`fastreduce.integrations.registry.register_parts`).
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import unchecked as ops
from ..reducers.block import is_bare, is_unhooked
from ..tokens import Packing

__all__ = ["Beside", "Geometry", "Linear", "Parts", "are_plain", "as_input", "is_idle_dropout", "linear_layer"]

Linear = Callable[[nn.Module, Tensor], Tensor]


class Geometry(NamedTuple):
    """An attention as it is now.

    Attributes:
        module: what hooks on the attention hang on, and what the block calls; None if the block does it itself.
        scale: factor of the logits.
        groups: query heads that share one head of keys and values.
        half: whether a rotation pairs channel i with i + D / 2, instead of 2 i with 2 i + 1.
        strange: why its parts cannot stand for it any more, as the end of "... but it ...", else None.
    """

    module: nn.Module | None
    scale: float
    groups: int = 1
    half: bool = False
    strange: str | None = None


class Beside(NamedTuple):
    """Values that a model hands a block beside the tokens, on the full grid of patches.

    Attributes:
        table: (cos, sin) of a rotation, each (P, D), (H, P, D) or (B, 1 or H, P, D); or what makes that pair of the
            number of patches P; or None.
        pair: what gives (1 or B, H, prefix + P, prefix + P) the bias of every pair, or None.
        call: what the block's own attention is called with on the full grid, or None for what :meth:`Parts.call` makes
            of the table.
        valid: (B, prefix + P) bool, False for padding, which no method may keep before a patch; or None.
        positions: ``"place"`` to rotate a merged token by the row of its place, ``"mean"`` by the mean of its patches'.
    """

    table: Any = None
    pair: Callable[[], Tensor] | None = None
    call: dict[str, Any] | None = None
    positions: str = "place"
    valid: Tensor | None = None


def linear_layer(layer: nn.Module, x: Tensor, packing: Packing | None, backend: str) -> Tensor:
    """Call a layer; where kernels run, one that is a linear map passes over the room behind packed tokens."""
    if packing is None or backend == "reference" or not is_bare(layer):
        return layer(x)
    weight: Any = layer.weight
    if weight.dtype != x.dtype or torch.is_autocast_enabled(x.device.type):
        return layer(x)
    bias: Any = layer.bias
    return ops.linear_packed(x, weight, bias, packing.offsets, backend="triton")


class Parts(abc.ABC):
    """Parts of the blocks of one layout.

    Attributes:
        wanted: what a block must be, in words, for the message of a refusal.
        row_by_row: classes of layers that treat every row alike and on its own.
        scales: classes of layers that multiply a row by a vector or a number.
        layer_norms: classes of norms that compute ``F.layer_norm``, so that a kernel may do their work.
        reads_itself: whether :meth:`beside` has something to say of a block that is called with tokens alone.
        returns_tuple: whether blocks return (tokens, something), of which the model takes the first.
        mixes_heads: whether heads mix their logits or weights, so that attention needs the matrix of all of them.
    """

    wanted: str = "a block of a known layout"
    row_by_row: tuple[type, ...] = (nn.Identity, nn.Linear, nn.Dropout, nn.LayerNorm)
    scales: tuple[type, ...] = (nn.Identity,)
    layer_norms: tuple[type, ...] = (nn.LayerNorm,)
    reads_itself: bool = False
    returns_tuple: bool = False
    mixes_heads: bool = False

    @abc.abstractmethod
    def strange(self, block: Any, *, opened: bool) -> tuple[type[Exception], str] | None:
        """Return the error, and its message, for a block whose forward cannot be done in parts; None if it can.

        ``{index}`` in the message stands for the block's number and ``{model}`` for the class of the model.
        ``opened``: its attention will be done in parts, not only the block.
        """

    @abc.abstractmethod
    def geometry(self, block: Any) -> Geometry:
        """Return what the attention is now."""

    def attention(self, block: Any) -> nn.Module | None:
        """Return the module that the block calls for its attention, or None if it does that itself."""
        return block.attn

    def beside(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Beside | None:
        """Read what the block was called with behind the tokens; raise ValueError for what cannot be respected."""
        return None

    def of_fewer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what the block is to be called with once tokens were reduced: nothing that is of all of them."""
        return args, kwargs

    @abc.abstractmethod
    def norm1(self, block: Any) -> nn.Module | None:
        """Return the norm before attention, or None if attention takes the tokens as they are."""

    @abc.abstractmethod
    def norm2(self, block: Any) -> nn.Module | None:
        """Return the norm before the MLP, or None."""

    @abc.abstractmethod
    def splits(self, block: Any) -> bool:
        """Return whether queries can be projected apart from keys and values, with the same numbers."""

    @abc.abstractmethod
    def project(self, block: Any, normed: Tensor, first: int, last: int, linear: Linear) -> tuple[Tensor, ...]:
        """Return the slices ``first`` to ``last`` of (query, key, value), each (B, its heads, N, D), normed as needed.

        Args:
            block: of this layout.
            normed: (B, N, C).
            first: 0 for the query, 1 for the key.
            last: one behind the last wanted.
            linear: calls a layer, see :func:`linear_layer`.
        """

    def softmax(self, block: Any) -> tuple[bool, float | None]:
        """Return whether the block calls ``scaled_dot_product_attention``, and with what probability a weight drops.

        The probability is None where a module of the user's has to see the weights.
        """
        return True, 0.0

    def dropped(self, block: Any, weights: Tensor) -> Tensor:
        """Return the attention weights (B, H, M, N) behind the block's own dropout."""
        return weights

    def mixed_logits(self, block: Any, logits: Tensor) -> Tensor:
        """Return logits (B, H, M, N) as heads mix them before the softmax, where they do."""
        return logits

    def mixed_weights(self, block: Any, weights: Tensor, sizes: Tensor | None) -> Tensor:
        """Return weights (B, H, M, N) as heads mix them behind the softmax, and behind dropout.

        ``sizes`` (B, N) is how many patches a key counts as, or None: what is added to a key's weight, whatever that
        is, is added for each of them.
        """
        return self.dropped(block, weights)

    def whole_attention(self, block: Any, normed: Tensor, beside: Beside | None) -> Tensor | None:
        """Call the attention as the block does, for all tokens -> (B, N, C); None where it cannot be called.

        ``beside`` is gathered for the tokens at hand already, or None.
        """
        attention: Any = self.attention(block)
        if attention is None:
            return None
        if beside is None:
            return attention(normed)
        return attention(normed, **(self.call(beside) if beside.call is None else beside.call))

    def call(self, beside: Beside) -> dict[str, Any]:
        """Return what the attention is to be called with for a table (B, 1 or H, n, D) of the tokens at hand."""
        raise NotImplementedError

    def as_returned(self, projected: Tensor) -> Any:
        """Return what calling the attention gives, hooks on it included, for what it adds, (B, N, C)."""
        return projected

    def as_added(self, returned: Any) -> Tensor:
        """Return what attention adds, (B, N, C), for what calling it gave."""
        return returned

    def inner(self, block: Any, out: Tensor, rows: Tensor | None) -> Tensor:
        """Apply the norm or gate behind attention to (B, M, H * D), with rows (B, M, C) if :meth:`gated`."""
        return out

    def gated(self, block: Any) -> bool:
        """Return whether :meth:`inner` looks at the rows that the queries came from."""
        return False

    @abc.abstractmethod
    def project_out(self, block: Any, attended: Tensor, linear: Linear) -> Tensor:
        """Apply the output projection and its dropout: (B, M, H * D) -> (B, M, C)."""

    def branch(self, block: Any, attended: Tensor) -> Tensor:
        """Apply all from the output projection to the residual: (B, M, H * D) -> (B, M, C)."""
        made = self.tail(block, self.project_out(block, attended, _call))
        path = self.path1(block)
        return made if path is None else path(made)

    def tail(self, block: Any, projected: Tensor) -> Tensor:
        """Apply layer scale or post-norm, up to the drop path: (B, M, C) -> (B, M, C)."""
        return projected

    def bias(self, block: Any) -> Tensor | None:
        """Return (C,) what projection and tail add to every row where they are linear, or None."""
        return None

    @abc.abstractmethod
    def is_rowwise(self, block: Any) -> bool:
        """Return whether what stands between attention and residual treats every row alike.

        A selection may then come first.
        """

    @abc.abstractmethod
    def is_linear(self, block: Any) -> bool:
        """Return whether projection, tail and drop path are linear in each row now.

        A merge may then come before them.
        """

    def path1(self, block: Any) -> nn.Module | None:
        """Return the drop path of the attention, or None."""
        return None

    def path2(self, block: Any) -> nn.Module | None:
        """Return the drop path of the MLP, or None."""
        return None

    @abc.abstractmethod
    def mlp(self, block: Any, x: Tensor, normed: Tensor | None, linear: Linear) -> Tensor:
        """Apply the MLP's half up to its drop path: x (B, N, C) -> (B, N, C).

        ``normed`` is what :meth:`norm2` makes of x where a kernel has done it. ``linear`` calls a layer.
        """

    def second_half(self, block: Any, x: Tensor, normed: Tensor | None) -> Tensor:
        """Apply all behind attention and its residual: x (B, N, C) -> (B, N, C)."""
        made = self.mlp(block, x, normed, _call)
        path = self.path2(block)
        return x + (made if path is None else path(made))

    def treats_rows_alike(self, *modules: nn.Module | None) -> bool:
        """Return whether layers treat every row alike, and nothing was hung on them."""
        return are_plain(modules, self.row_by_row)


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def are_plain(modules: tuple[nn.Module | None, ...], kinds: tuple[type, ...]) -> bool:
    """Return whether all modules, but those that are None, are of these very classes with nothing hung on them."""
    for module in modules:
        if module is None:
            continue
        if type(module) not in kinds or module._forward_hooks or module._forward_pre_hooks:
            return False
        if module._backward_hooks or module._backward_pre_hooks or "forward" in module.__dict__:
            return False
    return True


def as_input(parameter: Tensor) -> Tensor:
    """Return a parameter as modules are called: without a gradient where none is recorded.

    ``torch.utils.module_tracker``, which ``FlopCounterMode`` uses, asks inputs that want a gradient for its node.
    """
    return parameter if torch.is_grad_enabled() else parameter.detach()


def is_idle_dropout(drop: nn.Module | None) -> bool:
    """Return whether a dropout drops nothing now, and nothing hangs on it."""
    if drop is None or type(drop) is nn.Identity:
        return drop is None or is_unhooked(drop)
    return type(drop) is nn.Dropout and (drop.p == 0 or not drop.training) and is_unhooked(drop)
