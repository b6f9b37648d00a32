"""ONNX Runtime's int8 of reduced models: how fast, and what it changes.

``python -m bench.int8`` quantises DeiT-S, reduced and not, dynamically and statically, and prints its speed and the
difference to float32 on views of a picture. ``--root FOLDER --checkpoint FILE`` takes the study's model for CIFAR-10
in its place, and adds the accuracy on the test images, with what int8 loses.

Layers with weights are quantised; products of two computed tensors stay in float32, without ``--all-products``.
Static scales come from 16 views of the picture, or from 64 training images. All models take turns, in float32 and in
int8.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastreduce.arguments import counted
from fastreduce.deploy import export, float_nodes, load
from fastreduce.deploy.check import speed_of
from fastreduce.measure import environment, keep_memory, load_average, take_turns
from fastreduce.quality.accuracy import paired_accuracy
from fastreduce.speed.comparison import Comparison
from fastreduce.speed.settings import CompareSettings
from fastreduce.study.data import open_data
from fastreduce.study.protocol import Reduction
from fastreduce.study.recipe import CIFAR10

from .deploy_tables import Row, int8_lines

__all__ = ["main", "measure", "quantised"]

METHODS = ("topk", "evit", "ats", "tome")
KINDS = ("float32", "dynamic", "static")
_UNREDUCED = "unreduced"
_BATCH = 250  # test images that a runtime gets at a time


class Subject(NamedTuple):
    """Models and images: calibration (N, 3, H, W), images (B, 3, H, W), and their labels (B,) if there are any."""

    name: str
    models: dict[str, nn.Module]
    calibration: Tensor
    images: Tensor
    labels: Tensor | None = None


def quantised(file: Path, images: Tensor, kind: str, every: bool = False) -> Path:
    """Write what ONNX Runtime's quantisation makes of a model, ``"dynamic"`` or ``"static"`` -> the file.

    With ``every``, products of two computed tensors are quantised too.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, out = (file.with_name(f"{file.stem}-{name}.onnx") for name in ("prepared", kind))
    quant_pre_process(file, prepared, skip_symbolic_shape=True)
    options: dict[str, Any] = {
        "weight_type": quantization.QuantType.QInt8,
        "op_types_to_quantize": ["MatMul", "Gemm"],
        "nodes_to_exclude": [] if every else float_nodes(prepared),
    }
    if kind == "dynamic":
        quantization.quantize_dynamic(prepared, out, **options)
        return out

    class Images(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = list(images.split(1))

        def get_next(self) -> Any:
            return {"images": self.left.pop(0).numpy()} if self.left else None

    quantization.quantize_static(prepared, out, Images(), per_channel=True, **options)
    return out


def _on_views(given: argparse.Namespace) -> Subject:
    comparison = Comparison(
        CompareSettings(
            model=given.model, methods=given.methods, keep_rates=(given.keep_rate,), device="cpu", threads=given.threads
        )
    )
    models = {_UNREDUCED: comparison.model, **{entry.label: entry.model for entry in comparison.entries}}
    return Subject(given.model, models, comparison.views(16), comparison.views(32))


def _on_cifar10(given: argparse.Namespace) -> Subject:
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    data = open_data("cifar10", given.root)
    backbone = dataclasses.replace(CIFAR10.backbone, checkpoint=given.checkpoint)
    models = {_UNREDUCED: backbone.build(data.num_classes)}
    for method in given.methods:
        models[method] = Reduction(method, given.keep_rate).apply(backbone.build(data.num_classes))
    some = range(0, len(data.train), len(data.train) // 64)
    chosen = range(0, len(data.val), math.ceil(len(data.val) / (given.images or len(data.val))))
    images, labels = zip(*(data.val[place] for place in chosen), strict=True)
    calibration = torch.stack([data.train[place][0] for place in some][:64])
    return Subject("cifar10", models, calibration, torch.stack(images), torch.stack(labels))


def measure(subject: Subject, batch: int, rounds: int, folder: Path, every: bool = False) -> Iterator[Row]:
    """Yield a row for each model and kind: speed beside its float32 and the unreduced model, and what it changes."""
    runtimes, images = {}, subject.images
    for label, model in subject.models.items():
        file = export(model, images[:2], folder / f"{label.replace(' ', '-')}.onnx")
        for kind in KINDS:
            made = file if kind == "float32" else quantised(file, subject.calibration, kind, every)
            runtimes[label, kind] = load(made)
    some = images[:batch]
    calls = {key: (lambda runtime=runtime: runtime(some)) for key, runtime in runtimes.items()}
    seconds = take_turns(calls, torch.device("cpu"), rounds)
    for label in subject.models:
        found = {kind: torch.cat([runtimes[label, kind](part)[0] for part in images.split(_BATCH)]) for kind in KINDS}
        expected = found["float32"]
        for kind in KINDS:
            own, row = seconds[label, kind], {"model": subject.name, "method": label, "int8": kind, "batch": batch}
            row["ratio"] = speed_of(batch, own, seconds[label, "float32"]).ratio
            row["over_unreduced"] = speed_of(batch, own, seconds[_UNREDUCED, kind]).ratio
            row["same_class"] = (found[kind].argmax(1) == expected.argmax(1)).float().mean().item()
            row["difference"] = ((found[kind] - expected).abs().max() / expected.abs().max()).item()
            if subject.labels is not None:
                right = [logits.argmax(1) == subject.labels for logits in (expected, found[kind])]
                row["accuracy"] = paired_accuracy(*right).summary()
            yield row


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.int8", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm model, with random weights")
    parser.add_argument("--methods", type=lambda text: tuple(text.split(",")), default=METHODS)
    parser.add_argument("--keep-rate", type=float, default=0.5)
    parser.add_argument("--root", type=Path, help="folder of CIFAR-10, in place of a timm model")
    parser.add_argument("--checkpoint", type=Path, help="weights of the study's model for it")
    parser.add_argument("--images", type=int, help="test images, evenly chosen (default: all)")
    parser.add_argument("--all-products", action="store_true", help="quantise also those of two computed tensors")
    parser.add_argument("--batch", type=int, default=8, help="of the speeds")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="where to write everything")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table -> 0."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if (given.root is None) != (given.checkpoint is None):
        parser.error("--root and --checkpoint go together")
    if min(given.rounds, given.batch, given.images or 1) < 1:
        parser.error("--rounds, --batch and --images must be at least 1")
    keep_memory()
    before = load_average()
    try:
        subject = _on_views(given) if given.root is None else _on_cifar10(given)
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as folder:
        rows = list(measure(subject, given.batch, given.rounds, Path(folder), given.all_products))
    print(*int8_lines(rows), sep="\n")
    print(f"\nBatch {given.batch}, {counted(given.rounds, 'round')} in turns; load before: {before}")
    if given.json is not None:
        machine = environment(torch.device("cpu"))
        result = {"rows": rows, "load": before, "rounds": given.rounds, "environment": machine}
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
