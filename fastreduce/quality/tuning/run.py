"""Find schedules: two tables, an exact search over them, and the best few measured for real, beside the paper's."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...arguments import counted
from ...integrations.timm import patch, reduced_counts
from ...measure import Clock, cut_to_whole_rounds, quartiles, ratio, seconds_of, take_turns
from ..accuracy import paired_accuracy
from ..measures import MEASURES, Fidelity
from ..outputs import shared_copy
from .losses import SHARES, Calibration, LossTable, patched
from .search import Schedule, count_levels, fastest_within, front_of
from .times import TimeTable, measure_times

__all__ = ["Choice", "Tuner"]

TARGETS = (1.2, 1.4, 1.6, 1.8, 2.0)
PROBES = (0.8, 0.6)  # keep rates of the paper's schedule, which the prediction of losses is fitted to
LEVELS = 32
_FITS = 2
_TRIES = 5
_FIRST_BUDGET = 0.05  # of the measure, where points of accuracy are what may be lost
_HALF = 0.5  # one matching merges at most half of the tokens
_PAYS = 1.02
_REACHES = 0.97  # share of the speed-up asked for that counts as reached: a clock spreads
_AT_LEAST = 0.99

Progress = Callable[[str, float, float], None]


@dataclasses.dataclass
class Choice:
    """A schedule that was measured.

    Attributes:
        method: the name in the tables; ``arguments`` what :func:`fastreduce.patch` gets beside ``at`` and ``keep``.
        at: blocks; ``keep``: patch tokens after each, a fused one counted.
        origin: ``"tuned"`` or ``"paper"``.
        target: what it was looked for, in words.
        predicted: speed-up and fidelity by the tables.
        seen: fidelity on the images of the search; ``unseen``: on the others.
        seconds: of every round.
    """

    method: str
    arguments: dict[str, Any]
    at: tuple[int, ...]
    keep: tuple[int, ...]
    origin: str
    target: str
    predicted: tuple[float, float]
    seen: Fidelity | None = None
    unseen: Fidelity | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        """Options that :func:`fastreduce.patch` takes."""
        fused = int(self.arguments["method"] == "evit")
        return {**self.arguments, "at": list(self.at), "keep": [count - fused for count in self.keep]}

    @property
    def name(self) -> tuple[Any, ...]:
        """Name that tells it from others that are measured."""
        return self.method, self.at, self.keep


def _digest(model: nn.Module, images: Tensor) -> str:
    """Return a digest of weights and images: a file of the same name may hold others."""
    digest = hashlib.sha256()
    for tensor in (*model.parameters(), *model.buffers(), images):
        numbers = tensor.detach().cpu().contiguous()
        digest.update(f"{numbers.dtype} {tuple(numbers.shape)}".encode())
        digest.update(numbers.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Tuner:
    """Looks for schedules of a model; :meth:`tabulate`, then :meth:`look_for`, then :meth:`measure`, in this order.

    Args:
        model: unreduced, in evaluation mode, on the device and in the dtype that it will run in.
        seen: (N, 3, height, width) images for the search.
        unseen: (M, 3, height, width) others, on which the choices are measured too.
        methods: what :func:`fastreduce.patch` gets, by name: ``{"tome": {"method": "tome", "rounds": "exact"}}``.
        batch: images in the batch that is timed.
        measure: the measure that counts, of :data:`fastreduce.quality.MEASURES`.
        labels: (N,) and (M,) class indices, or None.
        saved: a file for the tables, so that an interrupted run goes on where it was; None for none.
        key: of the tables in that file: everything that they depend on, beside weights and images.
        clock: gives the seconds of a call on a device.

    Attributes:
        refused: methods that cannot serve this model, with the reason.
        untrained: methods with layers of their own, whose weights are random.
    """

    def __init__(
        self,
        model: nn.Module,
        seen: Tensor,
        unseen: Tensor,
        methods: Mapping[str, dict[str, Any]],
        batch: int,
        measure: str = "pooled_cosine",
        *,
        labels: tuple[Sequence[int], Sequence[int]] | None = None,
        saved: Path | None = None,
        key: Mapping[str, Any] | None = None,
        clock: Clock = seconds_of,
    ):
        if not len(seen) or not len(unseen):
            raise ValueError(f"a search needs images, and others to check it, got {len(seen)} and {len(unseen)}")
        self.model: Any = model
        self.seen, self.unseen, self.labels = Calibration(model, seen), Calibration(model, unseen), labels
        if measure not in MEASURES:
            raise ValueError(f"unknown measure {measure!r}; expected one of {', '.join(MEASURES)}")
        self.measure_name = measure
        self.batch, self.images = batch, torch.cat([seen, unseen])
        self.patches = int(model.patch_embed.num_patches)  # type: ignore[union-attr, arg-type]
        self._least_rate = max(0.25, round((2 / self.patches) ** (1 / 3), 2))  # below it, r³ would leave no token
        self.counts = count_levels(self.patches, LEVELS)
        self.saved, self.clock = saved, clock
        self.key = {**(key or {}), "content": _digest(model, seen)} if saved is not None else {}
        self.refused: dict[str, str] = {}
        self.untrained: list[str] = []
        self.methods: dict[str, dict[str, Any]] = {}
        for name, arguments in methods.items():
            if arguments["method"] == "ats":  # the released code's points are one more for some counts
                arguments = {"points": "exact", **arguments}
            try:
                with patched(self.seen.model, keep_rate=0.7, **arguments) as reduced:
                    self.methods[name] = dict(arguments)
                    if any(True for _ in reduced.reducers.parameters()):
                        self.untrained.append(name)
            except ValueError as error:
                self.refused[name] = str(error)
        if not self.methods:
            raise ValueError(next(iter(self.refused.values())))
        self.losses: dict[str, LossTable] = {}
        self.fronts: dict[str, list[Schedule]] = {}
        self.choices: list[Choice] = []
        self.unreduced: list[float] = []
        self.checked: list[dict[str, Any]] = []

    def _least_share(self, name: str) -> float:
        """Return the smallest share of the tokens that one stage of a method can leave, as far as it is known here."""
        arguments = self.methods[name]
        official = arguments["method"] == "tome" and arguments.get("rounds", "official") == "official"
        return _HALF if official else SHARES[-1]

    def _shares(self, name: str) -> tuple[float, ...]:
        return tuple(share for share in SHARES if share >= self._least_share(name))

    def _read(self) -> dict[str, Any]:
        if self.saved is None or not self.saved.is_file():
            return {}
        try:
            found = json.loads(self.saved.read_text())
        except ValueError:
            return {}
        return found if isinstance(found, dict) and found.get("key") == self.key else {}

    def _write(self, tables: dict[str, Any]) -> None:
        if self.saved is not None:
            self.saved.parent.mkdir(parents=True, exist_ok=True)
            half = self.saved.with_suffix(".part")
            half.write_text(json.dumps({"key": self.key, **tables}))
            half.replace(self.saved)

    def tabulate(self, progress: Progress = lambda *_: None) -> None:
        """Measure both tables, or what a saved run lacks of them, and fit the prediction of losses."""
        tables = self._read()
        if set(tables.get("times", {}).get("stages", {})) >= set(self.methods):
            self.times = TimeTable(**tables["times"])
        else:
            self.times = measure_times(
                self.seen,
                self.methods,
                self.batch,
                self.counts,
                clock=self.clock,
                progress=lambda done: progress("timing", done, 1),
            )
            tables["times"] = dataclasses.asdict(self.times)
            self._write(tables)
        blocks = {name: self._blocks(name) for name in self.methods}
        done, total = 0, sum(map(len, blocks.values()))
        losses = tables.setdefault("losses", {})
        for name in self.methods:
            rows = losses.setdefault(name, {})
            for block in blocks[name]:
                progress("losses", done, total)
                done += 1
                if str(block) not in rows:
                    rows[str(block)] = [self._loss_of(name, block, share) for share in self._shares(name)]
                    self._write(tables)
            table = LossTable(self.patches, {int(block): row for block, row in rows.items()}, self._shares(name))
            self.losses[name] = table
        for done, name in enumerate(self.methods):
            progress("fitting", done, len(self.methods))
            self._fit(name)

    def _blocks(self, name: str) -> list[int]:
        """Return the blocks at which a method can have a stage: K-Medoids has none before the first attention."""
        found = []
        for block in range(self.times.depth):
            with contextlib.suppress(ValueError), patched(self.seen.model, keep=1, at=block, **self.methods[name]):
                found.append(block)
        return found

    def _loss_of(self, name: str, block: int, share: float) -> float:
        fused = int(self.methods[name]["method"] == "evit")
        keep = max(1, round(share * self.patches) - fused)
        return self.seen.loss(self.measure_name, **self.methods[name], at=(block,), keep=[keep])

    def _search(self, name: str) -> list[Schedule]:
        times, losses, least = self.times, self.losses[name], self._least_share(name)
        fewest = 1 + int(self.methods[name]["method"] == "evit")  # the fused token stands beside one that is kept
        return front_of(
            times.depth,
            self.counts,
            lambda count, reduced: times.block_seconds(name, count, reduced),
            lambda before, after: times.stage_seconds(name, before, after),
            losses.stage,
            fixed_seconds=times.fixed,
            allowed=lambda before, after: after >= max(fewest, least * before),
        )

    def _fit(self, name: str) -> None:
        """Hold predicted against measured losses of whole schedules, and correct by them."""
        table, measured, pairs = self.losses[name], {}, []
        for _ in range(_FITS):
            front = self._search(name)
            for rate in (max(rate, self._least_rate) for rate in PROBES):
                paper = self.paper(name, rate)
                pairs = [(paper.at, paper.keep), self._within(front, self.times.of(name, paper.at, paper.keep))]
                for at, keep in pairs:
                    if at and (at, keep) not in measured:
                        config = Choice(name, self.methods[name], at, keep, "", "", (0, 0)).config
                        measured[at, keep] = self.seen.loss(self.measure_name, **config)
            table.fit([(at, keep, loss) for (at, keep), loss in measured.items()])
        self.checked += [
            {"method": name, "at": list(at), "keep": list(keep), "predicted": table.of(at, keep), "measured": loss}
            for (at, keep), loss in measured.items()
        ]
        self.fronts[name] = self._search(name)

    @staticmethod
    def _within(front: Sequence[Schedule], seconds: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
        try:
            found = fastest_within(front, seconds=seconds)
        except ValueError:
            found = front[0]
        return found.at, found.keep

    def paper(self, name: str, rate: float) -> Choice:
        """Return the paper's schedule of a keep rate: r, r², r³ at a quarter, half and three quarters of the depth."""
        with patched(self.seen.model, keep_rate=rate, **self.methods[name]) as model:
            at, counts = tuple(model.reducers.blocks), tuple(reduced_counts(model))
        seconds, loss = self.times.of(name, at, counts), self.losses[name].of(at, counts)
        return Choice(
            name,
            self.methods[name],
            at,
            counts,
            "paper",
            f"keep rate {rate:g}",
            (self.times.unreduced / seconds, self._as_fidelity(loss)),
        )

    def _as_fidelity(self, loss: float) -> float:
        return 1 - loss if MEASURES[self.measure_name] else loss

    def _paper_of_time(self, name: str, seconds: float) -> Choice:
        """Return the paper's schedule that takes as long by the table, or the next slower one."""
        low, high = self._least_rate, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            one = self.paper(name, round(middle, 4))
            low, high = (low, middle) if self.times.of(name, one.at, one.keep) > seconds else (middle, high)
        return self.paper(name, round(low, 4))

    def _choice(self, name: str, one: Schedule, target: str) -> Choice:
        predicted = self.times.unreduced / one.seconds, self._as_fidelity(one.loss)
        return Choice(name, self.methods[name], one.at, one.keep, "tuned", target, predicted)

    def _measured(self, choice: Choice) -> Choice:
        """Measure fidelity on both halves of the images."""
        halves = []
        for number, calibration in enumerate((self.seen, self.unseen)):
            values, before, after = calibration.measured(**choice.config)
            accuracy = None
            if self.labels is not None:
                labels = torch.tensor(self.labels[number])
                accuracy = paired_accuracy(before == labels, after == labels)
            halves.append(Fidelity(values, accuracy))
        choice.seen, choice.unseen = halves
        return choice

    def look_for(
        self,
        *,
        speed_up: float | None = None,
        at_least: float | None = None,
        at_most_lost: float | None = None,
        progress: Progress = lambda *_: None,
    ) -> None:
        """Choose schedules: for a speed-up, a fidelity or an accuracy, or for a row of speed-ups if nothing is given.

        For every target, the best of every method is measured for fidelity, and the paper's schedule of the same
        method that takes as long.
        """
        self.choices = []
        names = list(self.methods)
        if at_least is not None or at_most_lost is not None:
            for done, name in enumerate(names):
                progress("choosing", done, len(names))
                self._add(self._fastest(name, at_least, at_most_lost))
            return
        targets = TARGETS if speed_up is None else (speed_up,)
        for number, target in enumerate(targets):
            for done, name in enumerate(names):
                progress("choosing", number * len(names) + done, len(targets) * len(names))
                try:
                    one = fastest_within(self.fronts[name], seconds=self.times.unreduced / target)
                except ValueError:
                    continue  # not even the fewest tokens are so fast
                if one.at:
                    self._add(self._measured(self._choice(name, one, f"{target:g} times as fast")))

    def _add(self, choice: Choice | None) -> None:
        if choice is None:
            return
        self.choices.append(choice)
        paper = self._paper_of_time(choice.method, self.times.unreduced / choice.predicted[0])
        paper.target = choice.target
        self.choices.append(self._measured(paper))

    def _fastest(self, name: str, at_least: float | None, at_most_lost: float | None) -> Choice | None:
        """Return the fastest schedule of a method that measures as good as it has to be on the images of the search."""
        if at_least is None:
            return self._fastest_by_accuracy(name, at_most_lost or 0.0)
        budget = 1 - at_least
        for _ in range(_TRIES):
            one = fastest_within(self.fronts[name], loss=budget)
            if not one.at:
                return None
            choice = self._measured(self._choice(name, one, f"fidelity at least {at_least:g}"))
            if self.keeps(choice, at_least, None):
                return choice
            lost = max(1 - self.fidelity_of(choice, unseen=False), 1e-6)
            budget *= min(0.8, 0.95 * (1 - at_least) / lost)
        return None

    def _fastest_by_accuracy(self, name: str, points: float) -> Choice | None:
        """Return the same for points of accuracy: its losses may grow until a schedule fails."""
        budget, best, failed = _FIRST_BUDGET, None, False
        for _ in range(2 * _TRIES):
            one = fastest_within(self.fronts[name], loss=budget)
            if one.at and (best is None or (one.at, one.keep) != (best.at, best.keep)):
                choice = self._measured(self._choice(name, one, f"at most {counted(points, 'point', 'g')} lost"))
                if self.keeps(choice, None, points):
                    best = choice
                else:
                    failed = True
            if failed and (best is not None or not one.at):
                break
            budget *= 0.6 if failed else 2.0
        return best

    def fidelity_of(self, choice: Choice, *, unseen: bool) -> float:
        """Return the mean of the measure that counts."""
        found = choice.unseen if unseen else choice.seen
        assert found is not None
        return found.mean(self.measure_name)

    def keeps(self, choice: Choice, at_least: float | None, at_most_lost: float | None) -> bool:
        """Return whether a choice keeps what it has to on the images of the search."""
        if at_most_lost is not None:
            assert choice.seen is not None
            return choice.seen.accuracy is not None and choice.seen.accuracy.points_lost <= at_most_lost
        return at_least is None or self.fidelity_of(choice, unseen=False) >= at_least

    @torch.inference_mode()
    def measure(self, rounds: int = 7, progress: Progress = lambda *_: None) -> None:
        """Time every choice and the unreduced model in turns; Ctrl-C leaves the rounds that were finished."""
        device = self.images.device
        images = self.images.repeat(-(-self.batch // len(self.images)), 1, 1, 1)[: self.batch]
        models: dict[Any, Any] = {"unreduced": self.model}
        for choice in self.choices:
            models[choice.name] = patch(shared_copy(self.model), **choice.config)
        for model in models.values():
            model(images)
        calls = {name: partial(model, images) for name, model in models.items()}
        seconds: dict[Any, list[float]] = {name: [] for name in models}

        def moved(done: float) -> None:
            progress("measuring", int(done), rounds)

        try:
            take_turns(calls, device, rounds, seconds=seconds, clock=self.clock, moved=moved)
        finally:
            cut_to_whole_rounds(seconds)
            self.unreduced = seconds["unreduced"]
            for choice in self.choices:
                choice.seconds = seconds[choice.name]

    def speed_up(self, choice: Choice) -> float:
        """Return how many times as fast a choice is, the median of the rounds."""
        return float(ratio("speedup", choice.seconds, self.unreduced)["speedup"])

    def pairs(self) -> list[tuple[Choice, Choice]]:
        """Return every tuned schedule with the paper's that takes as long by the tables."""
        return list(zip(self.choices[::2], self.choices[1::2], strict=True))

    def best(
        self, speed_up: float | None = None, at_least: float | None = None, at_most_lost: float | None = None
    ) -> Choice | None:
        """Return the choice to take, or None where none pays or keeps what it has to.

        For a speed-up, the closest of those that reach it. Else the fastest that keeps what it has to on the images of
        the search: 0.99 if nothing is said, or, where none does, the closest.
        """
        paying = [one for one in self.choices if one.seconds and self.speed_up(one) > _PAYS]
        if speed_up is not None:
            reaching = [one for one in paying if self.speed_up(one) >= _REACHES * speed_up]
            return max(reaching, key=self._worth, default=None)
        if at_least is None and at_most_lost is None:
            # Less divergence is better, and no amount of it is known to do.
            kept = [one for one in paying if MEASURES[self.measure_name] and self.keeps(one, _AT_LEAST, None)]
            return max(kept, key=self.speed_up) if kept else max(paying, key=self._worth, default=None)
        kept = [one for one in paying if self.keeps(one, at_least, at_most_lost)]
        return max(kept, key=self.speed_up, default=None)

    def _worth(self, choice: Choice) -> float:
        value = self.fidelity_of(choice, unseen=False)
        return value if MEASURES[self.measure_name] else -value

    def _row(self, choice: Choice) -> dict[str, Any]:
        assert choice.seen is not None
        assert choice.unseen is not None
        times = ratio("speedup", choice.seconds, self.unreduced)
        low, high = quartiles(choice.seconds)
        return {
            "method": choice.method,
            "origin": choice.origin,
            "target": choice.target,
            "config": choice.config,
            "at": list(choice.at),
            "tokens": list(choice.keep),
            "predicted": {"speedup": choice.predicted[0], "fidelity": choice.predicted[1]},
            "measured": {**times, "seconds": statistics.median(choice.seconds), "seconds_quartiles": [low, high]},
            "seen": choice.seen.summary(),
            "unseen": choice.unseen.summary(),
        }

    def result(
        self, speed_up: float | None = None, at_least: float | None = None, at_most_lost: float | None = None
    ) -> dict[str, Any]:
        """Return everything, ready for JSON: ``config`` is what :func:`fastreduce.patch` takes, or None."""
        best = self.best(speed_up, at_least, at_most_lost)
        return {
            "format": "fastreduce tune",
            "format_version": 1,
            "batch": self.batch,
            "measure": self.measure_name,
            "patches": self.patches,
            "rounds": len(self.unreduced),
            "images_seen": len(self.seen.images),
            "images_unseen": len(self.unseen.images),
            "refused": self.refused,
            "untrained": self.untrained,
            "unreduced_seconds": statistics.median(self.unreduced),
            "times": dataclasses.asdict(self.times),
            "losses": {
                name: {
                    "shares": list(table.shares),
                    "blocks": table.losses,
                    "scale": table.scale,
                    "depletion": table.depletion,
                }
                for name, table in self.losses.items()
            },
            "predicted_and_measured": self.checked,
            "fronts": {
                name: [
                    {
                        "at": list(one.at),
                        "tokens": list(one.keep),
                        "speedup": self.times.unreduced / one.seconds,
                        "fidelity": self._as_fidelity(one.loss),
                    }
                    for one in front
                ]
                for name, front in self.fronts.items()
            },
            "choices": [self._row(choice) for choice in self.choices],
            "chosen": None if best is None else self._row(best),
            "config": None if best is None else best.config,
        }
