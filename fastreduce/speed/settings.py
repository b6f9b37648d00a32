"""Settings of the commands that measure, and whatever can be said against them before torch is imported."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .._files import check_weights_file, pictures_in, read_json
from ..config import read_config
from ..names import EXPORT_FORMATS, compared_methods, nearest, one_of, parse_method_option

__all__ = [
    "DTYPES",
    "FEWEST_ROUNDS",
    "KEEP_RATES",
    "ROUNDS_FOR_A_SPREAD",
    "CompareSettings",
    "ExportSettings",
    "PlanSettings",
    "TuneSettings",
    "check_checkpoint",
    "check_image",
    "check_model",
    "check_positive",
    "device_name",
    "library_of",
]

DTYPES = ("float32", "float16", "bfloat16")
KEEP_RATES = (0.7, 0.5)
FEWEST_ROUNDS = 3  # however slow they are: a median of fewer depends on a single one
ROUNDS_FOR_A_SPREAD = 5  # with fewer, quartiles say nothing, and no verdict is given

_MOST = 2**31 - 1  # the largest number of images, rounds and the like
_BACKENDS = ("auto", "triton", "reference")
_HUB_NAME = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*", re.ASCII)
_DEVICE = re.compile(r"(cpu)(?::0)?|cuda(?::[0-9]{1,4})?", re.ASCII)


def check_positive(name: str, value: float | None) -> None:
    """Raise ValueError for what is neither None nor a positive, finite number."""
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"{name} must be {'finite' if value == math.inf else 'positive'}, got {value:g}")


def _check_whole(name: str, value: int | None, most: int = _MOST) -> None:
    if value is not None and value <= 0:
        raise ValueError(f"{name} must be positive, got {value}")
    if value is not None and value > most:
        raise ValueError(f"{name} must be at most {most}, got {value if value < 1e30 else 'far more'}")


def device_name(name: str) -> str:
    """Return ``cpu``, ``cuda`` or ``cuda:N`` for a device in any case, there or not, or raise ValueError."""
    found = _DEVICE.fullmatch(name.strip().lower())
    if found is None:
        raise ValueError(f"unknown device {name!r}; expected cpu, cuda or cuda:N")
    return found[1] or found[0]


def check_image(name: str) -> None:
    """Raise ValueError unless there is such a picture, and it can be read."""
    from ..pictures import SAMPLES, open_picture  # numpy and Pillow, for which --help need not wait

    if name not in SAMPLES or os.path.exists(name):
        open_picture(name)


def check_checkpoint(name: str) -> None:
    """Raise ValueError unless there is such a file, and it begins as a file of weights does."""
    if not os.path.exists(name):
        raise ValueError(f"there is no checkpoint {name!r}")
    check_weights_file(name)


@functools.lru_cache(maxsize=1)
def _sources_of_timm() -> str:
    """Return the source of timm's models: reading it takes a hundredth of the time of importing them."""
    spec = find_spec("timm")
    folders = spec.submodule_search_locations if spec is not None else None
    files = [file for folder in folders or () for file in sorted(Path(folder, "models").glob("*.py"))]
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def library_of(name: str) -> str:
    """Return ``"transformers"`` or ``"timm"``, whose model a name means; of a folder its ``config.json`` says.

    Raises:
        ValueError: a folder without a ``config.json``, or with one that cannot be read.
    """
    if name.startswith("timm:"):
        return "timm"
    hugging = name.startswith("hf:")
    folder = Path(name.removeprefix("hf:"))
    if not folder.is_dir():
        return "transformers" if hugging else "timm"
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"model {name!r} is a folder without a config.json: give one that save_pretrained wrote")
    found = read_json(file)
    if not isinstance(found, dict):
        raise ValueError(f"{str(file)!r} holds no configuration of a model")
    timms = "architecture" in found and "model_type" not in found
    if timms and hugging:
        raise ValueError(f"model {name!r} is one of timm: give {name.removeprefix('hf:')!r}")
    return "timm" if timms else "transformers"


def _check_hugging_face(name: str, pretrained: bool | None) -> None:
    if find_spec("transformers") is None:
        raise ValueError(f'model {name!r} is one of transformers, which is missing: pip install "fastreduce[hf]"')
    name = name.removeprefix("hf:")
    if os.path.isdir(name):
        return
    if not _HUB_NAME.fullmatch(name):
        raise ValueError(f"there is no folder {name!r}, and it is no name on the hub (hf:owner/name)")
    if pretrained is False:
        raise ValueError(f"model {f'hf:{name}'!r} would be downloaded: give --pretrained if that is wanted")


def _check_pictures(folder: str) -> None:
    """Raise ValueError unless there is a picture in a folder."""
    try:
        next(pictures_in(folder))
    except ValueError as error:
        raise ValueError(f"--images: {error}") from error


def check_model(name: str, pretrained: bool | None) -> None:
    """Raise ValueError for a model that timm does not have, or one of a hub that must not be asked.

    A name of timm's (``timm:`` may stand before it) or of a hub's (``hf-hub:`` for timm's, ``hf:`` for those of
    transformers), or a folder of either library.
    """
    if name and library_of(name) == "transformers":
        _check_hugging_face(name, pretrained)
        return
    name = name.removeprefix("timm:")
    if os.path.isdir(name) or name.startswith("local-dir:"):
        return
    if ":" in name:
        if pretrained is False:
            raise ValueError(f"model {name!r} would be downloaded: give --pretrained if that is wanted")
        return
    base, sources = name.partition(".")[0], _sources_of_timm()
    # Old names stand in quotes, with what they are called now. Without sources, timm itself is asked later.
    known = any(words in sources for words in (f"\ndef {base}(", f"'{base}'", f'"{base}"'))
    if sources and not (base.isidentifier() and known):
        names = re.findall(r"^@register_model\s+def (\w+)", sources, re.MULTILINE)
        vits = [one for one in names if "vit" in one or "deit" in one]
        raise ValueError(f"unknown model {name!r}{nearest(base, vits) or nearest(base, names)}")


def _check_keep_rates(rates: Sequence[float]) -> None:
    for rate in rates:
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ValueError(f"keep_rate must lie in (0, 1], got {rate}")


def _check_blocks(at: tuple[int, ...] | None) -> None:
    if at is None:
        return
    if not at:
        raise ValueError("at must name at least one block, got an empty sequence")
    if bad := [block for block in at if block < 0]:
        raise ValueError(f"at must hold block indices from 0, got {bad[0]}")
    if any(later <= earlier for earlier, later in itertools.pairwise(at)):
        raise ValueError(f"at must be strictly increasing, got {','.join(map(str, at))}")


@dataclasses.dataclass(frozen=True)
class _Common:
    """Settings that these commands share. None stands for a choice made from the model, the machine and the time.

    Attributes:
        model: a Vision Transformer of timm, or with ``hf:`` one of transformers; its name, or a folder.
        checkpoint: a file with its weights.
        pretrained: let the library download them; None: if it can, and take random weights if not.
        images: a folder of pictures for fidelity; None for photographs of scikit-learn and scikit-image.
        image_count: how many of them; None for as many as fit into the time.
        at_least: the fidelity that a setting must keep, in (0, 1].
        at_most_lost: instead, the points of accuracy that it may lose, where ``images`` has labels.
        at: blocks at which the stages stand, from 0; None for a quarter, half and three quarters of the depth.
        rounds: None for as many as fit into ``seconds`` after the start, three at least.
        device: ``cpu``, ``cuda`` or ``cuda:N``; None for a GPU if there is one.
        threads: None for torch's choice, or 1 where that is faster (a busy machine).
        seed: of the random weights, where there is no checkpoint, 0 to 2⁶³ − 1.
        method_options: options of the methods, as in ``tome.rounds=exact``, or ``rounds=exact`` where one has it.
    """

    model: str = "deit_small_patch16_224"
    checkpoint: str | None = None
    pretrained: bool | None = False
    images: str | None = None
    image_count: int | None = None
    at_least: float | None = None
    at_most_lost: float | None = None
    at: tuple[int, ...] | None = None
    rounds: int | None = None
    device: str | None = None
    dtype: str = "float32"
    backend: str = "auto"
    compile: bool = False
    threads: int | None = None
    seed: int = 10
    method_options: tuple[str, ...] = ()

    def _check_common(self) -> None:
        given = os.environ.get("FASTREDUCE_BACKEND", "auto")
        if given not in _BACKENDS:
            raise ValueError(f"FASTREDUCE_BACKEND={given!r}; expected one of {', '.join(map(repr, _BACKENDS))}")
        _check_whole("rounds", self.rounds)
        # Threads beyond the cores only wait, and thousands end the process.
        _check_whole("threads", self.threads, max(64, 4 * (os.cpu_count() or 1)))
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, got {self.seed}")
        _check_blocks(self.at)
        if self.device is not None:
            device_name(self.device)
        one_of("dtype", self.dtype, DTYPES)
        one_of("backend", self.backend, _BACKENDS)
        if self.pretrained and self.checkpoint is not None:
            raise ValueError("give either --pretrained or --checkpoint")
        if self.checkpoint is not None:
            check_checkpoint(self.checkpoint)
        check_model(self.model, self.pretrained)
        _check_whole("image-count", self.image_count)
        if self.images is not None:
            _check_pictures(self.images)
        if self.at_least is not None and not 0 < self.at_least <= 1:
            raise ValueError(f"at-least must lie in (0, 1], got {self.at_least:g}")
        if self.at_most_lost is not None and not 0 <= self.at_most_lost <= 100:
            raise ValueError(f"at-most-lost takes points of accuracy, 0 to 100, got {self.at_most_lost:g}")
        if self.at_least is not None and self.at_most_lost is not None:
            raise ValueError("give either --at-least or --at-most-lost")
        if self.at_most_lost is not None and self.images is None:
            raise ValueError("--at-most-lost needs --images with class folders: without labels there is no accuracy")

    def options_of(self, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return the options that were given for these methods, by method; ValueError for what none of them has."""
        chosen: dict[str, dict[str, Any]] = {}
        for word in self.method_options:
            method, name, value = parse_method_option(word, list(dict.fromkeys(methods)))
            chosen.setdefault(method, {})[name] = value
        return chosen


@dataclasses.dataclass(frozen=True)
class CompareSettings(_Common):
    """Settings of a comparison. None stands for a choice made from the model, the machine and the time.

    Attributes:
        image: a picture, or the name of one of scikit-learn's.
        methods: names in ``fastreduce.REDUCERS``; ``radial-l1`` and so on for a single norm. Empty for all.
        keep_rates: each in (0, 1].
        batch: images in a batch.
        seconds: rounds are added until about this long after the start, if ``rounds`` is None.
    """

    image: str = "flower.jpg"
    methods: tuple[str, ...] = ()
    keep_rates: tuple[float, ...] = KEEP_RATES
    batch: int | None = None
    seconds: float = 150.0

    def check(self) -> None:
        """Raise ValueError for everything that is known to be wrong without torch."""
        _check_whole("batch", self.batch)
        check_positive("seconds", self.seconds)
        if not self.keep_rates:
            raise ValueError("give at least one keep rate")
        _check_keep_rates(self.keep_rates)
        self.options_of([method for method, _ in compared_methods(self.methods)])
        check_image(self.image)
        self._check_common()


@dataclasses.dataclass(frozen=True)
class PlanSettings(_Common):
    """Settings of a plan. None and empty stand for a choice made from the model, the machine and the time.

    Attributes:
        method: a name in ``fastreduce.REDUCERS``; ``radial-l1`` and so on for a norm (``radial`` is ``radial-l2``).
        keep_rates: each in (0, 1].
        batches: images in a batch.
        round_to: ``"auto"`` times rounded token counts too where reduction pays; a number measures counts rounded up to
            a multiple of it throughout; ``"none"`` leaves them alone.
        seconds: rounds are added until about this long after the start, if ``rounds`` is None. Compiling comes on top.
        graphs: replay CUDA graphs.
    """

    method: str = "topk"
    keep_rates: tuple[float, ...] = ()
    batches: tuple[int, ...] = ()
    round_to: str = "auto"
    seconds: float = 60.0
    graphs: bool = False

    @property
    def variant(self) -> str:
        """The method as one name: ``radial-l2`` for ``radial``."""
        found = compared_methods([self.method])
        method, options = found[1] if len(found) > 1 else found[0]
        return "-".join([method, *options.values()])

    @property
    def multiple(self) -> int | None:
        """Number that counts are rounded up to a multiple of throughout, if there is one."""
        return int(self.round_to) if re.fullmatch("[0-9]{1,18}", self.round_to) else None

    def check(self) -> None:
        """Raise ValueError for everything that is known to be wrong without torch."""
        for batch in self.batches:
            _check_whole("batch", batch)
        if self.round_to not in ("auto", "none") and self.multiple is None:
            raise ValueError(f"--round-to takes a number, auto or none, got {self.round_to!r}")
        _check_whole("round-to", self.multiple)
        check_positive("seconds", self.seconds)
        _check_keep_rates(self.keep_rates)
        self.options_of([self.variant.partition("-")[0]])
        if self.graphs and self.device is not None and device_name(self.device) == "cpu":
            raise ValueError(f"CUDA graphs need a CUDA device, and this runs on {self.device!r}")
        self._check_common()


MEASURES = ("pooled_cosine", "class_cosine", "patch_cosine", "patch_cosine_last", "agreement", "kl")


@dataclasses.dataclass(frozen=True)
class TuneSettings(_Common):
    """Settings of a search for schedules.

    Attributes:
        methods: names in ``fastreduce.REDUCERS``.
        batch: images in the batch that is timed.
        speed_up: how many times as fast the model has to become; None for a row of speed-ups.
        measure: the measure of fidelity that counts.

    ``at`` is what is searched.
    """

    methods: tuple[str, ...] = ()
    batch: int = 8
    speed_up: float | None = None
    measure: str = "pooled_cosine"

    def check(self) -> None:
        """Raise ValueError for everything that is known to be wrong without torch."""
        _check_whole("batch", self.batch)
        one_of("measure", self.measure, MEASURES)
        if self.speed_up is not None and not 1 < self.speed_up < math.inf:
            raise ValueError(f"speed-up must be above 1, got {self.speed_up:g}")
        if self.speed_up is not None and (self.at_least is not None or self.at_most_lost is not None):
            raise ValueError("give one of --speed-up, --at-least and --at-most-lost")
        if self.at_least is not None and self.measure == "kl":
            raise ValueError("--at-least takes a fidelity, which kl is not: give another --measure")
        if self.image_count == 1:
            raise ValueError("image-count must be at least 2: half of the images check what the others found, got 1")
        self.options_of([method for method, _ in compared_methods(self.methods)])
        self._check_common()


@dataclasses.dataclass(frozen=True)
class ExportSettings(_Common):
    """Settings of an export, on the CPU.

    Attributes:
        out: the file to write.
        to: a format of ``names.EXPORT_FORMATS``, or None for the one of the file's ending.
        config: a JSON file of ``fastreduce tune`` or ``fastreduce.config_of``, in place of method and the like.
        method: a name in ``fastreduce.REDUCERS``; ``radial-l1`` and so on for a norm.
        keep_rate: in (0, 1].
        image: a picture, or the name of one of scikit-learn's, whose views it is checked on.
        batches: images at a time when it is timed.
        rounds: of the timing; 0 for none.
    """

    out: str = "reduced.onnx"
    to: str | None = None
    config: str | None = None
    method: str = "topk"
    keep_rate: float = 0.7
    image: str = "flower.jpg"
    batches: tuple[int, ...] = (1, 8)
    rounds: int = 15

    @property
    def format(self) -> str:
        """The format that was asked for, or that the file's ending means."""
        if self.to is not None:
            return self.to.lower()
        return {known.ending: name for name, known in EXPORT_FORMATS.items()}.get(Path(self.out).suffix, "")

    @property
    def variant(self) -> str:
        """The method as one name: ``radial-l2`` for ``radial``."""
        return "radial-l2" if self.method.lower() == "radial" else self.method

    def as_comparison(self) -> CompareSettings:
        """Return the settings by which the models and the views of the picture are made."""
        mine = {field.name: getattr(self, field.name) for field in dataclasses.fields(_Common)}
        others = {"image": self.image, "methods": (self.variant,), "keep_rates": (self.keep_rate,)}
        return CompareSettings(**(mine | others | {"rounds": None, "device": "cpu"}))

    def check(self) -> None:
        """Raise ValueError for everything that is known to be wrong without torch."""
        chosen = {name: one for name, one in EXPORT_FORMATS.items() if self.to is None or name == self.format}
        endings = ", ".join(f"{known.ending} ({name})" for name, known in chosen.items())
        if self.to is not None:
            one_of("format", self.format, list(EXPORT_FORMATS))
        if not self.format or EXPORT_FORMATS[self.format].ending != Path(self.out).suffix:
            raise ValueError(f"--out must end in {endings}, got {self.out!r}")
        missing = [name for name in EXPORT_FORMATS[self.format].packages if find_spec(name) is None]
        if missing:
            raise ValueError(f'--to {self.format} needs {", ".join(missing)}: pip install "fastreduce[deploy]"')
        for batch in self.batches:
            _check_whole("batch", batch, 4096)
        if self.rounds < 0:
            raise ValueError(f"rounds must not be negative, got {self.rounds}")
        if "," in self.method:
            raise ValueError(f"--method: export takes one method, got {self.method!r}")
        if self.config is not None:
            read_config(self.config)
        self.as_comparison().check()
