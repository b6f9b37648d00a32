"""Results of ``compare`` and ``plan`` in words and tables. What they hold is made in compare.py and plan.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..arguments import counted
from ..names import METHODS, TITLES
from ..speed.settings import ROUNDS_FOR_A_SPREAD
from .screen import Cell, Page

__all__ = ["doubts", "is_wrong", "print_comparison", "print_methods", "print_plan", "title_of", "where"]

Result = Mapping[str, Any]

_BUSY = 0.4  # share of the CPUs that others take at the start
_DRIFT = 0.1  # change of the unreduced model's time within a round, as a share
_MORE_THAN_SAVED = 1.02  # a speed-up this far above the ratio of work is no rounding of the clock
_NAMED = 3  # models that are named; the others are counted


def title_of(method: str, options: Mapping[str, Any]) -> str:
    """Return a method's name in print, with its options: ``Radial ℓ1``, ``ToMe rounds=exact``."""
    norm = options.get("norm")
    title = TITLES.get(method if norm is None else f"{method}_{norm}", method.title())
    return " ".join([title, *(f"{name}={value}" for name, value in options.items() if name != "norm")])


def is_wrong(row: Result) -> bool:
    """Return whether logits lie far from float64 although no decision was another."""
    return row["images_with_other_decisions"] == 0


def where(result: Result) -> str:
    """Return model, weights, dtype and machine in one line."""
    environment = result["environment"]
    place = f"{result['dtype']}, {environment['device_name']}"
    if environment["device"] == "cpu":
        place += f", {counted(environment['threads'], 'thread')}"
    compiled = ", compiled" if result["compile"] else ""
    graphs = ", CUDA graphs" if result.get("graphs") else ""
    return f"{result['model']}, {result['weights']}, {place}{compiled}{graphs}"


def _and_more(words: Sequence[str]) -> str:
    more = f" and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
    return ", ".join(words[:_NAMED]) + more


def _load(result: Result) -> list[str]:
    load, cpus = result["load_at_start"], result["cpus"]
    if load is None or load <= _BUSY * cpus:
        return []
    return [f"the machine was busy when this began (load {load:.1f} on {counted(cpus, 'CPU')})"]


def _drift(low: float, middle: float, high: float, what: str) -> list[str]:
    drift = max(abs(middle - 1), min(high - 1, 1 - low))
    if drift <= _DRIFT:
        return []
    return [f"the unreduced model's time changed by {drift:.0%} between start and end of a round{what}"]


def _too_fast(found: Sequence[tuple[str, float, float]]) -> list[str]:
    """Name the settings (label, speed-up, ratio of work) that are faster than the saved work explains."""
    words = [
        f"{label} came out {speedup:.2f} times as fast where the saved work allows {work:.2f}"
        for label, speedup, work in found
        if speedup > _MORE_THAN_SAVED * work
    ]
    return [f"{_and_more(words)}, which is noise"] if words else []


def doubts(result: Result) -> list[str]:
    """Return what speaks against the speeds of a result: a load, a drift, more speed than work was saved."""
    words = _load(result)
    if "methods" in result:
        work = result["unreduced"]["gmacs"]
        words += _drift(*_with_quartiles(result["unreduced"], "drift"), "")
        rows = [(f"{row['label']} {row['keep_rate']:g}", row) for row in result["methods"]]
        rows += [(f"the free slice of {' '.join(map(str, row['counts']))}", row) for row in result["free_slices"]]
        return words + _too_fast([(label, row["speedup"], work / row["gmacs"]) for label, row in rows])
    saved = {rate["keep_rate"]: rate["speedup_by_work"] for rate in result["rates"]}
    found = []
    for row in result["batches"]:
        at = f" at batch {row['batch']}"
        words += _drift(*_with_quartiles(row["control"], "speedup"), at)
        rates = [rate for rate in row["rates"] if rate["keep_rate"] in saved]
        found += [(f"{rate['keep_rate']:g}{at}", rate["speedup"], saved[rate["keep_rate"]]) for rate in rates]
    return words + _too_fast(found)


def _with_quartiles(row: Result, name: str) -> tuple[float, float, float]:
    low, high = row[f"{name}_quartiles"]
    return low, row[name], high


def _print_doubts(page: Page, result: Result, done: int) -> None:
    """Say first of all what a reader has to know of the figures."""
    if result["interrupted"]:
        page.line(
            f"Stopped after {counted(done, 'round')}: these are the rounds that were finished.", "bold", wrap=False
        )
    if words := doubts(result):
        page.line(f"Read these speeds with care: {'; '.join(words)}.", "bold", wrap=False)


def _spread(speed: Result) -> str:
    """Return images/s, with half the distance of the quartiles where the rounds are enough for them."""
    low, high = speed["images_per_second_quartiles"]
    value = speed["images_per_second"]
    digits = 2 if value < 10 else 1 if value < 100 else 0
    spread = f" ± {(high - low) / 2:.{digits}f}" if _is_enough(speed) else ""
    return f"{value:.{digits}f}{spread}"


def _gmacs(row: Result) -> str:
    return f"{row['gmacs']:.{2 if row['gmacs'] >= 1 else 3}f}"


def _is_enough(speed: Result) -> bool:
    return len(speed["seconds"]) >= ROUNDS_FOR_A_SPREAD


def print_comparison(page: Page, result: Result) -> None:
    """Print one table for every keep rate, and what the columns mean."""
    environment = result["environment"]
    _print_doubts(page, result, result["rounds"])
    page.line(where(result))
    page.line(
        f"batch {result['batch']}, {counted(result['rounds'], 'round')}, torch {environment['torch']}, "
        f"fastreduce {environment['fastreduce']}, backend {result['backend']}"
    )
    for rate in dict.fromkeys(row["keep_rate"] for row in result["methods"]):
        _print_keep_rate(page, result, rate)
    for line in _legend(result):
        page.line(line, "dim")


def _print_keep_rate(page: Page, result: Result, rate: float) -> None:
    unreduced = result["unreduced"]
    rows = [row for row in result["methods"] if row["keep_rate"] == rate]
    nominal = next(row for row in result["free_slices"] if row["counts"] == rows[0]["counts"])
    patches, own = str(result["grid"][0] * result["grid"][1]), f"{unreduced['relative_difference']:.0e}"
    cells: list[list[Cell]] = [
        ["unreduced", patches, _gmacs(unreduced), _spread(unreduced), "1.00", "", "", own],
        [
            *("free slice", nominal["counts"], _gmacs(nominal), _spread(nominal)),
            *(f"{nominal['speedup']:.2f}", "1.00", "", ""),
        ],
    ]
    for row in rows:
        flag = "*" if row["images_with_other_decisions"] else "!" if is_wrong(row) else ""
        ratios = (row["speedup"], row["share_of_free_slice"], row["speedup_over_plain"])
        cells.append(
            [
                *(row["label"], row["counts"], _gmacs(row), _spread(row)),
                *(f"{value:.2f}" for value in ratios),
                f"{row['relative_difference']:.0e}{flag}",
            ]
        )
    page.table(
        f"keep rate {rate:g}",
        ("method", "tokens", "GMACs", "images/s", "full", "slice", "plain", "diff."),
        cells,
        sections=[1],
        bold=lambda row, column: row > 1 and column == 4 and _is_enough(rows[row - 2]),
    )


def _few(rounds: int) -> list[str]:
    if rounds >= ROUNDS_FOR_A_SPREAD:
        return []
    return [f"Only {counted(rounds, 'round')}: do not read much into the speeds. Spreads take {ROUNDS_FOR_A_SPREAD}."]


def _legend(result: Result) -> list[str]:
    spread = " ± half the distance of the quartiles" if _is_enough(result["unreduced"]) else ""
    low, middle, high = _with_quartiles(result["unreduced"], "drift")
    quartiles = f" (quartiles {low:.2f} to {high:.2f})" if spread else ""
    lines = [
        "tokens: patches left after each stage. GMACs: 10⁹ multiply-adds an image, counted by torch's "
        f"FlopCounterMode. images/s: median over the rounds{spread}. full, slice, plain: how many times faster than "
        "the unreduced model, than the free slice (the unreduced model that just cuts off as many tokens between "
        "attention and MLP), than the published algorithm written plainly; medians of the ratios within each round. "
        "diff.: largest difference of the logits to the plain algorithm in float64, over the largest logit; "
        f"{counted(result['images_checked'], 'image')}.",
        "Drift: the unreduced model runs at the start and at the end of each round, and took "
        f"{middle:.2f} times as long at the end{quartiles}; it is held against the mean of the two.",
    ]
    lines += _few(result["rounds"])
    if any(row["images_with_other_decisions"] for row in result["methods"]):
        lines.append(f"*: near-ties: in {result['dtype']} other tokens were chosen than in float64.")
    if any(is_wrong(row) for row in result["methods"]):
        lines.append("!: far from float64, and no near-tie explains it: please report this.")
    if given := dict.fromkeys(_given_options(row) for row in result["methods"] if _given_options(row)):
        lines.append(f"Options: {', '.join(given)}.")
    if random := dict.fromkeys(row["label"] for row in result["methods"] if row["layers"] == "random"):
        lines.append(f"Layers of their own, with random weights: {', '.join(random)}.")
    if result["left_out"]:
        lines.append(
            f"Left out, so that {counted(result['rounds'], 'round')} of the others fit into the time: "
            f"{_left_out(result)}. Give more --seconds, or --methods and --keep-rate."
        )
    lines += [f"Not compared: {method}: {reason}." for method, reason in result["refused"].items()]
    if result["random_weights"]:
        lines.append(
            f"These are {result['weights']}: the speeds hold for trained ones too, the patterns and pictures say "
            "nothing about them. Give --checkpoint or --pretrained."
        )
    return lines


def _left_out(result: Result) -> str:
    """Name what was left out, a whole keep rate as one."""
    words = []
    for rate in dict.fromkeys(row["keep_rate"] for row in result["left_out"]):
        labels = [row["label"] for row in result["left_out"] if row["keep_rate"] == rate]
        whole = all(row["keep_rate"] != rate for row in result["methods"])
        words.append(f"keep rate {rate:g}" if whole else f"at keep rate {rate:g} {', '.join(labels)}")
    return "; ".join(words)


def _given_options(row: Result) -> str:
    options = {name: value for name, value in row["options"].items() if name != "norm"}
    return " ".join([row["method"], *(f"{name}={value}" for name, value in options.items())]) if options else ""


_MARKS = {"pays": "+", "unclear": "?", "no": " ", "too few rounds": " "}


def print_plan(page: Page, result: Result) -> None:
    """Print the speed-ups and speeds, what follows from them, and the code to paste."""
    environment = result["environment"]
    _print_doubts(page, result, sum(row["rounds"] for row in result["batches"]))
    page.line(where(result))
    if result["wrong"]:
        for line in result["wrong"]:
            page.line(f"! {line}: please report this.")
        page.line("The times are not shown." if result["timed"] else "Nothing was timed.")
        return
    page.line(
        f"{title_of(result['method'], result['options'])} at blocks {' '.join(map(str, result['blocks']))}, "
        f"torch {environment['torch']}, fastreduce {environment['fastreduce']}, backend {result['backend']}"
    )
    for start in range(0, len(result["batches"]), 4):
        _print_batches(page, result, result["batches"][start : start + 4])
    for line in result["advice"]:
        page.line(line)
    codes: dict[str, list[int]] = {}
    for row in result["batches"]:
        if row["code"] is not None:
            codes.setdefault(row["code"], []).append(row["batch"])
    for code, batches in codes.items():
        page.line()
        page.line(f"The line to paste for batch {', '.join(map(str, batches))}:")
        page.line(f"    {code}", "bold", wrap=False)
    page.line()
    for line in _plan_legend(result):
        page.line(line, "dim")


def _print_batches(page: Page, result: Result, rows: Sequence[Result]) -> None:
    """Print the speed-ups and the speeds of a few batches."""
    batches = [f"batch {row['batch']}" for row in rows]
    cells: list[list[Cell]] = [
        ["rounds", "", "", *(f"{row['rounds']}  " for row in rows)],
        ["unreduced", str(result["patches"]), "1.00", *(_ratio_cell(row["control"]) + "  " for row in rows)],
    ]
    speeds: list[list[Cell]] = [["unreduced", *(_spread(row["unreduced"]) for row in rows)]]
    for index, rate in enumerate(result["rates"]):
        found = [row["rates"][index] for row in rows]
        marked = [f"{_ratio_cell(cell)} {_MARKS[cell['verdict']]}" for cell in found]
        cells.append([f"{rate['keep_rate']:g}", rate["counts"], f"{rate['speedup_by_work']:.2f}", *marked])
        speeds.append([f"{rate['keep_rate']:g}", *(_spread(cell) for cell in found)])

    def pays(row: int, column: int) -> bool:
        return row > 1 and column > 2 and rows[column - 3]["rates"][row - 2]["verdict"] == "pays"

    page.table(
        "times as fast as the unreduced model",
        ("keep rate", "tokens", "work", *batches),
        cells,
        sections=[1],
        bold=pays,
    )
    page.table("images/s", ("keep rate", *batches), speeds, sections=[0])


def _ratio_cell(cell: Result) -> str:
    low, high = cell["speedup_quartiles"]
    return f"{cell['speedup']:.2f}" + (f" ± {(high - low) / 2:.2f}" if _is_enough(cell) else "")


def _plan_legend(result: Result) -> list[str]:
    bars = ", ".join(f"{row['bar']:.2f} at batch {row['batch']}" for row in result["batches"])
    rounds = min((row["rounds"] for row in result["batches"]), default=0)
    spread = " ± half the distance of the quartiles" if rounds >= ROUNDS_FOR_A_SPREAD else ""
    verdicts = f"; +: pays, the lower quartile is above {bars}; ?: only the upper one is" if spread else ""
    lines = [
        "tokens: patches left after each stage. work: multiply-adds of the unreduced model over those of the reduced. "
        f"batch: median over the rounds of the ratio within a round{spread}{verdicts}. That bar is 1.02, or as far as "
        "the unreduced model, which runs at the start and at the end of each round, strays from itself (its row in the "
        "table) if that is more. Logits agree with the published algorithm, written plainly, in float64 "
        f"({counted(result['images_checked'], 'image')}, and before each batch is timed)."
    ]
    lines += _few(rounds)
    if any(row["images_with_other_decisions"] for row in result["rates"]):
        lines.append(f"Near-ties: in {result['dtype']} other tokens were chosen than in float64.")
    if any(row["layers"] == "random" for row in result["rates"]):
        lines.append("Its own layers have random weights, which does not change the speed.")
    if result["method"] == "ats":
        lines.append(
            "ATS keeps what an image calls for: the speed depends on images and weights, these are views of a photo."
        )
        if result["random_weights"]:
            lines.append("These weights are random: give --checkpoint or --pretrained.")
    return lines


def print_methods(page: Page, families: Mapping[str, Sequence[str]]) -> None:
    """Print every method: name, layers of its own, options with defaults, and when to choose it."""
    for family, names in families.items():
        page.line(family, "bold")
        for name in names:
            method = METHODS[name]
            layers = "nothing to train" if method.layers == "none" else f"trained: {method.layers}"
            options = [f"{key}={_default(one.default)}" for key, one in method.options.items() if key != "norm"]
            page.line(f"  {name.replace('_', '-'):<12} {TITLES[name]}; {layers}", wrap=False)
            page.line(f"  {'':<12} options: {', '.join(options) if options else 'none'}", wrap=False)
            page.line(f"  {'':<12} {method.choose}", wrap=False)
    page.line()
    page.line(
        'In Python, radial-l1 is fastreduce.patch(model, "radial", norm="l1"). On the command line give options as '
        "--method-option tome.rounds=exact; generator, noise, r, schedule and min_radius in Python alone."
    )


def _default(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
