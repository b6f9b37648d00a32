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

from .names import TITLES

if TYPE_CHECKING:
    from .compare import Comparison
    from .plan import Planner

__all__ = ["app"]

_MESSAGE_LENGTH = 400


class UserError(Exception):
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


# Options that several commands have.
_Model = Annotated[str, typer.Option(help="A timm Vision Transformer.")]
_Checkpoint = Annotated[
    str | None, typer.Option(help="Weights: a .safetensors file, or a torch.save file (read with weights_only).")
]
_Pretrained = Annotated[bool, typer.Option("--pretrained", help="Let timm download its weights.")]
_At = Annotated[list[str] | None, typer.Option(help="Blocks. (default: a quarter, half, three quarters; 3,6,9 of 12)")]
_Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. (default: cuda if there is one)")]
_Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16.")]
_Backend = Annotated[str, typer.Option(help="auto, triton or reference.")]
_Compile = Annotated[bool, typer.Option("--compile", help="torch.compile every model; takes long.")]
_Threads = Annotated[int | None, typer.Option(help="CPU threads. (default: torch's choice; 1 if that is faster)")]
_Json = Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")]


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


def split(words: list[str] | None) -> tuple[str, ...]:
    """``["a,b", "c"]`` -> ``("a", "b", "c")``."""
    return tuple(part.strip() for word in words or [] for part in word.split(",") if part.strip())


def numbers(option: str, example: str, words: list[str] | None, kind: Callable[[str], Any]) -> tuple[Any, ...] | None:
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
def user_errors() -> Iterator[None]:
    """What the user can mend ends as one line; to be used around the checking of what was given, and nothing else."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise UserError(str(error)) from error


@contextmanager
def progress_bar() -> Iterator[Any]:
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
    model: _Model = "deit_small_patch16_224",
    checkpoint: _Checkpoint = None,
    pretrained: _Pretrained = False,
    methods: Annotated[
        list[str] | None, typer.Option(help="Methods, like topk,tome; radial-l1 for one norm. (default: all)")
    ] = None,
    keep_rate: Annotated[
        list[str] | None, typer.Option(help="Keep rate; may be given several times. (default: 0.7 and 0.5)")
    ] = None,
    at: _At = None,
    batch: Annotated[
        int | None, typer.Option(help="Images in a batch. (default: 8, or what a slow machine can do in the time)")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds. (default: as many as fit in the time, 3 to 20)")] = None,
    seconds: Annotated[float, typer.Option(help="The time, roughly, if --rounds is not given.")] = 150.0,
    device: _Device = None,
    dtype: _Dtype = "float32",
    backend: _Backend = "auto",
    compile: _Compile = False,
    fused_baseline: Annotated[
        bool,
        typer.Option("--fused-baseline", help="The official algorithm gets fused attention where possible."),
    ] = False,
    threads: _Threads = None,
    seed: Annotated[int, typer.Option(help="Of random weights; the default follows the shape of the flower.")] = 10,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("fastreduce-compare"),
    pictures: Annotated[bool, typer.Option(help="Whether to draw them.")] = True,
    json_file: _Json = None,
) -> None:
    """Measure every method on a photo and draw what it keeps and merges.

    Beside each method run, in turns, the unreduced model, the free slice (tokens simply cut off, a decision that costs
    nothing) and the official algorithm written plainly, which is also the reference in float64.
    """
    started = time.perf_counter()
    with progress_bar() as progress:
        from .compare import Comparison, Settings
        from .measure import usual_troubles

        with user_errors():
            settings = Settings(
                image=image,
                model=model,
                checkpoint=checkpoint,
                pretrained=pretrained,
                methods=split(methods),
                keep_rates=numbers("--keep-rate", "0.7,0.5", keep_rate, float) or Settings.keep_rates,
                at=numbers("--at", "3,6,9", at, int),
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
            raise UserError(str(error)) from error
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


def _title(method: str, options: dict[str, Any]) -> str:
    return " ".join([TITLES.get(method, method.title()), *map(str, options.values())])


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
        draw.save_panels(files[-1], panels, _title(entry.method, entry.options), subtitle, note)
    return files


def _table(title: str) -> Table:
    style: dict[str, Any] = {"title_style": "bold", "title_justify": "left"}
    return Table(box=box.SIMPLE_HEAD, title=title, pad_edge=False, padding=(0, 1, 0, 0), **style)


def _spread(speed: dict[str, Any]) -> str:
    low, high = speed["images_per_second_quartiles"]
    value = speed["images_per_second"]
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} ± {(high - low) / 2:.{digits}f}"


def _where(result: dict[str, Any]) -> str:
    environment = result["environment"]
    where = f"{result['dtype']}, {environment['device_name']}"
    if environment["device"] == "cpu":
        where += f", {_count(environment['threads'], 'thread')}"
    compiled = ", compiled" if result["compile"] else ""
    return f"{result['model']}, {result['weights']}, {where}{compiled}"


def _print_tables(console: Console, comparison: Comparison, result: dict[str, Any]) -> None:
    """One table for every keep rate, and what the columns mean."""
    environment, unreduced = result["environment"], result["unreduced"]
    slices = {tuple(row["counts"]): row for row in result["free_slices"]}
    console.print(_where(result), highlight=False)
    console.print(
        f"batch {result['batch']}, {_count(result['rounds'], 'round')}, torch {environment['torch']}, "
        f"fastreduce {environment['fastreduce']}, backend {result['backend']}",
        highlight=False,
    )
    for rate in dict.fromkeys(row["keep_rate"] for row in result["methods"]):
        rows = [row for row in result["methods"] if row["keep_rate"] == rate]
        table = _table(f"keep rate {rate:g}")
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


@app.command()
def plan(
    model: _Model = "deit_small_patch16_224",
    checkpoint: _Checkpoint = None,
    pretrained: _Pretrained = False,
    method: Annotated[str, typer.Option(help="The method, like topk; radial-l1 for a norm.")] = "topk",
    keep_rate: Annotated[
        list[str] | None,
        typer.Option(help="Keep rate; may be given several times. (default: 0.9 to 0.4 in tenths, and 0.25)"),
    ] = None,
    at: _At = None,
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
    rounds: Annotated[int | None, typer.Option(help="Rounds. (default: as many as fit in the time, 6 to 50)")] = None,
    seconds: Annotated[float, typer.Option(help="The time, roughly, if --rounds is not given.")] = 60.0,
    device: _Device = None,
    dtype: _Dtype = "float32",
    backend: _Backend = "auto",
    compile: _Compile = False,
    graphs: Annotated[bool, typer.Option("--graphs", help="Replay CUDA graphs.")] = False,
    threads: _Threads = None,
    seed: Annotated[int, typer.Option(help="Of random weights.")] = 10,
    out: Annotated[Path, typer.Option(help="Folder for the plot.")] = Path("fastreduce-plan"),
    pictures: Annotated[bool, typer.Option(help="Whether to draw it.")] = True,
    json_file: _Json = None,
) -> None:
    """Measure on this machine from which keep rate and batch on a method pays, and say so when it does not.

    The unreduced and the reduced models take turns on views of a photo, after every reduced model's logits were held
    against the official algorithm in float64. Speed only: accuracy is not measured.
    """
    started = time.perf_counter()
    with progress_bar() as progress:
        from .measure import usual_troubles
        from .plan import Planner, Settings

        with user_errors():
            settings = Settings(
                model=model,
                checkpoint=checkpoint,
                pretrained=pretrained,
                method=method,
                keep_rates=numbers("--keep-rate", "0.7,0.5", keep_rate, float) or (),
                at=numbers("--at", "3,6,9", at, int),
                batches=numbers("--batch", "1,16", batch, int) or (),
                round_to=round_to,
                rounds=rounds,
                seconds=seconds,
                device=device,
                dtype=dtype,
                backend=backend,
                compile=compile,
                graphs=graphs,
                threads=threads,
                seed=seed,
            )
            if pictures:
                _writable(out / "plan.png")
            if json_file is not None:
                _writable(json_file)
            planner = Planner(settings, started)
        try:
            planner.check(progress)
            planner.measure(progress)
        except usual_troubles() as error:
            raise UserError(str(error)) from error
    result = planner.result()
    console = Console()
    console.print(_where(result) + (", CUDA graphs" if result["graphs"] else ""), highlight=False)
    if result["wrong"]:
        for line in result["wrong"]:
            console.print(f"! {line}: please report this.", highlight=False)
        console.print("Nothing was timed." if not planner.seconds else "The times are not shown.")
    else:
        _print_plan(console, planner, result)
        if pictures:
            file = out / f"{planner.slug}.png"
            _draw_plan(planner, result, file)
            result["picture"] = str(file)
            console.print(f"plot: {file}", highlight=False, soft_wrap=True)
    result["wall_seconds"] = planner.elapsed
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")
    if result["wrong"]:
        raise typer.Exit(1)


_MARKS = {"pays": "+", "unclear": "?", "no": " "}


def _print_plan(console: Console, planner: Planner, result: dict[str, Any]) -> None:
    """Tables of the speed-ups and speeds, what follows from them, and the code to paste."""
    environment = result["environment"]
    console.print(
        f"{_title(result['method'], result['options'])} at blocks {' '.join(map(str, result['blocks']))}, "
        f"torch {environment['torch']}, fastreduce {environment['fastreduce']}, backend {result['backend']}",
        highlight=False,
    )
    for start in range(0, len(result["batches"]), 4):
        rows = result["batches"][start : start + 4]
        table = _table("times as fast as the unreduced model")
        table.add_column("keep rate", no_wrap=True)
        for heading in ("tokens", "work", *(f"batch {row['batch']}" for row in rows)):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_row("rounds", "", "", *(f"{row['rounds']}  " for row in rows))
        noise = [_ratio_cell(row["control"]) + "  " for row in rows]
        table.add_row("unreduced", str(result["patches"]), "1.00", *noise, end_section=True)
        for index, rate in enumerate(result["rates"]):
            found = [row["rates"][index] for row in rows]
            cells = [Text(f"{_ratio_cell(cell)} {_MARKS[cell['verdict']]}") for cell in found]
            for cell, text in zip(found, cells, strict=True):
                text.stylize("bold" if cell["verdict"] == "pays" else "")
            counts = " ".join(map(str, rate["counts"]))
            table.add_row(f"{rate['keep_rate']:g}", counts, f"{rate['speedup_by_work']:.2f}", *cells)
        console.print(table)
        speeds = _table("images/s")
        speeds.add_column("keep rate", no_wrap=True)
        for row in rows:
            speeds.add_column(f"batch {row['batch']}", justify="right", no_wrap=True)
        speeds.add_row("unreduced", *(_spread(row["unreduced"]) for row in rows), end_section=True)
        for index, rate in enumerate(result["rates"]):
            speeds.add_row(f"{rate['keep_rate']:g}", *(_spread(row["rates"][index]) for row in rows))
        console.print(speeds)
    for line in result["advice"]:
        console.print(line, highlight=False)
    codes: dict[str, list[int]] = {}
    for row in result["batches"]:
        if row["code"] is not None:
            codes.setdefault(row["code"], []).append(row["batch"])
    for code, batches in codes.items():
        console.print(f"\nThe highest keep rate that pays at batch {', '.join(map(str, batches))}:", highlight=False)
        console.print(f"    {code}", style="bold", highlight=False, markup=False, soft_wrap=True)
    console.print()
    console.print(_plan_legend(planner, result), style="dim", highlight=False)


def _ratio_cell(cell: dict[str, Any]) -> str:
    low, high = cell["speedup_quartiles"]
    return f"{cell['speedup']:.2f} ± {(high - low) / 2:.2f}"


def _plan_legend(planner: Planner, result: dict[str, Any]) -> str:
    bars = ", ".join(f"{row['bar']:.2f} at batch {row['batch']}" for row in result["batches"])
    lines = [
        "tokens: patches left after each stage. work: multiply-adds of the unreduced model over those of the reduced. "
        "batch: median over the rounds of the ratio within a round ± half the distance of the quartiles; +: pays, the "
        f"lower quartile is above {bars}; ?: only the upper one is. That bar is 1.02, or as far as the unreduced model "
        "strays from itself (its row in the table) if that is more. Logits agree with the official algorithm in "
        f"float64 ({_count(result['images_checked'], 'image')}, and before each batch is timed)."
    ]
    if few := [row for row in result["batches"] if row["rounds"] < 4]:
        lines.append(f"Only {_count(few[0]['rounds'], 'round')}: do not read much into the speeds.")
    if any(row["images_with_other_decisions"] for row in result["rates"]):
        lines.append(f"Near-ties: in {result['dtype']} other tokens were chosen than in float64.")
    if any(row["layers"] == "random" for row in result["rates"]):
        lines.append("Its own layers have random weights, which does not change the speed.")
    if result["method"] == "ats":
        lines.append(
            "ATS keeps what an image calls for: the speed depends on images and weights, these are views of a photo."
        )
        if planner.comparison.random_weights:
            lines.append("These weights are random: give --checkpoint or --pretrained.")
    return "\n".join(lines)


def _draw_plan(planner: Planner, result: dict[str, Any], file: Path) -> None:
    from . import draw

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
        f"{_title(result['method'], result['options'])}: when reduction pays",
        f"{result['model']}, {result['dtype']}{mode}, {result['environment']['device_name']}",
        "bands: quartiles of the rounds; filled: pays, the lower quartile is above 1.02 and above the noise",
    )
