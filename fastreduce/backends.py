"""Choice of the implementation that runs: Triton kernels or the PyTorch reference.

The order is: the ``backend=`` argument, then the innermost :func:`backend` block of this thread or asyncio task, then
the environment variable ``FASTREDUCE_BACKEND``, then ``"auto"``. ``"auto"`` means Triton for CUDA tensors and the
reference for everything else.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor

__all__ = ["BACKENDS", "INTERPRETING", "Backend", "Resolved", "backend", "check_backend", "resolve"]

Backend = Literal["auto", "triton", "reference"]
Resolved = Literal["triton", "reference"]
BACKENDS: tuple[str, ...] = ("auto", "triton", "reference")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_log = logging.getLogger("fastreduce")
_said: set[str] = set()


class _Choice:
    """One ``with backend(name)`` block; not open once it was closed where it is not known, as a generator's may be."""

    def __init__(self, name: str):
        self.name = name
        self.open = True


# The blocks that this context is in, outermost first.
_choices: ContextVar[tuple[_Choice, ...]] = ContextVar("fastreduce_backend", default=())
# Code that torch.compile traces cannot set a ContextVar, nor read one before torch 2.15: here are the blocks that it
# opens, and before 2.15 the thread's too.
_of_thread = threading.local()
_COMPILE_READS_CONTEXT = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 15)


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _log.warning(message)


def check_backend(name: str) -> str:
    """Return ``name`` if it is a backend, else raise ValueError."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; expected one of {', '.join(map(repr, BACKENDS))}")
    return name


def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):  # ValueError: a None in sys.modules
        return False


# Settled at import, so that torch.compile sees constants.
HAS_TRITON = _has_triton()
INTERPRETING = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"
_ENVIRONMENT = os.environ.get("FASTREDUCE_BACKEND", "auto")
if _ENVIRONMENT not in BACKENDS:
    raise ValueError(f"FASTREDUCE_BACKEND={_ENVIRONMENT!r}; expected one of {', '.join(map(repr, BACKENDS))}")


def _without(choices: tuple[_Choice, ...], choice: _Choice) -> tuple[_Choice, ...]:
    return tuple(one for one in choices if one is not choice and one.open)


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Choose the backend of every fastreduce call inside the ``with`` block, in this thread or asyncio task only.

    A task that is started inside the block has the choice too, a thread that is started there has none.
    Code under ``torch.compile`` sees the choice, and compiles again when it changes. Before torch 2.15 such code sees
    the choice of its thread: there a task must not leave a block open while another task of the thread runs.

    Args:
        name: ``"auto"``, ``"triton"`` or ``"reference"``.

    Raises:
        ValueError: if ``name`` is none of these.
    """
    choice = _Choice(check_backend(name))
    compiling = torch.compiler.is_compiling()
    if not compiling:
        _choices.set((*_without(_choices.get(), choice), choice))
    if compiling or not _COMPILE_READS_CONTEXT:
        others = _without(getattr(_of_thread, "choices", ()), choice)
        _of_thread.choices = (*others, choice)
        if not compiling and _choices.get() != _of_thread.choices:
            _say_once(
                "before torch 2.15 code under torch.compile cannot tell the tasks of a thread apart: while several "
                "hold a fastreduce.backend block open, it follows the one that was opened last"
            )
    try:
        yield
    finally:
        # By identity, not by position: generators may close their blocks in any order, and in another thread.
        if not compiling:
            choice.open = choice in _choices.get()
            _choices.set(_without(_choices.get(), choice))
        if compiling or not _COMPILE_READS_CONTEXT:
            _of_thread.choices = _without(getattr(_of_thread, "choices", ()), choice)


def _chosen() -> str:
    """Return the innermost block's choice, else the environment's."""
    if not torch.compiler.is_compiling():
        choices = _choices.get()
    else:
        choices = getattr(_of_thread, "choices", ())
        if _COMPILE_READS_CONTEXT:
            choices = _choices.get() + choices
    for choice in reversed(choices):
        if choice.open:
            return choice.name
    return _ENVIRONMENT


def _obstacle(tensors: tuple[Tensor, ...]) -> str | None:
    """Return why the Triton kernels cannot take these tensors, or None."""
    if not HAS_TRITON:
        return "triton is not installed"
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return "an ONNX graph cannot hold Triton's kernels"
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return "kernels do not take part in transforms of torch.func (vmap, grad, jvp)"
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


def resolve(name: str | None, *tensors: Tensor) -> Resolved:
    """Decide between kernels and reference for one call on ``tensors``.

    Raises:
        ValueError: if the backend's name is unknown.
        RuntimeError: if ``"triton"`` was asked for and cannot run here; an explicit choice never falls back.
    """
    choice = "auto" if name is None else check_backend(name)
    if choice == "auto":
        choice = _chosen()
    if choice == "reference":
        return "reference"
    if choice == "auto" and tensors[0].device.type != "cuda":
        return "reference"
    reason = _obstacle(tensors)
    if reason is None:
        return "triton"
    if choice == "triton":
        raise RuntimeError(f"backend 'triton' was asked for, but {reason}")
    _say_once(f"using the PyTorch reference on CUDA tensors, because {reason}")
    return "reference"
