"""``fastreduce compare``: every method on a photo, measured and drawn."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..speed.settings import KEEP_RATES, CompareSettings
from . import options as given
from .options import numbers, user_errors
from .output import INTERRUPTED, Output, measure, stoppable, with_ending
from .screen import progress_bar
from .tables import count, is_wrong, print_comparison, title_of

if TYPE_CHECKING:
    from ..speed.comparison import Comparison, Drawn, Entry

__all__ = ["compare"]


def compare(
    image: Annotated[
        str, typer.Argument(help="A picture, or one of scikit-learn's: flower.jpg, china.jpg.")
    ] = "flower.jpg",
    model: given.Model = "deit_small_patch16_224",
    checkpoint: given.Checkpoint = None,
    pretrained: given.Pretrained = False,
    methods: given.Methods = None,
    method_option: given.MethodOption = None,
    keep_rate: Annotated[
        list[str] | None, typer.Option(help="Keep rate; may be given several times. (default: 0.7 and 0.5)")
    ] = None,
    at: given.At = None,
    batch: Annotated[
        str | None,
        typer.Option(metavar="N", help="Images in a batch. (default: 8, or what a slow machine can do in the time)"),
    ] = None,
    rounds: Annotated[
        str | None, typer.Option(metavar="N", help="Rounds. (default: as many as fit in the time, 3 to 20)")
    ] = None,
    seconds: Annotated[
        str, typer.Option(metavar="SECONDS", help="The time, roughly, if --rounds is not given.")
    ] = "150",
    device: given.Device = None,
    dtype: given.Dtype = "float32",
    backend: given.Backend = "auto",
    compile: given.Compile = False,
    fused_baseline: Annotated[
        bool,
        typer.Option("--fused-baseline", help="The plain algorithm gets fused attention where possible."),
    ] = False,
    threads: given.Threads = None,
    seed: Annotated[
        str, typer.Option(metavar="N", help="Of random weights; the default follows the shape of the flower.")
    ] = "10",
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Folder for the pictures.")] = "fastreduce-compare",
    pictures: Annotated[bool, typer.Option(help="Whether to draw them.")] = True,
    json_file: given.Json = None,
) -> None:
    """Measure every method on a photo and draw what it keeps and merges.

    Beside each method run, in turns, the unreduced model, the free slice (tokens simply cut off, a decision that costs
    nothing) and the published algorithm written plainly, which is also the reference in float64.
    """
    started = time.perf_counter()
    with user_errors():
        settings = CompareSettings(
            image=image,
            model=model,
            checkpoint=checkpoint,
            pretrained=pretrained,
            methods=given.names("--methods", methods),
            method_options=tuple(method_option or ()),
            keep_rates=numbers("--keep-rate", "0.7,0.5", keep_rate, float) or KEEP_RATES,
            at=numbers("--at", "3,6,9", at, int),
            batch=given.whole_number("--batch", batch),
            rounds=given.whole_number("--rounds", rounds),
            seconds=given.number("--seconds", seconds),
            device=device,
            dtype=dtype.lower(),
            backend=backend.lower(),
            compile=compile,
            fused_baseline=fused_baseline,
            threads=given.whole_number("--threads", threads),
            seed=given.whole_number("--seed", seed),
        )
        settings.check()
        output = Output(json_file, out if pictures else None, (image, checkpoint))
    with stoppable("building models"), progress_bar(lines=True) as progress:
        from ..speed.comparison import Comparison

        with user_errors():
            comparison = Comparison(settings, started)
        finished = measure(comparison, progress)
    _hand_over_comparison(comparison, output, finished)


def _hand_over_comparison(comparison: Comparison, output: Output, finished: bool) -> None:
    """Give out what was measured, the surest first."""
    result = with_ending(comparison, finished)
    output.write_json(result)
    output.write_page(lambda page: print_comparison(page, result))
    if finished and output.folder is not None:
        _draw_all(comparison, output, result)
    output.end()
    if not finished:
        raise typer.Exit(INTERRUPTED)
    if any(is_wrong(row) for row in result["methods"]):
        raise typer.Exit(1)


def _draw_all(comparison: Comparison, output: Output, result: dict[str, Any]) -> None:
    """Draw a picture for every method and keep rate, and note in the JSON where they are."""
    drawn = 0
    with stoppable("drawing"), progress_bar(lines=True) as progress:
        for done, (entry, row) in enumerate(zip(comparison.entries, result["methods"], strict=True)):
            progress("drawing", done, len(comparison.entries))
            if (file := output.draw(f"{entry.slug}.png", _picture(comparison, entry))) is not None:
                row["picture"] = str(file)
                drawn += 1
    if drawn:
        result["wall_seconds"] = comparison.elapsed
        output.rewrite_json(result)
        output.write_page(lambda page: page.line(f"{count(drawn, 'picture')} in {output.folder}{os.sep}", wrap=False))


def _picture(comparison: Comparison, entry: Entry) -> Callable[[Path], None]:
    """Return what draws the stages of one method at one keep rate into a file."""
    from .. import draw

    photo, patches = comparison.picture(), comparison.grid[0] * comparison.grid[1]
    panels: list[draw.Panel] = [(photo, "input", f"{patches} patches")]
    for stage in entry.stages:
        if stage.kept is not None:
            panel = draw.grey_dropped(photo, stage.kept)
        else:
            assert stage.slot is not None
            panel = draw.fill_merged(photo, stage.slot)
        panels.append((panel, f"block {stage.block}", f"{_tokens(stage)} of {patches} tokens"))
    title = title_of(entry.method, {**entry.options, **comparison.method_options.get(entry.method, {})})
    subtitle = f"keep rate {entry.keep_rate:g}  ·  {comparison.settings.model}"
    note = _note(comparison, entry)
    return lambda file: draw.save_panels(file, panels, title, subtitle, note)


def _tokens(stage: Drawn) -> str:
    """Return how many tokens a stage leaves, those that stand for several apart."""
    if stage.kept is None or stage.soft:
        return f"{stage.count}"
    alone = int(stage.kept.sum())
    return f"{alone} + {stage.count - alone} fused" if stage.count > alone else f"{alone}"


def _note(comparison: Comparison, entry: Entry) -> str:
    """Return the small print of a picture."""
    notes = []
    if any(stage.soft for stage in entry.stages):
        notes.append("shown: the patch that weighs most in each token, followed from stage to stage")
    elif any(stage.kept is not None and stage.count > stage.kept.sum() for stage in entry.stages):
        notes.append("grey patches are fused into one token at each stage")
    if comparison.random_weights:
        notes.append(f"{comparison.weights}: the pattern says nothing about a trained model")
    return "; ".join(notes)
