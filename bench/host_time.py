"""Time that an operator call takes on the host, over that of ``nn.Linear``. No GPU needed.

python -m bench.host_time [--rounds 15] [--operators gather_tokens,...] [--json FILE]

Kernels are compiled for sm_90 and launched by a driver that does nothing, on CPU tensors: what is left is Python.
A call of ``nn.Linear`` on 16 numbers stands for what PyTorch takes for one operator. Both take turns in every round,
and the ratio is the median over rounds; other work on the machine slows both. Inference, eager. The first calls, which
compile and write down what is launched, are left out.

``checked`` are the functions of ``fastreduce.ops``, ``unchecked`` their twins, which reducers call. ``reference`` is
what the checked function adds to the bare PyTorch reference.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastreduce import ops, reference
from fastreduce.measure import environment
from fastreduce.ops import unchecked

from .proof.gates import table
from .proof.idle import Launcher, idle_driver

__all__ = ["MOST_CALL", "MOST_STAGE", "Contender", "contenders", "main", "ratios"]

MOST_CALL = 3  # nn.Linear an operator call
MOST_STAGE = 8  # nn.Linear a Top-K stage
_CALLS = 100  # in a row
_SHAPE = (1, 6, 197, 64)  # images, heads, tokens, channels a head: DeiT-S
_KEPT = 98

Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Contender:
    """An operator, or several in a row.

    Attributes:
        name: of the operator, and of the way it is called.
        run: takes the room of the functions (``fastreduce.ops`` or its unchecked twins) and the backend.
        reference: the same by the bare reference, or None.
        most: nn.Linear that a call may take by the goal.
    """

    name: str
    run: Callable[[Any, str], Any]
    reference: Call | None = None
    most: float = MOST_CALL


def contenders(dtype: torch.dtype = torch.bfloat16) -> list[Contender]:
    """Return every operator that is called in inference, and the Top-K stage."""
    b, h, n, d = _SHAPE
    c = h * d
    packed = torch.randn(b, n, 3, h, d).to(dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    x, residual = torch.randn(b, n, c).to(dtype), torch.randn(b, 1 + _KEPT, c).to(dtype)
    scores, index = torch.rand(b, n - 1), torch.randint(n - 1, (b, _KEPT))
    order = torch.randperm(n - 1).expand(b, -1)
    norm = torch.ones(c, dtype=dtype), torch.zeros(c, dtype=dtype), 1e-6
    slot = torch.randint(1 + _KEPT, (b, n))
    groups = reference.group_slots(slot, 1 + _KEPT)
    size, bias = torch.ones(b, n), torch.zeros(b, n)
    logits, centers = torch.randn(b, n - 1, _KEPT).to(dtype), torch.randn(_KEPT, c)
    fused = torch.randn(b, 2 + _KEPT, c).to(dtype)

    angles = torch.randn(n, q.shape[3]).to(dtype)
    table = angles.cos(), angles.sin()

    def topk_stage(room: Any, backend: str) -> Any:
        kept = room.select_topk(room.cls_scores(q[:, :, 0], k, backend=backend), _KEPT, backend=backend)
        room.attention(q, k, v, index=kept, backend=backend)
        return room.gather_tokens(x, kept, norm=norm, residual=residual, backend=backend)

    return [
        Contender(
            "select_topk",
            lambda room, backend: room.select_topk(scores, _KEPT, backend=backend),
            lambda: reference.select_topk(scores, _KEPT),
        ),
        Contender(
            "gather_tokens",
            lambda room, backend: room.gather_tokens(x, index, residual=residual, backend=backend),
            lambda: reference.gather_tokens(x, index, 1, residual),
        ),
        Contender(
            "gather_tokens (norm)",
            lambda room, backend: room.gather_tokens(x, index, norm=norm, residual=residual, backend=backend),
        ),
        Contender(
            "cls_scores",
            lambda room, backend: room.cls_scores(q[:, :, 0], k, backend=backend),
            lambda: reference.cls_scores(q[:, :, 0], k, 1, 0.125),
        ),
        Contender("cls_value_scores", lambda room, backend: room.cls_value_scores(q[:, :, 0], k, v, backend=backend)),
        Contender("attention (bias)", lambda room, backend: room.attention(q, k, v, bias=bias, backend=backend)),
        Contender("attention (index)", lambda room, backend: room.attention(q, k, v, index=index, backend=backend)),
        Contender(
            "attention_cls_scores",
            lambda room, backend: room.attention_cls_scores(q, k, v, backend=backend),
        ),
        Contender(
            "attention_received_scores",
            lambda room, backend: room.attention_received_scores(q, k, v, backend=backend),
        ),
        Contender("received_scores", lambda room, backend: room.received_scores(q, k, backend=backend)),
        Contender("sample_tokens", lambda room, backend: room.sample_tokens(scores, _KEPT, backend=backend)),
        Contender("match_tokens_groups", lambda room, backend: room.match_tokens_groups(k, 49, backend=backend)),
        Contender(
            "merge_tokens",
            lambda room, backend: room.merge_tokens(x, slot, 1 + _KEPT, size=size, groups=groups, backend=backend),
            lambda: reference.merge_tokens(x, slot, 1 + _KEPT, size, None),
        ),
        Contender(
            "merge_tokens (norm)",
            lambda room, backend: room.merge_tokens(
                x, slot, 1 + _KEPT, norm=norm, size=size, residual=residual, groups=groups, backend=backend
            ),
        ),
        Contender("unmerge_tokens", lambda room, backend: room.unmerge_tokens(x, slot, groups=None, backend=backend)),
        Contender(
            "fuse_tokens (norm)",
            lambda room, backend: room.fuse_tokens(x, order, scores, _KEPT, norm=norm, residual=fused, backend=backend),
        ),
        Contender(
            "cluster_k_medoids", lambda room, backend: room.cluster_k_medoids(x[:, 1:], scores, _KEPT, backend=backend)
        ),
        Contender(
            "cluster_dpc_knn", lambda room, backend: room.cluster_dpc_knn_groups(x[:, 1:], _KEPT, backend=backend)
        ),
        Contender(
            "soft_merge", lambda room, backend: room.soft_merge(logits, x[:, 1:], head=x[:, :1], backend=backend)
        ),
        Contender(
            "sinkhorn_merge",
            lambda room, backend: room.sinkhorn_merge(
                x[:, 1:], centers, head=x[:, :1], similarity=False, backend=backend
            ),
        ),
        Contender(
            "rotate_tokens",
            lambda room, backend: room.rotate_tokens(q, table, index, prefix=n - index.shape[1], backend=backend),
            lambda: reference.rotate_tokens(q, *table, index, n - index.shape[1], False),
        ),
        Contender("Top-K stage", topk_stage, most=MOST_STAGE),
    ]


def _seconds(call: Call, calls: int) -> float:
    """Return the CPU seconds of one of many calls in a row."""
    begin = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - begin) / calls


def ratios(calls: Sequence[Call], unit: Call, rounds: int, repeats: int = _CALLS) -> list[float]:
    """Return the time of each call over the time of the unit next to it, the median over rounds."""
    found: list[list[float]] = [[] for _ in calls]
    for call in (unit, *calls):
        _seconds(call, 3)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for place, call in enumerate(calls):
                found[place].append(_seconds(call, repeats) / _seconds(unit, repeats))
    finally:
        gc.enable()
    return [statistics.median(one) for one in found]


def _row(contender: Contender, unit: Call, rounds: int) -> dict[str, Any]:
    """Return the ratios of one contender, and how often it launches a kernel."""
    run = contender.run
    with torch.inference_mode(), idle_driver():
        run(unchecked, "triton")  # compiles
        Launcher.count = 0
        run(unchecked, "triton")
        launches = Launcher.count
        calls = [lambda: run(ops, "triton"), lambda: run(unchecked, "triton")]
        checked, bare = ratios(calls, unit, rounds)
    row = {"operator": contender.name, "launches": launches, "checked": checked, "unchecked": bare}
    if contender.reference is not None:
        with torch.inference_mode():
            through, direct = ratios([lambda: run(ops, "reference"), contender.reference], unit, rounds)
        row["reference"] = through - direct
    row["goal"] = f"at most {contender.most:g}" + ("" if bare <= contender.most else ": missed")
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit status does not depend on times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns of all calls (default: 15)")
    parser.add_argument("--operators", default="", help="names that the rows begin with, with commas (default: all)")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    torch.set_num_threads(1)
    found = contenders()
    wanted = tuple(filter(None, options.operators.split(",")))
    chosen = [one for one in found if not wanted or one.name.startswith(wanted)]
    if not chosen:
        parser.error(f"--operators {options.operators} names none of {', '.join(one.name for one in found)}")
    layer, row = nn.Linear(16, 16), torch.randn(1, 16)
    with torch.inference_mode():
        linear = statistics.median(_seconds(lambda: layer(row), 1000) for _ in range(5))
    rows = [_row(one, lambda: layer(row), options.rounds) for one in chosen]
    print(f"nn.Linear takes {linear * 1e6:.1f} µs; calls, in nn.Linear:\n")
    print(table(rows, ["operator", "launches", "checked", "unchecked", "reference", "goal"]))
    if options.json is not None:
        result = {"environment": environment(torch.device("cpu")), "linear_seconds": linear, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
