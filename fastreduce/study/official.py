"""Checkpoints that were published with the paper: the method and its schedule, from the name of one.

A name is the one that the released code gives its runs: model, norm of a radial pattern, blocks and keep rate, as in
``topk_small_patch16_224-3_6_9-_0.9``, ``heuristic_small_patch16_224-l2-3_6_9-_0.5`` or ``deit_small_patch16_224``.
Torch is imported when something is loaded: see :mod:`fastreduce.study.protocol`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .._files import one_line
from .protocol import Backbone, Reduction

__all__ = ["HUB", "Official", "find_on_hub", "parse_name"]

HUB = "joakimbh/TokenReduction"
_TIMEOUT = 5.0  # seconds that the hub has to answer

# The released code's name of a method, and ours.
_METHODS = {
    **{name: name for name in ("topk", "evit", "ats", "tome", "kmedoids", "dpcknn", "sit", "patchmerger", "sinkhorn")},
    **{"dyvit": "dynamicvit", "dynamicvit": "dynamicvit", "heuristic": "radial", "deit": None},
}
_MODEL = re.compile(rf"(?<![a-z0-9])({'|'.join(_METHODS)})[_-](tiny|small|base)(?:[_-]patch16)?(?:[_-]224)?", re.I)
_NORM = re.compile(r"(?<![a-z0-9])(l1|l2|linf)(?![a-z0-9])", re.I)
_BLOCKS = re.compile(r"(?<![0-9.])([0-9]{1,2}(?:_[0-9]{1,2})+)(?![0-9.])")
_RATE = re.compile(r"(?<![0-9])(0?\.[0-9]+|1\.0+)(?![0-9])")
_STAGES = re.compile(r"not[_-]?contiguous|(?<![a-z])(?:sub|stages)(?![a-z])", re.I)
_ENDINGS = (".pth", ".pt", ".bin", ".safetensors")
# Words by which a path on the hub may say what its model was trained on.
_DATA_SETS = {
    "imagenet": ("imagenet", "im1k", "im", "in1k"),
    "nabirds": ("nabirds", "nab", "birds"),
    "coco": ("coco",),
    "nuswide": ("nuswide", "nus"),
}


@dataclasses.dataclass(frozen=True)
class Official:
    """A published model.

    Attributes:
        backbone: the DeiT that was reduced, without weights.
        reduction: the method with its schedule, or None for the unreduced model.
    """

    backbone: Backbone
    reduction: Reduction | None

    @property
    def label(self) -> str:
        """The method and its rate, like ``topk-0.9``, or ``unreduced``."""
        return "unreduced" if self.reduction is None else self.reduction.label


def _without_ending(name: str) -> str:
    return next((name[: -len(ending)] for ending in _ENDINGS if name.lower().endswith(ending)), name)


def parse_name(name: str) -> Official:
    """Read the method, backbone, blocks and keep rate from the name of a published checkpoint.

    Args:
        name: with or without the ending of a file; of a path the last part that names a model counts, and what the last
            part does not say (a folder ``topk_small_patch16_224-3_6_9-_0.9/best_checkpoint.pth``) the part before does.

    Raises:
        ValueError: it names no method and size, or a reduction without a keep rate.
    """
    parts = [part for part in _without_ending(name).replace("\\", "/").split("/") if part]
    start = next((index for index in reversed(range(len(parts))) if _MODEL.search(parts[index])), None)
    if start is None:
        known = ", ".join(_METHODS)
        raise ValueError(
            f"{name!r} names no published checkpoint: expected METHOD_SIZE_patch16_224-3_6_9-_RATE, like "
            f"topk_small_patch16_224-3_6_9-_0.9, with a method of {known} and a size of tiny, small, base"
        )
    found = _MODEL.search(parts[start])
    assert found is not None
    rest = "/".join([parts[start][found.end() :], *parts[start + 1 :]])
    method, size = _METHODS[found[1].lower()], found[2].lower()
    backbone = Backbone(f"deit_{size}_patch16_224")
    if method is None:
        return Official(backbone, None)
    blocks = _BLOCKS.search(rest)
    at = (3, 6, 9) if blocks is None else tuple(map(int, blocks[1].split("_")))
    rates = [float(rate) for rate in _RATE.findall(rest)]
    if method == "radial":
        return Official(backbone, _radial(name, rest, at, rates))
    if len(rates) != 1:
        found_rates = ", ".join(map(str, rates)) or "none"
        raise ValueError(f"the keep rate of {name!r} must be one number, like -_0.9 at its end; found {found_rates}")
    return Official(backbone, Reduction(method, rates[0], at))


def _radial(name: str, rest: str, at: tuple[int, ...], rates: list[float]) -> Reduction:
    """Return the radial pattern of a name; the contiguous one, which is the released code's default, has no rate."""
    norm = _NORM.search(rest)
    options: dict[str, Any] = {"norm": "l2" if norm is None else norm[1].lower()}
    if not _STAGES.search(rest):
        return Reduction("radial", None, at, {**options, "schedule": "contiguous"})
    if len(rates) != 1:
        raise ValueError(f"{name!r} is a radial pattern in stages, whose keep rate must be one number")
    return Reduction("radial", rates[0], at, {**options, "schedule": "stages"})


def _trained_on(path: str, dataset: str) -> bool:
    words = set(re.split(r"[^a-z0-9]+", path.lower()))
    return not words.isdisjoint(_DATA_SETS.get(dataset, ()))


def choose_file(name: str, files: Iterable[str], dataset: str) -> str:
    """Choose the file of a repository that a name means.

    Args:
        name: a path in the repository, or the name of a model.
        files: the paths in it.
        dataset: where several files hold models of this name, the one whose path names this data set is taken.

    Raises:
        ValueError: there is none, or there are several.
    """
    files = [file for file in files if file.lower().endswith(_ENDINGS)]
    if name in files:
        return name
    wanted, fitting = parse_name(name), []
    for file in files:
        try:
            if parse_name(file) == wanted:
                fitting.append(file)
        except ValueError:
            continue
    own = [file for file in fitting if _trained_on(file, dataset)]
    if len(own or fitting) == 1:
        return (own or fitting)[0]
    if not fitting:
        raise ValueError(f"{HUB} has no checkpoint {name!r}; it has {', '.join(files[:5]) or 'no files of weights'}")
    raise ValueError(f"{HUB} has several checkpoints {name!r}: give one of {', '.join(own or fitting)}")


def find_on_hub(name: str, dataset: str) -> tuple[Path, str]:
    """Download a published checkpoint, once -> the file, and its path on the hub.

    Raises:
        ValueError: the hub cannot be reached, or has no such file.
    """
    parse_name(name)
    from huggingface_hub import HfApi, hf_hub_download

    try:
        about = HfApi().repo_info(HUB, timeout=_TIMEOUT)
        file = choose_file(name, [one.rfilename for one in getattr(about, "siblings", None) or ()], dataset)
        return Path(hf_hub_download(HUB, file)), file
    except ValueError:
        raise
    except Exception as error:  # networks fail in many ways
        raise ValueError(
            f"there is no file {name!r} here, and {HUB} on the Hugging Face hub cannot be read: {one_line(error)}"
        ) from error


def build(official: Official, weights: str | os.PathLike[str] | Mapping[str, Any], num_classes: int) -> Any:
    """Return the published model, in evaluation mode.

    Args:
        official: what :func:`parse_name` read.
        weights: the checkpoint.
        num_classes: of the data set.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it holds other weights than the name says.
    """
    import warnings

    from ..checkpoints import load_official

    model = official.backbone.build(num_classes)
    if official.reduction is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of random layers: they are about to be loaded
            official.reduction.apply(model)
    return load_official(model, weights).eval()
