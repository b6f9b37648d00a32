"""Weights of a checkpoint into a model: all of them or none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._files import one_line, printable
from .choosing import plain_key, read_checkpoint
from .reading import words_of

__all__ = ["load_official"]

Model = TypeVar("Model", bound=nn.Module)

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _kind(dtype: torch.dtype) -> str:
    """Return the kind of number: values are copied within a kind only. Types of less than 16 bits are their own."""
    if dtype in _FLOATS:
        return "floating-point"
    if dtype.is_complex:
        return "complex"
    if dtype.is_floating_point or dtype is torch.bool or str(dtype).startswith(("torch.q", "torch.bits")):
        return str(dtype)
    return "integer"


def _unusual(value: Any) -> str | None:
    """Say why a value is no ordinary tensor, or return None."""
    if not isinstance(value, Tensor):
        return f"{words_of(value)}, not a tensor"
    if type(value) not in (Tensor, nn.Parameter):
        return f"a {type(value).__name__}, not a plain tensor"
    if value.is_nested:
        return "nested"
    if value.layout != torch.strided:
        return f"sparse ({value.layout})"
    if value.is_quantized:
        return f"quantised ({value.dtype})"
    if value.is_meta:
        return "on the meta device, without values"
    return None


def _misfit(found: Any, own: Tensor) -> str | None:
    """Say why a value does not fit into a tensor of the model, or return None."""
    if (odd := _unusual(found)) is not None:
        return odd
    if found.shape != own.shape:
        return f"{tuple(found.shape)}, the model needs {tuple(own.shape)}"
    if (kind := _kind(found.dtype)) != (wanted := _kind(own.dtype)):
        return f"{kind} ({found.dtype}), the model needs {wanted} ({own.dtype})"
    if kind == "floating-point" and found.numel() and torch.finfo(found.dtype).max > torch.finfo(own.dtype).max:
        largest = torch.where(found.isfinite(), found, 0).abs().max().item()
        if largest > torch.finfo(own.dtype).max:
            return f"too large for {own.dtype}: it has {largest:g}"
    return None


def _unusual_own(own: Any) -> str | None:
    """Say why nothing can be loaded into an entry of the model's state dict, or return None."""
    if (odd := _unusual(own)) is not None:
        return odd
    if own.is_inference() and not torch.is_inference_mode_enabled():
        return "a tensor of inference mode"
    return None


def _fitting(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Sort the checkpoint's tensors by the keys of the model's own state dict; raise unless every one fits."""
    own = model.state_dict()
    keys = {plain_key(key): key for key in own}
    problems = [f"{key} of the model is {odd}" for key, value in own.items() if (odd := _unusual_own(value))]
    problems += [f"missing {key}" for key in keys if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in keys]
    problems += [
        f"{plain} is {odd}"
        for plain, key in keys.items()
        if plain in state and not _unusual(own[key]) and (odd := _misfit(state[plain], own[key]))
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        what = printable("; ".join(problems[:5]))
        raise ValueError(f"the checkpoint does not fit {type(model).__name__}: {what}{more}")
    # Cloned if it shares memory with the model: else one copy would change what the next one reads.
    memory = {value.untyped_storage().data_ptr() for value in own.values()}
    tensors = {key: state[plain].detach() for plain, key in keys.items()}
    return {
        key: value.clone() if value.untyped_storage().data_ptr() in memory else value for key, value in tensors.items()
    }


def _check_arrived(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise unless the model holds what was loaded: of two names of one tensor the last would win."""
    for key, value in model.state_dict().items():
        wanted = tensors[key].to(value.device, value.dtype)
        same = torch.equal(value, wanted) or torch.equal(value.nan_to_num(), wanted.nan_to_num())
        if not same:
            raise ValueError(
                f"{key} of the model did not take its values; is it one tensor with another of other values?"
            )


def _load_whole(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors; where that fails midway, the model gets back what it had."""
    own = model.state_dict()
    before = {key: value.clone() for key, value in own.items()}
    try:
        model.load_state_dict(tensors)
        _check_arrived(model, tensors)
    except BaseException as error:
        with torch.no_grad():
            for key, value in own.items():
                with contextlib.suppress(RuntimeError):  # a tensor that cannot be written to has not changed
                    value.copy_(before[key])
        if isinstance(error, (RuntimeError, TypeError, AttributeError)):
            reason = one_line(error)
            raise ValueError(f"the checkpoint cannot be loaded into {type(model).__name__}: {reason}") from error
        raise


def load_official(
    model: Model, checkpoint: Mapping[str, Any] | str | os.PathLike[str], *, weights: str = "auto"
) -> Model:
    """Load weights of the paper's released code (TokenReduction, timm 0.4.12 names) into a patched or plain timm model.

    Example::

        fastreduce.patch(model, "dynamicvit", keep_rate=0.7)
        fastreduce.load_official(model, "best_checkpoint.pth")  # or weights="ema"

    Args:
        model: a timm Vision Transformer of the checkpoint's geometry; for a method with layers of its own
            (``score_predictor.*``, ``cluster_layers.*``) patched with that method.
        checkpoint: a ``.safetensors`` or ``torch.save`` file, or a dict; see :func:`read_checkpoint`. Nothing that a
            file holds is executed.
        weights: which of a checkpoint's sets: ``"auto"`` (what the paper evaluates: the moving average where the file
            says that it is best, ``ema_best``), ``"model"``, ``"ema"``, or its name in the file. Which one was taken is
            logged at the level INFO.

    Returns:
        The model itself.

    Raises:
        OSError: the file cannot be opened.
        ValueError: a file that holds no weights or not the set that is asked for; keys, shapes or kinds of numbers that
            do not fit. The message names them.
        TypeError: arguments of the wrong kind. Whatever is raised, the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, got a {type(model).__name__}")
    _load_whole(model, _fitting(model, read_checkpoint(checkpoint, weights).state))
    return model
