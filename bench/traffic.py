"""Bytes that the kernels request over the least possible, and operator calls of every reducing block. No GPU needed.

python -m bench.traffic [--shapes deit_small-197-1-float16,...] [--primitives gather_tokens,...] [--json FILE]

Kernels run in Triton's interpreter, where every active lane of every load and store is counted. Non-zero exit if a gate
is missed that is not among the known exceptions, or if one of these is not needed any more.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import argparse
import collections
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastreduce
from bench.proof import tiny
from fastreduce.arguments import counted
from fastreduce.measure import environment

from .microbenchmark import DIRECTIONS
from .primitives import Inputs, Outputs, Primitive, Shape, differentiate, parse_shapes
from .proof.gates import Gate, Known, choose_primitives, table
from .proof.interpreter import install_fixes
from .proof.operator_counts import OperatorCounts
from .proof.traffic import traffic

__all__ = ["BlockCalls", "added_calls", "block_calls", "main", "primitive_traffic"]

SHAPES = "deit_small-197-2-float16,deit_tiny-50-2-float32"
MOST_TRAFFIC = 1.15  # bytes over the floor, or over the least that tiles allow
MOST_CALLS = 3
# As on CUDA, where ATS leaves its padding: to cut it, the host would have to wait for the longest image.
OPTIONS: dict[str, dict[str, Any]] = {"radial": {"schedule": "stages"}, "ats": {"trim": False}}
HARD = ("topk", "evit", "ats", "dynamicvit", "tome", "kmedoids", "dpcknn", "radial")

# Primitive, direction and, where only one is meant, model and tokens.
_PAST_THE_END = "rows of a tile past the end repeat the last row, since a mask of their own costs registers"
_OWN_NORMS = "norms are a pass of their own"
_NORMS_APART = "norms are a pass of their own: a load that feeds a product and a sum races on sm_90 (Triton issue 6691)"
KNOWN_TRAFFIC = {
    "attention_policy forward deit_tiny-50": Known(
        1.19, "the mean of V is a pass of its own, where one tile holds all else"
    ),
    "attention_policy backward deit_tiny-50": Known(
        1.16, "besides, the saved result and the keys of the greatest logits are read"
    ),
    "cluster_dpc_knn forward": Known(1.52, f"{_PAST_THE_END}; {_OWN_NORMS}"),
    "cluster_dpc_knn forward deit_tiny-50": Known(1.98, "as above, with tiles of 32 and 64 for 49 tokens"),
    "cluster_k_medoids forward": Known(1.43, f"{_PAST_THE_END}; {_OWN_NORMS}"),
    "cluster_k_medoids forward deit_tiny-50": Known(1.71, "as above, with tiles of 64 of which 49 rows are tokens"),
    "received_scores forward": Known(1.36, _PAST_THE_END),
    "received_scores forward deit_tiny-50": Known(1.47, "as above, with tiles of 64 of which 50 rows are tokens"),
    "sinkhorn_merge forward": Known(1.25, _NORMS_APART),
    "sinkhorn_merge forward deit_tiny-50": Known(1.4, "as above, where one tile holds all clusters"),
    "sample_tokens forward": Known(7.5, "one program an image searches a table of a few KiB that it has just written"),
}
KNOWN_CALLS = {
    "dynamicvit": Known(15, "its predictor is a network of thirteen operators, all of them PyTorch's own"),
}


class _OtherOperators(OperatorCounts):
    """Operators around ours, views left out."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "fastreduce":
            return function(*args, **(kwargs or {}))
        return super().__torch_dispatch__(function, types, args, kwargs)


def _listed(counts: collections.Counter[str]) -> str:
    return ", ".join(name if count == 1 else f"{count} {name}" for name, count in sorted(counts.items()))


def primitive_traffic(primitive: Primitive, shape: Shape, direction: str) -> dict[str, Any]:
    """Return a row of the first table: bytes requested, the least possible, their ratio, launches."""
    inputs = primitive.make(shape, torch.Generator().manual_seed(0))

    def call(arguments: Inputs) -> Outputs:
        return primitive.call(**arguments, backend="triton")

    if direction == "forward":
        with traffic() as counted, _OtherOperators() as others:
            outputs = call(inputs)
        floor = primitive.floor(inputs, outputs)
        tiled = primitive.tiled and primitive.tiled(inputs)
    else:
        backward, outputs = differentiate(call, inputs, primitive.gradients)
        with traffic() as counted, _OtherOperators() as others:
            gradients = backward()
        assert primitive.backward_floor is not None
        floor = primitive.backward_floor(inputs, outputs, gradients)
        tiled = primitive.backward_tiled and primitive.backward_tiled(inputs)
    least = floor if tiled is None else tiled
    return {
        "primitive": primitive.name,
        "direction": direction,
        "shape": str(shape),
        "requested": counted.requested,
        "floor": floor,
        "tiled": tiled,
        "ratio": counted.requested / least,
        "operators": others.counts.total(),
        "launches": dict(counted.launches),
        "loads": dict(counted.loads),
        "stores": dict(counted.stores),
    }


@dataclasses.dataclass
class BlockCalls:
    """Operators that a block called, views left out, ours once each; and the kernels that they launched."""

    operators: collections.Counter[str]
    launches: collections.Counter[str]


def block_calls(model: nn.Module, images: Tensor, block: int) -> BlockCalls:
    """Count the calls of one block in a forward pass of the model."""
    counts = []
    module: Any = model.blocks[block]
    forward = module.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        with traffic() as counted, OperatorCounts() as operators:
            result = forward(*args, **kwargs)
        counts.append(BlockCalls(operators.counts, counted.launches))
        return result

    module.forward = counting
    try:
        with torch.no_grad():
            model(images)
    finally:
        del module.forward
    (once,) = counts
    return once


def added_calls(method: str) -> dict[str, Any]:
    """Return a row of the second table: what a reducing block calls beyond the plain one.

    K-Medoids has the block before measure how much attention tokens receive, so that one counts too.
    """
    at = 2
    model = tiny.build()
    images = tiny.images(model)
    plain = block_calls(model, images, at).operators
    fastreduce.patch(model, method, keep=[8], at=at, backend="triton", **OPTIONS.get(method, {}))
    blocks = [block_calls(model, images, block) for block in ((at - 1, at) if method == "kmedoids" else (at,))]
    added: collections.Counter[str] = collections.Counter()
    launches: collections.Counter[str] = collections.Counter()
    for block in blocks:
        added.update(block.operators)
        added.subtract(plain)
        launches.update(block.launches)
    return {
        "method": method,
        "kind": "hard" if method in HARD else "soft",
        "added": added.total(),
        "operators": {name: count for name, count in added.items() if count},
        "launches": dict(launches),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes", default=SHAPES, help=f"MODEL-TOKENS-BATCH[-DTYPE], comma separated; default {SHAPES}"
    )
    parser.add_argument("--primitives", help="names, comma separated; then reducers are left out (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was counted")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print, judge; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        shapes = parse_shapes(options.shapes, torch.float32)
        primitives = choose_primitives(options.primitives)
    except ValueError as error:
        parser.error(str(error))
    install_fixes()
    torch.set_num_threads(1)  # the tensors are small
    start = time.perf_counter()
    ratios = Gate("traffic", MOST_TRAFFIC, KNOWN_TRAFFIC)
    floors = Gate("a floor above what is requested", 1, at_least=True)
    calls = Gate("added calls", MOST_CALLS, KNOWN_CALLS)
    rows = []
    for primitive in primitives.values():
        for direction in DIRECTIONS if primitive.gradients else DIRECTIONS[:1]:
            for shape in shapes:
                row = primitive_traffic(primitive, shape, direction)
                key = f"{primitive.name} {direction} {shape.model}-{shape.tokens}"
                floors.check(key, row["ratio"])
                rows.append(row | {"gate": ratios.check(key, row["ratio"])})
    columns = ("primitive", "direction", "shape", "requested", "floor", "tiled", "ratio", "gate", "operators")
    shown = [row | {"launches": _listed(collections.Counter(row["launches"]))} for row in rows]
    print(table(shown, (*columns, "launches")))
    added = []
    if options.primitives is None:
        added = [added_calls(method) for method in fastreduce.REDUCERS]
        for row in added:
            row["gate"] = calls.check(row["method"], row["added"]) if row["kind"] == "hard" else "shown"
        shown = [
            row | {name: _listed(collections.Counter(row[name])) for name in ("operators", "launches")} for row in added
        ]
        print()
        print(table(shown, ("method", "kind", "added", "gate", "operators", "launches")))
    print()
    for gate in (ratios, calls):
        for reason in gate.reasons():
            print(f"known {gate.name}: {reason}")
    stale: Any = "none" if options.shapes != SHAPES else "all" if options.primitives is None else "seen"
    failures = [failure for gate in (floors, ratios, calls) for failure in gate.failures(stale)]
    for failure in failures:
        print(f"FAILED {failure}")
    done = f"{counted(len(rows), 'pass')}, {counted(len(added), 'reducer')}, {time.perf_counter() - start:.0f} s"
    print(f"\n{done}, {counted(len(failures), 'failure')}")
    if options.json is not None:
        made = {"environment": environment(torch.device("cpu")), "traffic": rows, "added_calls": added}
        options.json.write_text(json.dumps(made | {"failures": failures}, indent=1))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
