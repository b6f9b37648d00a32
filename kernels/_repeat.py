"""Launchers repeated without their Python: what a call launched is launched again for arguments like its own.

A launcher decides by shapes, strides, dtypes, alignment and numbers, never by what is in a tensor.
So the second call with the same of them is written down: what it allocates, launches and returns.
From the third on, the same is allocated and launched, and the launcher is not called.
A launcher that asks PyTorch for more than room and views, a sum for example, is called as ever.
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

_MOST_KEPT = 1024  # argument lists of a launcher
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
_WITHOUT_SOURCE = frozenset({"empty", "empty_strided"})  # whose first argument is a size
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
_NEW, _SEEN = object(), object()  # a call whose like may never come again is not worth writing down
_Origin = tuple[int, int]  # number of an input or of an allocation, and an offset in bytes


def repeated(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Return the launcher as :class:`Repeated`; where kernels are interpreted, nothing is launched and it stays.

    Args:
        launcher: takes tensors, numbers, strings, None, and tuples of numbers, and returns new tensors.
    """
    return launcher if INTERPRETED else Repeated(launcher)


class Repeated:
    """A launcher that writes down what it launches, and repeats it; see the module."""

    def __init__(self, launcher: Callable[..., Any]):
        self.launcher = launcher
        self.driver: Any = None
        self.kept: dict[Any, Any] = {}  # a plan, _SEEN, or None for what cannot be written down

    def __call__(self, *args: Any) -> Any:
        if is_replaced() or (_records and is_recorded()):
            return self.launcher(*args)
        try:
            active = driver.active
        except RuntimeError:  # no GPU
            return self.launcher(*args)
        if active is not self.driver:
            self.kept, self.driver = {}, active  # in this order, for other threads
        device = active.get_current_device()
        # All that a launcher decides by. The kinds too, since 1, True and 1.0 are equal.
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
        """Call the launcher for arguments that were never seen, or once, or while somebody watches."""
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
    """Return the arguments with a view in place of a tensor that comes again, so that each is known by its identity."""
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
    """A plan of what a call does.

    A pool of values holds the stream, the addresses of the inputs, results and workspaces, addresses within these, and
    constants. Every launch picks its own.

    Attributes:
        results: shape, strides and dtype of every new tensor that is returned, or of what it is a view of.
        allocate: makes a tensor of a shape, strides and a dtype on the current device.
        workspace: bytes of all that is not returned, as a shape.
        offsets: where its parts begin.
        within: place of an address in the pool, and the bytes to add.
        launches: function that launches, and what picks its arguments.
        kernels: those launched.
        alive: what the functions need without holding it: Triton unloads a compiled kernel that nobody holds.
        sequence: what the results are put into, or None for one tensor.
        views: number of the result, and shape, strides and offset of what is returned of it, or None for all.
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
            space = allocate(self.workspace, (1,), torch.uint8)  # held until all is launched
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
    """Return what makes a tensor on the current device, by a shape, strides and a dtype."""
    # As compiled models allocate: half the time of torch.empty_strided.
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
    """Return whether a tensor takes as much memory as it has elements: no gaps, and nothing expanded."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return not tensor.numel() or last + 1 == tensor.numel()


class _Record(TorchFunctionMode):
    """All that a launcher asks of PyTorch and of Triton, written down while it runs."""

    def __init__(self, inputs: list[Tensor]):
        super().__init__()
        self.inputs = len(inputs)
        self.roots = list(inputs)  # and then what is allocated
        self.launches: list[Launch] = []
        self.possible = True
        self._origins: dict[int, _Origin] = {}  # of every known tensor, by its id
        self._alive: list[Tensor] = []  # so that no id comes again
        for number, one in enumerate(inputs):
            self._know(one, number)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.__name__
        if name == "__get__":
            name = function.__self__.__name__
        source = 0 if name in _WITHOUT_SOURCE else 1
        # A size or an index that is a tensor is the number in it, and another one the next time.
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
            # A copy, or what has no address.
            if view.untyped_storage().data_ptr() != storage or not view.numel():
                self.possible = False
            elif id(view) not in self._origins:
                self._know(view, number)

    def plan(self, result: Any) -> _Plan | None:
        """Return what to do for the same result, None if something is not known."""
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
        """Return whether every result is all of an allocation, with axes in any order, and of its own."""
        return len(set(made)) == len(made) and all(
            (one.numel(), one.data_ptr()) == (root.numel(), root.data_ptr()) and _is_dense(one) and _is_dense(root)
            for one, root in zip(returned, (self.roots[number] for number in made), strict=True)
        )

    def _view(self, one: Tensor, results: Sequence[int]) -> tuple[int, Any]:
        number, _ = self._origins[id(one)]
        same = one is self.roots[number]
        return results.index(number), None if same else (one.shape, one.stride(), one.storage_offset())

    def _arguments(self, places: dict[int, int]) -> tuple[tuple[_Origin, ...], tuple[Any, ...], list[list[int]]]:
        """Return addresses within others, constants, and for every launch the places in the pool of its arguments."""
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
                return constant(0)  # the address of whatever is empty
            return first + moved.index((number, offset)) if offset else places[number]

        for launch in self.launches:
            fixed = (launch.function, launch.metadata, None, None, None)
            picks.append([*map(constant, launch.grid), 0, *map(constant, fixed), *map(place_of, launch.arguments)])
        return tuple((places[number], offset) for number, offset in moved), tuple(constants), picks
