"""``fastreduce study …``: the paper's study, whole or in parts.

What can be said against the options is said before torch is imported, which a command does when it starts to work.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from .._files import check_weights_file, one_line, read_json, write_atomically
from ..names import TITLES, one_of
from ..speed.settings import DTYPES, check_model
from .options import UserError, names, numbers, output_file, output_folder, user_errors
from .screen import Page, progress_bar, write

if TYPE_CHECKING:
    from ..study.analysis import Study
    from ..study.data import DataSet
    from ..study.evaluate import Evaluation
    from ..study.official import Official
    from ..study.protocol import Backbone, Protocol, Reduction
    from ..study.recipe import Recipe

__all__ = ["study"]

_EXTRA = {"accelerate": "accelerate", "scipy": "scipy", "ot": "POT", "jinja2": "jinja2"}
_BACKENDS = ("auto", "triton", "reference")

study = typer.Typer(help="Train, record, compare and draw, as the paper does.")


@study.callback(invoke_without_command=True)
def _top(context: typer.Context) -> None:
    """Train, record, compare and draw, as the paper does."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # somebody put None into sys.modules
        return False


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


def _terminate(*_: Any) -> None:
    raise _Terminated


@contextmanager
def _stops_in_one_line(stays: str) -> Iterator[None]:
    """Answer Ctrl-C and SIGTERM with one line that says what stays.

    Processes that ``accelerate launch`` started die of SIGTERM at once: an exception would not get them out of a
    collective operation.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 and threading.current_thread() is threading.main_thread()
    # A shell that starts a command in the background of a script has it ignore SIGINT, which may be meant for it alone.
    handlers: dict[int, Any] = {signal.SIGTERM: _terminate, signal.SIGINT: signal.default_int_handler} if alone else {}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    except KeyboardInterrupt as error:
        write(sys.stderr, f"stopped{stays}\n")
        raise typer.Exit(143 if isinstance(error, _Terminated) else 130) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _working(stays: str = "") -> Iterator[None]:
    """Turn errors into a one-line message, and refuse to work without the packages of the extra.

    Args:
        stays: what to say of the files when the command is stopped.
    """
    if missing := [package for name, package in _EXTRA.items() if not _is_there(name)]:
        raise UserError(f'{", ".join(missing)} missing; pip install "fastreduce[study]"')
    given = os.environ.get("FASTREDUCE_BACKEND", "auto")
    if given not in _BACKENDS:
        raise UserError(f"FASTREDUCE_BACKEND={given!r}; expected one of {', '.join(map(repr, _BACKENDS))}")
    with _stops_in_one_line(stays), _training_errors():
        yield


_Dataset = Annotated[str, typer.Option(help="digits, imagenet, nabirds, coco, nuswide, folder or cifar10.")]
_Root = Annotated[Path | None, typer.Option(help="Folder of the data set; none for digits.")]
_Model = Annotated[
    str | None, typer.Option(help="A timm Vision Transformer. (default: DeiT-S; a small one for digits)")
]
_ModelOption = Annotated[
    list[str] | None, typer.Option(help="Of timm.create_model, like img_size=32. May be given several times.")
]
_Checkpoint = Annotated[Path | None, typer.Option(help="Weights of the unreduced model to start from.")]
_Pretrained = Annotated[bool, typer.Option("--pretrained", help="Let timm download them.")]
_Method = Annotated[str | None, typer.Option(help="The method; radial-l1 for a norm. (default: none)")]
_KeepRate = Annotated[float | None, typer.Option(help="Its keep rate.")]
_Seed = Annotated[int, typer.Option(help="Of everything, 0 to 2^63 - 1.")]
_Cpu = Annotated[bool, typer.Option("--cpu", help="Stay on the CPU.")]
_Out = Annotated[str, typer.Option(help="Folder for what is made.")]
_Known = Annotated[str | None, typer.Option("--dataset", help="The data set. (default: that of the training)")]
_KnownModel = Annotated[
    str | None, typer.Option("--model", help="The unreduced model. (default: that of the training)")
]
_KnownMethod = Annotated[
    str | None, typer.Option("--method", help="The method, or none. (default: that of the training)")
]
_KnownRate = Annotated[float | None, typer.Option("--keep-rate", help="Its keep rate. (default: that of the training)")]
_WEIGHTS_HELP = "A folder that study train wrote, or a file of weights."
_Weights = Annotated[Path, typer.Argument(help=_WEIGHTS_HELP)]
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

    epochs: Annotated[
        int | None, _protocol(help="Passes over the training images; study run: 0 measures methods off the shelf.")
    ] = None
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
    optimizer: Annotated[str | None, _protocol(help="adamw or muon.")] = None
    weight_decay: Annotated[float | None, _protocol(help="Of the optimizer.")] = None
    eps: Annotated[float | None, _protocol(help="Of AdamW.")] = None
    clip_norm: Annotated[float | None, _protocol(help="Largest norm of the gradient. (default: not clipped)")] = None
    drop_path: Annotated[float | None, _protocol(help="Rate at the last block.")] = None
    patch_drop: Annotated[float | None, _protocol(help="Share of patches lost at random, unreduced.")] = None
    patch_drop_share: Annotated[float | None, _protocol(help="Share of the epochs that lose them.")] = None
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
    """Return the command with the options of :class:`_Changes`; it gets those that were given as ``changes``."""
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
    """Return a protocol with what was given; the warm-up keeps its share of the epochs."""
    share = protocol.warmup_epochs / max(protocol.epochs, 1)
    given = {"warmup_epochs": round(share * changes.get("epochs", protocol.epochs)), **changes}
    if given.get("ema") == 0:
        given["ema"] = None
    return dataclasses.replace(protocol, **given)


@contextmanager
def _training_errors() -> Iterator[None]:
    """Turn users' errors, a loss that is not finite and a lack of memory into one line."""
    try:
        with user_errors():
            yield
    except UserError as error:
        # Raised by a worker that loads images, it is the end of that one's traceback.
        raise UserError(str(error).rsplit("\nValueError: ", 1)[-1].strip()) from error
    except (ArithmeticError, MemoryError, RuntimeError) as error:
        if (message := _trouble(error)) is None:
            raise
        raise UserError(message) from error


def _trouble(error: Exception) -> str | None:
    """Return what to say of an error that is no mistake in the code."""
    from ..study._workers import WorkerLost

    text = str(error)
    if isinstance(error, (FloatingPointError, WorkerLost)):
        return text
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text or type(error).__name__ == "OutOfMemoryError":
        return f"there is too little memory; a smaller --batch-size needs less ({text.splitlines()[0] if text else ''})"
    if text.startswith("DataLoader worker"):
        return f"a process that loads images was killed; fewer --workers need less memory ({text.splitlines()[0]})"
    return None


def _check_dataset(dataset: str, root: Path | None, splits: Sequence[str] = ("train", "val")) -> None:
    """Raise for an unknown data set, and for a folder that cannot hold it, or these splits of class folders."""
    from ..study.protocol import DATA_SETS, LAYOUTS, find_split

    one_of("data set", dataset, DATA_SETS)
    if dataset == "digits":
        if root is not None:
            raise ValueError(f"digits comes with scikit-learn and has no folder: leave --root {root} out")
        return
    if root is None:
        raise ValueError(f"{dataset} needs --root, the folder that it is in")
    if not root.is_dir():
        raise ValueError(
            f"--root {root}: {'it is a file, not a folder' if root.exists() else 'there is no such folder'}"
        )
    for name in splits if dataset == "imagenet" else LAYOUTS[dataset]:
        if not (root / name).exists():
            raise ValueError(f"--root {root} is not the folder of {dataset}: it has no {name}")
    for split in splits if not LAYOUTS[dataset] else ():
        try:
            find_split(root, split)
        except FileNotFoundError as error:
            raise ValueError(f"--root {root} is not a folder of class folders: {error}") from error


def _check_files(**given: Path | None) -> None:
    """Raise for a file of weights that is not there, or is something else."""
    for option, path in given.items():
        if path is not None:
            _check_weights(f"--{option.replace('_', '-')}", path)


def _check_weights(option: str, path: Path) -> None:
    try:
        check_weights_file(path)
    except OSError as error:
        raise ValueError(f"{option} {path}: {(error.strerror or str(error)).lower()}") from error


def _check_free(out: Path) -> None:
    """Raise if another process works in the folder. Of several that share a training, the first one asks."""
    from ..study._lock import find_holder

    if os.environ.get("RANK", "0") == "0" and (holder := find_holder(out)) is not None:
        raise ValueError(f"{out} is in use by {holder}: wait for it, or give another --out")


def _at_least(least: int, **given: int | None) -> None:
    for option, value in given.items():
        if value is not None and not least <= value < 2**31:
            wanted = f"at least {least}" if value < least else f"below {2**31}"
            raise ValueError(f"--{option.replace('_', '-')} must be {wanted}, got {value}")


def _model_options(words: list[str] | None) -> dict[str, Any]:
    """Read ``img_size=32`` and the like."""
    options: dict[str, Any] = {}
    for word in words or ():
        name, sign, text = (part.strip() for part in word.partition("="))
        if not sign or not name.isidentifier() or not text:
            raise ValueError(f"--model-option takes option=value, like img_size=32, got {word!r}")
        if name in ("num_classes", "pretrained", "drop_path_rate"):
            raise ValueError(f"--model-option {word!r} cannot be given: the study sets {name} itself")
        try:
            options[name] = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            options[name] = text
    return options


def _backbone(
    dataset: str,
    model: str | None,
    checkpoint: Path | None,
    pretrained: bool,
    options: list[str] | None = None,
) -> Backbone:
    from ..study.protocol import Backbone
    from ..study.recipe import EMBEDDED

    _check_files(checkpoint=checkpoint)
    given = _model_options(options)
    if dataset in EMBEDDED and model is None:
        if pretrained:
            raise ValueError(f"--pretrained needs --model: timm has no weights of the small model for {dataset}")
        own = EMBEDDED[dataset].backbone
        return dataclasses.replace(own, checkpoint=checkpoint, options={**own.options, **given})
    if pretrained and checkpoint is not None:
        raise ValueError(f"--pretrained and --checkpoint {checkpoint} exclude each other")
    name = model or "deit_small_patch16_224"
    check_model(name, pretrained)
    return Backbone(name, given, pretrained=pretrained, checkpoint=checkpoint)


def _taught_by(name: str | None, checkpoint: Path | None, student: Backbone) -> Backbone | None:
    """Return the teacher that was asked for."""
    _check_files(teacher_checkpoint=checkpoint)
    if checkpoint is not None and name is None:
        return dataclasses.replace(student, pretrained=False, checkpoint=checkpoint)
    from ..study.protocol import Backbone

    if name is None:
        return None
    check_model(name, checkpoint is None)
    return Backbone(name, pretrained=checkpoint is None, checkpoint=checkpoint)


def _method_name(name: str) -> str:
    """Return the study's name of a method, ``radial-l1``, for one in any case."""
    return name.strip().lower().replace("_", "-")


def _reduction(dataset: str, method: str | None, keep_rate: float | None) -> Reduction | None:
    """Return the reduction as the study of the data set has it; None for the unreduced model."""
    from ..study.recipe import EMBEDDED, reductions

    name = None if method is None or _method_name(method) == "none" else _method_name(method)
    if (name is None) != (keep_rate is None):
        given = f"--keep-rate {keep_rate}" if name is None else f"--method {method}"
        raise ValueError(f"--method and --keep-rate go together, got {given} alone")
    if name is None or keep_rate is None:
        return None
    return reductions([name], [keep_rate], **(_options(EMBEDDED[dataset]) if dataset in EMBEDDED else {}))[0]


def _options(recipe: Recipe) -> dict[str, Any]:
    """Return what the recipe sets for each of its methods at every keep rate."""
    held: dict[str, list[dict[str, Any]]] = {}
    for reduction in recipe.reductions:
        held.setdefault(reduction.method, []).append(dict(reduction.options))
    return {
        method: {name: value for name, value in own[0].items() if all(one.get(name) == value for one in own)}
        for method, own in held.items()
    }


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
    """Return the embedded one for digits, else every method from the given backbone with the paper's protocol."""
    from ..study.recipe import DIGITS_QUICK, EMBEDDED, paper_recipe, reductions

    if quick and dataset != "digits":
        raise ValueError("--quick is for digits; elsewhere give --epochs")
    recipe = DIGITS_QUICK if quick else EMBEDDED.get(dataset, EMBEDDED["digits"])
    further = names("--capacities", capacities)
    if dataset not in EMBEDDED:
        if not backbone.pretrained and backbone.checkpoint is None:
            raise ValueError(f"{dataset} needs a trained backbone: --pretrained or --checkpoint")
        for name in further:
            if name != "none":
                check_model(name, True)
        recipe = paper_recipe(dataset, backbone.name, [name for name in further if name != "none"])
        recipe = dataclasses.replace(recipe, backbone=backbone, image_size=_image_size(dataset, backbone))
    elif backbone.checkpoint is not None:
        # Further backbones are trained only where they are asked for.
        training = recipe.training if {*further} - {"none"} else None
        recipe = dataclasses.replace(recipe, backbone=backbone, training=training)
    recipe = dataclasses.replace(recipe, fine_tuning=_changed(recipe.fine_tuning, {**changes, "seed": seed}))
    if recipe.training is not None:
        own = {"seed": seed} | ({} if backbone_epochs is None else {"epochs": backbone_epochs})
        recipe = dataclasses.replace(recipe, training=_changed(recipe.training, own))
    elif backbone_epochs is not None:
        raise ValueError(f"--backbone-epochs {backbone_epochs}: this backbone has its weights and is not trained")
    wanted = tuple(dict.fromkeys(map(_method_name, names("--methods", methods))))
    rates = numbers("--keep-rate", "0.7,0.5", keep_rates, float)
    rates = None if rates is None else tuple(dict.fromkeys(rates))
    if wanted or rates:
        known = dict.fromkeys(reduction.method for reduction in recipe.reductions)
        held = dict.fromkeys(reduction.keep_rate for reduction in recipe.reductions)
        chosen = reductions(wanted or tuple(known), rates or tuple(held), **_options(recipe))  # type: ignore[arg-type]
        recipe = dataclasses.replace(recipe, reductions=chosen)
    recipe = _with_capacities(recipe, further)
    return recipe if recipe.fine_tuning.epochs else _off_the_shelf(recipe, wanted)


def _off_the_shelf(recipe: Recipe, wanted: tuple[str, ...]) -> Recipe:
    """Return the recipe without training; ValueError for a method that was asked for and has layers to train."""
    from ..study.recipe import without_training

    found = without_training(recipe)
    known = {reduction.method for reduction in found.reductions}
    if unfit := [name for name in wanted if name.partition("-")[0] not in known]:
        raise ValueError(f"--epochs 0 leaves nothing trained, and {unfit[0]} has layers to train")
    return found


def _image_size(dataset: str, backbone: Backbone) -> int:
    """Return the side of the images that the model takes: that of the data set, unless the model's was given."""
    size = backbone.options.get("img_size", 32 if dataset == "cifar10" else 224)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"--model-option img_size must be a positive number of pixels, got {size!r}")
    return size


def _with_capacities(recipe: Recipe, wanted: tuple[str, ...]) -> Recipe:
    """Return the recipe with those of its further backbones that were asked for, all by default, and of its methods."""
    known = {one.name: one for one in recipe.capacities if recipe.training is not None or one.backbone.pretrained}
    if unknown := [name for name in wanted if name not in {*known, "none"}]:
        raise ValueError(f"unknown capacity {unknown[0]!r}; expected {', '.join([*known, 'none'])}")
    chosen = []
    for capacity in (one for name, one in known.items() if name in wanted or not wanted):
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
    model_option: _ModelOption = None,
    checkpoint: _Checkpoint = None,
    pretrained: _Pretrained = False,
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
    seed: _Seed = 0,
    cpu: _Cpu = False,
    out: _Out = "fastreduce-study",
    *,
    changes: dict[str, Any],
    teacher: _Teacher = None,
    teacher_checkpoint: _TeacherCheckpoint = None,
) -> None:
    """Run the whole study: a model of every method at every keep rate, recordings, tables, pictures, one report.

    For digits it trains the backbone first; the protocol below is that of the fine-tuning after it. Results are those
    of the plain weights, not of their moving average. A study that was interrupted goes on where it was; with other
    options it needs another folder. On several GPUs: `accelerate launch -m fastreduce.cli study run …`.
    """
    from ..study.recipe import EMBEDDED

    with _working(f"; what is trained stays in {out}, and the same command goes on from there"):
        _check_dataset(dataset, root)
        _at_least(1, jobs=jobs, backbone_epochs=backbone_epochs)
        if dataset in EMBEDDED and checkpoint is None and not pretrained:
            own = [f"--model {model}"] if model is not None else [f"--model-option {one}" for one in model_option or ()]
            if own:
                raise ValueError(f"the study of {dataset} trains its own backbone; {own[0]} needs --checkpoint")
        backbone = _backbone(dataset, model, checkpoint, pretrained, model_option)
        recipe = _recipe(dataset, quick, methods, keep_rate, seed, backbone, backbone_epochs, changes, capacities)
        recipe = dataclasses.replace(recipe, teacher=_taught_by(teacher, teacher_checkpoint, recipe.backbone))
        folder = output_folder("--out", out)
        _check_free(folder)
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
@_with_changes
def train(
    dataset: _Dataset = "digits",
    root: _Root = None,
    model: _Model = None,
    model_option: _ModelOption = None,
    checkpoint: _Checkpoint = None,
    pretrained: _Pretrained = False,
    method: _Method = None,
    keep_rate: _KeepRate = None,
    validate_every: Annotated[int, typer.Option(help="Epochs between validations; 0 for one at the end.")] = 1,
    checkpoint_every: Annotated[int, typer.Option(help="Epochs between checkpoints; 0 for none.")] = 1,
    seed: _Seed = 0,
    cpu: _Cpu = False,
    out: _Out = "fastreduce-training",
    *,
    changes: dict[str, Any],
    teacher: _Teacher = None,
    teacher_checkpoint: _TeacherCheckpoint = None,
) -> None:
    """Fine-tune one model, reduced or not, with the paper's protocol; digits and cifar10 also from random weights.

    Without --checkpoint and --method these two train the backbone of their study, as its recipe says.

    An interrupted training goes on at its last checkpoint; with other options it needs another folder. Weights and
    their moving average are measured and written beside each other. On several GPUs: `accelerate launch -m
    fastreduce.cli study train …`; in several processes on a CPU: `torchrun --nproc-per-node 2 -m fastreduce.cli study
    train --cpu …`, since `accelerate launch --cpu` starts one unless it is given MPI's host file.
    """
    from ..study.protocol import protocol_for
    from ..study.recipe import EMBEDDED

    with _working(f"; the same command goes on at the last checkpoint in {out}"):
        _check_dataset(dataset, root)
        _at_least(0, validate_every=validate_every, checkpoint_every=checkpoint_every)
        _at_least(1, epochs=changes.get("epochs"))
        backbone = _backbone(dataset, model, checkpoint, pretrained, model_option)
        if dataset in EMBEDDED:
            fresh = method is None and not backbone.has_weights
            protocol = (fresh and EMBEDDED[dataset].training) or EMBEDDED[dataset].fine_tuning
        else:
            protocol = protocol_for(dataset)
        protocol = _changed(protocol, {**changes, "seed": seed})
        if dataset not in EMBEDDED and checkpoint is None and not pretrained:
            raise ValueError(f"{dataset} needs a trained backbone: --pretrained or --checkpoint")
        reduction, by = _reduction(dataset, method, keep_rate), _taught_by(teacher, teacher_checkpoint, backbone)
        dynamic = reduction is not None and reduction.method == "dynamicvit"
        if by is not None and protocol.distillation is None and not dynamic:
            raise ValueError("a teacher is for --distillation soft or hard, or for --method dynamicvit")
        folder = output_folder("--out", out)
        _check_free(folder)
        with progress_bar(lines=True) as progress:
            if checkpoint is None and not pretrained:
                progress = _saying_first("no --checkpoint is given: the training starts from random weights", progress)
            from accelerate.state import PartialState

            from ..study.data import open_data
            from ..study.train import train as fine_tune

            data = open_data(dataset, root, image_size=_image_size(dataset, backbone) if dataset != "digits" else None)
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


@dataclasses.dataclass(frozen=True)
class _Trained:
    """Weights, and what they are of.

    Attributes:
        weights: the file.
        dataset: its name; ``root``: its folder.
        backbone: of the model; ``reduction``: of it, or None.
        image_size, augmentation: None for the data set's own.
        classes: how many the training had, None where it is not known.
        source: what says all this, for messages.
    """

    weights: Path
    dataset: str
    root: Path | None
    backbone: Backbone
    reduction: Reduction | None
    image_size: int | None = None
    augmentation: Any = None
    classes: int | None = None
    source: str = ""

    @property
    def keep_rate(self) -> float | None:
        """That of the first stage."""
        rate = None if self.reduction is None else self.reduction.keep_rate
        return rate[0] if isinstance(rate, tuple) else rate

    def build(self, cpu: bool) -> tuple[Any, DataSet]:
        """Return the model, where it is to run, and the data."""
        import torch

        from ..study.data import open_data
        from ..study.protocol import load_trained

        size, how = self.image_size, self.augmentation
        data = open_data(self.dataset, self.root, image_size=size, augmentation=how, train=False)
        if self.classes not in (None, data.num_classes):
            raise ValueError(f"--root {self.root} has {data.num_classes} classes, {self.source} says {self.classes}")
        built = load_trained(self.backbone, self.reduction, self.weights, data.num_classes)
        return built.to("cuda" if torch.cuda.is_available() and not cpu else "cpu"), data


def _file(weights: Path, ema: bool) -> Path:
    """Return the weights of a folder, or those of the moving average in it or beside a file."""
    from ..study.protocol import EMA_WEIGHTS, WEIGHTS

    if not weights.exists():
        raise ValueError(f"{weights} is neither a file of weights nor a folder of study train: there is no such path")
    if not ema and not weights.is_dir():
        _check_weights("weights", weights)
        return weights
    found = (weights if weights.is_dir() else weights.parent) / (EMA_WEIGHTS if ema else WEIGHTS)
    if not found.is_file():
        without = "; a training with --ema 0 writes none" if ema else "; has the training ended?"
        raise ValueError(f"{found} is missing{without}")
    _check_weights("weights", found)
    return found


def _trained(
    weights: Path,
    ema: bool,
    dataset: str | None,
    root: Path | None,
    model: str | None,
    method: str | None,
    keep_rate: float | None,
    model_option: list[str] | None = None,
) -> _Trained:
    """Return what the weights are of: what their training wrote beside them, and else what was given.

    Raises:
        ValueError: options that contradict the training; without its history options that are missing.
    """
    from ..study.protocol import EMA_WEIGHTS, HISTORY, WEIGHTS
    from ..study.recipe import EMBEDDED

    if dataset is not None:
        from ..study.protocol import DATA_SETS

        one_of("data set", dataset, DATA_SETS)
    file = _file(weights, ema)
    history = file.with_name(HISTORY)
    if file.name in (WEIGHTS, EMA_WEIGHTS) and history.is_file():
        held = _read_training(file, history, root)
        method = None if method is None else _method_name(method)
        named = "none" if held.reduction is None else _study_name(held.reduction)
        rate = None if held.reduction is None else held.reduction.keep_rate
        _agree(history, dataset=(dataset, held.dataset), model=(model, held.backbone.name))
        for name, value in _model_options(model_option).items():
            if (known := held.backbone.options.get(name)) != value:
                says = f"{name}={known}" if name in held.backbone.options else f"nothing of {name}"
                raise ValueError(
                    f"--model-option {name}={value} contradicts {history}, which says {says}; leave the option out"
                )
        _agree(history, method=("radial-l2" if method == "radial" else method, named), keep_rate=(keep_rate, rate))
        _check_dataset(held.dataset, root, ("val",))
        return held
    needed = {"--dataset": dataset, "--method (or --method none)": method}
    if dataset not in (None, *EMBEDDED):
        needed["--model"] = model
    if missing := [option for option, given in needed.items() if given is None]:
        raise ValueError(f"nothing is known of {file}, which has no {HISTORY} beside it: give {', '.join(missing)}")
    assert dataset is not None
    _check_dataset(dataset, root, ("val",))
    backbone = _backbone(dataset, model, None, False, model_option)
    reduction, size = _reduction(dataset, method, keep_rate), None
    if dataset != "digits":
        size = _image_size(dataset, backbone)
    return _Trained(file, dataset, root, backbone, reduction, size)


def _study_name(reduction: Reduction) -> str:
    norm = reduction.options.get("norm")
    return reduction.method if norm is None else f"{reduction.method}-{norm}"


def _agree(history: Path, **pairs: tuple[Any, Any]) -> None:
    """Raise for an option that says something else than the training."""
    for option, (given, held) in pairs.items():
        if given is not None and given != held:
            named, known = f"--{option.replace('_', '-')} {given}", "no keep rate" if held is None else held
            raise ValueError(f"{named} contradicts {history}, which says {known}; leave the option out")


def _read_training(file: Path, history: Path, root: Path | None) -> _Trained:
    """Return what a training wrote of itself.

    Raises:
        ValueError: a file that no training wrote.
    """
    from ..study.protocol import DATA_SETS, Backbone, Reduction

    try:
        held = read_json(history)["description"]
        data, start, reduced = held["data"], held["backbone"], held["reduction"]
        one_of("data set", data["name"], DATA_SETS)
        size, classes = int(data["image_size"]), int(data["classes"])
        augmentation = _augmentation(data["name"], data.get("augmentation"), history)
        backbone = Backbone(str(start["name"]), dict(start["options"]))
        reduction = None
        if reduced is not None:
            rate, at = reduced["keep_rate"], reduced["at"]
            rate = tuple(map(float, rate)) if isinstance(rate, list) else None if rate is None else float(rate)
            at = None if at is None else tuple(map(int, at))
            reduction = Reduction(str(reduced["method"]), rate, at, dict(reduced["options"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{history} is not the history of a training: {why}") from error
    return _Trained(file, data["name"], root, backbone, reduction, size, augmentation, classes, str(history))


def _augmentation(dataset: str, held: Any, history: Path) -> Any:
    """Return how a training augmented and normalised its images, from its history; None where that does not say."""
    from ..study.protocol import Augmentation, Crops

    if dataset == "digits" or held is None:
        return None
    kind = Crops if isinstance(held, dict) and "padding" in held else Augmentation
    held = {name: tuple(value) if isinstance(value, list) else value for name, value in dict(held).items()}
    return kind(**held)


def _check_reading(batch_size: int, workers: int | None) -> None:
    _at_least(1, batch_size=batch_size)
    _at_least(0, workers=workers)


@dataclasses.dataclass(frozen=True)
class _Published:
    """A checkpoint that was published with the paper, with the unreduced model to hold it against.

    Attributes:
        model: what its name says.
        weights: its file; None to ask the hub for ``name``.
        unreduced: weights of the unreduced model; None for timm's.
    """

    name: str
    model: Official
    weights: Path | None
    unreduced: Path | None

    def build(self, dataset: str, num_classes: int) -> tuple[dict[str, Any], list[str]]:
        """Return the models, the unreduced one first, and lines to say of them."""
        from ..study.official import build, find_on_hub, parse_name

        file, model, said = self.weights, self.model, []
        if file is None:
            file, place = find_on_hub(self.name, dataset)
            model, said = parse_name(place), [f"weights: {place}"]
        models = {model.label: build(model, file, num_classes)}
        if model.reduction is None:
            return models, said
        backbone = dataclasses.replace(model.backbone, checkpoint=self.unreduced, pretrained=self.unreduced is None)
        try:
            if not backbone.knows(num_classes):
                raise ValueError(f"{backbone.name} has no head for {num_classes} classes")
            unreduced = backbone.build(num_classes)
        except Exception as error:
            if self.unreduced is not None:
                raise
            said.append(
                f"the unreduced model has random weights, and only its speed counts: timm's weights cannot be had "
                f"({one_line(error)}); --checkpoint gives others"
            )
            unreduced = dataclasses.replace(model.backbone).build(num_classes)
            return {_RANDOM: unreduced, **models}, said
        return {"unreduced": unreduced, **models}, said


_RANDOM = "unreduced (random weights)"


def _published(name: str, checkpoint: Path | None, **contradicting: Any) -> _Published:
    """Return the checkpoint of a name, which may be that of a file; ValueError for options that its name settles."""
    from ..study.official import parse_name

    if given := [option for option, value in contradicting.items() if value]:
        raise ValueError(f"--official {name} says it all: leave --{given[0].replace('_', '-')} out")
    _check_files(checkpoint=checkpoint)
    file = Path(name) if Path(name).exists() else None
    if file is not None:
        _check_weights("--official", file)
    return _Published(name, parse_name(name), file, checkpoint)


def _print_published(found: dict[str, Evaluation], dataset: str, said: Sequence[str]) -> None:
    first = next(iter(found.values()))
    measures = list(first.accuracy)
    rows = []
    for name, one in found.items():
        accuracy = ["–" if name == _RANDOM else f"{one.accuracy[measure]:.2f}" for measure in measures]
        tokens = ", ".join(f"{count:.4g}" for count in one.tokens) or "all"
        ratio = one.images_per_second / first.images_per_second
        rows.append([name, *accuracy, tokens, f"{one.gmacs:.2f}", f"{one.images_per_second:.1f}", f"{ratio:.2f}"])
    page = Page(sys.stdout)
    title = f"{dataset}, {first.images} validation images; accuracy in %, patch tokens after each stage"
    page.table(title, ["model", *measures, "tokens", "10⁹ multiply-adds", "images/s", "ratio"], rows)
    for line in said:
        page.line(line)
    _print(page)


@study.command()
def evaluate(
    weights: Annotated[Path | None, typer.Argument(help=_WEIGHTS_HELP)] = None,
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
    dataset: _Known = None,
    root: _Root = None,
    model: _KnownModel = None,
    model_option: _ModelOption = None,
    method: _KnownMethod = None,
    keep_rate: _KnownRate = None,
    ema: _Ema = False,
    batch_size: Annotated[int, typer.Option(help="For accuracy and for speed.")] = 64,
    rounds: Annotated[int, typer.Option(help="How often a batch is timed, at least 3.")] = 10,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    workers: _Workers = None,
    cpu: _Cpu = False,
) -> None:
    """Measure accuracy, images per second, multiply-adds and kept tokens of one model; print JSON.

    What the weights are of is read from the training.json beside them; weights from elsewhere need the options.
    """
    with _working():
        if dtype.lower() not in DTYPES:
            raise ValueError(f"--dtype must be {', '.join(DTYPES)}, got {dtype!r}")
        _at_least(3, rounds=rounds)
        _check_reading(batch_size, workers)
        if official is not None:
            own = {"WEIGHTS": weights, "model": model, "model_option": model_option, "method": method}
            published = _published(official, checkpoint, **own, keep_rate=keep_rate, ema=ema)
            found, said = _evaluate_published(published, dataset, root, batch_size, rounds, dtype, workers, cpu)
            _print_published(found, dataset or "", said)
            return
        if weights is None or checkpoint is not None:
            what = "give WEIGHTS, or --official NAME" if weights is None else "--checkpoint goes with --official"
            raise ValueError(what)
        trained = _trained(weights, ema, dataset, root, model, method, keep_rate, model_option)
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
    published: _Published,
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
    _check_dataset(dataset, root, ("val",))
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
    weights: _Weights,
    out: Annotated[str, typer.Argument(help="The file to write, .safetensors.")],
    dataset: _Known = None,
    root: _Root = None,
    model: _KnownModel = None,
    model_option: _ModelOption = None,
    method: _KnownMethod = None,
    keep_rate: _KnownRate = None,
    ema: _Ema = False,
    batch_size: Annotated[int, typer.Option(help="Images in a batch.")] = 64,
    workers: _Workers = None,
    cpu: _Cpu = False,
) -> None:
    """Write what one model does with every validation image: kept patches, assignments, class features.

    What the weights are of is read from the training.json beside them; weights from elsewhere need the options.
    """
    with _working():
        _check_reading(batch_size, workers)
        trained = _trained(weights, ema, dataset, root, model, method, keep_rate, model_option)
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
    page.line(f"{found.run.name}: {found.images} images, {found.run.accuracy:.2f} %: {file}", wrap=False)
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
    with _working():
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
        page.line(f"{path}: {rows} rows", wrap=False)
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
