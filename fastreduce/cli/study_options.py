"""Options of the commands of the study, and the protocol, backbone and recipe that they name."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from .._files import check_weights_file
from ..names import one_of
from ..speed.settings import check_model
from .options import names, numbers

if TYPE_CHECKING:
    from ..study.protocol import Backbone, Protocol, Reduction
    from ..study.recipe import Recipe


__all__ = [
    "Changes",
    "Checkpoint",
    "Cpu",
    "Dataset",
    "Ema",
    "KeepRate",
    "Known",
    "KnownMethod",
    "KnownModel",
    "KnownRate",
    "Method",
    "Model",
    "ModelOption",
    "Out",
    "Pretrained",
    "Root",
    "Seed",
    "Teacher",
    "TeacherCheckpoint",
    "Weights",
    "Workers",
    "changed_protocol",
    "check_at_least",
    "check_dataset",
    "check_files",
    "check_free",
    "check_method",
    "check_reading",
    "check_weights",
    "image_size",
    "make_backbone",
    "make_recipe",
    "make_reduction",
    "make_teacher",
    "parse_model_options",
    "recipe_options",
    "with_changes",
]

_BACKENDS = ("auto", "triton", "reference")

Dataset = Annotated[str, typer.Option(help="digits, imagenet, nabirds, coco, nuswide, folder or cifar10.")]
Root = Annotated[Path | None, typer.Option(help="Folder of the data set; none for digits.")]
Model = Annotated[str | None, typer.Option(help="A timm Vision Transformer. (default: DeiT-S; a small one for digits)")]
ModelOption = Annotated[
    list[str] | None, typer.Option(help="Of timm.create_model, like img_size=32. May be given several times.")
]
Checkpoint = Annotated[Path | None, typer.Option(help="Weights of the unreduced model to start from.")]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Let timm download them.")]
Method = Annotated[str | None, typer.Option(help="The method; radial-l1 for a norm. (default: none)")]
KeepRate = Annotated[float | None, typer.Option(help="Its keep rate.")]
Seed = Annotated[int, typer.Option(help="Of everything, 0 to 2^63 - 1.")]
Cpu = Annotated[bool, typer.Option("--cpu", help="Stay on the CPU.")]
Out = Annotated[str, typer.Option(help="Folder for what is made.")]
Known = Annotated[str | None, typer.Option("--dataset", help="The data set. (default: that of the training)")]
KnownModel = Annotated[str | None, typer.Option("--model", help="The unreduced model. (default: that of the training)")]
KnownMethod = Annotated[
    str | None, typer.Option("--method", help="The method, or none. (default: that of the training)")
]
KnownRate = Annotated[float | None, typer.Option("--keep-rate", help="Its keep rate. (default: that of the training)")]
WEIGHTS_HELP = "A folder that study train wrote, or a file of weights."
Weights = Annotated[Path, typer.Argument(help=WEIGHTS_HELP)]
Ema = Annotated[bool, typer.Option("--ema", help="The moving average: model_ema.safetensors of the folder.")]
Workers = Annotated[int | None, typer.Option(help="Processes that load images. (default: the protocol's)")]

_PROTOCOL = "Protocol; by default that of the data set"
_DISTILLATION = "Distillation; DynamicViT's losses take the same teacher"
_protocol = functools.partial(typer.Option, rich_help_panel=_PROTOCOL)
_distillation = functools.partial(typer.Option, rich_help_panel=_DISTILLATION)
Teacher = Annotated[
    str | None, _distillation(help="A timm model, with timm's weights. (default: the start of the training itself)")
]
TeacherCheckpoint = Annotated[
    Path | None, _distillation(help="Its weights; without --teacher of a model like the student, unreduced.")
]


@dataclasses.dataclass(frozen=True)
class Changes:
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


def with_changes(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with the options of :class:`Changes`; it gets those that were given as ``changes``."""
    hints = get_type_hints(Changes, include_extras=True)
    own = inspect.signature(command, eval_str=True)
    options = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in dataclasses.fields(Changes)
    ]

    @functools.wraps(command)
    def called(**given: Any) -> None:
        changes = {name: given.pop(name) for name in hints}
        command(**given, changes={name: value for name, value in changes.items() if value is not None})

    parameters = [new for one in own.parameters.values() for new in (options if one.name == "changes" else [one])]
    called.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {one.name: one.annotation for one in parameters}
    return called


def changed_protocol(protocol: Protocol, changes: dict[str, Any]) -> Protocol:
    """Return a protocol with what was given; the warm-up keeps its share of the epochs."""
    share = protocol.warmup_epochs / max(protocol.epochs, 1)
    given = {"warmup_epochs": round(share * changes.get("epochs", protocol.epochs)), **changes}
    if given.get("ema") == 0:
        given["ema"] = None
    return dataclasses.replace(protocol, **given)


def check_dataset(dataset: str, root: Path | None, splits: Sequence[str] = ("train", "val")) -> None:
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


def check_files(**given: Path | None) -> None:
    """Raise for a file of weights that is not there, or is something else."""
    for option, path in given.items():
        if path is not None:
            check_weights(f"--{option.replace('_', '-')}", path)


def check_weights(option: str, path: Path) -> None:
    """Raise UserError, with the option, about a file that holds no weights."""
    try:
        check_weights_file(path)
    except OSError as error:
        raise ValueError(f"{option} {path}: {(error.strerror or str(error)).lower()}") from error


def check_free(out: Path) -> None:
    """Raise if another process works in the folder. Of several that share a training, the first one asks."""
    from ..study._lock import find_holder

    if os.environ.get("RANK", "0") == "0" and (holder := find_holder(out)) is not None:
        raise ValueError(f"{out} is in use by {holder}: wait for it, or give another --out")


def check_at_least(least: int, **given: int | None) -> None:
    """Raise UserError about a whole number below the least, or beyond 2^31."""
    for option, value in given.items():
        if value is not None and not least <= value < 2**31:
            wanted = f"at least {least}" if value < least else f"below {2**31}"
            raise ValueError(f"--{option.replace('_', '-')} must be {wanted}, got {value}")


def parse_model_options(words: list[str] | None) -> dict[str, Any]:
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


def make_backbone(
    dataset: str,
    model: str | None,
    checkpoint: Path | None,
    pretrained: bool,
    options: list[str] | None = None,
) -> Backbone:
    """Return the backbone that the options name, by default the data set's own."""
    from ..study.protocol import Backbone
    from ..study.recipe import EMBEDDED

    check_files(checkpoint=checkpoint)
    given = parse_model_options(options)
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


def make_teacher(name: str | None, checkpoint: Path | None, student: Backbone) -> Backbone | None:
    """Return the teacher that was asked for."""
    check_files(teacher_checkpoint=checkpoint)
    if checkpoint is not None and name is None:
        return dataclasses.replace(student, pretrained=False, checkpoint=checkpoint)
    from ..study.protocol import Backbone

    if name is None:
        return None
    check_model(name, checkpoint is None)
    return Backbone(name, pretrained=checkpoint is None, checkpoint=checkpoint)


def check_method(name: str) -> str:
    """Return the study's name of a method, ``radial-l1``, for one in any case."""
    return name.strip().lower().replace("_", "-")


def make_reduction(dataset: str, method: str | None, keep_rate: float | None) -> Reduction | None:
    """Return the reduction as the study of the data set has it; None for the unreduced model."""
    from ..study.recipe import EMBEDDED, reductions

    name = None if method is None or check_method(method) == "none" else check_method(method)
    if (name is None) != (keep_rate is None):
        given = f"--keep-rate {keep_rate}" if name is None else f"--method {method}"
        raise ValueError(f"--method and --keep-rate go together, got {given} alone")
    if name is None or keep_rate is None:
        return None
    return reductions([name], [keep_rate], **(recipe_options(EMBEDDED[dataset]) if dataset in EMBEDDED else {}))[0]


def recipe_options(recipe: Recipe) -> dict[str, Any]:
    """Return what the recipe sets for each of its methods at every keep rate."""
    held: dict[str, list[dict[str, Any]]] = {}
    for reduction in recipe.reductions:
        held.setdefault(reduction.method, []).append(dict(reduction.options))
    return {
        method: {name: value for name, value in own[0].items() if all(one.get(name) == value for one in own)}
        for method, own in held.items()
    }


def make_recipe(
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
        recipe = dataclasses.replace(recipe, backbone=backbone, image_size=image_size(dataset, backbone))
    elif backbone.has_weights:
        # Further backbones are trained only where they are asked for.
        training = recipe.training if {*further} - {"none"} else None
        size = recipe.image_size if dataset == "digits" else image_size(dataset, backbone)
        recipe = dataclasses.replace(recipe, backbone=backbone, training=training, image_size=size)
    recipe = _normalised(recipe, dataset)
    recipe = dataclasses.replace(recipe, fine_tuning=changed_protocol(recipe.fine_tuning, {**changes, "seed": seed}))
    if recipe.training is not None:
        own = {"seed": seed} | ({} if backbone_epochs is None else {"epochs": backbone_epochs})
        recipe = dataclasses.replace(recipe, training=changed_protocol(recipe.training, own))
    elif backbone_epochs is not None:
        raise ValueError(f"--backbone-epochs {backbone_epochs}: this backbone has its weights and is not trained")
    wanted = tuple(dict.fromkeys(map(check_method, names("--methods", methods))))
    rates = numbers("--keep-rate", "0.7,0.5", keep_rates, float)
    rates = None if rates is None else tuple(dict.fromkeys(rates))
    if wanted or rates:
        known = dict.fromkeys(reduction.method for reduction in recipe.reductions)
        held = dict.fromkeys(reduction.keep_rate for reduction in recipe.reductions)
        chosen = reductions(wanted or tuple(known), rates or tuple(held), **recipe_options(recipe))  # type: ignore[arg-type]
        recipe = dataclasses.replace(recipe, reductions=chosen)
    recipe = _with_capacities(recipe, further)
    return recipe if recipe.fine_tuning.epochs else _off_the_shelf(recipe, wanted)


def _normalised(recipe: Recipe, dataset: str) -> Recipe:
    """Return the recipe with the normalisation that pretrained weights want; ValueError for several that differ."""
    from ..study.protocol import augmentation_for

    if not recipe.backbone.pretrained:
        return recipe
    how = augmentation_for(dataset, recipe.backbone)
    for capacity in recipe.capacities:
        if capacity.backbone.pretrained and augmentation_for(dataset, capacity.backbone) != how:
            raise ValueError(
                f"the weights of {capacity.name} want images that are normalised in another way than those of "
                f"{recipe.backbone.name}: give it a study of its own"
            )
    return dataclasses.replace(recipe, augmentation=how)


def _off_the_shelf(recipe: Recipe, wanted: tuple[str, ...]) -> Recipe:
    """Return the recipe without training; ValueError for a method that was asked for and has layers to train."""
    from ..study.recipe import without_training

    found = without_training(recipe)
    known = {reduction.method for reduction in found.reductions}
    if unfit := [name for name in wanted if name.partition("-")[0] not in known]:
        raise ValueError(f"--epochs 0 leaves nothing trained, and {unfit[0]} has layers to train")
    return found


def image_size(dataset: str, backbone: Backbone) -> int:
    """Return the side of the images that the model takes: the data set's, unless the model's was given."""
    size = backbone.options.get("img_size", 32 if dataset == "cifar10" else 224)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"--model-option img_size must be a positive number of pixels, got {size!r}")
    return size


def _with_capacities(recipe: Recipe, wanted: tuple[str, ...]) -> Recipe:
    """Return the recipe with the further backbones and the methods that were asked for, all by default."""
    known = {one.name: one for one in recipe.capacities if recipe.training is not None or one.backbone.pretrained}
    if unknown := [name for name in wanted if name not in {*known, "none"}]:
        raise ValueError(f"unknown capacity {unknown[0]!r}; expected {', '.join([*known, 'none'])}")
    chosen = []
    for capacity in (one for name, one in known.items() if name in wanted or not wanted):
        repeated = {reduction.method for reduction in capacity.reductions}
        own = tuple(reduction for reduction in recipe.reductions if reduction.method in repeated)
        chosen += [dataclasses.replace(capacity, reductions=own)] if own else []
    return dataclasses.replace(recipe, capacities=tuple(chosen))


def check_reading(batch_size: int, workers: int | None) -> None:
    """Raise UserError about numbers with which no data can be read."""
    check_at_least(1, batch_size=batch_size)
    check_at_least(0, workers=workers)
