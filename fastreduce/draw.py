"""Pictures of what a reduction did: pruned patches turned grey, merged regions in one colour and outlined.

And of what it brings: speed-up against keep rate.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Curve",
    "Panel",
    "fill_merged",
    "grey_dropped",
    "save_curves",
    "save_panels",
    "save_tradeoff",
    "side_by_side",
]

Pixels = NDArray[np.uint8]  # (height, width, 3)
Panel = tuple[Pixels, str, str]  # picture, caption, second line of the caption
Point = tuple[float, float, float, float, bool]  # keep rate, value, its quartiles, whether the marker is filled
Curve = tuple[str, Sequence[Point]]  # label, points

DPI = 200
# Okabe and Ito's, which people of every colour vision tell apart; the markers differ as well.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MOST_CURVES = len(_COLOURS)
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)


def _cells(image: Pixels, rows: int, columns: int) -> NDArray[np.float32]:
    """Cut (rows * h, columns * w, 3) into cells (rows, h, columns, w, 3) in [0, 255]."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"a picture must be (height, width, 3) uint8, got {image.shape} {image.dtype}")
    height, width, _ = image.shape
    if height % rows or width % columns:
        raise ValueError(f"a picture of {height} x {width} pixels cannot be cut into a grid of {rows} x {columns}")
    return image.reshape(rows, height // rows, columns, width // columns, 3).astype(np.float32)


def _is_dark(image: Pixels) -> bool:
    """Return whether light lines and light greys stand out from the picture better than dark ones."""
    return bool(np.median(image @ _LUMINANCE) < 140)


def grey_dropped(image: Pixels, kept: NDArray[np.bool_]) -> Pixels:
    """Turn dropped patches into a grey ghost of themselves, light on a dark picture and dark on a light one.

    Only lightness and an outline tell kept from dropped, so that the picture reads without colour vision.

    Args:
        image: (height, width, 3) uint8; height and width are multiples of the patch grid.
        kept: (rows, columns) bool.

    Returns:
        A new picture; the inside of a kept patch stays as it was.

    Raises:
        ValueError: a picture of another shape or dtype, or one that the grid does not divide.
    """
    rows, columns = kept.shape
    cells = _cells(image, rows, columns)
    grey = (cells @ _LUMINANCE)[..., None]
    ghost = np.broadcast_to((205 if _is_dark(image) else 12) + 0.16 * grey, cells.shape)
    out = np.where(kept[:, None, :, None, None], cells, ghost).reshape(image.shape)
    return _outline(out.round().astype(np.uint8), kept.astype(np.int64), 64 if _is_dark(image) else 255)


def fill_merged(image: Pixels, slot: NDArray[np.int64]) -> Pixels:
    """Fill every group of merged patches with its mean colour and outline it; a patch on its own stays as it is.

    Args:
        image: (height, width, 3) uint8; height and width are multiples of the patch grid.
        slot: (rows, columns) the token that each patch is in, from 0; -1 for dropped patches, which turn grey.

    Returns:
        A new picture.

    Raises:
        ValueError: as :func:`grey_dropped`.
    """
    rows, columns = slot.shape
    cells = _cells(image, rows, columns)
    flat = slot.ravel() + 1
    size = np.bincount(flat)
    means = cells.mean(axis=(1, 3)).reshape(-1, 3)
    total = np.stack([np.bincount(flat, weights=means[:, channel]) for channel in range(3)], axis=1)
    colour = (total / np.maximum(size, 1)[:, None])[flat].reshape(rows, 1, columns, 1, 3)
    merged = (size[flat] > 1).reshape(rows, columns)
    out = np.where(merged[:, None, :, None, None], colour, cells).reshape(image.shape).round().astype(np.uint8)
    alone = np.where(merged, slot, -1)  # no line between two patches that nothing happened to
    out = _outline(out, alone, 255 if _is_dark(image) else 0)
    return grey_dropped(out, slot >= 0) if (slot < 0).any() else out


def _outline(image: Pixels, label: NDArray[np.int64], value: int) -> Pixels:
    """Draw a line between neighbouring patches of different labels."""
    image = image.copy()
    rows, columns = label.shape
    high, wide = image.shape[0] // rows, image.shape[1] // columns
    for row, column in np.argwhere(label[1:] != label[:-1]):
        y, x = (row + 1) * high, column * wide
        image[y - 1 : y + 1, max(x - 1, 0) : x + wide + 1] = value
    for row, column in np.argwhere(label[:, 1:] != label[:, :-1]):
        y, x = row * high, (column + 1) * wide
        image[max(y - 1, 0) : y + high + 1, x - 1 : x + 1] = value
    return image


def side_by_side(panels: Sequence[Panel], title: str, subtitle: str = "", note: str = "") -> Figure:
    """Return a figure with the pictures in a row, one screen pixel for each of theirs.

    Args:
        panels: pictures of one size, each with one or two lines below it.
        title: in bold above them.
        subtitle: in grey, on the right of the title.
        note: a line of small print below.

    Raises:
        ValueError: no picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not panels:
        raise ValueError("give at least one picture")
    height, width, _ = panels[0][0].shape
    gap, margin, top, caption = 28, 28, 96, 84
    bottom = margin + (40 if note else 0)
    wide = 2 * margin + len(panels) * width + (len(panels) - 1) * gap
    high = top + height + caption + bottom
    figure = Figure(figsize=(wide / DPI, high / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)

    def text(x: float, y: float, words: str, size: float, **style: object) -> None:
        figure.text(x / wide, 1 - y / high, words, fontsize=size, **style)  # type: ignore[arg-type]

    text(margin, 58, title, 14, weight="bold", color="#111111", va="baseline")
    text(wide - margin, 58, subtitle, 8.5, color="#555555", va="baseline", ha="right")
    for index, (picture, first, second) in enumerate(panels):
        left = margin + index * (width + gap)
        axes = figure.add_axes((left / wide, (bottom + caption) / high, width / wide, height / high))
        axes.imshow(picture, interpolation="none", aspect="auto")
        axes.set_axis_off()
        middle = left + width / 2
        text(middle, top + height + 34, first, 10, color="#111111", va="baseline", ha="center")
        text(middle, top + height + 66, second, 8.5, color="#555555", va="baseline", ha="center")
    if note:
        text(margin, high - margin, note, 7.5, color="#777777", va="baseline")
    return figure


def save_panels(
    path: str | os.PathLike[str], panels: Sequence[Panel], title: str, subtitle: str = "", note: str = ""
) -> None:
    """Write :func:`side_by_side` as a PNG of 200 dots an inch."""
    side_by_side(panels, title, subtitle, note).savefig(path, dpi=DPI, metadata={"Software": "fastreduce"})


def save_curves(
    path: str | os.PathLike[str], curves: Sequence[Curve], title: str, subtitle: str = "", note: str = ""
) -> None:
    """Write a PNG with a curve of speed-ups for every batch, quartiles as bands, and the line of the unreduced model.

    Args:
        path: where to.
        curves: at most seven, of a shared set of keep rates; they run from left, all kept, to right.
        title: in bold above.
        subtitle: in grey below that.
        note: a line of small print at the foot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.0), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.09, 0.945, title, fontsize=13, weight="bold", color="#111111")
    figure.text(0.09, 0.905, subtitle, fontsize=8.5, color="#555555")
    figure.text(0.09, 0.02, note, fontsize=7.5, color="#777777")
    axes = figure.add_axes((0.09, 0.15, 0.88, 0.72))
    axes.axhline(1.0, color="#111111", linewidth=1.0, zorder=1, label="unreduced")
    for (label, points), colour, marker in zip(curves, _COLOURS, "osD^vPX", strict=False):
        rates, values, lows, highs, filled = zip(*points, strict=True)
        axes.fill_between(rates, lows, highs, color=colour, alpha=0.18, linewidth=0, zorder=2)
        axes.plot(rates, values, color=colour, linewidth=1.8, zorder=3)
        for rate, value, full in zip(rates, values, filled, strict=True):
            inside = colour if full else "white"
            axes.plot(rate, value, marker, color=colour, markerfacecolor=inside, markersize=6, zorder=4)
        axes.plot([], [], color=colour, marker=marker, linewidth=1.8, markersize=6, label=label)
    ticks = sorted({point[0] for _, points in curves for point in points})
    axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
    axes.invert_xaxis()
    axes.set_xlabel("keep rate", fontsize=9)
    axes.set_ylabel("times as fast as the unreduced model", fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8.5, frameon=False, loc="upper left")
    figure.savefig(path, dpi=DPI, metadata={"Software": "fastreduce"})


def save_tradeoff(
    path: str | os.PathLike[str],
    lines: Sequence[tuple[str, Sequence[tuple[float, float, str]]]],
    title: str,
    subtitle: str = "",
    note: str = "",
    chosen: tuple[str, str] | None = None,
    y_label: str = "fidelity: mean cosine of what the head reads",
) -> None:
    """Write a PNG of fidelity against speed-up, a line for every method.

    Args:
        path: where to.
        lines: label, and points of (times as fast, fidelity, what stands beside the point).
        title: in bold above.
        subtitle: in grey below that.
        note: a line of small print at the foot.
        chosen: label of a line and of a point in it, which gets a ring.
        y_label: of the axis of fidelity.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.2), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.09, 0.945, title, fontsize=13, weight="bold", color="#111111")
    figure.text(0.09, 0.905, subtitle, fontsize=8.5, color="#555555")
    figure.text(0.09, 0.02, note, fontsize=7.5, color="#777777")
    axes = figure.add_axes((0.09, 0.15, 0.7, 0.72))
    axes.axvline(1.0, color="#111111", linewidth=1.0, zorder=1)
    for index, (label, points) in enumerate(lines):
        colour, marker = _COLOURS[index % len(_COLOURS)], "osD^vPX"[index % 7]
        style = ("-", "--", ":")[index // len(_COLOURS) % 3]
        speeds, values, words = zip(*points, strict=True)
        axes.plot(
            speeds, values, style, marker=marker, color=colour, linewidth=1.5, markersize=5, label=label, zorder=3
        )
        for speed, value, word in points:
            if chosen == (label, word):
                axes.plot(speed, value, "o", color="none", markeredgecolor="#111111", markersize=14, zorder=4)
        axes.annotate(
            words[-1], (speeds[-1], values[-1]), (4, -9), textcoords="offset points", fontsize=7, color=colour
        )
    axes.set_xlabel("times as fast as the unreduced model", fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.grid(color="#e4e4e4", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=DPI, metadata={"Software": "fastreduce"})
