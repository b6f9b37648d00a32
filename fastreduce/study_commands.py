"""``fastreduce study …``: the paper's study, whole or in parts. What it needs is imported when a command runs."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console

from .commands import UserError, numbers, progress_bar, split, user_errors
from .names import TITLES

if TYPE_CHECKING:
    from .study.data import DataSet
    from .study.protocol import Backbone, Protocol, Reduction
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
_Seed = Annotated[int, typer.Option(help="Of everything.")]
_Cpu = Annotated[bool, typer.Option("--cpu", help="Stay on the CPU.")]
_Out = Annotated[Path, typer.Option(help="Folder for what is made.")]
_Weights = Annotated[Path, typer.Argument(help="A folder that study train wrote, or a file of weights.")]
_Ema = Annotated[bool, typer.Option("--ema", help="The moving average: model_ema.safetensors of the folder.")]
_Workers = Annotated[int | None, typer.Option(help="Processes that load images. (default: the protocol's)")]

_PROTOCOL = "Protocol; by default that of the data set"
_DISTILLATION = "Distillation; DynamicViT's losses take the same teacher"
_protocol = functools.partial(typer.Option, rich_help_panel=_PROTOCOL)
_distillation = functools.partial(typer.Option, rich_help_panel=_DISTILLATION)
_Teacher = Annotated[
    str | None, _distillation(help="A timm model, with timm's weights. (default: the start of the training itself)")
]
_TeacherCheckpoint = Annotated[
    Path | None, _distillation(help="Its weights; without --teacher of a model like the student, unreduced.")
]


@dataclasses.dataclass(frozen=True)
class _Changes:
    """The options that change a protocol, under the names that its fields have; None: not given."""

    epochs: Annotated[int | None, _protocol(help="Passes over the training images.")] = None
    warmup_epochs: Annotated[
        int | None, _protocol(help="Of these, with a rising rate. (default: the protocol's share)")
    ] = None
    batch_size: Annotated[int | None, _protocol(help="Images of one process at a time.")] = None
    accumulate: Annotated[int | None, _protocol(help="Batches between updates.")] = None
    lr: Annotated[float | None, _protocol(help="Learning rate for a total batch of 1,024; scaled to it.")] = None
    min_lr: Annotated[float | None, _protocol(help="Where the cosine ends.")] = None
    warmup_lr: Annotated[float | None, _protocol(help="Where the warm-up starts.")] = None
    backbone_lr: Annotated[float | None, _protocol(help="Factor of the rate of all but the new parts.")] = None
    frozen_epochs: Annotated[int | None, _protocol(help="Epochs at the start in which it is 0.")] = None
    weight_decay: Annotated[float | None, _protocol(help="Of AdamW.")] = None
    eps: Annotated[float | None, _protocol(help="Of AdamW.")] = None
    clip_norm: Annotated[float | None, _protocol(help="Largest norm of the gradient. (default: not clipped)")] = None
    drop_path: Annotated[float | None, _protocol(help="Rate at the last block.")] = None
    label_smoothing: Annotated[float | None, _protocol(help="0 for none.")] = None
    mixup: Annotated[float | None, _protocol(help="Its alpha; 0 for none.")] = None
    cutmix: Annotated[float | None, _protocol(help="Its alpha; 0 for none.")] = None
    mixup_switch: Annotated[float | None, _protocol(help="Share of cutmix where both are on.")] = None
    repeats: Annotated[int | None, _protocol(help="Augmentations of an image in a row.")] = None
    asymmetry: Annotated[
        tuple[float, float, float] | None,
        _protocol(help="Of the asymmetric loss: gamma_neg, gamma_pos, clip; multi-label sets."),
    ] = None
    ema: Annotated[float | None, _protocol(help="Decay of the moving average of the weights; 0 for none.")] = None
    mixed_precision: Annotated[str | None, _protocol(help="no, fp16 (float32 on a CPU) or bf16.")] = None
    workers: Annotated[int | None, _protocol(help="Processes that load images.")] = None
    distillation: Annotated[
        str | None, _distillation(help="soft or hard: the teacher's scores, or its decision. (default: none)")
    ] = None
    distillation_weight: Annotated[float | None, _distillation(help="Share of the loss, 0 to 1.")] = None
    temperature: Annotated[float | None, _distillation(help="Of the soft form.")] = None
    ratio_weight: Annotated[float | None, _distillation(help="DynamicViT: of the kept share's loss.")] = None
    logit_weight: Annotated[float | None, _distillation(help="DynamicViT: of the teacher's scores.")] = None
    token_weight: Annotated[float | None, _distillation(help="DynamicViT: of the teacher's tokens.")] = None


def _with_changes(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of :class:`_Changes`, of which it gets those that were given as ``changes``."""
    hints = get_type_hints(_Changes, include_extras=True)
    own = inspect.signature(command, eval_str=True, globals=globals())
    options = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in dataclasses.fields(_Changes)
    ]

    @functools.wraps(command)
    def called(**given: Any) -> None:
        changes = {name: given.pop(name) for name in hints}
        command(**given, changes={name: value for name, value in changes.items() if value is not None})

    parameters = [new for one in own.parameters.values() for new in (options if one.name == "changes" else [one])]
    called.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {one.name: one.annotation for one in parameters}
    return called


def _changed(protocol: Protocol, changes: dict[str, Any]) -> Protocol:
    """A protocol with what was given; the warm-up keeps its share of the epochs."""
    share = protocol.warmup_epochs / protocol.epochs
    given = {"warmup_epochs": round(share * changes.get("epochs", protocol.epochs)), **changes}
    if given.get("ema") == 0:
        given["ema"] = None
    return dataclasses.replace(protocol, **given)


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
    except UserError as error:
        # Raised by a worker that loads images, it is the end of that one's traceback.
        raise UserError(str(error).rsplit("\nValueError: ", 1)[-1].strip()) from error


def _backbone(dataset: str, model: str | None, checkpoint: Path | None, pretrained: bool) -> Backbone:
    from .study.protocol import Backbone
    from .study.recipe import DIGITS

    if dataset == "digits" and model is None:
        if pretrained:
            raise ValueError("--pretrained needs --model: timm has no weights of the small model for digits")
        return dataclasses.replace(DIGITS.backbone, checkpoint=checkpoint)
    return Backbone(model or "deit_small_patch16_224", pretrained=pretrained, checkpoint=checkpoint)


def _taught_by(name: str | None, checkpoint: Path | None, student: Backbone) -> Backbone | None:
    """The teacher that was asked for."""
    if checkpoint is not None and name is None:
        return dataclasses.replace(student, pretrained=False, checkpoint=checkpoint)
    from .study.protocol import Backbone

    return None if name is None else Backbone(name, pretrained=checkpoint is None, checkpoint=checkpoint)


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
    seed: int,
    backbone: Backbone,
    backbone_epochs: int | None,
    changes: dict[str, Any],
    capacities: list[str] | None = None,
) -> Recipe:
    """The embedded one for digits, else every method from the given backbone with the paper's protocol."""
    from .study.recipe import DIGITS, DIGITS_QUICK, paper_recipe, reductions

    recipe = DIGITS_QUICK if quick else DIGITS
    further = split(capacities)
    if dataset != "digits":
        if quick:
            raise ValueError("--quick is for digits; elsewhere give --epochs")
        if not backbone.pretrained and backbone.checkpoint is None:
            raise ValueError(f"{dataset} needs a trained backbone: --pretrained or --checkpoint")
        recipe = paper_recipe(dataset, backbone.name, [name for name in further if name != "none"])
        recipe = dataclasses.replace(recipe, backbone=backbone)
    elif backbone.checkpoint is not None:
        recipe = dataclasses.replace(recipe, backbone=backbone, training=None)
    recipe = dataclasses.replace(recipe, fine_tuning=_changed(recipe.fine_tuning, {**changes, "seed": seed}))
    if recipe.training is not None:
        own = {"seed": seed} | ({} if backbone_epochs is None else {"epochs": backbone_epochs})
        recipe = dataclasses.replace(recipe, training=_changed(recipe.training, own))
    elif backbone_epochs is not None:
        raise ValueError(f"--backbone-epochs {backbone_epochs}: this backbone has its weights and is not trained")
    wanted, rates = split(methods), numbers("--keep-rate", "0.7,0.5", keep_rates, float)
    if wanted or rates:
        known = dict.fromkeys(reduction.method for reduction in recipe.reductions)
        held = dict.fromkeys(reduction.keep_rate for reduction in recipe.reductions)
        chosen = reductions(wanted or tuple(known), rates or tuple(held), **_options(recipe))  # type: ignore[arg-type]
        recipe = dataclasses.replace(recipe, reductions=chosen)
    return _with_capacities(recipe, further)


def _with_capacities(recipe: Recipe, names: tuple[str, ...]) -> Recipe:
    """The recipe with those of its further backbones that were asked for, all by default, and of its methods."""
    known = {one.name: one for one in recipe.capacities if recipe.training is not None or one.backbone.pretrained}
    if unknown := [name for name in names if name not in {*known, "none"}]:
        raise ValueError(f"unknown capacity {unknown[0]!r}; expected {', '.join([*known, 'none'])}")
    chosen = []
    for capacity in (one for name, one in known.items() if name in names or not names):
        repeated = {reduction.method for reduction in capacity.reductions}
        own = tuple(reduction for reduction in recipe.reductions if reduction.method in repeated)
        chosen += [dataclasses.replace(capacity, reductions=own)] if own else []
    return dataclasses.replace(recipe, capacities=tuple(chosen))


@study.command()
@_with_changes
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
    seed: _Seed = 0,
    cpu: _Cpu = False,
    out: _Out = Path("fastreduce-study"),
    *,
    changes: dict[str, Any],
    teacher: _Teacher = None,
    teacher_checkpoint: _TeacherCheckpoint = None,
) -> None:
    """The whole study: a model of every method at every keep rate, recordings, tables, pictures, one report.

    For digits it trains the backbone first; the protocol below is that of the fine-tuning after it. Results are those
    of the plain weights, not of their moving average. A study that was interrupted goes on where it was; with other
    options it needs another folder. On several GPUs: `accelerate launch -m fastreduce.cli study run …`.
    """
    with progress_bar() as progress:
        import torch

        from .study.run import run_study

        if jobs is None:
            alone = int(os.environ.get("WORLD_SIZE", "1")) == 1  # else started by accelerate launch
            jobs = os.cpu_count() or 1 if alone and (cpu or not torch.cuda.is_available()) else 1
        with _training_errors():
            if dataset == "digits" and model is not None and checkpoint is None:
                raise ValueError(f"the study of digits trains its own backbone; --model {model} needs --checkpoint")
            backbone = _backbone(dataset, model, checkpoint, pretrained)
            recipe = _recipe(dataset, quick, methods, keep_rate, seed, backbone, backbone_epochs, changes, capacities)
            recipe = dataclasses.replace(recipe, teacher=_taught_by(teacher, teacher_checkpoint, recipe.backbone))
            found = run_study(recipe, out, root=root, jobs=jobs, cpu=cpu, progress=progress)
    if found is not None:
        _print_study(found, out)


def _print_study(found: Study, out: Path) -> None:
    from rich import box
    from rich.table import Table

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
@_with_changes
def train(
    dataset: _Dataset = "digits",
    root: _Root = None,
    model: _Model = None,
    checkpoint: _Checkpoint = None,
    pretrained: _Pretrained = False,
    method: _Method = None,
    keep_rate: _KeepRate = None,
    validate_every: Annotated[int, typer.Option(help="Epochs between validations; 0 for one at the end.")] = 1,
    checkpoint_every: Annotated[int, typer.Option(help="Epochs between checkpoints; 0 for none.")] = 1,
    seed: _Seed = 0,
    cpu: _Cpu = False,
    out: _Out = Path("fastreduce-training"),
    *,
    changes: dict[str, Any],
    teacher: _Teacher = None,
    teacher_checkpoint: _TeacherCheckpoint = None,
) -> None:
    """Fine-tune one model, reduced or not, with the paper's protocol.

    An interrupted training goes on at its last checkpoint; with other options it needs another folder. Weights and
    their moving average are measured and written beside each other. On several GPUs: `accelerate launch -m
    fastreduce.cli study train …`; in several processes on a CPU: `torchrun --nproc-per-node 2 -m fastreduce.cli study
    train --cpu …`, since `accelerate launch --cpu` starts one unless it is given MPI's host file.
    """
    with progress_bar() as progress:
        from accelerate.state import PartialState

        from .study.data import open_data
        from .study.protocol import protocol_for
        from .study.recipe import DIGITS
        from .study.train import train as fine_tune

        with _training_errors():
            protocol = DIGITS.fine_tuning if dataset == "digits" else protocol_for(dataset)
            protocol = _changed(protocol, {**changes, "seed": seed})
            backbone = _backbone(dataset, model, checkpoint, pretrained)
            reduction, by = _reduction(dataset, method, keep_rate), _taught_by(teacher, teacher_checkpoint, backbone)
            if by is not None and protocol.distillation is None and method != "dynamicvit":
                raise ValueError("a teacher is for --distillation soft or hard, or for --method dynamicvit")
            data = open_data(dataset, root)
            done = fine_tune(
                data,
                backbone,
                protocol,
                out,
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
    Console().print("; ".join(parts), highlight=False, soft_wrap=True)


def _file(weights: Path, ema: bool) -> Path:
    """The weights of a folder, or those of the moving average in it or beside a file."""
    from .study.train import EMA_WEIGHTS, WEIGHTS

    if not ema and not weights.is_dir():
        return weights
    found = (weights if weights.is_dir() else weights.parent) / (EMA_WEIGHTS if ema else WEIGHTS)
    if not found.is_file():
        without = "; a training with --ema 0 writes none" if ema else "; has the training ended?"
        raise FileNotFoundError(f"{found} is missing{without}")
    return found


def _built(
    dataset: str,
    root: Path | None,
    weights: Path,
    ema: bool,
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
    built = load_trained(backbone, reduction, _file(weights, ema), data.num_classes)
    return built.to("cuda" if torch.cuda.is_available() and not cpu else "cpu"), data, backbone, reduction


@study.command()
def evaluate(
    weights: _Weights,
    dataset: _Dataset = "digits",
    root: _Root = None,
    model: _Model = None,
    method: _Method = None,
    keep_rate: _KeepRate = None,
    ema: _Ema = False,
    batch_size: Annotated[int, typer.Option(help="For accuracy and for speed.")] = 64,
    rounds: Annotated[int, typer.Option(help="How often a batch is timed.")] = 10,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    workers: _Workers = None,
    cpu: _Cpu = False,
) -> None:
    """Accuracy, images per second, multiply-adds and kept tokens of one model, as JSON."""
    import torch

    from .study.evaluate import evaluate as judge
    from .study.protocol import protocol_for

    with _training_errors():
        if dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"--dtype must be float32, float16 or bfloat16, got {dtype!r}")
        built, data, _, _ = _built(dataset, root, weights, ema, model, method, keep_rate, cpu)
        workers = protocol_for(dataset).workers if workers is None else workers
        found = judge(built.to(getattr(torch, dtype)), data, batch_size=batch_size, workers=workers, rounds=rounds)
    print(json.dumps(dataclasses.asdict(found), indent=1))


@study.command()
def record(
    weights: _Weights,
    out: Annotated[Path, typer.Argument(help="The file to write, .safetensors.")],
    dataset: _Dataset = "digits",
    root: _Root = None,
    model: _Model = None,
    method: _Method = None,
    keep_rate: _KeepRate = None,
    ema: _Ema = False,
    batch_size: Annotated[int, typer.Option(help="Images in a batch.")] = 64,
    workers: _Workers = None,
    cpu: _Cpu = False,
) -> None:
    """Write what one model does with every validation image: kept patches, assignments, class features."""
    from torch.utils.data import DataLoader

    from .study.protocol import protocol_for
    from .study.record import record_images

    with progress_bar() as progress, _training_errors():
        built, data, backbone, reduction = _built(dataset, root, weights, ema, model, method, keep_rate, cpu)
        workers = protocol_for(dataset).workers if workers is None else workers
        found = record_images(
            built,
            DataLoader(data.val, batch_size=batch_size, num_workers=workers),
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
