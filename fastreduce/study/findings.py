"""The findings of the paper, held against a study's own recordings: which hold at its scale, and which do not.

*Which Tokens to Use? Investigating Token Reduction in Vision Transformers* (Haurum et al., ICCVW 2023). Differences in
accuracy are paired over images, with their 95 % interval and, for two models, McNemar's test: see
:mod:`fastreduce.study.gaps`. One within chance decides nothing, and the evidence says what would. Models that did not
learn their task do not count: see :class:`Floors`.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..arguments import counted
from ..names import FAMILIES, TITLES
from .comparison import Row, TokenStatistics, chance_iou, correlate
from .gaps import Gap, common_words, measure_gap
from .record import UNREDUCED, Recording, Run

__all__ = ["LEAST_ABOVE_CHANCE", "Finding", "Floors", "Verdict", "find", "image_scores"]

LEAST_ABOVE_CHANCE = 10.0  # points

Verdict = Literal["holds", "does not hold", "undecided", "not examined"]
# The block of the first stage and the share of the patches after it, by backbone, method and rate.
_Shares = Mapping[tuple[str, str, float | None], tuple[int, float]]
_AGREES = 0.5  # share of what chance leaves
_MODERATE = 0.3  # a correlation
_Scores = Mapping[tuple[str, float | None], NDArray[np.float64]]  # per cent by image, for every method and keep rate


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim of the paper and what a study says about it.

    Attributes:
        claim: in one sentence.
        verdict: of this study.
        evidence: the numbers behind it.
    """

    claim: str
    verdict: Verdict
    evidence: str


def _chance(recordings: Sequence[Recording]) -> float:
    """Return the accuracy, in per cent, of a model that looks at nothing."""
    for recording in recordings:
        if "prediction" in recording.outputs:
            # The class that is most often right.
            _, counts = np.unique(recording.outputs["target"], return_counts=True)
            return float(100 * counts.max() / counts.sum())
        if "scores" in recording.outputs:
            # The mean average precision of random scores is the share of labels that are present.
            return float(100 * np.asarray(recording.outputs["target"], np.float64).mean())
    return 0.0


@dataclasses.dataclass(frozen=True)
class Floors:
    """Accuracies that a model must reach for a finding to count it.

    A model that did not learn its task says nothing about its method. To count, its accuracy must be above the middle
    between chance and the unreduced model of its backbone (without one, the best), and ten points above chance.

    Attributes:
        chance: the accuracy of a model that looks at nothing, in per cent.
        by_backbone: the floor of each backbone, in per cent.
    """

    chance: float
    by_backbone: Mapping[str, float]

    @classmethod
    def of(cls, recordings: Sequence[Recording]) -> Floors:
        """Return the floors of a study, from the recordings of all its backbones on one data set."""
        chance, floors = _chance(recordings), {}
        for backbone in dict.fromkeys(one.run.backbone for one in recordings):
            own = {
                (one.run.method, one.run.keep_rate): one.run.accuracy
                for one in recordings
                if one.run.backbone == backbone and math.isfinite(one.run.accuracy)
            }
            best = own.get((UNREDUCED, None), max(own.values(), default=chance))
            floors[backbone] = chance + max(LEAST_ABOVE_CHANCE, (best - chance) / 2)
        return cls(chance, floors)

    def counts(self, backbone: str, accuracy: float) -> bool:
        """Return whether a model counts."""
        return accuracy > self.by_backbone.get(backbone, self.chance + LEAST_ABOVE_CHANCE)

    def below(self, recordings: Sequence[Recording]) -> list[Run]:
        """Return the runs that do not count."""
        return [one.run for one in recordings if not self.counts(one.run.backbone, one.run.accuracy)]

    def words(self, recordings: Sequence[Recording]) -> str:
        """Say what the floors are and which models are below, in sentences."""
        floors = ", ".join(f"{floor:.2f} % in {backbone}" for backbone, floor in self.by_backbone.items())
        rule = (
            f"A model counts above a floor: {floors}. That is the middle between chance ({self.chance:.2f} %) and the "
            f"unreduced model, and at least {LEAST_ABOVE_CHANCE:g} points above chance."
        )
        return f"{rule} Below it: {_listed(self.below(recordings)) or 'none'}."


def _listed(runs: Sequence[Run], most: int = 1000) -> str:
    words = [
        f"{TITLES.get(run.method, run.method)}{'' if run.keep_rate is None else f' at {run.keep_rate:g}'} "
        f"({run.accuracy:.2f} %)"
        for run in runs
    ]
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def image_scores(recording: Recording) -> NDArray[np.float64] | None:
    """Return (images,) 100 for an image that is classified rightly, 0 for others; None for multi-label recordings."""
    if "prediction" not in recording.outputs:
        return None
    right = recording.outputs["prediction"][:, 0] == recording.outputs["target"]
    return np.asarray(100.0 * right, np.float64)


def _scores(recordings: Sequence[Recording]) -> _Scores:
    """Return the scores of all recordings that have some."""
    found = {(one.run.method, one.run.keep_rate): image_scores(one) for one in recordings}
    return {key: scores for key, scores in found.items() if scores is not None}


def _methods(scores: _Scores, family: str) -> list[str]:
    present = {method for method, _ in scores}
    return [method for method in FAMILIES[family] if method in present]


def _mean_scores(scores: _Scores, methods: Sequence[str], rates: Sequence[float]) -> NDArray[np.float64]:
    """Average over methods and keep rates -> (images,)."""
    return np.mean([scores[method, rate] for method in methods for rate in rates if (method, rate) in scores], axis=0)


def _shared_rates(scores: _Scores, methods: Sequence[str], rates: Sequence[float]) -> list[float]:
    """Keep rates that every method was trained at: only these can be averaged without favour."""
    return [rate for rate in rates if all((method, rate) in scores for method in methods)]


def _verdict(gap: Gap) -> Verdict:
    return ("undecided", "holds", "does not hold")[gap.sign]


def _evidence(words: str, gaps: Sequence[Gap]) -> str:
    """Add what would decide the differences that are within chance."""
    needed = common_words(gaps)
    return f"{words}. Undecided: {needed}" if needed else words


def _top_k_is_strong(scores: _Scores, rates: Sequence[float]) -> Finding:
    claim = (
        "Top-K is a strong baseline: from 50 to 90 % best in a third of the settings, in the top three in over 80 %."
    )
    methods = [method for family in list(FAMILIES)[:3] for method in _methods(scores, family)]
    rates = [rate for rate in rates if rate >= 0.5 and ("topk", rate) in scores]
    if not rates or len(methods) < 4:
        return Finding(claim, "not examined", "needs Top-K and three other methods at keep rates from 0.5")
    ranks, close = {}, list[Gap]()
    for rate in rates:
        others = [method for method in methods if method != "topk" and (method, rate) in scores]
        gaps = [measure_gap(scores["topk", rate], scores[method, rate]) for method in others]
        behind = sum(gap.mean < 0 for gap in gaps)
        signs = [gap.sign for gap in gaps]
        ranks[rate] = 1 + behind, 1 + signs.count(-1), 1 + signs.count(-1) + signs.count(0)
        close += [gap for gap in gaps if gap.sign == 0]

    def strong(place: int) -> bool:
        best, three = (sum(rank[place] <= limit for rank in ranks.values()) / len(ranks) for limit in (1, 3))
        return best >= 1 / 3 and three >= 0.8

    verdict: Verdict = "holds" if strong(2) else "undecided" if strong(1) else "does not hold"
    words = ", ".join(f"{rank} ({low} to {high}) at {rate:g}" for rate, (rank, low, high) in ranks.items())
    words = f"its rank among {counted(len(methods), 'method')} (and the ranks that are within chance): {words}"
    return Finding(claim, verdict, _evidence(words, close if verdict == "undecided" else ()))


def _evit_is_above(scores: _Scores, rates: Sequence[float]) -> Finding:
    claim = "EViT is above Top-K, most of all at 25 %."
    both = [rate for rate in rates if ("evit", rate) in scores and ("topk", rate) in scores]
    if not both:
        return Finding(claim, "not examined", "needs EViT and Top-K at one keep rate")
    gaps = {rate: measure_gap(scores["evit", rate], scores["topk", rate]) for rate in both}
    together = measure_gap(_mean_scores(scores, ["evit"], both), _mean_scores(scores, ["topk"], both))
    decisive, verdict = [together], _verdict(together)
    if verdict == "holds" and len(both) > 1:
        least, *others = sorted(both)
        # The gain at the lowest rate against the largest of the others.
        most = max(others, key=lambda rate: gaps[rate].mean)
        gains = [scores["evit", rate] - scores["topk", rate] for rate in (least, most)]
        decisive = [measure_gap(*gains)]
        verdict = _verdict(decisive[0])
    words = "; ".join(f"{gap.words} points at {rate:g}" for rate, gap in gaps.items())
    return Finding(claim, verdict, _evidence(words, decisive))


def _family_beats(scores: _Scores, rates: Sequence[float], claim: str, first: str, others: Sequence[str]) -> Finding:
    winners, losers = _methods(scores, first), [method for family in others for method in _methods(scores, family)]
    shared = _shared_rates(scores, winners + losers, rates)
    if not winners or not losers or not shared:
        return Finding(claim, "not examined", "needs methods of both kinds, all at one keep rate")
    gap = measure_gap(_mean_scores(scores, winners, shared), _mean_scores(scores, losers, shared))
    by_rate = "; ".join(
        f"{measure_gap(_mean_scores(scores, winners, [rate]), _mean_scores(scores, losers, [rate])).words} at {rate:g}"
        for rate in shared
    )
    over = f"{len(winners)} and {counted(len(losers), 'method')}"
    words = f"{gap.words} points on average over {over} and all keep rates: {by_rate}"
    return Finding(claim, _verdict(gap), _evidence(words, [gap]))


def _static_beats_soft(scores: _Scores, rates: Sequence[float]) -> Finding:
    claim = "A static radial pattern beats every soft merging method."
    static, soft = _methods(scores, "Static"), _methods(scores, "Soft merging")
    rates = _shared_rates(scores, static + soft, rates)
    if not static or not soft or not rates:
        return Finding(claim, "not examined", "needs a radial pattern and soft merging, all at one keep rate")
    pattern = max(static, key=lambda method: float(_mean_scores(scores, [method], rates).mean()))
    own = _mean_scores(scores, [pattern], rates)
    gaps = {method: measure_gap(own, _mean_scores(scores, [method], rates)) for method in soft}
    verdicts = {_verdict(gap) for gap in gaps.values()}
    verdict: Verdict = "undecided"
    if verdicts == {"holds"}:
        verdict = "holds"
    elif "does not hold" in verdicts:
        verdict = "does not hold"
    words = "; ".join(f"{gap.words} points against {TITLES[method]}" for method, gap in gaps.items())
    decisive = list(gaps.values()) if verdict == "undecided" else ()
    return Finding(claim, verdict, _evidence(f"{TITLES[pattern]}: {words}", decisive))


def _shares(tokens: Sequence[TokenStatistics]) -> _Shares:
    return {
        (entry.run.backbone, entry.run.method, entry.run.keep_rate): (entry.blocks[0], float(entry.share[0]))
        for entry in tokens
        if len(entry.share)
    }


def _first_stages(row: Row, measure: str, shares: _Shares) -> tuple[float, float, float] | None:
    """Return a measure of the two first stages and the share that each leaves; None where these are not comparable.

    Backbones of several depths have their first stages at several blocks: what both have at one block is then a later
    stage of one of them, of which chance alone expects something else.
    """
    blocks = [_block(name) for name in row if name.startswith(f"{measure}_") and "_std_" not in name]
    ends = [shares.get((row[f"backbone_{end}"], row[f"method_{end}"], row[f"keep_rate_{end}"])) for end in "ab"]
    if not blocks or ends[0] is None or ends[1] is None or {end[0] for end in ends if end} != {min(blocks)}:
        return None
    return float(row[f"{measure}_{min(blocks)}"]), ends[0][1], ends[1][1]


def _agreements(rows: Sequence[Row], shares: _Shares) -> dict[str, list[float]]:
    """Return for every pruning method how much of B's first stage lies in A's: 0 as by chance, 1 all of it."""
    found: dict[str, list[float]] = {}
    for row in rows:
        stages = _first_stages(row, "ioa", shares)
        if row["method_a"] in FAMILIES["Pruning"] and stages is not None and stages[1] < 1:
            value, chance, _ = stages
            found.setdefault(row["method_a"], []).append((value - chance) / (1 - chance))
    return {method: found[method] for method in FAMILIES["Pruning"] if method in found}


def _block(column: str) -> int:
    return int(column.rsplit("_", 1)[1])


def _rates_agree(across_rates: Sequence[Row], tokens: Sequence[TokenStatistics]) -> Finding:
    claim = "Pruning patterns agree across keep rates, except for ATS."
    agreement = _agreements(across_rates, _shares(tokens))
    if "ats" not in agreement or len(agreement) < 2:
        return Finding(claim, "not examined", "needs ATS and another pruning method at two keep rates")
    means = {method: statistics.fmean(values) for method, values in agreement.items()}
    others = [value for method, value in means.items() if method != "ats"]
    words = ", ".join(f"{TITLES[method]} {value:.2f}" for method, value in means.items())
    verdict: Verdict = "holds" if min(others) > max(_AGREES, means["ats"]) else "does not hold"
    return Finding(claim, verdict, f"share of the smaller first stage that the larger holds, beyond chance: {words}")


def _radial_disagrees(across_methods: Sequence[Row], tokens: Sequence[TokenStatistics]) -> Finding:
    claim = "Pruning patterns do not agree with radial patterns."
    shares = _shares(tokens)
    beyond: dict[str, list[float]] = {}
    for row in across_methods:
        stages = _first_stages(row, "iou", shares)
        if row["method_a"] in FAMILIES["Pruning"] and row["method_b"] in FAMILIES["Static"] and stages is not None:
            value, chance = stages[0], chance_iou(*stages[1:])
            if row["keep_rate_a"] == row["keep_rate_b"] and chance < 1:
                beyond.setdefault(row["method_a"], []).append((value - chance) / (1 - chance))
    if not beyond:
        return Finding(claim, "not examined", "needs a pruning method and a radial pattern at one keep rate")
    means = {method: statistics.fmean(values) for method, values in beyond.items()}
    words = ", ".join(f"{TITLES[method]} {value:.2f}" for method, value in means.items())
    verdict: Verdict = "holds" if max(means.values()) < _AGREES else "does not hold"
    return Finding(claim, verdict, f"IoU of the first stage, beyond chance: {words}")


def _backbones_disagree(across_backbones: Sequence[Row], tokens: Sequence[TokenStatistics]) -> Finding:
    claim = "Pruning patterns do not agree across backbone capacities."
    agreement = _agreements(across_backbones, _shares(tokens))
    if not agreement:
        return Finding(claim, "not examined", "needs a pruning method on two backbones")
    means = {method: statistics.fmean(values) for method, values in agreement.items()}
    words = ", ".join(f"{TITLES[method]} {value:.2f}" for method, value in means.items())
    verdict: Verdict = "holds" if max(means.values()) < _AGREES else "does not hold"
    return Finding(claim, verdict, f"share of one first stage that the other holds, beyond chance: {words}")


def _little_reduction_helps(scores: _Scores) -> Finding:
    claim = "At 90 % Top-K, EViT, DynamicViT, ATS and ToMe can pass the unreduced model by up to half a point."
    methods = [name for name in ("topk", "evit", "dynamicvit", "ats", "tome") if (name, 0.9) in scores]
    if not methods or (UNREDUCED, None) not in scores:
        return Finding(claim, "not examined", "needs the unreduced model and one of these at 0.9")
    gaps = {method: measure_gap(scores[method, 0.9], scores[UNREDUCED, None]) for method in methods}
    verdicts = {_verdict(gap) for gap in gaps.values()}
    verdict: Verdict = "undecided" if "undecided" in verdicts else "does not hold"
    if "holds" in verdicts:
        verdict = "holds"
    words = "; ".join(f"{TITLES[method]} {gap.words} points" for method, gap in gaps.items())
    return Finding(claim, verdict, _evidence(words, list(gaps.values()) if verdict == "undecided" else ()))


_FOLLOWING = ("procrustes", "nmi", "iou")


def _strengths(rows: Sequence[Row]) -> dict[str, float]:
    """Mean size of the correlations of each similarity with the gap in accuracy; over anchors, rates and blocks."""
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if _measured(name) in _FOLLOWING]
    anchors: dict[str, dict[str, list[float]]] = {}
    for row in correlate(rows, "method", columns=columns):
        if row["pairs"] > 2 and math.isfinite(row["spearman"]):
            found = anchors.setdefault(_measured(row["measure"]), {})
            found.setdefault(row["method"], []).append(row["spearman"])
    # Chance averages away; the sign says only whether the anchor is the better one.
    return {
        measure: statistics.fmean(abs(statistics.fmean(values)) for values in found.values())
        for measure, found in anchors.items()
    }


def _measured(column: str) -> str:
    """Turn ``iou_3`` into ``iou``; return nothing for a deviation."""
    return "" if "_std_" in column else column.rsplit("_", 1)[0]


def _follows(strength: Mapping[str, float]) -> tuple[float, float]:
    """Return how far the weaker of Procrustes and NMI is above IoU, and IoU above a moderate correlation."""
    return min(strength["procrustes"], strength["nmi"]) - strength["iou"], strength["iou"] - _MODERATE


def _similarities_follow(rows: Sequence[Row]) -> Finding:
    claim = "Procrustes distance and NMI follow the gap in accuracy closely, IoU of kept tokens moderately."
    strength = _strengths(rows)
    if len(strength) < len(_FOLLOWING):
        return Finding(claim, "not examined", "needs features, assignments and kept sets of several methods")
    methods = sorted({row[f"method_{end}"] for row in rows for end in "ab"} - {UNREDUCED})
    # Images are many and methods few, so the interval is over the choice of methods, each of which contributes.
    without = [
        _strengths([row for row in rows if method not in (row["method_a"], row["method_b"])]) for method in methods
    ]
    left = [_follows(found) for found in without if len(found) == len(_FOLLOWING)]
    errors = [_jackknife_error([values[index] for values in left]) for index in (0, 1)]
    margins = _follows(strength)
    beyond = [abs(margin) > 2 * error for margin, error in zip(margins, errors, strict=True)]
    verdict: Verdict = "undecided"
    if all(margin > 0 for margin in margins) and all(beyond):
        verdict = "holds"
    elif any(margin < 0 and sure for margin, sure in zip(margins, beyond, strict=True)):
        verdict = "does not hold"
    words = ", ".join(f"{name} {value:.2f}" for name, value in strength.items())
    evidence = (
        f"Spearman correlation, mean over rates and blocks: {words}. Procrustes or NMI above IoU by {margins[0]:+.2f} "
        f"± {errors[0]:.2f} (one standard error over {counted(len(methods), 'method')})"
    )
    if verdict == "undecided" and all(map(math.isfinite, errors)):
        open_margins = [(m, e) for m, e, sure in zip(margins, errors, beyond, strict=True) if not sure and m]
        needed = max((len(methods) * (2 * error / margin) ** 2 for margin, error in open_margins), default=math.inf)
        least = 2 * max(error for _, error in open_margins) if open_margins else 2 * max(errors)
        evidence += f". Undecided: {counted(len(methods), 'method')} decide differences above {least:.2f}"
        evidence += f", this one needs {math.ceil(needed)}; more images do not help" if math.isfinite(needed) else ""
    return Finding(claim, verdict, evidence)


def _jackknife_error(values: Sequence[float]) -> float:
    """Return the standard error of a statistic from its values with each of the n parts left out; NaN for n < 3."""
    if len(values) < 3:
        return math.nan
    return math.sqrt((len(values) - 1) * statistics.pvariance(values))


def _counted(rows: Sequence[Row], floors: Floors) -> list[Row]:
    """Return pairs of models that both count."""
    return [row for row in rows if all(floors.counts(row[f"backbone_{end}"], row[f"accuracy_{end}"]) for end in "ab")]


def find(
    recordings: Sequence[Recording],
    tokens: Sequence[TokenStatistics],
    rows: Mapping[str, Sequence[Row]],
    floors: Floors | None = None,
) -> list[Finding]:
    """Hold the paper's findings against the recordings of one data set and its main backbone.

    Args:
        recordings: of the unreduced model and of reduced ones; variants of the radial patterns are named
            ``radial_l1`` and so on.
        tokens: :func:`~fastreduce.study.comparison.token_statistics` of each, and of those on other backbones.
        rows: what :func:`~fastreduce.study.comparison.compare` gave along ``"keep_rate"``, ``"backbone"`` and
            ``"method"``; any may be missing.
        floors: above which models count; by default from ``recordings``. Give them where there are other backbones.

    Returns:
        A finding for each claim, in the paper's order. One that only models below the floor could decide is undecided.
    """
    floors = Floors.of(recordings) if floors is None else floors
    below = floors.below(recordings)
    failed = {(run.backbone, run.method, run.keep_rate) for run in below}
    judged = [one for one in recordings if (one.run.backbone, one.run.method, one.run.keep_rate) not in failed]

    def held(claim: Callable[[_Scores, list[float], Mapping[str, Sequence[Row]]], Finding]) -> Finding:
        found = []
        for group, only in ((judged, True), (recordings, False)):
            scores = _scores(group)
            rates = sorted({rate for _, rate in scores if rate is not None}, reverse=True)
            across = {axis: rows.get(axis, ()) for axis in ("keep_rate", "backbone", "method")}
            across = {axis: _counted(held, floors) if only else held for axis, held in across.items()}
            found.append(claim(scores, rates, across))
        if found[0].verdict == "not examined" != found[1].verdict:
            why = f": {_listed(below, 4)}" if below else " of its backbone"
            return Finding(found[0].claim, "undecided", f"too few of its models are above the floor{why}")
        return found[0]

    merging = ("Hard merging", "Soft merging")
    return [
        held(lambda scores, rates, across: _top_k_is_strong(scores, rates)),
        held(lambda scores, rates, across: _evit_is_above(scores, rates)),
        held(
            lambda scores, rates, across: _family_beats(
                scores, rates, "Pruning beats merging in general.", "Pruning", merging
            )
        ),
        held(
            lambda scores, rates, across: _family_beats(
                scores, rates, "Hard merging beats soft merging.", "Hard merging", ("Soft merging",)
            )
        ),
        held(lambda scores, rates, across: _static_beats_soft(scores, rates)),
        held(lambda scores, rates, across: _rates_agree(across["keep_rate"], tokens)),
        held(lambda scores, rates, across: _backbones_disagree(across["backbone"], tokens)),
        held(lambda scores, rates, across: _radial_disagrees(across["method"], tokens)),
        held(lambda scores, rates, across: _little_reduction_helps(scores)),
        held(lambda scores, rates, across: _similarities_follow(across["method"])),
    ]
