"""Every launch on a GPU that does nothing, and what the launches of a call are made of."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from bench.proof import idle


@dataclasses.dataclass(frozen=True)
class Launched:
    """A launch as the driver gets it.

    Attributes:
        by: the launcher of the compiled kernel.
        sizes: bytes of the tensors among the arguments; None for all else, and for a tensor given by its address.
    """

    grid: tuple[int, int, int]
    stream: int
    by: Any
    function: Any
    metadata: Any
    arguments: tuple[Any, ...]
    sizes: list[int | None]


@contextlib.contextmanager
def noting(monkeypatch: Any) -> Iterator[list[Launched]]:
    """Note all that is launched on a GPU that does nothing."""
    launches: list[Launched] = []

    def note(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        sizes = [one.nbytes if isinstance(one, torch.Tensor) else None for one in args]
        shown = [one.data_ptr() if isinstance(one, torch.Tensor) else one for one in args]
        launches.append(Launched((x, y, z), stream, self, function, metadata, tuple(shown), sizes))

    # Of the class: kernels that other tests have loaded keep their launcher.
    monkeypatch.setattr(idle.Launcher, "__call__", note)
    with idle.idle_driver():
        yield launches


def tensors_of(result: Any) -> list[torch.Tensor]:
    """Return the tensors of a launcher's result."""
    found = [result] if isinstance(result, torch.Tensor) else result
    return [one for one in found if isinstance(one, torch.Tensor)]


def _named(address: int, tensors: list[torch.Tensor], kind: str) -> tuple[str, int, int] | None:
    for number, one in enumerate(tensors):
        begin = one.data_ptr()
        last = sum((size - 1) * abs(step) for size, step in zip(one.shape, one.stride(), strict=True))
        if one.numel() and begin <= address <= begin + last * one.element_size():
            return kind, number, address - begin
    return None


def described(launches: list[Launched], like: list[Launched], args: tuple[Any, ...], result: Any) -> list[Any]:
    """Return the launches with names for addresses: of an input, of a result, or of the n-th workspace.

    ``like`` are the same launches, made by tensors: they say which arguments are addresses.
    """
    inputs = [one for one in args if isinstance(one, torch.Tensor)]
    spaces: dict[int, int] = {}
    found = []
    for launch, tensors in zip(launches, like, strict=True):
        shown: list[Any] = []
        for value, size in zip(launch.arguments, tensors.sizes, strict=True):
            if size is None:
                shown.append((type(value), value))
                continue
            named = _named(value, inputs, "input") or _named(value, tensors_of(result), "result")
            shown.append(named or ("space", spaces.setdefault(value, len(spaces)), value % 16))
        found.append((launch.grid, launch.stream, launch.by, launch.function, launch.metadata, shown))
    return found


def workspaces(
    launches: list[Launched], like: list[Launched], args: tuple[Any, ...], result: Any
) -> list[tuple[int, int]]:
    """Return begin and end of what the launches use besides inputs and results, once each."""
    known = [*(one for one in args if isinstance(one, torch.Tensor)), *tensors_of(result)]
    found = {
        (address, address + size)
        for launch, tensors in zip(launches, like, strict=True)
        for address, size in zip(launch.arguments, tensors.sizes, strict=True)
        if size and _named(address, known, "known") is None
    }
    return sorted(found)
