"""Launch settings: frozen data chosen by pure functions of the shape.

The JIT compiles a kernel again for pointers and strides that are not multiples of 16 bytes. Its layout is another one,
and so is the order of its sums. An image therefore gives the same bits in all batches that begin on 16 bytes and have
the same strides: every tensor that PyTorch allocates, and ``x[1:]`` if an image is a multiple of 16 bytes long.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch

from ._direct import next_power_of_2

Launcher = TypeVar("Launcher", bound=Callable[..., Any])


class Tile(dict[str, int]):
    """A tile that a program works on, with its warps and stages, named as in a launch: ``kernel[grid](..., **tile)``.

    A tile cannot be changed, since all launches of a shape share it. ``Tile(tile, num_warps=8)`` makes another one.
    """

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a tile cannot be changed, because other launches use it; Tile(tile, NAME=...) makes another")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]


def strides(tensor: torch.Tensor | None, axes: int) -> tuple[int, ...]:
    """Return the strides of the first axes, zeros for None."""
    return (0,) * axes if tensor is None else tensor.stride()[:axes]


def fitting(size: int, most: int, least: int = 16) -> int:
    """Return the least power of two that holds ``size``, between ``least`` and ``most``; tensor cores need 16."""
    return min(max(next_power_of_2(size), least), most)


@functools.cache
def row_tile(channels: int) -> Tile:
    """Return the tile of a kernel that streams rows: about 2,048 elements.

    At 4 warps a thread has two 16-byte loads of half precision.
    """
    block_c = fitting(channels, 1024, least=1)
    return Tile(ROWS=2048 // block_c, BLOCK_C=block_c, num_warps=4)


@functools.cache
def whole_rows(channels: int) -> Tile:
    """Return a tile as :func:`row_tile` does, but with all channels of its rows. From 2,048 channels on, warps grow."""
    block_c = next_power_of_2(channels)
    return Tile(ROWS=max(1, 2048 // block_c), BLOCK_C=block_c, num_warps=min(32, max(4, block_c // 512)))


def row_warps(block_c: int) -> int:
    """Return the number of warps for one row: 8 channels a thread, one 16-byte load of half precision."""
    return min(32, max(1, block_c // 256))


MOST_IMAGES = 65_535  # limit of the second and third axis of a grid, where kernels find their image


def needs_parts(images: int) -> bool:
    """Return whether the images need more than one launch."""
    return images > MOST_IMAGES


def parts_of_images(images: int) -> list[slice]:
    """Return the slice of images for every launch."""
    return [slice(first, min(first + MOST_IMAGES, images)) for first in range(0, images, MOST_IMAGES)]


def in_parts(*per_image: str, bounds: str = "", added: tuple[int, ...] = ()) -> Callable[[Launcher], Launcher]:
    """Let a launcher take any number of images: it is called for MOST_IMAGES at a time.

    ``per_image`` names the arguments with an entry for each image, or None; the first is never None. ``bounds`` names
    the offsets, with one entry more. Results are concatenated; those in ``added``, which all images share, are summed.
    """

    def decorate(launcher: Launcher) -> Launcher:
        signature = inspect.signature(launcher)
        place = list(signature.parameters).index(per_image[0])

        @functools.wraps(launcher)
        def call(*args, **kwargs):
            if len(args) <= place or args[place].shape[0] <= MOST_IMAGES:
                return launcher(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            results = []
            for part in parts_of_images(args[place].shape[0]):
                own = {name: given[name][part] for name in per_image if given.get(name) is not None}
                if bounds:
                    own[bounds] = given[bounds][part.start : part.stop + 1]
                results.append(launcher(**{**given, **own}))
            if isinstance(results[0], torch.Tensor) or results[0] is None:
                return _together(results, add=False)
            return tuple(_together(result, add=i in added) for i, result in enumerate(zip(*results, strict=True)))

        return call  # type: ignore[return-value]

    return decorate


def _together(results: Sequence[torch.Tensor | None], *, add: bool) -> torch.Tensor | None:
    tensors = [result for result in results if result is not None]
    if not tensors:
        return None
    return torch.stack(tensors).sum(0) if add else torch.cat(tensors)
