"""``fastreduce tune``: the schedule found for a model, a machine and a batch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..arguments import counted, fixed
from ..names import compared_methods
from ..speed.settings import MEASURES, TuneSettings
from . import options as given
from .options import user_errors
from .output import INTERRUPTED, Output, print_error, stoppable, tell
from .screen import Cell, Page, progress_bar

if TYPE_CHECKING:
    from ..quality.tuning.run import Tuner

__all__ = ["tune"]

METHODS = ("topk", "evit", "ats", "tome", "kmedoids")
_SEEN = 8  # photographs that a search takes of a folder, and as many that it does not see
_ROUNDS = 7
_TOLD_APART = 5e-4  # differences of fidelity that three digits show


def tune(
    model: given.Model = "deit_small_patch16_224",
    checkpoint: given.Checkpoint = None,
    pretrained: given.Pretrained = None,
    methods: given.Methods = None,
    method_option: given.MethodOption = None,
    images: given.Images = None,
    image_count: Annotated[
        str | None,
        typer.Option(metavar="N", help="How many of them, half of which the search does not see. (default: up to 16)"),
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N", help="Images in a batch.")] = "8",
    speed_up: Annotated[
        str | None, typer.Option(metavar="TIMES", help="How many times as fast. (default: a row from 1.2 to 2)")
    ] = None,
    at_least: given.AtLeast = None,
    at_most_lost: given.AtMostLost = None,
    measure: Annotated[str, typer.Option(help="What counts: " + ", ".join(MEASURES) + ".")] = "pooled_cosine",
    rounds: Annotated[str | None, typer.Option(metavar="N", help="Rounds in which the choices are timed.")] = None,
    device: given.Device = None,
    dtype: given.Dtype = "float32",
    backend: given.Backend = "auto",
    threads: given.Threads = None,
    seed: Annotated[str, typer.Option(metavar="N", help="Of random weights.")] = "10",
    out: Annotated[
        str, typer.Option(metavar="FOLDER", help="Folder for tables, which a later run goes on from, and the plot.")
    ] = "fastreduce-tune",
    pictures: Annotated[bool, typer.Option(help="Whether to draw it.")] = True,
    json_file: given.Json = None,
) -> None:
    """Find blocks and counts for every method: two tables measured here, an exact search, the best measured for real.

    Table one: the time of a block at every token count, and of each method's decision, on this device at this batch.
    Table two: what is lost when a method reduces at one block, on half of the images. The other half, which the search
    does not see, checks what it found. The JSON is what fastreduce.patch(model, config=...) takes.
    """
    with user_errors():
        names = given.names("--methods", methods)
        settings = TuneSettings(
            model=model,
            checkpoint=checkpoint,
            pretrained=given.wish(pretrained, checkpoint),
            methods=names,
            method_options=tuple(method_option or ()),
            images=images,
            image_count=given.whole_number("--image-count", image_count),
            batch=given.whole_number("--batch", batch),
            speed_up=given.optional_number("--speed-up", speed_up),
            at_least=given.optional_number("--at-least", at_least),
            at_most_lost=given.optional_number("--at-most-lost", at_most_lost),
            measure=measure.lower().replace("-", "_"),
            rounds=given.whole_number("--rounds", rounds),
            device=device,
            dtype=dtype.lower(),
            backend=backend.lower(),
            threads=given.whole_number("--threads", threads),
            seed=given.whole_number("--seed", seed),
        )
        settings.check()
        output = Output(str(Path(out) / "tune.json") if json_file is None else json_file, out, (checkpoint,))
    with stoppable("building models"), progress_bar(lines=True) as progress:
        with user_errors():
            tuner, about = _tuner(settings, Path(out))
        finished = _search(tuner, settings, progress)
    target = {"speed_up": settings.speed_up, "at_least": settings.at_least, "at_most_lost": settings.at_most_lost}
    result = {**tuner.result(**target), **about, "wanted": target, "interrupted": not finished}
    output.write_json(result)
    output.write_page(lambda page: _print(page, result, output))
    if pictures and result["choices"]:
        output.draw("tune.png", partial(_save_plot, result))
    output.end()
    if not finished:
        raise typer.Exit(INTERRUPTED)


def _tuner(settings: TuneSettings, out: Path) -> tuple[Tuner, dict[str, Any]]:
    """Build model, images and tuner, and say what they are."""
    import numpy as np
    import torch

    from ..integrations.timm import input_config
    from ..measure import environment, keep_memory, load_average
    from ..quality.images import folder_images, sample_images
    from ..quality.tuning.run import Tuner
    from ..speed.models import DTYPES, build_model, device_of

    place, load = device_of(settings.device), load_average()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if place.type == "cpu":
        keep_memory()
    built = build_model(settings)
    tell(built.note)
    model = built.model.to(place, DTYPES[settings.dtype])
    pictures = sample_images(1) if settings.images is None else folder_images(settings.images, model.num_classes)
    wanted = settings.image_count or 2 * _SEEN
    order = np.random.default_rng(7).permutation(len(pictures)) if settings.images is not None else range(len(pictures))
    pictures = pictures.take([int(row) for row in order][:wanted])
    if len(pictures) < 2:
        raise ValueError(f"a search needs at least 2 pictures, got {len(pictures)}")
    if settings.at_most_lost is not None and not pictures.labels:
        raise ValueError(f"--at-most-lost needs labels, and there are none: {pictures.note}")
    tensor = pictures.tensor(input_config(model)).to(place, DTYPES[settings.dtype])
    variants = [(name, own) for name, own in compared_methods(settings.methods or METHODS) if name != "radial"]
    if not variants:
        raise ValueError("radial's counts follow from its radii: there is nothing to tune")
    chosen = settings.options_of([name for name, _ in variants])
    methods = {
        name: {"method": name, "backend": settings.backend, **own, **chosen.get(name, {})} for name, own in variants
    }
    machine = environment(place)
    about: dict[str, Any] = {
        "environment": machine,
        "load_at_start": load,
        "model": settings.model,
        "weights": built.weights,
        "random_weights": built.random,
        "dtype": settings.dtype,
        "images": {"source": pictures.source, "seen": list(pictures.names[::2]), "unseen": list(pictures.names[1::2])},
    }
    key = {
        **{name: about[name] for name in ("model", "weights", "dtype", "images")},
        **{"batch": settings.batch, "measure": settings.measure, "methods": methods},
        "machine": {name: machine[name] for name in ("device_name", "threads", "torch", "fastreduce")},
    }
    tuner = Tuner(
        model.eval(),
        tensor[::2],
        tensor[1::2],
        methods,
        settings.batch,
        settings.measure,
        labels=(pictures.labels[::2], pictures.labels[1::2]) if pictures.labels else None,
        saved=out / "tables.json",
        key=key,
    )
    return tuner, about


def _search(tuner: Tuner, settings: TuneSettings, progress: Any) -> bool:
    """Make the tables, choose, and measure -> whether it came to the end."""
    try:
        with user_errors():
            tuner.tabulate(progress)
        tuner.look_for(
            speed_up=settings.speed_up,
            at_least=settings.at_least,
            at_most_lost=settings.at_most_lost,
            progress=progress,
        )
        tuner.measure(settings.rounds or _ROUNDS, progress)
    except KeyboardInterrupt:
        if not tuner.unreduced:
            print_error("stopped; the tables so far are kept, and the same command goes on from them")
            raise typer.Exit(INTERRUPTED) from None
        return False
    return True


def _stages(row: Mapping[str, Any]) -> str:
    return " ".join(f"{block}:{tokens}" for block, tokens in zip(row["at"], row["tokens"], strict=True))


def _print(page: Page, result: Mapping[str, Any], output: Output) -> None:
    """Print predicted beside measured, tuned beside the paper's, and the line to paste."""
    environment, measure = result["environment"], result["measure"]
    page.line(f"{result['model']}, {result['weights']}, {result['dtype']}, {environment['device_name']}")
    page.line(
        f"batch {result['batch']}, {counted(result['rounds'], 'round')}, "
        f"{counted(result['images_seen'], 'image')} for the search, {result['images_unseen']} unseen, "
        f"{result['images']['source']}"
    )
    labelled = any("accuracy" in row["unseen"] for row in result["choices"])
    cells: list[list[Cell]] = [
        [
            *(row["method"], row["origin"], f"{row['predicted']['speedup']:.2f}", f"{row['measured']['speedup']:.2f}"),
            *(f"{row['predicted']['fidelity']:.3f}", f"{row['seen'][measure]['mean']:.3f}"),
            f"{row['unseen'][measure]['mean']:.3f}",
            *((fixed(row[half]["accuracy"]["points_lost"], 1) for half in ("seen", "unseen")) if labelled else ()),
            _stages(row),
        ]
        for row in result["choices"]
    ]
    if cells:
        page.table(
            "schedules",
            (
                *("method", "", "faster, table", "measured", f"{measure}, table", "measured", "unseen"),
                *(("points lost", "unseen") if labelled else ()),
                "block:tokens",
            ),
            cells,
            bold=lambda row, column: result["chosen"] is not None and _is_chosen(result, row),
        )
    for line in _sentences(result):
        page.line(line)
    if result["config"] is not None:
        file = output.json_file or "tune.json"
        page.line(f'    fastreduce.patch(model, config="{file}")', "bold", wrap=False)


def _is_chosen(result: Mapping[str, Any], row: int) -> bool:
    one, chosen = result["choices"][row], result["chosen"]
    return bool(one["config"] == chosen["config"])


def _sentences(result: Mapping[str, Any]) -> list[str]:
    """Return what follows: whether it pays, and whether tuning beat the paper's schedule where it can be said."""
    measure = result["measure"]
    lines = []
    for tuned, paper in zip(result["choices"][::2], result["choices"][1::2], strict=True):
        ahead = tuned["unseen"][measure]["mean"] - paper["unseen"][measure]["mean"]
        faster = tuned["measured"]["speedup"] / paper["measured"]["speedup"]
        if measure == "kl":
            ahead = -ahead
        name = f"{tuned['method']}, {tuned['target']}"
        if faster < 0.98:
            words = f"the tuned schedule is {faster:.2f} times as fast as the paper's: not at equal speed"
        elif abs(ahead) < _TOLD_APART:
            words = f"as close on unseen images as the paper's schedule, {faster:.2f} times as fast as it"
        elif ahead > 0:
            words = f"beats the paper's schedule on unseen images by {ahead:.3f}, {faster:.2f} times as fast as it"
        else:
            words = f"does not beat the paper's schedule on unseen images ({ahead:+.3f}, {faster:.2f} times as fast)"
        lines.append(f"{name}: {words}.")
    if (chosen := result["chosen"]) is not None:
        lines.append(
            f"Chosen: {chosen['method']} at {_stages(chosen)}, {chosen['measured']['speedup']:.2f} times as fast, "
            f"{measure} {chosen['unseen'][measure]['mean']:.3f} on unseen images."
        )
    else:
        fastest = max((row["measured"]["speedup"] for row in result["choices"]), default=0.0)
        words = f"; the fastest measured is {fastest:.2f} times as fast" if fastest else _by_the_tables(result)
        lines.append(f"Do not reduce: nothing here pays and keeps what was asked for{words}.")
    if result["untrained"]:
        lines.append(
            f"Layers of their own, with random weights: {', '.join(result['untrained'])}. "
            "Fidelity here says nothing about trained ones."
        )
    lines += [f"Not searched: {name}: {reason}." for name, reason in result["refused"].items()]
    if result["random_weights"]:
        lines.append("The weights are random: the schedule says nothing about a trained model.")
    return lines


def _by_the_tables(result: Mapping[str, Any]) -> str:
    """Say why none was worth measuring: none was found that keeps enough, or how fast the fastest could be."""
    wanted = result["wanted"]
    if wanted["at_least"] is not None:
        return f"; no schedule was found with fidelity at least {wanted['at_least']:g} on the images of the search"
    if wanted["at_most_lost"] is not None:
        points = counted(wanted["at_most_lost"], "point", "g")
        return f"; no schedule was found that loses at most {points} on the images of the search"
    most = max((one["speedup"] for front in result["fronts"].values() for one in front), default=1.0)
    return f"; by the table of times no schedule is more than {most:.2f} times as fast at this batch"


def _save_plot(result: Mapping[str, Any], file: Path) -> None:
    from .. import draw

    measure = result["measure"]
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for row in result["choices"]:
        label = row["method"] if row["origin"] == "tuned" else f"{row['method']}, paper's"
        lines.setdefault(label, []).append((row["measured"]["speedup"], row["unseen"][measure]["mean"], ""))
    draw.save_tradeoff(
        file,
        [(label, sorted(points)) for label, points in lines.items()],
        "Tuned schedules",
        f"{result['model']}, {result['weights']}, {result['environment']['device_name']}, batch {result['batch']}",
        f"{measure} on {counted(result['images_unseen'], 'image')} that the search did not see; both axes measured",
        y_label=measure.replace("_", " "),
    )
