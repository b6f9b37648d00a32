"""Everything that needs a GPU, in one command of at most eight minutes, what matters most first.

python -m bench.gpu [--seconds 480] [--out bench/results]
python -m bench.gpu --device cpu --quick        # the same without a GPU, to see that it works

It writes ``<out>/<device>-<date>.json`` after every result and the tables of the same name at the end, so that it can
be cut short (Ctrl-C, or the time is up) and still leaves what it has. Everything is done in child processes, see
``bench.children``: a kernel that crashes, hangs or breaks CUDA there is written down, and the rest goes on.

Its parts, in this order, each with its share of the time; what a part leaves goes to those after it:

1. Parity in bfloat16 of every kernel, forward and backward, against float64, at DeiT-S's 197 tokens.
2. The same call 20 times: every result has the same bits, or two programs or warps race.
3. Every reduced model once, in many processes as the checks before, to fill Triton's cache for what follows.
4. Kernels at batch 256, ours and PyTorch's (``bench.microbenchmark``). Then whole models (``bench.models``): DeiT-S as
   a CUDA graph at batch 256, and after it at 1, 8 and 32. Then both sides of the rule of ``auto``, and DeiT-B.
5. Parity in float32 and float16 and at other shapes; one small launch under ``compute-sanitizer --tool racecheck``.
6. Other keep rates, eager and training; the plain algorithms and the references; last, what has to be compiled.

What is wrong in a dtype is not timed in it. The exit code is 0 if all kernels agree with float64 and with themselves.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fastreduce._files import write_atomically
from fastreduce.arguments import counted
from fastreduce.measure import environment

from .children import Child, Item, Row, serve
from .gpu_tables import RULE_PRIMITIVES, is_wrong, markdown, reason_of
from .microbenchmark import DIRECTIONS, Microbenchmark
from .primitives import DTYPES, Primitive, Shape, load_primitives

__all__ = ["main"]

Point = tuple[str, int, int]  # model, tokens, images
Lists = list[list[Item]]  # a list of items for each process
Result = dict[str, Any]

_CHECKS = ("parity", "repeat", "racecheck")
# Seconds for one item, before it counts as hanging.
_PATIENCE = {"parity": 90.0, "repeat": 60.0, "racecheck": 120.0, "warm": 120.0, "micro": 60.0, "models": math.inf}
_GRACE = 10.0  # seconds past the end of its part, until an item is killed: a new process would take as long
_CUPTI = {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}  # the profiler beside CUDA graphs has crashed
_CALLS = 20
_TIMED = "bfloat16"
_FIRST_SHAPES: list[Point] = [("deit_small", 197, 4)]
_OTHER_SHAPES: list[Point] = [
    ("deit_base", 197, 2),
    ("deit_tiny", 50, 3),
    ("deit_base", 577, 2),
    ("vit_large", 1025, 1),
]
_FULL: list[Point] = [("deit_small", 197, 256)]
_SINGLE: list[Point] = [("deit_small", 197, 1)]
_BASE_SHAPES: list[Point] = [("deit_base", 197, 256), ("deit_base", 197, 1)]
# Where the rule of "auto" goes from our attention to PyTorch's (MOST_KEYS_BY_OURS): from these it can be measured.
_RULE_SHAPES: list[Point] = [("deit_small", 577, 64), ("deit_small", 1025, 32), ("deit_small", 2049, 16)]
_QUICK_SHAPES: list[Point] = [("deit_tiny", 26, 2)]
_RACECHECK = {"primitive": "cluster_dpc_knn", "shape": ["deit_tiny", 50, 2, _TIMED], "direction": "forward"}
_SMALL, _BASE = "deit_small_patch16_224", "deit_base_patch16_224"


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the run.

    Attributes:
        name: in a few words.
        phase: what is done with its items, and under which name its rows are kept.
        share: of the whole time.
        items: (results so far, seconds left for the part) -> a list for each process.
    """

    name: str
    phase: str
    share: float
    items: Callable[[Result, float], Lists]


def _dealt(groups: Sequence[Sequence[Item]], workers: int) -> Lists:
    """Deal items to workers: whole groups, but the first shapes of all of them before the others."""
    dealt = []
    for worker in range(min(workers, len(groups))):
        items = [item for group in groups[worker::workers] for item in group]
        shapes = list(dict.fromkeys(tuple(item["shape"][:3]) for item in items))
        dealt.append(sorted(items, key=lambda item: shapes.index(tuple(item["shape"][:3]))))
    return dealt


def _ways(primitive: Primitive) -> Sequence[str]:
    return DIRECTIONS if primitive.gradients else DIRECTIONS[:1]


def _checks(points: Sequence[tuple[str, Sequence[Point]]], **more: Any) -> list[list[Item]]:
    """Return a list for each primitive and dtype of the points, so that no two processes compile the same kernels."""
    return [
        [
            {"primitive": name, "shape": [*shape, dtype], "direction": way, **more}
            for shape in shapes
            for way in _ways(primitive)
        ]
        for dtype, shapes in points
        for name, primitive in load_primitives().items()
    ]


def _contenders(primitive: Primitive, kind: str, device: str, way: str) -> list[str]:
    """Return contenders of a kind: ``"first"`` (ours, and others without a compiler), ``"flex"``, or one's name."""
    others = {name: other for name, other in primitive.others.items() if other.serves(device, way)}
    if kind == "first":
        return ["fastreduce", *(name for name, other in others.items() if not other.compiles)]
    if kind == "flex":
        return [name for name, other in others.items() if other.compiles]
    return [kind]


def _absent() -> list[str]:
    others = {name: other for primitive in load_primitives().values() for name, other in primitive.others.items()}
    return sorted(name for name, other in others.items() if not other.installed)


def _wrong_kernels(result: Result) -> set[tuple[str, str, str]]:
    """Return primitive, direction and dtype of the kernels that are wrong somewhere."""
    return {(row["primitive"], row["direction"], row["shape"][-1]) for row in _wrong(result)}


def _timings(
    kinds: Sequence[str], shapes: Sequence[Point], device: str, dtype: str, names: Sequence[str], result: Result
) -> Lists:
    """Return items, without kernels that are wrong in this dtype; what is held against each other stands together."""
    wrong, primitives = _wrong_kernels(result), load_primitives()
    return [
        [
            {"primitive": name, "shape": [*shape, dtype], "direction": way, "contender": who}
            for kind in kinds
            for shape in shapes
            for name in names
            for way in _ways(primitives[name])
            for who in _contenders(primitives[name], kind, device, way)
            if not (who == "fastreduce" and (name, way, dtype) in wrong)
        ]
    ]


def _again(groups: Sequence[Sequence[Item]], workers: int, result: Result) -> Lists:
    """Return the checks of kernels that came to an end in the first one."""
    ended = {(row["primitive"], row["direction"]) for row in result["parity"] if "failed" in row}
    left = [[item for item in group if (item["primitive"], item["direction"]) not in ended] for group in groups]
    return _dealt([group for group in left if group], workers)


def _models_in(seconds: float, settings: Sequence[dict[str, Any]], device: str) -> Lists:
    """Return settings of ``bench.models``, which share the seconds alike."""
    each = {"steps": ["forward"], "rounds": 10, "device": device, "seconds": 0.9 * seconds / max(1, len(settings))}
    return [[{**each, "keep_rates": [0.5], **one} for one in settings]]


def _warm_items(models: Sequence[dict[str, Any]], methods: Sequence[str], device: str, workers: int) -> Lists:
    """Deal methods to processes; the models stay in the order in which they are timed."""
    parts: Lists = [[] for _ in range(min(workers, len(methods)))]
    for model in models:
        for number, method in enumerate(methods):
            parts[number % len(parts)].append({**model, "methods": [method], "keep_rates": [0.5], "device": device})
    return parts


def _methods() -> list[str]:
    from fastreduce import REDUCERS

    return list(REDUCERS)


class _Makers:
    """Items of a part, for one device and number of processes."""

    def __init__(self, device: str, workers: int, dtype: str):
        self.device, self.workers, self.dtype = device, workers, dtype

    def checks(self, *points: tuple[str, Sequence[Point]]) -> Callable[[Result, float], Lists]:
        """Make checks of parity."""
        return lambda result, left: _dealt(_checks(points), self.workers)

    def again(self, shapes: Sequence[Point]) -> Callable[[Result, float], Lists]:
        """Make checks for equal bits."""
        groups = _checks([(self.dtype, shapes)], calls=_CALLS)
        return lambda result, left: _again(groups, self.workers, result)

    def times(
        self, kinds: Sequence[str], shapes: Sequence[Point], names: Sequence[str] = ()
    ) -> Callable[[Result, float], Lists]:
        """Make microbenchmarks, of all primitives if none is named."""
        chosen = names or list(load_primitives())
        return lambda result, left: _timings(kinds, shapes, self.device, self.dtype, chosen, result)

    def models(self, *settings: dict[str, Any]) -> Callable[[Result, float], Lists]:
        """Make measurements of whole models."""
        return lambda result, left: _models_in(left, settings, self.device)

    def warm(self, *models: dict[str, Any], methods: Sequence[str]) -> Callable[[Result, float], Lists]:
        """Make forward passes that compile kernels."""
        return lambda result, left: _warm_items(models, methods, self.device, self.workers)

    def racecheck(self) -> Callable[[Result, float], Lists]:
        """Make the one launch that the tool watches."""
        return lambda result, left: [[_RACECHECK]]


def _full_parts(device: str, workers: int) -> list[Part]:
    make = _Makers(device, workers, _TIMED)
    small: dict[str, Any] = {"models": [_SMALL], "batches": [256], "modes": ["graphed"]}
    base = {**small, "models": [_BASE]}
    single, few = ["graphed", "eager"], {**small, "methods": ["topk"]}
    warm = [{"models": [name], "batches": batches} for name, batches in ((_SMALL, [256, 1, 8]), (_BASE, [256, 1]))]
    others = [(dtype, [*_FIRST_SHAPES, *_OTHER_SHAPES]) for dtype in ("float32", "float16")]
    return [
        Part("parity in bfloat16", "parity", 0.13, make.checks((_TIMED, _FIRST_SHAPES))),
        Part("repeated calls", "repeat", 0.06, make.again(_FULL)),
        Part("first passes", "warm", 0.06, make.warm(*warm, methods=_methods())),
        Part("kernels of DeiT-S", "micro", 0.11, make.times(["first"], _FULL)),
        Part("DeiT-S", "models", 0.12, make.models(small)),
        Part("DeiT-S, small batches", "models", 0.12, make.models({**small, "batches": [1, 8, 32], "modes": single})),
        Part("kernels of DeiT-S, batch 1", "micro", 0.03, make.times(["first"], _SINGLE)),
        Part("rule of auto", "micro", 0.02, make.times(["first"], _RULE_SHAPES, RULE_PRIMITIVES)),
        Part("DeiT-B", "models", 0.07, make.models({**base, "batches": [256, 1]})),
        Part("kernels of DeiT-B", "micro", 0.04, make.times(["first"], _BASE_SHAPES)),
        Part("parity in other dtypes", "parity", 0.07, make.checks(*others, (_TIMED, _OTHER_SHAPES))),
        Part("racecheck", "racecheck", 0.03, make.racecheck()),
        Part(
            "DeiT-S, eager, training, 0.7",
            "models",
            0.05,
            make.models(
                {**small, "modes": ["eager"], "steps": ["forward", "training"]}, {**small, "keep_rates": [0.7]}
            ),
        ),
        Part("plain and reference", "micro", 0.04, make.times(["plain", "reference"], [*_FULL, *_SINGLE])),
        Part("FlexAttention", "micro", 0.01, make.times(["flex"], _FULL)),
        Part("compiled references", "micro", 0.02, make.times(["compiled"], _FULL)),
        Part("compiled DeiT-S", "models", 0.02, make.models({**few, "modes": ["compiled", "compiled-graphed"]})),
    ]


def _quick_parts(device: str, workers: int) -> list[Part]:
    """Return every phase on small shapes, in the same order."""
    make = _Makers(device, workers, "float32")
    tiny: dict[str, Any] = {"models": ["test_vit"], "methods": ["topk", "tome"], "batches": [2], "rounds": 2}
    return [
        Part("parity in float32", "parity", 0.2, make.checks(("float32", _QUICK_SHAPES))),
        Part("repeated calls", "repeat", 0.1, make.again(_QUICK_SHAPES)),
        Part("first passes", "warm", 0.1, make.warm({"models": ["test_vit"], "batches": [2]}, methods=tiny["methods"])),
        Part("kernels", "micro", 0.2, make.times(["first"], _QUICK_SHAPES)),
        Part("models", "models", 0.1, make.models(tiny)),
        Part("models, small batches", "models", 0.1, make.models({**tiny, "batches": [1]})),
        Part("racecheck", "racecheck", 0.1, make.racecheck()),
        Part("plain", "micro", 0.1, make.times(["plain"], _QUICK_SHAPES)),
    ]


@functools.lru_cache(maxsize=1)  # contenders follow one another, and share its truth
def _prepared(name: str, shape: Shape, device: torch.device, direction: str) -> Microbenchmark:
    return Microbenchmark(load_primitives()[name], shape, device, direction)


def _bench(item: Item, device: torch.device) -> Microbenchmark:
    *point, dtype = item["shape"]
    return _prepared(item["primitive"], Shape(*point, DTYPES[dtype]), device, item["direction"])


def _parity(item: Item, device: torch.device) -> Iterator[Row]:
    yield {**item, "wrong": _bench(item, device).parity("fastreduce")}


def _repeat(item: Item, device: torch.device) -> Iterator[Row]:
    differing = _bench(item, device).differing("fastreduce", item["calls"])
    words = [
        f"output {one['output']}: {one['elements']} of {one['of']} elements differ, "
        f"in {one['calls']} of {counted(item['calls'] - 1, 'call')}"
        for one in differing
    ]
    yield {**item, "differing": differing, "wrong": "; ".join(words) or None}


def _launch(item: Item, device: torch.device) -> Iterator[Row]:
    """Call once, and run little else on the device."""
    _bench(item, device).once("fastreduce")
    yield item


def _racecheck(item: Item, device: torch.device) -> Iterator[Row]:
    """Launch in a process of its own, which the tool watches."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or device.type != "cuda":
        yield {**item, "skipped": "compute-sanitizer is not installed" if tool is None else "there is no CUDA device"}
        return
    command = [tool, "--tool", "racecheck", "--error-exitcode", "1", *_child_command(device.type)]
    asked = f"{json.dumps({'phase': 'launch', 'item': item})}\nnull\n"
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
    yield {**item, **_racecheck_verdict(done.stdout + done.stderr)}


def _racecheck_verdict(output: str) -> Row:
    """Return what the tool said at its end, and whether that is wrong: errors are, its warnings are not."""
    summary = re.search(r"RACECHECK SUMMARY: .*\((\d+) errors?, \d+ warnings?\)", output)
    if summary is None or '"failed"' in output:
        last = [line for line in output.splitlines() if line.strip()][-1:]
        return {"skipped": f"compute-sanitizer came to no verdict: {' '.join(last)[:300]}"}
    return {"said": summary[0], "wrong": summary[0] if int(summary[1]) else None}


def _micro(item: Item, device: torch.device) -> Iterator[Row]:
    yield _bench(item, device).measure(item["contender"])


def _settings(item: Item) -> Any:
    from .contests import Settings

    return Settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in item.items()})


@functools.cache
def _contests() -> Any:
    """Return the room of built models, which lives as long as the process."""
    from .contests import Contests

    return Contests(most=8)


def _models(item: Item, device: torch.device) -> Iterator[Row]:
    from .contests import measure_models

    yield from measure_models(_settings(item), contests=_contests())


def _warm(item: Item, device: torch.device) -> Iterator[Row]:
    from .contests import fill_kernel_cache

    started = time.perf_counter()
    fill_kernel_cache(_settings(item))
    yield {**item, "seconds": time.perf_counter() - started}


_PHASES: dict[str, Callable[[Item, torch.device], Iterator[Row]]] = {
    "parity": _parity,
    "repeat": _repeat,
    "racecheck": _racecheck,
    "warm": _warm,
    "micro": _micro,
    "models": _models,
}


def _answers(device: torch.device) -> bool:
    """Return whether the device still works: after an illegal access every call of the process fails."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.ones(1, device=device).item()
    except RuntimeError:
        return False
    return True


def _child_command(device: str) -> list[str]:
    return [sys.executable, "-m", "bench.gpu", "--device", device, "--child"]


def _child(device: torch.device) -> None:
    def work(asked: Item) -> Iterator[Row]:
        return {**_PHASES, "launch": _launch}[asked["phase"]](asked["item"], device)

    serve(work, lambda: _answers(device))


class _Session:
    """The results so far, kept on disk, and the processes that make them."""

    def __init__(self, path: Path, device: str, seconds: float):
        self.path = path
        self.patience = _PATIENCE
        self.grace = _GRACE
        self.command = _child_command(device)
        self.children: list[Child | None] = []
        self.started = time.perf_counter()
        self.end = self.started + seconds
        self.lock = threading.Lock()
        self.result: Result = {
            "environment": environment(torch.device(device)),
            "parts": [],
            "absent": _absent() if device == "cuda" else [],
            **{phase: [] for phase in _PHASES},
            "seconds": 0.0,
        }

    def add(self, phase: str, row: Row) -> None:
        """Keep a row."""
        with self.lock:
            self.result[phase].append(row)
            self.save()

    def save(self) -> None:
        """Write everything; a reader never sees half a file."""
        self.result["seconds"] = time.perf_counter() - self.started
        write_atomically(self.path, json.dumps(self.result, indent=1) + "\n")

    def run_all(self, parts: Sequence[Part]) -> None:
        """Do one part after the other; each ends when the shares of all before it and its own are used up."""
        seconds, shares = self.end - self.started, 0.0
        for part in parts:
            shares += part.share
            end = self.started + shares * seconds
            lists = part.items(self.result, max(end - time.perf_counter(), 0.0))
            self.run(part.name, part.phase, lists, end)

    def run(self, name: str, phase: str, lists: Lists, end: float) -> None:
        """Do the items of every list in a child process of its own, until the time is up."""
        started, before, count = time.perf_counter(), len(self.result[phase]), sum(map(len, lists))
        self._keep_children(len(lists))
        with concurrent.futures.ThreadPoolExecutor(max(1, len(lists))) as pool:
            working = [pool.submit(self._work, place, phase, items, end) for place, items in enumerate(lists)]
            try:
                left_out = count - sum(one.result() for one in working)
            except BaseException:  # the threads would wait for the rest
                self.stop()
                raise
        made, seconds = len(self.result[phase]) - before, time.perf_counter() - started
        with self.lock:
            self.result["parts"].append({"name": name, "results": made, "left_out": left_out, "seconds": seconds})
            self.save()
        print(f"{name}: {made} results, {left_out} of {count} left out, {seconds:.0f} s", flush=True)

    def _keep_children(self, count: int) -> None:
        """End those that have nothing to do: nothing shall run beside what is timed."""
        for child in filter(None, self.children[count:]):
            child.end()
        self.children = [*self.children[:count], *[None] * (count - len(self.children))]

    def _work(self, place: int, phase: str, items: Sequence[Item], end: float) -> int:
        """Do one item after the other; returns how many were finished or failed before the time was up."""
        for done, item in enumerate(items):
            now = time.perf_counter()
            if now >= min(end, self.end):
                return done
            patience, left = self.patience[phase], min(end + self.grace, self.end) - now
            asked, child = {"phase": phase, "item": item}, self._child(place)
            failure = child.do(asked, min(patience, left), functools.partial(self.add, phase))
            spent = time.perf_counter() - now
            if failure is None:
                continue
            if spent >= left or now + spent >= self.end:
                return done
            reason = f"no result within {patience:g} s" if spent >= patience else failure
            self.add(phase, {**item, "failed": reason})
        return len(items)

    def _child(self, place: int) -> Child:
        """Return the child of this place, a new one if the last is no more."""
        child = self.children[place]
        if child is None or not child.lives:
            if child is not None:
                child.end()
            child = self.children[place] = Child(self.command, _CUPTI)
        return child

    def finish(self) -> None:
        """End all processes, and write what there is."""
        self._keep_children(0)
        self.save()

    def stop(self) -> None:
        """Kill what is at work; nothing more is begun."""
        self.end = -math.inf
        for child in filter(None, list(self.children)):
            child.kill()


def _wrong(result: Result) -> list[Row]:
    return [row for phase in _CHECKS for row in result[phase] if is_wrong(row)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 if every kernel that was checked agrees with float64 and with itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480.0, help="of all of it")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="tiny shapes and models, to see that it works")
    parser.add_argument(
        "--workers", type=int, default=max(1, min(14, (os.cpu_count() or 1) - 1)), help="processes that check"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench.gpu: torch sees no CUDA device here", file=sys.stderr)
        return 2
    if options.child:
        _child(torch.device(options.device))
        return 0

    options.out.mkdir(parents=True, exist_ok=True)
    name = environment(torch.device(options.device))["device_name"]
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    path = options.out / f"{slug}-{datetime.date.today().isoformat()}.json"
    session = _Session(path, options.device, options.seconds)
    parts = _quick_parts if options.quick else _full_parts
    try:
        session.run_all(parts(options.device, options.workers))
    except KeyboardInterrupt:
        print("cut short", file=sys.stderr)
    finally:
        session.finish()
        path.with_suffix(".md").write_text(markdown(session.result))
        print(f"{path} and {path.with_suffix('.md').name}")
    bad = _wrong(session.result)
    for row in bad:
        print(f"WRONG: {row['primitive']} {row['direction']} {row['shape']}: {reason_of(row)}")
    return 1 if bad or not session.result["parity"] else 0


if __name__ == "__main__":
    sys.exit(main())
