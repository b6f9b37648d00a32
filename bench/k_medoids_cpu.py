"""K-Medoids on the CPU against the plain official step, interleaved in one run, after both were seen to agree.

python -m bench.k_medoids_cpu [--batch 32] [--tokens 196] [--clusters 98] [--channels 384] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics

import torch

from fastreduce import ops
from fastreduce.arguments import counted
from fastreduce.measure import processor_seconds_of, seconds_of, take_turns

from .primitives.cluster_k_medoids import plain_k_medoids

__all__ = ["main"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=196)
    parser.add_argument("--clusters", type=int, default=98)
    parser.add_argument("--channels", type=int, default=384)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.batch, options.tokens + 1, options.channels, generator=generator)[:, 1:]
    weights = torch.rand(options.batch, options.tokens, generator=generator)
    k = options.clusters
    for ours, plain in zip(ops.cluster_k_medoids(x, weights, k), plain_k_medoids(x, weights, k), strict=True):
        if not torch.equal(ours, plain):
            raise SystemExit("not the official clusters: no time is told")

    calls = {
        "official": lambda: plain_k_medoids(x, weights, k),
        "fastreduce": lambda: ops.cluster_k_medoids(x, weights, k),
        "distances": lambda: torch.cdist(x, x),
    }
    clock = processor_seconds_of if options.threads == 1 else seconds_of
    seconds = take_turns(calls, x.device, options.rounds, clock=clock)
    tokens, threads = counted(options.tokens, "token"), counted(options.threads, "thread")
    print(f"batch {options.batch}, {tokens} to {k}, C {options.channels}, {threads}")
    for name in calls:
        ratio = statistics.median(a / b for a, b in zip(seconds["official"], seconds[name], strict=True))
        milliseconds = statistics.median(seconds[name]) * 1e3
        print(f"{name:12s} {milliseconds:8.2f} ms  {ratio:6.2f} times the official step's speed")


if __name__ == "__main__":
    main()
