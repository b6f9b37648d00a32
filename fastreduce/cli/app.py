"""The commands of ``fastreduce``. What they compute is imported when they run, so that ``--help`` is quick."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from .._files import write_atomically
from ..names import FAMILIES
from ..speed.settings import KEEP_RATES, CompareSettings, PlanSettings
from . import options as given
from .options import UserError, numbers, split, user_errors
from .screen import Page, hush, is_full, progress_bar, write
from .tables import count, doubts, is_wrong, print_comparison, print_methods, print_plan, title_of

if TYPE_CHECKING:
    from ..speed.comparison import Comparison, Drawn, Entry

__all__ = ["UserError", "app", "numbers", "progress_bar", "split", "user_errors"]

_MESSAGE_LENGTH = 400
_INTERRUPTED = 130  # the exit code of a process that Ctrl-C ended


def _print_error(message: str) -> None:
    """Write one line to stderr, red on a terminal."""
    line = " ".join(message.split())
    if len(line) > _MESSAGE_LENGTH:
        line = line[: _MESSAGE_LENGTH - 1] + "…"
    console = Console(stderr=True)
    if console.is_terminal:
        console.print(Text.assemble(("error: ", "bold red"), line), soft_wrap=True, highlight=False)
    else:
        write(sys.stderr, f"error: {line}\n")


def _message(error: Any, arguments: list[str]) -> str:
    """Return what typer says of a wrong option, with the value that it does not show."""
    message: str = error.format_message()
    names = getattr(getattr(error, "param", None), "opts", ())
    for index, word in enumerate(arguments):
        name, sign, value = word.partition("=")
        if name in names and (sign or index + 1 < len(arguments)):
            value = value if sign else arguments[index + 1]
            return message if repr(value) in message else f"{message}, got {value!r}"
    return message


class _OneLineErrors(TyperGroup):
    """One line on stderr and exit code 2 for every user error, typer's own (an unknown option) included."""

    def main(self, *args: Any, **extra: Any) -> Any:
        standalone = extra.pop("standalone_mode", True)
        arguments = list((args[0] if args else extra.get("args")) or sys.argv[1:])
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except Exception as error:
            if not standalone or (message := self._of_user(error, arguments)) is None:
                raise
            _print_error(message)
            sys.exit(_INTERRUPTED if type(error).__name__ == "Abort" else 2)
        if standalone:
            sys.exit(code if isinstance(code, int) else 0)
        return code

    @staticmethod
    def _of_user(error: Exception, arguments: list[str]) -> str | None:
        """Return what to say of an error that is no mistake in the code."""
        # Typer has had click outside and inside; its errors have these names in both.
        if type(error).__name__ == "Abort":
            return "stopped"
        if hasattr(error, "format_message"):
            return _message(error, arguments)
        if isinstance(error, OSError) and is_full(error):
            hush(sys.stdout)
            return f"the output cannot be written: {error.strerror}"
        # backends.py reads the variable when it is imported, which every command does in its own place.
        return str(error) if str(error).startswith("FASTREDUCE_BACKEND=") else None


app = typer.Typer(
    cls=_OneLineErrors,
    help="Token reduction for Vision Transformers that is actually faster.",
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

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


@app.command()
def methods() -> None:
    """List the methods: what they train, their options, and when to choose which."""
    page = Page(sys.stdout)
    print_methods(page, FAMILIES)
    if (error := page.write()) is not None:
        raise UserError(f"the output cannot be written: {error.strerror}")


def _finite(value: Any) -> Any:
    """Return what JSON has words for: null for a number that is none."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Output:
    """Where results go: first the JSON, then the tables, then the pictures, so that no failure costs another's.

    Args:
        json_file: what ``--json`` was given.
        folder: of the pictures, or None for none.
        inputs: files that must not be written to.

    Raises:
        ValueError: a file or folder that cannot be written.
    """

    def __init__(self, json_file: str | None, folder: str | None, inputs: tuple[str | None, ...]):
        self.to_stdout = json_file == "-"
        self.folder = None if folder is None else given.output_folder("--out", folder)
        self.json_file = None
        if json_file is not None and not self.to_stdout:
            self.json_file = given.output_file("--json", json_file, inputs)
        self.troubles: list[str] = []

    def _make(self, file: Path, content: Callable[[Path], object] | str) -> bool:
        """Write a file whole -> whether that went well."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, content)
        except OSError as error:
            self.troubles.append(f"{str(file)!r} cannot be written: {error.strerror or error}")
            return False
        return True

    def write_json(self, result: Mapping[str, Any]) -> None:
        """Write the result to the file, or to standard output."""
        text = json.dumps(_finite(result), indent=1, allow_nan=False) + "\n"
        if self.to_stdout:
            if (error := write(sys.stdout, text)) is not None:
                self.troubles.append(f"the JSON cannot be written to standard output: {error.strerror}")
        elif self.json_file is not None and not self._make(self.json_file, text):
            self.json_file = None

    def rewrite_json(self, result: Mapping[str, Any]) -> None:
        """Write the result once more, with what came later; a pipe or a device has had it."""
        if self.json_file is not None and self.json_file.is_file():
            self.write_json(result)

    def write_page(self, fill: Callable[[Page], None]) -> None:
        """Print what ``fill`` puts on a page; on stderr where standard output is taken by the JSON, or broken."""
        page = Page(sys.stderr if self.to_stdout else sys.stdout)
        fill(page)
        if (error := page.write()) is not None:
            self.troubles.append(f"the tables cannot be written: {error.strerror}")
            if not self.to_stdout:
                page.write(sys.stderr)

    def draw(self, name: str, save: Callable[[Path], object]) -> Path | None:
        """Make a picture in the folder -> its path, or None if that failed."""
        assert self.folder is not None
        file = self.folder / name
        return file if self._make(file, save) else None

    def end(self) -> None:
        """Raise UserError with the first of what went wrong."""
        if self.troubles:
            more = f", and {len(self.troubles) - 1} more like this" if len(self.troubles) > 1 else ""
            raise UserError(self.troubles[0] + more)


@contextmanager
def _measuring() -> Iterator[None]:
    """Turn what can go wrong while measuring into one line: no memory, no compilation, no graph."""
    from ..speed.measure import usual_troubles

    try:
        yield
    except usual_troubles() as error:
        raise UserError(str(error) or "there is too little memory") from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise UserError("there is too little memory: give a smaller --batch") from error


def _measure(measured: Any, progress: Any) -> bool:
    """Check and measure -> whether it came to the end: Ctrl-C leaves the rounds that were finished."""
    try:
        with _measuring():
            measured.check(progress)
            measured.measure(progress)
    except KeyboardInterrupt:
        if not measured.rounds:
            _print_error("stopped before a round was finished: there is nothing to show")
            raise typer.Exit(_INTERRUPTED) from None
        return False
    return True


def _with_ending(measured: Any, finished: bool) -> dict[str, Any]:
    """Return the result, with how the run ended and what speaks against its speeds."""
    result = measured.result()
    return {**result, "doubts": doubts(result), "interrupted": not finished, "wall_seconds": measured.elapsed}


@contextmanager
def _stoppable(what: str) -> Iterator[None]:
    """Turn Ctrl-C into one line."""
    try:
        yield
    except KeyboardInterrupt:
        _print_error(f"stopped while {what}")
        raise typer.Exit(_INTERRUPTED) from None


@app.command()
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
        output = _Output(json_file, out if pictures else None, (image, checkpoint))
    with _stoppable("building models"), progress_bar(lines=True) as progress:
        from ..speed.comparison import Comparison

        with user_errors():
            comparison = Comparison(settings, started)
        finished = _measure(comparison, progress)
    _hand_over_comparison(comparison, output, finished)


def _hand_over_comparison(comparison: Comparison, output: _Output, finished: bool) -> None:
    """Give out what was measured, the surest first."""
    result = _with_ending(comparison, finished)
    output.write_json(result)
    output.write_page(lambda page: print_comparison(page, result))
    if finished and output.folder is not None:
        _draw_all(comparison, output, result)
    output.end()
    if not finished:
        raise typer.Exit(_INTERRUPTED)
    if any(is_wrong(row) for row in result["methods"]):
        raise typer.Exit(1)


def _draw_all(comparison: Comparison, output: _Output, result: dict[str, Any]) -> None:
    """Draw a picture for every method and keep rate, and note in the JSON where they are."""
    drawn = 0
    with _stoppable("drawing"), progress_bar(lines=True) as progress:
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


@app.command()
def plan(
    model: given.Model = "deit_small_patch16_224",
    checkpoint: given.Checkpoint = None,
    pretrained: given.Pretrained = False,
    method: given.OneMethod = None,
    method_option: given.MethodOption = None,
    keep_rate: Annotated[
        list[str] | None,
        typer.Option(help="Keep rate; may be given several times. (default: 0.9 to 0.4 in tenths, and 0.25)"),
    ] = None,
    at: given.At = None,
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
) -> None:
    """Measure on this machine from which keep rate and batch on a method pays, and say so when it does not.

    The unreduced and the reduced models take turns on views of a photo, after every reduced model's logits were held
    against the published algorithm, written plainly, in float64. Speed only: accuracy is not measured.
    """
    started = time.perf_counter()
    with user_errors():
        names = given.names("--method", method) or ("topk",)
        if len(names) > 1:
            raise ValueError(f"--method: plan takes one method, got {','.join(names)!r}; compare takes several")
        settings = PlanSettings(
            model=model,
            checkpoint=checkpoint,
            pretrained=pretrained,
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
        output = _Output(json_file, out if pictures else None, (checkpoint,))
    with _stoppable("building models"), progress_bar(lines=True) as progress:
        from ..speed.payoff import Planner

        with user_errors():
            planner = Planner(settings, started)
        finished = _measure(planner, progress)
    result = _with_ending(planner, finished)
    output.write_json(result)
    output.write_page(lambda page: print_plan(page, result))
    if finished and output.folder is not None and not result["wrong"]:
        _draw_plan(planner.slug, output, result)
    output.end()
    if not finished:
        raise typer.Exit(_INTERRUPTED)
    if result["wrong"]:
        raise typer.Exit(1)


def _draw_plan(slug: str, output: _Output, result: dict[str, Any]) -> None:
    """Draw the speed-ups against the keep rates, and note in the JSON where."""
    with _stoppable("drawing"):
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
