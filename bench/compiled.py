"""Reduced models under torch.compile: how often they are compiled, and how fast they are then.

``python -m bench.compiled`` counts the compilations of every method, compiled whole and block by block, on a model of
four blocks: at the first batch, at a batch of another size and at one of a further size, and after a change of the keep
rate or the backend. Then it times DeiT-S: unreduced ÷ reduced in eager mode, compiled whole and block by block, the
plain form of the method compiled beside ours, and a compiled training step. ``--counts`` leaves the times out.

All models of a row take turns, and what is compiled is held against eager mode first.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.testing
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastreduce
from fastreduce.arguments import counted
from fastreduce.deploy.check import speed_of
from fastreduce.measure import environment, keep_memory, load_average, own_code, recompile_limits, take_turns
from fastreduce.speed.comparison import Comparison
from fastreduce.speed.settings import CompareSettings

from .deploy_tables import CHANGES, Row, count_lines, time_lines

__all__ = ["count", "main", "measure"]

METHODS: dict[str, dict[str, Any]] = {
    "topk": {},
    "evit": {},
    "dynamicvit": {},
    "ats": {},
    "tome": {},
    "kmedoids": {},
    "dpcknn": {},
    "sit": {},
    "patchmerger": {},
    "sinkhorn": {},
    "radial": {"norm": "l2"},
}
TIMED = ("topk", "evit", "ats", "tome", "dpcknn")
FORMS = ("whole", "blocks")
_TOLERANCE = 1e-3  # of the logits, relative to the largest: beyond it a speed is of another model
_UNREDUCED = "unreduced"

Call = Callable[[Tensor], Tensor]


def _small(method: str, options: dict[str, Any], keep_rate: float) -> nn.Module:
    """Return a reduced model of four blocks with random weights, in evaluation mode."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=4, embed_dim=32, depth=4, num_heads=2, num_classes=7).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of random weights
        return fastreduce.patch(model, method, at=(1, 2), keep_rate=keep_rate, **options).eval()


def count(method: str, form: str = "whole", backend: str = "eager", **options: Any) -> dict[str, int | None]:
    """Count the compilations of one method at every change of ``deploy_tables.CHANGES``.

    Args:
        method: a name in ``fastreduce.REDUCERS``.
        form: ``"whole"``, without graph breaks, or ``"blocks"``, every block compiled by itself.
        backend: of torch.compile.
        **options: the method's.

    Returns:
        A number for each change, None for what the method refuses.
    """
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    model, found = _small(method, options, 0.6), dict.fromkeys(CHANGES)
    run: Any = model
    if form == "whole":
        run = torch.compile(model, backend=counter, fullgraph=True)
    else:
        for block in model.blocks:  # type: ignore[union-attr]
            block.compile(backend=counter, fullgraph=True)
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def keep_fewer() -> None:
        fastreduce.set_keep_rate(model, 0.5)
        run(images)

    def by_reference() -> None:
        with fastreduce.backend("reference"):
            run(images)

    calls = (lambda: run(images[:4]), lambda: run(images[:3]), lambda: run(images), keep_fewer, by_reference)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limits(64)):
        for change, call in zip(CHANGES, calls, strict=True):
            before = counter.frame_count
            try:
                call()
            except ValueError:  # a method whose layers or patterns were made for its schedule
                continue
            found[change] = counter.frame_count - before
    torch._dynamo.reset()
    return found


def _compiled(model: nn.Module, form: str, **options: Any) -> Call:
    """Return a call of the model compiled whole, or of a model whose blocks are."""
    if form == "whole":
        compiled: Any = torch.compile(own_code(lambda images: model(images)), dynamic=False, **options)
        return compiled
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(dynamic=False, **options)
    return model


def _step(model: nn.Module, labels: Tensor, compiled: bool) -> Call:
    """Return a training step that gives its loss: forward, cross-entropy, backward."""

    def losses(images: Tensor) -> Tensor:
        return F.cross_entropy(model(images), labels)

    forward: Any = torch.compile(own_code(losses), dynamic=False) if compiled else losses

    def step(images: Tensor) -> Tensor:
        model.zero_grad()
        loss = forward(images)
        loss.backward()
        return loss.detach()

    return step


def _comparison(given: argparse.Namespace) -> Comparison:
    return Comparison(
        CompareSettings(
            model=given.model,
            methods=given.timed,
            keep_rates=(given.keep_rate,),
            device=given.device,
            threads=given.threads,
        )
    )


def _timed(calls: dict[str, Call], images: Tensor, rounds: int) -> dict[str, list[float]]:
    for call in calls.values():
        call(images)
        call(images)
    return take_turns({name: functools.partial(call, images) for name, call in calls.items()}, images.device, rounds)


def _rows(way: str, calls: dict[str, Call], images: Tensor, expected: dict[str, Tensor], rounds: int) -> Iterator[Row]:
    """Yield a row a method: the unreduced model's seconds over its own, all run in one way."""
    differences = {name: _difference(call(images), expected[name]) for name, call in calls.items()}
    seconds = _timed(calls, images, rounds)
    for name in calls:
        if name == _UNREDUCED or name.endswith(" plain"):
            continue
        found = speed_of(len(images), seconds[name], seconds[_UNREDUCED])
        row = {"method": name, "way": way, "batch": len(images), "ratio": found.ratio, "quartiles": found.quartiles}
        row |= {"seconds": found.reduced, "unreduced_seconds": found.unreduced, "difference": differences[name]}
        if f"{name} plain" in seconds:
            row["over_plain"] = speed_of(len(images), seconds[name], seconds[f"{name} plain"]).ratio
        yield row


def _difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def measure(given: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for every way and method: eager, compiled whole and by blocks, and a training step of each kind."""
    comparison = _comparison(given)
    images = comparison.views(given.batch).to(comparison.device)
    models: dict[str, nn.Module] = {_UNREDUCED: comparison.model}
    models |= {entry.label: entry.model for entry in comparison.entries}
    plain = {f"{entry.label} plain": entry.plain for entry in comparison.entries if entry.method != "kmedoids"}
    with torch._dynamo.config.patch(recompile_limits(64)):
        with torch.no_grad():
            both = {**models, **plain}
            expected = {name: model(images) for name, model in both.items()}
            yield from _rows("eager", dict(both), images, expected, given.rounds)
            calls = {name: _compiled(model, "whole") for name, model in both.items()}
            yield from _rows("whole", calls, images, expected, given.rounds)
            if comparison.device.type == "cuda":
                calls = {name: _compiled(model, "whole", mode="reduce-overhead") for name, model in both.items()}
                yield from _rows("reduce-overhead", calls, images, expected, given.rounds)
            torch._dynamo.reset()
        if given.training:
            yield from _training(models, images, given.rounds)
        with torch.no_grad():  # last, since compiled blocks stay so
            calls = {name: _compiled(model, "blocks") for name, model in models.items()}
            yield from _rows("blocks", calls, images, expected, given.rounds)


def _training(models: dict[str, nn.Module], images: Tensor, rounds: int) -> Iterator[Row]:
    """Yield a row a method for a training step in eager mode and compiled; DynamicViT draws, and is left out."""
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    trained = {name: model.train() for name, model in models.items() if name != "dynamicvit"}
    expected = {name: _step(model, labels, False)(images) for name, model in trained.items()}
    for way, compiled in (("training, eager", False), ("training, whole", True)):
        calls = {name: _step(model, labels, compiled) for name, model in trained.items()}
        yield from _rows(way, calls, images, expected, rounds)
    for model in trained.values():
        model.eval().zero_grad()
    torch._dynamo.reset()


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.compiled", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", type=_words, default=tuple(METHODS), help="whose compilations are counted")
    parser.add_argument("--counts", action="store_true", help="count only")
    parser.add_argument("--timed", type=_words, default=TIMED, help="methods that are timed")
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm model that is timed")
    parser.add_argument("--keep-rate", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-training", dest="training", action="store_false")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="where to write everything")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, measure, print both tables -> 1 if what is compiled computes something else, 0 otherwise."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if bad := [name for name in (*given.methods, *given.timed) if name not in METHODS]:
        parser.error(f"unknown method {bad[0]!r}; expected {', '.join(METHODS)}")
    if given.rounds < 1 or given.batch < 1:
        parser.error(f"--rounds and --batch must be at least 1, got {min(given.rounds, given.batch)}")
    keep_memory()
    before = load_average()
    counts: list[Row] = []
    for method in given.methods:
        for form in FORMS:
            counts.append({"method": method, "form": form, **count(method, form, **METHODS[method])})
    print(*count_lines(counts), sep="\n", flush=True)
    rows: list[Row] = []
    if not given.counts:
        try:
            for row in measure(given):
                rows.append(row)
                print(".", end="", file=sys.stderr, flush=True)
        except (ValueError, TypeError) as error:
            parser.error(str(error))
        print(file=sys.stderr)
        print("", *time_lines(rows), sep="\n")
        print(f"\nUnreduced ÷ reduced, {counted(given.rounds, 'round')} in turns; load before: {before}")
    if given.json is not None:
        machine = environment(torch.device(given.device))
        result = {"counts": counts, "rows": rows, "load": before, "rounds": given.rounds, "environment": machine}
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    wrong = [row for row in rows if row["difference"] > _TOLERANCE]
    for row in wrong:
        print(f"{row['method']} {row['way']}: differs from eager mode by {row['difference']:.1e}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
