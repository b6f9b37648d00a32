"""A whole study: train every method at every keep rate, evaluate, record, compare, correlate, draw, report."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.state import PartialState
from torch.utils.data import DataLoader

from ..measure import environment
from .comparison import Row, TokenStatistics, compare, compare_depth_maps, correlate, token_statistics, write_csv
from .data import DataSet
from .evaluate import Evaluation, evaluate
from .findings import Finding, find
from .pictures import (
    FAMILIES,
    TITLES,
    Result,
    accuracy_by_rate,
    accuracy_by_speed,
    depth_maps,
    patterns,
    scatter,
    similarity_matrix,
)
from .protocol import Reduction, load_trained, plain_data
from .recipe import Recipe, run_name, train_all
from .record import UNREDUCED, Recording, open_recording, record_images
from .report import Section, Table, write_report
from .train import Training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Study", "analyse", "run_study"]

_EXAMPLES = 6  # images whose patterns are drawn
_Progress = Callable[[str, float, float], None]


@dataclasses.dataclass(frozen=True)
class Study:
    """What a study found.

    Attributes:
        recordings: the unreduced model first.
        evaluations: of the same models.
        tokens: of the same models.
        rows: similarities along ``"keep_rate"`` and ``"method"``, and of depth maps along these under ``"depth_…"``.
        correlations: of similarities along ``"method"`` with the difference in accuracy.
        findings: the paper's, held against all this.
        seconds: that every part took; training is the sum over its processes.
    """

    recordings: list[Recording]
    evaluations: list[Evaluation]
    tokens: list[TokenStatistics]
    rows: dict[str, list[Row]]
    correlations: list[Row]
    findings: list[Finding]
    seconds: dict[str, float]

    def result(self, index: int) -> Result:
        """One model's, for pictures."""
        run, evaluation = self.recordings[index].run, self.evaluations[index]
        rate = 1.0 if run.keep_rate is None else run.keep_rate
        return Result(run.method, rate, run.accuracy, evaluation.images_per_second)

    @property
    def results(self) -> list[Result]:
        """Those of the reduced models."""
        return [self.result(index) for index in range(1, len(self.recordings))]

    def recording(self, method: str, keep_rate: float | None) -> Recording | None:
        """That of one model, if there is one."""
        wanted = method, keep_rate
        return next((one for one in self.recordings if (one.run.method, one.run.keep_rate) == wanted), None)


def _judge(
    recipe: Recipe, reduction: Reduction | None, weights: Path, data: DataSet, folder: Path, device: torch.device
) -> tuple[Recording, Evaluation]:
    """Evaluate and record a trained model, or read what an earlier call wrote."""
    recorded, evaluated = folder / "recording.safetensors", folder / "evaluation.json"
    if not evaluated.exists():
        model = load_trained(recipe.backbone, reduction, weights, data.num_classes).to(device)
        batches = DataLoader(data.val, batch_size=recipe.fine_tuning.batch_size, num_workers=recipe.fine_tuning.workers)
        rate = None if reduction is None else reduction.keep_rate
        first = rate[0] if isinstance(rate, tuple) else rate
        record_images(
            model,
            batches,
            recorded,
            dataset=data.name,
            backbone=recipe.backbone.name,
            method=UNREDUCED if reduction is None else reduction.variant,
            keep_rate=first,
        )
        found = evaluate(model, data, batch_size=recipe.fine_tuning.batch_size, workers=recipe.fine_tuning.workers)
        part = evaluated.with_suffix(".part")
        part.write_text(json.dumps(dataclasses.asdict(found), indent=1) + "\n")
        part.replace(evaluated)
    return open_recording(recorded), Evaluation(**json.loads(evaluated.read_text()))


def _seconds(training: Training | None) -> float:
    return 0.0 if training is None else sum(epoch.seconds for epoch in training.epochs)


def analyse(recordings: Sequence[Recording], evaluations: Sequence[Evaluation], seconds: dict[str, float]) -> Study:
    """Compare and correlate what was recorded.

    Args:
        recordings: of one data set and backbone, the unreduced model first.
        evaluations: of the same models.
        seconds: that the parts before took; those of this part are added.
    """
    start = time.perf_counter()
    tokens = [token_statistics(recording) for recording in recordings]
    rows: dict[str, list[Row]] = {}
    for axis in ("keep_rate", "method"):
        rows[axis] = compare(recordings, axis)
        rows[f"depth_{axis}"] = compare_depth_maps(tokens, axis)
    correlations = correlate(rows["method"], "method")
    findings = find(recordings, tokens, rows, correlations)
    seconds = seconds | {"comparing": time.perf_counter() - start}
    return Study(list(recordings), list(evaluations), tokens, rows, correlations, findings, seconds)


def run_study(
    recipe: Recipe,
    folder: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    jobs: int = 1,
    cpu: bool = False,
    progress: _Progress | None = None,
) -> Study | None:
    """Run a study from training to report.

    What is in the folder already is not done again: an interrupted study goes on where it was.

    Args:
        recipe: what is trained, and how.
        folder: gets ``report.html``, ``summary.md``, ``results.json``, ``tables/``, ``pictures/`` and, under
            ``models/``, the weights, histories and recordings of every model.
        root: the folder of the data set; none for digits.
        jobs: how many models are trained at a time; see :func:`~fastreduce.study.recipe.train_all`.
        cpu: stay on the CPU.
        progress: called with what is done, how much of it and out of how much.

    Returns:
        The study; None in the processes of ``accelerate launch`` but the first, which help to train.

    Raises:
        ValueError: the folder holds another study; a data set or a model that does not fit.
        FileNotFoundError: the data set is not there.
    """
    folder = Path(folder)
    data = recipe.open(root)
    state = PartialState(cpu=cpu)
    trained = train_all(recipe, folder / "models", root=root, jobs=jobs, cpu=cpu, progress=progress)
    seconds = {"training the backbone": _seconds(trained.pop("backbone", None))}
    seconds["fine-tuning"] = sum(_seconds(one) for one in trained.values())
    if not state.is_main_process:
        return None
    start = time.perf_counter()
    recordings, evaluations = [], []
    for done, reduction in enumerate(recipe.runs):
        place = run_name(reduction)
        if progress is not None:
            progress(f"recording {place}", done, len(trained))
        judged = _judge(recipe, reduction, trained[place].weights, data, folder / "models" / place, state.device)
        recordings.append(judged[0])
        evaluations.append(judged[1])
    seconds["evaluating and recording"] = time.perf_counter() - start
    study = analyse(recordings, evaluations, seconds)
    _write(study, recipe, data, folder, state.device)
    return study


def _pictures(study: Study, data: DataSet) -> dict[str, tuple[Figure, str]]:
    """Figure and caption by file name."""
    baseline, results = study.result(0), study.results
    metric = "mean average precision, %" if data.multi_label else "top-1 accuracy, %"
    what = f"{data.name}, {study.recordings[0].images} validation images"
    maps = {
        (entry.run.method, entry.run.keep_rate): entry.depth
        for entry in study.tokens
        if entry.depth is not None and entry.run.keep_rate is not None
    }
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
    if maps:
        pictures["depth-maps"] = (
            depth_maps(maps, study.recordings[0].depth, subtitle="survivors count as the model's depth"),
            "Columns are keep rates. Merging methods without centres lose no patch and have no map.",
        )
    for measure, words in (("iou", "IoU of the kept patches"), ("nmi", "NMI of the assignments")):
        pictures |= _matrices(study, measure, words)
    pictures |= _gaps(study)
    if (drawn := _drawn_patterns(study, data)) is not None:
        pictures["patterns"] = drawn
    return pictures


def _matrices(study: Study, measure: str, words: str) -> dict[str, tuple[Figure, str]]:
    """Methods against methods, at the rate in the middle and the first stage."""
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
    """How the gap to Top-K goes with the distance of the features."""
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
    """Example images as the last stage of every pruning and hard merging method leaves them."""
    rates = sorted({one.run.keep_rate for one in study.recordings if one.run.keep_rate is not None})
    rate = rates[len(rates) // 2]
    chosen = range(min(_EXAMPLES, study.recordings[0].images))
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
    return figure, "The first validation images, not chosen."


def _accuracy_table(study: Study) -> Table:
    rates = sorted({row.keep_rate for row in study.results}, reverse=True)
    cells = {(row.method, row.keep_rate): row.accuracy for row in study.results}
    rows = [
        [TITLES[method], family, *(cells.get((method, rate)) for rate in rates)]
        for family, methods in FAMILIES.items()
        for method in methods
        if any((method, rate) in cells for rate in rates)
    ]
    caption = f"Accuracy in per cent by keep rate; unreduced {study.result(0).accuracy:.2f}"
    return Table(["method", "family", *(f"{rate:g}" for rate in rates)], rows, caption)


def _speed_table(study: Study) -> Table:
    rows = []
    for recording, evaluation in zip(study.recordings, study.evaluations, strict=True):
        tokens = ", ".join(f"{count:.4g}" for count in evaluation.tokens)
        run = recording.run
        rows.append(
            [TITLES[run.method], run.keep_rate, evaluation.images_per_second, evaluation.gmacs * 1e3, tokens]
        )  # fmt: skip
    columns = ["method", "keep rate", "images / s", "million multiply-adds", "patch tokens after each stage"]
    return Table(columns, rows, "Speed and size", digits=2)


def _correlation_table(study: Study) -> Table:
    columns = ["method A", "keep rate", "measure", "Spearman", "Kendall", "pairs"]
    rows = [
        [TITLES[row["method"]], row["keep_rate"], row["measure"], row["spearman"], row["kendall"], row["pairs"]]
        for row in study.correlations
        if row["pairs"] > 2
    ]
    return Table(columns, rows, "Similarity to A, correlated with the accuracy of A less that of the other")


def _write(study: Study, recipe: Recipe, data: DataSet, folder: Path, device: torch.device) -> None:
    """Tables, pictures, report and one JSON file with all of it."""
    tables, drawings, about = folder / "tables", folder / "pictures", environment(device)
    for place in (tables, drawings):
        place.mkdir(parents=True, exist_ok=True)
    named: dict[str, list[Row]] = {**study.rows, "correlations": study.correlations}
    for name, rows in named.items():
        write_csv(rows, tables / f"{name.replace('_', '-')}.csv")
    pictures = _pictures(study, data)
    for name, (figure, _) in pictures.items():
        figure.savefig(drawings / f"{name}.png", dpi=150, metadata={"Software": "fastreduce"})
    result = {
        "recipe": plain_data(recipe),
        "environment": about,
        "seconds": study.seconds,
        "models": [
            {**dataclasses.asdict(recording.run), **dataclasses.asdict(evaluation)}
            for recording, evaluation in zip(study.recordings, study.evaluations, strict=True)
        ],
        "findings": [dataclasses.asdict(finding) for finding in study.findings],
    }
    (folder / "results.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    taken = {name: round(value) for name, value in study.seconds.items()}
    facts: list[tuple[str, Any]] = [
        ("data", f"{data.name}: {len(data.train)} training, {len(data.val)} validation images"),
        ("backbone", f"{recipe.backbone.name} {dict(recipe.backbone.options) or ''}"),
        ("models", f"{len(study.recordings)}, {recipe.fine_tuning.epochs} epochs each from the same backbone"),
        ("seconds", ", ".join(f"{name} {value}" for name, value in taken.items())),
        *((name, value) for name, value in about.items() if isinstance(value, (str, int, float))),
    ]
    findings = Table(
        ["finding of the paper", "here", "evidence"],
        [[finding.claim, finding.verdict, finding.evidence] for finding in study.findings],
    )

    def drawn(*names: str) -> list[tuple[Figure, str]]:
        return [pictures[name] for name in names if name in pictures]

    sections = [
        Section(
            "Findings",
            [
                "Gaps in accuracy are paired over images, with their standard error; below two of these: undecided. "
                "What another seed of the training would change is not in it."
            ],
            [findings],
        ),
        Section("Accuracy", (), [_accuracy_table(study)], drawn("accuracy-by-keep-rate", "accuracy-by-speed")),
        Section("Where patches are lost", (), (), drawn("depth-maps", "patterns")),
        Section("How methods agree", (), (), drawn("iou-matrix", "nmi-matrix", "gap-by-procrustes")),
        Section("Similarity and accuracy", (), [_correlation_table(study)]),
        Section("Speed", (), [_speed_table(study)]),
    ]
    summary = f"{_accuracy_table(study).markdown()}\n{findings.markdown()}"
    (folder / "summary.md").write_text(summary, encoding="utf-8")
    write_report(folder / "report.html", f"Token reduction on {data.name}", facts, sections)
