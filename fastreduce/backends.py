"""Which implementation runs: Triton kernels or the PyTorch reference.

The order is: the ``backend=`` argument, then the innermost :func:`backend` context, then the environment variable
``FASTREDUCE_BACKEND``, then ``"auto"``. ``"auto"`` means Triton for CUDA tensors and the reference for everything else.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

__all__ = ["BACKENDS", "INTERPRETING", "Backend", "backend", "check_backend", "resolve"]

Backend = Literal["auto", "triton", "reference"]
BACKENDS: tuple[str, ...] = ("auto", "triton", "reference")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_log = logging.getLogger("fastreduce")
_said: set[str] = set()
# A plain list, not a ContextVar: torch.compile of torch 2.11 cannot read a ContextVar.
_context: list[str] = []


def check_backend(name: str) -> str:
    """Return ``name`` if it is a backend, else raise ValueError."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; expected one of {', '.join(map(repr, BACKENDS))}")
    return name


def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):  # ValueError: somebody put None into sys.modules
        return False


# Settled at import, so that torch.compile sees constants.
HAS_TRITON = _has_triton()
INTERPRETING = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"
_ENVIRONMENT = os.environ.get("FASTREDUCE_BACKEND", "auto")
if _ENVIRONMENT not in BACKENDS:
    raise ValueError(f"FASTREDUCE_BACKEND={_ENVIRONMENT!r}; expected one of {', '.join(map(repr, BACKENDS))}")


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Choose the backend of every fastreduce call inside the ``with`` block, in the whole process.

    Args:
        name: ``"auto"``, ``"triton"`` or ``"reference"``.

    Raises:
        ValueError: if ``name`` is none of these.
    """
    _context.append(check_backend(name))
    try:
        yield
    finally:
        _context.pop()


def _say_once(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        _log.warning("using the PyTorch reference on CUDA tensors, because %s", reason)


def _obstacle(tensors: tuple[Tensor, ...]) -> str | None:
    """Why the Triton kernels cannot take these tensors, or None."""
    if not HAS_TRITON:
        return "triton is not installed"
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype not in KERNEL_DTYPES:
            return f"the kernels take float32, float16 and bfloat16, not {tensor.dtype}"
    kind = tensors[0].device.type
    if kind == "cpu" and not INTERPRETING:
        return (
            "the tensors are on the CPU and the process was not started with TRITON_INTERPRET=1 "
            "(Triton's interpreter is the only way to run a kernel there)"
        )
    if kind not in ("cpu", "cuda"):
        return f"the kernels run on CUDA, not on {kind!r}"
    return None


def resolve(name: str | None, *tensors: Tensor) -> Literal["triton", "reference"]:
    """Decide between kernels and reference for one call on ``tensors``.

    Raises:
        ValueError: if the backend's name is unknown.
        RuntimeError: if ``"triton"`` was asked for and cannot run here; an explicit choice never falls back.
    """
    choice = "auto" if name is None else check_backend(name)
    if choice == "auto":
        choice = _context[-1] if _context else _ENVIRONMENT
    if choice == "reference":
        return "reference"
    if choice == "auto" and tensors[0].device.type != "cuda":
        return "reference"
    reason = _obstacle(tensors)
    if reason is None:
        return "triton"
    if choice == "triton":
        raise RuntimeError(f"backend 'triton' was asked for, but {reason}")
    _say_once(reason)
    return "reference"
