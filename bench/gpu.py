"""Everything that needs a GPU, in one command of at most eight minutes: parity first, then kernels, then whole models.

python -m bench.gpu [--seconds 480] [--out bench/results]
python -m bench.gpu --device cpu --quick        # the same without a GPU, to see that it works

It writes ``<out>/<device>-<date>.json`` after every result and the tables of the same name at the end, so that it can
be cut short (Ctrl-C, or the time is up) and still leaves what it has. Every part runs in child processes: a kernel that
crashes, hangs or breaks CUDA for its process is written down, and the rest goes on in a new one.

1. Parity of every kernel, forward and backward, on random inputs against float64, in three dtypes and several shapes;
   in many processes at once, which also fills Triton's cache for the rest. What is wrong is not timed.
2. Microbenchmarks: see ``bench.microbenchmark``. CUDA graphs over rotating buffers.
3. Whole models: see ``bench.models``.

Exit code 0 if all kernels agree with float64, else 1.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import datetime
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fastreduce.measure import environment

from .microbenchmark import DIRECTIONS, Microbenchmark
from .primitive import DTYPES, Shape, load_primitives

__all__ = ["main", "markdown"]

Row = dict[str, Any]
Item = dict[str, Any]

# Shares of the time, and what is the most important first within each. What a phase leaves goes to the next.
_SHARES = {"parity": 0.25, "micro": 0.35, "models": 0.4}
_PATIENCE = {"parity": 90.0, "micro": 60.0, "models": math.inf}  # seconds for one item, before it counts as hanging
_CUPTI = {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}  # the profiler beside CUDA graphs has crashed
_BROKEN = 3  # exit code of a child whose device answers no more; the item was told
_PARITY_SHAPES = [
    ("deit_small", 197, 4),
    ("deit_base", 197, 2),
    ("deit_tiny", 50, 3),
    ("deit_base", 577, 2),
    ("vit_large", 1025, 1),
]
_MICRO_SHAPES = [("deit_small", 197, 256), ("deit_small", 197, 1), ("deit_base", 197, 256), ("deit_base", 197, 1)]
# Where the rule of "auto" goes from our attention to PyTorch's (MOST_KEYS_BY_OURS): from these it can be measured.
_RULE_SHAPES = [("deit_small", 577, 64), ("deit_small", 1025, 32), ("deit_small", 2049, 16)]
_RULE_PRIMITIVES = ("attention_index", "attention_scores_class")
_QUICK_SHAPES = [("deit_tiny", 26, 2)]
_SMALL, _BASE = "deit_small_patch16_224", "deit_base_patch16_224"
# Settings of bench.models, each with its share of the phase. Compiling takes long: few methods, and last.
_MODELS: list[tuple[float, dict[str, Any]]] = [
    (0.25, {"models": [_SMALL], "batches": [256], "keep_rates": [0.5], "modes": ["graphed", "eager"]}),
    (0.15, {"models": [_SMALL], "batches": [1], "keep_rates": [0.5], "modes": ["graphed", "eager"]}),
    (0.15, {"models": [_BASE], "batches": [256], "keep_rates": [0.5], "modes": ["graphed"]}),
    (0.1, {"models": [_SMALL], "batches": [256], "keep_rates": [0.7], "modes": ["graphed"]}),
    (0.1, {"models": [_BASE], "batches": [1], "keep_rates": [0.5], "modes": ["graphed"]}),
    (0.1, {"models": [_SMALL], "batches": [256], "keep_rates": [0.5], "modes": ["eager"], "steps": ["training"]}),
    (
        0.15,
        {
            "models": [_SMALL],
            "methods": ["topk"],
            "batches": [256],
            "keep_rates": [0.5],
            "modes": ["compiled", "compiled-graphed"],
        },
    ),
]
_QUICK_MODELS: list[tuple[float, dict[str, Any]]] = [
    (1.0, {"models": ["test_vit"], "methods": ["topk", "tome"], "batches": [2], "keep_rates": [0.5], "rounds": 2})
]


def _parity_items(quick: bool) -> list[list[Item]]:
    """A list for each primitive and dtype, so that no two processes compile the same kernels."""
    return [
        [
            {"primitive": name, "shape": [*shape, dtype], "direction": direction}
            for shape in (_QUICK_SHAPES if quick else _PARITY_SHAPES)
            for direction in DIRECTIONS
            if direction == "forward" or primitive.gradients
        ]
        for dtype in (["float32"] if quick else ["bfloat16", "float32", "float16"])
        for name, primitive in load_primitives().items()
    ]


def _dealt(groups: Sequence[Sequence[Item]], workers: int) -> list[list[Item]]:
    """The items of every worker: whole groups, but the first shapes of all of them before the others."""
    dealt = []
    for worker in range(workers):
        mine = groups[worker::workers]
        shapes = list(dict.fromkeys(tuple(item["shape"][:3]) for group in mine for item in group))
        items = [item for group in mine for item in group]
        dealt.append(sorted(items, key=lambda item: shapes.index(tuple(item["shape"][:3]))))
    return dealt


def _wrong_kernels(result: dict[str, Any]) -> set[tuple[str, str, str]]:
    """Return primitive, direction and dtype of the kernels that are wrong somewhere."""
    return {(row["primitive"], row["direction"], row["shape"][-1]) for row in _wrong(result)}


def _micro_items(quick: bool, wrong: set[tuple[str, str, str]]) -> list[Item]:
    """Without kernels that are wrong in this dtype. Ours, the official algorithm and others first, at every shape."""
    dtype = "float32" if quick else "bfloat16"
    shapes = _QUICK_SHAPES if quick else _MICRO_SHAPES
    primitives, ours = load_primitives(), ("fastreduce", "plain")
    rounds: list[tuple[tuple[str, ...], list[tuple[str, int, int]], Sequence[str]]]
    rounds = [(ours, shapes[:1], [*primitives])]
    if not quick:
        rounds += [(("fastreduce",), _RULE_SHAPES, _RULE_PRIMITIVES), (ours, shapes[1:], [*primitives])]
        rounds += [(("reference",), shapes, [*primitives]), (("compiled",), shapes[:1], [*primitives])]
    return [
        {"primitive": name, "shape": [*shape, dtype], "direction": way, "contender": who}
        for contenders, points, names in rounds
        for shape in points
        for name in names
        for way in DIRECTIONS
        if way == "forward" or primitives[name].gradients
        for who in (*contenders, *(primitives[name].others if "fastreduce" in contenders else ()))
        if not (who == "fastreduce" and (name, way, dtype) in wrong)
    ]


def _model_items(quick: bool, seconds: float, device: str) -> list[Item]:
    chosen = _QUICK_MODELS if quick else _MODELS
    each = {"steps": ["forward"], "rounds": 10, "device": device}
    return [{**each, "seconds": share * seconds, **settings} for share, settings in chosen]


def _bench(item: Item, device: torch.device) -> Microbenchmark:
    *point, dtype = item["shape"]
    primitive = load_primitives()[item["primitive"]]
    return Microbenchmark(primitive, Shape(*point, DTYPES[dtype]), device, item["direction"])


def _parity(item: Item, device: torch.device) -> Iterator[Row]:
    yield {**item, "wrong": _bench(item, device).parity("fastreduce")}


def _micro(item: Item, device: torch.device) -> Iterator[Row]:
    yield _bench(item, device).measure(item["contender"])


def _models(item: Item, device: torch.device) -> Iterator[Row]:
    from .models import Settings, measure_models

    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in item.items()}
    yield from measure_models(Settings(**settings))


_PHASES: dict[str, Callable[[Item, torch.device], Iterator[Row]]] = {
    "parity": _parity,
    "micro": _micro,
    "models": _models,
}


def _answers(device: torch.device) -> bool:
    """Whether the device still works: after an illegal access every call of the process fails."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.ones(1, device=device).item()
    except RuntimeError:
        return False
    return True


def _child(phase: str, device: torch.device) -> None:
    """Do the items that come on stdin, and tell each beginning and each result in a line on what was stdout."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # others print too, from C as well
    for index, item in enumerate(json.load(sys.stdin)):
        print(json.dumps({"begins": index}), file=told, flush=True)
        try:
            for row in _PHASES[phase](item, device):
                print(json.dumps({"row": row}), file=told, flush=True)
        except Exception as error:  # the next item may do better
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            print(json.dumps({"row": {**item, "failed": reason[:300]}}), file=told, flush=True)
        if not _answers(device):
            os._exit(_BROKEN)


class _Session:
    """The results so far, kept on disk."""

    def __init__(self, path: Path, device: str, seconds: float):
        self.path = path
        self.patience = _PATIENCE
        self.command = [sys.executable, "-m", "bench.gpu", "--device", device, "--child"]
        self.started = time.perf_counter()
        self.end = self.started + seconds
        self.lock = threading.Lock()
        self.result: dict[str, Any] = {
            "environment": environment(torch.device(device)),
            "parity": [],
            "micro": [],
            "models": [],
            "left_out": {},
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
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.result, indent=1) + "\n")
        part.replace(self.path)

    def run(self, phase: str, parts: Sequence[Sequence[Item]], end: float) -> None:
        """Do the items of every part in a child process of its own, until the time is up."""
        count = sum(map(len, parts))
        with concurrent.futures.ThreadPoolExecutor(len(parts)) as pool:
            done = sum(pool.map(lambda part: self._work(phase, part, end), parts))
        self.result["left_out"][phase] = count - done
        self.save()
        print(f"{phase}: {len(self.result[phase])} results, {count - done} of {count} left out", flush=True)

    def _work(self, phase: str, items: Sequence[Item], end: float) -> int:
        """One child after the other, until all items were begun; returns how many were finished or failed."""
        done = 0
        while done < len(items) and time.perf_counter() < end:
            count, failure = self._one_child(phase, items[done:], end)
            if failure is not None and count:
                self.add(phase, {**items[done + count - 1], "failed": failure})
            if count == 0 and time.perf_counter() < end:  # it cannot even start
                self.add(phase, {**items[done], "failed": failure or "the process did nothing"})
                count = 1
            done += count
        return done

    def _one_child(self, phase: str, items: Sequence[Item], end: float) -> tuple[int, str | None]:
        """How many items were begun or, at the end of the time, finished; and why the last one has no result."""
        begun, told = 0, 0
        with tempfile.TemporaryFile("w+") as errors:
            child = subprocess.Popen(
                [*self.command, phase],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
                env={**os.environ, **_CUPTI},
            )
            assert child.stdin is not None
            assert child.stdout is not None
            watch = _Watch(child, end, self.patience[phase])
            try:
                with contextlib.suppress(BrokenPipeError):
                    child.stdin.write(json.dumps(items))
                    child.stdin.close()
                for line in child.stdout:
                    said = json.loads(line)
                    if "row" in said:
                        self.add(phase, said["row"])
                        told = begun
                    else:
                        begun = said["begins"] + 1
                        watch.begins()
                code = child.wait()
            finally:
                watch.stop()
                _kill(child)
            if code == 0:
                return len(items), None
            if time.perf_counter() >= end:
                return told, None
            if code == _BROKEN and told == begun:
                return begun, None
            if watch.hung:
                return begun, f"no result within {self.patience[phase]:g} s"
            errors.seek(0)
            last = [line for line in errors.read().splitlines() if line.strip()][-1:]
            return begun, f"the process ended with {code}: {' '.join(last)[:300]}"


class _Watch:
    """Kills a child at the end of the time, or when one item takes too long."""

    def __init__(self, child: subprocess.Popen[str], end: float, patience: float):
        self.child, self.end, self.patience = child, end, patience
        self.hung = False
        self.timer = threading.Timer(0.0, _kill)
        self.begins()

    def begins(self) -> None:
        """A new item."""
        self.timer.cancel()
        left = self.end - time.perf_counter()
        self.timer = threading.Timer(max(min(left, self.patience), 0.0), self._end, [self.patience < left])
        self.timer.daemon = True
        self.timer.start()

    def _end(self, hung: bool) -> None:
        self.hung = hung
        _kill(self.child)

    def stop(self) -> None:
        """No more."""
        self.timer.cancel()


def _kill(child: subprocess.Popen[str]) -> None:
    """The child and whatever it started."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, 9)


def _wrong(result: dict[str, Any]) -> list[Row]:
    return [row for row in result["parity"] if row.get("wrong") or row.get("failed")]


def _parity_lines(result: dict[str, Any]) -> list[str]:
    rows, wrong = result["parity"], _wrong(result)
    lines = ["## Parity", "", f"{len(rows) - len(wrong)} of {len(rows)} checks against float64 agree."]
    if left := result["left_out"].get("parity"):
        lines.append(f"{left} more were not reached in the time.")
    lines += [
        f"- **{row['primitive']}** {row['direction']}, {'-'.join(map(str, row['shape']))}: "
        f"{row.get('wrong') or row['failed']}"
        for row in wrong
    ]
    return [*lines, ""]


def _micro_lines(result: dict[str, Any]) -> list[str]:
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in result["micro"]:
        if "model" in row:
            shape = f"{row['model']}-{row['tokens']}-{row['batch']}"
            groups.setdefault((row["primitive"], row["direction"], shape), {})[row["contender"]] = row
    heads = [
        "primitive",
        "",
        "shape",
        "µs",
        "GB/s of the floor",
        "share of copy",
        "launches (CPU: operators)",
        "peak MB",
    ]
    others = ["reference", "compiled", "plain"]
    others += sorted({who for rows in groups.values() for who in rows} - {"fastreduce", *others})
    lines = ["## Kernels", "", "| " + " | ".join([*heads, *(f"{other} ÷ ours" for other in others)]) + " |"]
    lines.append("|" + "---|" * (len(heads) + len(others)))
    for (name, direction, shape), rows in groups.items():
        ours = rows.get("fastreduce", {})
        if "seconds" not in ours:
            cells = [str(ours.get("parity") or ours.get("failed") or "not measured"), *[""] * 7]
        else:
            cells = [
                f"{ours['seconds'] * 1e6:.1f}",
                f"{ours['gigabytes_per_second']:.0f}",
                f"{ours['share_of_copy_bandwidth']:.2f}",
                str(ours.get("launches", ours.get("operators", ""))),
                f"{ours['peak_bytes'] / 1e6:.1f}",
                *(
                    f"{rows[other]['seconds'] / ours['seconds']:.2f}" if "seconds" in rows.get(other, {}) else ""
                    for other in others
                ),
            ]
        lines.append("| " + " | ".join([name, direction, shape, *cells]) + " |")
    lines.append("")
    for row in result["micro"]:
        if reason := row.get("failed") or row.get("parity"):
            lines.append(f"- {row['primitive']} {row['direction']} {row['contender']}: {reason}")
    return [*lines, ""]


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _model_lines(result: dict[str, Any]) -> list[str]:
    lines = ["## Whole models", ""]
    for group in result["models"]:
        where = ", ".join(
            f"{name} {group[name]}" for name in ("model", "batch", "keep_rate", "step", "mode") if name in group
        )
        if reason := group.get("failed") or group.get("reason"):
            lines += [f"{where}: {reason}", ""]
            continue
        lines += [f"### {where}", "", "| | images/s | unreduced ÷ | slice ÷ | official ÷ | ideal |", "|" + "---|" * 6]
        lines.append(f"| unreduced | {_number(group['unreduced']['images_per_second'], 1)} | 1.00 | | | |")
        for row in group["methods"]:
            cells = [
                _number(row["images_per_second"], 1) or str(row["reason"] or row["parity"]["verdict"]),
                *(_number(row[name]) for name in ("speedup", "share_of_free_slice", "speedup_over_official")),
                _number(row.get("ideal_speedup")),
            ]
            lines.append("| " + " | ".join([row["label"], *cells]) + " |")
        lines.append("")
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The tables."""
    where = result["environment"]
    head = [
        f"# {where['device_name']}",
        "",
        f"fastreduce {where['fastreduce']}, commit {where['commit']}, torch {where['torch']}, "
        f"triton {where['triton']}, timm {where['timm']}, CUDA {where['cuda']}; `python -m bench.gpu`, "
        f"{result['seconds']:.0f} s. Times are medians; in ratios, more than 1 means that fastreduce is the faster.",
        "",
    ]
    return "\n".join([*head, *_parity_lines(result), *_micro_lines(result), *_model_lines(result)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 if every kernel that was checked agrees with float64."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480.0, help="of all of it")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="tiny shapes and models, to see that it works")
    parser.add_argument(
        "--workers", type=int, default=max(1, min(14, (os.cpu_count() or 1) - 1)), help="processes that check parity"
    )
    parser.add_argument("--child", choices=list(_PHASES), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench.gpu: torch sees no CUDA device here", file=sys.stderr)
        return 2
    if options.child:
        _child(options.child, torch.device(options.device))
        return 0

    options.out.mkdir(parents=True, exist_ok=True)
    name = environment(torch.device(options.device))["device_name"]
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    path = options.out / f"{slug}-{datetime.date.today().isoformat()}.json"
    session = _Session(path, options.device, options.seconds)
    end = {}
    for phase, share in zip(_SHARES, itertools.accumulate(_SHARES.values()), strict=True):
        end[phase] = session.started + share * options.seconds
    try:
        session.run("parity", _dealt(_parity_items(options.quick), options.workers), end["parity"])
        session.run("micro", [_micro_items(options.quick, _wrong_kernels(session.result))], end["micro"])
        left = session.end - time.perf_counter()
        session.run("models", [_model_items(options.quick, 0.95 * left, options.device)], session.end)
    except KeyboardInterrupt:
        print("cut short", file=sys.stderr)
    finally:
        session.save()
        path.with_suffix(".md").write_text(markdown(session.result))
        print(f"{path} and {path.with_suffix('.md').name}")
    bad = _wrong(session.result)
    for row in bad:
        print(f"WRONG: {row['primitive']} {row['direction']} {row['shape']}: {row.get('wrong') or row['failed']}")
    return 1 if bad or not session.result["parity"] else 0


if __name__ == "__main__":
    sys.exit(main())
