"""``fastreduce study …``: the paper's study, whole or in parts.

What can be said against the options is said before torch is imported, which a command does when it starts to work.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._files import write_atomically
from ..arguments import counted
from ..names import TITLES, one_of
from ..speed.settings import DTYPES
from . import study_options as given
from .options import UserError, output_file, output_folder
from .screen import Page, progress_bar, write
from .study_models import RANDOM, Published, find_published, find_trained
from .study_options import (
    changed_protocol,
    check_at_least,
    check_dataset,
    check_free,
    check_reading,
    image_size,
    make_backbone,
    make_recipe,
    make_reduction,
    make_teacher,
    with_changes,
)
from .study_running import working

if TYPE_CHECKING:
    from ..study.analysis import Study
    from ..study.evaluate import Evaluation

__all__ = ["study"]


study = typer.Typer(help="Train, record, compare and draw, as the paper does.")


@study.callback(invoke_without_command=True)
def _top(context: typer.Context) -> None:
    """Train, record, compare and draw, as the paper does."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@study.command()
@with_changes
def run(
    dataset: given.Dataset = "digits",
    root: given.Root = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two keep rates, fewer epochs; digits only.")] = False,
    model: given.Model = None,
    model_option: given.ModelOption = None,
    checkpoint: given.Checkpoint = None,
    pretrained: given.Pretrained = False,
    methods: Annotated[
        list[str] | None,
        typer.Option("--methods", "--method", help="Methods, like topk,tome. (default: all)"),
    ] = None,
    keep_rate: Annotated[
        list[str] | None, typer.Option(help="May be given several times. (default: 0.25, 0.5, 0.7, 0.9)")
    ] = None,
    capacities: Annotated[
        list[str] | None,
        typer.Option(
            help="Further backbones on which methods are repeated, pretrained, like deit_tiny_patch16_224. (default: "
            "none; for digits width-24 with the pruning methods, or none)"
        ),
    ] = None,
    backbone_epochs: Annotated[
        int | None, typer.Option(help="Of the training of the backbone itself; digits only. (default: 60; quick 24)")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(help="Models trained at a time. (default: one a core; with a GPU or several processes 1)"),
    ] = None,
    seed: given.Seed = 0,
    cpu: given.Cpu = False,
    out: given.Out = "fastreduce-study",
    *,
    changes: dict[str, Any],
    teacher: given.Teacher = None,
    teacher_checkpoint: given.TeacherCheckpoint = None,
) -> None:
    """Run the whole study: a model of every method at every keep rate, recordings, tables, pictures, one report.

    For digits it trains the backbone first; the protocol below is that of the fine-tuning after it. Results are those
    of the plain weights, not of their moving average. A study that was interrupted goes on where it was; with other
    options it needs another folder. On several GPUs: `accelerate launch -m fastreduce study run …`.
    """
    from ..study.recipe import EMBEDDED

    with working(f"; what is trained stays in {out}, and the same command goes on from there"):
        check_dataset(dataset, root)
        check_at_least(1, jobs=jobs, backbone_epochs=backbone_epochs)
        if dataset in EMBEDDED and checkpoint is None and not pretrained:
            own = [f"--model {model}"] if model is not None else [f"--model-option {one}" for one in model_option or ()]
            if own:
                raise ValueError(f"the study of {dataset} trains its own backbone; {own[0]} needs --checkpoint")
        backbone = make_backbone(dataset, model, checkpoint, pretrained, model_option)
        recipe = make_recipe(dataset, quick, methods, keep_rate, seed, backbone, backbone_epochs, changes, capacities)
        recipe = dataclasses.replace(recipe, teacher=make_teacher(teacher, teacher_checkpoint, recipe.backbone))
        folder = output_folder("--out", out)
        check_free(folder)
        with progress_bar(lines=True) as progress:
            import torch

            from ..study.run import run_study

            if jobs is None:
                alone = int(os.environ.get("WORLD_SIZE", "1")) == 1  # else started by accelerate launch
                jobs = os.cpu_count() or 1 if alone and (cpu or not torch.cuda.is_available()) else 1
            found = run_study(recipe, folder, root=root, jobs=jobs, cpu=cpu, progress=progress)
    if found is not None:
        _print_study(found, folder)


def _print(page: Page) -> None:
    """Write a page, and say in one line where that fails."""
    if (error := page.write()) is not None:
        raise UserError(f"the output cannot be written: {error.strerror}")


def _print_study(found: Study, out: Path) -> None:
    rates = sorted({row.keep_rate for row in found.results}, reverse=True)
    cells = {(row.method, row.keep_rate): f"{row.accuracy:.2f}" for row in found.results}
    rows = [
        [TITLES[method], *(cells.get((method, rate), "–") for rate in rates)]
        for method in TITLES
        if any((method, rate) in cells for rate in rates)
    ]
    page = Page(sys.stdout)
    title = f"Accuracy, %; unreduced {found.result(0).accuracy:.2f}"
    page.table(title, ["method", *(f"{rate:g}" for rate in rates)], rows)
    for finding in found.findings:
        page.line(f"{finding.verdict}: {finding.claim} ({finding.evidence})")
    if found.floors.below(found.recordings):
        page.line(found.floors.words(found.recordings))
    page.line(f"report: {out / 'report.html'}", wrap=False)
    _print(page)
    if found.unwritten:
        raise UserError(f"not written: {', '.join(found.unwritten)}; the same command tries again")


def _saying_first(line: str, progress: Callable[..., None]) -> Callable[..., None]:
    """Return the function, which before its first call says a line: nothing was wrong with what was given."""
    said: list[str] = []

    def moved(*arguments: Any) -> None:
        if not said:
            said.append(line)
            write(sys.stderr, f"{line}\n")
        progress(*arguments)

    return moved


@study.command()
@with_changes
def train(
    dataset: given.Dataset = "digits",
    root: given.Root = None,
    model: given.Model = None,
    model_option: given.ModelOption = None,
    checkpoint: given.Checkpoint = None,
    pretrained: given.Pretrained = False,
    method: given.Method = None,
    keep_rate: given.KeepRate = None,
    validate_every: Annotated[int, typer.Option(help="Epochs between validations; 0 for one at the end.")] = 1,
    checkpoint_every: Annotated[int, typer.Option(help="Epochs between checkpoints; 0 for none.")] = 1,
    seed: given.Seed = 0,
    cpu: given.Cpu = False,
    out: given.Out = "fastreduce-training",
    *,
    changes: dict[str, Any],
    teacher: given.Teacher = None,
    teacher_checkpoint: given.TeacherCheckpoint = None,
) -> None:
    """Fine-tune one model, reduced or not, with the paper's protocol; digits and cifar10 also from random weights.

    Without --checkpoint and --method these two train the backbone of their study, as its recipe says.

    An interrupted training goes on at its last checkpoint; with other options it needs another folder. Weights and
    their moving average are measured and written beside each other. On several GPUs: `accelerate launch -m
    fastreduce study train …`; in several processes on a CPU: `torchrun --nproc-per-node 2 -m fastreduce study
    train --cpu …`, since `accelerate launch --cpu` starts one unless it is given MPI's host file.
    """
    from ..study.protocol import augmentation_for, protocol_for
    from ..study.recipe import EMBEDDED

    with working(f"; the same command goes on at the last checkpoint in {out}"):
        check_dataset(dataset, root)
        check_at_least(0, validate_every=validate_every, checkpoint_every=checkpoint_every)
        check_at_least(1, epochs=changes.get("epochs"))
        backbone = make_backbone(dataset, model, checkpoint, pretrained, model_option)
        if dataset in EMBEDDED:
            fresh = method is None and not backbone.has_weights
            protocol = (fresh and EMBEDDED[dataset].training) or EMBEDDED[dataset].fine_tuning
        else:
            protocol = protocol_for(dataset)
        protocol = changed_protocol(protocol, {**changes, "seed": seed})
        if dataset not in EMBEDDED and checkpoint is None and not pretrained:
            raise ValueError(f"{dataset} needs a trained backbone: --pretrained or --checkpoint")
        reduction, by = make_reduction(dataset, method, keep_rate), make_teacher(teacher, teacher_checkpoint, backbone)
        dynamic = reduction is not None and reduction.method == "dynamicvit"
        if by is not None and protocol.distillation is None and not dynamic:
            raise ValueError("a teacher is for --distillation soft or hard, or for --method dynamicvit")
        folder = output_folder("--out", out)
        check_free(folder)
        with progress_bar(lines=True) as progress:
            if checkpoint is None and not pretrained:
                progress = _saying_first("no --checkpoint is given: the training starts from random weights", progress)
            from accelerate.state import PartialState

            from ..study.data import open_data
            from ..study.train import train as fine_tune

            size = image_size(dataset, backbone) if dataset != "digits" else None
            data = open_data(dataset, root, image_size=size, augmentation=augmentation_for(dataset, backbone))
            done = fine_tune(
                data,
                backbone,
                protocol,
                folder,
                reduction=reduction,
                teacher=None if by is None else by.teacher(data.num_classes),
                cpu=cpu,
                validate_every=validate_every,
                checkpoint_every=checkpoint_every,
                progress=progress,
            )
    if not PartialState().is_main_process:
        return
    last, parts = done.epochs[-1], [f"loss {done.epochs[-1].loss:.4f}"]
    for name, found, weights in (
        ("weights", last.accuracy, done.weights),
        ("moving average", last.ema_accuracy, done.ema_weights),
    ):
        if weights is not None:
            accuracy = ", ".join(f"{measure} {value:.2f} %" for measure, value in found.items())
            parts.append(f"{name}: {accuracy} ({weights})")
    page = Page(sys.stdout)
    page.line("; ".join(parts), wrap=False)
    _print(page)


def _print_published(found: dict[str, Evaluation], dataset: str, said: Sequence[str]) -> None:
    first = next(iter(found.values()))
    measures = list(first.accuracy)
    rows = []
    for name, one in found.items():
        accuracy = ["–" if name == RANDOM else f"{one.accuracy[measure]:.2f}" for measure in measures]
        tokens = ", ".join(f"{count:.4g}" for count in one.tokens) or "all"
        ratio = one.images_per_second / first.images_per_second
        rows.append([name, *accuracy, tokens, f"{one.gmacs:.2f}", f"{one.images_per_second:.1f}", f"{ratio:.2f}"])
    page = Page(sys.stdout)
    title = f"{dataset}, {counted(first.images, 'validation image')}; accuracy in %, patch tokens after each stage"
    page.table(title, ["model", *measures, "tokens", "10⁹ multiply-adds", "images/s", "ratio"], rows)
    for line in said:
        page.line(line)
    _print(page)


@study.command()
def evaluate(
    weights: Annotated[Path | None, typer.Argument(help=given.WEIGHTS_HELP)] = None,
    official: Annotated[
        str | None,
        typer.Option(
            help="Instead: a checkpoint published with the paper, a file or a name on the Hugging Face hub, like "
            "topk_small_patch16_224-3_6_9-_0.9. Prints a table beside the unreduced model."
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="With --official: weights of the unreduced model. (default: timm's)")
    ] = None,
    dataset: given.Known = None,
    root: given.Root = None,
    model: given.KnownModel = None,
    model_option: given.ModelOption = None,
    method: given.KnownMethod = None,
    keep_rate: given.KnownRate = None,
    ema: given.Ema = False,
    batch_size: Annotated[int, typer.Option(help="For accuracy and for speed.")] = 64,
    rounds: Annotated[int, typer.Option(help="How often a batch is timed, at least 3.")] = 10,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    workers: given.Workers = None,
    cpu: given.Cpu = False,
) -> None:
    """Measure accuracy, images per second, multiply-adds and kept tokens of one model; print JSON.

    What the weights are of is read from the training.json beside them; weights from elsewhere need the options.
    """
    with working():
        if dtype.lower() not in DTYPES:
            raise ValueError(f"--dtype must be {', '.join(DTYPES)}, got {dtype!r}")
        check_at_least(3, rounds=rounds)
        check_reading(batch_size, workers)
        if official is not None:
            own = {"WEIGHTS": weights, "model": model, "model_option": model_option, "method": method}
            published = find_published(official, checkpoint, **own, keep_rate=keep_rate, ema=ema)
            found, said = _evaluate_published(published, dataset, root, batch_size, rounds, dtype, workers, cpu)
            _print_published(found, dataset or "", said)
            return
        if weights is None or checkpoint is not None:
            what = "give WEIGHTS, or --official NAME" if weights is None else "--checkpoint goes with --official"
            raise ValueError(what)
        trained = find_trained(weights, ema, dataset, root, model, method, keep_rate, model_option)
        with progress_bar(lines=True) as progress:
            import torch

            from ..study.evaluate import evaluate as judge
            from ..study.protocol import protocol_for

            built, data = trained.build(cpu)
            progress("evaluating", 0, 1)
            workers = protocol_for(trained.dataset).workers if workers is None else workers
            built = built.to(getattr(torch, dtype.lower()))
            judged = judge(built, data, batch_size=batch_size, workers=workers, rounds=rounds)
    if (error := write(sys.stdout, json.dumps(dataclasses.asdict(judged), indent=1) + "\n")) is not None:
        raise UserError(f"the output cannot be written: {error.strerror}")


def _evaluate_published(
    published: Published,
    dataset: str | None,
    root: Path | None,
    batch_size: int,
    rounds: int,
    dtype: str,
    workers: int | None,
    cpu: bool,
) -> tuple[dict[str, Evaluation], list[str]]:
    """Evaluate a published checkpoint and the unreduced model -> what was found, and lines to say of it."""
    if dataset is None or dataset == "digits":
        raise ValueError("--official needs --dataset: imagenet, nabirds, coco, nuswide, folder or cifar10")
    check_dataset(dataset, root, ("val",))
    with progress_bar(lines=True) as progress:
        import torch

        from ..study.data import open_data
        from ..study.evaluate import evaluate_together
        from ..study.protocol import protocol_for

        data = open_data(dataset, root, image_size=224, train=False)
        models, said = published.build(dataset, data.num_classes)
        device = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
        models = {name: model.to(device, getattr(torch, dtype.lower())) for name, model in models.items()}
        workers = protocol_for(dataset).workers if workers is None else workers
        found = evaluate_together(
            models, data, batch_size=batch_size, workers=workers, rounds=rounds, progress=progress
        )  # fmt: skip
    return found, said


@study.command()
def record(
    weights: given.Weights,
    out: Annotated[str, typer.Argument(help="The file to write, .safetensors.")],
    dataset: given.Known = None,
    root: given.Root = None,
    model: given.KnownModel = None,
    model_option: given.ModelOption = None,
    method: given.KnownMethod = None,
    keep_rate: given.KnownRate = None,
    ema: given.Ema = False,
    batch_size: Annotated[int, typer.Option(help="Images in a batch.")] = 64,
    workers: given.Workers = None,
    cpu: given.Cpu = False,
) -> None:
    """Write what one model does with every validation image: kept patches, assignments, class features.

    What the weights are of is read from the training.json beside them; weights from elsewhere need the options.
    """
    with working():
        check_reading(batch_size, workers)
        trained = find_trained(weights, ema, dataset, root, model, method, keep_rate, model_option)
        file = output_file("OUT", out, [str(trained.weights)])
        with progress_bar(lines=True) as progress:
            from torch.utils.data import DataLoader

            from ..study.protocol import protocol_for
            from ..study.record import record_images

            built, data = trained.build(cpu)
            workers = protocol_for(trained.dataset).workers if workers is None else workers
            file.parent.mkdir(parents=True, exist_ok=True)
            found = record_images(
                built,
                DataLoader(data.val, batch_size=min(batch_size, len(data.val)), num_workers=workers),
                file,
                dataset=trained.dataset,
                backbone=trained.backbone.name,
                method=None if trained.reduction is None else trained.reduction.variant,
                keep_rate=trained.keep_rate,
                progress=lambda images: progress("recording", images, len(data.val)),
            )
    page = Page(sys.stdout)
    page.line(f"{found.run.name}: {counted(found.images, 'image')}, {found.run.accuracy:.2f} %: {file}", wrap=False)
    _print(page)


@study.command()
def compare(
    recordings: Annotated[list[Path], typer.Argument(help="What study record wrote.")],
    axis: Annotated[
        str, typer.Option(help="keep_rate, backbone or method; dataset compares depth maps alone.")
    ] = "method",
    out: Annotated[
        str, typer.Option(help="The table, .csv; correlations and that of depth maps go beside it.")
    ] = "comparison.csv",
) -> None:
    """Hold recordings of the same images against one another, and the similarities against the gaps in accuracy."""
    with working():
        one_of("axis", axis, _AXES)
        for path in recordings:
            if not path.is_file():
                what = "it is a folder; give a file" if path.is_dir() else "there is no such file"
                raise ValueError(f"recording {path}: {what}")
        file = output_file("--out", out, map(str, recordings))
        with progress_bar(lines=True) as progress:
            written = _written(file, _compared(recordings, axis, progress))
    page = Page(sys.stdout)
    for path, rows in written.items():
        page.line(f"{path}: {counted(rows, 'row')}", wrap=False)
    _print(page)


_AXES = ("keep_rate", "backbone", "method", "dataset")


def _compared(recordings: Sequence[Path], axis: str, progress: Callable[..., None]) -> dict[str, list[dict[str, Any]]]:
    """Return the tables that are not empty, by the ending of their name."""
    from ..study.comparison import compare as hold
    from ..study.comparison import compare_depth_maps, correlate, token_statistics
    from ..study.record import open_recording

    opened = [open_recording(path) for path in recordings]
    tables = {"-depth": compare_depth_maps([token_statistics(recording) for recording in opened], axis)}
    if axis != "dataset":
        rows = hold(opened, axis, progress=functools.partial(progress, "comparing"))
        tables = {"": rows, "-correlations": correlate(rows, axis)} | tables
    if not any(tables.values()):
        recorded = ", ".join(recording.run.name for recording in opened)
        raise ValueError(f"no two of these recordings differ in {axis} alone: {recorded}")
    return {ending: table for ending, table in tables.items() if table}


def _written(file: Path, tables: dict[str, list[dict[str, Any]]]) -> dict[Path, int]:
    """Write the tables -> their files, and the rows of each."""
    from ..study.comparison import write_csv

    file.parent.mkdir(parents=True, exist_ok=True)
    written = {}
    for ending, table in tables.items():
        path = file.with_name(f"{file.stem}{ending}.csv")
        write_atomically(path, functools.partial(write_csv, table))
        written[path] = len(table)
    return written
