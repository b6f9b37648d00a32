"""Near-ties: how close the scores lie that decide, and whether a runtime decides otherwise there.

``python -m bench.near_ties`` prints a line for each method and runtime: decisions that differ from eager mode's, over
views of a picture, and the gap between the last token chosen and the first one not chosen, of each image and stage.
Where a decision differs, the gap there is printed too: a difference with a wide gap is a fault, not rounding.
``--std`` draws the weights of a method's own layers anew, with that standard deviation.

For ToMe a gap is the smaller one of two: between the last pair that is merged and the first one that is not, and, of
the tokens that are merged, between the similarity with the partner and with the second best.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastreduce.arguments import counted
from fastreduce.deploy import FORMATS, Decided, export, load, settled
from fastreduce.measure import environment
from fastreduce.names import TITLES
from fastreduce.speed.comparison import Comparison
from fastreduce.speed.settings import CompareSettings

from .markdown import markdown_table

__all__ = ["Margins", "compare", "main", "margins", "redraw"]

METHODS = ("topk", "evit", "dynamicvit", "tome")
RUNTIMES = {"onnxruntime": "onnx", "openvino": "openvino"}

_WIDE = 3e-5  # of the largest score: what float32 loses in a dozen blocks is less

Row = dict[str, Any]


class Margins(NamedTuple):
    """Scores of one stage, by image.

    Attributes:
        spread: (B,) the highest score less the lowest.
        size: (B,) the largest of their magnitudes, of which rounding is a part.
        gap: (B,) between the last one chosen and the first one not chosen.
    """

    spread: Tensor
    size: Tensor
    gap: Tensor


def _margins(values: Tensor, k: int) -> Margins:
    """Return the margins of choosing the k lowest of values (B, N); infinite ones stand for tokens that cannot be."""
    ascending = values.double().sort(1).values
    finite = torch.where(ascending.isinf(), ascending[:, :1], ascending)
    return Margins(finite.amax(1) - finite[:, 0], finite.abs().amax(1), ascending[:, k] - ascending[:, k - 1])


@contextlib.contextmanager
def _noted() -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Note what the references sort (B, N), and the lead (B, A) of each token's partner in ToMe's matching."""
    select = importlib.import_module("fastreduce.reference.select_topk")
    match = importlib.import_module("fastreduce.reference.match_tokens")
    lowest_first, nearest = select.lowest_first, match._nearest
    sorted_values: list[Tensor] = []
    leads: list[Tensor] = []

    def noting(values: Tensor, k: int) -> Tensor:
        sorted_values.append(values.detach())
        return lowest_first(values, k)

    def noting_partners(a: Tensor, b: Tensor, prefix: int) -> Any:
        best_two = (a @ b[:, prefix:].mT).topk(2, dim=2).values
        leads.append(best_two[..., 0].double() - best_two[..., 1])
        return nearest(a, b, prefix)

    select.lowest_first = match.lowest_first = noting
    match._nearest = noting_partners
    try:
        yield sorted_values, leads
    finally:
        select.lowest_first = match.lowest_first = lowest_first
        match._nearest = nearest


def margins(decided: Decided, images: Tensor) -> tuple[list[Tensor], list[Margins]]:
    """Run a reduced model in eager mode -> its results and decisions, and the margins of every stage."""
    with _noted() as (found, leads), torch.no_grad():
        results = list(decided(images))
    if len(found) != len(decided.kinds):
        stages = counted(len(decided.kinds), "stage")
        raise ValueError(f"{counted(len(found), 'selection')} in {stages}: expected one of {METHODS}")
    tensors, each = results[1:], []
    for stage, (kind, values) in enumerate(zip(decided.kinds, found, strict=True)):
        decision = tensors.pop(0)
        if kind.kept:
            each.append(_margins(values, decision.shape[1]))
            continue
        tokens, num_out = decision.shape[1], int(decision.max()) + 1
        margin = _margins(values, tokens - num_out)
        merged = values.sort(dim=1, stable=True).indices[:, : tokens - num_out]
        lead = leads[stage].gather(1, merged).amin(1)
        each.append(margin._replace(gap=torch.minimum(margin.gap, lead)))
    if not each:
        raise ValueError("no stage reduces anything: give a lower keep rate")
    return results, each


def compare(decided: Decided, images: Tensor, runtimes: Sequence[str], folder: Path) -> Iterator[Row]:
    """Yield a row for each runtime: its decisions held against eager mode, and the margins of these."""
    (expected, *tensors), each = margins(decided, images)
    ours = settled(tensors, decided.kinds)
    spreads, sizes, gaps = map(torch.stack, zip(*each, strict=True))  # (stages, B) each
    names = ["logits", *(f"decision_{place}" for place in range(len(tensors)))]
    for runtime in runtimes:
        to = RUNTIMES[runtime]
        file = export(decided, images[:2], folder / f"decided{FORMATS[to].ending}", to, names=names)
        found, *theirs = load(file)(images)
        alike = torch.ones(len(images), dtype=torch.bool)
        otherwise: list[tuple[float, float]] = []
        for gap, size, one, other in zip(gaps, sizes, ours, settled(theirs, decided.kinds), strict=True):
            differ = alike & (one != other).any(1)
            otherwise += zip(gap[differ].tolist(), (gap / size)[differ].tolist(), strict=True)
            alike &= ~differ  # from here on the tokens of that image are others
        difference = (found - expected).abs().flatten(1).amax(1) / expected.abs().max()
        yield {
            "runtime": runtime,
            "images": len(images),
            "spread": [spreads.min().item(), spreads.max().item()],
            "gap": [gaps.min().item(), gaps.max().item()],
            "otherwise": sorted(otherwise),  # the gap, and the gap as a part of the largest score
            "difference": difference[alike].max().item() if alike.any() else None,
            "difference_otherwise": difference[~alike].max().item() if otherwise else None,
        }


def redraw(model: nn.Module, std: float, seed: int = 0) -> None:
    """Draw the weights of a method's own layers anew."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("reducers.") and parameter.ndim > 1:
                parameter.normal_(std=std, generator=generator)


def _lines(rows: Sequence[Row]) -> list[str]:
    """Return a table in Markdown."""
    cells = []
    for row in rows:
        low, high = row["gap"]
        widest = f"{row['otherwise'][-1][0]:.0e}" if row["otherwise"] else ""
        differences = [row["difference"], row["difference_otherwise"]]
        cells.append(
            [
                TITLES.get(row["method"], row["method"]),
                row["layers"],
                row["runtime"],
                f"{len(row['otherwise'])} of {row['images']}",
                f"{row['spread'][1]:.0e}",
                f"{low:.0e} to {high:.0e}",
                widest,
                *("" if one is None else f"{one:.0e}" for one in differences),
            ]
        )
    heads = ["method", "its layers", "runtime", "images decided otherwise", "scores within", "gap", "widest gap there"]
    return markdown_table([*heads, "difference of logits", "where decided otherwise"], cells)


def _measure(given: argparse.Namespace) -> Iterator[Row]:
    settings = CompareSettings(
        model=given.model,
        methods=given.methods,
        keep_rates=(given.keep_rate,),
        device="cpu",
        checkpoint=given.checkpoint,
        pretrained=given.pretrained,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "\\w+ adds layers with random weights")  # the table says it
        comparison = Comparison(settings)
    images = comparison.views(given.images)
    for entry in comparison.entries:
        own = any(name.startswith("reducers.") for name, _ in entry.model.named_parameters())
        for std in (None, given.std) if own and given.std else (None,):
            if std is not None:
                redraw(entry.model, std)
            layers = "" if not own else entry.layers or "" if std is None else f"drawn with {std:g}"
            with tempfile.TemporaryDirectory() as folder:
                for row in compare(Decided(entry.model), images, given.runtimes, Path(folder)):
                    yield {"method": entry.label, "layers": layers, "weights": comparison.weights, **row}


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table -> 1 if a runtime decides otherwise where the gap is wide, 0 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m bench.near_ties", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model", default="deit_tiny_patch16_224", help="a timm model, with random weights unless given"
    )
    parser.add_argument("--methods", type=_words, default=METHODS, help=f"of {', '.join(METHODS)}")
    parser.add_argument("--runtimes", type=_words, default=tuple(RUNTIMES), help=f"of {', '.join(RUNTIMES)}")
    parser.add_argument("--keep-rate", type=float, default=0.5)
    parser.add_argument("--images", type=int, default=32, help="views of a picture")
    parser.add_argument("--std", type=float, default=0.15, help="of weights of a method's own layers; 0 leaves it out")
    parser.add_argument("--wide", type=float, default=_WIDE, help="gaps above it, as a part of the scores, are faults")
    parser.add_argument("--checkpoint")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--json", type=Path, help="where to write everything")
    given = parser.parse_args(arguments)
    for name, known in (("methods", METHODS), ("runtimes", RUNTIMES)):
        if bad := [one for one in getattr(given, name) if one not in known]:
            parser.error(f"unknown {name.removesuffix('s')} {bad[0]!r}; expected {', '.join(known)}")
    if given.images < 2:
        parser.error(f"--images must be at least 2, got {given.images}")
    rows: list[Row] = []
    try:
        for row in _measure(given):
            rows.append(row)
            print(".", end="", file=sys.stderr, flush=True)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    print(file=sys.stderr)
    print(*_lines(rows), sep="\n")
    if given.json is not None:
        result = {"rows": rows, "environment": environment(torch.device("cpu"))}
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    code = 0
    for row in rows:
        for gap, part in row["otherwise"]:
            if part > given.wide:
                code = 1
                print(f"{row['method']} in {row['runtime']}: decided otherwise in spite of a gap of {gap:.1e}")
    return code


if __name__ == "__main__":
    sys.exit(main())
