"""Measurements of ``fastreduce plan``: from which keep rate and batch on reduction pays. Nothing is printed or drawn.

The unreduced and the reduced models take turns in every round, so that each round gives a ratio of its own. The
unreduced model takes a second turn as the control: how far it strays from itself is what this machine's noise can do.
Before anything is timed, every reduced model's logits are held against the plain algorithm in float64.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.timm import record
from ..measure import capture, cut_to_whole_rounds, environment, ratio, recompile_limits, take_turns
from . import comparison
from .advice import advice
from .comparison import FORMAT_VERSION, Comparison, Entry
from .decisions import relative_difference
from .settings import PlanSettings
from .timm_table import row_of, tagged, work_of
from .verdicts import judge, round_up, verdict

__all__ = ["Planner", "Settings"]

Settings = PlanSettings

KEEP_RATES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.25)
BATCHES = {"cpu": (1, 4, 16), "cuda": (1, 8, 64, 256)}

# What --round-to auto tries. Rows of a matrix product are images times tokens, so a remainder matters at small batches.
# CUDA: 8 numbers of half precision are one load, and rows of an attention bias should start at whole loads. 64 is the
# tile of queries and keys in fused attention, and a tile that was begun costs a whole one. CPU: 16 numbers of float32
# fill the widest vector register, in which matrix products are blocked.
MULTIPLES = {"cpu": (16,), "cuda": (8, 64)}
NOT_ROUNDED = {
    "radial": "radial's counts follow from its radii",
    "ats": "ats keeps as many tokens as each image calls for",
}

_CHECKED = 2  # images that are also run in float64
_FEWEST_ROUNDS, _MOST_ROUNDS = 6, 50
_FOR_ROUNDING = 0.2  # share of the time
_REDUCED = 0.75  # a reduced pass over a whole one, on average over keep rates


class Planner:
    """Made from settings, with every model built; then :meth:`check`, :meth:`measure`, :meth:`result`, in this order.

    Args:
        settings: what to plan.
        started: ``time.perf_counter()`` when the clock of ``settings.seconds`` started.

    Attributes:
        wrong: what is wrong with the logits, in sentences. If there is anything, nothing is timed and nothing is told.
        left_out: batches that were not measured, with the reason.
        refused: keep rates that the method cannot serve here, with the reason.
        keeping: keep rates that lose no more than they may, set from outside before :meth:`measure`; None if that was
            not measured.
        wanted: in words, what they have to keep.

    Raises:
        ValueError, TypeError, OSError: settings that cannot be met, with the reason. Nothing else is the user's doing.
    """

    def __init__(self, settings: Settings, started: float | None = None):
        self.settings = settings
        settings.check()
        self.multiple = settings.multiple
        rates = sorted(dict.fromkeys(settings.keep_rates or KEEP_RATES), reverse=True)
        shared = {field.name for field in dataclasses.fields(comparison.Settings)} & set(vars(settings))
        self.comparison = Comparison(
            comparison.Settings(
                **{name: getattr(settings, name) for name in shared - {"keep_rates"}},
                methods=(settings.variant,),
                keep_rates=(rates[0],),
                batch=_CHECKED,
            ),
            started,
        )
        self.device = self.comparison.device
        if settings.graphs and self.device.type != "cuda":
            raise ValueError(f"CUDA graphs need a CUDA device, and this runs on {str(self.device)!r}")
        (first,) = self.comparison.entries
        self.method, self.options = first.method, first.options
        self.not_rounded = NOT_ROUNDED.get(self.method)
        if self.multiple is not None and self.not_rounded is not None:
            raise ValueError(f"{self.not_rounded}: give --round-to none, got {self.multiple}")
        self.refused: dict[float, str] = {}
        self.entries = {rate: entry for rate in rates if (entry := self._entry(rate)) is not None}
        self.comparison.use(list(self.entries.values()))
        for batch in settings.batches:
            self.comparison.check_memory(batch)
        self.batches = sorted(set(settings.batches or BATCHES[self.device.type]))
        self.keeping: frozenset[float] | None = None
        self.wanted = ""
        self.left_out: dict[int, str] = {}
        self.wrong: list[str] = []
        self.seconds: dict[int, dict[Any, list[float]]] = {}
        self.roundings: dict[int, dict[str, Any]] = {}
        self._compiled: dict[nn.Module, Any] = {}

    def _entry(self, rate: float) -> Entry | None:
        """Make the entry of a keep rate; None if it was not asked for and would leave no token of a small model."""
        try:
            entry = self.comparison.build_entry(self.method, self.options, rate)
        except ValueError as error:
            if self.settings.keep_rates:
                raise
            self.refused[rate] = str(error)
            return None
        return entry if self.multiple is None else self._rounded(entry, self.multiple)

    def _rounded(self, entry: Entry, multiple: int) -> Entry:
        """Return the entry with its counts rounded up; itself where they are multiples already."""
        model = self.comparison.model
        patches = math.prod(self.comparison.grid)
        counts = round_up(entry.counts, multiple, model.num_prefix_tokens, patches)
        if counts == entry.counts:
            return entry
        fused = 1 if self.method == "evit" else 0  # a token more than were kept, wherever any were dropped
        keep = [count if count == patches else count - fused for count in counts]
        with warnings.catch_warnings():  # stages that round to the same count are in the table
            warnings.filterwarnings("ignore", r"\w+ with keep=.* will do nothing", UserWarning)
            rounded = self.comparison.build_entry(self.method, self.options, entry.keep_rate, keep)
        if rounded.layers != entry.layers:
            made_for = " ".join(map(str, entry.counts))
            raise ValueError(f"the checkpoint's layers of {self.method} are made for {made_for} tokens, not others")
        return rounded

    @property
    def slug(self) -> str:
        """Name for files: ``radial-l2``."""
        return next(iter(self.entries.values())).label.replace(" ", "-")

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.comparison.elapsed

    def check(self, progress: comparison.Progress) -> None:
        """Hold every reduced model's logits against the plain algorithm in float64, on two images."""
        self.comparison.check(progress)
        for rate, entry in self.entries.items():
            self._note_if_wrong(entry, f"keep rate {rate:g}")

    def _note_if_wrong(self, entry: Entry, where: str) -> None:
        if entry.changed == 0:
            self._note(where, entry.difference)

    def _note(self, where: str, difference: float) -> None:
        self.wrong.append(
            f"{where}: the logits are {difference:.0e} away from the plain algorithm in float64 (the unreduced "
            f"model's {self.comparison.difference:.0e}), and no near-tie explains it"
        )

    def _ready(self, model: nn.Module, images: Tensor) -> tuple[Callable[[], object], Tensor]:
        """Warm up the call that is timed; return it with the logits that it gives."""
        run: Any = model
        if self.settings.compile:
            run = self._compiled.setdefault(model, torch.compile(model, dynamic=False))
        logits = run(images)
        if not self.settings.graphs:
            return functools.partial(run, images), logits
        held: list[Tensor] = []

        def call() -> None:
            held[:] = [run(images)]

        replay = capture(call)
        replay()
        return replay, held[0].clone()

    def _agree(self, entry: Entry, logits: Tensor, images: Tensor) -> None:
        """Hold what is about to be timed against float64 once more: batch, compilation and graph may change it."""
        where = f"keep rate {entry.keep_rate:g}, batch {len(images)}"
        exact = entry.exact[: len(images)]
        difference = relative_difference(logits, exact)
        if self.comparison.is_far(difference) and not entry.changed:
            with record(entry.model) as seen:
                entry.model(images)
            if not self.comparison.changed_decisions(entry, seen, self.comparison.exact_model(), len(exact)):
                self._note(where, difference)
        if len(images) > 1 and (self.settings.compile or self.settings.graphs):
            eager = entry.model(images).double()
            of_images = (logits.double() - eager).abs().amax(1) / eager.abs().max()
            # A near-tie may fall another way in a compiled model, but not in most images.
            if 2 * sum(self.comparison.is_far(value) for value in of_images.tolist()) > len(images):
                self.wrong.append(f"{where}: the logits are {of_images.max():.0e} away from those of the eager model")

    def _turns(
        self,
        calls: Mapping[Any, Callable[[], object]],
        share: float,
        progress: Callable[[float], None],
        seconds: dict[Any, list[float]],
    ) -> None:
        """Add rounds to ``seconds``, as many as were asked for or as fit into this many seconds."""
        seconds.update({name: [] for name in calls})
        start, done, wanted = time.perf_counter(), 0, self.settings.rounds or _FEWEST_ROUNDS
        while done < wanted:
            progress(done / wanted)
            step = min(2, wanted - done)  # forwards and backwards
            for name, values in take_turns(calls, self.device, step).items():
                seconds[name] += values
            done += step
            if self.settings.rounds is None:
                spent = time.perf_counter() - start
                wanted = min(max(2 * int(share * done / spent / 2), wanted), _MOST_ROUNDS)

    def _drop_what_does_not_fit(self) -> None:
        """Leave out the usual batches that memory does not hold by estimate; those that were asked for were refused."""
        for batch in self.batches[1:]:
            try:
                self.comparison.check_memory(batch)
            except ValueError:
                self.left_out[batch] = "it does not fit into memory"
        self.batches = [batch for batch in self.batches if batch not in self.left_out]

    def _drop_what_takes_too_long(self, left: float) -> None:
        """Leave out the largest of the usual batches that a slow machine cannot do some rounds of in the time."""
        if self.settings.batches or self.settings.rounds is not None:
            return
        fixed, each = self.comparison.pace()
        passes = (_FEWEST_ROUNDS + 1) * (2 + _REDUCED * len(self.entries))
        while len(self.batches) > 1 and sum(passes * (fixed + size * each) for size in self.batches) > left:
            size = self.batches.pop()
            takes = passes * (fixed + size * each)
            self.left_out[size] = f"it would take about {takes:.0f} s here; give --batch {size} or more --seconds"
        self._drop_keep_rates((_FEWEST_ROUNDS + 1) * (fixed + self.batches[0] * each), left)

    def _drop_keep_rates(self, a_pass: float, left: float) -> None:
        """Leave out some of the usual keep rates where even one batch takes too long."""
        droppable = [] if self.settings.keep_rates or len(self.batches) > 1 else [0.8, 0.6, 0.4, 0.9, 0.25, 0.7]
        for rate in droppable:
            if a_pass * (2 + _REDUCED * len(self.entries)) <= left or len(self.entries) == 1:
                return
            if self.entries.pop(rate, None) is not None:
                self.refused[rate] = f"the others take the time; give --keep-rate {rate:g} or more --seconds"

    @property
    def rounds(self) -> int:
        """Rounds measured, of all batches."""
        return sum(len(seconds["unreduced"]) for seconds in self.seconds.values())

    @torch.inference_mode()
    def measure(self, progress: comparison.Progress) -> None:
        """Time every batch, all models in turn, then the rounded counts where reduction pays.

        What is raised meanwhile, Ctrl-C too, leaves the rounds that were finished for :meth:`result`.
        """
        if self.wrong:
            return
        try:
            self._measure_on_device(progress)
        finally:
            for seconds in self.seconds.values():
                cut_to_whole_rounds(seconds)
            self.seconds = {batch: seconds for batch, seconds in self.seconds.items() if seconds.get("unreduced")}
            self.batches = list(self.seconds)

    def _measure_on_device(self, progress: comparison.Progress) -> None:
        with contextlib.ExitStack() as stack:
            if self.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.device))
            if self.settings.compile:
                # All models share the code of a few classes, and each needs its own compilation for every batch.
                limit = 16 * (len(self.entries) + 1) * (len(self.batches) + 1)
                stack.enter_context(torch._dynamo.config.patch(recompile_limits(limit)))
            self._measure(progress)

    def _measure(self, progress: comparison.Progress) -> None:
        rounding = self.settings.round_to == "auto" and self.not_rounded is None
        time_left = max(self.settings.seconds - self.comparison.elapsed, self.settings.seconds / 3)
        left = time_left * (1 - _FOR_ROUNDING if rounding else 1)
        self._drop_what_does_not_fit()
        self._drop_what_takes_too_long(left)
        views = self.comparison.views(self.batches[-1])
        for done, batch in enumerate(self.batches):

            def move(part: float, batch: int = batch, done: int = done) -> None:
                progress(f"measuring batch {batch}", done + part, len(self.batches))

            move(0)
            try:
                used = self._measure_batch(views[:batch], left / (len(self.batches) - done), move)
            except torch.OutOfMemoryError:
                if not self.seconds:
                    raise
                self.left_out |= dict.fromkeys(self.batches[done:], "it does not fit into memory")
                break
            if self.wrong:
                return
            left -= used
        self.batches = list(self.seconds)
        if rounding:
            share = time_left * _FOR_ROUNDING / len(self.batches)
            for done, batch in enumerate(self.batches):
                progress("measuring rounded counts", done, len(self.batches))
                self._measure_rounding(views[:batch], share)
        progress("measuring", 1, 1)

    def _measure_batch(self, images: Tensor, share: float, progress: Callable[[float], None]) -> float:
        """Time one batch; gives the seconds that its rounds took."""
        calls: dict[Any, Callable[[], object]] = {}
        calls["unreduced"], _ = self._ready(self.comparison.model, images)
        for rate, entry in self.entries.items():
            calls[rate], logits = self._ready(entry.model, images)
            self._agree(entry, logits, images)
        calls["control"], _ = self._ready(self.comparison.model, images)
        start = time.perf_counter()
        if not self.wrong:
            self._turns(calls, share, progress, self.seconds.setdefault(len(images), {}))
        return time.perf_counter() - start

    def _measure_rounding(self, images: Tensor, share: float) -> None:
        """Time the recommended keep rate's counts beside the same rounded up, if there is a recommendation."""
        batch = len(images)
        row = judge(batch, self.seconds[batch], self.keeping)
        if row["recommended"] is None:
            return
        exact = self.entries[row["recommended"]]
        patches = math.prod(self.comparison.grid)
        rounded: dict[int, Entry] = {}
        for multiple in MULTIPLES[self.device.type]:
            try:
                entry = self._rounded(exact, multiple)
            except ValueError as error:
                self.not_rounded = str(error)
                return
            have = [exact.counts, *(other.counts for other in rounded.values())]
            reached = round_up(entry.counts, multiple, self.comparison.model.num_prefix_tokens, patches)
            if entry.counts not in have and entry.counts == reached:
                self.comparison.check_entry(entry, self.comparison.exact_model())
                self._note_if_wrong(entry, f"counts {' '.join(map(str, entry.counts))}")
                rounded[multiple] = entry
        calls: dict[Any, Callable[[], object]] = {}
        if rounded:
            calls["exact"], _ = self._ready(exact.model, images)
        for multiple, entry in rounded.items():
            calls[multiple], logits = self._ready(entry.model, images)
            self._agree(entry, logits, images)
        if self.wrong:
            return
        seconds: dict[Any, list[float]] = {}
        self._turns(calls, share, lambda _: None, seconds)
        tried = []
        for multiple, entry in rounded.items():
            gain = ratio("speedup_over_exact", seconds[multiple], seconds["exact"])
            tried.append(
                {
                    "multiple": multiple,
                    "counts": list(entry.counts),
                    "code": self._code(entry),
                    "relative_difference": entry.difference,
                    "seconds": seconds[multiple],
                    **gain,
                    "verdict": verdict(gain["speedup_over_exact_quartiles"], row["bar"]),
                }
            )
        faster = [found for found in tried if found["verdict"] == "pays"]
        best = max(faster, key=lambda found: found["speedup_over_exact"], default=None)
        self.roundings[batch] = {
            "keep_rate": exact.keep_rate,
            "seconds": seconds.get("exact", []),
            "tried": tried,
            "proposed": None if best is None else best["multiple"],
        }

    def _code(self, entry: Entry) -> str:
        """Return the call that reduces a model in this way."""
        options = {**entry.chosen, "at": self.comparison.blocks}
        if self.settings.backend != "auto":
            options["backend"] = self.settings.backend
        words = [f"{key}={json.dumps(value) if isinstance(value, str) else value}" for key, value in options.items()]
        return f'fastreduce.patch(model, "{entry.method}", {", ".join(words)})'

    def _rate_result(self, rate: float, entry: Entry) -> dict[str, Any]:
        gmacs = self.comparison.gmacs
        return {
            "keep_rate": rate,
            "counts": list(entry.counts),
            "code": self._code(entry),
            "layers": entry.layers,
            "gmacs": gmacs[entry.slug],
            "speedup_by_work": gmacs["unreduced"] / gmacs[entry.slug],
            "relative_difference": entry.difference,
            "images_with_other_decisions": entry.changed,
        }

    def _batch_result(self, batch: int) -> dict[str, Any]:
        row = judge(batch, self.seconds[batch], self.keeping)
        rounding = self.roundings.get(batch)
        code = None
        if row["recommended"] is not None:
            code = self._code(self.entries[row["recommended"]])
            if rounding is not None and rounding["proposed"] is not None:
                (code,) = (found["code"] for found in rounding["tried"] if found["multiple"] == rounding["proposed"])
        return {**row, "rounding": rounding, "code": code}

    def timm_rows(self) -> list[dict[str, Any]]:
        """Return the speeds in timm's words: the unreduced model and every keep rate, at every batch."""
        image = self.comparison.views(1)
        models: dict[Any, tuple[str, nn.Module]] = {"unreduced": (self.settings.model, self.comparison.model)}
        for rate, entry in self.entries.items():
            models[rate] = tagged(self.settings.model, entry.label, rate), entry.model
        work = {key: work_of(model, image) for key, (_, model) in models.items()}
        return [
            row_of(name, batch, image.shape[-1], statistics.median(seconds[key]), work[key])
            for batch, seconds in self.seconds.items()
            for key, (name, _) in models.items()
            if seconds.get(key)
        ]

    def result(self) -> dict[str, Any]:
        """Return everything that was measured and where, and what follows from it, ready for JSON.

        Ratios are medians over the rounds of the ratio within a round, above 1 where the reduced model is faster. Where
        the logits are wrong there are no batches and no advice.
        """
        settings, comparison = self.settings, self.comparison
        rows = [] if self.wrong else [self._batch_result(batch) for batch in self.batches if batch in self.seconds]
        lines = advice(rows, self.keeping, self.wanted) if rows else []
        if rows and settings.round_to == "auto" and self.not_rounded is not None:
            lines.insert(-1, f"Token counts were not rounded: {self.not_rounded}.")
        if self.device.type == "cuda" and not settings.graphs and any(row["recommended"] is None for row in rows):
            lines.append("At small batches the launches may take longer than the work: try --graphs.")
        lines += [f"Batch {batch} was left out: {reason}." for batch, reason in self.left_out.items()]
        lines += [f"Keep rate {rate:g} was left out: {reason}." for rate, reason in self.refused.items()]
        return {
            "format": "fastreduce plan",
            "format_version": FORMAT_VERSION,
            "environment": environment(self.device),
            "load_at_start": comparison.load,
            "cpus": os.cpu_count() or 1,
            "model": settings.model,
            "weights": comparison.weights,
            "random_weights": comparison.random_weights,
            "method": self.method,
            "options": {**self.options, **comparison.method_options.get(self.method, {})},
            "timed": bool(self.seconds),
            "blocks": list(comparison.blocks),
            "patches": math.prod(comparison.grid),
            "prefix": comparison.model.num_prefix_tokens,
            "dtype": settings.dtype,
            "backend": comparison.backend,
            "compile": settings.compile,
            "graphs": settings.graphs,
            "round_to": settings.round_to,
            "images_checked": comparison.checked,
            "relative_difference": comparison.difference,
            "wrong": self.wrong,
            "left_out": self.left_out,
            "refused": self.refused,
            "unreduced": {"gmacs": comparison.gmacs["unreduced"]},
            "rates": [self._rate_result(rate, entry) for rate, entry in self.entries.items()],
            "batches": rows,
            "advice": lines,
        }
