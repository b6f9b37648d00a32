"""Speed of a reduced model where it is deployed, beside the unreduced model in the same runtime.

``python -m bench.deploy`` prints unreduced ÷ reduced in eager mode, ONNX Runtime and OpenVINO at batch 1 and 8, for the
shapes of DeiT-S and of CLIP's ViT-B/16. ``--small-batches`` prints batch 1, 2, 4 and 8 in eager mode, compiled and in
ONNX Runtime. ``python -m bench.int8`` is about int8.

All models of a row take turns, round after round. Every exported model is held against eager mode first.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastreduce.arguments import counted
from fastreduce.deploy import export, load
from fastreduce.deploy.check import speed_of
from fastreduce.measure import environment, keep_memory, load_average, own_code, take_turns
from fastreduce.plain import FreeSlice
from fastreduce.speed.comparison import Comparison
from fastreduce.speed.settings import CompareSettings

from .deploy_tables import Row, slower, speed_lines

__all__ = ["main", "measure"]

MODELS = ("deit_small_patch16_224", "vit_base_patch16_clip_224")
METHODS = ("topk", "evit", "ats", "tome")
WAYS = ("eager", "compiled", "onnxruntime", "openvino")
_FORMATS = {"onnxruntime": ("onnx", ".onnx"), "openvino": ("openvino", ".xml")}
_TOLERANCE = 1e-4  # of the logits, relative to the largest: beyond it a speed is of another model
_UNREDUCED = "unreduced"

Call = Callable[[Tensor], Tensor]


def _comparison(model: str, methods: Sequence[str], keep_rate: float, given: argparse.Namespace) -> Comparison:
    return Comparison(
        CompareSettings(
            model=model,
            methods=tuple(methods),
            keep_rates=(keep_rate,),
            device="cpu",
            threads=given.threads,
            checkpoint=given.checkpoint,
            pretrained=given.pretrained,
        )
    )


def _call(model: nn.Module, way: str, images: Tensor, folder: Path, name: str) -> Call:
    """Return the model in one of the ways to run it."""
    if way == "eager":
        return model
    if way == "compiled":
        # Code of its own for each: a reset would throw away what was compiled for the models before.
        compiled: Any = torch.compile(own_code(lambda images: model(images)), dynamic=False)
        return compiled
    to, ending = _FORMATS[way]
    file = folder / f"{name}{ending}"
    if not file.is_file():
        export(model, images[:2], file, to)
    runtime = load(file)
    return lambda images: runtime(images)[0]


def _difference(call: Call, expected: Tensor, images: Tensor) -> float:
    """Return the largest difference to eager mode, relative to the largest logit."""
    return ((call(images) - expected).abs().max() / expected.abs().max()).item()


def measure(given: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Yield a row for every model, keep rate, batch, way and method."""
    for name in given.models:
        for keep_rate in given.keep_rates:
            comparison = _comparison(name, given.methods, keep_rate, given)
            models: dict[str, nn.Module] = {_UNREDUCED: comparison.model}
            models |= {entry.label: entry.model for entry in comparison.entries}
            counts = {entry.label: entry.counts for entry in comparison.entries}
            for batch in given.batches:
                images = comparison.views(max(batch, 1))
                for way in given.ways:
                    yield from _rows(models, counts, comparison, images, way, folder, name, keep_rate, given.rounds)


def _rows(
    models: dict[str, nn.Module],
    counts: dict[str, tuple[int, ...]],
    comparison: Comparison,
    images: Tensor,
    way: str,
    folder: Path,
    name: str,
    keep_rate: float,
    rounds: int,
) -> Iterator[Row]:
    calls: dict[str, Call] = {}
    differences: dict[str, float] = {}
    with torch.no_grad():
        for label, model in models.items():
            slug = f"{name}-{label.replace(' ', '-')}" + ("" if label == _UNREDUCED else f"-{keep_rate:g}")
            calls[label] = _call(model, way, images, folder, slug)
            differences[label] = _difference(calls[label], model(images), images)
        if way == "eager":
            for label, kept in counts.items():
                calls[f"slice of {label}"] = FreeSlice(comparison.model, kept, comparison.blocks)
        for call in calls.values():
            call(images)
        timed = {label: (lambda call=call: call(images)) for label, call in calls.items()}
        seconds = take_turns(timed, torch.device("cpu"), rounds)
    for label in counts:
        found = speed_of(len(images), seconds[label], seconds[_UNREDUCED])
        row: Row = {"model": name, "keep_rate": keep_rate, "batch": len(images), "way": way, "method": label}
        row |= {"ratio": found.ratio, "quartiles": found.quartiles, "seconds": found.reduced}
        row |= {"unreduced_seconds": found.unreduced, "difference": differences[label]}
        if way == "eager":
            row["of_free_slice"] = speed_of(len(images), seconds[label], seconds[f"slice of {label}"]).ratio
        yield row


def _save(given: argparse.Namespace, rows: Sequence[Row], load: float | None) -> None:
    """Write what there is so far."""
    if given.json is not None:
        machine = environment(torch.device("cpu"))
        result = {"rows": list(rows), "load": load, "rounds": given.rounds, "environment": machine}
        given.json.write_text(json.dumps(result, indent=1) + "\n")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.deploy", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", type=_words, default=MODELS, help="timm models, with random weights unless given")
    parser.add_argument("--methods", type=_words, default=METHODS)
    parser.add_argument("--keep-rates", type=lambda text: tuple(map(float, _words(text))), default=None)
    parser.add_argument("--batches", type=lambda text: tuple(map(int, _words(text))), default=None)
    parser.add_argument("--ways", type=_words, default=None, help=f"of {', '.join(WAYS)}")
    parser.add_argument("--small-batches", action="store_true", help="batch 1, 2, 4, 8; eager, compiled, onnxruntime")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--checkpoint")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--json", type=Path, help="where to write everything")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table -> 1 if an exported model computes something else, 0 otherwise."""
    parser = _parser()
    given = parser.parse_args(arguments)
    given.ways = given.ways or (WAYS[:3] if given.small_batches else ("eager", "onnxruntime", "openvino"))
    given.batches = given.batches or ((1, 2, 4, 8) if given.small_batches else (1, 8))
    given.keep_rates = given.keep_rates or ((0.7, 0.5) if given.small_batches else (0.5,))
    if bad := [way for way in given.ways if way not in WAYS]:
        parser.error(f"unknown way {bad[0]!r}; expected {', '.join(WAYS)}")
    if given.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {given.rounds}")
    keep_memory()
    load_before = load_average()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for row in measure(given, Path(folder)):
                rows.append(row)
                _save(given, rows, load_before)
                print(".", end="", file=sys.stderr, flush=True)
        except (ValueError, TypeError) as error:
            parser.error(str(error))
    print(file=sys.stderr)
    print(*speed_lines(rows, given.ways), sep="\n")
    print(f"\nUnreduced ÷ reduced, {counted(given.rounds, 'round')} in turns; load before: {load_before}")
    print(*slower(rows), sep="\n", end="")
    wrong = [row for row in rows if row["difference"] > _TOLERANCE]
    for row in wrong:
        print(f"{row['model']} {row['method']} {row['way']}: differs from eager mode by {row['difference']:.1e}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
