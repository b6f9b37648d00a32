"""Facts about a primitive for whoever measures it: inputs, contenders, and the least that must be moved.

One file of this folder describes one primitive. The microbenchmarks, ``bench.traffic``, ``bench.compile_report``
and ``bench.gpu`` all read these descriptions, so that one thing is checked, counted and timed.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "BATCHES",
    "DTYPES",
    "MODELS",
    "TOKENS",
    "Other",
    "Primitive",
    "Shape",
    "differentiate",
    "disagreement",
    "load_primitives",
    "misshapen",
    "nbytes",
    "packed_qkv",
    "parse_shapes",
    "randn",
    "shaken",
]

MODELS = {"deit_tiny": (192, 3), "deit_small": (384, 6), "deit_base": (768, 12), "vit_large": (1024, 16)}
TOKENS = (197, 577, 1025, 4097)
BATCHES = (1, 64, 256)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Inputs = dict[str, Any]
Outputs = tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Shape:
    """One point of the grid: a model's width and heads, tokens with the class token, images, dtype."""

    model: str
    tokens: int
    batch: int
    dtype: torch.dtype = torch.float32

    @property
    def channels(self) -> int:
        """Width of a token."""
        return MODELS[self.model][0]

    @property
    def heads(self) -> int:
        """Heads of the attention, each 64 wide."""
        return MODELS[self.model][1]

    @property
    def patches(self) -> int:
        """Tokens without the class token."""
        return self.tokens - 1

    @property
    def kept(self) -> int:
        """Half of the patches."""
        return self.patches // 2

    def __str__(self) -> str:
        return f"{self.model}-{self.tokens}-{self.batch}-{str(self.dtype).removeprefix('torch.')}"


def parse_shapes(words: str, dtype: torch.dtype) -> list[Shape]:
    """Read shapes like ``deit_small-197-64`` or ``deit_small-197-64-float16``, comma separated.

    Raises:
        ValueError: a word that is none.
    """
    shapes = []
    for word in words.split(","):
        model, tokens, batch, name = [*word.split("-"), "", "", ""][:4]
        known = model in MODELS and word.count("-") < 4 and (not name or name in DTYPES)
        if not (known and tokens.isdigit() and batch.isdigit() and int(tokens) > 1 and int(batch) > 0):
            raise ValueError(f"a shape is like deit_small-197-64 or deit_small-197-64-float16, got {word!r}")
        shapes.append(Shape(model, int(tokens), int(batch), DTYPES.get(name, dtype)))
    return shapes


@dataclasses.dataclass(frozen=True)
class Other:
    """Another way to a primitive's result, beside which it is shown.

    Attributes:
        call: (arguments) -> the same tensors.
        on_cpu: whether it is one on the CPU too.
        backward: whether it has a backward pass.
        compiles: whether it goes through ``torch.compile``, which takes long.
        module: what must be installed for it, or None.
    """

    call: Callable[[Inputs], Outputs]
    on_cpu: bool = True
    backward: bool = True
    compiles: bool = False
    module: str | None = None

    @property
    def installed(self) -> bool:
        """True if its module can be imported."""
        return self.module is None or importlib.util.find_spec(self.module) is not None

    def serves(self, device: str, direction: str) -> bool:
        """Return whether it can be called on this kind of device (``"cpu"``, ``"cuda"``) in this direction."""
        return (self.on_cpu or device == "cuda") and (self.backward or direction == "forward") and self.installed


@dataclasses.dataclass(frozen=True)
class Primitive:
    """One primitive as it is measured.

    Attributes:
        name: its name in ``fastreduce.ops``, with a suffix where it is measured in several uses.
        make: (shape, generator) -> arguments by name, on the generator's device, laid out as the reducers have them.
        call: (arguments, ``backend=``) -> tensors; our function.
        plain: (arguments) -> the same tensors by the official algorithm in plain words, in the arguments' dtype. It is
            the baseline, and in float64 the oracle.
        floor: (arguments, outputs) -> bytes of the forward pass if every needed element is read and every output is
            written once.
        gradients: arguments that get a gradient; none if the primitive only decides.
        backward_floor: (arguments, outputs, gradients) -> the same of the backward pass: upstream gradients and what it
            needs of the inputs read once, gradients written once.
        tiled: for primitives that compare every token with every other, and so read tiles several times: (arguments) ->
            bytes of the forward pass at least with the tiles that the launcher chooses. None for streaming ones, which
            can meet ``floor``.
        backward_tiled: (arguments) -> the same of the backward pass.
        compare: (arguments, outputs, exact outputs of the same shapes) -> what is wrong with decisions that may differ
            by near-ties, or None. Without it integers must be equal, and floats are held against the error of the
            reference.
        plain_steps: roundings of the largest value that the plain algorithm and others may be off in their own dtype.
        others: more contenders by name.
        terms: in float32, how large the terms are of results that they cancel to; 0 where results are their size.
    """

    name: str
    make: Callable[[Shape, torch.Generator], Inputs]
    call: Callable[..., Outputs]
    plain: Callable[[Inputs], Outputs]
    floor: Callable[[Inputs, Outputs], int]
    gradients: tuple[str, ...] = ()
    backward_floor: Callable[[Inputs, Outputs, Outputs], int] | None = None
    tiled: Callable[[Inputs], int] | None = None
    backward_tiled: Callable[[Inputs], int] | None = None
    compare: Callable[[Inputs, Outputs, Outputs], str | None] | None = None
    plain_steps: float = 32.0
    others: Mapping[str, Other] = dataclasses.field(default_factory=dict, hash=False)
    terms: float = 0.0


def nbytes(*tensors: Tensor) -> int:
    """Count the bytes of all elements that the tensors show, whatever they are views of."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def randn(generator: torch.Generator, dtype: torch.dtype, *size: int) -> Tensor:
    """Draw normal numbers on the generator's device."""
    return torch.randn(*size, generator=generator, device=generator.device).to(dtype)


def packed_qkv(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v (B, H, N, 64) as views of the packed projection, as timm's attention has them."""
    packed = randn(generator, shape.dtype, shape.batch, shape.tokens, 3, shape.heads, 64)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def load_primitives() -> dict[str, Primitive]:
    """Return every primitive that a file of this folder describes, by name."""
    found: dict[str, Primitive] = {}
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            content = vars(importlib.import_module(f"{__name__}.{module.name}"))
            found |= {value.name: value for value in content.values() if isinstance(value, Primitive)}
    return found


def in_float64(inputs: Mapping[str, Any]) -> Inputs:
    """Return the arguments with every floating tensor in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def shaken(inputs: Mapping[str, Any]) -> Inputs:
    """Return the arguments in float64, each number of a floating tensor a rounding of float32 away, up or down.

    What that changes in the results is beyond the reach of kernels that compute in float32.
    """
    changed = {}
    for name, value in in_float64(inputs).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            generator = torch.Generator(value.device).manual_seed(2)
            signs = torch.randint(2, value.shape, generator=generator, device=value.device) * 2 - 1
            value = value * (1 + signs * torch.finfo(torch.float32).eps)
        changed[name] = value
    return changed


def with_gradients(inputs: Mapping[str, Any], names: tuple[str, ...]) -> Inputs:
    """Return the arguments, those with a gradient as leaves of the same layout."""
    return {name: value.detach().requires_grad_() if name in names else value for name, value in inputs.items()}


def differentiate(
    call: Callable[[Inputs], Outputs], inputs: Inputs, names: tuple[str, ...]
) -> tuple[Callable[[], Outputs], Outputs]:
    """Run forward once; returns a call of the backward pass alone, repeatable, and the outputs.

    The upstream gradients are normal numbers that depend on the shapes of the outputs only, exact in every dtype.
    """
    leaves = with_gradients(inputs, names)
    outputs = call(leaves)
    differentiable = [output for output in outputs if output.requires_grad]
    generator = torch.Generator(differentiable[0].device).manual_seed(1)
    upstream = [
        torch.randn(output.shape, generator=generator, device=output.device).bfloat16().to(output.dtype)
        for output in differentiable
    ]
    wanted = [leaves[name] for name in names]

    def backward() -> Outputs:
        return torch.autograd.grad(differentiable, wanted, upstream, retain_graph=True)

    return backward, outputs


def _error(output: Tensor, exact: Tensor) -> float:
    return (output.double() - exact.double()).abs().max().item() if output.numel() else 0.0


def misshapen(outputs: Outputs, exact: Outputs) -> str | None:
    """Return what is wrong with the number of outputs or their shapes, or None."""
    if len(outputs) != len(exact):
        return f"{len(outputs)} outputs, not {len(exact)}"
    for place, (output, truth) in enumerate(zip(outputs, exact, strict=True)):
        if output.shape != truth.shape:
            return f"output {place} has shape {tuple(output.shape)}, not {tuple(truth.shape)}"
    return None


def disagreement(
    outputs: Outputs, exact: Outputs, others: Sequence[Outputs], share: float, floor: float = 0.0
) -> str | None:
    """Return what is wrong with the outputs, or None.

    Floats may be off from ``exact`` (float64) by ``share`` of the largest value, but of no less than ``floor``, and by
    the errors of all ``others``. Integers must be equal.
    """
    if (wrong := misshapen(outputs, exact)) is not None:
        return wrong
    for place, (output, truth) in enumerate(zip(outputs, exact, strict=True)):
        if not truth.is_floating_point():
            if wrong := int((output.long() != truth.long()).sum()):
                return f"output {place}: decisions that differ: {wrong} of {truth.numel()}"
            continue
        if not truth.numel():
            continue
        allowed = share * max(truth.abs().max().item(), floor)
        allowed += sum(_error(other[place], truth) for other in others)
        if not _error(output, truth) <= allowed:  # NaN is wrong too
            return f"output {place} is off by {_error(output, truth):.2e}, allowed are {allowed:.2e}"
    return None
