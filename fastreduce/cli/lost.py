"""Losses for ``compare`` and ``plan``: fidelity of every setting on the user's pictures or on photographs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..arguments import counted, fixed
from .options import user_errors
from .screen import Page

if TYPE_CHECKING:
    from ..quality.images import ImageSet

__all__ = ["AT_LEAST", "FIDELITY_NAMES", "Lost", "choose", "headline", "print_losses"]

AT_LEAST = 0.99
_SHARE = 0.25  # share of a command's time that goes into fidelity
_ORDER = 7  # seed of the order in which a folder's pictures are taken
_BATCH = 4


class Lost:
    """Fidelity of several settings of one model.

    Args:
        settings: of the command.
        classes: of the model's head, 0 without one.

    Attributes:
        rows: for every setting what :meth:`fastreduce.Fidelity.summary` says; empty before :meth:`measure`.

    Raises:
        ValueError: no pictures, or labels that are needed and do not fit.
    """

    def __init__(self, settings: Any, classes: int):
        import numpy as np

        from ..quality.images import folder_images, sample_images

        self.settings = settings
        images: ImageSet
        if settings.images is None:
            images = sample_images(1)
        else:
            images = folder_images(settings.images, classes)
            images = images.take(np.random.default_rng(_ORDER).permutation(len(images)).tolist())
        if settings.image_count is not None:
            images = images.take(range(min(settings.image_count, len(images))))
        if settings.at_most_lost is not None and not images.labels:
            raise ValueError(f"--at-most-lost needs labels, and there are none: {images.note}")
        self.images = images
        self.rows: dict[Any, dict[str, Any]] = {}

    def measure(
        self, unreduced: Any, models: Mapping[Any, Any], config: Mapping[str, Any], progress: Callable[..., None]
    ) -> None:
        """Run every model on the same pictures, as many as there are or as fit into the time.

        Raises:
            UserError: a picture that cannot be read.
        """
        from ..quality import fidelities

        settings = self.settings
        limit = float("inf") if settings.image_count is not None else _SHARE * settings.seconds
        found = fidelities(
            unreduced,
            models,
            self._batches(config),
            seconds=limit,
            progress=lambda done: progress("fidelity", done, len(self.images)),
        )
        self.rows = {name: one.summary() for name, one in found.items()}

    def _batches(self, config: Mapping[str, Any]) -> Iterator[Any]:
        with user_errors():  # of reading alone: what the models raise does not come through here
            yield from self.images.batches(config, _BATCH)

    def keeps(self, name: Any) -> bool:
        """Return whether a setting keeps what was asked for, or 0.99 if nothing was."""
        row = self.rows[name]
        if self.settings.at_most_lost is not None:
            return bool(row["accuracy"]["points_lost"] <= self.settings.at_most_lost)
        least = AT_LEAST if self.settings.at_least is None else self.settings.at_least
        return bool(headline(row) >= least)

    @property
    def wanted(self) -> str:
        """Requirements that a setting has to meet, in words."""
        if self.settings.at_most_lost is not None:
            return f"at most {counted(self.settings.at_most_lost, 'point', 'g')} of accuracy lost"
        return f"fidelity at least {self.settings.at_least or AT_LEAST:g}"

    def result(self) -> dict[str, Any]:
        """Return what was measured on, ready for JSON."""
        done = next(iter(self.rows.values()))["images"] if self.rows else 0
        return {
            "images": done,
            "source": self.images.source,
            "labels": self.images.note if self.settings.images is not None else "",
            "wanted": self.wanted,
        }


def headline(row: Mapping[str, Any]) -> float:
    """Return the one number that stands for fidelity: the mean cosine of what the head reads."""
    return float(row["pooled_cosine"]["mean"])


def choose(rows: Sequence[Mapping[str, Any]], keeps: Callable[[Mapping[str, Any]], bool]) -> Mapping[str, Any] | None:
    """Return the fastest of the settings that keep what is wanted and are faster than the unreduced model."""
    fitting = [row for row in rows if row["speedup"] > 1 and keeps(row)]
    return max(fitting, key=lambda row: row["speedup"], default=None)


FIDELITY_NAMES = {
    "agreement": "same class",
    "class_cosine": "class token",
    "pooled_cosine": "pooled",
    "patch_cosine": "patches",
    "patch_cosine_last": "p. last",
}


def print_losses(
    page: Page, result: Mapping[str, Any], rows: Sequence[tuple[str, Mapping[str, Any]]], batch: int | None = None
) -> None:
    """Print the table of fidelity: a line for every setting, with the worst decile of the pooled cosine.

    Args:
        page: to print on.
        result: of the command, with ``fidelity`` in it.
        rows: what each line is called, and the setting's row, with ``fidelity`` and ``speedup``.
        batch: the batch of the speeds, where there are several.
    """
    rows = [(name, row) for name, row in rows if row.get("fidelity")]
    if not rows:
        return
    about = result["fidelity"]
    measures = [name for name in FIDELITY_NAMES if name in rows[0][1]["fidelity"]]
    labelled = "accuracy" in rows[0][1]["fidelity"]
    headings = ["setting", "full", *(FIDELITY_NAMES[name] for name in measures), "worst 10 %"]
    headings += ["top-1", "lost", "interval"] if labelled else []
    cells = []
    for name, row in rows:
        lost = row["fidelity"]
        line = [name, f"{row['speedup']:.2f}", *(f"{lost[measure]['mean']:.3f}" for measure in measures)]
        line.append(f"{lost['pooled_cosine']['worst_decile']:.3f}")
        if labelled:
            accuracy = lost["accuracy"]
            low, high = (-100 * value for value in reversed(accuracy["interval"]))
            line += [
                f"{100 * accuracy['after']:.1f}",
                fixed(accuracy["points_lost"], 1),
                f"{fixed(low, 1)} to {fixed(high, 1)}",
            ]
        cells.append(line)
    page.table(f"fidelity, {counted(about['images'], 'image')}", headings, cells)
    for words in _legend(result, rows, labelled, batch):
        page.line(words, "dim")


def _legend(
    result: Mapping[str, Any], rows: Sequence[tuple[str, Mapping[str, Any]]], labelled: bool, batch: int | None
) -> list[str]:
    about, at_batch = result["fidelity"], "" if batch is None else f" at batch {batch}"
    words = [
        f"Fidelity to the unreduced model, means over {counted(about['images'], 'image')} ({about['source']}). same "
        "class: share with the same top-1. The others are cosines: of the class token, of what the head reads "
        "(pooled), of the patches on the full grid, where a dropped one has zeros, or its last token (p. last). "
        "worst 10 %: a tenth of the images have a lower pooled cosine. full: times as fast as the unreduced "
        f"model{at_batch}."
    ]
    if labelled:
        before = rows[0][1]["fidelity"]["accuracy"]["before"]
        words.append(
            f"top-1: accuracy in per cent, {100 * before:.1f} unreduced; lost: points of it, with a 95 % interval, "
            f"paired over images; {about['labels']}."
        )
    elif about["labels"]:
        words.append(f"Accuracy is not measured: {about['labels']}.")
    if result["random_weights"]:
        words.append("The weights are random: these figures say nothing about a trained model.")
    return words
