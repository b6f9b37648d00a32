"""The commands of ``fastreduce``. What they compute is imported when they run, so that ``--help`` is quick."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

if TYPE_CHECKING:
    from .compare import Comparison, Entry

__all__ = ["app"]

_MESSAGE_LENGTH = 400
_TITLES = {
    **{"topk": "Top-K", "evit": "EViT", "dynamicvit": "DynamicViT", "ats": "ATS", "tome": "ToMe", "sit": "SiT"},
    **{"kmedoids": "K-Medoids", "dpcknn": "DPC-KNN", "patchmerger": "PatchMerger"},
}


class _UserError(Exception):
    """Something that the user can mend; shown as one line, like the errors of typer."""

    def format_message(self) -> str:
        return str(self)


class _OneLineErrors(TyperGroup):
    """One line on stderr and exit code 2 for every user error, typer's own (an unknown option) included."""

    def main(self, *args: Any, **extra: Any) -> Any:
        standalone = extra.pop("standalone_mode", True)
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except Exception as error:
            # Typer has had click outside and inside; its errors have this method in both.
            if not standalone or not hasattr(error, "format_message"):
                raise
            line = " ".join(error.format_message().split())
            if len(line) > _MESSAGE_LENGTH:
                line = line[: _MESSAGE_LENGTH - 1] + "…"
            text = Text.assemble(("error: ", "bold red"), line)
            Console(stderr=True).print(text, soft_wrap=True, highlight=False)
            sys.exit(2)
        if standalone:
            sys.exit(code if isinstance(code, int) else 0)
        return code


app = typer.Typer(
    cls=_OneLineErrors,
    help="Token reduction for Vision Transformers that is actually faster.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        print(f"fastreduce {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def _split(words: list[str] | None) -> tuple[str, ...]:
    """``["a,b", "c"]`` -> ``("a", "b", "c")``."""
    return tuple(part.strip() for word in words or [] for part in word.split(",") if part.strip())


def _numbers(option: str, example: str, words: list[str] | None, kind: Callable[[str], Any]) -> tuple[Any, ...] | None:
    """``["0.7,0.5", "0.3"]`` -> ``(0.7, 0.5, 0.3)``, None if the option was not given."""
    if not words:
        return None
    try:
        return tuple(kind(part) for word in words for part in word.split(","))
    except ValueError:
        raise ValueError(f"{option} takes numbers, like {example}, got {','.join(words)!r}") from None


def _writable(path: Path) -> Path:
    """Make the folder that a file will be written to, now and not after minutes of measuring."""
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder, not a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{str(path)!r} cannot be written")
    return path


@contextmanager
def _user_errors() -> Iterator[None]:
    """What the user can mend ends as one line; to be used around the checking of what was given, and nothing else."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise _UserError(str(error)) from error


@contextmanager
def _progress_bar() -> Iterator[Any]:
    """Give a function ``(what, done, total)`` that moves a bar on stderr."""
    columns = (TextColumn("{task.description:<26}"), BarColumn(40), TextColumn("{task.percentage:>3.0f} %"))
    console = Console(stderr=True)
    timer = TimeElapsedColumn()
    with Progress(*columns, timer, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("building models", total=None)

        def move(what: str, done: float, total: float) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield move


@app.command()
def compare(
    image: Annotated[
        str, typer.Argument(help="A picture, or one of scikit-learn's: flower.jpg, china.jpg.")
    ] = "flower.jpg",
    model: Annotated[str, typer.Option(help="A timm Vision Transformer.")] = "deit_small_patch16_224",
    checkpoint: Annotated[
        str | None, typer.Option(help="Weights: a .safetensors file, or a torch.save file (read with weights_only).")
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Let timm download its weights.")] = False,
    methods: Annotated[
        list[str] | None, typer.Option(help="Methods, like topk,tome; radial-l1 for one norm. (default: all)")
    ] = None,
    keep_rate: Annotated[
        list[str] | None, typer.Option(help="Keep rate; may be given several times. (default: 0.7 and 0.5)")
    ] = None,
    at: Annotated[
        list[str] | None, typer.Option(help="Blocks. (default: a quarter, half, three quarters; 3,6,9 of 12)")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Images in a batch. (default: 8, or what a slow machine can do in the time)")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds. (default: as many as fit in the time, 3 to 20)")] = None,
    seconds: Annotated[float, typer.Option(help="The time, roughly, if --rounds is not given.")] = 150.0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. (default: cuda if there is one)")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    backend: Annotated[str, typer.Option(help="auto, triton or reference.")] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile every model; takes long.")] = False,
    fused_baseline: Annotated[
        bool,
        typer.Option("--fused-baseline", help="The official algorithm gets fused attention where possible."),
    ] = False,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads. (default: torch's choice; 1 if that is faster)")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random weights; the default follows the shape of the flower.")] = 10,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("fastreduce-compare"),
    pictures: Annotated[bool, typer.Option(help="Whether to draw them.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
) -> None:
    """Measure every method on a photo and draw what it keeps and merges.

    Beside each method run, in turns, the unreduced model, the free slice (tokens simply cut off, a decision that costs
    nothing) and the official algorithm written plainly, which is also the reference in float64.
    """
    started = time.perf_counter()
    with _progress_bar() as progress:
        from .compare import Comparison, Settings
        from .measure import usual_troubles

        with _user_errors():
            settings = Settings(
                image=image,
                model=model,
                checkpoint=checkpoint,
                pretrained=pretrained,
                methods=_split(methods),
                keep_rates=_numbers("--keep-rate", "0.7,0.5", keep_rate, float) or Settings.keep_rates,
                at=_numbers("--at", "3,6,9", at, int),
                batch=batch,
                rounds=rounds,
                seconds=seconds,
                device=device,
                dtype=dtype,
                backend=backend,
                compile=compile,
                fused_baseline=fused_baseline,
                threads=threads,
                seed=seed,
            )
            if pictures:
                _writable(out / "picture.png")
            if json_file is not None:
                _writable(json_file)
            comparison = Comparison(settings, started)
        try:
            comparison.check(progress)
            comparison.measure(progress)
        except usual_troubles() as error:
            raise _UserError(str(error)) from error
        files = _draw(comparison, out, progress) if pictures else []
    result = comparison.result()
    console = Console()
    _print_tables(console, comparison, result)
    for method, file in zip(result["methods"], files, strict=False):
        method["picture"] = str(file)
    result["wall_seconds"] = comparison.elapsed
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")
    if files:
        console.print(f"{_count(len(files), 'picture')} in {out}{os.sep}", highlight=False, soft_wrap=True)
    if any(_is_wrong(row) for row in result["methods"]):
        raise typer.Exit(1)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _title(entry: Entry) -> str:
    words = [_TITLES.get(entry.method, entry.method.title()), *map(str, entry.options.values())]
    return " ".join(words)


def _draw(comparison: Comparison, out: Path, progress: Any) -> list[Path]:
    """One picture for every method and keep rate."""
    from . import draw

    photo = comparison.picture()
    patches = comparison.grid[0] * comparison.grid[1]
    files = []
    for done, entry in enumerate(comparison.entries):
        progress("drawing", done, len(comparison.entries))
        panels: list[draw.Panel] = [(photo, "input", f"{patches} patches")]
        for stage in entry.stages:
            if stage.kept is not None:
                panel = draw.grey_dropped(photo, stage.kept)
                alone = int(stage.kept.sum())
                if stage.soft:
                    count = f"{stage.count}"
                else:
                    count = f"{alone} + {stage.count - alone} fused" if stage.count > alone else f"{alone}"
            else:
                assert stage.slot is not None
                panel, count = draw.fill_merged(photo, stage.slot), f"{stage.count}"
            panels.append((panel, f"block {stage.block}", f"{count} of {patches} tokens"))
        notes = []
        if any(stage.soft for stage in entry.stages):
            notes.append("shown: the patch that weighs most in each token, followed from stage to stage")
        elif any(stage.kept is not None and stage.count > stage.kept.sum() for stage in entry.stages):
            notes.append("grey patches are fused into one token at each stage")
        if comparison.random_weights:
            notes.append(f"{comparison.weights}: the pattern says nothing about a trained model")
        note = "; ".join(notes)
        subtitle = f"keep rate {entry.keep_rate:g}  ·  {comparison.settings.model}"
        files.append(out / f"{entry.slug}.png")
        draw.save_panels(files[-1], panels, _title(entry), subtitle, note)
    return files


def _spread(speed: dict[str, Any]) -> str:
    low, high = speed["images_per_second_quartiles"]
    value = speed["images_per_second"]
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} ± {(high - low) / 2:.{digits}f}"


def _print_tables(console: Console, comparison: Comparison, result: dict[str, Any]) -> None:
    """One table for every keep rate, and what the columns mean."""
    environment, unreduced = result["environment"], result["unreduced"]
    slices = {tuple(row["counts"]): row for row in result["free_slices"]}
    where = f"{result['dtype']}, {environment['device_name']}"
    if environment["device"] == "cpu":
        where += f", {_count(environment['threads'], 'thread')}"
    compiled = ", compiled" if result["compile"] else ""
    console.print(f"{result['model']}, {result['weights']}, {where}{compiled}", highlight=False)
    console.print(
        f"batch {result['batch']}, {_count(result['rounds'], 'round')}, torch {environment['torch']}, "
        f"fastreduce {environment['fastreduce']}, backend {result['backend']}",
        highlight=False,
    )
    for rate in dict.fromkeys(row["keep_rate"] for row in result["methods"]):
        rows = [row for row in result["methods"] if row["keep_rate"] == rate]
        table = Table(
            box=box.SIMPLE_HEAD,
            title=f"keep rate {rate:g}",
            title_style="bold",
            title_justify="left",
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        table.add_column("method", no_wrap=True)
        for heading in ("tokens", "GFLOPs", "images/s", "full", "slice", "official", "diff."):
            table.add_column(heading, justify="right", no_wrap=True)
        patches = comparison.grid[0] * comparison.grid[1]
        table.add_row(
            "unreduced",
            str(patches),
            f"{unreduced['gmacs']:.2f}",
            _spread(unreduced),
            "1.00",
            "",
            "",
            f"{unreduced['relative_difference']:.0e}",
        )
        nominal = slices[tuple(rows[0]["counts"])]
        table.add_row(
            "free slice",
            " ".join(map(str, nominal["counts"])),
            f"{nominal['gmacs']:.2f}",
            _spread(nominal),
            f"{nominal['speedup']:.2f}",
            "1.00",
            "",
            "",
            end_section=True,
        )
        for row in rows:
            flag = "*" if row["images_with_other_decisions"] else "!" if _is_wrong(row) else ""
            table.add_row(
                row["label"],
                " ".join(map(str, row["counts"])),
                f"{row['gmacs']:.2f}",
                _spread(row),
                f"[bold]{row['speedup']:.2f}[/bold]",
                f"{row['share_of_free_slice']:.2f}",
                f"{row['speedup_over_official']:.2f}",
                f"{row['relative_difference']:.0e}{flag}",
            )
        console.print(table)
    console.print(_legend(comparison, result), style="dim", highlight=False)


def _is_wrong(row: dict[str, Any]) -> bool:
    """Whether logits lie far from float64 although no decision was another."""
    return row["images_with_other_decisions"] == 0


def _legend(comparison: Comparison, result: dict[str, Any]) -> str:
    lines = [
        "tokens: patches left after each stage. GFLOPs: 10⁹ multiply-adds an image (timm's GMACs), counted by torch's "
        "FlopCounterMode. images/s: median over the rounds ± half the distance of the quartiles. full, slice, "
        "official: how many times faster than the unreduced model, than the free slice (the unreduced model that just "
        "cuts off as many tokens between attention and MLP), than the official algorithm written plainly; medians of "
        "the ratios within each round. diff.: largest difference of the logits to the official algorithm in float64, "
        f"over the largest logit; {_count(result['images_checked'], 'image')}."
    ]
    if result["rounds"] < 3:
        lines.append(f"Only {_count(result['rounds'], 'round')}: do not read much into the speeds.")
    if any(row["images_with_other_decisions"] for row in result["methods"]):
        lines.append(f"*: near-ties: in {result['dtype']} other tokens were chosen than in float64.")
    if any(_is_wrong(row) for row in result["methods"]):
        lines.append("!: far from float64, and no near-tie explains it: please report this.")
    if any(row["layers"] == "random" for row in result["methods"]):
        names = dict.fromkeys(row["label"] for row in result["methods"] if row["layers"] == "random")
        lines.append(f"Layers of their own, with random weights: {', '.join(names)}.")
    lines += [f"Not compared: {method}: {reason}." for method, reason in result["refused"].items()]
    if comparison.random_weights:
        lines.append(
            f"These are {comparison.weights}: the speeds hold for trained ones too, the patterns and pictures say "
            "nothing about them. Give --checkpoint or --pretrained."
        )
    return "\n".join(lines)
