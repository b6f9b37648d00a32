"""The two values of reduction: what walks the model (:class:`Tokens`) and what a stage decided (:class:`Plan`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from . import ops
from .backends import Resolved

__all__ = [
    "Packing",
    "Plan",
    "SoftWeights",
    "Tokens",
    "check_fill",
    "compose_kept",
    "compose_slots",
    "compose_sources",
    "unmerge",
]


@dataclasses.dataclass(frozen=True)
class SoftWeights:
    """The weight matrix of a soft merge.

    ``log W[b, n, k] = logits[b, n, k] + token[b, n] + cluster[b, k] - logsumexp[b, k]``.

    Attributes:
        logits: (B, num_in, num_out), or a function that computes them: of long inputs they are not kept.
        token: (B, num_in) or None for zeros.
        cluster: (B, num_out) or None for zeros.
        logsumexp: (B, num_out) or None for zeros.
    """

    logits: Tensor | Callable[[], Tensor]
    token: Tensor | None = None
    cluster: Tensor | None = None
    logsumexp: Tensor | None = None

    def detach(self) -> SoftWeights:
        """Return the weights without gradient: a plan is for looking at."""
        parts = (self.token, self.cluster, self.logsumexp)
        logits = self.logits.detach() if isinstance(self.logits, Tensor) else self.logits
        return SoftWeights(logits, *(None if part is None else part.detach() for part in parts))

    def log(self) -> Tensor:
        """Return log W (B, num_in, num_out), float32 or wider."""
        logits = self.logits if isinstance(self.logits, Tensor) else self.logits()
        log_weights = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.token is not None:
            log_weights = log_weights + self.token.unsqueeze(2)
        if self.cluster is not None:
            log_weights = log_weights + self.cluster.unsqueeze(1)
        if self.logsumexp is not None:
            log_weights = log_weights - self.logsumexp.unsqueeze(1)
        return log_weights


@dataclasses.dataclass(frozen=True)
class Plan:
    """A decision of one stage about its patch tokens. Indices do not count the prefix tokens, unless said.

    A selection gives ``kept``, a matching ``slot``, a clustering both, a soft merge ``weights``; :meth:`slots` has the
    form common to all methods.

    Attributes:
        block: index of the transformer block.
        num_in: patch tokens before the stage.
        num_out: patch tokens after it.
        kept: (B, K) indices of the tokens that stay, in their new order, or (K,) where they are the same for every
            image (radial); of a clustering the centres; or None.
        fused: one more token follows the kept ones, made of all the others (EViT).
        slot: (B, slot_prefix + num_in) the output token that each token went into, or None.
        slot_prefix: prefix tokens that ``slot`` counts, among the tokens as in its values.
        valid: (B, K) bool, which of the kept ones are real (ATS, whose images keep different numbers), or None for all.
        weights: the weights of a soft merge, or None.
        seat: (B, num_out) the input token whose position each output token takes over, where neither ``kept`` nor
            ``weights`` says it (ToMe); made only where positions are asked for.
    """

    block: int
    num_in: int
    num_out: int
    kept: Tensor | None = None
    fused: bool = False
    slot: Tensor | None = None
    slot_prefix: int = 0
    valid: Tensor | None = None
    weights: SoftWeights | None = None
    seat: Tensor | None = None

    @property
    def merges(self) -> bool:
        """True if an output token can stand for several input tokens."""
        return self.fused or self.slot is not None or self.weights is not None

    def place(self, place: Tensor) -> Tensor:
        """Return where the output tokens are, (B, num_out) int32, for where the input tokens are, (B, num_in).

        Kept tokens keep their place, clusters have their centre's, soft merges their strongest source's, other
        merges the place of :attr:`seat`, or of their first member; a fused token and padding have none, -1.
        """
        batch = place.shape[0]
        index = self.seat if self.seat is not None else self.sources(batch)
        if index is None:
            index = self._first_members(batch)
        index = index.long()
        return torch.where(index < 0, -1, place.gather(1, index.clamp_min(0))).to(place.dtype)

    def real(self, valid: Tensor, prefix: int) -> Tensor:
        """Say which output tokens (B, prefix + num_out) are no padding; ``valid`` says it of the input tokens.

        A fused token is real where one of those in it is.
        """
        patches = valid[:, prefix:]
        kept = patches.gather(1, self._kept(valid.shape[0]).clamp_min(0))
        parts = [valid[:, :prefix], kept]
        if self.fused:
            parts.append(patches.sum(1, keepdim=True) > kept.sum(1, keepdim=True))
        return torch.cat(parts, dim=1)

    def _first_members(self, batch: int) -> Tensor:
        """Return (B, num_out): the first input token that went into each output token."""
        slot = self.slots(batch).long()
        if torch.compiler.is_exporting():  # a scatter that takes the lowest is wrong in some of ONNX's runtimes
            members = slot.unsqueeze(1) == torch.arange(self.num_out, device=slot.device).unsqueeze(1)
            return members.int().argmax(2)
        order = torch.arange(self.num_in, device=slot.device).expand_as(slot)
        first = slot.new_full((batch, self.num_out), self.num_in)
        return first.scatter_reduce(1, slot, order, "amin").remainder(self.num_in)

    def _kept(self, batch: int) -> Tensor:
        """Return the kept indices (B, K) int64, -1 where an entry is not real."""
        assert self.kept is not None
        kept = self.kept.expand(batch, -1).long()
        return kept if self.valid is None else kept.masked_fill(~self.valid, -1)

    def slots(self, batch: int) -> Tensor:
        """Return (B, num_in): the output token of every input token, -1 for dropped ones.

        A token of a soft merge has the strongest.
        """
        if self.slot is not None:
            return self.slot[:, self.slot_prefix :] - self.slot_prefix if self.slot_prefix else self.slot
        if self.weights is not None:
            return self.weights.log().argmax(2)
        kept = self._kept(batch)
        rest = self.num_out - 1 if self.fused else -1
        # One column more, for what is not real.
        slot = kept.new_full((batch, self.num_in + 1), rest)
        order = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        return slot.scatter(1, torch.where(kept < 0, self.num_in, kept), order)[:, : self.num_in]

    def kept_indices(self, batch: int) -> Tensor | None:
        """Return (B, num_out): the index of the input token that each output token is, of a clustering its centre.

        -1 for a fused one and for padding; None where tokens are merged without centres.
        """
        if self.kept is None:
            return None
        kept = self._kept(batch)
        return torch.nn.functional.pad(kept, (0, 1), value=-1) if self.fused else kept

    def sources(self, batch: int) -> Tensor | None:
        """Return (B, num_out): the input token that weighs most in each output token, see :meth:`kept_indices`."""
        return self.kept_indices(batch) if self.weights is None else self.weights.log().argmax(1)


def compose_slots(plans: Sequence[Plan], batch: int) -> Tensor:
    """Return (B, P): the token that every original patch is in after all ``plans``, -1 where it was dropped."""
    current = plans[0].slots(batch)
    for plan in plans[1:]:
        following = plan.slots(batch).gather(1, current.clamp_min(0))
        current = torch.where(current < 0, current, following)
    return current


def _compose(indices: Sequence[Tensor | None]) -> Tensor | None:
    current = indices[0]
    for index in indices[1:]:
        if current is None or index is None:
            return None
        current = torch.where(index < 0, index, current.gather(1, index.clamp_min(0)))
    return current


def compose_kept(plans: Sequence[Plan], batch: int) -> Tensor | None:
    """Return (B, num_out): the original patch that every token is after all ``plans``.

    It is -1 for a fused token; None is returned after a merge.
    """
    return _compose([plan.kept_indices(batch) for plan in plans])


def compose_sources(plans: Sequence[Plan], batch: int) -> Tensor | None:
    """Return (B, num_out): the original patch that weighs most in every token.

    Patches are followed stage by stage; see :class:`Plan`.
    """
    return _compose([plan.sources(batch) for plan in plans])


def _with_prefix(slot: Tensor, prefix: int) -> Tensor:
    """Turn (B, P) slots of patches, -1 for none, into (B, prefix + P) rows of the whole sequence, prefix rows first."""
    slot = torch.where(slot < 0, slot, slot + prefix)
    if not prefix:
        return slot
    head = torch.arange(prefix, device=slot.device, dtype=slot.dtype).expand(slot.shape[0], prefix)
    return torch.cat([head, slot], dim=1)


def compose_mass(plans: Sequence[Plan], batch: int) -> Tensor:
    """Count the original patches, fractions too, that every token stands for after all plans: (B, num_out) float32.

    A soft merge shares a patch out among its tokens, in proportion to the patch's weights in them; so the sum over
    tokens is the number of patches that were not dropped. Of a hard merge it is the number of its patches.
    """
    mass = None
    for plan in plans:
        if plan.weights is not None:
            shares = plan.weights.log().softmax(dim=2)  # (B, num_in, num_out)
            mass = shares.sum(1) if mass is None else (mass.to(shares.dtype).unsqueeze(1) @ shares).squeeze(1)
            continue
        slot = plan.slots(batch).long()
        counted = torch.ones_like(slot, dtype=torch.float32) if mass is None else mass
        # One column more, for what was dropped.
        sums = counted.new_zeros(batch, plan.num_out + 1)
        mass = sums.scatter_add(1, torch.where(slot < 0, plan.num_out, slot), counted)[:, : plan.num_out]
    assert mass is not None
    return mass


def check_fill(fill: str) -> None:
    """Raise unless ``fill`` says what a dropped patch shows."""
    if fill not in ("last", "zero"):
        raise ValueError(f"fill must be 'last' or 'zero', got {fill!r}")


def unmerge(
    x: Tensor,
    plans: Sequence[Plan],
    prefix: int,
    *,
    inputs: Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Bring tokens back to the full sequence: every patch gets the token that it is in.

    Args:
        x: (B, prefix + n, C) tokens after the last of ``plans``.
        plans: the plans from the first stage on, at least one.
        prefix: leading tokens that are never reduced.
        inputs: (B, any prefix + num_in, C) the tokens that entered the block of each plan, or None. A dropped patch
            shows the last of these that it was in; without them zeros.
        backend: see :func:`fastreduce.backend`.

    Returns:
        (B, prefix + P, C).
    """
    if inputs is None:
        return ops.unmerge_tokens(x, _with_prefix(compose_slots(plans, x.shape[0]), prefix), backend=backend)
    for plan, before in zip(reversed(plans), reversed(inputs), strict=True):
        slot = plan.slots(x.shape[0])
        x = ops.unmerge_tokens(x, _with_prefix(slot, prefix), backend=backend)
        if not plan.merges:  # a merge drops nothing
            patches = before[:, before.shape[1] - plan.num_in :].to(x.dtype)
            seen = torch.where((slot < 0).unsqueeze(2), patches, x[:, prefix:])
            x = torch.cat([x[:, :prefix], seen], dim=1) if prefix else seen
    return x


_NOT_A_TENSOR = (
    "the blocks of a reduced model hand on fastreduce.Tokens (tokens with their sizes and history), not a tensor: "
    "call model.blocks as a whole, or take `.x` from what a block returns"
)
# Calls that hooks make on a block's output without changing it, so that Grad-CAM, torchinfo and probes go on working.
_LOOKS = frozenset(
    {"shape", "dtype", "device", "ndim", "dim", "size", "numel", "element_size", "is_cuda", "layout", "requires_grad"}
    | {"grad", "grad_fn", "is_leaf", "register_hook", "retain_grad", "data", "detach", "cpu", "float", "mean", "std"}
)


def _explain(*arguments: Any) -> NoReturn:
    raise TypeError(_NOT_A_TENSOR)


@dataclasses.dataclass(frozen=True)
class Packing:
    """A layout of the tokens of all images in one row, without padding between them.

    Attributes:
        offsets: (B + 1,) int32 on the tokens' device: image b's are rows ``offsets[b] .. offsets[b + 1]``.
        longest: no image has more tokens. The host knows it without waiting for the device, so it is a bound.
    """

    offsets: Tensor
    longest: int

    @property
    def batch(self) -> int:
        """Number of images."""
        return self.offsets.shape[0] - 1

    def spread(self, values: Tensor, rows: int) -> Tensor:
        """Turn (B, ...) values of images into (rows, ...) values of every row's image."""
        row = torch.arange(rows, dtype=self.offsets.dtype, device=self.offsets.device)
        return values.index_select(0, torch.searchsorted(self.offsets[1:], row, right=True).clamp_(max=self.batch - 1))


class _Fields(NamedTuple):
    x: Tensor
    prefix: int
    patches: int
    backend: Resolved = "reference"
    normed: Tensor | None = None
    sizes: Tensor | None = None
    bias: Tensor | None = None
    valid: Tensor | None = None
    received: Tensor | None = None
    policy: Tensor | None = None
    decisions: tuple[Tensor, ...] = ()
    plans: tuple[Plan, ...] = ()
    packing: Packing | None = None
    grid: tuple[int, int] | None = None
    whole: bool = False
    place: Tensor | None = None
    beside: Any = None
    inputs: tuple[Tensor, ...] | None = None


class Tokens(_Fields):
    """The value that walks from block to block of a reduced model.

    A tuple whose first entry is ``x``, so that hooks of torch and of tools find the tensors in it.

    Attributes:
        x: (B, N, C) tokens, prefix first; packed (1, T, C), of which only the rows of images mean something.
        prefix: number of leading tokens that are never reduced (class, distillation, registers).
        patches: number of patch tokens before any reduction.
        backend: what runs, kernels or references: decided once a pass.
        normed: (B, N, C) what the norm that comes next makes of ``x``, where a reduction has applied it, else None. It
            does not outlive ``x``.
        sizes: (B, N) float32, how many patches each token stands for, or None while all are one.
        bias: (B, N) float32 that attention adds to the logits of every key: the logarithm of the size where attention
            is proportional to it (ToMe), -inf for tokens that are not valid; or None for zeros.
        valid: (B, N) bool, or None while all tokens are real (ATS pads, and so may images have been). Packed tokens
            keep what it will be once they are unpacked.
        received: (B, N) attention that every token got in the block before, summed over heads and queries, where the
            next stage asks for it (K-Medoids), else None.
        policy: (B, N) 1 for tokens that attention sees and 0 for others, differentiable (DynamicViT in training).
        decisions: (B, P) each, what DynamicViT's stages so far decided in training: 1 for kept, differentiable.
        plans: what the stages so far decided.
        packing: where the tokens of every image are, if they lie packed in one row, else None.
        grid: (rows, columns) of the patches before any reduction, for methods that ask for it, else None.
        whole: whether the last block hands on Tokens too, for dense features.
        place: (B, n) int32, the original patch whose position each patch token has, -1 for none (EViT's fused token,
            padding); or None where the model asks for no positions inside its blocks.
        beside: what the model gave the block at hand beside the tokens (a rotary table, a bias for each pair), as its
            host reads it; or None.
        inputs: the ``x`` that entered the block of each plan, where dropped patches will be asked for,
            else None.
    """

    @property
    def batch(self) -> int:
        """Number of images."""
        return self.x.shape[0] if self.packing is None else self.packing.batch

    @property
    def num_patches(self) -> int:
        """Patch tokens at this point, of packed tokens the most that an image has."""
        return (self.x.shape[1] if self.packing is None else self.packing.longest) - self.prefix

    def replace(self, x: Tensor, **changes: Any) -> Tokens:
        """Return the tokens with another ``x``, and whatever else changes."""
        # Not by _replace: torch.compile in torch 2.11 makes an empty tuple of it. ``normed`` belongs to another x.
        kept: dict[str, Any] = {"prefix": self.prefix, "patches": self.patches, "backend": self.backend}
        kept |= {"sizes": self.sizes, "bias": self.bias, "valid": self.valid, "received": self.received}
        kept |= {"policy": self.policy, "decisions": self.decisions, "plans": self.plans, "packing": self.packing}
        kept |= {"grid": self.grid, "whole": self.whole, "place": self.place, "beside": self.beside}
        return Tokens(x, **(kept | {"inputs": self.inputs} | changes))

    def reduced(self, x: Tensor, plan: Plan, **changes: Any) -> Tokens:
        """Return what a stage leaves: other tokens ``x``, one plan more, and the places that follow from it.

        Args:
            x: (B, prefix + plan.num_out, C).
            plan: what the stage decided.
            **changes: other fields, as in :meth:`replace`; ``before=`` the x that entered, where it is not ``self.x``.
        """
        before = changes.pop("before", self.x)
        kept: dict[str, Any] = {"prefix": self.prefix, "patches": self.patches, "backend": self.backend}
        kept |= {"sizes": self.sizes, "bias": self.bias, "valid": self.valid, "received": self.received}
        kept |= {"policy": self.policy, "decisions": self.decisions, "packing": self.packing, "grid": self.grid}
        kept |= {"whole": self.whole, "beside": self.beside, "plans": (*self.plans, plan)}
        if self.place is not None:
            kept["place"] = plan.place(self.place)
        if self.inputs is not None:
            kept["inputs"] = (*self.inputs, before)
        if self.valid is not None and "valid" not in changes:  # padding from the start
            kept["valid"] = plan.real(self.valid, self.prefix)
            kept["bias"] = kept["valid"].float().log()
        return Tokens(x, **(kept | changes))

    def packed(self) -> tuple[Tokens, Packing]:
        """Return the tokens in one row, and how they lie in it. If they are not packed yet, all must be real."""
        if self.packing is not None:
            return self, self.packing
        assert self.valid is None
        batch, tokens, channels = self.x.shape
        starts = torch.arange(batch + 1, dtype=torch.int32, device=self.x.device) * tokens
        packing = Packing(starts, tokens)
        return self.replace(self.x.reshape(1, batch * tokens, channels), packing=packing), packing

    def unpacked(self) -> Tokens:
        """Return the tokens with a row for every image, zeros behind the shorter ones."""
        if self.packing is None:
            return self
        x = ops.unpack_tokens(self.x, self.packing.offsets, longest=self.packing.longest, backend=self.backend)
        return self.replace(x, packing=None)

    def dense(self, fill: str = "zero") -> Tensor:
        """Return ``x`` on the full grid, (B, prefix + patches, C).

        Args:
            fill: what a dropped patch shows: ``"zero"``, or ``"last"``, its value as it entered the block that dropped
                it, for which ``inputs`` must have been kept.
        """
        if self.packing is not None:
            return self.unpacked().dense(fill)
        if not self.plans:
            return self.x
        inputs = None
        if fill == "last":
            assert self.inputs is not None
            inputs = self.inputs
        return unmerge(self.x, self.plans, self.prefix, inputs=inputs, backend=self.backend)

    def mass(self) -> Tensor:
        """Count the patches that every patch token stands for (B, n), see :func:`compose_mass`; at least one plan."""
        return compose_mass(self.plans, self.batch)

    def __getattr__(self, name: str) -> Any:
        """Look at ``x`` as at a tensor; what would change it without what belongs to it explains itself."""
        if name in _LOOKS:
            return getattr(self.x, name)
        explained = hasattr(Tensor, name) and not name.startswith("__")
        raise AttributeError(_NOT_A_TENSOR if explained else f"'Tokens' object has no attribute {name!r}")

    def __getitem__(self, key: Any) -> Any:
        """Return one of the fields; ``[:, 0]`` and the like explain themselves."""
        return super().__getitem__(key) if isinstance(key, int) else _explain()

    __array__ = _explain
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _explain
    __matmul__ = __rmatmul__ = __pow__ = __neg__ = __abs__ = __lt__ = __le__ = __gt__ = __ge__ = _explain

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise TypeError(_NOT_A_TENSOR)
