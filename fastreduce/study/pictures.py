"""Pictures of the study: accuracy against keep rate and speed, depth maps, similarity matrices, patterns over images.

All are made of lightness and shape first and of colour second, so that they can be read on paper and without colour
vision. Matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..arguments import counted
from ..draw import fill_merged, grey_dropped
from ..names import FAMILIES, TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Result",
    "accuracy_by_rate",
    "accuracy_by_speed",
    "depth_maps",
    "patterns",
    "scatter",
    "similarity_matrix",
]

# Okabe and Ito's, which people of every colour vision tell apart; the markers and dashes differ as well.
_STYLES = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", ":"))
_GREY = "#555555"


@dataclasses.dataclass(frozen=True)
class Result:
    """Result that one reduced model reached.

    Attributes:
        method: a key of :data:`fastreduce.names.TITLES`.
        keep_rate: of its first stage.
        accuracy: in per cent (top-1, or mean average precision).
        images_per_second: measured, or NaN.
    """

    method: str
    keep_rate: float
    accuracy: float
    images_per_second: float = math.nan


def _figure(width: float, height: float, title: str, subtitle: str) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    left = 0.15 / width
    # A model's name may hold a dollar sign, which would else begin a formula.
    figure.text(left, 1 - 0.3 / height, title, fontsize=12, weight="bold", color="#111111", parse_math=False)
    figure.text(left, 1 - 0.52 / height, subtitle, fontsize=8.5, color=_GREY, parse_math=False)
    return figure


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors="#333333")
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)


def _by_family(results: Sequence[Result]) -> dict[str, dict[str, list[Result]]]:
    """Return family -> method -> its results by descending keep rate; families and methods without any are left out."""
    grouped: dict[str, dict[str, list[Result]]] = {}
    for family, methods in FAMILIES.items():
        for method in methods:
            own = sorted((row for row in results if row.method == method), key=lambda row: -row.keep_rate)
            if own:
                grouped.setdefault(family, {})[method] = own
    return grouped


def _panels(
    results: Sequence[Result], baseline: Result | None, title: str, subtitle: str, across: str, metric: str
) -> tuple[Figure, list[tuple[Axes, dict[str, list[Result]]]]]:
    """Make one panel a family, two beside each other, all with the same axes."""
    grouped = _by_family(results)
    if not grouped:
        raise ValueError(f"no result of a known method to draw; methods are {', '.join(TITLES)}")
    columns = min(2, len(grouped))
    rows = math.ceil(len(grouped) / columns)
    width, height = 3.15 * columns + 0.9, 2.75 * rows + 0.85
    figure = _figure(width, height, title, subtitle)
    places = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    edges = {"left": 0.7 / width, "right": 0.985, "bottom": 0.95 / height, "top": 1 - 0.95 / height}
    figure.subplots_adjust(**edges, wspace=0.08, hspace=0.75)
    for place in places[len(grouped) :]:
        place.remove()
    axes = places[: len(grouped)]
    for panel, (family, _) in zip(axes, grouped.items(), strict=True):
        _plain(panel)
        panel.set_title(family, fontsize=9.5, loc="left", color="#111111")
        panel.set_xlabel(across, fontsize=8.5)
        panel.tick_params(labelbottom=True)
        if baseline is not None:
            panel.axhline(baseline.accuracy, color="#111111", linewidth=1.0, zorder=1)
    for panel in axes[::columns]:
        panel.set_ylabel(metric, fontsize=8.5)
    return figure, list(zip(axes, grouped.values(), strict=True))


def _legend_below(axes: Axes) -> None:
    """Put the legend where no line can run through it."""
    axes.legend(loc="upper left", bbox_to_anchor=(-0.05, -0.22), ncols=2, columnspacing=1, fontsize=8, frameon=False)


def _draw_lines(axes: Axes, methods: Mapping[str, Sequence[Result]], across: str) -> None:
    """Draw a line of accuracy for every method, over an attribute of its results."""
    for (method, rows), (colour, marker, dashes) in zip(methods.items(), _STYLES, strict=False):
        x, y = [getattr(row, across) for row in rows], [row.accuracy for row in rows]
        axes.plot(x, y, color=colour, marker=marker, linestyle=dashes, markersize=5, label=TITLES[method])


def accuracy_by_rate(
    results: Sequence[Result],
    baseline: Result | None = None,
    *,
    title: str = "Accuracy against keep rate",
    subtitle: str = "",
    metric: str = "top-1 accuracy, %",
) -> Figure:
    """Draw lines of every method in a panel for its family; the unreduced model is the horizontal line.

    Raises:
        ValueError: if there is nothing to draw.
    """
    figure, panels = _panels(results, baseline, title, subtitle, "keep rate", metric)
    rates = sorted({row.keep_rate for row in results})
    for axes, methods in panels:
        _draw_lines(axes, methods, "keep_rate")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.set_xlim(max(rates) + 0.05, min(rates) - 0.05)
        _legend_below(axes)
    return figure


def accuracy_by_speed(
    results: Sequence[Result],
    baseline: Result | None = None,
    *,
    title: str = "Accuracy against measured speed",
    subtitle: str = "",
    metric: str = "top-1 accuracy, %",
) -> Figure:
    """Draw :func:`accuracy_by_rate` over images per second; results without a speed are left out.

    Raises:
        ValueError: if there is nothing to draw.
    """
    measured = [row for row in results if math.isfinite(row.images_per_second)]
    figure, panels = _panels(measured, baseline, title, subtitle, "images / s", metric)
    for axes, methods in panels:
        _draw_lines(axes, methods, "images_per_second")
        if baseline is not None:
            axes.plot(baseline.images_per_second, baseline.accuracy, "*", color="#111111", markersize=9, zorder=5)
        _legend_below(axes)
    return figure


def depth_maps(
    maps: Mapping[tuple[str, float], NDArray[np.floating]],
    depth: int,
    *,
    title: str = "Mean depth at which a patch is lost",
    subtitle: str = "",
) -> Figure:
    """Draw a heat map over the patch grid for every method (row) and keep rate (column), on one scale.

    Args:
        maps: (rows, columns) mean depth by method and keep rate; where one is missing its place stays empty.
        depth: the depth of a survivor, which ends the scale.
        title: in bold above.
        subtitle: in grey below that.

    Raises:
        ValueError: if there is nothing to draw.
    """
    if not maps:
        raise ValueError("no depth map to draw")
    methods = [method for method in TITLES if any(key[0] == method for key in maps)]
    rates = sorted({rate for _, rate in maps}, reverse=True)
    cell, left, top = 1.15, 1.15, 1.0
    width, height = max(left + cell * len(rates) + 0.9, 4.6), top + cell * len(methods) + 0.15
    figure = _figure(width, height, title, subtitle)
    shown = None
    for row, method in enumerate(methods):
        for column, rate in enumerate(rates):
            if (values := maps.get((method, rate))) is None:
                continue
            x, y = left + column * cell, height - top - (row + 1) * cell
            axes = figure.add_axes((x / width, y / height, 0.93 * cell / width, 0.93 * cell / height))
            shown = axes.imshow(values, cmap="cividis", vmin=0, vmax=depth, interpolation="nearest")
            axes.set_axis_off()
    for row, method in enumerate(methods):
        y = height - top - (row + 0.535) * cell
        figure.text((left - 0.1) / width, y / height, TITLES[method], fontsize=9, ha="right", va="center")
    for column, rate in enumerate(rates):
        x = left + (column + 0.465) * cell
        figure.text(x / width, 1 - (top - 0.08) / height, f"{rate:g}", fontsize=9, ha="center", va="bottom")
    assert shown is not None
    bar_height = min(2.4, cell * len(methods))
    x, y = left + cell * len(rates) + 0.1, height - top - bar_height
    bar = figure.colorbar(shown, cax=figure.add_axes((x / width, y / height, 0.14 / width, bar_height / height)))
    bar.ax.tick_params(labelsize=8)
    bar.set_label("block", fontsize=8)
    return figure


def similarity_matrix(
    names: Sequence[str], values: NDArray[np.floating], *, title: str, subtitle: str = "", digits: int = 2
) -> Figure:
    """Draw a square table of similarities, dark where they are large; NaN stays empty.

    Args:
        names: of rows and columns.
        values: (len(names), len(names)).
        title: in bold above.
        subtitle: in grey below that.
        digits: decimals in the cells.

    Raises:
        ValueError: if the matrix does not fit the names.
    """
    if values.shape != (len(names), len(names)):
        raise ValueError(f"values must have shape {(len(names), len(names))} to go with the names, got {values.shape}")
    cell, left, top, bottom = 0.42, 1.25, 0.75, 0.85
    side = cell * len(names)
    width, height = max(left + side + 0.25, 4.4), top + side + bottom
    figure = _figure(width, height, title, subtitle)
    axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    axes.imshow(np.ma.masked_invalid(values), cmap="Greys", vmin=low - 0.15 * (high - low), vmax=high or 1.0)
    middle = (low + high) / 2
    for row, column in np.argwhere(np.isfinite(values)):
        value = float(values[row, column])
        colour = "white" if value > middle else "black"
        axes.text(column, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=7.5, color=colour)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8.5)
    axes.set_yticks(range(len(names)), names, fontsize=8.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def scatter(
    points: Sequence[tuple[str, float, float]], *, title: str, across: str, up: str, subtitle: str = ""
) -> Figure:
    """Draw points (method, x, y), one marker a family, with a label each where there are few."""
    figure = _figure(5.6, 4.2, title, subtitle)
    axes = figure.add_axes((0.13, 0.14, 0.84, 0.68))
    _plain(axes)
    for (family, methods), (colour, marker, _) in zip(FAMILIES.items(), _STYLES, strict=True):
        own = [point for point in points if point[0] in methods]
        if own:
            x, y = [point[1] for point in own], [point[2] for point in own]
            axes.plot(x, y, linestyle="", marker=marker, color=colour, markersize=5.5, label=family)
    axes.margins(0.12, 0.08)
    if len(points) <= 14:
        middle = sum(axes.get_xlim()) / 2
        for method, x_value, y_value in points:
            words = TITLES.get(method, method)
            side, shift = ("right", -6) if x_value > middle else ("left", 6)
            label = axes.annotate(words, (x_value, y_value), (shift, 0), textcoords="offset points", ha=side)
            label.set(va="center", fontsize=7.5, color=_GREY)
    axes.set_xlabel(across, fontsize=8.5)
    axes.set_ylabel(up, fontsize=8.5)
    axes.legend(fontsize=8, frameon=False)
    return figure


def _pattern(image: NDArray[np.uint8], slot: NDArray[np.integer], merges: bool, grid: tuple[int, int]) -> NDArray:
    """Draw merged regions filled, or dropped patches grey, on one picture."""
    slots = slot.astype(np.int64).reshape(grid)
    return fill_merged(image, slots) if merges else grey_dropped(image, slots >= 0)


def patterns(
    images: Sequence[NDArray[np.uint8]],
    slots: Mapping[str, Sequence[NDArray[np.integer]]],
    grid: tuple[int, int],
    *,
    merging: Iterable[str] = FAMILIES["Hard merging"],
    title: str = "What the last stage keeps",
    subtitle: str = "",
    pixels: int = 16,
) -> Figure:
    """Draw rows of images, first as they are and then as every method leaves them.

    Args:
        images: (height, width, 3) uint8 each; height and width are multiples of the patch grid.
        slots: for every method, one (patches,) array an image: the token that each original patch is in, -1 dropped.
        grid: rows and columns of patches.
        merging: methods whose regions are filled with their mean colour; of the others the lost patches turn grey.
        title: in bold above.
        subtitle: in grey below that.
        pixels: least width of a patch in the picture; smaller images are enlarged by a whole factor.

    Raises:
        ValueError: a method has another number of patterns than there are images.
    """
    merging = set(merging)
    for method, own in slots.items():
        if len(own) != len(images):
            raise ValueError(f"{method} has {counted(len(own), 'pattern')} for {counted(len(images), 'image')}")
    factor = math.ceil(pixels * grid[0] / images[0].shape[0])
    enlarged = [np.kron(image, np.ones((factor, factor, 1), np.uint8)) for image in images]
    columns = 1 + len(slots)
    cell, top = 0.82, 0.95
    width, height = max(0.3 + columns * cell, 4.4), top + len(images) * cell + 0.1
    figure = _figure(width, height, title, subtitle)
    for row, image in enumerate(enlarged):
        drawn = [image, *(_pattern(image, own[row], method in merging, grid) for method, own in slots.items())]
        for column, picture in enumerate(drawn):
            x, y = 0.15 + column * cell, height - top - (row + 1) * cell
            axes = figure.add_axes((x / width, y / height, 0.94 * cell / width, 0.94 * cell / height))
            axes.imshow(picture, interpolation="none")
            axes.set_axis_off()
    for column, name in enumerate(("Image", *(TITLES.get(method, method) for method in slots))):
        x = 0.15 + (column + 0.47) * cell
        figure.text(x / width, 1 - (top - 0.08) / height, name, fontsize=8, ha="center", va="bottom")
    return figure
