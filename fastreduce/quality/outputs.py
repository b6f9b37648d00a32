"""Outputs of one forward pass that fidelity is measured on, of a reduced model as of an unreduced one."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..integrations.hf.images import head_of, hold_input
from ..integrations.registry import host_of
from ..integrations.timm import unpatch
from ..recording import Stage, is_patched, patched_model, record
from ..reducers import Reducer
from ..tokens import Tokens

__all__ = ["Outputs", "block_inputs", "model_outputs", "shared_copy", "unreduced_copy"]


class Outputs(NamedTuple):
    """The outputs of a model for a batch of B images, P patches in an unreduced image, C channels.

    Attributes:
        pooled: (B, C) what the head reads.
        logits: (B, classes), or None for a model without a head.
        class_token: (B, C) after the last norm, or None for a model without a class token.
        patches: (B, P, C) after the last norm, on the full grid: merged patches show the token that they are in,
            dropped ones zeros; None for models that do not hand them out.
        patches_last: (B, P, C) the same, but dropped patches show their own last token: what entered the block that
            dropped them, after the last norm.
    """

    pooled: Tensor
    logits: Tensor | None
    class_token: Tensor | None
    patches: Tensor | None = None
    patches_last: Tensor | None = None

    def take(self, rows: slice) -> Outputs:
        """Return the outputs of some of the images."""
        return Outputs(*(None if value is None else value[rows] for value in self))  # type: ignore[arg-type]


def _filled_with_last(
    dense: Tensor, stages: Sequence[Stage], entering: dict[int, Tokens | Tensor], prefix: int, norm: Any
) -> Tensor:
    """Give every dropped patch the token that it was when it entered the block that dropped it."""
    there = torch.arange(dense.shape[1], device=dense.device).expand(dense.shape[:2])
    for stage in stages:
        gone = (there >= 0) & (stage.patch_slot < 0)
        if gone.any():
            tokens = entering[stage.block]
            rows = (tokens.unpacked().x if isinstance(tokens, Tokens) else tokens)[:, prefix:]
            index = there.clamp_min(0).unsqueeze(2).expand(-1, -1, rows.shape[2])
            dense = torch.where(gone.unsqueeze(2), norm(rows.gather(1, index)).to(dense.dtype), dense)
        there = stage.patch_slot
    return dense


@contextlib.contextmanager
def _entering(blocks: Sequence[nn.Module], at: Sequence[int]) -> Iterator[dict[int, Tokens | Tensor]]:
    """Hold what enters some of the blocks."""
    seen: dict[int, Tokens | Tensor] = {}

    def hold(index: int) -> Any:
        return lambda module, inputs: seen.__setitem__(index, inputs[0])

    handles = [blocks[index].register_forward_pre_hook(hold(index)) for index in at]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def check_kind(model: Any) -> Any:
    """Return the model that was patched, or the argument if it is unreduced.

    Raises:
        TypeError: no model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fidelity takes a model (torch.nn.Module), got {model!r}")
    return patched_model(model) if is_patched(model) else model


def _has_dense_features(host: Any) -> bool:
    """Return whether a model is one of timm's, which hands out its patches on the full grid."""
    return all(hasattr(host, name) for name in ("forward_intermediates", "forward_head", "blocks", "num_prefix_tokens"))


def _answer(host: nn.Module, images: Tensor) -> Outputs:
    """Return what a call of any other model gives: a tensor, or an output with logits or pooled features."""
    seen: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        if (head := head_of(host)) is not None:
            stack.callback(head.register_forward_pre_hook(hold_input(seen)).remove)
        found: Any = host(images)
    found = found[0] if isinstance(found, tuple) and type(found) is tuple else found
    if isinstance(found, Tensor) and found.ndim == 2:
        return Outputs(found, None, None)
    logits = getattr(found, "logits", None)
    given = (seen.get("pooled"), *(getattr(found, name, None) for name in ("pooler_output", "image_embeds")), logits)
    pooled = next((one for one in given if one is not None), None)
    if pooled is None or pooled.ndim != 2:
        raise TypeError(
            "fidelity takes a timm Vision Transformer, or a model that gives (B, C) features or logits, and "
            f"{type(host).__name__} gives {type(found).__name__}"
        )
    return Outputs(pooled, logits, None)


class _Given(nn.Module):
    """A block that hands on what a pass before had made of the images there."""

    def __init__(self, tokens: Tensor):
        super().__init__()
        self.tokens = tokens

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.tokens


@contextlib.contextmanager
def _starting_with(host: Any, tokens: Tensor | None) -> Iterator[None]:
    """Have the blocks before a patched model's first reduced one hand on ``tokens`` instead of running."""
    first = host.reducers.first if tokens is not None else 0
    before = [host.blocks[index] for index in range(first)]
    try:
        for index in range(first):
            host.blocks[index] = _Given(tokens) if tokens is not None else before[index]
        yield
    finally:
        for index, block in enumerate(before):
            host.blocks[index] = block


@contextlib.contextmanager
def _zeros_for_dropped(reducer: Reducer) -> Iterator[None]:
    """Have dense features show zeros for dropped patches, whatever the user chose: what they were is put in here."""
    before = reducer.fill
    reducer.fill = "zero"
    try:
        yield
    finally:
        reducer.fill = before


@torch.inference_mode()
def model_outputs(
    model: nn.Module, images: Tensor, *, last: bool = True, entering: Sequence[Tensor] | None = None
) -> Outputs:
    """Run a model once, and return everything that fidelity is measured on.

    Args:
        model: patched or not, in evaluation mode. Of other libraries' models only what they answer is compared.
        images: (B, 3, height, width), on the model's device and in its dtype.
        last: whether to make ``patches_last``; else it is ``patches``.
        entering: (B, N, C) for every block, what enters it in the unreduced model (:func:`block_inputs`), with which
            a patched model does not run the blocks before its first stage again.

    Raises:
        TypeError: a model whose features cannot be had.
    """
    host = check_kind(model)
    if not _has_dense_features(host):
        return _answer(host, images)
    reduced = is_patched(model)
    at = host.reducers.blocks if reduced and last else ()
    with contextlib.ExitStack() as stack:
        seen = stack.enter_context(record(host)) if reduced else None
        held = stack.enter_context(_entering(host.blocks, at))
        if reduced:
            stack.enter_context(_zeros_for_dropped(host.reducers))
        if reduced and entering is not None:
            stack.enter_context(_starting_with(host, entering[host.reducers.first]))
        features, patches, heads = _features(host, images)
    filled = patches
    if seen is not None and last:
        filled = _filled_with_last(patches, seen.stages, held, host_of(host).prefix(host), host.norm)
    pooled = host.forward_head(features, pre_logits=True)
    logits = host.forward_head(features) if getattr(host, "num_classes", 0) else None
    class_token = None
    if getattr(host, "cls_token", None) is not None:  # CaiT's comes behind the blocks
        class_token = heads[:, 0] if heads.shape[1] else features[:, 0]
    return Outputs(pooled.flatten(1), logits, class_token, patches, filled)


def _features(host: Any, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the head gets, and (B, P, C) patches on the full grid and (B, prefix, C) the rest, both normed."""
    options = {"indices": [len(host.blocks) - 1], "norm": True, "output_fmt": "NLC"}
    if host_of(host).prefix(host):
        features, [(patches, heads)] = host.forward_intermediates(images, return_prefix_tokens=True, **options)
        return features, patches, heads
    features, [patches] = host.forward_intermediates(images, **options)
    return features, patches, patches[:, :0]


@torch.inference_mode()
def block_inputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Return (B, N, C) for every block of an unreduced model, what enters it."""
    host = check_kind(model)
    with _entering(host.blocks, range(len(host.blocks))) as seen:
        host.forward_features(images)
    found = [seen[index] for index in range(len(host.blocks))]
    return [one if isinstance(one, Tensor) else one.x for one in found]


def shared_copy(model: nn.Module) -> Any:
    """Return a copy of the modules that shares every parameter and buffer."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def unreduced_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a patched model's modules without the reduction; parameters and buffers are shared.

    Raises:
        ValueError: if the model is not patched.
    """
    return unpatch(shared_copy(patched_model(model)))
