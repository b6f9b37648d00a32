"""Sentences of ``fastreduce plan``: where to reduce, and where not."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .settings import ROUNDS_FOR_A_SPREAD

__all__ = ["advice"]


def _listed(values: Sequence[float]) -> str:
    words = [f"{value:g}" for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _kept_advice(row: Mapping[str, Any], keeping: Collection[float], wanted: str) -> str:
    """Say which keep rate is the fastest that pays and keeps enough, or why there is none."""
    batch = row["batch"]
    if row["recommended"] is not None:
        (chosen,) = (rate for rate in row["rates"] if rate["keep_rate"] == row["recommended"])
        low, high = chosen["speedup_quartiles"]
        return (
            f"Batch {batch}: reduce, with keep rate {chosen['keep_rate']:g}, the fastest with {wanted}: "
            f"{chosen['speedup']:.2f} times as fast (quartiles {low:.2f} to {high:.2f})."
        )
    paying = [rate["keep_rate"] for rate in row["rates"] if rate["verdict"] == "pays"]
    if not keeping:
        return f"Batch {batch}: do not reduce: no keep rate has {wanted}."
    if paying:
        return (
            f"Batch {batch}: do not reduce: keep rate {_listed(paying)} would pay, but only {_listed(sorted(keeping))} "
            f"has {wanted}."
        )
    return _batch_advice(row)


def _batch_advice(row: Mapping[str, Any]) -> str:
    """Say whether to reduce at this batch, from which keep rate on, and what it brings."""
    batch, rates = row["batch"], row["rates"]
    best = max(rates, key=lambda rate: rate["speedup"])
    if row["rounds"] < ROUNDS_FOR_A_SPREAD:
        return (
            f"Batch {batch}: no verdict, which takes {ROUNDS_FOR_A_SPREAD} rounds, and this had {row['rounds']}: give "
            f"--rounds {ROUNDS_FOR_A_SPREAD} or more."
        )
    if row["recommended"] is not None:
        (first,) = (rate for rate in rates if rate["keep_rate"] == row["recommended"])
        low, high = first["speedup_quartiles"]
        text = (
            f"Batch {batch}: reduce, from keep rate {first['keep_rate']:g} on. There it is {first['speedup']:.2f} "
            f"times as fast (quartiles {low:.2f} to {high:.2f})"
        )
        if best is not first:
            text += f", at keep rate {best['keep_rate']:g} {best['speedup']:.2f} times"
        others = [r["keep_rate"] for r in rates if r["keep_rate"] < first["keep_rate"] and r["verdict"] != "pays"]
        return f"{text}. Not shown to pay: {_listed(others)}." if others else f"{text}."
    where = (
        f"even at keep rate {best['keep_rate']:g}"
        if best is rates[-1]
        else f"at best, keep rate {best['keep_rate']:g},"
    )
    low, high = best["speedup_quartiles"]
    if all(rate["verdict"] == "no" for rate in rates):
        return (
            f"Do not reduce at batch {batch}: {where} it is {best['speedup']:.2f} times as fast "
            f"(quartiles {low:.2f} to {high:.2f}; only more than {row['bar']:.2f} would pay)."
        )
    return (
        f"Batch {batch}: do not reduce before more --rounds have told: {where} it is {best['speedup']:.2f} times as "
        f"fast, but the quartiles are {low:.2f} to {high:.2f}, and only more than {row['bar']:.2f} would pay."
    )


def _rounding_advice(batch: int, rounding: Mapping[str, Any]) -> str:
    at = f"Batch {batch}, keep rate {rounding['keep_rate']:g}: "
    if not rounding["tried"]:
        return f"{at}nothing to round, the token counts are multiples already or cannot be made so."
    shown = []
    for row in rounding["tried"]:
        low, high = row["speedup_over_exact_quartiles"]
        shown.append(
            f"up to multiples of {row['multiple']} ({' '.join(map(str, row['counts']))}) "
            f"{row['speedup_over_exact']:.2f} times as fast as the exact counts (quartiles {low:.2f} to {high:.2f})"
        )
    if rounding["proposed"] is None:
        end = "leave the counts as they are"
    else:
        end = f"take the multiples of {rounding['proposed']}"
    return f"{at}rounded {', '.join(shown)}: {end}."


def _most(rows: Sequence[Mapping[str, Any]]) -> str:
    full = max(rows, key=lambda row: row["unreduced"]["images_per_second"])
    speed, batch, rate = max(
        (rate["images_per_second"], row["batch"], rate["keep_rate"]) for row in rows for rate in row["rates"]
    )
    return (
        f"Most images/s: unreduced {full['unreduced']['images_per_second']:.4g} (batch {full['batch']}), "
        f"reduced {speed:.4g} (batch {batch}, keep rate {rate:g})."
    )


def advice(rows: Sequence[Mapping[str, Any]], keeping: Collection[float] | None = None, wanted: str = "") -> list[str]:
    """Return sentences: at which batches to reduce, and with which keep rate.

    Args:
        rows: as :func:`judge` gives them.
        keeping: keep rates that lose no more than they may; None if what is lost was not measured.
        wanted: in words, what they have to keep.
    """
    paying = [row["batch"] for row in rows if row["recommended"] is not None]
    untold = [row["batch"] for row in rows if row["rounds"] < ROUNDS_FOR_A_SPREAD]
    rest = [row["batch"] for row in rows if row["recommended"] is None and row["batch"] not in untold]
    if len(untold) == len(rows):
        lines = [f"No verdict: the rounds are too few to say whether reduction pays at batch {_listed(untold)}."]
    elif not paying:
        batches = "batch" if len(rest) == 1 else "batches"
        enough = "" if keeping is None else f" with {wanted}"
        lines = [f"Do not reduce on this machine: at {batches} {_listed(rest)} no keep rate was shown to pay{enough}."]
    elif not rest:
        lines = [f"Reduction pays at {'every batch measured' if len(paying) > 1 else f'batch {paying[0]}'}."]
    elif max(rest) < min(paying):
        lines = [f"Reduction pays from batch {min(paying)} on, not at {_listed(rest)}."]
    else:
        lines = [f"Reduction pays at batch {_listed(paying)}, not at {_listed(rest)}."]
    told = [row["rounds"] >= ROUNDS_FOR_A_SPREAD and keeping is not None for row in rows]
    lines += [
        _kept_advice(row, keeping or (), wanted) if known else _batch_advice(row)
        for row, known in zip(rows, told, strict=True)
    ]
    if len(untold) < len(rows):
        lines.append(_most([row for row in rows if row["batch"] not in untold]))
    lines += [_rounding_advice(row["batch"], row["rounding"]) for row in rows if row.get("rounding")]
    if keeping is None:
        lines.append(
            "A lower keep rate costs accuracy, which these verdicts do not know of: take the highest that is fast "
            "enough, and measure it on your own data."
        )
    return lines
