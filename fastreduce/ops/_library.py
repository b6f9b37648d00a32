"""Registration of the kernels with ``torch.library``, and the short way past it.

An operator's CUDA implementation launches Triton. Its CPU implementation launches the same kernels in a process that
runs the Triton interpreter, and the reference otherwise, so that ``opcheck``, ``gradcheck``, ``torch.compile`` and
``torch.export`` can be tried without a GPU. Autograd lives outside, in the ``autograd.Function`` of each primitive: a
call then takes less than half the time that it takes by ``register_autograd``.

Only what records operators needs them. In eager mode a call launches directly, and where nothing wants a gradient
there is no ``autograd.Function`` either.
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
# What a call may be made of to be launched directly: subclasses of tensors and symbolic sizes go to the dispatcher.
_PLAIN = frozenset({Tensor, torch.nn.Parameter, int, float, bool, str, tuple, type(None)})
_recording = torch._C._len_torch_dispatch_stack  # modes, such as make_fx's, of FakeTensor, or that count operators
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
    """Decorate a function that says by its signature what an operator takes, and by its result the shapes and dtypes.

    The schema is the signature's: ``Tensor``, ``Tensor | None``, ``int``, ``float``, ``float | None``, ``bool``,
    ``str``, and a result of ``Tensor``, ``list[Tensor]`` or a tuple of tensors. In eager mode, where nothing records
    operators, the function that takes its place launches the kernels itself.

    Args:
        triton: the launcher, as ``"module.function"`` of ``fastreduce.kernels``, or a function that calls it; imported
            at the first call, so that triton stays optional. It takes the operator's arguments.
        reference: the same result in PyTorch.
        name: of the operator; the launcher's if there is none.
        dense: names of the arguments, or None in their place, that the launcher wants with a dense last axis.
        whole: the same for arguments that it wants contiguous.
        skip: names of the arguments that are for the reference alone.
    """

    def declare(fake: Callable[..., Any]) -> Callable[..., Any]:
        return _define(name or str(triton).rpartition(".")[2], triton, reference, fake, dense, whole, skip)

    return declare


def _runs_here(args: tuple[Any, ...]) -> bool:
    """Return whether the kernels can take these arguments as they are, and nobody wants to see the operator."""
    if not _PLAIN.issuperset(map(type, args)) or _recording() or _transforming() is not None or _tracing():
        return False
    return INTERPRETING or (args[0] if args[0] is not None else _first(args)).is_cuda


def _first(args: tuple[Any, ...]) -> Tensor:
    """Return the first tensor; of an operator's leading arguments some may be None."""
    return next(one for one in args if one is not None)


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Make the device of the first tensor the current one for a launch: Triton launches on the current one."""

    @functools.wraps(launch)
    def guarded(*args: Any) -> Any:
        device = (args[0] if args[0] is not None else _first(args)).get_device()
        if device < 0 or device == torch.cuda.current_device():
            return launch(*args)
        with torch.cuda.device(device):
            return launch(*args)

    return guarded


_Layouts = dict[int, Callable[[Tensor], Tensor]]  # of arguments by their place: what lays them out for the launcher


def _launcher(place: str | Callable[..., Any], layouts: _Layouts, skip: Sequence[int]) -> Callable[..., Any]:
    """Return the function that lays arguments out, and calls the launcher.

    Those at the places of ``skip``, in descending order, it leaves out.
    """
    found: list[Callable[..., Any]] = []

    def launch(*args: Any) -> Any:
        if not found:
            found.append(_load(place, layouts, skip))
        return found[0](*args)

    return launch


def _load(place: str | Callable[..., Any], layouts: _Layouts, skip: Sequence[int]) -> Callable[..., Any]:
    """Return what :func:`_launcher` calls, now that Triton is needed."""
    function = place
    if isinstance(function, str):
        module, name = function.split(".")
        function = getattr(importlib.import_module(f"..kernels.{module}", __package__), name)

    def prepared(*args: Any) -> Any:
        # Kernels read memory, which holds minus the values of such as ``x.conj().imag``.
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
    """Return the tensor itself if its last axis is dense, else a copy; expanded gradients (stride 0) are copied too."""
    if tensor.is_contiguous():  # asked first, because it costs least
        return tensor
    strides = tensor.stride()
    if strides[-1] == 1 and 0 not in strides:
        return tensor
    return tensor.contiguous()


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Return whether a call on these tensors is to be recorded by autograd."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    # In forward mode the Function says that it has no such derivative.
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def differentiates_again() -> bool:
    """Return whether a backward pass is itself recorded (``create_graph=True``): kernels have no second derivative."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def gradients_again(
    function: Callable[..., Any], inputs: Sequence[Any], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return the gradients of the inputs, which can be differentiated again, for the gradients of function's results.

    Args:
        function: of PyTorch's own operators.
        inputs: its arguments; those that are no tensors, or want no gradient, get None.
        grads: of its results, None for those without; results past them have none.
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
