"""The tables of ``bench.gpu``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastreduce.integrations.block import MOST_KEYS_BY_OURS

from .children import Row

__all__ = ["RULE_PRIMITIVES", "is_wrong", "markdown", "reason_of"]

RULE_PRIMITIVES = ("attention_index", "attention_cls_scores")  # operators for which "auto" goes by the number of keys


def reason_of(row: Row) -> str | None:
    """Return what is wrong with a check, or why it came to no end; None if neither."""
    reason = row.get("wrong") or row.get("failed")
    return None if reason is None else str(reason)


def is_wrong(row: Row) -> bool:
    """Tell whether a check found something or came to no end."""
    return reason_of(row) is not None


def place(row: Row) -> str:
    """Name what was checked."""
    return f"**{row['primitive']}** {row['direction']}, {'-'.join(map(str, row['shape']))}"


def _part_lines(result: dict[str, Any]) -> list[str]:
    lines = ["## Parts", "", "| part | results | left out | seconds |", "|" + "---|" * 4]
    for part in result["parts"]:
        lines.append(f"| {part['name']} | {part['results']} | {part['left_out']} | {part['seconds']:.0f} |")
    return [*lines, ""]


def _check_lines(title: str, agree: str, rows: Iterable[Row]) -> list[str]:
    rows = list(rows)
    wrong = [row for row in rows if is_wrong(row)]
    lines = [f"## {title}", "", f"{agree}: {len(rows) - len(wrong)} of {len(rows)}."]
    return [*lines, *(f"- {place(row)}: {reason_of(row)}" for row in wrong), ""]


def _racecheck_lines(result: dict[str, Any]) -> list[str]:
    lines = [f"- {place(row)}: {row.get('skipped') or reason_of(row) or row['said']}" for row in result["racecheck"]]
    return ["## compute-sanitizer racecheck", "", *lines, ""] if lines else []


def _micro_lines(result: dict[str, Any]) -> list[str]:
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in result["micro"]:
        if "model" in row:
            shape = f"{row['model']}-{row['tokens']}-{row['batch']}"
            groups.setdefault((row["primitive"], row["direction"], shape), {})[row["contender"]] = row
    heads = [
        "primitive",
        "",
        "shape",
        "µs",
        "GB/s of the floor",
        "share of copy",
        "launches (CPU: operators)",
        "peak MB",
    ]
    others = ["plain", "reference", "compiled"]
    others += sorted({who for rows in groups.values() for who in rows} - {"fastreduce", *others})
    lines = ["## Kernels", "", "| " + " | ".join([*heads, *(f"{other} ÷ ours" for other in others)]) + " |"]
    lines.append("|" + "---|" * (len(heads) + len(others)))
    for (name, direction, shape), rows in groups.items():
        ours = rows.get("fastreduce", {})
        if "seconds" not in ours:
            cells = [str(ours.get("parity") or ours.get("failed") or "not measured"), *[""] * 7]
        else:
            cells = [
                f"{ours['seconds'] * 1e6:.1f}",
                f"{ours['gigabytes_per_second']:.0f}",
                f"{ours['share_of_copy_bandwidth']:.2f}",
                str(ours.get("launches", ours.get("operators", ""))),
                f"{ours['peak_bytes'] / 1e6:.1f}",
                *(
                    f"{rows[other]['seconds'] / ours['seconds']:.2f}" if "seconds" in rows.get(other, {}) else ""
                    for other in others
                ),
            ]
        lines.append("| " + " | ".join([name, direction, shape, *cells]) + " |")
    lines.append("")
    if result["absent"]:
        lines.append(f"- not installed: {', '.join(result['absent'])}")
    for row in result["micro"]:
        if reason := row.get("failed") or row.get("parity"):
            lines.append(f"- {row['primitive']} {row['direction']} {row['contender']}: {reason}")
    return [*lines, ""]


def _rule_points(result: dict[str, Any]) -> list[Row]:
    """Return where both sides of the rule of ``auto`` were timed: our attention, and PyTorch's beside small kernels.

    Of each primitive and shape: ``primitive``, ``keys``, ``batch``, seconds of ``ours`` and of ``theirs``.
    """
    seconds: dict[tuple[str, int, int], dict[str, float]] = {}
    for row in result["micro"]:
        if row["direction"] == "forward" and "seconds" in row and row["model"] != "deit_base":
            point = row["primitive"], row["tokens"], row["batch"]
            seconds.setdefault(point, {})[row["contender"]] = row["seconds"]
    return [
        {"primitive": name, "keys": keys, "batch": batch, "ours": both["fastreduce"], "theirs": both["sdpa"]}
        for (name, keys, batch), both in sorted(seconds.items())
        if name in RULE_PRIMITIVES and both.keys() >= {"fastreduce", "sdpa"}
    ]


def _rule_lines(result: dict[str, Any]) -> list[str]:
    """Say where the limit stands, and which side is faster at every measured point."""
    if not (points := _rule_points(result)):
        return []
    lines = [
        "## The rule of auto",
        "",
        f"Up to {MOST_KEYS_BY_OURS} keys (MOST_KEYS_BY_OURS) it takes our attention.",
        "",
    ]
    lines += ["| primitive | keys | batch | ours, µs | SDPA, µs | SDPA ÷ ours | auto takes |", "|" + "---|" * 7]
    wrong = []
    for point in points:
        ours, theirs, keys = point["ours"], point["theirs"], point["keys"]
        takes_ours = keys <= MOST_KEYS_BY_OURS
        right = takes_ours == (ours <= theirs)
        wrong += [] if right else [f"{point['primitive']} at {keys} keys, batch {point['batch']}"]
        cells = [point["primitive"], str(keys), str(point["batch"]), f"{ours * 1e6:.1f}", f"{theirs * 1e6:.1f}"]
        cells += [f"{theirs / ours:.2f}", ("ours" if takes_ours else "SDPA") + ("" if right else ", the slower")]
        lines.append("| " + " | ".join(cells) + " |")
    verdict = (
        f"The rule takes the slower side for {'; '.join(wrong)}."
        if wrong
        else "The rule takes the faster side everywhere."
    )
    return [*lines, "", verdict, ""]


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _model_lines(result: dict[str, Any]) -> list[str]:
    lines = ["## Whole models", ""]
    for group in result["models"]:
        where = ", ".join(
            f"{name} {group[name]}" for name in ("model", "batch", "keep_rate", "step", "mode") if name in group
        )
        if reason := group.get("failed") or group.get("reason"):
            lines += [f"{where}: {reason}", ""]
            continue
        lines += [f"### {where}", "", "| | images/s | unreduced ÷ | slice ÷ | official ÷ | ideal |", "|" + "---|" * 6]
        lines.append(f"| unreduced | {_number(group['unreduced']['images_per_second'], 1)} | 1.00 | | | |")
        for row in group["methods"]:
            cells = [
                _number(row["images_per_second"], 1) or str(row["reason"] or row["parity"]["verdict"]),
                *(_number(row[name]) for name in ("speedup", "share_of_free_slice", "speedup_over_official")),
                _number(row.get("ideal_speedup")),
            ]
            lines.append("| " + " | ".join([row["label"], *cells]) + " |")
        lines.append("")
    return lines


def markdown(result: dict[str, Any]) -> str:
    """Return all tables."""
    where = result["environment"]
    head = [
        f"# {where['device_name']}",
        "",
        f"fastreduce {where['fastreduce']}, commit {where['commit']}, torch {where['torch']}, "
        f"triton {where['triton']}, timm {where['timm']}, CUDA {where['cuda']}; `python -m bench.gpu`, "
        f"{result['seconds']:.0f} s. Times are medians; in ratios, more than 1 means that fastreduce is the faster.",
        "",
    ]
    lines = _part_lines(result)
    lines += _check_lines("Parity", "Checks that agree with float64", result["parity"])
    lines += _check_lines("Repeated calls", "Kernels that gave the same bits at every call", result["repeat"])
    lines += _racecheck_lines(result) + _rule_lines(result) + _micro_lines(result) + _model_lines(result)
    return "\n".join([*head, *lines])
