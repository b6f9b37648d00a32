"""Whole models: unreduced, free slice, the official algorithm written plainly and fastreduce, taking turns in one run.

python -m bench.models [--model deit_small_patch16_224] [--batch 8] [--modes eager,compiled] [--json FILE] [--plots DIR]
python -m bench.models --quick

One group is a model, a batch, a keep rate, a step and a mode. In a group everything takes its turn in every round, so
that ratios (medians of those within a round) hold on a machine that is busy or throttles. Groups are finished one by
one; whatever ends the run, the finished ones are in the JSON file.

Steps: ``forward`` (in inference mode) and ``training``: forward in training mode, cross-entropy against drawn labels,
backward, one step of SGD. Its learning rate is 0: the same work, but the models share their weights, and every one is
to meet the same. DynamicViT removes no token in training, so that it cannot be faster than unreduced there.

Modes: ``eager``; ``compiled`` (torch.compile with static shapes; in training the optimizer stays eager); ``graphed``
(the eager model captured as a CUDA graph) and ``compiled-graphed`` (the compiled one), both for CUDA only, where the
host launches a single graph.

Parity comes first. A method's logits are held against the official algorithm in float64 (two images), in training also
its loss and the gradient of the patch embedding. Differences beyond eight times what the unreduced model shows itself
(in training of a soft merge also what the official one shows) need another decision somewhere, a near-tie, flagged
``*``, or else there is no time. What is compiled or captured is held against its own eager results on the whole batch,
where half of the images must agree (near-ties again). In training DynamicViT draws noise: it is held against the
official one in the same dtype with equal seeds, in eager mode only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastreduce._files import write_atomically
from fastreduce.measure import environment
from fastreduce.speed.models import DTYPES
from fastreduce.speed.timm_table import as_csv

from .contests import MODES, STEPS, Group, Settings, measure_models
from .model_plots import save_plots
from .model_tables import LEGEND, print_group

__all__ = ["is_wrong", "main"]

_QUICK = {"models": ("test_vit",), "batches": (2,), "keep_rates": (0.7, 0.4), "rounds": 3}


def is_wrong(group: Group) -> bool:
    """Return whether a method's results in the group are not those of the official algorithm."""
    return any(row["parity"]["verdict"] == "red" for row in group.get("methods", ()))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message}\n")


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _integers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _floats(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def _parser() -> _Parser:
    default = Settings()
    about, _, details = (__doc__ or "").partition("\n\n")
    parser = _Parser(
        "python -m bench.models",
        description=about,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    lists = {
        "model": ("models", _words, f"timm models, like {default.models[0]}"),
        "methods": ("methods", _words, "like topk,radial-l1; default: all"),
        "keep-rates": ("keep_rates", _floats, f"default: {','.join(map(str, default.keep_rates))}"),
        "at": ("at", _integers, "blocks of the stages, like 3,6,9"),
        "batch": ("batches", _integers, "default: 8 on the CPU, 1,256 on CUDA"),
        "modes": ("modes", _words, f"of {', '.join(MODES)}; default: eager, on CUDA eager,graphed,compiled"),
        "steps": ("steps", _words, f"default: {','.join(STEPS)}"),
    }
    for name, (field, kind, text) in lists.items():
        parser.add_argument(f"--{name}", dest=field, type=kind, metavar="A,B", help=text)
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: float32 on the CPU, bfloat16 on CUDA")
    parser.add_argument("--device", help="cpu, cuda or cuda:N")
    parser.add_argument("--backend", help="auto, triton or reference")
    parser.add_argument("--rounds", type=int, help=f"the most of a group; default: {default.rounds}")
    parser.add_argument("--seconds", type=float, help=f"of the whole run, roughly; default: {default.seconds:g}")
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that everything runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rewritten after every group")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="rewritten after every group")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="the forward passes as a table with timm's columns")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if a method's results are wrong, 2 if what was asked for cannot be measured."""
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    quick, json_file, plots = given.pop("quick", False), given.pop("json", None), given.pop("plots", None)
    table = given.pop("csv", None)
    settings = Settings(**{**(_QUICK if quick else {}), **given})
    console, started = Console(), time.perf_counter()
    if not console.is_terminal:
        console.width = 110
    groups: list[Group] = []
    with Console(stderr=True).status("building models") as status:

        def progress(what: str, done: float, total: float) -> None:
            status.update(f"{what} ({done:.0f} of {total:.0f})")

        try:
            settings = settings.resolve()
            for path in filter(None, (json_file, plots, table)):
                path.parent.mkdir(parents=True, exist_ok=True)
            if json_file is not None and json_file.is_dir():
                raise ValueError(f"{str(json_file)!r} is a folder, not a file")
            measured = measure_models(settings, progress)
        except (ValueError, TypeError, OSError) as error:
            parser.error(" ".join(str(error).split()))
        where = environment(torch.device(settings.device or "cpu"))
        for group in measured:
            groups.append(group)
            status.stop()
            print_group(console, group)
            status.start()
            if json_file is not None:
                result = {
                    "environment": where,
                    "settings": dataclasses.asdict(settings),
                    "wall_seconds": time.perf_counter() - started,
                    "groups": groups,
                }
                write_atomically(json_file, json.dumps(result, indent=1) + "\n")
            if plots is not None:
                save_plots(groups, plots)
    if table is not None:
        table.write_text(as_csv(row for group in groups for row in group.get("timm", ())))
    console.print(LEGEND, style="dim", highlight=False)
    return int(any(map(is_wrong, groups)))


if __name__ == "__main__":
    sys.exit(main())
