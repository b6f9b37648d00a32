"""The pages of a study: tables, pictures, one report, and JSON with all of it."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .._files import write_atomically
from ..arguments import counted
from ..measure import environment
from ..names import FAMILIES, TITLES
from .analysis import Study
from .comparison import (
    Row,
    chance_iou,
    write_csv,
)
from .data import DataSet
from .pictures import (
    accuracy_by_rate,
    accuracy_by_speed,
    depth_maps,
    patterns,
    scatter,
    similarity_matrix,
)
from .protocol import plain_data
from .recipe import Recipe
from .record import UNREDUCED, Run
from .report import Section, Table, in_markdown, write_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_study"]

_EXAMPLES = 6  # images whose patterns are drawn
_SOFTWARE = ("fastreduce", "commit", "torch", "triton", "timm", "python")
_MACHINE = ("device", "device_name", "threads", "platform")
_MEASURES = {
    **{"iou": "IoU", "homogeneity": "homogeneity", "completeness": "completeness", "nmi": "NMI"},
    **{"cca": "CCA", "cca_squared": "CCA, squared", "pwcca": "PWCCA distance of A"},
    **{"pwcca_reverse": "PWCCA distance of the other", "cka": "CKA distance", "procrustes": "Procrustes distance"},
}


def _pictures(study: Study, data: DataSet) -> dict[str, tuple[Figure, str]]:
    """Draw the figures -> figure and caption by file name."""
    baseline, results = study.result(0), study.results
    metric = "mean average precision, %" if data.multi_label else "top-1 accuracy, %"
    what = f"{data.name}, {counted(study.recordings[0].images, 'validation image')}"
    pictures = {
        "accuracy-by-keep-rate": (
            accuracy_by_rate(results, baseline, subtitle=what, metric=metric),
            "The horizontal line is the unreduced model, fine-tuned for as long.",
        ),
        "accuracy-by-speed": (
            accuracy_by_speed(results, baseline, subtitle=what, metric=metric),
            "Images per second as measured here; the star is the unreduced model.",
        ),
    }
    for backbone in dict.fromkeys(one.run.backbone for one in study.recordings):
        own = backbone == study.backbone
        maps = {
            (entry.run.method, entry.run.keep_rate): entry.depth
            for entry in study.tokens
            if entry.run.backbone == backbone and entry.depth is not None and entry.run.keep_rate is not None
        }
        if maps:
            where = "" if own else f" in {backbone}"
            figure = depth_maps(
                maps,
                study.recordings[0].depth,
                title=f"Mean depth at which a patch is lost{where}",
                subtitle="survivors count as the model's depth",
            )
            words = "Columns are keep rates. Merging methods without centres lose no patch and have no map."
            pictures[f"depth-maps{'' if own else f'-{backbone}'}"] = figure, words
    for measure, words in (("iou", "IoU of the kept patches"), ("nmi", "NMI of the assignments")):
        pictures |= _matrices(study, measure, words)
    pictures |= _gaps(study)
    if (drawn := _drawn_patterns(study, data)) is not None:
        pictures["patterns"] = drawn
    return pictures


def _matrices(study: Study, measure: str, words: str) -> dict[str, tuple[Figure, str]]:
    """Draw methods against methods, at the rate in the middle and the first stage."""
    rates = sorted({run.keep_rate for run in (one.run for one in study.recordings) if run.keep_rate is not None})
    rate = rates[len(rates) // 2]
    block = min((block for recording in study.recordings for block in recording.blocks), default=None)
    column = f"{measure}_{block}"
    rows = [
        row for row in study.rows["method"] if row["keep_rate_a"] == row["keep_rate_b"] == rate and column in row
    ]  # fmt: skip
    present = {row["method_a"] for row in rows}
    names = [method for method in TITLES if method in present]
    if len(names) < 2:
        return {}
    values = np.full((len(names), len(names)), np.nan)
    for row in rows:
        values[names.index(row["method_a"]), names.index(row["method_b"])] = row[column]
    figure = similarity_matrix(
        [TITLES[name] for name in names], values, title=words, subtitle=f"keep rate {rate:g}, after block {block}"
    )
    return {f"{measure}-matrix": (figure, "Mean over images. A row's method against a column's.")}


def _gaps(study: Study) -> dict[str, tuple[Figure, str]]:
    """Draw how the gap to Top-K goes with the distance of the features."""
    blocks = list(study.recordings[0].features)
    if not blocks:
        return {}
    column = f"procrustes_{max(blocks)}"
    points = [
        (row["method_b"], row[column], row["difference"])
        for row in study.rows["method"]
        if row["method_a"] == "topk" and row["keep_rate_a"] == row["keep_rate_b"] and column in row
    ]
    if len(points) < 3:
        return {}
    figure = scatter(
        points,
        title="Distance of class features and gap in accuracy",
        subtitle="every method against Top-K at the same keep rate",
        across=f"Procrustes distance after block {max(blocks)}",
        up="accuracy of Top-K less that of the method, points",
    )
    return {"gap-by-procrustes": (figure, "One point for each method and keep rate.")}


def _drawn_patterns(study: Study, data: DataSet) -> tuple[Figure, str] | None:
    """Draw example images as the last stage of every pruning and hard merging method leaves them."""
    rates = sorted({one.run.keep_rate for one in study.recordings if one.run.keep_rate is not None})
    rate = rates[len(rates) // 2]
    seen = study.recordings[0].images  # sorted by class, in most data sets
    chosen = [number * seen // _EXAMPLES for number in range(_EXAMPLES)] if seen > _EXAMPLES else range(seen)
    grid = study.recordings[0].grid
    images = []
    mean, deviation = (np.array(values)[:, None, None] for values in (data.mean, data.std))
    for index in chosen:
        pixels = data.val[index][0].numpy() * deviation + mean
        images.append((255 * pixels.clip(0, 1)).round().astype(np.uint8).transpose(1, 2, 0))
    slots = {}
    for method in (method for family in FAMILIES.values() for method in family if family != FAMILIES["Soft merging"]):
        recording = study.recording(method, rate)
        if recording is not None and recording.blocks:
            slots[method] = [recording.pattern(max(recording.blocks), index) for index in chosen]
    if not slots:
        return None
    figure = patterns(
        images, slots, grid, subtitle=f"keep rate {rate:g}; grey is lost, regions of one colour are merged"
    )
    return figure, "Validation images at even distances, not chosen."


def _by_rate(results: Iterable[tuple[Run, Any]], caption: str, digits: int = 2) -> Table:
    """Return a table with a row a method and a column a keep rate."""
    cells = {(run.method, run.keep_rate): value for run, value in results}
    rates = sorted({rate for _, rate in cells if rate is not None}, reverse=True)
    rows = [
        [TITLES[method], family, *(cells.get((method, rate)) for rate in rates)]
        for family, methods in FAMILIES.items()
        for method in methods
        if any((method, rate) in cells for rate in rates)
    ]
    return Table(["method", "family", *(f"{rate:g}" for rate in rates)], rows, caption, digits)


def _accuracy_table(study: Study, recipe: Recipe) -> Table:
    runs = [one.run for one in study.recordings if one.run.backbone == study.backbone]
    caption = f"Accuracy in per cent by keep rate; unreduced {runs[0].accuracy:.2f}"
    exact = [f"{one.keep_rate:g}" for one in recipe.reductions if one.options.get("rounds") == "exact"]
    if exact:
        caption += f"; ToMe at {', '.join(exact)} with as many matchings as reach its number of tokens"
    return _by_rate([(run, run.accuracy) for run in runs], caption)


def _lost_table(study: Study) -> Table:
    """Return the gap of every model to the unreduced one, paired over images."""
    cells = [
        (run, None if gap is None else gap.words)
        for run, gap in zip([one.run for one in study.recordings], study.gaps, strict=True)
        if run.backbone == study.backbone and run.keep_rate is not None
    ]
    return _by_rate(cells, "Points against the unreduced model, with the paired 95 % interval")


def _speed_tables(study: Study) -> list[Table]:
    judged = [
        (recording.run, evaluation)
        for recording, evaluation in zip(study.recordings, study.evaluations, strict=True)
        if recording.run.backbone == study.backbone
    ]
    unreduced = judged[0][1]
    speeds = [(run, evaluation.images_per_second) for run, evaluation in judged]
    work = [(run, 1e3 * evaluation.gmacs) for run, evaluation in judged]
    tokens = [(run, ", ".join(f"{count:.3g}" for count in evaluation.tokens)) for run, evaluation in judged]
    return [
        _by_rate(
            speeds,
            f"Images per second, median of {counted(unreduced.rounds, 'round')} in turns; "
            f"unreduced {unreduced.images_per_second:.0f}",
            digits=0,
        ),
        _by_rate(work, f"Million multiply-adds an image; unreduced {1e3 * unreduced.gmacs:.1f}", digits=1),
        _by_rate(tokens, "Patch tokens after each stage"),
    ]


def _capacity_tables(study: Study) -> list[Table]:
    """Return for every two backbones what they have in common, method by method."""
    shares = {entry.run: float(entry.share[0]) for entry in study.tokens if len(entry.share)}
    runs = {(run.backbone, run.method, run.keep_rate): run for run in (one.run for one in study.recordings)}
    maps = {_ends(row): row["pcc"] for row in study.rows.get("depth_backbone", ())}
    tables: dict[tuple[str, str], list[list[Any]]] = {}
    order = list(TITLES)
    rows = study.rows.get("backbone", ())
    for row in sorted(rows, key=lambda row: (order.index(row["method_a"]), -(row["keep_rate_a"] or 0))):
        blocks = sorted(int(name[4:]) for name in row if name.startswith("iou_") and name[4:].isdigit())
        if blocks:
            a, b = (runs[end] for end in _ends(row))
            overlap, chance = row[f"iou_{blocks[0]}"], chance_iou(shares[a], shares[b])
            cells = [TITLES[a.method], a.keep_rate, a.accuracy, b.accuracy, overlap, chance, maps.get(_ends(row))]
            tables.setdefault((a.backbone, b.backbone), []).append(cells)
    columns = ["method", "keep rate", "accuracy A", "accuracy B", "IoU, first stage", "by chance", "depth maps, PCC"]
    unreduced = {run.backbone: run for run in runs.values() if run.method == UNREDUCED}
    about = {
        name: f"{name}, {run.parameters:,} weights, unreduced {run.accuracy:.2f}" for name, run in unreduced.items()
    }
    captions = {(a, b): f"A: {about[a]}; B: {about[b]}" for a, b in tables}
    return [Table(columns, cells, captions[pair]) for pair, cells in tables.items()]


def _ends(row: Row) -> tuple[tuple[Any, ...], ...]:
    return tuple(tuple(row[f"{name}_{end}"] for name in ("backbone", "method", "keep_rate")) for end in "ab")


def _correlation_tables(study: Study) -> list[Table]:
    """Return for every anchor the mean over blocks, by measure and keep rate."""
    found: dict[str, dict[str, dict[float, list[float]]]] = {}
    for row in study.correlations:
        if row["pairs"] > 2 and math.isfinite(row["spearman"]):
            own = found.setdefault(row["method"], {}).setdefault(row["measure"].rsplit("_", 1)[0], {})
            own.setdefault(row["keep_rate"], []).append(row["spearman"])
    tables = []
    for method, measures in found.items():
        rates = sorted({rate for means in measures.values() for rate in means}, reverse=True)
        rows = [
            [_MEASURES[measure], *(statistics.fmean(means[rate]) if rate in means else None for rate in rates)]
            for measure, means in measures.items()
        ]
        tables.append(Table([f"A: {TITLES[method]}", *(f"{rate:g}" for rate in rates)], rows))
    return tables


def write_study(study: Study, recipe: Recipe, data: DataSet, folder: Path, device: torch.device) -> None:
    """Write one JSON file with all of it, then tables, then pictures and the report.

    What cannot be written costs none of the others, and is listed in ``study.unwritten``.
    """
    tables, drawings, about = folder / "tables", folder / "pictures", environment(device)

    def written(path: Path, write: Callable[[Path], object] | str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, write)
        except OSError as error:
            study.unwritten.append(f"{path} ({error.strerror or error})")

    result = {
        "recipe": _without_folders(plain_data(recipe)),
        "environment": about,
        "seconds": study.seconds,
        "models": [
            {
                **dataclasses.asdict(recording.run),
                **dataclasses.asdict(evaluation),
                "gap": None if gap is None else dataclasses.asdict(gap),
            }
            for recording, evaluation, gap in zip(study.recordings, study.evaluations, study.gaps, strict=True)
        ],
        "floors": dataclasses.asdict(study.floors),
        "findings": [dataclasses.asdict(finding) for finding in study.findings],
    }
    written(folder / "results.json", json.dumps(result, indent=1, default=str) + "\n")
    findings = Table(
        ["finding of the paper", "here", "evidence"],
        [[finding.claim, finding.verdict, finding.evidence] for finding in study.findings],
    )
    capacities = _capacity_tables(study)
    accuracy = [_accuracy_table(study, recipe), _lost_table(study)]
    parts = [table.markdown() for table in (*accuracy, findings, *capacities)]
    floors = in_markdown(study.floors.words(study.recordings)).replace(". ", ".\n")  # a sentence a line
    summary = "\n".join([*parts[:3], f"{floors}\n", *parts[3:]])
    written(folder / "summary.md", summary)
    named: dict[str, list[Row]] = {**study.rows, "correlations": study.correlations}
    for name, rows in named.items():
        written(tables / f"{name.replace('_', '-')}.csv", lambda part, rows=rows: write_csv(rows, part))  # type: ignore[misc]
    pictures = _pictures(study, data)
    for name, (figure, _) in pictures.items():
        written(
            drawings / f"{name}.png",
            lambda part, figure=figure: figure.savefig(part, dpi=150, metadata={"Software": "fastreduce"}),  # type: ignore[misc]
        )
    sections = _sections(study, recipe, pictures, findings, capacities)
    facts = _facts(study, recipe, data, about)
    written(folder / "report.html", lambda part: write_report(part, f"Token reduction on {data.name}", facts, sections))


def _without_folders(value: Any) -> Any:
    """Return a recipe as JSON with the names of its files of weights alone, without the folders that they lie in."""
    if isinstance(value, dict):
        return {
            name: Path(one).name if name == "checkpoint" and one is not None else _without_folders(one)
            for name, one in value.items()
        }
    return [_without_folders(one) for one in value] if isinstance(value, list) else value


def _facts(study: Study, recipe: Recipe, data: DataSet, about: Mapping[str, Any]) -> list[tuple[str, Any]]:
    taken = {name: round(value) for name, value in study.seconds.items()}
    options = ", ".join(f"{name} {value}" for name, value in recipe.backbone.options.items())
    further = "".join(f"; {capacity.name} beside it" for capacity in recipe.capacities)
    epochs = recipe.fine_tuning.epochs
    fine_tuned = f"{counted(epochs, 'epoch')} each from its backbone"
    trained = fine_tuned if epochs else "none of them trained after its backbone"
    return [
        ("data", f"{data.name}: {len(data.train)} training, {counted(len(data.val), 'validation image')}"),
        ("backbone", f"{recipe.backbone.name}{f' ({options})' if options else ''}{further}"),
        ("models", f"{len(study.recordings)}, {trained}"),
        ("seconds", ", ".join(f"{name} {value}" for name, value in taken.items())),
        ("software", ", ".join(f"{name} {about[name]}" for name in _SOFTWARE if about.get(name) is not None)),
        ("machine", ", ".join(f"{name} {about[name]}" for name in _MACHINE if about.get(name) is not None)),
    ]


def _sections(
    study: Study, recipe: Recipe, pictures: Mapping[str, tuple[Figure, str]], findings: Table, capacities: list[Table]
) -> list[Section]:
    def drawn(*names: str) -> list[tuple[Figure, str]]:
        return [pictures[name] for name in names if name in pictures]

    sections = [
        Section(
            "Findings",
            [
                "Gaps in accuracy are paired over images, with their 95 % interval (bootstrap; two models by McNemar's "
                "test too); within chance: undecided. What another seed of the training would change is not in it.",
                study.floors.words(study.recordings),
            ],
            [findings],
        ),
        Section(
            "Accuracy",
            (),
            [_accuracy_table(study, recipe), _lost_table(study)],
            drawn("accuracy-by-keep-rate", "accuracy-by-speed"),
        ),
        Section("Where patches are lost", (), (), drawn("depth-maps", "patterns")),
        Section("How methods agree", (), (), drawn("iou-matrix", "nmi-matrix", "gap-by-procrustes")),
        Section(
            "Similarity and accuracy",
            [
                "Spearman correlation, by keep rate, of the similarity to A with the accuracy of A less that of the "
                "other; mean over blocks. Of every block, and Kendall's: tables/correlations.csv."
            ],
            _correlation_tables(study),
        ),
        Section("Speed", (), _speed_tables(study)),
    ]
    if capacities:
        words = "The same method and keep rate on two backbones. PCC is Pearson's correlation of the two depth maps."
        maps = [name for name in pictures if name.startswith("depth-maps-")]
        sections.insert(4, Section("Another capacity", [words], capacities, drawn(*maps)))
    return sections
