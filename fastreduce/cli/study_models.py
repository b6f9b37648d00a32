"""Models that a training left behind or that the paper published, found by a path or a name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import one_line, read_json
from ..arguments import counted
from ..names import one_of

if TYPE_CHECKING:
    from ..study.data import DataSet
    from ..study.official import Official
    from ..study.protocol import Backbone, Reduction

from .study_options import (
    check_dataset,
    check_files,
    check_method,
    check_weights,
    image_size,
    make_backbone,
    make_reduction,
    parse_model_options,
)

__all__ = ["RANDOM", "Published", "Trained", "find_published", "find_trained"]

RANDOM = "unreduced (random weights)"


@dataclasses.dataclass(frozen=True)
class Trained:
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
        """Keep rate of the first stage."""
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
            raise ValueError(
                f"--root {self.root} has {counted(data.num_classes, 'class')}, {self.source} says {self.classes}"
            )
        built = load_trained(self.backbone, self.reduction, self.weights, data.num_classes)
        return built.to("cuda" if torch.cuda.is_available() and not cpu else "cpu"), data


def _file(weights: Path, ema: bool) -> Path:
    """Return the weights of a folder, or the moving average's in it or beside a file."""
    from ..study.protocol import EMA_WEIGHTS, WEIGHTS

    if not weights.exists():
        raise ValueError(f"{weights} is neither a file of weights nor a folder of study train: there is no such path")
    if not ema and not weights.is_dir():
        check_weights("weights", weights)
        return weights
    found = (weights if weights.is_dir() else weights.parent) / (EMA_WEIGHTS if ema else WEIGHTS)
    if not found.is_file():
        without = "; a training with --ema 0 writes none" if ema else "; has the training ended?"
        raise ValueError(f"{found} is missing{without}")
    check_weights("weights", found)
    return found


def find_trained(
    weights: Path,
    ema: bool,
    dataset: str | None,
    root: Path | None,
    model: str | None,
    method: str | None,
    keep_rate: float | None,
    model_option: list[str] | None = None,
) -> Trained:
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
        method = None if method is None else check_method(method)
        named = "none" if held.reduction is None else _study_name(held.reduction)
        rate = None if held.reduction is None else held.reduction.keep_rate
        _agree(history, dataset=(dataset, held.dataset), model=(model, held.backbone.name))
        for name, value in parse_model_options(model_option).items():
            if (known := held.backbone.options.get(name)) != value:
                says = f"{name}={known}" if name in held.backbone.options else f"nothing of {name}"
                raise ValueError(
                    f"--model-option {name}={value} contradicts {history}, which says {says}; leave the option out"
                )
        _agree(history, method=("radial-l2" if method == "radial" else method, named), keep_rate=(keep_rate, rate))
        check_dataset(held.dataset, root, ("val",))
        return held
    needed = {"--dataset": dataset, "--method (or --method none)": method}
    if dataset not in (None, *EMBEDDED):
        needed["--model"] = model
    if missing := [option for option, given in needed.items() if given is None]:
        raise ValueError(f"nothing is known of {file}, which has no {HISTORY} beside it: give {', '.join(missing)}")
    assert dataset is not None
    check_dataset(dataset, root, ("val",))
    backbone = make_backbone(dataset, model, None, False, model_option)
    reduction, size = make_reduction(dataset, method, keep_rate), None
    if dataset != "digits":
        size = image_size(dataset, backbone)
    return Trained(file, dataset, root, backbone, reduction, size)


def _study_name(reduction: Reduction) -> str:
    norm = reduction.options.get("norm")
    return reduction.method if norm is None else f"{reduction.method}-{norm}"


def _agree(history: Path, **pairs: tuple[Any, Any]) -> None:
    """Raise for an option that says something else than the training."""
    for option, (given, held) in pairs.items():
        if given is not None and given != held:
            named, known = f"--{option.replace('_', '-')} {given}", "no keep rate" if held is None else held
            raise ValueError(f"{named} contradicts {history}, which says {known}; leave the option out")


def _read_training(file: Path, history: Path, root: Path | None) -> Trained:
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
    return Trained(file, data["name"], root, backbone, reduction, size, augmentation, classes, str(history))


def _augmentation(dataset: str, held: Any, history: Path) -> Any:
    """Return how a training augmented and normalised its images, from its history; None where that does not say."""
    from ..study.protocol import Augmentation, Crops

    if dataset == "digits" or held is None:
        return None
    kind = Crops if isinstance(held, dict) and "padding" in held else Augmentation
    held = {name: tuple(value) if isinstance(value, list) else value for name, value in dict(held).items()}
    return kind(**held)


@dataclasses.dataclass(frozen=True)
class Published:
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
                raise ValueError(f"{backbone.name} has no head for {counted(num_classes, 'class')}")
            unreduced = backbone.build(num_classes)
        except Exception as error:
            if self.unreduced is not None:
                raise
            said.append(
                f"the unreduced model has random weights, and only its speed counts: timm's weights cannot be had "
                f"({one_line(error)}); --checkpoint gives others"
            )
            unreduced = dataclasses.replace(model.backbone).build(num_classes)
            return {RANDOM: unreduced, **models}, said
        return {"unreduced": unreduced, **models}, said


def find_published(name: str, checkpoint: Path | None, **contradicting: Any) -> Published:
    """Return the checkpoint of a name, which may be a file's; ValueError for options that the name settles."""
    from ..study.official import parse_name

    if given := [option for option, value in contradicting.items() if value]:
        raise ValueError(f"--official {name} says it all: leave --{given[0].replace('_', '-')} out")
    check_files(checkpoint=checkpoint)
    file = Path(name) if Path(name).exists() else None
    if file is not None:
        check_weights("--official", file)
    return Published(name, parse_name(name), file, checkpoint)
