"""Peak memory of inference at two lengths: it must grow as the number of tokens does, not as its square. No GPU needed.

python -m bench.memory [--methods topk,...] [--primitives gather_tokens,...] [--tokens 1025,4097] [--json FILE]

It prints three tables: whole models, with one image, at a keep rate of 0.5 and the default blocks; primitives by the
reference; and what the launchers of their kernels allocate, with CPU tensors and without running a kernel. On CUDA
models and primitives run Triton, and launchers are left out.

It counts what is alive at once, outputs included, weights and inputs left out. On CUDA torch.cuda.max_memory_allocated
says it. On the CPU it comes from the allocations and releases that torch.profiler records, which is exact; the resident
size of a process would show the allocator's habits. The exit code is not zero if something grows by more than 1.25
times as much as the tokens and is not among the known exceptions, or if one of these is not needed any more.

K-Medoids and Sinkhorn hold matrices of one image, of tokens against tokens or clusters. Those named in ``MATRICES`` are
taken off the peak, and the rest must grow no faster than anything else. A batch takes no more than a workspace. A last
table shows it: the launchers' peak with 16 images of the most tokens, over the workspace and what these images have
beyond it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fastreduce
from fastreduce.arguments import counted
from fastreduce.integrations.timm import create_model, reduced_counts
from fastreduce.measure import environment

from .primitives import Primitive, Shape
from .proof.gates import Gate, Known, check_words, choose_primitives, table

__all__ = ["allocations_only", "main", "peak_bytes"]

MODEL = "deit_tiny_patch16_224"
TOKENS = "1025,4097"
KEEP_RATE = 0.5
MOST_GROWTH = 1.25  # growth of the memory over that of the tokens
OPTIONS: dict[str, dict[str, Any]] = {"radial": {"schedule": "stages"}}
# What holds matrices of one image: how many, by the reference and by kernels. Sinkhorn's kernels have two numbers more
# for every 64 tokens and a cluster.
MATRICES = {"cluster_k_medoids": (2.5, 1), "kmedoids": (2.5, 1), "sinkhorn_merge": (4, 1 + 2 / 64), "sinkhorn": (4, 1)}
IMAGES = 16  # so many that their matrices are larger than the workspace
# Kind and method or primitive: the growth over that of the tokens, which is 4 where all is quadratic.
KNOWN = {
    "reference attention": Known(4, "under a policy, in DynamicViT's training: only the kernel does without matrices"),
}


def _peak_of_trace(path: Path) -> int:
    """Return the most bytes alive at once, from what a trace says of every allocation and release."""
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        alive += event["args"]["Bytes"]
        most = max(most, alive)
    return most


@torch.inference_mode()
def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Return the bytes that a call has allocated at once beyond what was there before."""
    if device.type == "cuda":
        call()  # libraries allocate their workspaces at their first call
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        profiler.export_chrome_trace(str(path))
        return _peak_of_trace(path)


@contextlib.contextmanager
def allocations_only() -> Iterator[None]:
    """Let ``backend="triton"`` take CPU tensors within the block, and launches do nothing."""
    from triton.runtime.jit import JITFunction

    from .proof.idle import idle_driver

    run = JITFunction.run
    JITFunction.run = lambda *args, **kwargs: None
    try:
        with idle_driver():
            yield
    finally:
        JITFunction.run = run


def _build(name: str, tokens: int, device: torch.device) -> tuple[nn.Module, Tensor]:
    """Return a model that has so many tokens, and an image for it.

    Raises:
        ValueError: no square grid has so many.
    """
    torch.manual_seed(0)
    usual: Any = create_model(name)
    patches = tokens - usual.num_prefix_tokens
    side = math.isqrt(max(0, patches))
    if not patches > 0 or side * side != patches:
        raise ValueError(
            f"{name} takes a square of patches and {counted(usual.num_prefix_tokens, 'token')} more, got {tokens}"
        )
    size = side * usual.patch_embed.patch_size[0]
    return create_model(name, img_size=size).eval().to(device), torch.randn(1, 3, size, size, device=device)


def _models(name: str, tokens: int, methods: Sequence[str], device: torch.device) -> Iterator[tuple[str, int, str]]:
    """Name, peak and what is kept, of the unreduced model and of every method."""
    model, image = _build(name, tokens, device)
    yield "unreduced", peak_bytes(lambda: model(image), device), ""
    for method in methods:
        reduced = fastreduce.patch(model, method, keep_rate=KEEP_RATE, **OPTIONS.get(method, {}))
        kept = ", ".join(map(str, reduced_counts(reduced)))
        yield method, peak_bytes(lambda reduced=reduced: reduced(image), device), kept
        fastreduce.unpatch(model)


def _matrices(kind: str, name: str, tokens: int) -> float:
    """Return the bytes of the matrices that one image of so many tokens may hold, the class token's row aside."""
    if name not in MATRICES:
        return 0.0
    patches = tokens - 1
    columns = patches if "medoids" in name else patches // 2
    return 4.0 * MATRICES[name][kind in ("kernels", "primitive")] * patches * columns


def _primitive(primitive: Primitive, shape: Shape, backend: str, device: torch.device) -> int:
    inputs = primitive.make(shape, torch.Generator(device).manual_seed(0))
    return peak_bytes(lambda: primitive.call(**inputs, backend=backend), device)


class _Run:
    """Rows of what was measured, by kind and name."""

    def __init__(self, tokens: Sequence[int]):
        self.tokens = tokens
        self.gate = Gate("growth over that of the tokens", MOST_GROWTH, KNOWN)
        self.bounded = Gate("peak of many images over the workspace and what is beyond it", 1)
        self.rows: dict[str, dict[str, Any]] = {}

    def add(self, kind: str, name: str, tokens: int, peak: int, kept: str = "") -> None:
        """Add the row of the last number of tokens, with the growth since the first."""
        row = self.rows.setdefault(f"{kind} {name}", {"kind": kind, "name": name, "peaks": {}})
        row["peaks"][tokens] = peak
        row["kept"] = kept
        if tokens == self.tokens[-1]:
            first = self.tokens[0]
            row["growth"] = peak / max(1, row["peaks"][first])
            beyond = max(0.0, peak - _matrices(kind, name, tokens))
            before = max(1.0, row["peaks"][first] - _matrices(kind, name, first))
            row["beyond"] = beyond / before if beyond < peak else row["growth"]
            row["gate"] = self.gate.check(f"{kind} {name}", row["beyond"] * first / tokens)

    def add_many(self, name: str, peak: int) -> None:
        """Add a launcher's peak with IMAGES images of the most tokens."""
        from fastreduce.kernels import _workspace

        tokens = self.tokens[-1]
        row, one = {"kind": "many", "name": name}, self.rows[f"kernels {name}"]["peaks"][tokens]
        allowed = _workspace.WORKSPACE + IMAGES * (one - _matrices("kernels", name, tokens))
        row |= {"peaks": {tokens: peak}, "growth": peak / one, "beyond": peak / allowed}
        row["gate"] = self.bounded.check(f"many {name}", row["beyond"])
        self.rows[f"many {name}"] = row

    def table(self, kind: str) -> str:
        """Return the rows of a kind, peaks in MB."""
        columns = {f"MB at {count}": count for count in self.tokens}
        rows = [
            {
                kind: row["name"],
                **{title: row["peaks"][count] / 1e6 for title, count in columns.items() if count in row["peaks"]},
                **row,
            }
            for row in self.rows.values()
            if row["kind"] == kind
        ]
        kept = ["kept"] if kind == "model" else []
        return table(rows, (kind, *columns, "growth", "beyond", "gate", *kept))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", help="names, comma separated; then primitives are left out (default: all)")
    parser.add_argument("--primitives", help="names, comma separated; then models are left out (default: all)")
    parser.add_argument("--tokens", default=TOKENS, help=f"with the class token, ascending; default {TOKENS}")
    parser.add_argument("--model", default=MODEL, help=f"of timm; default {MODEL}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, judge; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    everything = options.methods is None and options.primitives is None
    device, start = torch.device(options.device), time.perf_counter()
    methods = primitives = None
    try:
        tokens = [int(word) for word in options.tokens.split(",")]
        if len(tokens) < 2 or tokens != sorted(set(tokens)):
            raise ValueError(f"--tokens wants at least two numbers, ascending, got {options.tokens!r}")
        if everything or options.methods is not None:
            methods = list(fastreduce.REDUCERS) if everything else options.methods.split(",")
            check_words(methods, fastreduce.REDUCERS, "method")
        if everything or options.primitives is not None:
            primitives = choose_primitives(options.primitives)
        run = _Run(tokens)
        if methods is not None:
            for count in tokens:
                for name, peak, kept in _models(options.model, count, methods, device):
                    run.add("model", name, count, peak, kept)
            print(run.table("model"), end="\n\n", flush=True)
    except ValueError as error:
        parser.error(str(error))
    kinds = ("primitive",) if device.type == "cuda" else ("reference", "kernels")
    for kind in kinds if primitives is not None else ():
        for count in tokens:
            for name, primitive in primitives.items():
                with allocations_only() if kind == "kernels" else contextlib.nullcontext():
                    backend = "triton" if kind == "kernels" else "auto"
                    run.add(kind, name, count, _primitive(primitive, Shape("deit_tiny", count, 1), backend, device))
        print(run.table(kind), end="\n\n", flush=True)
    many = [name for name in primitives or {} if name in MATRICES] if "kernels" in kinds else []
    for name in many:
        with allocations_only():
            shape = Shape("deit_tiny", tokens[-1], IMAGES)
            run.add_many(name, _primitive(primitives[name], shape, "triton", device))  # type: ignore[index]
    if many:
        print(run.table("many"), end="\n\n", flush=True)
    for reason in run.gate.reasons():
        print(f"known: {reason}")
    usual = options.tokens == TOKENS and options.model == MODEL and device.type == "cpu"
    stale: Any = "none" if not usual else "all" if everything else "seen"
    failures = run.gate.failures(stale) + run.bounded.failures("none")
    for failure in failures:
        print(f"FAILED {failure}")
    found = counted(len(failures), "failure")
    print(f"\n{counted(len(run.rows), 'peak')}, {time.perf_counter() - start:.0f} s, {found}")
    if options.json is not None:
        made = {"environment": environment(device), "peaks": list(run.rows.values()), "failures": failures}
        options.json.write_text(json.dumps(made, indent=1))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
