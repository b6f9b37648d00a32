"""Launchers repeated without their Python: a call with arguments of a known kind repeats the recorded launches.

A launcher decides by shapes, strides, dtypes, alignment and numbers, never by what is in a tensor.
The second call with equal ones is recorded: what it allocates, launches and returns.
From the third call on, the record is repeated, and the launcher is not called.
A launcher that has PyTorch compute something, such as a sum, is called every time.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.runtime.driver import driver

from ._direct import INTERPRETED, Launch, _records, is_recorded, is_replaced, is_watched, recording

__all__ = ["Repeated", "repeated"]

_MOST_KEPT = 1024  # argument lists that are kept for a launcher
_APART = 512  # bytes between the parts of a workspace, as PyTorch's allocator keeps them on a GPU
_ASKS = frozenset(
    {
        "__len__",
        "data_ptr",
        "device",
        "dim",
        "dtype",
        "element_size",
        "get_device",
        "is_contiguous",
        "is_cuda",
        "is_neg",
        "itemsize",
        "ndim",
        "numel",
        "promote_types",
        "shape",
        "size",
        "stride",
    }
)
_ALLOCATES = frozenset({"empty", "empty_like", "empty_strided", "new_empty"})
_WITHOUT_SOURCE = frozenset({"empty", "empty_strided"})  # functions whose first argument is a size
_VIEWS = frozenset(
    {
        "__getitem__",
        "contiguous",
        "detach",
        "expand",
        "narrow",
        "select",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unsqueeze",
    }
)
_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_NUMBERS = frozenset({int, float, bool, str, type(None)})
_NEW, _SEEN = object(), object()  # a call is recorded when its kind comes a second time
_Origin = tuple[int, int]  # number of an input or of an allocation, and an offset in bytes


def repeated(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Return the launcher as :class:`Repeated`; in the interpreter, which launches nothing, return it unchanged.

    Args:
        launcher: takes tensors, numbers, strings, None, and tuples of numbers, and returns new tensors.
    """
    return launcher if INTERPRETED else Repeated(launcher)


class Repeated:
    """A launcher that records its launches and repeats them; see the module."""

    def __init__(self, launcher: Callable[..., Any]):
        self.launcher = launcher
        self.driver: Any = None
        self.kept: dict[Any, Any] = {}  # a plan, _SEEN, or None for a call that cannot be recorded

    def __call__(self, *args: Any) -> Any:
        if is_replaced() or (_records and is_recorded()):
            return self.launcher(*args)
        try:
            active = driver.active
        except RuntimeError:  # no GPU
            return self.launcher(*args)
        if active is not self.driver:
            self.kept, self.driver = {}, active  # in this order, because other threads may read
        device = active.get_current_device()
        # A launcher decides by these values, and by their types, since 1, True and 1.0 are equal.
        values: list[Any] = [device]
        pointers = []
        for one in args:
            kind = type(one)
            if kind in _TENSORS:
                pointer = one.data_ptr()
                pointers.append(pointer)
                values += (one.dtype, one.shape, one.stride(), pointer & 15, one.is_neg())
            elif kind in _NUMBERS:
                values += (kind, one)
            elif kind is tuple and _NUMBERS.issuperset(map(type, one)):
                values += (kind, one, *map(type, one))
            else:
                return self.launcher(*args)
        key = tuple(values)
        plan = self.kept.get(key, _NEW)
        if plan is None:
            return self.launcher(*args)
        if plan is _NEW or plan is _SEEN or is_watched(plan.kernels):
            return self._call(key, plan, args)
        return plan.repeat(active.get_current_stream(device), pointers)

    def _call(self, key: Any, plan: Any, args: tuple[Any, ...]) -> Any:
        """Call the launcher: arguments are new or seen once, or launches are watched."""
        if plan is _NEW:
            if len(self.kept) >= _MOST_KEPT:
                self.kept.clear()
            self.kept[key] = _SEEN
        if plan is not _SEEN or is_watched():
            return self.launcher(*args)
        args = _distinct(args)
        record = _Record([one for one in args if isinstance(one, Tensor)])
        with recording(record.launches), record:
            result = self.launcher(*args)
        self.kept[key] = record.plan(result)
        return result


def _distinct(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments with a view in place of a repeated tensor, so that each has an identity of its own."""
    seen: set[int] = set()
    found = []
    for one in args:
        if isinstance(one, Tensor):
            if id(one) in seen:
                one = one.detach()
            seen.add(id(one))
        found.append(one)
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A recorded call.

    A pool of values holds the stream, the addresses of inputs, results and workspaces, addresses within these, and
    constants. Every launch picks its arguments from the pool.

    Attributes:
        results: shape, strides and dtype of every new tensor that is returned, or whose view is returned.
        allocate: function that makes a tensor on the current device from a shape, strides and a dtype.
        workspace: bytes of all tensors that are not returned, as a shape.
        offsets: where the parts of the workspace begin.
        within: place of an address in the pool, and the bytes to add to it.
        launches: for every launch the function that launches, and the function that picks its arguments.
        kernels: the launched kernels.
        alive: the compiled kernels. The functions do not hold them, and Triton unloads a kernel that nobody holds.
        sequence: type of the sequence that holds the results, or None for one tensor.
        views: number of a result, and shape, strides and offset of its returned view, or None for the whole result.
    """

    allocate: Callable[..., Tensor]
    results: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    workspace: tuple[int, ...]
    offsets: tuple[int, ...]
    within: tuple[_Origin, ...]
    constants: tuple[Any, ...]
    launches: tuple[tuple[Callable[..., Any], Callable[[Any], Any]], ...]
    kernels: tuple[Any, ...]
    alive: tuple[Any, ...]
    sequence: type | None
    views: tuple[tuple[int, Any], ...] | None

    def repeat(self, stream: int, pointers: Sequence[int]) -> Any:
        """Allocate, launch and return the results."""
        allocate = self.allocate
        pool: list[Any] = [stream, *pointers]
        results = []
        for shape, strides, dtype in self.results:
            one = allocate(shape, strides, dtype)
            results.append(one)
            pool.append(one.data_ptr())
        if self.offsets:
            space = allocate(self.workspace, (1,), torch.uint8)  # held until everything is launched
            begin = space.data_ptr()
            for offset in self.offsets:
                pool.append(begin + offset)
        for place, offset in self.within:
            pool.append(pool[place] + offset)
        pool += self.constants
        for run, pick in self.launches:
            run(*pick(pool))
        if self.sequence is None and self.views is None:
            return results[0]
        if self.views is not None:
            results = [results[i] if view is None else results[i].as_strided(*view) for i, view in self.views]
        return results[0] if self.sequence is None else self.sequence(results)


def _allocator(device: torch.device) -> Callable[..., Tensor]:
    """Return the function that makes a tensor on the current device from a shape, strides and a dtype."""
    # Compiled models allocate by this function, which takes half the time of torch.empty_strided.
    short = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    if short is not None:
        return short
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)


def _holds_tensor(value: Any) -> bool:
    """Return whether a value is a tensor, or a tuple, list or slice with one in it."""
    if isinstance(value, slice):
        value = value.start, value.stop, value.step
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(map(_holds_tensor, value)))


def _is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor has as many elements as its memory: it has no gaps and is not expanded."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return not tensor.numel() or last + 1 == tensor.numel()


class _Record(TorchFunctionMode):
    """A record of a launcher's calls to PyTorch and Triton, made while it runs."""

    def __init__(self, inputs: list[Tensor]):
        super().__init__()
        self.inputs = len(inputs)
        self.roots = list(inputs)  # inputs, and after them allocations
        self.launches: list[Launch] = []
        self.possible = True
        self._origins: dict[int, _Origin] = {}  # origin of every known tensor, by its id
        self._alive: list[Tensor] = []  # keeps the tensors, so that no id is used twice
        for number, one in enumerate(inputs):
            self._know(one, number)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.__name__
        if name == "__get__":
            name = function.__self__.__name__
        source = 0 if name in _WITHOUT_SOURCE else 1
        # A tensor as a size or an index stands for the number in it, which may differ the next time.
        if _holds_tensor((*args[source:], *kwargs.values())):
            self.possible = False
        elif name in _ALLOCATES:
            self.roots.append(result)
            self._know(result, len(self.roots) - 1)
        elif name in _VIEWS:
            self._know_views(args[0], result if isinstance(result, (tuple, list)) else [result])
        elif name not in _ASKS:
            self.possible = False
        return result

    def _know(self, tensor: Tensor, number: int) -> None:
        self._origins[id(tensor)] = number, tensor.data_ptr() - self.roots[number].data_ptr()
        self._alive.append(tensor)

    def _know_views(self, source: Tensor, views: Sequence[Tensor]) -> None:
        if id(source) not in self._origins:
            self.possible = False
            return
        number, _ = self._origins[id(source)]
        storage = self.roots[number].untyped_storage().data_ptr()
        for view in views:
            # A copy, or a tensor without an address.
            if view.untyped_storage().data_ptr() != storage or not view.numel():
                self.possible = False
            elif id(view) not in self._origins:
                self._know(view, number)

    def plan(self, result: Any) -> _Plan | None:
        """Return the plan that gives this result again, or None if one of its tensors is unknown."""
        returned = [result] if isinstance(result, Tensor) else list(result)
        tensors = [one for launch in self.launches for one in launch.arguments if isinstance(one, Tensor)]
        known = self.possible and all(launch.run is not None for launch in self.launches)
        if not known or any(id(one) not in self._origins for one in (*tensors, *returned)):
            return None
        made = [self._origins[id(one)][0] for one in returned]
        device = self.roots[-1].device
        if any(number < self.inputs for number in made) or any(one.device != device for one in self.roots):
            return None
        results = list(dict.fromkeys(made))  # in the order in which they are returned
        whole = self._whole(returned, made)
        shown = [returned[made.index(number)] if whole else self.roots[number] for number in results]
        made_here = [number for number in range(self.inputs, len(self.roots)) if self.roots[number].numel()]
        spaces = [number for number in made_here if number not in results]
        order = [*range(self.inputs), *results, *spaces]
        places = {number: 1 + place for place, number in enumerate(order)}
        offsets, size = [], 0
        for number in spaces:
            offsets.append(size)
            size += -(-self.roots[number].untyped_storage().nbytes() // _APART) * _APART
        within, constants, picks = self._arguments(places)
        return _Plan(
            allocate=_allocator(device),
            results=tuple((tuple(one.shape), one.stride(), one.dtype) for one in shown),
            workspace=(size,),
            offsets=tuple(offsets),
            within=within,
            constants=constants,
            launches=tuple(
                (launch.run, operator.itemgetter(*pick))
                for launch, pick in zip(self.launches, picks, strict=True)
                if launch.run is not None
            ),
            kernels=tuple(launch.kernel for launch in self.launches),
            alive=tuple(launch.compiled for launch in self.launches),
            sequence=None if isinstance(result, Tensor) else type(result),
            views=None if whole else tuple(self._view(one, results) for one in returned),
        )

    def _whole(self, returned: Sequence[Tensor], made: Sequence[int]) -> bool:
        """Return whether every result fills an allocation of its own, with axes in any order."""
        return len(set(made)) == len(made) and all(
            (one.numel(), one.data_ptr()) == (root.numel(), root.data_ptr()) and _is_dense(one) and _is_dense(root)
            for one, root in zip(returned, (self.roots[number] for number in made), strict=True)
        )

    def _view(self, one: Tensor, results: Sequence[int]) -> tuple[int, Any]:
        number, _ = self._origins[id(one)]
        same = one is self.roots[number]
        return results.index(number), None if same else (one.shape, one.stride(), one.storage_offset())

    def _arguments(self, places: dict[int, int]) -> tuple[tuple[_Origin, ...], tuple[Any, ...], list[list[int]]]:
        """Return addresses within others, constants, and for every launch the places of its arguments in the pool."""
        origins = [
            self._origins[id(one)] for launch in self.launches for one in launch.arguments if isinstance(one, Tensor)
        ]
        moved = list(dict.fromkeys(origin for origin in origins if origin[1]))
        first = 1 + len(places)
        constants: list[Any] = []
        picks = []

        def constant(value: Any) -> int:
            constants.append(value)
            return first + len(moved) + len(constants) - 1

        def place_of(value: Any) -> int:
            if not isinstance(value, Tensor):
                return constant(value)
            number, offset = self._origins[id(value)]
            if number not in places:
                return constant(0)  # the address of an empty tensor
            return first + moved.index((number, offset)) if offset else places[number]

        for launch in self.launches:
            fixed = (launch.function, launch.metadata, None, None, None)
            picks.append([*map(constant, launch.grid), 0, *map(constant, fixed), *map(place_of, launch.arguments)])
        return tuple((places[number], offset) for number, offset in moved), tuple(constants), picks
