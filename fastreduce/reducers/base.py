"""What a reducer is, and what it may ask of a transformer block."""

from __future__ import annotations

import abc
import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ..backends import Resolved
from ..ops import unchecked as ops
from ..tokens import Packing, Tokens
from .schedule import Keep, KeepRate, KeepSchedule, keep_schedule, stage_blocks

__all__ = [
    "AttentionBlock",
    "ModelShape",
    "Norm",
    "Reducer",
    "ScheduledReducer",
    "attend_all",
    "attend_with_importance",
    "early_heads",
    "fuse",
    "gather",
    "idle_stages",
    "importance",
    "is_bare",
    "is_captured",
    "is_unhooked",
    "merge",
    "new_schedule",
    "warn_once",
]


class Norm(NamedTuple):
    """A layer normalisation that the kernel which makes its rows can apply in the same launch."""

    weight: Tensor | None
    bias: Tensor | None
    norm_eps: float


class AttentionBlock(Protocol):
    """The attention half of a pre-norm transformer block, in the pieces between which a reducer can act.

    Shapes: tokens (B, N, C); H heads of dimension D; M query rows. Where a ``packing`` is given, or ``keys`` have one,
    the tokens of all images lie in one row: B is 1, and N and M are lengths of rows.
    """

    @property
    def index(self) -> int:
        """Number of the block, from 0."""
        ...

    @property
    def has_class_token(self) -> bool:
        """Whether the first token is a class token."""
        ...

    @property
    def scale(self) -> float:
        """Factor of the attention logits."""
        ...

    @property
    def rowwise(self) -> bool:
        """Whether a selection may come before what follows attention, because that treats every token alike."""
        ...

    @property
    def commutes(self) -> bool:
        """Whether the branch is linear in each token, so that merging may come before it (no dropout is active)."""
        ...

    @property
    def hooked(self) -> bool:
        """Whether something hangs on the attention, which then has to be called: :meth:`heads_and_branch` does so."""
        ...

    def heads_and_branch(self, normed: Tensor, tokens: Tokens) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Return query, key and value of every token, three of (B, H, N, D), and what attention adds to each."""
        ...

    def whole_branch(self, normed: Tensor, tokens: Tokens) -> Tensor:
        """Return what attention adds to every token, (B, N, C), by calling the block's own wherever that gives it."""
        ...

    def norm(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C), the norm before attention."""
        ...

    def attention_norm(self, tokens: Tokens) -> Norm | None:
        """The norm before attention, where the kernel that reduces the tokens may apply it: see ``Tokens.normed``."""
        ...

    def mlp_norm(self, tokens: Tokens) -> Norm | None:
        """The norm before the MLP, likewise."""
        ...

    def query_key_value(self, normed: Tensor, packing: Packing | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) -> three of (B, H, N, D)."""
        ...

    def early_query_key_value(self, normed: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) -> q (B, H, 1 or N, D), k and v (B, H, N, D), for methods that decide before they attend.

        q may hold the class token's row alone (packed, those of all images), which is what their scores need.
        """
        ...

    def attend_kept(self, q: Tensor, k: Tensor, v: Tensor, normed: Tensor, kept: Tensor, keys: Tokens) -> Tensor:
        """Attention of the prefix and the kept patch tokens over all keys -> (B, prefix + M, H * D).

        q, k, v are what :meth:`early_query_key_value` made of ``normed`` (B, N, C); ``kept`` (B, M) are indices of
        patch tokens; for ``keys`` see :meth:`attention`.
        """
        ...

    def attention(self, q: Tensor, k: Tensor, v: Tensor, normed: Tensor | None, keys: Tokens) -> Tensor:
        """Attention of M queries over N keys -> (B, M, H * D), before the output projection.

        ``normed`` (B, M, C) are the rows that the queries came from (a gate needs them). ``keys`` are the tokens that k
        and v came from: their ``bias`` is added to the logits, and a ``policy`` masks as DynamicViT's training does.
        """
        ...

    def attend_packed(
        self, q: Tensor, k: Tensor, v: Tensor, normed: Tensor, kept: Tensor, keys: Tokens, queries: Packing, rows: int
    ) -> Tensor:
        """As :meth:`attend_kept`, of packed keys -> (1, rows, H * D), which lie as ``queries`` says."""
        ...

    def attention_and_class(
        self, q: Tensor, k: Tensor, v: Tensor, normed: Tensor | None, keys: Tokens
    ) -> tuple[Tensor, Tensor]:
        """:meth:`attention`, and that of the class token to every patch, (B, N - prefix), averaged over heads."""
        ...

    def attention_and_received(
        self, q: Tensor, k: Tensor, v: Tensor, normed: Tensor | None, keys: Tokens, *, differentiable: bool
    ) -> tuple[Tensor, Tensor]:
        """:meth:`attention`, and how much attention every key got, (B, N), summed over heads and queries.

        Where the second need not be ``differentiable`` it may be had without what a gradient would take.
        """
        ...

    def branch(self, attended: Tensor, packing: Packing | None = None) -> Tensor:
        """Output projection, layer scale and drop path: (B, M, H * D) -> (B, M, C)."""
        ...

    @property
    def branch_bias(self) -> Tensor | None:
        """(C,): what the branch adds to every row alike while no path is dropped, or None."""
        ...

    @property
    def drops_paths(self) -> bool:
        """Whether the branch is left out for some images now, by chance."""
        ...


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """What a reducer may know of the model when it is made."""

    depth: int
    grid: tuple[int, int]
    prefix: int
    has_class_token: bool
    channels: int

    @property
    def patches(self) -> int:
        """Number of patch tokens."""
        return self.grid[0] * self.grid[1]


def is_captured() -> bool:
    """Whether tensors stand for others, under torch.compile or torch.func: nothing to wait for, nothing to keep."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


_said: set[str] = set()


def warn_once(kind: str, message: str) -> None:
    """Warn, but once a process for each kind."""
    if kind not in _said:
        _said.add(kind)
        warnings.warn(message, stacklevel=4)  # where patch was called


class Reducer(nn.Module, abc.ABC):
    """A token reduction method, with its schedule. One instance serves all stages of a model.

    A subclass overrides :meth:`before` (reduction of the block's input) or :meth:`attend` (reduction within its
    attention half). Both first make a plan, without gradient through indices, and then apply it.

    Attributes:
        name: the method's name in :func:`fastreduce.patch`.
        grid: the model's own patch grid (rows, columns) where the method's patterns follow from the grid, else None.
        generator: where the method draws its noise from, or None for torch's global generator or no noise.
        ragged: whether images keep different numbers of tokens, so that ``Tokens.valid`` and padding occur.
        packed: whether such tokens are packed in one row instead.
        blocks: the blocks at which the stages stand, ascending.
        backend: passed to every op.
        config: what :func:`fastreduce.patch` was called with.
    """

    name: ClassVar[str]
    grid: tuple[int, int] | None = None
    generator: torch.Generator | None = None
    ragged: ClassVar[bool] = False
    packed: bool = False

    def __init__(self, blocks: tuple[int, ...], backend: str = "auto"):
        super().__init__()
        self.blocks = blocks
        self.backend = backend
        self.config: dict[str, Any] = {}

    @classmethod
    def make(
        cls,
        shape: ModelShape,
        /,
        *,
        at: int | Sequence[int] | None,
        keep_rate: KeepRate,
        keep: Keep,
        backend: str,
        **options: Any,
    ) -> Reducer:
        """Build the reducer from what the user wrote, or raise ValueError / TypeError."""
        blocks = stage_blocks(at, shape.depth)
        schedule = keep_schedule(keep_rate, keep, len(blocks), shape.patches)
        return cls(blocks, schedule, backend=backend, **options)  # type: ignore[call-arg, arg-type, misc]

    def before(self, block: AttentionBlock, tokens: Tokens, stage: int) -> Tokens:
        """Reduce the tokens that enter the block of this stage; by default they pass."""
        return tokens

    def attend(self, block: AttentionBlock, tokens: Tokens, stage: int) -> Tokens:
        """Run the attention half of the block of this stage, residual included, and reduce in it."""
        return attend_all(block, tokens)

    def attend_between(self, block: AttentionBlock, tokens: Tokens) -> Tokens:
        """Run the attention half of a block without a stage, from block :attr:`first` on."""
        return attend_all(block, tokens)

    @property
    def untrained(self) -> bool:
        """Whether the method brings layers of its own, which mean nothing until they are trained or loaded."""
        return next(self.parameters(), None) is not None

    def concerns(self, shape: ModelShape) -> dict[str, str]:
        """Return what a user should know of this method on a model of this shape: kind of concern -> message."""
        if not self.untrained:
            return {}
        return {
            f"untrained {self.name}": f"{self.name} adds layers with random weights (model.reducers): train the model, "
            "or load weights with fastreduce.load_official; until then its predictions mean little"
        }

    def warn(self, shape: ModelShape) -> None:
        """Warn of every concern, once a process and kind."""
        for kind, message in self.concerns(shape).items():
            warn_once(kind, message)

    def reschedule(
        self,
        shape: ModelShape,
        *,
        keep_rate: KeepRate = None,
        keep: Keep = None,
        at: int | Sequence[int] | None = None,
    ) -> None:
        """Take another schedule in place, and keep everything else, trained layers above all.

        Args:
            shape: the model's.
            keep_rate: as in :func:`fastreduce.patch`.
            keep: instead, the counts.
            at: other blocks; None leaves the stages where they are.

        Raises:
            ValueError: values out of range, or a method whose layers or patterns were made for its own schedule; the
                reducer is as it was.
            TypeError: values of the wrong kind.
        """
        raise ValueError(f"{self.name} cannot take another schedule: call fastreduce.unpatch and patch again")

    def _new_blocks(self, shape: ModelShape, at: int | Sequence[int] | None) -> tuple[int, ...]:
        """Check ``at`` for :meth:`reschedule`: layers are made for a number of stages."""
        blocks = self.blocks if at is None else stage_blocks(at, shape.depth)
        if self.untrained and len(blocks) != len(self.blocks):
            raise ValueError(f"{self.name} has layers for {len(self.blocks)} stages, got at={at!r}")
        return blocks

    @property
    def first(self) -> int:
        """The first block that the reducer has to do with: that of the first stage, or one before it."""
        return self.blocks[0]

    def opens(self, index: int) -> bool:
        """Whether the attention of a block is always done in parts; where it is not, the block's own is called."""
        return index in self.blocks and type(self).attend is not Reducer.attend

    @abc.abstractmethod
    def counts(self, shape: ModelShape) -> list[int]:
        """Patch tokens after each stage, on a model of this shape (a fused token counts)."""

    def extra_repr(self) -> str:
        """The method and where it acts."""
        return f"{self.name}, blocks={self.blocks}, backend={self.backend!r}"


class ScheduledReducer(Reducer):
    """A reducer that leaves as many patch tokens as its schedule says.

    Args:
        blocks: where the stages stand.
        schedule: tokens after each stage.
        backend: see :func:`fastreduce.backend`.
    """

    def __init__(self, blocks: tuple[int, ...], schedule: KeepSchedule, backend: str = "auto"):
        super().__init__(blocks, backend)
        self.schedule = schedule

    def counts(self, shape: ModelShape) -> list[int]:
        """Patch tokens after each stage."""
        return [self.schedule.count(stage, shape.patches) for stage in range(len(self.blocks))]

    def concerns(self, shape: ModelShape) -> dict[str, str]:
        """Stages that the schedule leaves nothing to do, beside what every method may be concerned about."""
        return super().concerns(shape) | ({} if self.ragged else idle_stages(self.name, self.schedule))

    def reschedule(
        self,
        shape: ModelShape,
        *,
        keep_rate: KeepRate = None,
        keep: Keep = None,
        at: int | Sequence[int] | None = None,
    ) -> None:
        """Take another schedule in place, and keep everything else."""
        blocks = self._new_blocks(shape, at)
        self.schedule = new_schedule(keep_rate, keep, blocks, shape)
        self.blocks = blocks


def new_schedule(keep_rate: KeepRate, keep: Keep, blocks: tuple[int, ...], shape: ModelShape) -> KeepSchedule:
    """Read the schedule that :meth:`Reducer.reschedule` takes; there is no default."""
    if keep_rate is None and keep is None:
        raise ValueError("give a keep_rate, or counts as keep")
    return keep_schedule(keep_rate, keep, len(blocks), shape.patches)


def idle_stages(name: str, schedule: KeepSchedule) -> dict[str, str]:
    """Return the concern that some stages of a method that selects keep as much as the stage before."""
    idle = [stage + 1 for stage in schedule.idle()]
    if not idle:
        return {}
    values = schedule.fractions if schedule.fractions is not None else schedule.counts
    stages = f"stage{'s' if len(idle) > 1 else ''} {' and '.join(map(str, idle))}"
    return {
        "idle stages": f"{name} with {'keep_rate' if schedule.fractions is not None else 'keep'}={list(values or ())}: "
        f"{stages} will do nothing, since the entries are fractions of all patches (or counts), not of what the stage "
        "before left; for a rate at every stage give a single number"
    }


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling a module does what its class does: no hook on it, and no forward of its own.

    Hooks on all modules (``register_module_forward_hook``) do not count: counters of operations use them, and are to
    count what is done without them.
    """
    forward = module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__
    backward = module._backward_pre_hooks or module._backward_hooks
    return not forward and not backward


# Subclasses of Tensor that stand for one while a graph is captured; others (quantised, sharded) multiply on their own.
_PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)


def is_bare(layer: nn.Module) -> bool:
    """Whether a layer is a linear map and nothing else: hooks may compute its weight (pruning) or change its output.

    A subclass (parametrised, quantised, an adapter, sharded) is not, nor a weight that is a tensor of its own kind.
    """
    return type(layer) is nn.Linear and type(layer.weight) in _PLAIN_TENSORS and is_unhooked(layer)


def attend_all(block: AttentionBlock, tokens: Tokens) -> Tokens:
    """Run the attention half of a block that reduces nothing."""
    normed = block.norm(tokens.x) if tokens.normed is None else tokens.normed
    return tokens.replace(tokens.x + block.whole_branch(normed, tokens))


def early_heads(block: AttentionBlock, tokens: Tokens) -> tuple[Tokens, Tensor, tuple[Tensor, Tensor, Tensor], bool]:
    """Begin the attention half for a method that selects: tokens, (B, N, C) normed, query, key and value, whether late.

    Late: the selected tokens have yet to attend. Where something in the block may look at more than one token (a hook,
    a module of the user's), all tokens have attended, and the residual is in ``tokens.x`` already.
    """
    normed = block.norm(tokens.x) if tokens.normed is None else tokens.normed
    if block.rowwise:
        return tokens, normed, block.early_query_key_value(normed, tokens), True
    heads, branch = block.heads_and_branch(normed, tokens)
    return tokens.replace(tokens.x + branch), normed, heads, False


def gather(norm: Norm | None, x: Tensor, index: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """:func:`ops.gather_tokens`, and what the norm makes of its rows if there is one."""
    if norm is None:
        return ops.gather_tokens(x, index, **options), None
    return ops.gather_tokens(x, index, norm=norm, **options)


def fuse(
    norm: Norm | None, x: Tensor, order: Tensor, scores: Tensor, k: int, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """:func:`ops.fuse_tokens`, and what the norm makes of its rows if there is one."""
    if norm is None:
        return ops.fuse_tokens(x, order, scores, k, **options), None
    return ops.fuse_tokens(x, order, scores, k, norm=norm, **options)


def merge(
    norm: Norm | None, x: Tensor, slot: Tensor, num_out: int, **options: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`ops.merge_tokens`, and what the norm makes of its rows if there is one."""
    if norm is None:
        return *ops.merge_tokens(x, slot, num_out, **options), None
    return ops.merge_tokens(x, slot, num_out, norm=norm, **options)


def importance(block: AttentionBlock, q: Tensor, k: Tensor, prefix: int, *, backend: Resolved) -> Tensor:
    """Score of every patch token, (B, N - prefix): class attention, or what it receives where there is no class token.

    Both are averages over heads of softmax weights, the second also over queries; each sums to at most one per image.
    Scores are those before attention dropout. ``q`` (B, H, M, D) needs only row 0 where there is a class token.
    """
    if block.has_class_token:
        return ops.cls_scores(q[:, :, 0], k, prefix=prefix, scale=block.scale, backend=backend)
    return _received_importance(ops.received_scores(q, k, scale=block.scale, backend=backend), q, prefix)


def attend_with_importance(
    block: AttentionBlock, q: Tensor, k: Tensor, v: Tensor, normed: Tensor, tokens: Tokens
) -> tuple[Tensor, Tensor]:
    """Attention of all tokens (B, N, H * D), and their :func:`importance`."""
    if block.has_class_token:
        return block.attention_and_class(q, k, v, normed, tokens)
    attended, received = block.attention_and_received(q, k, v, normed, tokens, differentiable=True)
    return attended, _received_importance(received, q, tokens.prefix)


def _received_importance(received: Tensor, q: Tensor, prefix: int) -> Tensor:
    return received[:, prefix:] / (q.shape[1] * q.shape[2])
