"""``fastreduce compare``: every method on a photo, measured and drawn."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..arguments import counted
from ..speed.settings import KEEP_RATES, CompareSettings
from . import options as given
from .lost import FIDELITY_NAMES, Lost, choose, headline, print_losses
from .options import numbers, user_errors
from .output import INTERRUPTED, Output, measure, stoppable, tell, with_ending
from .screen import Page, progress_bar
from .tables import is_wrong, print_comparison, title_of, where

if TYPE_CHECKING:
    from .. import draw
    from ..speed.comparison import Comparison, Entry
    from ..speed.decisions import Drawn

__all__ = ["compare"]


def compare(
    image: Annotated[
        str, typer.Argument(help="A picture, or one of scikit-learn's: flower.jpg, china.jpg.")
    ] = "flower.jpg",
    model: given.Model = "deit_small_patch16_224",
    checkpoint: given.Checkpoint = None,
    pretrained: given.Pretrained = None,
    methods: given.Methods = None,
    method_option: given.MethodOption = None,
    keep_rate: Annotated[
        list[str] | None, typer.Option(help="Keep rate; may be given several times. (default: 0.7 and 0.5)")
    ] = None,
    at: given.At = None,
    images: given.Images = None,
    image_count: given.ImageCount = None,
    at_least: given.AtLeast = None,
    at_most_lost: given.AtMostLost = None,
    fidelity: given.Fidelity = True,
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
            pretrained=given.wish(pretrained, checkpoint),
            images=images,
            image_count=given.whole_number("--image-count", image_count),
            at_least=given.optional_number("--at-least", at_least),
            at_most_lost=given.optional_number("--at-most-lost", at_most_lost),
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
            threads=given.whole_number("--threads", threads),
            seed=given.whole_number("--seed", seed),
        )
        settings.check()
        given.check_fidelity(
            fidelity, images=images, image_count=image_count, at_least=at_least, at_most_lost=at_most_lost
        )
        output = Output(json_file, out if pictures else None, (image, checkpoint))
    with stoppable("building models"), progress_bar(lines=True) as progress:
        from ..speed.comparison import Comparison

        with user_errors():
            comparison = Comparison(settings, started)
            lost = Lost(settings, comparison.model.num_classes) if fidelity else None
        tell(comparison.note)
        finished = measure(comparison, progress, lambda: _measure_losses(comparison, lost, progress))
    _hand_over_comparison(comparison, output, lost, finished)


def _measure_losses(comparison: Comparison, lost: Lost | None, progress: Any) -> None:
    if lost is not None:
        models = {entry.slug: entry.model for entry in comparison.entries}
        lost.measure(comparison.model, models, comparison.config, progress)


def _with_losses(comparison: Comparison, lost: Lost | None, result: dict[str, Any]) -> dict[str, Any]:
    """Return the result with every setting's fidelity, and the setting to choose."""
    if lost is None or not lost.rows:
        return result
    slugs = [entry.slug for entry in comparison.entries]
    methods = [{**row, "fidelity": lost.rows[slug]} for slug, row in zip(slugs, result["methods"], strict=True)]
    chosen = None
    settings = comparison.settings
    if not comparison.random_weights or settings.at_least is not None or settings.at_most_lost is not None:
        kept = {id(row): lost.keeps(slug) for slug, row in zip(slugs, methods, strict=True)}
        chosen = choose(methods, lambda row: kept[id(row)])
    words = None if chosen is None else {"label": chosen["label"], "keep_rate": chosen["keep_rate"]}
    return {**result, "methods": methods, "fidelity": {**lost.result(), "chosen": words}}


def _print(page: Page, result: dict[str, Any]) -> None:
    """Print speed, then what each setting costs, and the one to choose."""
    print_comparison(page, result)
    if "fidelity" not in result:
        return
    print_losses(page, result, [(f"{row['label']} {row['keep_rate']:g}", row) for row in result["methods"]])
    about = result["fidelity"]
    if (chosen := about["chosen"]) is not None:
        page.line(
            f"The fastest with {about['wanted']}: {chosen['label']} at keep rate {chosen['keep_rate']:g}.", "bold"
        )
    elif not result["random_weights"]:
        page.line(f"No setting here has {about['wanted']} and is faster than the unreduced model.", "bold")


def _hand_over_comparison(comparison: Comparison, output: Output, lost: Lost | None, finished: bool) -> None:
    """Give out what was measured, the surest first."""
    result = _with_losses(comparison, lost, with_ending(comparison, finished))
    output.write_json(result)
    output.write_page(lambda page: _print(page, result))
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
        if "fidelity" in result and output.draw("speed-up-and-fidelity.png", partial(_save_tradeoff, result)):
            drawn += 1
        page = output.draw("index.html", partial(_save_page, comparison, result))
    if drawn:
        result["wall_seconds"] = comparison.elapsed
        output.rewrite_json(result)
        words = ["All of it on one page, with sliders: index.html"] if page else []
        words.append(f"{counted(drawn, 'picture')} in {output.folder}{os.sep}")
        output.write_page(lambda sheet: _lines(sheet, words))


def _lines(page: Page, words: list[str]) -> None:
    for line in words:
        page.line(line, wrap=False)


def _panels(comparison: Comparison, entry: Entry) -> list[draw.Panel]:
    """Return the photograph, and what is left of it after every stage."""
    from .. import draw

    photo, patches = comparison.picture(), comparison.grid[0] * comparison.grid[1]
    panels: list[draw.Panel] = [(photo, "input", counted(patches, "patch"))]
    for stage in entry.stages:
        if stage.kept is not None:
            panel = draw.grey_dropped(photo, stage.kept)
        else:
            assert stage.slot is not None
            panel = draw.fill_merged(photo, stage.slot)
        panels.append((panel, f"block {stage.block}", f"{_tokens(stage)} of {counted(patches, 'token')}"))
    return panels


def _picture(comparison: Comparison, entry: Entry) -> Callable[[Path], None]:
    """Return what draws the stages of one method at one keep rate into a file."""
    from .. import draw

    panels = _panels(comparison, entry)
    title = title_of(entry.method, {**entry.options, **comparison.method_options.get(entry.method, {})})
    subtitle = f"keep rate {entry.keep_rate:g}  ·  {comparison.settings.model}"
    note = _note(comparison, entry)
    return lambda file: draw.save_panels(file, panels, title, subtitle, note)


def _save_page(comparison: Comparison, result: dict[str, Any], file: Path) -> None:
    """Write the run as one page."""
    from .webpage import picture_data, webpage

    measures = [{"key": key, "name": name} for key, name in FIDELITY_NAMES.items()]
    first = result["methods"][0].get("fidelity", {})
    measures = [measure for measure in measures if measure["key"] in first]
    measures.sort(key=lambda measure: measure["key"] != "pooled_cosine")
    methods: dict[str, dict[str, Any]] = {}
    place: dict[tuple[str, float], tuple[int, int]] = {}
    for entry, row in zip(comparison.entries, result["methods"], strict=True):
        stages = [
            {"name": name, "words": words, "picture": picture_data(pixels)}
            for pixels, name, words in _panels(comparison, entry)
        ]
        one = methods.setdefault(row["label"], {"label": row["label"], "settings": []})
        place[row["label"], row["keep_rate"]] = list(methods).index(row["label"]), len(one["settings"])
        values = {measure["key"]: row["fidelity"][measure["key"]]["mean"] for measure in measures}
        one["settings"].append(
            {"keep_rate": row["keep_rate"], "speedup": row["speedup"], "measures": values, "stages": stages}
        )
    chosen = result.get("fidelity", {}).get("chosen")
    notes = list(result["doubts"])
    if comparison.random_weights:
        notes.append("the weights are random, so patterns and fidelity say nothing about a trained model")
    page = webpage(
        f"fastreduce compare: {comparison.settings.model}",
        f"{where(result)}, batch {result['batch']}, {counted(result['rounds'], 'round')}",
        "; ".join(notes),
        measures,
        list(methods.values()),
        None if chosen is None else place[chosen["label"], chosen["keep_rate"]],
    )
    file.write_text(page, encoding="utf-8")


def _save_tradeoff(result: dict[str, Any], file: Path) -> None:
    """Draw speed-up against fidelity, a line for every method."""
    from .. import draw

    lines: dict[str, list[tuple[float, float, str]]] = {}
    for row in result["methods"]:
        point = (row["speedup"], headline(row["fidelity"]), f"{row['keep_rate']:g}")
        lines.setdefault(row["label"], []).append(point)
    about = result["fidelity"]
    chosen, note = None, f"keep rates beside the points; {counted(about['images'], 'image')}"
    if about["chosen"] is not None:
        chosen = about["chosen"]["label"], f"{about['chosen']['keep_rate']:g}"
        note += f"; ring: the fastest with {about['wanted']}"
    draw.save_tradeoff(
        file,
        list(lines.items()),
        "What a speed-up costs",
        f"{result['model']}, {result['weights']}, {result['environment']['device_name']}, batch {result['batch']}",
        note,
        chosen,
    )


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
