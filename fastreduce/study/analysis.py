"""Findings of a study: similarities, correlations and findings, from its recordings."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from functools import cached_property

from .comparison import Row, TokenStatistics, compare, compare_depth_maps, correlate, token_statistics
from .evaluate import Evaluation
from .findings import Finding, Floors, find, image_scores
from .gaps import Gap, measure_gap
from .pictures import Result
from .record import UNREDUCED, Recording

__all__ = ["Study", "analyse"]


@dataclasses.dataclass(frozen=True)
class Study:
    """Results of a study.

    Attributes:
        recordings: the unreduced model first, then the reduced ones, then models of further backbones.
        evaluations: of the same models.
        tokens: of the same models.
        rows: similarities along ``"keep_rate"`` and ``"method"``, of the study's own backbone, and along
            ``"backbone"``; of depth maps along these under ``"depth_…"``.
        correlations: of similarities along ``"method"`` with the difference in accuracy.
        floors: how accurate a model must be for its findings to count.
        findings: the paper's, held against all this.
        seconds: that every part took; training is the sum over its processes.
        unwritten: files that could not be written, with the reason.
    """

    recordings: list[Recording]
    evaluations: list[Evaluation]
    tokens: list[TokenStatistics]
    rows: dict[str, list[Row]]
    correlations: list[Row]
    floors: Floors
    findings: list[Finding]
    seconds: dict[str, float]
    unwritten: list[str] = dataclasses.field(default_factory=list)

    def result(self, index: int) -> Result:
        """Return the result of one model, for pictures."""
        run, evaluation = self.recordings[index].run, self.evaluations[index]
        rate = 1.0 if run.keep_rate is None else run.keep_rate
        return Result(run.method, rate, run.accuracy, evaluation.images_per_second)

    @cached_property
    def gaps(self) -> list[Gap | None]:
        """Gaps between each model and the unreduced one of its backbone.

        None stands for the unreduced model itself, and for several labels.
        """
        scores = [image_scores(recording) for recording in self.recordings]
        unreduced = {
            recording.run.backbone: own
            for recording, own in zip(self.recordings, scores, strict=True)
            if recording.run.method == UNREDUCED
        }
        found: list[Gap | None] = []
        for recording, own in zip(self.recordings, scores, strict=True):
            base = unreduced.get(recording.run.backbone)
            if base is None or own is None or recording.run.method == UNREDUCED:
                found.append(None)
            else:
                found.append(measure_gap(own, base))
        return found

    @property
    def backbone(self) -> str:
        """The name of the study's own."""
        return self.recordings[0].run.backbone

    @property
    def results(self) -> list[Result]:
        """Results of the reduced models of the study's own backbone."""
        own = [index for index, one in enumerate(self.recordings) if one.run.backbone == self.backbone]
        return [self.result(index) for index in own[1:]]

    def recording(self, method: str, keep_rate: float | None) -> Recording | None:
        """Return the recording of one model of the study's own backbone, if there is one."""
        wanted = self.backbone, method, keep_rate
        runs = {(one.run.backbone, one.run.method, one.run.keep_rate): one for one in self.recordings}
        return runs.get(wanted)


def analyse(recordings: Sequence[Recording], evaluations: Sequence[Evaluation], seconds: dict[str, float]) -> Study:
    """Compare and correlate what was recorded.

    Args:
        recordings: of one data set; the study's own backbone comes first, and of its models the unreduced one.
        evaluations: of the same models.
        seconds: that the parts before took; this part's are added.
    """
    start = time.perf_counter()
    tokens = [token_statistics(recording) for recording in recordings]
    backbone = recordings[0].run.backbone
    own = [recording for recording in recordings if recording.run.backbone == backbone]
    own_tokens = [entry for entry in tokens if entry.run.backbone == backbone]
    rows: dict[str, list[Row]] = {}
    for axis in ("keep_rate", "method"):
        rows[axis] = compare(own, axis)
        rows[f"depth_{axis}"] = compare_depth_maps(own_tokens, axis)
    if len(own) < len(recordings):
        rows["backbone"] = compare(recordings, "backbone")
        rows["depth_backbone"] = compare_depth_maps(tokens, "backbone")
    correlations = correlate(rows["method"], "method")
    floors = Floors.of(recordings)
    findings = find(own, tokens, rows, floors)
    seconds = seconds | {"comparing": time.perf_counter() - start}
    return Study(list(recordings), list(evaluations), tokens, rows, correlations, floors, findings, seconds)
