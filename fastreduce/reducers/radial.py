"""Static radial patterns: keep what lies near the centre of the image (Haurum et al. 2023)."""

from __future__ import annotations

import functools
import operator
import struct
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..arguments import counted, number
from ..tokens import Plan, Tokens
from .base import ModelShape, Reducer, idle_stages, new_schedule
from .block import AttentionBlock, gather, is_captured
from .schedule import Keep, KeepRate, KeepSchedule, keep_schedule, stage_blocks

__all__ = ["Radial", "contiguous_radii", "radii_of_counts", "ring_radius"]

Norm = Literal["l1", "l2", "linf"]
NORMS = ("l1", "l2", "linf")


def _float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def _linspace(start: float, end: float, steps: int) -> list[float]:
    """Return ``torch.linspace`` in float32 as vectorised CPUs round it: from both ends, with fused multiply-adds.

    Computed without torch, but for a square root, so that no default dtype, device or tracing changes which patches are
    kept.
    """
    start, end = _float32(start), _float32(end)
    if steps == 1:
        return [start]
    step = _float32(_float32(end - start) / (steps - 1))
    half = steps // 2
    return [
        _float32(start + step * index) if index < half else _float32(end - step * (steps - index - 1))
        for index in range(steps)
    ]


def _square_roots(values: list[float]) -> list[float]:
    """Return the square roots as torch's float32 has them, which are not always the nearest floats."""
    with _disable_current_modes():  # no others: torch.export puts a change of the gradient's mode into its graph
        return torch.sqrt(torch.tensor(values, dtype=torch.float32, device="cpu")).tolist()


def ring_radius(grid: tuple[int, int], norm: str) -> list[float]:
    """Return the norm of every patch's coordinates, in the released code's float32 rounding (equal rings may split)."""
    rows, columns = (_linspace(-size // 2, size // 2, size) for size in grid)
    if norm == "l1":
        return [_float32(abs(y) + abs(x)) for y in rows for x in columns]
    if norm == "l2":
        return _square_roots([_float32(_float32(y * y) + _float32(x * x)) for y in rows for x in columns])
    if norm == "linf":
        return [max(abs(y), abs(x)) for y in rows for x in columns]
    raise ValueError(f"norm must be 'l1', 'l2' or 'linf', got {norm!r}")


def contiguous_radii(
    radius: Sequence[float], grid: tuple[int, int], first: int, last: int, min_radius: float
) -> list[float]:
    """Return the radius of every block from ``first`` to ``last``: from the corner down towards min_radius."""
    centre = radius[grid[0] // 2 * grid[1] + grid[1] // 2]
    points = _linspace(radius[0], min_radius if min_radius > 0 else centre, last - first + 3)
    offset = 0 if first == 0 else 1
    return points[offset : offset + last - first + 1]


def radii_of_counts(radius: Sequence[float], counts: Sequence[int]) -> list[float]:
    """Return the radius whose disc comes nearest to each wanted number of patches, the smaller on a tie."""
    values = sorted(set(radius))
    held = [sum(one <= value for one in radius) for value in values]
    return [values[min(range(len(values)), key=lambda ring: abs(held[ring] - count))] for count in counts]


@functools.lru_cache(maxsize=256)
def _patterns(
    grid: tuple[int, int], norm: str, blocks: tuple[int, ...], schedule: KeepSchedule | None, min_radius: float
) -> tuple[tuple[int, ...], ...]:
    """Return what each stage keeps, as places among the patches present, ascending; the innermost ring always stays."""
    radius = ring_radius(grid, norm)
    if schedule is None:
        radii = contiguous_radii(radius, grid, blocks[0], blocks[-1], min_radius)
    else:
        radii = radii_of_counts(radius, [schedule.count(stage, len(radius)) for stage in range(len(blocks))])
    present, patterns = list(range(len(radius))), []
    for limit in radii:
        limit = max(limit, min(radius))
        inside = [place for place, patch in enumerate(present) if radius[patch] <= limit]
        present = [present[place] for place in inside]
        patterns.append(tuple(inside))
    return tuple(patterns)


class Radial(Reducer):
    """Drop, before a block, every patch outside a radius; the same patches for every image.

    The patterns follow from the patch grid of each pass. They are no buffers: nothing of them is in the state dict,
    and a model may be patched on the meta device, moved, copied and given other image sizes.

    Args:
        blocks: where the stages stand (``"contiguous"``: the first and the last of them, and all between).
        shape: the model's grid, for passes that do not tell theirs (``Tokens.grid``).
        schedule: wanted counts for ``"stages"``, None for ``"contiguous"``.
        norm: ``"l1"``, ``"l2"`` or ``"linf"``.
        min_radius: where a contiguous schedule shrinks to; 0 or less means the centre cell's own radius.
        backend: see :func:`fastreduce.backend`.
    """

    name = "radial"
    grid: tuple[int, int]

    def __init__(
        self,
        blocks: tuple[int, ...],
        shape: ModelShape,
        schedule: KeepSchedule | None,
        norm: Norm = "l2",
        min_radius: float = 1.0,
        backend: str = "auto",
    ):
        if norm not in NORMS:
            raise ValueError(f"norm must be 'l1', 'l2' or 'linf', got {norm!r}")
        if schedule is None:
            blocks = tuple(range(blocks[0], blocks[-1] + 1))
        if len(shape.grid) != 2:
            raise ValueError(f"radial patterns are for grids of rows and columns, and this model's is {shape.grid}")
        super().__init__(blocks, backend)
        self.norm, self.schedule, self.min_radius = norm, schedule, number("min_radius", min_radius)
        self.grid = (shape.grid[0], shape.grid[1])
        self._placed: dict[str, Tensor] = {}
        self._made_for = f"{self.schedule} {self.blocks}"
        self._check_innermost()

    def _check_innermost(self) -> None:
        """Raise if a contiguous schedule ends inside the innermost ring of the model's own grid."""
        if self.schedule is not None:
            return
        radius = ring_radius(self.grid, self.norm)
        radii = contiguous_radii(radius, self.grid, self.blocks[0], self.blocks[-1], self.min_radius)
        for stage, limit in enumerate(radii):
            if limit < min(radius):
                raise ValueError(f"stage {stage} would keep no patch: no centre lies within {limit:.3g}")

    @classmethod
    def make(
        cls,
        shape: ModelShape,
        /,
        *,
        at: int | Sequence[int] | None,
        keep_rate: KeepRate,
        keep: Keep,
        backend: str,
        schedule: Literal["contiguous", "stages"] | None = None,
        **options: Any,
    ) -> Radial:
        """Make a reducer.

        ``schedule=None`` means ``"stages"`` where a keep rate or count is given, else ``"contiguous"``.
        """
        blocks = stage_blocks(at, shape.depth)
        given = keep_rate is not None or keep is not None
        chosen = schedule if schedule is not None else ("stages" if given else "contiguous")
        if chosen not in ("contiguous", "stages"):
            raise ValueError(f"schedule must be 'contiguous' or 'stages', got {schedule!r}")
        if chosen == "contiguous":
            if given:
                raise ValueError(
                    f"a contiguous radial schedule has no keep rate, got keep_rate={keep_rate!r} and keep={keep!r}"
                )
            return cls(blocks, shape, None, backend=backend, **options)
        if "min_radius" in options:
            raise ValueError(
                f"min_radius belongs to the contiguous schedule, got {options['min_radius']!r} with 'stages'"
            )
        wanted = keep_schedule(keep_rate, keep, len(blocks), shape.patches)
        return cls(blocks, shape, wanted, backend=backend, **options)

    @torch.compiler.assume_constant_result
    def patterns(self, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
        """Return what each stage keeps on a grid: places among the patches present before it, ascending."""
        return _patterns((int(rows), int(columns)), self.norm, self.blocks, self.schedule, self.min_radius)

    def _kept(self, stage: int, grid: tuple[int, int], like: Tensor) -> Tensor:
        """Return the pattern (K,) int64 of a stage on the device of ``like``."""
        rows, columns = grid
        # torch.compile compares what a graph has read: without the schedule's name another one would get old patterns.
        key = f"{rows} {columns} {stage} {like.device} {self._made_for}"
        captured = is_captured()
        if not captured and type(like) is Tensor and key in self._placed:
            return self._placed[key]
        places = self.patterns(rows, columns)[stage]
        if captured or type(like) is not Tensor:
            return torch.tensor(places, dtype=torch.int64, device=like.device)
        with torch.inference_mode(False):  # else no later pass could save it for its backward pass
            kept = torch.tensor(places, dtype=torch.int64, device=like.device)
        if type(kept) is Tensor:
            self._placed[key] = kept
        return kept

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the patterns that lie on devices: a copy places its own."""
        return {**self.__dict__, "_placed": {}}

    def concerns(self, shape: ModelShape) -> dict[str, str]:
        """Name the stages that the schedule leaves nothing to do."""
        return {} if self.schedule is None else idle_stages(self.name, self.schedule)

    def reschedule(
        self,
        shape: ModelShape,
        *,
        keep_rate: KeepRate = None,
        keep: Keep = None,
        at: int | Sequence[int] | None = None,
    ) -> None:
        """Take other counts in place; a contiguous schedule has none."""
        if self.schedule is None:
            raise ValueError(
                f"a contiguous radial schedule has no keep rate, got keep_rate={keep_rate!r} and keep={keep!r}"
            )
        blocks = self._new_blocks(shape, at)
        self.schedule = new_schedule(keep_rate, keep, blocks, shape)
        self.blocks, self._placed, self._made_for = blocks, {}, f"{self.schedule} {blocks}"

    def counts(self, shape: ModelShape) -> list[int]:
        """Patch tokens after each stage."""
        return [len(kept) for kept in self.patterns(*shape.grid)]

    def before(self, block: AttentionBlock, tokens: Tokens, stage: int) -> Tokens:
        """Gather the patches inside the radius, in ascending position."""
        rows, columns = getattr(tokens, "grid", None) or self.grid
        grid = operator.index(rows), operator.index(columns)  # a pattern is constant: a graph is of one grid
        if grid[0] * grid[1] != tokens.patches:
            raise ValueError(f"the radial patterns are for a grid of {grid}, got {counted(tokens.patches, 'patch')}")
        kept = self._kept(stage, grid, tokens.x)
        if len(kept) == tokens.num_patches:
            return tokens
        index = kept.expand(tokens.x.shape[0], -1)
        x, normed = gather(block.attention_norm(tokens), tokens.x, index, prefix=tokens.prefix, backend=tokens.backend)
        plan = Plan(self.blocks[stage], tokens.num_patches, len(kept), kept=kept)
        return tokens.reduced(x, plan, normed=normed)
