"""Whole models: unreduced, free slice, the official algorithm written plainly and fastreduce, taking turns in one run.

python -m bench.models [--model deit_small_patch16_224] [--batch 8] [--modes eager,compiled] [--json FILE] [--plots DIR]
python -m bench.models --quick

One group is a model, a batch, a keep rate, a step and a mode. In a group everything takes its turn in every round, so
that ratios (medians of those within a round) hold on a machine that is busy or throttles. Groups are finished one by
one; whatever ends the run, the finished ones are in the JSON file.

Steps: ``forward`` (in inference mode) and ``training``: forward in training mode, cross-entropy against drawn labels,
backward, one step of SGD. Its learning rate is 0: the same work, but the models share their weights, and every one is
to meet the same. DynamicViT removes no token in training, so that it cannot be faster than unreduced there.

Modes: ``eager``; ``compiled`` (torch.compile with static shapes; in training the optimizer stays eager); ``graphed``
(the eager model captured as a CUDA graph) and ``compiled-graphed`` (the compiled one), both for CUDA only, where the
host launches a single graph.

Parity comes first. A method's logits are held against the official algorithm in float64 (two images), in training also
its loss and the gradient of the patch embedding. Differences beyond eight times what the unreduced model shows itself
(in training of a soft merge also what the official one shows) need another decision somewhere, a near-tie, flagged
``*``, or else there is no time. What is compiled or captured is held against its own eager results on the whole batch,
where half of the images must agree (near-ties again). In training DynamicViT draws noise: it is held against the
official one in the same dtype with equal seeds, in eager mode only.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fastreduce.integrations.timm import model_names, record
from fastreduce.measure import (
    capture,
    environment,
    own_code,
    quartiles,
    ratio,
    recompile_limits,
    seconds_of,
    take_turns,
)
from fastreduce.speed import comparison
from fastreduce.speed.comparison import Comparison, Entry, check_positive, relative_difference
from fastreduce.speed.timm_table import as_csv, row_of, tagged, work_of

from .model_plots import save_plots

__all__ = [
    "MODES",
    "STEPS",
    "Contests",
    "Settings",
    "fill_kernel_cache",
    "main",
    "measure_models",
    "print_group",
    "save_plots",
]

STEPS = ("forward", "training")
MODES = {  # whether the model is compiled, and whether it is captured
    "eager": (False, False),
    "compiled": (True, False),
    "graphed": (False, True),
    "compiled-graphed": (True, True),
}
_QUICK = {"models": ("test_vit",), "batches": (2,), "keep_rates": (0.7, 0.4), "rounds": 3}
_LEAST_SECONDS = 0.02  # a measurement on CUDA takes at least as long, so that the host's launches spread over it
_MOST_REPEATS = 64
_ALLOWED = 8  # difference allowed, over the unreduced model's own, as in fastreduce compare
_MOST_UNROLLED = 300  # passes over a cluster of the plain K-Medoids, each of which is compiled
_REASON_LENGTH = 200

Function = Callable[[Tensor, Tensor], Tensor]  # images, labels -> logits, or the loss of each image
Progress = Callable[[str, float, float], None]
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


@dataclasses.dataclass
class Parity:
    """Comparison of a method with the official algorithm in one step.

    Attributes:
        against: what it was held against, in words.
        difference: the largest, relative to the largest value.
        official_difference: the same of the official algorithm in the dtype that is timed; None against itself.
        allowed: what needs no explanation.
        changed: images for which other tokens were chosen than in float64; None where nothing gave reason to look.
    """

    against: str
    difference: float
    official_difference: float | None
    allowed: float
    changed: int | None = None

    @property
    def verdict(self) -> str:
        """``"green"``, ``"near-ties"`` or ``"red"``."""
        if self.difference <= self.allowed:
            return "green"
        return "near-ties" if self.changed else "red"


def _reason(error: BaseException) -> str:
    line = " ".join(str(error).split())
    return f"{type(error).__name__}: {line}"[:_REASON_LENGTH]


def _function(model: nn.Module, step: str) -> Function:
    def forward(images: Tensor, labels: Tensor) -> Tensor:
        return model(images)

    def losses(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images).float(), labels, reduction="none")

    return forward if step == "forward" else losses


def _speed(seconds: Sequence[float], batch: int) -> dict[str, Any]:
    low, high = quartiles([batch / value for value in seconds])
    return {
        "images_per_second": batch / statistics.median(seconds),
        "images_per_second_quartiles": [low, high],
        "seconds": list(seconds),
    }


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


class _Contest:
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
        self.parities: dict[str, dict[str, Parity]] = {}
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
            check = self._forward_parity if step == "forward" else self._training_parity
            self.parities[step] = check(progress)

    def _forward_parity(self, progress: Progress) -> dict[str, Parity]:
        allowed = _ALLOWED * self.comparison.difference
        return {
            slug: Parity("float64", entry.difference, entry.plain_difference, allowed, entry.changed)
            for slug, entry in self.entries.items()
        }

    def _loss_and_gradient(self, model: nn.Module, weight: Tensor) -> tuple[Tensor, Tensor]:
        count = self.comparison.checked
        images, labels = self.images[:count].to(weight.dtype), self.labels[:count]
        torch.manual_seed(0)
        logits = model(images)
        loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
        (gradient,) = torch.autograd.grad(loss, weight)
        return loss.detach(), gradient

    def _training_parity(self, progress: Progress) -> dict[str, Parity]:
        """Mean loss and gradient of the patch embedding's weight, that is, through the whole model."""
        comparison = self.comparison
        exact_model: Any = comparison.exact_model().train()
        weight, exact_weight = comparison.model.patch_embed.proj.weight, exact_model.patch_embed.proj.weight

        def difference(model: nn.Module, exact: Sequence[Tensor]) -> float:
            found = self._loss_and_gradient(model, weight)
            differences = [relative_difference(a[None], b[None].double()) for a, b in zip(found, exact, strict=True)]
            return math.nan if any(map(math.isnan, differences)) else max(differences)

        own = difference(comparison.model, self._loss_and_gradient(exact_model, exact_weight))
        parities = {}
        for done, (slug, entry) in enumerate(self.entries.items()):
            progress(f"checking the training of {slug}", done, len(self.entries))
            if entry.method == "dynamicvit":
                exact = self._loss_and_gradient(entry.plain, weight)
                against = "the official algorithm with equal noise"
                parities[slug] = Parity(against, difference(entry.model, exact), None, _ALLOWED * own)
                continue
            exact = self._loss_and_gradient(comparison.plain(exact_model, entry).train(), exact_weight)
            official = difference(entry.plain, exact)
            # A soft merge decides nothing; how far rounding takes its gradient, the official one shows.
            usual = max(own, official) if any(stage.soft for stage in entry.stages) else own
            parities[slug] = Parity(
                "float64", difference(entry.model, exact), official, _ALLOWED * usual, entry.changed
            )
            if parities[slug].verdict == "red" and entry.changed is None:
                parities[slug].changed = self._changed_decisions(entry, exact_model)
        return parities

    @torch.inference_mode()
    def _changed_decisions(self, entry: Entry, exact_model: nn.Module) -> int:
        with record(entry.model) as seen:
            entry.model(self.images[: self.comparison.checked])
        return self.comparison.changed_decisions(entry, seen, exact_model.eval(), self.comparison.checked)

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
        if 2 * int((differences <= _ALLOWED * self.comparison.difference).sum()) < len(differences):
            worst = differences.max().item()
            raise ValueError(f"its results are not those of the eager model: relative difference {worst:.1e}")

    def _prepare_all(
        self, step: str, mode: str, deadline: float, progress: Progress
    ) -> tuple[dict[Any, Callable[[], object]], dict[Any, str]]:
        """Warm up every candidate, or say why not. Officials come last, since they are missed the least."""
        calls: dict[Any, Callable[[], object]] = {}
        reasons: dict[Any, str] = {}
        for slug, parity in self.parities[step].items():
            if parity.verdict == "red":
                reasons[slug] = f"not the official algorithm's results: relative difference {parity.difference:.1e}"
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
            name: f"compiling it would take long: its loop over the clusters is unrolled to {count} passes"
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
        row |= _speed(seconds[name], len(self.images)) if name in seconds else {"images_per_second": None}
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
        parity = self.parities[step][entry.slug]
        return {
            "label": entry.label,
            "method": entry.method,
            "options": entry.options,
            "counts": list(entry.counts),
            "layers": entry.layers,
            "parity": {"verdict": parity.verdict, **dataclasses.asdict(parity)},
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
        self.kept: dict[Settings, _Contest] = {}
        self.built: tuple[Settings, Comparison] | None = None

    def build(self, settings: Settings, model: str, batch: int, keep_rate: float) -> None:
        """Build the models of what comes next, unless they are kept."""
        key = self._key(settings, model, keep_rate)
        if key not in self.kept and (self.built is None or self.built[0] != key):
            while len(self.kept) >= self.most:
                self.kept.pop(next(iter(self.kept)))
            self.built = key, _build(settings, model=model, batch=batch, keep_rate=keep_rate)

    def get(self, settings: Settings, model: str, batch: int, keep_rate: float, progress: Progress) -> _Contest:
        """Return the contest, checked at this batch."""
        self.build(settings, model, batch, keep_rate)
        key = self._key(settings, model, keep_rate)
        if key in self.kept:
            contest = self.kept.pop(key)
            contest.go_on(settings, batch, progress)
        else:
            assert self.built is not None
            comparison, self.built = self.built[1], None
            contest = _Contest(settings, comparison, progress)
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
) -> tuple[_Contest | None, str | None]:
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


def _wide(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _with_spread(row: Mapping[str, Any], name: str) -> str:
    """Write the median ± half the distance of the quartiles."""
    if (value := row.get(name)) is None:
        return "–"
    low, high = row[f"{name}_quartiles"]
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} ± {(high - low) / 2:.{digits}f}"


def _title(group: Group) -> str:
    return (
        f"{group['model']}, batch {group['batch']}, keep rate {group['keep_rate']:g}, {group['step']}, {group['mode']}"
    )


def print_group(console: Console, group: Group) -> None:
    """Print one table, and below it why figures are missing."""
    if group["reason"] is not None:
        console.print(f"{_title(group)}: left out: {group['reason']}", highlight=False)
        return
    table = Table(box=box.SIMPLE_HEAD, title=_title(group), title_style="bold", title_justify="left", pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("tokens", "images/s", "unreduced ÷", "slice ÷", "official ÷", "ideal", "diff."):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("unreduced", "", _with_spread(group["unreduced"], "images_per_second"))
    common = group["methods"][0]["counts"]
    notes = []
    if reason := group["unreduced"]["reason"]:
        notes.append(f"unreduced: {reason}")
    for row in group["free_slices"]:
        if row["counts"] == common:
            speeds = [_with_spread(row, name) for name in ("images_per_second", "speedup")]
            table.add_row(
                "free slice", " ".join(map(str, common)), *speeds, "", "", _wide(row["ideal_speedup"]), end_section=True
            )
        if row["reason"]:
            notes.append(f"free slice {row['counts']}: {row['reason']}")
    for row in group["methods"]:
        names = ("images_per_second", "speedup", "share_of_free_slice", "speedup_over_official")
        flag = {"green": "", "near-ties": "*", "red": "!"}[row["parity"]["verdict"]]
        table.add_row(
            row["label"],
            " ".join(map(str, row["counts"])),
            *(_with_spread(row, name) for name in names),
            _wide(row.get("ideal_speedup")),
            f"{row['parity']['difference']:.0e}{flag}",
        )
        notes += [f"{row['label']}: {row['reason']}"] if row["reason"] else []
        if row["official"]["reason"] and not row["reason"]:
            notes.append(f"{row['label']}, official: {row['official']['reason']}")
    console.print(table)
    notes += [f"not measured: {method}: {reason}" for method, reason in group["refused"].items()]
    for note in notes:
        console.print(note, style="dim", highlight=False, soft_wrap=True)


_LEGEND = (
    "images/s: median over the rounds ± half the distance of the quartiles. unreduced, slice, official ÷: their time "
    "over the method's, medians of the ratios within each round; above 1 the method is faster. ideal: multiply-adds of "
    "the unreduced model over the method's. diff.: largest difference to the official algorithm in float64 over the "
    "largest value: of the logits, in training of the loss and of a gradient. *: near-ties: other tokens than in "
    "float64 were chosen. !: wrong."
)


def is_wrong(group: Group) -> bool:
    """Return whether a method's results in the group are not those of the official algorithm."""
    return any(row["parity"]["verdict"] == "red" for row in group.get("methods", ()))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message}\n")


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _integers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _floats(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def _parser() -> _Parser:
    default = Settings()
    about, _, details = (__doc__ or "").partition("\n\n")
    parser = _Parser(
        "python -m bench.models",
        description=about,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    lists = {
        "model": ("models", _words, f"timm models, like {default.models[0]}"),
        "methods": ("methods", _words, "like topk,radial-l1; default: all"),
        "keep-rates": ("keep_rates", _floats, f"default: {','.join(map(str, default.keep_rates))}"),
        "at": ("at", _integers, "blocks of the stages, like 3,6,9"),
        "batch": ("batches", _integers, "default: 8 on the CPU, 1,256 on CUDA"),
        "modes": ("modes", _words, f"of {', '.join(MODES)}; default: eager, on CUDA eager,graphed,compiled"),
        "steps": ("steps", _words, f"default: {','.join(STEPS)}"),
    }
    for name, (field, kind, text) in lists.items():
        parser.add_argument(f"--{name}", dest=field, type=kind, metavar="A,B", help=text)
    parser.add_argument(
        "--dtype", choices=list(comparison.DTYPES), help="default: float32 on the CPU, bfloat16 on CUDA"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N")
    parser.add_argument("--backend", help="auto, triton or reference")
    parser.add_argument("--rounds", type=int, help=f"the most of a group; default: {default.rounds}")
    parser.add_argument("--seconds", type=float, help=f"of the whole run, roughly; default: {default.seconds:g}")
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that everything runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rewritten after every group")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="rewritten after every group")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="the forward passes as a table with timm's columns")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if a method's results are wrong, 2 if what was asked for cannot be measured."""
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    quick, json_file, plots = given.pop("quick", False), given.pop("json", None), given.pop("plots", None)
    table = given.pop("csv", None)
    settings = Settings(**{**(_QUICK if quick else {}), **given})
    console, started = Console(), time.perf_counter()
    if not console.is_terminal:
        console.width = 110
    groups: list[Group] = []
    with Console(stderr=True).status("building models") as status:

        def progress(what: str, done: float, total: float) -> None:
            status.update(f"{what} ({done:.0f} of {total:.0f})")

        try:
            settings = settings.resolve()
            for path in filter(None, (json_file, plots, table)):
                path.parent.mkdir(parents=True, exist_ok=True)
            if json_file is not None and json_file.is_dir():
                raise ValueError(f"{str(json_file)!r} is a folder, not a file")
            measured = measure_models(settings, progress)
        except (ValueError, TypeError, OSError) as error:
            parser.error(" ".join(str(error).split()))
        where = environment(torch.device(settings.device or "cpu"))
        for group in measured:
            groups.append(group)
            status.stop()
            print_group(console, group)
            status.start()
            if json_file is not None:
                result = {
                    "environment": where,
                    "settings": dataclasses.asdict(settings),
                    "wall_seconds": time.perf_counter() - started,
                    "groups": groups,
                }
                part = json_file.with_name(f"{json_file.name}.part")  # so that no reader finds half a file
                part.write_text(json.dumps(result, indent=1) + "\n")
                part.replace(json_file)
            if plots is not None:
                save_plots(groups, plots)
    if table is not None:
        table.write_text(as_csv(row for group in groups for row in group.get("timm", ())))
    console.print(_LEGEND, style="dim", highlight=False)
    return int(any(map(is_wrong, groups)))


if __name__ == "__main__":
    sys.exit(main())
