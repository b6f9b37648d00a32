"""Tables of ``bench.deploy`` and ``bench.compiled``, for these commands and for the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fastreduce.names import TITLES

from .markdown import markdown_table

__all__ = ["CHANGES", "Row", "count_lines", "int8_lines", "slower", "speed_lines", "time_lines"]

Row = dict[str, Any]
CHANGES = ("first batch", "another batch", "a third batch", "another keep rate", "another backend")


def _title(label: str) -> str:
    return TITLES.get(label.replace(" ", "_"), label)


def speed_lines(rows: Iterable[Row], ways: Sequence[str]) -> list[str]:
    """Return a table in Markdown: a line for each model, keep rate, batch and method, a column for each way to run."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["model"], row["keep_rate"], row["batch"], row["method"]), {})[row["way"]] = row
    lines = []
    for (model, keep_rate, batch, method), by_way in found.items():
        cells = [f"{by_way[way]['ratio']:.2f}" if way in by_way else "" for way in ways]
        if "eager" in ways:
            cells.append(f"{by_way['eager']['of_free_slice']:.2f}" if "eager" in by_way else "")
        lines.append([model, f"{keep_rate:g}", str(batch), _title(method), *cells])
    heads = ["model", "keep rate", "batch", "method", *ways, *(["of the free slice"] if "eager" in ways else [])]
    return markdown_table(heads, lines)


def int8_lines(rows: Sequence[Row]) -> list[str]:
    """Return a table in Markdown: a line for each model and kind of numbers; with labels also the accuracy."""
    lines = []
    for row in rows:
        cells = [_title(row["method"]), row["int8"], f"{row['over_unreduced']:.2f}", f"{row['ratio']:.2f}"]
        if "accuracy" in row:
            low, high = (100 * bound for bound in row["accuracy"]["interval"])
            change = f"{100 * row['accuracy']['difference']:+.2f} ({low:+.2f} to {high:+.2f})"
            change = "" if row["int8"] == "float32" else change
            cells += [f"{100 * row['accuracy']['after']:.2f}", change]
        else:
            cells += [f"{row['same_class']:.0%}", f"{row['difference']:.1%}"]
        lines.append(cells)
    labelled = any("accuracy" in row for row in rows)
    last = ["accuracy", "points against float32"] if labelled else ["same class", "largest difference"]
    return markdown_table(["method", "numbers", "times unreduced", "times float32", *last], lines)


def slower(rows: Sequence[Row]) -> Iterator[str]:
    """Say where a reduced model is slower than the unreduced one: there it is not to be reduced."""
    for row in rows:
        if row["ratio"] < 1:
            yield (
                f"slower than unreduced: {row['model']} {_title(row['method'])} at {row['keep_rate']:g}, batch "
                f"{row['batch']}, {row['way']}: {row['ratio']:.2f}"
            )


def count_lines(counts: Iterable[Row]) -> list[str]:
    """Return the table of compilations: a line for each method and form."""
    rows = []
    for row in counts:
        cells = ("refused" if row[change] is None else str(row[change]) for change in CHANGES)
        rows.append([_title(row["method"]), row["form"], *cells])
    return markdown_table(["method", "compiled", *CHANGES], rows)


def time_lines(rows: Sequence[Row]) -> list[str]:
    """Return the table of times: a line for each method, a column for each way, and the plain form compiled."""
    ways = list(dict.fromkeys(row["way"] for row in rows))
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["method"], {})[row["way"]] = row
    lines = []
    for method, by_way in found.items():
        cells = [f"{by_way[way]['ratio']:.2f}" if way in by_way else "" for way in ways]
        over = by_way.get("whole", {}).get("over_plain")
        lines.append([_title(method), *cells, "" if over is None else f"{over:.2f}"])
    return markdown_table(["method", *ways, "whole, ÷ plain compiled"], lines)
