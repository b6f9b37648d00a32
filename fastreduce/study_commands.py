"""``fastreduce study …``: the paper's study, whole or in parts. What it needs is imported when a command runs."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .commands import UserError, numbers, progress_bar, split, user_errors

if TYPE_CHECKING:
    from .study.data import DataSet
    from .study.protocol import Backbone, Reduction
    from .study.recipe import Recipe
    from .study.run import Study

__all__ = ["study"]

_EXTRA = {"accelerate": "accelerate", "torchmetrics": "torchmetrics", "scipy": "scipy", "ot": "POT", "jinja2": "jinja2"}

study = typer.Typer(help="Train, record, compare and draw, as the paper does.", no_args_is_help=True)


@study.callback()
def _check() -> None:
    """Train, record, compare and draw, as the paper does."""
    if missing := [package for name, package in _EXTRA.items() if find_spec(name) is None]:
        raise UserError(f'{", ".join(missing)} missing; pip install "fastreduce[study]"')


_Dataset = Annotated[str, typer.Option(help="digits, imagenet, nabirds, coco or nuswide.")]
_Root = Annotated[Path | None, typer.Option(help="Folder of the data set; none for digits.")]
_Model = Annotated[
    str | None, typer.Option(help="A timm Vision Transformer. (default: DeiT-S; a small one for digits)")
]
_Checkpoint = Annotated[Path | None, typer.Option(help="Weights of the unreduced model to start from.")]
_Pretrained = Annotated[bool, typer.Option("--pretrained", help="Let timm download them.")]
_Method = Annotated[str | None, typer.Option(help="The method; radial-l1 for a norm. (default: unreduced)")]
_KeepRate = Annotated[float | None, typer.Option(help="Its keep rate.")]
_Epochs = Annotated[int | None, typer.Option(help="(default: the protocol's)")]
_BatchSize = Annotated[int | None, typer.Option(help="Of one process. (default: the protocol's)")]
_Seed = Annotated[int, typer.Option(help="Of everything.")]
_Cpu = Annotated[bool, typer.Option("--cpu", help="Stay on the CPU.")]
_Out = Annotated[Path, typer.Option(help="Folder for what is made.")]


@contextmanager
def _training_errors() -> Iterator[None]:
    """As :func:`user_errors`, with what only a training comes to: a loss that is not finite, too little memory."""
    from .measure import usual_troubles

    troubles: tuple[type[Exception], ...] = (FloatingPointError, *usual_troubles())
    try:
        with user_errors():
            yield
    except troubles as error:
        raise UserError(str(error)) from error


def _backbone(dataset: str, model: str | None, checkpoint: Path | None, pretrained: bool) -> Backbone:
    from .study.protocol import Backbone
    from .study.recipe import DIGITS

    if dataset == "digits" and model is None:
        return dataclasses.replace(DIGITS.backbone, checkpoint=checkpoint)
    return Backbone(model or "deit_small_patch16_224", pretrained=pretrained, checkpoint=checkpoint)


def _reduction(dataset: str, method: str | None, keep_rate: float | None) -> Reduction | None:
    """As the study of the data set has it."""
    from .study.recipe import DIGITS, reductions

    if (method is None) != (keep_rate is None):
        given = f"--keep-rate {keep_rate}" if method is None else f"--method {method}"
        raise ValueError(f"--method and --keep-rate go together, got {given} alone")
    if method is None or keep_rate is None:
        return None
    return reductions([method], [keep_rate], **(_options(DIGITS) if dataset == "digits" else {}))[0]


def _options(recipe: Recipe) -> dict[str, Any]:
    """What the recipe sets for each of its methods."""
    return {reduction.method: reduction.options for reduction in recipe.reductions}


def _recipe(
    dataset: str,
    quick: bool,
    methods: list[str] | None,
    keep_rates: list[str] | None,
    epochs: int | None,
    batch_size: int | None,
    seed: int,
    backbone: Backbone,
) -> Recipe:
    """The embedded one for digits, else every method from the given backbone with the paper's protocol."""
    from .study.recipe import DIGITS, DIGITS_QUICK, paper_recipe, reductions

    changes: dict[str, Any] = {"seed": seed}
    changes |= {name: value for name, value in (("epochs", epochs), ("batch_size", batch_size)) if value is not None}
    recipe = DIGITS_QUICK if quick else DIGITS
    if dataset != "digits":
        if quick:
            raise ValueError("--quick is for digits; elsewhere give --epochs")
        if not backbone.pretrained and backbone.checkpoint is None:
            raise ValueError(f"{dataset} needs a trained backbone: --pretrained or --checkpoint")
        recipe = dataclasses.replace(paper_recipe(dataset), backbone=backbone)
    elif backbone.checkpoint is not None:
        recipe = dataclasses.replace(recipe, backbone=backbone, training=None)
    tuning = recipe.fine_tuning
    changes["warmup_epochs"] = min(tuning.warmup_epochs, changes.get("epochs", tuning.epochs))
    recipe = dataclasses.replace(recipe, fine_tuning=dataclasses.replace(tuning, **changes))
    if recipe.training is not None:
        recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, seed=seed))
    wanted, rates = split(methods), numbers("--keep-rate", "0.7,0.5", keep_rates, float)
    if wanted or rates:
        known = dict.fromkeys(reduction.method for reduction in recipe.reductions)
        held = dict.fromkeys(reduction.keep_rate for reduction in recipe.reductions)
        chosen = reductions(wanted or tuple(known), rates or tuple(held), **_options(recipe))  # type: ignore[arg-type]
        recipe = dataclasses.replace(recipe, reductions=chosen)
    return recipe


@study.command()
def run(
    dataset: _Dataset = "digits",
    root: _Root = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two keep rates, fewer epochs; digits only.")] = False,
    model: _Model = None,
    checkpoint: _Checkpoint = None,
    pretrained: _Pretrained = False,
    methods: Annotated[list[str] | None, typer.Option(help="Methods, like topk,tome. (default: all)")] = None,
    keep_rate: Annotated[
        list[str] | None, typer.Option(help="May be given several times. (default: 0.25, 0.5, 0.7, 0.9)")
    ] = None,
    epochs: _Epochs = None,
    batch_size: _BatchSize = None,
    jobs: Annotated[
        int | None,
        typer.Option(help="Models trained at a time. (default: one a core; with a GPU or several processes 1)"),
    ] = None,
    seed: _Seed = 0,
    cpu: _Cpu = False,
    out: _Out = Path("fastreduce-study"),
) -> None:
    """The whole study: a model of every method at every keep rate, recordings, tables, pictures, one report.

    For digits it trains the backbone first. A study that was interrupted goes on where it was. On several GPUs:
    `accelerate launch -m fastreduce.cli study run …`.
    """
    with progress_bar() as progress:
        import torch

        from .study.run import run_study

        if jobs is None:
            alone = int(os.environ.get("WORLD_SIZE", "1")) == 1  # else started by accelerate launch
            jobs = os.cpu_count() or 1 if alone and (cpu or not torch.cuda.is_available()) else 1
        with _training_errors():
            backbone = _backbone(dataset, model, checkpoint, pretrained)
            recipe = _recipe(dataset, quick, methods, keep_rate, epochs, batch_size, seed, backbone)
            found = run_study(recipe, out, root=root, jobs=jobs, cpu=cpu, progress=progress)
    if found is not None:
        _print_study(found, out)


def _print_study(found: Study, out: Path) -> None:
    from rich import box
    from rich.table import Table

    from .study.pictures import TITLES

    rates = sorted({row.keep_rate for row in found.results}, reverse=True)
    table = Table(title=f"Accuracy, %; unreduced {found.result(0).accuracy:.2f}", box=box.SIMPLE_HEAD)
    table.add_column("method")
    for rate in rates:
        table.add_column(f"{rate:g}", justify="right")
    cells = {(row.method, row.keep_rate): f"{row.accuracy:.2f}" for row in found.results}
    for method in (method for method in TITLES if any((method, rate) in cells for rate in rates)):
        table.add_row(TITLES[method], *(cells.get((method, rate), "–") for rate in rates))
    console = Console()
    console.print(table)
    for finding in found.findings:
        console.print(f"[bold]{finding.verdict}[/bold]: {finding.claim} ({finding.evidence})", highlight=False)
    console.print(f"report: {out / 'report.html'}", highlight=False, soft_wrap=True)


@study.command()
def train(
    dataset: _Dataset = "digits",
    root: _Root = None,
    model: _Model = None,
    checkpoint: _Checkpoint = None,
    pretrained: _Pretrained = False,
    method: _Method = None,
    keep_rate: _KeepRate = None,
    epochs: _Epochs = None,
    batch_size: _BatchSize = None,
    lr: Annotated[float | None, typer.Option(help="For a total batch of 1,024. (default: the protocol's)")] = None,
    seed: _Seed = 0,
    cpu: _Cpu = False,
    out: _Out = Path("fastreduce-training"),
) -> None:
    """Fine-tune one model, reduced or not, with the paper's protocol; an interrupted training goes on."""
    with progress_bar() as progress:
        from .study.data import open_data
        from .study.protocol import protocol_for
        from .study.recipe import DIGITS
        from .study.train import train as fine_tune

        with _training_errors():
            changes = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
            given = {name: value for name, value in changes.items() if value is not None}
            protocol = DIGITS.fine_tuning if dataset == "digits" else protocol_for(dataset)
            warmup = min(protocol.warmup_epochs, given.get("epochs", protocol.epochs))
            protocol = dataclasses.replace(protocol, **{**given, "warmup_epochs": warmup})  # type: ignore[arg-type]
            backbone = _backbone(dataset, model, checkpoint, pretrained)
            done = fine_tune(
                open_data(dataset, root),
                backbone,
                protocol,
                out,
                reduction=_reduction(dataset, method, keep_rate),
                cpu=cpu,
                progress=progress,
            )
    last = done.epochs[-1]
    accuracy = ", ".join(f"{name} {value:.2f} %" for name, value in last.accuracy.items())
    Console().print(f"loss {last.loss:.4f}, {accuracy}; weights: {done.weights}", highlight=False, soft_wrap=True)


def _built(
    dataset: str,
    root: Path | None,
    weights: Path,
    model: str | None,
    method: str | None,
    keep_rate: float | None,
    cpu: bool,
) -> tuple[Any, DataSet, Backbone, Reduction | None]:
    """The trained model where it is to run, the data, and what the model was made of."""
    import torch

    from .study.data import open_data
    from .study.protocol import load_trained

    reduction = _reduction(dataset, method, keep_rate)
    data, backbone = open_data(dataset, root), _backbone(dataset, model, None, False)
    built = load_trained(backbone, reduction, weights, data.num_classes)
    return built.to("cuda" if torch.cuda.is_available() and not cpu else "cpu"), data, backbone, reduction


@study.command()
def evaluate(
    weights: Annotated[Path, typer.Argument(help="What study train wrote: model.safetensors.")],
    dataset: _Dataset = "digits",
    root: _Root = None,
    model: _Model = None,
    method: _Method = None,
    keep_rate: _KeepRate = None,
    batch_size: Annotated[int, typer.Option(help="For accuracy and for speed.")] = 64,
    cpu: _Cpu = False,
) -> None:
    """Accuracy, images per second, multiply-adds and kept tokens of one model, as JSON."""
    from .study.evaluate import evaluate as judge
    from .study.protocol import protocol_for

    with user_errors():
        built, data, _, _ = _built(dataset, root, weights, model, method, keep_rate, cpu)
        found = judge(built, data, batch_size=batch_size, workers=protocol_for(dataset).workers)
    print(json.dumps(dataclasses.asdict(found), indent=1))


@study.command()
def record(
    weights: Annotated[Path, typer.Argument(help="What study train wrote: model.safetensors.")],
    out: Annotated[Path, typer.Argument(help="The file to write, .safetensors.")],
    dataset: _Dataset = "digits",
    root: _Root = None,
    model: _Model = None,
    method: _Method = None,
    keep_rate: _KeepRate = None,
    batch_size: Annotated[int, typer.Option(help="Images in a batch.")] = 64,
    cpu: _Cpu = False,
) -> None:
    """Write what one model does with every validation image: kept patches, assignments, class features."""
    from torch.utils.data import DataLoader

    from .study.protocol import protocol_for
    from .study.record import record_images

    with progress_bar() as progress, user_errors():
        built, data, backbone, reduction = _built(dataset, root, weights, model, method, keep_rate, cpu)
        found = record_images(
            built,
            DataLoader(data.val, batch_size=batch_size, num_workers=protocol_for(dataset).workers),
            out,
            dataset=dataset,
            backbone=backbone.name,
            method=None if reduction is None else reduction.variant,
            keep_rate=keep_rate,
            progress=lambda images: progress("recording", images, len(data.val)),
        )
    Console().print(f"{found.run.name}: {found.images} images, {found.run.accuracy:.2f} %: {out}", highlight=False)


@study.command()
def compare(
    recordings: Annotated[list[Path], typer.Argument(help="What study record wrote.")],
    axis: Annotated[
        str, typer.Option(help="keep_rate, backbone or method; dataset compares depth maps alone.")
    ] = "method",
    out: Annotated[
        Path, typer.Option(help="The table, .csv; correlations and that of depth maps go beside it.")
    ] = Path("comparison.csv"),
) -> None:
    """Hold recordings of the same images against one another, and the similarities against the gaps in accuracy."""
    from .study.comparison import compare as hold
    from .study.comparison import compare_depth_maps, correlate, token_statistics, write_csv
    from .study.record import open_recording

    with user_errors():
        opened = [open_recording(path) for path in recordings]
        tables = {"-depth": compare_depth_maps([token_statistics(recording) for recording in opened], axis)}
        if axis != "dataset":
            rows = hold(opened, axis)
            tables = {"": rows, "-correlations": correlate(rows, axis)} | tables
        if not any(tables.values()):
            names = ", ".join(recording.run.name for recording in opened)
            raise ValueError(f"no two of these recordings differ in {axis} alone: {names}")
        out.parent.mkdir(parents=True, exist_ok=True)
        written = {out.with_name(f"{out.stem}{ending}.csv"): table for ending, table in tables.items() if table}
        for path, table in written.items():
            write_csv(table, path)
    for path, table in written.items():
        Console().print(f"{path}: {len(table)} rows", highlight=False, soft_wrap=True)
