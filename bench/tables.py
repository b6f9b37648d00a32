"""The tables of README.md and of the documentation, out of the results that are committed.

python -m bench.tables            # prints them, to be pasted where they belong; a test compares
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fastreduce.names import TITLES

from . import deploy_tables
from .markdown import markdown_table

__all__ = ["TABLES", "markdown_table"]

RESULTS = Path(__file__).parent / "results"
COMPARED = "compare-cpu-2threads-2026-11-23"  # one day's run on one machine: what the ratios hold for
COMPARED_ALONE = "compare-cpu-1thread-2026-11-23"
FORWARD, TRAINING = "models-cpu-forward-2026-11-23", "models-cpu-training-2026-11-23"
QUALITY = "quality-saliency-2026-11-29"
TUNED = "tune-saliency-2026-11-29"
HOSTS = "hosts-cpu-2026-11-29"
PRIMITIVES = "micro-cpu-2026-11-23"
# The radial patterns of two norms were run later than everything else.
STUDY = ("study-cifar10-off-the-shelf-2026-11-29", "study-cifar10-off-the-shelf-radial-2026-11-29")
ONE_EPOCH = {
    0.5: ("study-cifar10-one-epoch-2026-11-29", "study-cifar10-one-epoch-radial-2026-11-29"),
    0.25: ("study-cifar10-one-epoch-0.25-2026-11-29", "study-cifar10-one-epoch-0.25-radial-2026-11-29"),
    0.9: ("study-cifar10-one-epoch-0.9-2026-11-29",),
}
DEPLOYED, SMALL, ONE = "deploy-cpu", "deploy-small-batches-cpu", "deploy-compiled-cpu"
SEVERAL, FOUR = "deploy-compiled-batches-cpu", "deploy-compiled-batch-4-cpu"
INT8, COMPILED = ("int8-cpu", "int8-cifar10-cpu"), "compiled-cpu"
RATES = (0.7, 0.5)


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _by_label(methods: Iterable[Any], rate: float | None = None) -> dict[str, Any]:
    return {row["label"]: row for row in methods if rate is None or row["keep_rate"] == rate}


def first_figures() -> list[str]:
    """Return the README's six rows: speed, and what it costs on real weights."""
    result, quality = _read(COMPARED), _read(QUALITY)["methods"]
    cells: dict[str, list[str]] = {"unreduced": ["1.00", "", "0"] * len(RATES)}
    for label in ("topk", "evit", "ats", "tome", "kmedoids"):
        cells[f"`{label}`"] = []
        for rate in RATES:
            fast, lost = _by_label(result["methods"], rate)[label], _by_label(quality, rate)[label]
            speeds = (f"{fast[key]:.2f}" for key in ("speedup", "speedup_over_official"))
            cells[f"`{label}`"] += [*speeds, f"{lost['mean']['saliency_error_last']:.3f}"]
    head = [f"{words}, {rate:g}" for rate in RATES for words in ("÷ unreduced", "÷ plain", "error")]
    return markdown_table(["", *head], [[name, *row] for name, row in cells.items()])


def compared(rate: float) -> list[str]:
    """Return all that ``fastreduce compare`` measured at one keep rate."""
    result = _read(COMPARED)
    unreduced, methods = result["unreduced"], _by_label(result["methods"], rate)
    free = next(row for row in result["free_slices"] if row["counts"] == methods["topk"]["counts"])

    def cells(name: str, tokens: str, row: Any) -> list[str]:
        ratios = [row.get(key) for key in ("speedup", "share_of_free_slice", "speedup_over_official")]
        deviation = row.get("relative_difference")
        return [
            *(name, tokens, f"{row['gmacs']:.2f}", f"{row['images_per_second']:.1f}"),
            *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            "" if deviation is None else f"{deviation:.0e}",
        ]

    rows = [cells("unreduced", "196", {**unreduced, "speedup": 1.0})]
    rows.append(cells("free slice", " ".join(map(str, free["counts"])), {**free, "share_of_free_slice": 1.0}))
    rows += [cells(label, " ".join(map(str, row["counts"])), row) for label, row in methods.items()]
    return markdown_table(
        ["method", "tokens", "GMACs", "images/s", "÷ unreduced", "÷ free slice", "÷ plain", "deviation"], rows
    )


def compared_alone() -> list[str]:
    """Return the ratios of ``fastreduce compare`` with one thread."""
    kept = [_by_label(_read(COMPARED_ALONE)["methods"], rate) for rate in RATES]
    keys = {"speedup": "÷ unreduced", "share_of_free_slice": "÷ free slice", "speedup_over_official": "÷ plain"}
    rows = [[label, *(f"{methods[label][key]:.2f}" for methods in kept for key in keys)] for label in kept[0]]
    return markdown_table(["method", *(f"{rate} {words}" for rate in RATES for words in keys.values())], rows)


def forward() -> list[str]:
    """Return images per second and the share of the free slice over keep rates, of ``bench.models``."""
    groups = _read(FORWARD)["groups"]
    kept = [_by_label(group["methods"]) for group in groups]
    pairs = [[(row["images_per_second"], row["share_of_free_slice"]) for row in methods.values()] for methods in kept]
    rows = [
        ["unreduced", *(text for group in groups for text in (f"{group['unreduced']['images_per_second']:.1f}", ""))]
    ]
    for label, *values in zip(kept[0], *pairs, strict=True):
        rows.append([label, *(text for speed, share in values for text in (f"{speed:.1f}", f"{share:.2f}"))])
    head = [words for group in groups for words in (f"images/s, {group['keep_rate']}", "÷ slice")]
    return markdown_table(["method", *head], rows)


def training() -> list[str]:
    """Return what a training step at a keep rate of 0.5 takes, of ``bench.models``."""
    (group,) = _read(TRAINING)["groups"]
    rows = [["unreduced", f"{group['unreduced']['images_per_second']:.1f}", "1.00", "", ""]]
    for row in group["methods"]:
        ratios = (row[key] for key in ("speedup", "share_of_free_slice", "speedup_over_official"))
        rows.append([row["label"], f"{row['images_per_second']:.1f}", *(f"{ratio:.2f}" for ratio in ratios)])
    return markdown_table(["method", "images/s", "÷ unreduced", "÷ free slice", "÷ plain"], rows)


def primitives() -> list[str]:
    """Return milliseconds of every primitive's reference beside the plain algorithm, of ``bench/primitives``."""
    times: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    for row in _read(PRIMITIVES)["benchmarks"]:
        name, direction, shape = row["group"].split()
        batch = shape.split("-")[2]
        times.setdefault((name, direction), {})[batch, row["params"]["contender"]] = 1e3 * row["stats"]["median"]
    rows = []
    for (name, direction), found in times.items():
        cells = [f"`{name}`", direction]
        for batch in ("1", "64"):
            ours, plain = found[batch, "fastreduce"], found[batch, "plain"]
            cells += [f"{ours:.2f}", f"{plain:.2f}", f"{plain / ours:.2f}"]
        rows.append(cells)
    head = ["primitive", "", *(words for batch in (1, 64) for words in (f"ours, batch {batch}", "plain", "ratio"))]
    return markdown_table(head, rows)


QUALITY_COLUMNS = {
    "class_cosine": "class token",
    "patch_cosine": "patches",
    "patch_cosine_last": "patches, last",
    "saliency_error": "saliency error",
    "saliency_error_last": "saliency error, last",
}


def quality_cells(methods: Iterable[Any], rate: float) -> list[list[str]]:
    """Return the rows of one keep rate of ``bench.quality``: means over the images."""
    return [
        [f"`{row['label']}`", *(f"{row['mean'][name]:.3f}" for name in QUALITY_COLUMNS)]
        for row in methods
        if row["keep_rate"] == rate
    ]


def quality(rate: float) -> list[str]:
    """Return what each method costs on real weights, of ``bench.quality``."""
    return markdown_table(["method", *QUALITY_COLUMNS.values()], quality_cells(_read(QUALITY)["methods"], rate))


def tuned() -> list[str]:
    """Return tuned schedules beside the paper's, on photographs that the search did not see, of ``bench.tuning``."""
    rows = []
    for row in _read(TUNED)["choices"]:
        stages = " ".join(f"{block}:{tokens}" for block, tokens in zip(row["at"], row["tokens"], strict=True))
        measures = (row["unseen"][name]["mean"] for name in ("class_cosine", "patch_cosine"))
        rows.append(
            [
                *(f"`{row['method']}`", row["origin"], f"{row['measured']['speedup']:.2f}"),
                f"{row['predicted']['speedup']:.2f}",
                *(f"{value:.3f}" for value in measures),
                *(f"{row['predicted']['fidelity']:.3f}", f"{row['saliency_error']:.3f}", stages),
            ]
        )
    head = ["method", "schedule", "times as fast", "predicted", "class token", "patches", "predicted"]
    return markdown_table([*head, "saliency error", "block:tokens"], rows)


def hosts() -> list[str]:
    """Return how much faster encoders of every library are reduced, of ``bench.hosts``."""
    rows = []
    for row in _read(HOSTS)["models"]:
        speeds = (f"{row['methods'][name]['median']:.2f}" for name in ("topk", "tome"))
        rows.append([row["title"], f"{row['patches']:,}", str(row["input"][0]), *speeds])
    return markdown_table(["model", "patches", "batch", "`topk`", "`tome`"], rows)


def _models(names: Iterable[str]) -> list[Any]:
    """Return the models of several runs of a study, of the unreduced ones, which are equal, the first."""
    models = [model for name in names for model in _read(name)["models"]]
    unreduced = next(model for model in models if model["keep_rate"] is None)
    return [unreduced, *(model for model in models if model["keep_rate"] is not None)]


def _by_rate(names: Iterable[str], cell: Callable[[Any], str]) -> list[str]:
    """Return a row a method and a column a keep rate of a study's results."""
    reduced = _models(names)[1:]
    rates = sorted({model["keep_rate"] for model in reduced}, reverse=True)
    rows = []
    for method in dict.fromkeys(model["method"] for model in reduced):
        own = {model["keep_rate"]: cell(model) for model in reduced if model["method"] == method}
        rows.append([TITLES[method], *(own.get(rate, "") for rate in rates)])
    return markdown_table(["method", *(f"{rate:g}" for rate in rates)], rows)


def study_accuracy() -> list[str]:
    """Return the accuracy of every method and keep rate on CIFAR-10, in per cent."""
    return _by_rate(STUDY, lambda model: f"{model['accuracy']['top1']:.2f}")


def study_gaps() -> list[str]:
    """Return what every method loses on CIFAR-10, in points, with its interval."""
    return _by_rate(STUDY, lambda model: "{mean:+.2f} ({low:+.2f} to {high:+.2f})".format(**model["gap"]))


def study_one_epoch(rate: float) -> list[str]:
    """Return the accuracy at a keep rate on CIFAR-10, off the shelf and after an epoch, and what it loses."""
    before = {model["method"]: model["accuracy"] for model in _models(STUDY) if model["keep_rate"] in (None, rate)}
    rows = []
    for model in _models(ONE_EPOCH[rate]):
        method, gap = model["method"], model["gap"]
        title = "unreduced" if model["keep_rate"] is None else TITLES[method]
        shelf = f"{before[method]['top1']:.2f}" if method in before else ""
        lost = "" if gap is None else "{mean:+.2f} ({low:+.2f} to {high:+.2f})".format(**gap)
        rows.append([title, shelf, f"{model['accuracy']['top1']:.2f}", lost])
    return markdown_table(["method", "off the shelf", "after one epoch", "against the unreduced model"], rows)


def _latest(name: str) -> Any:
    """Return the newest result whose name begins so and ends in a date, or None: it may not be measured yet."""
    files = sorted(RESULTS.glob(f"{name}-????-??-??.json"))
    return json.loads(files[-1].read_text()) if files else None


def deployed() -> list[list[str]]:
    """Return the tables of deployment that were measured: runtimes, small batches, int8, torch.compile."""
    tables = []
    for name in (DEPLOYED, SMALL, ONE, SEVERAL, FOUR):
        if (result := _latest(name)) is not None:
            ways = tuple(dict.fromkeys(row["way"] for row in result["rows"]))
            tables.append(deploy_tables.speed_lines(result["rows"], ways))
    for name in INT8:
        if (result := _latest(name)) is not None:
            tables.append(deploy_tables.int8_lines(result["rows"]))
    if (result := _latest(COMPILED)) is not None:
        tables.append(deploy_tables.time_lines(result["rows"]))
    return tables


TABLES = {
    "docs/deploy.md": deployed(),
    "docs/quality.md": [*(quality(rate) for rate in (0.9, 0.7, 0.5)), tuned()],
    "README.md": [first_figures()],
    "docs/speed.md": [*map(compared, RATES), compared_alone(), forward(), training(), primitives()],
    "docs/models.md": [hosts()],
    "docs/study.md": [study_accuracy(), study_gaps(), *map(study_one_epoch, ONE_EPOCH)],
}


def main() -> None:
    """Print every table under the file that it belongs to."""
    for page, tables in TABLES.items():
        print(f"# {page}\n")
        for table in tables:
            print("\n".join(table), end="\n\n")


if __name__ == "__main__":
    main()
