"""Tables of what ``bench.models`` measured, on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .contests import Group

__all__ = ["LEGEND", "print_group"]


def _wide(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _with_spread(row: Mapping[str, Any], name: str) -> str:
    """Write the median ± half the distance of the quartiles."""
    if (value := row.get(name)) is None:
        return "–"
    low, high = row[f"{name}_quartiles"]
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} ± {(high - low) / 2:.{digits}f}"


def _title(group: Group) -> str:
    return (
        f"{group['model']}, batch {group['batch']}, keep rate {group['keep_rate']:g}, {group['step']}, {group['mode']}"
    )


def print_group(console: Console, group: Group) -> None:
    """Print one table, and below it why figures are missing."""
    if group["reason"] is not None:
        console.print(f"{_title(group)}: left out: {group['reason']}", highlight=False)
        return
    table = Table(box=box.SIMPLE_HEAD, title=_title(group), title_style="bold", title_justify="left", pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("tokens", "images/s", "unreduced ÷", "slice ÷", "official ÷", "ideal", "diff."):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("unreduced", "", _with_spread(group["unreduced"], "images_per_second"))
    common = group["methods"][0]["counts"]
    notes = []
    if reason := group["unreduced"]["reason"]:
        notes.append(f"unreduced: {reason}")
    for row in group["free_slices"]:
        if row["counts"] == common:
            speeds = [_with_spread(row, name) for name in ("images_per_second", "speedup")]
            table.add_row(
                "free slice", " ".join(map(str, common)), *speeds, "", "", _wide(row["ideal_speedup"]), end_section=True
            )
        if row["reason"]:
            notes.append(f"free slice {row['counts']}: {row['reason']}")
    for row in group["methods"]:
        names = ("images_per_second", "speedup", "share_of_free_slice", "speedup_over_official")
        flag = {"green": "", "near-ties": "*", "red": "!"}[row["parity"]["verdict"]]
        table.add_row(
            row["label"],
            " ".join(map(str, row["counts"])),
            *(_with_spread(row, name) for name in names),
            _wide(row.get("ideal_speedup")),
            f"{row['parity']['difference']:.0e}{flag}",
        )
        notes += [f"{row['label']}: {row['reason']}"] if row["reason"] else []
        if row["official"]["reason"] and not row["reason"]:
            notes.append(f"{row['label']}, official: {row['official']['reason']}")
    console.print(table)
    notes += [f"not measured: {method}: {reason}" for method, reason in group["refused"].items()]
    for note in notes:
        console.print(note, style="dim", highlight=False, soft_wrap=True)


LEGEND = (
    "images/s: median over the rounds ± half the distance of the quartiles. unreduced, slice, official ÷: their time "
    "over the method's, medians of the ratios within each round; above 1 the method is faster. ideal: multiply-adds of "
    "the unreduced model over the method's. diff.: largest difference to the official algorithm in float64 over the "
    "largest value: of the logits, in training of the loss and of a gradient. *: near-ties: other tokens than in "
    "float64 were chosen. !: wrong."
)
