"""Registration of the kernels with ``torch.library``, and the short way past it.

An operator's CUDA implementation launches Triton. Its CPU implementation launches the same kernels in a process that
runs the Triton interpreter, and the reference otherwise. So ``opcheck``, ``gradcheck``, ``torch.compile`` and
``torch.export`` can be tried without a GPU. Autograd is in the ``autograd.Function`` of each primitive: a call takes
less than half the time that it takes with ``register_autograd``.

Operators are needed only where something records them. In eager mode a call launches directly; without a gradient it
skips the ``autograd.Function`` too.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import INTERPRETING
from ._flops import count_by_reference

__all__ = ["dense_rows", "differentiates_again", "gradients_again", "operator", "wants_gradient"]

_library = torch.library.Library("fastreduce", "FRAGMENT")
# Types of arguments that are launched directly; subclasses of tensors and symbolic sizes go to the dispatcher.
_PLAIN = frozenset({Tensor, torch.nn.Parameter, int, float, bool, str, tuple, type(None)})
_recording = torch._C._len_torch_dispatch_stack  # number of modes, such as make_fx, FakeTensor, or a count of operators
_transforming = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._is_tracing


def _define(
    name: str,
    triton: str | Callable[..., Any],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    dense: str,
    whole: str,
    skip: str,
) -> Callable[..., Any]:
    """Define ``fastreduce::<name>`` and return the function that calls it."""
    schema = name + torch.library.infer_schema(fake, mutates_args=())
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    overload = getattr(torch.ops.fastreduce, name).default
    names = [argument.name for argument in overload._schema.arguments]
    dense_places, whole_places, skipped = (list(map(names.index, words.split())) for words in (dense, whole, skip))
    layouts: _Layouts = {place: dense_rows for place in dense_places}
    layouts.update({place: Tensor.contiguous for place in whole_places})
    launch = _on_its_device(_launcher(triton, layouts, sorted(skipped, reverse=True)))

    def on_cpu(*args: Any) -> Any:
        return launch(*args) if INTERPRETING else reference(*args)

    _library.impl(name, on_cpu, "CPU")
    _library.impl(name, launch, "CUDA")
    torch.library.register_fake(f"fastreduce::{name}", fake, lib=_library)
    count_by_reference(name, reference)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not _runs_here(args):
            return overload(*args)
        return launch(*args)

    return call


def operator(
    triton: str | Callable[..., Any],
    reference: Callable[..., Any],
    *,
    name: str = "",
    dense: str = "",
    whole: str = "",
    skip: str = "",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the fake of an operator: its signature is the schema, its result gives the shapes and dtypes.

    A signature may have ``Tensor``, ``Tensor | None``, ``int``, ``float``, ``float | None``, ``bool`` and ``str``.
    A result is a ``Tensor``, a ``list[Tensor]`` or a tuple of tensors. The decorated function calls the operator. In
    eager mode, where nothing records operators, it launches the kernels itself.

    Args:
        triton: the launcher, as ``"module.function"`` of ``fastreduce.kernels``, or a function that calls it; imported
            at the first call, so that triton stays optional. It takes the operator's arguments.
        reference: the function that gives the same result in PyTorch.
        name: name of the operator, by default the launcher's.
        dense: names of arguments whose last axis must be dense for the launcher; the arguments may be None.
        whole: names of arguments that must be contiguous for the launcher.
        skip: names of arguments that only the reference takes.
    """

    def declare(fake: Callable[..., Any]) -> Callable[..., Any]:
        return _define(name or str(triton).rpartition(".")[2], triton, reference, fake, dense, whole, skip)

    return declare


def _runs_here(args: tuple[Any, ...]) -> bool:
    """Return whether the kernels can take these arguments, and nothing records the operator."""
    if not _PLAIN.issuperset(map(type, args)) or _recording() or _transforming() is not None or _tracing():
        return False
    return INTERPRETING or (args[0] if args[0] is not None else _first(args)).is_cuda


def _first(args: tuple[Any, ...]) -> Tensor:
    """Return the first tensor; leading arguments of an operator may be None."""
    return next(one for one in args if one is not None)


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Make the first tensor's device the current one during a launch, since Triton launches on the current device."""

    @functools.wraps(launch)
    def guarded(*args: Any) -> Any:
        device = (args[0] if args[0] is not None else _first(args)).get_device()
        if device < 0 or device == torch.cuda.current_device():
            return launch(*args)
        with torch.cuda.device(device):
            return launch(*args)

    return guarded


_Layouts = dict[int, Callable[[Tensor], Tensor]]  # by an argument's place: what lays it out for the launcher


def _launcher(place: str | Callable[..., Any], layouts: _Layouts, skip: Sequence[int]) -> Callable[..., Any]:
    """Return the function that lays out the arguments, leaves some out, and calls the launcher.

    ``skip`` holds the places of the arguments that are left out, in descending order.
    """
    found: list[Callable[..., Any]] = []

    def launch(*args: Any) -> Any:
        if not found:
            found.append(_load(place, layouts, skip))
        return found[0](*args)

    return launch


def _load(place: str | Callable[..., Any], layouts: _Layouts, skip: Sequence[int]) -> Callable[..., Any]:
    """Import the launcher, now that Triton is needed, and return the function that :func:`_launcher` calls."""
    function = place
    if isinstance(function, str):
        module, name = function.split(".")
        function = getattr(importlib.import_module(f"..kernels.{module}", __package__), name)

    def prepared(*args: Any) -> Any:
        # Kernels read memory, which for a tensor such as ``x.conj().imag`` holds the negated values.
        if any(isinstance(one, Tensor) and one.is_neg() for one in args):
            args = tuple(one.resolve_neg() if isinstance(one, Tensor) else one for one in args)
        for which, lay_out in layouts.items():
            if which < len(args) and args[which] is not None:
                laid_out = lay_out(args[which])
                if laid_out is not args[which]:
                    args = (*args[:which], laid_out, *args[which + 1 :])
        for which in skip:
            args = (*args[:which], *args[which + 1 :])
        return function(*args)

    return importlib.import_module("..kernels._repeat", __package__).repeated(prepared)


def dense_rows(tensor: Tensor) -> Tensor:
    """Return the tensor if its last axis is dense, else a copy; expanded gradients (stride 0) are copied too."""
    if tensor.is_contiguous():  # comes first, because it costs least
        return tensor
    strides = tensor.stride()
    if strides[-1] == 1 and 0 not in strides:
        return tensor
    return tensor.contiguous()


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Return whether autograd must record a call on these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    # In forward mode the Function raises, since it has no such derivative.
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def differentiates_again() -> bool:
    """Return whether a backward pass is itself recorded (``create_graph=True``): kernels have no second derivative."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def gradients_again(
    function: Callable[..., Any], inputs: Sequence[Any], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return gradients of a function's inputs that can be differentiated again.

    Args:
        function: a function made of PyTorch's own operators.
        inputs: its arguments. The gradient is None for one that is no tensor or wants no gradient.
        grads: gradients of its first results, None for a result without one.
    """
    fresh = [one.view_as(one) if isinstance(one, Tensor) and one.requires_grad else one for one in inputs]
    wanted = [one for one in fresh if isinstance(one, Tensor) and one.requires_grad]
    outputs = function(*fresh)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=False) if grad is not None and out.requires_grad]
    if not pairs or not wanted:
        return [None] * len(fresh)
    outs, upstream = zip(*pairs, strict=True)
    cast = [grad.to(out.dtype) for out, grad in zip(outs, upstream, strict=True)]
    found = iter(torch.autograd.grad(outs, wanted, cast, create_graph=True, allow_unused=True))
    return [next(found) if isinstance(one, Tensor) and one.requires_grad else None for one in fresh]
