"""Look at a reduced model: whether it is one, and what its stages kept and merged in a forward pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .arguments import counted
from .reducers import Reducer
from .tokens import Plan, Tokens, check_fill, compose_kept, compose_slots, compose_sources, unmerge

__all__ = ["ACTIVE", "Record", "Stage", "is_patched", "note", "patched_model", "record", "reducer_of"]


def _path_of_reducer(model: nn.Module) -> list[str] | None:
    """Return the names that lead from a module to the model in it that is patched, or None where there is none."""
    for name, module in model.named_modules():
        if isinstance(module, Reducer):
            path = name.split(".")
            return path[: path.index("reducers")] if "reducers" in path else path[:-1]
    return None


def patched_model(model: nn.Module) -> Any:
    """Return the model that was patched: the argument, or what ``torch.compile`` made of it.

    Raises:
        ValueError: if it is not patched, or if the patched model is inside of it (``nn.DataParallel``, PEFT, ...); the
            message says where.
    """
    path = _path_of_reducer(model)
    if path is None:
        raise ValueError("the model is not patched; call fastreduce.patch first")
    while path and path[0] == "_orig_mod":
        model, path = model.get_submodule("_orig_mod"), path[1:]
    if path:
        raise ValueError(f"the patched model is inside this {type(model).__name__}: give its .{'.'.join(path)}")
    return model


def is_patched(model: nn.Module) -> bool:
    """Return whether :func:`fastreduce.patch` was called on this model, or on one inside of it."""
    return _path_of_reducer(model) is not None


def reducer_of(model: nn.Module) -> Reducer:
    """Return the reducer of a patched model, ``model.reducers``.

    Raises:
        ValueError: if the model is not patched.
    """
    return patched_model(model).reducers


class Stage:
    """The work of one stage on one batch. Indices never count the prefix tokens (class, distillation, registers).

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

    def __init__(self, plans: Sequence[Plan], batch: int, prefix: int, inputs: Sequence[Tensor] | None = None):
        self._plans, self._prefix, self._inputs = tuple(plans), prefix, inputs
        plan = plans[-1]
        self.block, self.num_in, self.num_out = plan.block, plan.num_in, plan.num_out
        kept = plan.kept_indices(batch)
        self.kept = None if kept is None else kept.clone()  # a copy, not a view of radial's own pattern
        self.kept_patches = compose_kept(plans, batch)
        self.sources = compose_sources(plans, batch)
        self.fused = plan.fused
        self.merges = plan.slot is not None
        self.slot = plan.slots(batch)
        self.patch_slot = compose_slots(plans, batch)
        counts = torch.zeros(batch, self.num_out + 1, dtype=torch.int64, device=self.slot.device)
        ones = torch.ones_like(self.patch_slot)
        self.sizes = counts.scatter_add(1, self.patch_slot + 1, ones)[:, 1:]

    def __repr__(self) -> str:
        left = counted(self.num_out, "patch token")
        return f"Stage(block={self.block}, {self.num_in} -> {left}, batch={len(self.slot)})"

    @property
    def weights(self) -> Tensor | None:
        """See the class."""
        weights = self._plans[-1].weights
        return None if weights is None else weights.log().exp()

    def unmerge(self, features: Tensor, *, fill: Literal["last", "zero"] = "last") -> Tensor:
        """Bring this stage's features to the full grid.

        Args:
            features: (B, num_out, C) of the tokens behind the stage, or (B, prefix + num_out, C) with the prefix.
            fill: what a dropped patch shows: ``"last"``, its value as it entered the block that dropped it, for
                features of the tokens' width; ``"zero"`` for any.

        Returns:
            (B, P, C), or (B, prefix + P, C).

        Raises:
            ValueError: another number of tokens; with ``"last"``, features of another width.
        """
        check_fill(fill)
        rows = features.shape[1]
        if rows not in (self.num_out, self.num_out + self._prefix):
            raise ValueError(
                f"features must have {counted(self.num_out, 'token')} (or {self.num_out + self._prefix} with the "
                f"prefix), got {rows}"
            )
        inputs = self._inputs if fill == "last" else None
        if inputs and inputs[0].shape[2] != features.shape[2]:
            raise ValueError(
                f"fill='last' shows dropped patches as the blocks saw them, with {inputs[0].shape[2]} channels, got "
                f"features of {features.shape[2]}: give fill='zero'"
            )
        return unmerge(features, self._plans, rows - self.num_out, inputs=inputs)


class Record:
    """The work of the latest forward pass inside :func:`record`.

    Attributes:
        stages: every stage that reduced something, in order.
        decisions: (B, P) each, the keep decisions of DynamicViT's stages in training, 1 for kept, differentiable.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: nn.Module | None = model
        self._plans: tuple[Plan, ...] = ()
        self._inputs: tuple[Tensor, ...] | None = None
        self._made: list[Stage] | None = None
        self._batch = self._prefix = 0
        self.decisions: list[Tensor] = []

    def _note(self, tokens: Tokens) -> None:
        """Take over where a pass has come to. Tensors only: a compiled model runs this in its graph."""
        self._plans, self._batch, self._prefix = tokens.plans, tokens.batch, tokens.prefix
        self._inputs = tokens.inputs
        self.decisions, self._made = list(tokens.decisions), None

    @property
    def stages(self) -> list[Stage]:
        """See the class."""
        if self._made is None:
            plans, inputs = self._plans, self._inputs
            self._made = [
                Stage(plans[: end + 1], self._batch, self._prefix, None if inputs is None else inputs[: end + 1])
                for end in range(len(plans))
            ]
        return self._made

    def __repr__(self) -> str:
        stages = ", ".join(f"block {plan.block}: {plan.num_in} -> {plan.num_out}" for plan in self._plans)
        decided = f", {counted(len(self.decisions), 'decision')}" if self.decisions else ""
        return f"Record({stages or 'no stage'}{decided})"


class _Active(threading.local):
    """The records that are open in this thread. A class of its own, since torch.compile reads no ContextVar in 2.11.

    Without the empty slots torch.compile writes to another dictionary than that of the thread.
    """

    __slots__ = ()

    def __init__(self) -> None:
        self.records: tuple[Record, ...] = ()


ACTIVE = _Active()  # whether anybody records is looked up here, before note is called


def note(model: nn.Module, tokens: Tokens) -> None:
    """Tell the records of this thread where a pass of ``model`` has come to, at its start and at every stage."""
    for recorder in ACTIVE.records:
        if recorder._model is model:
            # Gradient checkpointing runs blocks again in the backward pass; a compiled graph does that by itself.
            if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
                return
            recorder._note(tokens)


@contextmanager
def record(model: nn.Module) -> Iterator[Record]:
    """Record what a patched model keeps and merges, in passes of this thread.

    Example::

        with fastreduce.record(model) as seen:
            model(images)
        seen.stages[0].kept_patches      # (B, num_out)

    A stage that reduces nothing (keep rate 1) leaves no entry. Records can be nested. Copies of the model that are made
    meanwhile record nothing. A compiled model is compiled once more, for passes that are recorded.

    Raises:
        ValueError: if the model is not patched, or if the patched model is inside of it; the message says where.
    """
    recorder = Record(patched_model(model))
    ACTIVE.records = (*ACTIVE.records, recorder)
    try:
        yield recorder
    finally:
        ACTIVE.records = tuple(other for other in ACTIVE.records if other is not recorder)
        recorder._model = None
