"""``fastreduce export``: a reduced model for another runtime, held against eager mode."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..arguments import counted
from ..speed.settings import ExportSettings
from . import options as given
from .options import UserError, numbers, output_file, user_errors
from .output import Output, stoppable
from .screen import Page, progress_bar

if TYPE_CHECKING:
    from ..speed.comparison import Comparison

__all__ = ["export"]


def export(
    out: Annotated[str, typer.Option("--out", metavar="FILE", help="File to write: .onnx, .xml (OpenVINO) or .pt2.")],
    to: Annotated[
        str | None, typer.Option("--to", help="onnx, openvino or pt2 (AOTInductor). (default: by the file's ending)")
    ] = None,
    model: given.Model = "deit_small_patch16_224",
    checkpoint: given.Checkpoint = None,
    pretrained: given.Pretrained = False,
    method: given.OneMethod = None,
    method_option: given.MethodOption = None,
    keep_rate: Annotated[str | None, typer.Option(help="Keep rate. (default: 0.7)")] = None,
    at: given.At = None,
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="JSON of fastreduce tune or save_config, in place of --method and the like."),
    ] = None,
    image: Annotated[str, typer.Option(help="The picture whose views it is checked on.")] = "flower.jpg",
    batch: Annotated[
        list[str] | None, typer.Option(help="Images at a time for the speeds; several may be given. (default: 1,8)")
    ] = None,
    rounds: Annotated[str, typer.Option(metavar="N", help="Rounds of the speeds; 0 leaves them out.")] = "15",
    threads: given.Threads = None,
    seed: Annotated[str, typer.Option(metavar="N", help="Of random weights.")] = "10",
    json_file: given.Json = None,
) -> None:
    """Write a reduced model for ONNX Runtime, OpenVINO or AOTInductor, and hold it against eager mode.

    The file takes any number of images. It is run in its runtime on views of a picture: printed are the decisions that
    differ from eager mode's, the largest difference of the logits, and the speed beside the unreduced model exported
    the same way.
    """
    with user_errors():
        others = {"--method": method, "--method-option": method_option, "--keep-rate": keep_rate, "--at": at}
        for option, value in others.items():
            if config is not None and value is not None:
                raise ValueError(f"give either --config or {option}")
        settings = ExportSettings(
            out=out,
            to=to,
            config=config,
            model=model,
            checkpoint=checkpoint,
            pretrained=bool(pretrained),
            method=",".join(given.names("--method", method)) or "topk",
            method_options=tuple(method_option or ()),
            keep_rate=0.7 if keep_rate is None else given.number("--keep-rate", keep_rate),
            at=numbers("--at", "3,6,9", at, int),
            image=image,
            batches=numbers("--batch", "1,8", batch, int) or (1, 8),
            rounds=given.whole_number("--rounds", rounds),
            threads=given.whole_number("--threads", threads),
            seed=given.whole_number("--seed", seed),
        )
        settings.check()
        output_file("--out", out, (image, checkpoint, config))
        output = Output(json_file, None, (image, checkpoint, config))
    started = time.perf_counter()
    with stoppable("exporting"), progress_bar(lines=True) as progress:
        result = _run(settings, progress)
    result["wall_seconds"] = time.perf_counter() - started
    output.write_json(result)
    output.write_page(lambda page: _print(page, result))
    output.end()
    if not result["faithful"]:
        raise typer.Exit(1)


def _run(settings: ExportSettings, progress: Any) -> dict[str, Any]:
    """Write the file, check it and time it -> the result for JSON."""
    from ..deploy import export as write
    from ..deploy.check import fidelity, speed
    from ..deploy.export import check
    from ..integrations.timm import config_of
    from ..measure import environment, load_average
    from ..speed.comparison import Comparison

    load, file, to = load_average(), Path(settings.out), settings.format
    steps = 4 if settings.rounds else 2
    progress("building the model", 0, steps)
    with user_errors():
        comparison = Comparison(settings.as_comparison())
        unreduced, (entry,) = comparison.model, comparison.entries
        reduced, layers = entry.model, entry.layers
        if settings.config is not None:
            reduced, layers = _configured(comparison, Path(settings.config))
        images = comparison.views(max(8, *settings.batches))
        check(reduced, images, to)
    file.parent.mkdir(parents=True, exist_ok=True)
    progress("exporting the reduced model", 0, steps)
    try:
        write(reduced, images[:2], file, to)
        progress("running it against eager mode", 1, steps)
        found = fidelity(reduced, file, images[:8], to, settings.threads)
        speeds = []
        if settings.rounds:
            with tempfile.TemporaryDirectory() as folder:
                progress("exporting the unreduced model", 2, steps)
                other = write(unreduced, images[:2], Path(folder) / f"unreduced{file.suffix}", to)
                progress("timing both", 3, steps)
                for count in settings.batches:
                    speeds.append(speed(file, other, images[:count], settings.rounds, settings.threads))
    except (RuntimeError, OSError) as error:
        raise UserError(f"the model cannot be exported: {error}") from error
    return {
        "format_version": 1,
        "file": str(file),
        "bytes": sum(one.stat().st_size for one in _files(file)),
        "to": to,
        "model": settings.model,
        "weights": comparison.weights,
        "config": config_of(reduced),
        "layers": layers,
        "image": settings.image,
        "fidelity": dataclasses.asdict(found),
        "faithful": found.faithful,
        "speeds": [dataclasses.asdict(one) for one in speeds],
        "rounds": settings.rounds,
        "load": load,
        "environment": environment(comparison.device),
    }


def _configured(comparison: Comparison, config: Path) -> tuple[Any, str | None]:
    """Return the model as a file says, and where its method's layers are from: the checkpoint, or beside the file."""
    from ..integrations.saving import load_config
    from ..integrations.timm import patch

    reduced, beside = copy.deepcopy(comparison.model), config.with_suffix(".safetensors").is_file()
    if config.suffix == ".json":
        load_config(reduced, config)
    else:
        patch(reduced, config=config)
    layers = comparison.load_layers(reduced)
    return reduced, "config" if layers == "random" and beside else layers


def _files(file: Path) -> list[Path]:
    """Return the file and what belongs to it: OpenVINO's weights, large ONNX models' data."""
    beside = (file.with_suffix(".bin") if file.suffix == ".xml" else file, Path(f"{file}.data"))
    return [file, *(one for one in beside if one != file and one.is_file())]


def _print(page: Page, result: dict[str, Any]) -> None:
    """Say what was written, how it differs and how fast it is."""
    found = result["fidelity"]
    page.line(f"written: {result['file']}, {result['bytes'] / 1e6:,.1f} MB, {result['weights']}", wrap=False)
    decisions = f"{found['wrong']:,} of {counted(found['decisions'], 'decision', ',')} differ"
    decisions = decisions if found["decisions"] else "a soft merge decides nothing"
    page.line(
        f"{found['runtime']} against eager mode, {counted(found['images'], 'view')} of {result['image']}: {decisions}; "
        f"largest difference of the logits {found['difference']:.1e} ({found['relative']:.0e} of the largest); "
        f"same class for {found['same_class']} of {found['images']}"
    )
    if result["speeds"]:
        rows = [
            [
                str(one["batch"]),
                f"{one['batch'] / one['unreduced']:.1f}",
                f"{one['batch'] / one['reduced']:.1f}",
                f"{one['ratio']:.2f} ({one['quartiles'][0]:.2f}–{one['quartiles'][1]:.2f})",
            ]
            for one in result["speeds"]
        ]
        heads = ["batch", "unreduced, images/s", "reduced, images/s", "times as fast"]
        page.table(f"{found['runtime']}, both exported the same way, {counted(result['rounds'], 'round')}", heads, rows)
    if result["layers"] == "random":
        page.line(
            f"The layers of {result['config']['method']} have random weights: train them, and give --checkpoint.",
            "bold",
        )
    if not result["faithful"]:
        page.line(
            "It differs by more than rounding: a decision between two nearly equal tokens fell otherwise, or the "
            "runtime computes something else.",
            "bold",
        )
