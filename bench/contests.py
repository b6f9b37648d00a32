"""Contests of whole models: one model, batch and keep rate, in which everything takes its turn in every round.

``bench.models`` says what is measured and what it is held against.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreduce.arguments import counted
from fastreduce.integrations.timm import model_names
from fastreduce.measure import capture, own_code, ratio, recompile_limits, seconds_of, speed, take_turns
from fastreduce.speed import comparison
from fastreduce.speed.comparison import Comparison, Entry
from fastreduce.speed.settings import check_positive
from fastreduce.speed.timm_table import row_of, tagged, work_of

from . import parity
from .parity import Progress

__all__ = ["MODES", "STEPS", "Contest", "Contests", "Group", "Settings", "fill_kernel_cache", "measure_models"]

STEPS = ("forward", "training")
MODES = {  # whether the model is compiled, and whether it is captured
    "eager": (False, False),
    "compiled": (True, False),
    "graphed": (False, True),
    "compiled-graphed": (True, True),
}
_LEAST_SECONDS = 0.02  # a measurement on CUDA takes at least as long, so that the host's launches spread over it
_MOST_REPEATS = 64
_MOST_UNROLLED = 300  # passes over a cluster of the plain K-Medoids, each of which is compiled
_REASON_LENGTH = 200

Function = Callable[[Tensor, Tensor], Tensor]  # images, labels -> logits, or the loss of each image
Group = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a measurement. None or nothing stands for a choice made from the device.

    Attributes:
        methods: names in ``fastreduce.REDUCERS``; ``radial-l1`` and so on for a single norm. Empty for all.
        batches: 8 on the CPU, 1 and 256 on CUDA.
        dtype: float32 on the CPU, bfloat16 on CUDA.
        modes: eager on the CPU; eager, graphed and compiled on CUDA.
        rounds: the most of a group.
        seconds: of the whole run, divided among the groups; what a group leaves goes to those after it. A group that is
            prepared does one round at least, one that would start after the end is left out.
    """

    models: tuple[str, ...] = ("deit_small_patch16_224",)
    methods: tuple[str, ...] = ()
    keep_rates: tuple[float, ...] = (0.9, 0.7, 0.5, 0.25)
    at: tuple[int, ...] | None = None
    batches: tuple[int, ...] = ()
    steps: tuple[str, ...] = STEPS
    modes: tuple[str, ...] = ()
    dtype: str | None = None
    device: str | None = None
    backend: str = "auto"
    rounds: int = 10
    seconds: float = 600.0
    threads: int | None = None

    def resolve(self) -> Settings:
        """Make every choice that was left open.

        Raises:
            ValueError: what cannot be measured here, as far as that shows before a model is built.
        """
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        cuda = device.startswith("cuda")
        modes = self.modes or (("eager", "graphed", "compiled") if cuda else ("eager",))
        for what, words, known in (("step", self.steps, STEPS), ("mode", modes, MODES)):
            for word in words:
                if word not in known:
                    raise ValueError(f"unknown {what} {word!r}; expected one of {', '.join(known)}")
        for mode in modes:
            if MODES[mode][1] and not cuda:
                raise ValueError(f"mode {mode!r} needs a CUDA device, not {device!r}")
        for name in self.models:
            if name.split(".", 1)[0] not in model_names():
                raise ValueError(f"unknown model {name!r}")
        for what, values in (("model", self.models), ("keep rate", self.keep_rates), ("step", self.steps)):
            if not values:
                raise ValueError(f"give at least one {what}")
        for name in ("rounds", "seconds", "threads"):
            check_positive(name, getattr(self, name))
        for batch in self.batches:
            check_positive("batch", batch)
        return dataclasses.replace(
            self,
            device=device,
            modes=modes,
            batches=self.batches or ((1, 256) if cuda else (8,)),
            dtype=self.dtype or ("bfloat16" if cuda else "float32"),
            threads=self.threads or torch.get_num_threads(),
        )


def _reason(error: BaseException) -> str:
    line = " ".join(str(error).split())
    return f"{type(error).__name__}: {line}"[:_REASON_LENGTH]


def _function(model: nn.Module, step: str) -> Function:
    def forward(images: Tensor, labels: Tensor) -> Tensor:
        return model(images)

    def losses(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images).float(), labels, reduction="none")

    return forward if step == "forward" else losses


def _build(settings: Settings, model: str, batch: int, keep_rate: float) -> Comparison:
    return Comparison(
        comparison.Settings(
            model=model,
            methods=settings.methods,
            keep_rates=(keep_rate,),
            at=settings.at,
            batch=batch,
            rounds=1,
            device=settings.device,
            dtype=settings.dtype or "float32",
            backend=settings.backend,
            threads=settings.threads,
        )
    )


class Contest:
    """One model at one batch and keep rate: everything that takes turns, and what its results are held against."""

    def __init__(self, settings: Settings, comparison: Comparison, progress: Progress):
        self.settings = settings
        self.comparison = comparison
        self.device = self.comparison.device
        self.pool: Any = None
        self.stream: Any = None
        self._check(progress)

    def _check(self, progress: Progress) -> None:
        self.comparison.check(progress)
        self.candidates = self.comparison.candidates()
        self.entries = {entry.slug: entry for entry in self.comparison.entries}
        self.officials = {f"{slug} plain": slug for slug in self.entries}
        self.images = self.comparison.images.clone()  # an ordinary tensor, of which autograd may keep a view
        generator = torch.Generator().manual_seed(0)
        classes = self.comparison.model.num_classes
        self.labels = torch.randint(classes, (len(self.images),), generator=generator).to(self.device)
        self.parities: dict[str, dict[str, parity.Parity]] = {}
        self.compiled: dict[tuple[str, Any], Function] = {}

    def go_on(self, settings: Settings, batch: int, progress: Progress) -> None:
        """Serve other steps, modes, rounds and another batch, at which everything is checked again."""
        self.settings = settings
        if batch == len(self.images):
            return
        self.comparison.settings = dataclasses.replace(self.comparison.settings, batch=batch)
        for entry in self.comparison.entries:
            entry.changed = None
        for model in self.candidates.values():
            model.eval()
        self._check(progress)

    def _set_step(self, step: str, progress: Progress) -> None:
        for model in self.candidates.values():
            model.train(step == "training")
        if step not in self.parities:
            if step == "forward":
                self.parities[step] = parity.in_forward(self.comparison)
            else:
                self.parities[step] = parity.in_training(self.comparison, self.images, self.labels, progress)

    def _parameters(self, name: Any) -> list[nn.Parameter]:
        """Return the parameters that an optimizer steps; the official algorithm borrows the reduced one's layers."""
        model = self.entries[self.officials[name]].model if name in self.officials else self.candidates[name]
        return list(model.parameters())

    def _with_step(self, name: Any, function: Function, step: str, results: list[Tensor]) -> Callable[[], None]:
        """Return the call that is timed. It leaves in ``results`` what it computed."""
        if step == "forward":

            def forward() -> None:
                results[:] = [function(self.images, self.labels)]

            return forward
        optimizer = torch.optim.SGD(self._parameters(name), lr=0.0)

        def train() -> None:
            losses = function(self.images, self.labels)
            losses.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            results[:] = [losses.detach()]

        return train

    def _prepare(self, name: Any, step: str, mode: str) -> Callable[[], object]:
        """Return the call, warm.

        Raises:
            ValueError: what is compiled or captured does not compute what the eager model does.
        """
        compiled, captured = MODES[mode]
        eager = function = _function(self.candidates[name], step)
        if compiled:
            key = step, name
            function = self.compiled.setdefault(key, torch.compile(own_code(eager), dynamic=False))
        results: list[Tensor] = []
        call: Callable[[], object] = self._with_step(name, function, step, results)
        call()
        if captured:
            call = capture(call, stream=self.stream, pool=self.pool)
            call()
        if mode != "eager":
            with torch.no_grad():
                self._compare_with_eager(name, step, results[0], eager(self.images, self.labels))
        results.clear()
        return call

    def _compare_with_eager(self, name: Any, step: str, result: Tensor, eager: Tensor) -> None:
        entry = self.entries.get(self.officials.get(name, name))
        if step == "training" and entry is not None and entry.method == "dynamicvit":
            if not bool(result.isfinite().all()):
                raise ValueError("its loss is not finite")
            return
        differences = (result.double() - eager.double()).abs().reshape(len(eager), -1).amax(1)
        differences /= eager.abs().max().double()
        if 2 * int((differences <= parity.ALLOWED * self.comparison.difference).sum()) < len(differences):
            worst = differences.max().item()
            raise ValueError(f"its results are not those of the eager model: relative difference {worst:.1e}")

    def _prepare_all(
        self, step: str, mode: str, deadline: float, progress: Progress
    ) -> tuple[dict[Any, Callable[[], object]], dict[Any, str]]:
        """Warm up every candidate, or say why not. Officials come last, since they are missed the least."""
        calls: dict[Any, Callable[[], object]] = {}
        reasons: dict[Any, str] = {}
        for slug, held in self.parities[step].items():
            if held.verdict == "red":
                reasons[slug] = f"not the official algorithm's results: relative difference {held.difference:.1e}"
                reasons[f"{slug} plain"] = "nothing to hold it against"
        if MODES[mode][0]:
            reasons |= self._endless_compilations()
        if MODES[mode][1]:
            # Graphs run one at a time: they share their memory, for which they must be captured on one stream.
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        # No memory, an operator without this dtype; compilers fail in every other way too.
        troubles = RuntimeError if mode == "eager" else Exception
        for done, name in enumerate(sorted(self.candidates, key=lambda name: name in self.officials)):
            progress(f"preparing {mode} {step}: {name}", done, len(self.candidates))
            if name in reasons:
                continue
            if calls and time.perf_counter() > deadline:
                reasons[name] = "no time left to prepare it"
                continue
            try:
                calls[name] = self._prepare(name, step, mode)
            except troubles as error:
                reasons[name] = _reason(error)
                del error
                self.free()
        return {name: calls[name] for name in self.candidates if name in calls}, reasons

    def _endless_compilations(self) -> dict[Any, str]:
        passes = {
            name: 3 * sum(self.entries[slug].counts)
            for name, slug in self.officials.items()
            if self.entries[slug].method == "kmedoids"
        }
        return {
            name: f"compiling it would take long: its loop over the clusters is unrolled to {counted(count, 'pass')}"
            for name, count in passes.items()
            if count > _MOST_UNROLLED
        }

    def free(self) -> None:
        """Give back what a failed candidate left."""
        for model in self.candidates.values():
            model.zero_grad()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _repeats(self, call: Callable[[], object]) -> int:
        if self.device.type != "cuda":
            return 1
        return max(1, min(_MOST_REPEATS, math.ceil(_LEAST_SECONDS / seconds_of(call, self.device))))

    def _rounds(
        self, calls: Mapping[Any, Callable[[], object]], reasons: dict[Any, str], deadline: float, progress: Progress
    ) -> tuple[dict[Any, list[float]], int]:
        """Return the seconds of everything that got through all rounds, and the calls of one measurement."""
        if not calls:
            return {}, 1
        repeats = self._repeats(next(iter(calls.values())))

        def repeat(call: Callable[[], object]) -> None:
            for _ in range(repeats):
                call()

        start = time.perf_counter()

        def more(done: int) -> bool:
            now = time.perf_counter()
            return done < self.settings.rounds and not (done and now + (now - start) / done > deadline)

        def moved(done: float) -> None:
            progress("measuring", done, self.settings.rounds)

        def failed(name: Any, error: RuntimeError) -> None:
            reasons[name] = _reason(error)

        repeated = {name: functools.partial(repeat, call) for name, call in calls.items()}
        seconds = take_turns(repeated, self.device, more, moved=moved, failed=failed)
        whole = {name: values for name, values in seconds.items() if name not in reasons}
        return {name: [value / repeats for value in values] for name, values in whole.items()}, repeats

    def measure(self, step: str, mode: str, deadline: float, progress: Progress) -> Group:
        """Measure one group."""
        started = time.perf_counter()
        self._set_step(step, progress)
        limits = torch._dynamo.config.patch(recompile_limits(16 * len(self.candidates)))
        with limits, torch.inference_mode(step == "forward"):
            calls, reasons = self._prepare_all(step, mode, deadline, progress)
            seconds, repeats = self._rounds(calls, reasons, deadline, progress)
        del calls
        self.free()
        comparison = self.comparison
        return {
            "dtype": self.settings.dtype,
            "backend": comparison.backend,
            "weights": comparison.weights,
            "blocks": list(comparison.blocks),
            "rounds": max(map(len, seconds.values()), default=0),
            "calls_in_a_measurement": repeats,
            "images_checked": comparison.checked,
            "refused": comparison.refused,
            "group_seconds": time.perf_counter() - started,
            "timm": self._timm_rows(seconds) if step == "forward" else [],
            "unreduced": self._row("unreduced", seconds, reasons),
            "free_slices": [
                {"counts": list(counts), **self._row(counts, seconds, reasons)} for counts in comparison.slices
            ],
            "methods": [self._method_row(entry, step, seconds, reasons) for entry in comparison.entries],
        }

    def _row(self, name: Any, seconds: Mapping[Any, list[float]], reasons: Mapping[Any, str]) -> dict[str, Any]:
        """Write images per second, or the reason why there are none, and the speedup over the unreduced model."""
        row: dict[str, Any] = {"reason": reasons.get(name)}
        if name in self.comparison.gmacs:
            row["gmacs"] = self.comparison.gmacs[name]
            row["ideal_speedup"] = self.comparison.gmacs["unreduced"] / row["gmacs"]
        row |= speed(len(self.images), seconds[name]) if name in seconds else {"images_per_second": None}
        return row | self._ratio("speedup", name, "unreduced", seconds)

    def _timm_rows(self, seconds: Mapping[Any, list[float]]) -> list[dict[str, Any]]:
        """Return the speeds in timm's words."""
        comparison, image = self.comparison, self.images[:1]
        name = comparison.settings.model
        models = {"unreduced": (name, comparison.model)}
        models |= {
            entry.slug: (tagged(name, entry.label, entry.keep_rate), entry.model) for entry in comparison.entries
        }
        return [
            row_of(name, len(self.images), image.shape[-1], statistics.median(seconds[key]), work_of(model, image))
            for key, (name, model) in models.items()
            if key in seconds
        ]

    def _ratio(self, title: str, name: Any, other: Any, seconds: Mapping[Any, list[float]]) -> dict[str, Any]:
        if name in seconds and other in seconds:
            return ratio(title, seconds[name], seconds[other])
        return {title: None, f"{title}_quartiles": None}

    def _method_row(
        self, entry: Entry, step: str, seconds: Mapping[Any, list[float]], reasons: Mapping[Any, str]
    ) -> dict[str, Any]:
        official = f"{entry.slug} plain"
        held = self.parities[step][entry.slug]
        return {
            "label": entry.label,
            "method": entry.method,
            "options": entry.options,
            "counts": list(entry.counts),
            "layers": entry.layers,
            "parity": {"verdict": held.verdict, **dataclasses.asdict(held)},
            **self._row(entry.slug, seconds, reasons),
            **self._ratio("share_of_free_slice", entry.slug, entry.counts, seconds),
            **self._ratio("speedup_over_official", entry.slug, official, seconds),
            "official": self._row(official, seconds, reasons),
        }


class Contests:
    """Contests that were built, for whoever measures the same models again with other steps, modes or batches.

    Args:
        most: how many to keep; each holds its models, which share their weights.
    """

    def __init__(self, most: int = 1):
        self.most = most
        self.kept: dict[Settings, Contest] = {}
        self.built: tuple[Settings, Comparison] | None = None

    def build(self, settings: Settings, model: str, batch: int, keep_rate: float) -> None:
        """Build the models of what comes next, unless they are kept."""
        key = self._key(settings, model, keep_rate)
        if key not in self.kept and (self.built is None or self.built[0] != key):
            while len(self.kept) >= self.most:
                self.kept.pop(next(iter(self.kept)))
            self.built = key, _build(settings, model=model, batch=batch, keep_rate=keep_rate)

    def get(self, settings: Settings, model: str, batch: int, keep_rate: float, progress: Progress) -> Contest:
        """Return the contest, checked at this batch."""
        self.build(settings, model, batch, keep_rate)
        key = self._key(settings, model, keep_rate)
        if key in self.kept:
            contest = self.kept.pop(key)
            contest.go_on(settings, batch, progress)
        else:
            assert self.built is not None
            comparison, self.built = self.built[1], None
            contest = Contest(settings, comparison, progress)
        self.kept[key] = contest  # the last that is dropped; one that failed is not kept
        return contest

    @staticmethod
    def _key(settings: Settings, model: str, keep_rate: float) -> Settings:
        """Return everything that a built model depends on."""
        alike = {"batches": (), "steps": (), "modes": (), "rounds": 1, "seconds": 1.0}
        return dataclasses.replace(settings, models=(model,), keep_rates=(keep_rate,), **alike)


def measure_models(
    settings: Settings, progress: Progress = lambda *_: None, contests: Contests | None = None
) -> Iterator[Group]:
    """Measure, and give one group after the other as soon as it is finished.

    Every group has ``model``, ``batch``, ``keep_rate``, ``step``, ``mode`` and ``reason``: None, or why it was left
    out; then it has nothing else.

    Args:
        settings: what to measure.
        progress: (what is done, how much of it, out of how much).
        contests: where built models are kept between calls; by default nowhere.

    Raises:
        ValueError, TypeError, OSError: settings that cannot be met; at once, not with the first group.
    """
    settings = settings.resolve()
    end = time.perf_counter() + settings.seconds
    keys = [
        {"model": model, "batch": batch, "keep_rate": rate}
        for model in settings.models
        for batch in settings.batches
        for rate in dict.fromkeys(settings.keep_rates)
    ]
    contests = contests or Contests()
    contests.build(settings, **keys[0])
    return _groups(settings, keys, contests, end, progress)


def _contest(
    contests: Contests, settings: Settings, key: dict[str, Any], progress: Progress
) -> tuple[Contest | None, str | None]:
    """Return the contest, or why it cannot be held."""
    try:
        contests.build(settings, **key)
    except (ValueError, TypeError, RuntimeError) as error:
        return None, _reason(error)
    try:
        return contests.get(settings, **key, progress=progress), None
    except RuntimeError as error:
        return None, _reason(error)


def _groups(
    settings: Settings, keys: Sequence[dict[str, Any]], contests: Contests, end: float, progress: Progress
) -> Iterator[Group]:
    parts = [(step, mode) for step in settings.steps for mode in settings.modes]
    left = len(keys) * len(parts)
    for key in keys:
        contest, reason = None, None
        for step, mode in parts:
            now = time.perf_counter()
            if now > end and left < len(keys) * len(parts):
                reason = "the time was up"
            elif contest is None and reason is None:
                contest, reason = _contest(contests, settings, key, progress)
            group: Group = {**key, "step": step, "mode": mode, "reason": reason}
            if contest is not None and reason is None:
                try:
                    group |= contest.measure(step, mode, now + (end - now) / left, progress)
                except RuntimeError as error:
                    group["reason"] = _reason(error)
            left -= 1
            yield group
        if contest is not None:
            contest.compiled.clear()
            contest.free()
            contest = None
            torch._dynamo.reset()


def fill_kernel_cache(settings: Settings) -> None:
    """Run every reduced model once at every batch, so that its kernels are compiled before anything is timed."""
    settings = settings.resolve()
    for model, rate in itertools.product(settings.models, settings.keep_rates):
        comparison = _build(settings, model, settings.batches[0], rate)
        with torch.inference_mode():
            for batch, entry in itertools.product(settings.batches, comparison.entries):
                entry.model(comparison.views(batch))
        if comparison.device.type == "cuda":
            torch.cuda.synchronize(comparison.device)
