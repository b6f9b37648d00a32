"""Measurements of ``fastreduce compare``, which print nothing and draw nothing.

Every method runs beside three others: the unreduced model, the free slice (an ideal whose decision costs nothing) and
the published algorithm written plainly. All of them take turns in every round, the unreduced model at its start and at
its end, and every method's logits are held against the plain algorithm in float64.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn

from ..arguments import counted
from ..backends import check_backend, resolve
from ..integrations.timm import Record, input_config, patch, record, reduced_counts
from ..measure import (
    count_gmacs,
    cut_to_whole_rounds,
    environment,
    free_memory,
    keep_memory,
    load_average,
    ratio,
    recompile_limits,
    seconds_of,
    speed,
    take_turns,
)
from ..names import compared_methods
from ..pictures import cut, open_photo
from ..plain import FreeSlice, PlainModel
from ..plain.model import OPTIONS
from ..reducers import REDUCERS
from ..reducers.schedule import stage_blocks
from .decisions import Drawn, changed_decisions, drawn, relative_difference
from .models import DTYPES, build_model, device_of, empty_copy, plain_view, share
from .settings import FEWEST_ROUNDS, KEEP_RATES, CompareSettings

__all__ = ["Comparison", "Entry", "Settings"]

Settings = CompareSettings

_FIXED: dict[str, dict[str, Any]] = {"radial": {"schedule": "stages"}}
_CHOOSY = ("ats", "kmedoids", "dynamicvit")  # methods that refuse some models or blocks
_HOW_NOT_WHAT = (("ats", "trim"), ("ats", "packed"))
_CHECKED = 2  # images of the batch that are also run in float64, which is what takes the time there
_BATCHES = {"cpu": (1, 2, 4, 8), "cuda": (8, 16, 32, 64)}
_MOST_ROUNDS = 20
_REDUCED = 0.75  # a reduced pass over a whole one, on average over methods and keep rates
_PICTURE_SECONDS = 0.7
_SUSPICIOUS = 8  # times the unreduced model's own difference to float64, before decisions are looked at
FORMAT_VERSION = 2  # the JSON's; version 1 had "official" in place of "plain"
_AGAIN = "unreduced again"  # the unreduced model's turn at the end of a round
_ACTIVATIONS = 16  # rows of the residual stream's width that are in memory at a time, for every token

Progress = Callable[[str, float, float], None]  # the phase, how much of it is done, and out of how much


@dataclasses.dataclass
class Entry:
    """One method at one keep rate: the models that run, and what was found.

    Attributes:
        options: what tells it from other entries of the method; ``chosen`` is everything that :func:`patch` got.
        counts: patch tokens after each stage; of ATS, once it has run, the counts of the longest image of the batch.
        layers: where the method's own layers have their weights from, or None if it has none.
        exact: float64 logits of the plain algorithm.
        difference: of the logits to ``exact``, relative to the largest of these.
        plain_difference: the same of the plain algorithm in the dtype that is timed.
        changed: images for which other tokens were chosen than in float64; None where nothing gave reason to look.
        stages: what there is to draw.
    """

    method: str
    options: dict[str, Any]
    keep_rate: float
    chosen: dict[str, Any]
    model: nn.Module
    plain: nn.Module
    counts: tuple[int, ...]
    layers: str | None = None
    exact: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    difference: float = math.nan
    plain_difference: float = math.nan
    changed: int | None = None
    stages: list[Drawn] = dataclasses.field(default_factory=list)

    @property
    def label(self) -> str:
        """The method and whatever else tells it from the others: ``radial l2``."""
        return " ".join([self.method, *(str(value) for value in self.options.values())])

    @property
    def slug(self) -> str:
        """Name for files: ``radial-l2-0.7``."""
        return f"{self.label} {self.keep_rate:g}".replace(" ", "-")


def _deciding(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options without those that say how, not what, is computed: no other model has them."""
    return {name: value for name, value in options.items() if (method, name) not in _HOW_NOT_WHAT}


def _views(photo: Image.Image, config: dict[str, Any], count: int, seed: int) -> Tensor:
    """Return (count, 3, height, width) float32: the photo as the model sees it, then random parts of that."""
    generator = np.random.default_rng(seed)
    size = config["input_size"][1:]
    views = []
    for index in range(count):
        side = 1.0 if index == 0 else generator.uniform(0.5, 0.95)
        x, y = generator.uniform(0, 1 - side, 2) if index else (0.0, 0.0)
        view = cut(photo, config, size, (x, y, x + side, y + side))
        views.append(np.array(view if index % 2 == 0 else ImageOps.mirror(view)))
    pixels = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    return (pixels - mean) / std


class Comparison:
    """Made from settings, with every model built; then :meth:`check`, :meth:`measure`, :meth:`result`, in this order.

    Args:
        settings: what to compare.
        started: ``time.perf_counter()`` when the clock of ``settings.seconds`` started.

    Attributes:
        refused: methods that cannot serve this model, with the reason.
        left_out: entries for which there was no time.
        load: the machine's load average when this began, or None.

    Raises:
        ValueError, TypeError, OSError: settings that cannot be met, with the reason. Nothing else is the user's doing.
    """

    def __init__(self, settings: Settings, started: float | None = None):
        self.settings = settings
        self.started = time.perf_counter() if started is None else started
        self.load = load_average()
        settings.check()
        variants = compared_methods(settings.methods)
        self.method_options = settings.options_of([method for method, _ in variants])
        self.refused: dict[str, str] = {}
        self.device = device_of(settings.device)
        self.dtype = DTYPES[settings.dtype]
        try:
            self.backend = resolve(
                check_backend(settings.backend), torch.empty(0, device=self.device, dtype=self.dtype)
            )
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.memory_kept = self.device.type == "cpu" and keep_memory()
        self.photo = open_photo(settings.image)
        built = build_model(settings)
        model, self.weights, self.method_layers = built.model, built.weights, built.layers
        self.random_weights, self.note = built.random, built.note
        self.model = model.to(self.device, self.dtype)
        rates = dict.fromkeys(settings.keep_rates)
        self.entries = [
            entry for rate in rates for method, options in variants if (entry := self._try(method, options, rate))
        ]
        if not self.entries:
            raise ValueError(next(iter(self.refused.values())))
        if settings.batch is not None:
            self.check_memory(settings.batch)
        self.use(self.entries)
        self.left_out: list[Entry] = []
        self.grid: tuple[int, int] = tuple(self.model.patch_embed.grid_size)
        self.config = input_config(model)
        self.gmacs: dict[Any, float] = {}
        self.difference = math.nan
        self.images = torch.empty(0)
        self.checked = 0
        self.seconds: dict[Any, list[float]] = {}

    def use(self, entries: list[Entry]) -> None:
        """Compare these, and hold each against a free slice of as many tokens."""
        self.entries = entries
        self.slices = {entry.counts: FreeSlice(plain_view(self.model), entry.counts, self.blocks) for entry in entries}

    def memory_of(self, images: int) -> float:
        """Estimate the bytes that a forward pass of so many images takes: views of the photo, and activations."""
        pixels = math.prod(input_config(self.model)["input_size"])
        tokens = self.model.patch_embed.num_patches + self.model.num_prefix_tokens
        width = self.dtype.itemsize
        return float(images) * (pixels * (1 + 4 + 4 + width) + _ACTIVATIONS * tokens * self.model.embed_dim * width)

    def check_memory(self, images: int) -> None:
        """Raise ValueError for a batch that cannot fit into memory, before it fills."""
        needed, free = self.memory_of(images), free_memory(self.device)
        if free is not None and needed > free:
            most = int(free / self.memory_of(1))
            raise ValueError(
                f"a batch of {counted(images, 'image')} takes about {needed / 1e9:,.0f} GB, and "
                f"{free / 1e9:,.1f} GB are free: give a smaller --batch, at most about {max(most, 1)}"
            )

    def build_entry(
        self, method: str, options: dict[str, Any], keep_rate: float, keep: Sequence[int] | None = None
    ) -> Entry:
        """Build the reduced and the plain model, with the counts ``keep`` in place of the keep rate's own if given.

        Raises:
            ValueError, TypeError: what :func:`patch` refuses.
        """
        schedule = {"keep_rate": keep_rate} if keep is None else {"keep": list(keep)}
        given = self.method_options.get(method, {})
        chosen = {**schedule, **_FIXED.get(method, {}), **options, **given}
        torch.manual_seed(self.settings.seed)  # so that the method's layers do not depend on what else is compared
        patched = patch(share(self.model), method, at=self.settings.at, backend=self.settings.backend, **chosen)
        self.blocks = stage_blocks(self.settings.at, len(self.model.blocks))
        layers = self.load_layers(patched)
        plain = self._plain(self.model, method, chosen, patched)
        counts = tuple(reduced_counts(patched))
        return Entry(method, options, keep_rate, chosen, patched, plain, counts, layers)

    def _try(self, method: str, options: dict[str, Any], keep_rate: float) -> Entry | None:
        """Return the entry, or None where the method cannot serve this model and was not asked for by name."""
        try:
            return self.build_entry(method, options, keep_rate)
        except ValueError as error:
            if self.settings.methods or method not in _CHOOSY:
                raise
            self.refused[method] = str(error)
            return None

    def load_layers(self, patched: nn.Module) -> str | None:
        """Give the method's own layers the checkpoint's weights if it has them; says in words which they have."""
        names = [name for name, _ in patched.named_parameters() if name.startswith("reducers.")]
        if not names:
            return None
        found = {name: self.method_layers[name] for name in names if name in self.method_layers}
        fits = all(value.shape == patched.get_parameter(name).shape for name, value in found.items())
        if len(found) < len(names) or not fits:
            return "random"
        with torch.no_grad():
            for name, value in found.items():
                patched.get_parameter(name).copy_(value)
        return "checkpoint"

    def _plain(self, model: nn.Module, method: str, chosen: dict[str, Any], patched: nn.Module) -> nn.Module:
        dtype = next(model.parameters()).dtype
        layers = {
            name.removeprefix("reducers."): parameter.to(dtype)
            for name, parameter in patched.named_parameters()
            if name.startswith("reducers.")
        }
        if method not in OPTIONS:  # in no paper: the reference of a method of the user's own stands for it
            twin: Any = patch(share(model), method, at=self.settings.at, backend="reference", **chosen)
            twin.reducers.load_state_dict(layers)
            return twin.to(self.device).eval()
        given = _deciding(method, chosen)
        plain = PlainModel(plain_view(model), method, at=self.blocks, layers=layers, **given)
        return plain.to(self.device).eval()

    def plain(self, model: nn.Module, entry: Entry) -> nn.Module:
        """Return the plain algorithm on another copy of the unreduced model, say :meth:`exact_model`."""
        return self._plain(model, entry.method, entry.chosen, entry.model)

    def _reference(self, model: nn.Module, entry: Entry) -> nn.Module:
        """Return the reduced model in PyTorch's own operators, for dtypes and devices that the kernels do not take."""
        chosen = _deciding(entry.method, entry.chosen)
        reduced = patch(share(model), entry.method, at=self.settings.at, backend="reference", **chosen)
        if entry.layers is not None and not next(reduced.parameters()).is_meta:
            reduced.reducers.load_state_dict(entry.model.get_submodule("reducers").state_dict())
        return reduced

    def _settle_counts(self) -> None:
        """Set the counts of methods that keep what each image calls for: they are the longest image's in this batch."""
        for entry in self.entries:
            if not REDUCERS[entry.method].ragged:
                continue
            with record(entry.model) as seen:
                entry.model(self.images)
            longest = {stage.block: int((stage.slot >= 0).sum(1).max()) for stage in seen.stages}
            entry.counts = tuple(
                longest.get(block, count) for block, count in zip(self.blocks, entry.counts, strict=True)
            )
            self.slices.setdefault(entry.counts, FreeSlice(plain_view(self.model), entry.counts, self.blocks))
        used = {entry.counts for entry in self.entries}
        self.slices = {counts: model for counts, model in self.slices.items() if counts in used}

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started

    @property
    def rounds(self) -> int:
        """Rounds measured."""
        return len(self.seconds.get("unreduced", ()))

    def picture(self) -> NDArray[np.uint8]:
        """Return the photo as the model sees it, with a whole number of pixels for every patch."""
        rows, columns = self.grid
        cell = max(8, round(448 / max(rows, columns)))
        return np.array(cut(self.photo, self.config, (rows * cell, columns * cell)))

    def candidates(self) -> dict[Any, nn.Module]:
        """Return everything that takes a turn in a round; what is held against each other stands together."""
        candidates: dict[Any, nn.Module] = {"unreduced": self.model}
        for entry in self.entries:
            candidates.setdefault(entry.counts, self.slices[entry.counts])
            candidates[entry.slug] = entry.model
            candidates[f"{entry.slug} plain"] = entry.plain
        return candidates

    def _probe(self, count: int) -> float:
        call = functools.partial(self.model, self.views(count))
        call()
        return statistics.median(seconds_of(call, self.device) for _ in range(3))

    def pace(self) -> tuple[float, float]:
        """Measure the seconds that a forward pass of the unreduced model takes, and those of each further image."""
        one, four = self._probe(1), self._probe(4)
        each = max(four - one, 0.0) / 3
        return max(one - each, 0.0), each

    def _choose_threads(self) -> None:
        """Take one thread where that is faster: on a busy machine threads mostly wait for each other."""
        threads = torch.get_num_threads()
        if self.settings.threads is None and self.device.type == "cpu" and threads > 1:
            together = self._probe(2)
            torch.set_num_threads(1)
            if self._probe(2) > together:
                torch.set_num_threads(threads)

    def _choose_batch(self) -> int:
        """Choose the largest usual batch of which some rounds fit into the time, and leave entries out if none does."""
        usual = _BATCHES[self.device.type]
        if self.settings.rounds is not None:
            return self.settings.batch or usual[-1]
        fixed, each = self.pace()
        sizes = usual if self.settings.batch is None else (self.settings.batch,)
        while True:
            fitting = [size for size in sizes if self._takes(fixed, each, size) <= self.settings.seconds - self.elapsed]
            if fitting or not self._leave_one_out():
                return max(fitting, default=sizes[0])

    def _takes(self, fixed: float, each: float, batch: int) -> float:
        """Estimate the seconds of checks, the fewest rounds and pictures."""
        passes = (FEWEST_ROUNDS + 1) * (_REDUCED * len(self.candidates()) + 1)
        # A pass in float64 takes two to three times as long.
        checks = 3 * _REDUCED * len(self.entries) * (fixed + _CHECKED * each)
        return passes * (fixed + batch * each) + checks + _PICTURE_SECONDS * len(self.entries)

    def _leave_one_out(self) -> bool:
        """Leave out the last entry that was not asked for, if there is one: lower keep rates first, then methods."""
        rates = list(dict.fromkeys(entry.keep_rate for entry in self.entries))
        first = [entry for entry in self.entries if entry.keep_rate == rates[0]]
        if len(rates) > 1 and self.settings.keep_rates == KEEP_RATES:
            dropped = [entry for entry in self.entries if entry.keep_rate == rates[-1]][-1]
        elif len(first) > 1 and not self.settings.methods:
            label = first[-1].label
            dropped = [entry for entry in self.entries if entry.label == label][-1]
        else:
            return False
        self.left_out.append(dropped)
        self.use([entry for entry in self.entries if entry is not dropped])
        return True

    def views(self, count: int) -> Tensor:
        """Return (count, 3, height, width): parts of the photo, the same ones first whatever the count."""
        return _views(self.photo, self.config, count, self.settings.seed).to(self.device, self.dtype)

    def is_far(self, difference: float) -> bool:
        """Return whether logits differ more than the unreduced model's own distance to float64 explains."""
        return not difference <= _SUSPICIOUS * self.difference

    def exact_model(self) -> nn.Module:
        """Return the unreduced model in float64."""
        return copy.deepcopy(self.model).double()

    def changed_decisions(self, entry: Entry, seen: Record, exact_model: nn.Module, images: int) -> int:
        """Count the first images of which ``seen`` holds other decisions than float64 makes."""
        reduced = self._reference(exact_model, entry)
        with record(reduced) as exact:
            reduced(self.images[:images].double())
        return changed_decisions(seen, exact, images)

    def check_entry(self, entry: Entry, exact_model: nn.Module) -> None:
        """Hold the logits against the plain algorithm in float64, and record what was done with the first image."""
        entry.exact = self.plain(exact_model, entry)(self.images[: self.checked].double())
        with record(entry.model) as seen:
            entry.difference = relative_difference(entry.model(self.images), entry.exact)
        entry.plain_difference = relative_difference(entry.plain(self.images), entry.exact)
        entry.stages = drawn(seen, self.blocks, self.grid)
        if self.is_far(entry.difference):
            entry.changed = self.changed_decisions(entry, seen, exact_model, self.checked)

    def _count_work(self) -> None:
        """Count what was not counted yet: the work on one image does not depend on the batch."""
        hollow, image = empty_copy(self.model), self.images[:1].to("meta")
        if "unreduced" not in self.gmacs:
            self.gmacs["unreduced"] = count_gmacs(hollow, image)
        for counts in self.slices:
            if counts not in self.gmacs:
                self.gmacs[counts] = count_gmacs(FreeSlice(plain_view(hollow), counts, self.blocks), image)
        for entry in self.entries:
            if entry.slug not in self.gmacs:
                self.gmacs[entry.slug] = count_gmacs(self._reference(hollow, entry), image)

    @torch.inference_mode()
    def check(self, progress: Progress) -> None:
        """Run everything once: count the work, hold the logits against float64, record the first image's stages."""
        total = len(self.entries) + 1
        progress("checking", 0, total)
        self._choose_threads()
        self.images = self.views(self._choose_batch())
        self._settle_counts()
        self.checked = min(_CHECKED, len(self.images))
        exact_model = self.exact_model()
        self._count_work()
        exact = exact_model(self.images[: self.checked].double())
        self.difference = relative_difference(self.model(self.images), exact)
        for model in self.slices.values():
            model(self.images)
        for done, entry in enumerate(self.entries, 1):
            progress(f"checking {entry.label} {entry.keep_rate:g}", done, total)
            self.check_entry(entry, exact_model)
        progress("checking", total, total)

    def _compiled(self, progress: Progress) -> dict[Any, Any]:
        """Compile every candidate, and measure the differences of what will be timed."""
        candidates = self.candidates()
        entries = {entry.slug: entry for entry in self.entries}
        compiled = {}
        for done, (name, model) in enumerate(candidates.items()):
            progress("compiling", done, len(candidates))
            compiled[name] = torch.compile(model, dynamic=False)
            logits = compiled[name](self.images)
            if (entry := entries.get(name)) is not None:
                entry.difference = relative_difference(logits, entry.exact)
                if self.is_far(entry.difference) and entry.changed is None:
                    entry.changed = 0
        return compiled

    @torch.inference_mode()
    def measure(self, progress: Progress) -> None:
        """Time all candidates in turn, round after round, backwards in every second round.

        What is raised meanwhile, Ctrl-C too, leaves the rounds that were finished for :meth:`result`.
        """
        candidates: dict[Any, Any] = self.candidates()
        try:
            if self.settings.compile:
                # All models share the code of a few classes, and each needs its own compilation of it.
                with torch._dynamo.config.patch(recompile_limits(16 * len(candidates))):
                    candidates = self._compiled(progress)
                    self._rounds(candidates, progress)
            else:
                self._rounds(candidates, progress)
        finally:
            cut_to_whole_rounds(self.seconds)

    def _rounds(self, candidates: dict[Any, Any], progress: Progress) -> None:
        """Time rounds that begin and end with the unreduced model, as many as were asked for or fit into the time."""
        models = {**candidates, _AGAIN: candidates["unreduced"]}
        calls = {name: functools.partial(model, self.images) for name, model in models.items()}
        start, wanted = self.elapsed, self.settings.rounds or FEWEST_ROUNDS

        def more(finished: int) -> bool:
            nonlocal wanted
            if finished and self.settings.rounds is None:
                left = self.settings.seconds - _PICTURE_SECONDS * len(self.entries) - self.elapsed
                fitting = finished + int(left * finished / (self.elapsed - start))
                wanted = min(max(fitting, finished, FEWEST_ROUNDS), _MOST_ROUNDS)
            return finished < wanted

        def moved(done: float) -> None:
            progress("measuring", done, wanted)

        take_turns(calls, self.device, more, seconds=self.seconds, ends=True, moved=moved)
        progress("measuring", wanted, wanted)

    def _seconds_of(self, name: Any) -> list[float]:
        """Return the seconds of every round, of the unreduced model the mean of start and end."""
        if name != "unreduced":
            return self.seconds[name]
        return [(first + last) / 2 for first, last in zip(self.seconds[name], self.seconds[_AGAIN], strict=True)]

    def _ratio(self, name: str, of: Any, to: Any) -> dict[str, Any]:
        return ratio(name, self._seconds_of(of), self._seconds_of(to))

    def _speed(self, name: Any) -> dict[str, Any]:
        return speed(len(self.images), self._seconds_of(name))

    def _unreduced_result(self) -> dict[str, Any]:
        return {
            "gmacs": self.gmacs["unreduced"],
            **self._speed("unreduced"),
            "seconds_at_start": self.seconds["unreduced"],
            "seconds_at_end": self.seconds[_AGAIN],
            **ratio("drift", self.seconds["unreduced"], self.seconds[_AGAIN]),
            "relative_difference": self.difference,
        }

    def _slice_result(self, counts: tuple[int, ...]) -> dict[str, Any]:
        speedup = self._ratio("speedup", counts, "unreduced")
        return {"counts": list(counts), "gmacs": self.gmacs[counts], **self._speed(counts), **speedup}

    def _entry_result(self, entry: Entry) -> dict[str, Any]:
        ours, plain = entry.slug, f"{entry.slug} plain"
        return {
            "label": entry.label,
            "method": entry.method,
            "options": {**entry.options, **self.method_options.get(entry.method, {})},
            "keep_rate": entry.keep_rate,
            "counts": list(entry.counts),
            "layers": entry.layers,
            "gmacs": self.gmacs[ours],
            **self._speed(ours),
            **self._ratio("speedup", ours, "unreduced"),
            **self._ratio("share_of_free_slice", ours, entry.counts),
            **self._ratio("speedup_over_plain", ours, plain),
            "plain": self._speed(plain),
            "relative_difference": entry.difference,
            "plain_relative_difference": entry.plain_difference,
            "images_with_other_decisions": entry.changed,
        }

    def result(self) -> dict[str, Any]:
        """Return everything that was measured and where, ready for JSON.

        Ratios are medians over the rounds of the ratio within a round: above 1, the method is the faster one. The
        unreduced model counts with the mean of its turns at the start and at the end of a round. ``drift`` is its time
        at the end over its time at the start.

        Raises:
            ValueError: not one round was finished.
        """
        settings = self.settings
        if not self.rounds:
            raise ValueError("not one round was finished")
        return {
            "format": "fastreduce compare",
            "format_version": FORMAT_VERSION,
            "environment": environment(self.device),
            "load_at_start": self.load,
            "cpus": os.cpu_count() or 1,
            "model": settings.model,
            "weights": self.weights,
            "random_weights": self.random_weights,
            "image": settings.image,
            "blocks": list(self.blocks),
            "grid": list(self.grid),
            "batch": len(self.images),
            "rounds": self.rounds,
            "dtype": settings.dtype,
            "backend": self.backend,
            "compile": settings.compile,
            "memory_kept": self.memory_kept,
            "images_checked": self.checked,
            "refused": self.refused,
            "left_out": [{"label": entry.label, "keep_rate": entry.keep_rate} for entry in self.left_out],
            "unreduced": self._unreduced_result(),
            "free_slices": [self._slice_result(counts) for counts in self.slices],
            "methods": [self._entry_result(entry) for entry in self.entries],
        }
