"""Pictures of what ``bench.models`` measured: images/s against keep rate, and the share of the free slice by method."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["save_plots"]

DPI = 150
_GREY = "#555555"
_MARKERS = "osD^vP"
_POINTS = 72  # in an inch


def save_plots(groups: Iterable[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Save two pictures for each model, batch, step and mode that has any figures.

    Args:
        groups: what :func:`bench.models.measure_models` gave.
        folder: made if it is not there; pictures in it are replaced.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    together: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for group in groups:
        if group["reason"] is None:
            key = tuple(group[name] for name in ("model", "batch", "step", "mode"))
            together.setdefault(key, []).append(group)
    files = []
    for (model, batch, step, mode), members in together.items():
        members = sorted(members, key=lambda group: -group["keep_rate"])
        subtitle = f"{model}, batch {batch}, {members[0]['dtype']}, {step}, {mode}"
        slug = f"{model}-batch{batch}-{step}-{mode}"
        for name, draw in (("images-per-second", _draw_speeds), ("share-of-free-slice", _draw_shares)):
            if (figure := draw(members, subtitle)) is not None:
                files.append(folder / f"{name}-{slug}.png")
                figure.savefig(files[-1], dpi=DPI, metadata={"Software": "fastreduce"})
    return files


def _new_figure(width: float, height: float, title: str, subtitle: str) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.02, 1 - 0.32 / height, title, fontsize=12, weight="bold", color="#111111")
    figure.text(0.02, 1 - 0.54 / height, subtitle, fontsize=8.5, color=_GREY)
    return figure


def _plain_axes(figure: Figure, left: float, bottom: float, right: float, top: float) -> Axes:
    """Make axes with margins in inches, without the lines that carry nothing."""
    width, height = figure.get_size_inches()
    area = (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
    axes = figure.add_axes(area)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5, colors="#333333")
    return axes


def _spread_out(wanted: Sequence[float], gap: float) -> list[float]:
    """Return positions near the wanted ones, in their order, at least ``gap`` apart."""
    clusters: list[list[float]] = []  # wanted positions less their place in the queue: equal ones touch
    for place, index in enumerate(sorted(range(len(wanted)), key=lambda index: wanted[index])):
        clusters.append([wanted[index] - place * gap])
        while len(clusters) > 1 and statistics.fmean(clusters[-2]) > statistics.fmean(clusters[-1]):
            clusters[-2:] = [clusters[-2] + clusters[-1]]
    settled = [statistics.fmean(cluster) for cluster in clusters for _ in cluster]
    positions = [0.0] * len(wanted)
    for place, index in enumerate(sorted(range(len(wanted)), key=lambda index: wanted[index])):
        positions[index] = settled[place] + place * gap
    return positions


def _lines(groups: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """Keep rates and images/s of every method and of the free slice, as far as they were measured."""
    lines: dict[str, tuple[list[float], list[float]]] = {"free slice": ([], [])}
    for group in groups:
        common = group["methods"][0]["counts"]
        slices = [row for row in group["free_slices"] if row["counts"] == common]
        for label, row in [
            *(("free slice", row) for row in slices),
            *((row["label"], row) for row in group["methods"]),
        ]:
            rates, speeds = lines.setdefault(label, ([], []))
            if row["images_per_second"] is not None:
                rates.append(group["keep_rate"])
                speeds.append(row["images_per_second"])
    return {label: line for label, line in lines.items() if line[0]}


def _draw_speeds(groups: Sequence[Mapping[str, Any]], subtitle: str) -> Figure | None:
    """Return the smallest keep rate is on the right, where the lines are furthest apart and have their names."""
    from matplotlib import colormaps

    lines = _lines(groups)
    unreduced = [group["unreduced"]["images_per_second"] for group in groups]
    unreduced = [speed for speed in unreduced if speed is not None]
    if not lines:
        return None
    figure = _new_figure(8.4, 5.6, "Images per second against keep rate", subtitle)
    axes = _plain_axes(figure, 0.8, 0.65, 1.5, 0.85)
    palette = [*colormaps["tab10"].colors, *colormaps["Dark2"].colors]
    labels: list[tuple[str, Any, float, float]] = []
    methods = 0
    for label, (rates, speeds) in lines.items():
        style: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1.6, "zorder": 3}
        if label != "free slice":
            marker = _MARKERS[methods % len(_MARKERS)]
            style = {"color": palette[methods % len(palette)], "marker": marker, "markersize": 4.5, "linewidth": 1.2}
            methods += 1
        axes.plot(rates, speeds, **style)
        labels.append((label, style["color"], rates[-1], speeds[-1]))
    rates = [group["keep_rate"] for group in groups]
    pad = 0.04 * (rates[0] - rates[-1]) or 0.05
    axes.set_xlim(rates[0] + pad, rates[-1] - pad)
    if unreduced:
        level = statistics.median(unreduced)
        axes.axhline(level, color=_GREY, linewidth=1.2)
        labels.append(("unreduced", _GREY, rates[-1] - pad, level))
    axes.set_ylim(bottom=0)
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.set_xlabel("keep rate of each stage (fewer tokens to the right)", fontsize=9)
    axes.set_ylabel("images/s", fontsize=9)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    _name_lines(figure, axes, labels)
    return figure


def _name_lines(figure: Figure, axes: Axes, labels: Sequence[tuple[str, Any, float, float]]) -> None:
    """Write each line's name beside its end, moved apart where they would overlap, with a thread to the end."""
    font = 8.0
    size = figure.get_size_inches() * DPI
    ends = [axes.transData.transform((x, y)) for _, _, x, y in labels]
    edge = axes.transAxes.transform((1, 0))[0]
    heights = _spread_out([end[1] for end in ends], gap=1.35 * font / _POINTS * DPI)
    lowest, highest = (axes.transAxes.transform((0, y))[1] for y in (0, 1))
    shift = max(0.0, lowest - min(heights)) or min(0.0, highest - max(heights))
    for (label, colour, _, _), end, height in zip(labels, ends, heights, strict=True):
        start, beside = (edge + 0.22 * DPI) / size[0], (height + shift) / size[1]
        figure.text(start, beside, label, fontsize=font, color=colour, va="center")
        thread = ([end[0] / size[0], (edge + 0.18 * DPI) / size[0]], [end[1] / size[1], beside])
        figure.add_artist(_line(figure, *thread, colour))


def _line(figure: Figure, x: Sequence[float], y: Sequence[float], colour: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D(x, y, transform=figure.transFigure, color=colour, linewidth=0.5, alpha=0.7)


def _draw_shares(groups: Sequence[Mapping[str, Any]], subtitle: str) -> Figure | None:
    """Return a dot with its quartiles for every method and keep rate."""
    from matplotlib import colormaps

    labels = list(dict.fromkeys(row["label"] for group in groups for row in group["methods"]))
    if not any(row["share_of_free_slice"] is not None for group in groups for row in group["methods"]):
        return None
    rows = {label: place for place, label in enumerate(labels)}
    figure = _new_figure(8.4, 1.75 + (0.2 + 0.07 * len(groups)) * len(labels), "Share of the free slice", subtitle)
    axes = _plain_axes(figure, 1.15, 0.65, 1.5, 0.85)
    colours = colormaps["viridis"]
    for place, group in enumerate(groups):
        colour = colours(0.05 + 0.83 * place / max(1, len(groups) - 1))
        offset = 0.64 * ((place + 0.5) / len(groups) - 0.5)
        known = [row for row in group["methods"] if row["share_of_free_slice"] is not None]
        heights = [rows[row["label"]] + offset for row in known]
        medians = [row["share_of_free_slice"] for row in known]
        bounds = [row["share_of_free_slice_quartiles"] for row in known]
        axes.hlines(heights, [low for low, _ in bounds], [high for _, high in bounds], color=colour, linewidth=1.6)
        axes.plot(medians, heights, "o", color=colour, markersize=4, label=f"{group['keep_rate']:g}")
    axes.axvline(1.0, color="black", linewidth=1.0, zorder=1)
    for place in range(1, len(labels)):
        axes.axhline(place - 0.5, color="#eeeeee", linewidth=0.8, zorder=0)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.06)
    axes.set_xlabel("time of the free slice ÷ time of the method (above 1: faster than the free slice)", fontsize=9)
    legend = axes.legend(
        title="keep rate", loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=8.5, title_fontsize=8.5
    )
    legend._legend_box.align = "left"
    return figure
