"""Calls into our own Python code in one forward pass: python -m bench.calls [--method topk] [--files] [--functions].

At batch 1 a GPU waits for Python, so every call counts. A ViT of four blocks, tiny so that it runs anywhere, with one
stage in the second. Counted are frames of files of fastreduce and its kernels, comprehensions too where the version of
Python makes frames of them; a move is a call from one of our files into another.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch

import fastreduce
from fastreduce.arguments import counted

__all__ = ["Calls", "count_calls"]

_OWN = str(Path(fastreduce.__file__).resolve().parent)
_KERNELS = str((Path(fastreduce.__file__).parent / "kernels").resolve())
_CHECKS = ("check", "is_", "are_", "_hangs_on", "treats_", "splits", "strange")


class Calls(NamedTuple):
    """Calls of one forward pass.

    Attributes:
        functions: calls by ``file:function``.
        checks: how many of them only look whether something may be done.
        moves: how many come from another of our files.
    """

    functions: Counter[str]
    checks: int
    moves: int

    @property
    def total(self) -> int:
        """Calls into our code, all together."""
        return self.functions.total()

    @property
    def files(self) -> Counter[str]:
        """Calls by file."""
        found: Counter[str] = Counter()
        for name, count in self.functions.items():
            found[name.partition(":")[0]] += count
        return found


def _own(filename: str) -> str | None:
    """Return a file's name within the package, None for files that are not ours."""
    for root, prefix in ((_OWN, ""), (_KERNELS, "kernels/")):
        if filename.startswith(root + "/"):
            return prefix + filename.removeprefix(root + "/")
    return None


def count_calls(method: str = "topk", model: Any = None) -> Calls:
    """Count the calls of the second pass of a patched model: the first fills what is kept between passes.

    Args:
        method: a name in ``fastreduce.REDUCERS``.
        model: an unpatched model for images of 64 pixels, or None for the ViT of the module's docstring.
    """
    if model is None:
        sizes = {"depth": 4, "embed_dim": 48, "num_heads": 3, "num_classes": 7, "img_size": 64}
        model = timm.create_model("vit_tiny_patch16_224", **sizes)
    fastreduce.patch(model.eval(), method, keep_rate=0.5, at=1)
    images = torch.zeros(2, 3, 64, 64)
    functions: Counter[str] = Counter()
    moves = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal moves
        if event == "call" and (file := _own(frame.f_code.co_filename)) is not None:
            functions[f"{file}:{frame.f_code.co_name}"] += 1
            caller = _own(frame.f_back.f_code.co_filename) if frame.f_back else None
            moves += caller is not None and caller != file

    with torch.no_grad():
        model(images)
        sys.setprofile(profile)
        try:
            model(images)
        finally:
            sys.setprofile(None)
    checks = sum(count for name, count in functions.items() if name.partition(":")[2].startswith(_CHECKS))
    return Calls(functions, checks, moves)


def main() -> int:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="topk")
    parser.add_argument("--files", action="store_true", help="calls by file")
    parser.add_argument("--functions", action="store_true", help="calls by function")
    arguments = parser.parse_args()
    calls = count_calls(arguments.method)
    own = f"{counted(calls.total, 'call')} into our own code"
    print(f"{arguments.method}: {own}, {counted(calls.checks, 'check')} among them, {counted(calls.moves, 'move')}")
    for wanted, counter in ((arguments.files, calls.files), (arguments.functions, calls.functions)):
        for name, count in counter.most_common() if wanted else ():
            print(f"{count:4}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
