"""``fastreduce plan``: where a method pays on this machine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..speed.settings import PlanSettings
from . import options as given
from .lost import Lost, print_losses
from .options import numbers, user_errors
from .output import INTERRUPTED, Output, measure, stoppable, tell, with_ending
from .screen import Page, progress_bar
from .tables import print_plan, title_of

if TYPE_CHECKING:
    from ..speed.payoff import Planner

__all__ = ["plan"]


def plan(
    model: given.Model = "deit_small_patch16_224",
    checkpoint: given.Checkpoint = None,
    pretrained: given.Pretrained = None,
    method: given.OneMethod = None,
    method_option: given.MethodOption = None,
    keep_rate: Annotated[
        list[str] | None,
        typer.Option(help="Keep rate; may be given several times. (default: 0.9 to 0.4 in tenths, and 0.25)"),
    ] = None,
    at: given.At = None,
    images: given.Images = None,
    image_count: given.ImageCount = None,
    at_least: given.AtLeast = None,
    at_most_lost: given.AtMostLost = None,
    fidelity: given.Fidelity = True,
    batch: Annotated[
        list[str] | None,
        typer.Option(help="Images in a batch; may be given several times. (default: 1,4,16; CUDA: 1,8,64,256)"),
    ] = None,
    round_to: Annotated[
        str,
        typer.Option(
            help="Token counts, prefix included: a number rounds them up to its multiples; auto times that, too, where "
            "reduction pays, and proposes it if it is faster; none."
        ),
    ] = "auto",
    rounds: Annotated[
        str | None,
        typer.Option(metavar="N", help="Rounds; a verdict takes 5. (default: as many as fit in the time, 6 to 50)"),
    ] = None,
    seconds: Annotated[
        str, typer.Option(metavar="SECONDS", help="The time, roughly, if --rounds is not given.")
    ] = "60",
    device: given.Device = None,
    dtype: given.Dtype = "float32",
    backend: given.Backend = "auto",
    compile: given.Compile = False,
    graphs: Annotated[bool, typer.Option("--graphs", help="Replay CUDA graphs.")] = False,
    threads: given.Threads = None,
    seed: Annotated[str, typer.Option(metavar="N", help="Of random weights.")] = "10",
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Folder for the plot.")] = "fastreduce-plan",
    pictures: Annotated[bool, typer.Option(help="Whether to draw it.")] = True,
    json_file: given.Json = None,
    csv_file: Annotated[
        str | None, typer.Option("--csv", metavar="FILE", help="Write the speeds as a table with timm's columns.")
    ] = None,
) -> None:
    """Measure on this machine from which keep rate and batch on a method pays, and say so when it does not.

    The unreduced and the reduced models take turns on views of a photo, after every reduced model's logits were held
    against the published algorithm, written plainly, in float64. Fidelity to the unreduced model stands beside each
    speed-up, and decides: the fastest setting that keeps enough is recommended.
    """
    started = time.perf_counter()
    with user_errors():
        names = given.names("--method", method) or ("topk",)
        if len(names) > 1:
            raise ValueError(f"--method: plan takes one method, got {','.join(names)!r}; compare takes several")
        settings = PlanSettings(
            model=model,
            checkpoint=checkpoint,
            pretrained=given.wish(pretrained, checkpoint),
            images=images,
            image_count=given.whole_number("--image-count", image_count),
            at_least=given.optional_number("--at-least", at_least),
            at_most_lost=given.optional_number("--at-most-lost", at_most_lost),
            method=names[0],
            method_options=tuple(method_option or ()),
            keep_rates=numbers("--keep-rate", "0.7,0.5", keep_rate, float) or (),
            at=numbers("--at", "3,6,9", at, int),
            batches=numbers("--batch", "1,16", batch, int) or (),
            round_to=round_to.lower(),
            rounds=given.whole_number("--rounds", rounds),
            seconds=given.number("--seconds", seconds),
            device=device,
            dtype=dtype.lower(),
            backend=backend.lower(),
            compile=compile,
            graphs=graphs,
            threads=given.whole_number("--threads", threads),
            seed=given.whole_number("--seed", seed),
        )
        settings.check()
        given.check_fidelity(
            fidelity, images=images, image_count=image_count, at_least=at_least, at_most_lost=at_most_lost
        )
        output = Output(json_file, out if pictures else None, (checkpoint,))
        table = None if csv_file is None else given.output_file("--csv", csv_file, (checkpoint,))
    with stoppable("building models"), progress_bar(lines=True) as progress:
        from ..speed.payoff import Planner
        from ..speed.timm_table import as_csv

        with user_errors():
            planner = Planner(settings, started)
            lost = Lost(settings, planner.comparison.model.num_classes) if fidelity else None
        tell(planner.comparison.note)
        finished = measure(planner, progress, lambda: _measure_losses(planner, lost, progress))
    result = _with_losses(with_ending(planner, finished), lost)
    output.write_json(result)
    if table is not None:
        output.make(table, as_csv(planner.timm_rows()))
    output.write_page(lambda page: _print(page, result))
    if finished and output.folder is not None and not result["wrong"]:
        _draw_plan(planner.slug, output, result)
    output.end()
    if not finished:
        raise typer.Exit(INTERRUPTED)
    if result["wrong"]:
        raise typer.Exit(1)


def _measure_losses(planner: Planner, lost: Lost | None, progress: Any) -> None:
    """Measure fidelity at every keep rate, and let it decide; of random weights only if that was asked for."""
    if lost is None or planner.wrong:
        return
    comparison = planner.comparison
    models = {rate: entry.model for rate, entry in planner.entries.items()}
    lost.measure(comparison.model, models, comparison.config, progress)
    asked = planner.settings.at_least is not None or planner.settings.at_most_lost is not None
    if asked or not comparison.random_weights:
        planner.keeping = frozenset(rate for rate in models if lost.keeps(rate))
        planner.wanted = lost.wanted


def _print(page: Page, result: dict[str, Any]) -> None:
    """Print the plan, and what each keep rate costs."""
    print_plan(page, result)
    if "fidelity" not in result or not result["batches"]:
        return
    last = result["batches"][-1]
    speeds = {row["keep_rate"]: row["speedup"] for row in last["rates"]}
    rows = [(f"{row['keep_rate']:g}", {**row, "speedup": speeds[row["keep_rate"]]}) for row in result["rates"]]
    print_losses(page, result, rows, last["batch"] if len(result["batches"]) > 1 else None)


def _with_losses(result: dict[str, Any], lost: Lost | None) -> dict[str, Any]:
    """Return the result with the fidelity of every keep rate."""
    if lost is None or not lost.rows:
        return result
    rates = [
        {**row, "fidelity": lost.rows[row["keep_rate"]]} for row in result["rates"] if row["keep_rate"] in lost.rows
    ]
    return {**result, "rates": rates, "fidelity": lost.result()}


def _draw_plan(slug: str, output: Output, result: dict[str, Any]) -> None:
    """Draw the speed-ups against the keep rates, and note in the JSON where."""
    with stoppable("drawing"):
        file = output.draw(f"{slug}.png", lambda file: _save_curves(result, file))
    if file is not None:
        result["picture"] = str(file)
        output.rewrite_json(result)
        output.write_page(lambda page: page.line(f"plot: {file}", wrap=False))


def _save_curves(result: Mapping[str, Any], file: Path) -> None:
    from .. import draw

    curves: list[draw.Curve] = []
    for row in result["batches"][: draw.MOST_CURVES]:
        points = [
            (rate["keep_rate"], rate["speedup"], *rate["speedup_quartiles"], rate["verdict"] == "pays")
            for rate in row["rates"]
        ]
        curves.append((f"batch {row['batch']}", points))
    mode = "".join([", compiled" if result["compile"] else "", ", CUDA graphs" if result["graphs"] else ""])
    draw.save_curves(
        file,
        curves,
        f"{title_of(result['method'], result['options'])}: when reduction pays",
        f"{result['model']}, {result['dtype']}{mode}, {result['environment']['device_name']}",
        "bands: quartiles of the rounds; filled: pays, the lower quartile is above 1.02 and above the noise",
    )
