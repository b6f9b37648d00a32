"""Hidden states of a reduced encoder: what the library collects after each layer, on the full grid of patches."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...tokens import Tokens, unmerge
from .towers import known_name

__all__ = ["PASS", "forget_forwards", "forget_masks", "forget_passes", "masked_pooling", "watch_masks", "watch_passes"]

_MASKS = ("attention_mask", "pixel_attention_mask")


class _Pass(threading.local):
    """The pass at hand in this thread. No ContextVar, which torch.compile does not read.

    Without the empty slots torch.compile writes to another dictionary than that of the thread, and a value that one
    graph sets is lost to the next.

    Attributes:
        wanted: whether the caller wants hidden states on the full grid.
        tokens: what came out of the last layer, where they are wanted.
        masked: whether the caller gave a mask; where none was, libraries may hand layers one of ones.
        valid: (B, N) bool, which of the tokens behind the last layer are no padding, or None for all.
        kept: (B, n) patches that are left, where the pooling gets them of the full grid, else None.
    """

    __slots__ = ()

    def __init__(self) -> None:
        self.wanted = False
        self.tokens: Tokens | None = None
        self.masked = False
        self.valid: Tensor | None = None
        self.kept: Tensor | None = None


PASS = _Pass()


def _asked(module: Any, kwargs: dict[str, Any], name: str) -> Any:
    """Return an option of the call, or else of the configuration."""
    return kwargs.get(name, getattr(getattr(module, "config", None), name, None))


class _Before:
    """Forward pre-hook on the module that hands out hidden states of a patched model."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if _asked(module, kwargs, "output_attentions"):
            raise ValueError(
                "a reduced encoder gives no attentions, since it computes them for some of its tokens and layers: call "
                "it with output_attentions=False, or look at what it keeps with fastreduce.record"
            )
        reducer: Any = self.model.reducers
        # False, 0 and [0] differ: numbers choose layers.
        asked = _asked(module, kwargs, "output_hidden_states")
        wanted = asked is not None and asked is not False and reducer.hidden_states == "full"
        if wanted and reducer.packed:
            raise ValueError(
                "hidden states on the full grid cannot be made of packed tokens: patch the model with packed=False, or "
                "with hidden_states='reduced'"
            )
        if wanted != PASS.wanted:
            PASS.wanted = wanted


class _After:
    """Forward hook on the same module: gives every patch the token that it is in."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        tokens = None
        if PASS.wanted:
            tokens, PASS.tokens, PASS.wanted = PASS.tokens, None, False
        reducer: Any = self.model.reducers
        if isinstance(output, tuple):  # return_dict=False: the only tuple in it
            return tuple(_full(one, tokens, reducer.fill) if isinstance(one, tuple) else one for one in output)
        if getattr(output, "hidden_states", None) is None:
            return None
        # Some versions put what is behind the last norm in the place of the last state.
        normed = output.hidden_states[-1] is not None and output.hidden_states[-1] is output.get("last_hidden_state")
        output.hidden_states = _full(output.hidden_states, tokens, reducer.fill, normed)
        return output


def _full(states: Sequence[Any], tokens: Tokens | None, fill: str, normed: bool = False) -> tuple[Tensor | None, ...]:
    """Bring what entered the first layer, and came out of each, to the full grid if tokens say how; None stays None.

    ``normed``: the last is what the model's own code made of what it got, which may be the full grid already.
    """
    states = [state.x if isinstance(state, Tokens) else state for state in states]
    if tokens is None:
        return tuple(states)
    last = len(states) - 1
    made: list[Tensor | None] = []
    for index, state in enumerate(states):
        number = sum(plan.block < index for plan in tokens.plans)  # stages up to layer index - 1
        is_there = index == last and normed and state.shape[1] == tokens.prefix + tokens.patches
        if state is None or not number or is_there:
            made.append(state)
        elif index == last and not normed:  # the model may have got something else for its pooling
            made.append(tokens.dense(fill))
        else:
            inputs = tokens.inputs[:number] if fill == "last" and tokens.inputs is not None else None
            plans = tokens.plans[:number]
            made.append(unmerge(state, plans, tokens.prefix, inputs=inputs, backend=tokens.backend))
    return tuple(made)


class _Masks:
    """Forward pre-hook on a patched model's encoder: notes whether the caller gave a mask."""

    def __init__(self, tower: nn.Module):
        names = list(inspect.signature(tower.forward).parameters)
        self.masks = [(name, names.index(name) if name in names else len(names)) for name in _MASKS]

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        masked = False
        for name, place in self.masks:
            masked = masked or kwargs.get(name) is not None or (place < len(args) and args[place] is not None)
        if masked != PASS.masked:
            PASS.masked = masked
        if PASS.valid is not None:
            PASS.valid = None
        if PASS.kept is not None:
            PASS.kept = None


class _Pooling:
    """Forward pre-hook on an encoder's pooling: it gets the tokens that are left, and their mask."""

    def __call__(self, module: Any, args: Any) -> Any:
        rows, *masks = args
        if PASS.kept is not None:
            rows = rows.gather(1, PASS.kept.long()[:, :, None].expand(-1, -1, rows.shape[2]))
        elif not masks or masks[0] is None or masks[0].shape[1] == rows.shape[1]:
            return None
        return (rows, PASS.valid) if masks else (rows,)


def watch_masks(tower: Any) -> None:
    """Let a patched model's encoder note masks, and its pooling take those of the tokens that are left."""
    tower.register_forward_pre_hook(_Masks(tower), with_kwargs=True)
    if (pooling := getattr(tower, "head", None)) is not None:
        pooling.register_forward_pre_hook(_Pooling())


def forget_masks(tower: Any) -> None:
    """Undo :func:`watch_masks`."""
    pooling = getattr(tower, "head", None)
    for module, kind in ((tower, _Masks), *(() if pooling is None else ((pooling, _Pooling),))):
        _forget(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, kind)


def masked_pooling(tower: Any) -> Any:
    """Return the pooling of an encoder that gets the mask of the input's patches, or None."""
    return getattr(tower, "head", None) if known_name(type(tower)) == "Siglip2VisionModel" else None


def _forget(hooks: Any, more: Any, kind: type) -> None:
    for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
        del hooks[key]
        more.pop(key, None)


def forget_forwards(tower: nn.Module) -> None:
    """Take a class's own forward off instances, where transformers up to 5.1 leaves it after collecting from them."""
    for module in tower.modules():
        kind: Any = type(module)
        forward = module.__dict__.get("forward")
        if getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is kind.forward:
            del module.__dict__["forward"]


def watch_passes(module: nn.Module, model: nn.Module) -> None:
    """Let a module of a patched model hand out full grids from now on."""
    module.register_forward_pre_hook(_Before(model), with_kwargs=True)
    module.register_forward_hook(_After(model), with_kwargs=True)


def forget_passes(module: nn.Module) -> None:
    """Undo :func:`watch_passes`."""
    for hooks, more, kind in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, _Before),
        (module._forward_hooks, module._forward_hooks_with_kwargs, _After),
    ):
        _forget(hooks, more, kind)
