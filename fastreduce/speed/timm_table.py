"""Measurements under the names that timm's benchmark tables have, so that results can stand beside theirs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..measure import count_gmacs

__all__ = ["COLUMNS", "as_csv", "count_macts", "row_of", "tagged", "work_of"]

COLUMNS = (
    "model",
    "infer_img_size",
    "infer_samples_per_sec",
    "infer_step_time",
    "infer_batch_size",
    "param_count",
    "infer_gmacs",
    "infer_macts",
)
_PRODUCTS = ("convolution", "mm", "addmm", "bmm", "baddbmm")


class _Activations(TorchDispatchMode):
    """A count of the elements that convolutions and matrix products give."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in _PRODUCTS:
            self.elements += result.numel()
        return result


def count_macts(model: nn.Module, images: Tensor) -> float:
    """Count the 10⁶ elements that convolutions and products give for each of the images: timm's activations."""
    backend = torch.nn.attention.SDPBackend.MATH  # fused attention hides its products
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(backend), _Activations() as counter:
        model(images)
    return counter.elements / 1e6 / len(images)


def tagged(model: str, method: str | None = None, keep_rate: float | None = None) -> str:
    """Put a method into a model's name, as timm's tags are: ``deit_small_patch16_224.fb_in1k_topk_0.5``."""
    if method is None:
        return model
    tag = "_".join([method.replace(" ", "_"), *([] if keep_rate is None else [f"{keep_rate:g}"])])
    return f"{model}_{tag}" if "." in model else f"{model}.{tag}"


def work_of(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Return parameters in millions, 10⁹ multiply-adds and 10⁶ activations of an image."""
    one = images[:1]
    return {
        "param_count": round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2),
        "infer_gmacs": round(count_gmacs(model, one), 2),
        "infer_macts": round(count_macts(model, one), 2),
    }


def row_of(name: str, batch: int, size: int, seconds: float, work: Mapping[str, float]) -> dict[str, Any]:
    """Return one line: a batch of images of so many pixels a side took so many seconds."""
    return {
        "model": name,
        "infer_img_size": size,
        "infer_samples_per_sec": round(batch / seconds, 2),
        "infer_step_time": round(1e3 * seconds, 3),
        "infer_batch_size": batch,
        **work,
    }


def as_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    """Return the lines as CSV, the heading first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
