"""Running an exported file, in the runtime that it is for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["IMAGES", "Runtime", "described", "load"]

IMAGES = "fastreduce.images"  # where a .pt2 file keeps which images it is for


class Runtime:
    """A loaded file: called with images (B, ...), it gives its results as tensors on the CPU.

    Attributes:
        name: of the runtime, as people say it.
        expects: dtype, and the shape without the batch, of the images that the file was written for; None if only the
            runtime knows, which then checks them.
    """

    def __init__(self, name: str, run: Callable[[Tensor], Sequence[Any]], expects: tuple[str, list[int]] | None = None):
        self.name = name
        self.expects = expects
        self._run = run

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Run the model on images (B, channels, height, width) in any memory format -> its results.

        Raises:
            ValueError: images of another size or dtype than those that a ``.pt2`` file was written for.
        """
        if self.expects is not None and (found := described(images)) != self.expects:
            raise ValueError(
                f"the file takes images of shape (B, {', '.join(map(str, self.expects[1]))}) in {self.expects[0]}, "
                f"got {tuple(images.shape)} in {found[0]}"
            )
        return [torch.as_tensor(one) for one in self._run(images.detach().contiguous())]


def described(images: Tensor) -> tuple[str, list[int]]:
    """Return dtype, and shape without the batch, of images."""
    return str(images.dtype).removeprefix("torch."), list(images.shape[1:])


def _numbers(images: Tensor) -> Any:
    """Return images as the runtimes outside of torch take them."""
    if images.dtype == torch.bfloat16:
        raise ValueError("images come as a NumPy array, which has no bfloat16: export the model in float32 or float16")
    return images.numpy()


def _onnxruntime(file: Path, threads: int) -> Runtime:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Idle threads would keep the cores that the next of several models needs: their times in turns meant nothing.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return Runtime("ONNX Runtime", lambda images: session.run(None, {name: _numbers(images)}))


def _openvino(file: Path, threads: int) -> Runtime:
    import openvino

    # By itself OpenVINO may compute float32 models in bfloat16, and for throughput on several streams.
    wanted = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(str(file), "CPU", wanted)
    return Runtime("OpenVINO", lambda images: [compiled([_numbers(images)])[port].copy() for port in compiled.outputs])


def _aotinductor(file: Path, threads: int) -> Runtime:
    package = torch._inductor.aoti_load_package(str(file))

    def run(images: Tensor) -> Sequence[Tensor]:
        found = package(images)
        return found if isinstance(found, (list, tuple)) else [found]

    # The compiled code reads the memory of its input as it was told, without a look at size, dtype and strides.
    expects = package.get_metadata().get(IMAGES)
    return Runtime("AOTInductor", run, None if expects is None else tuple(json.loads(expects)))


_LOADERS = {".onnx": _onnxruntime, ".xml": _openvino, ".pt2": _aotinductor}


def load(file: str | Path, threads: int | None = None) -> Runtime:
    """Load what :func:`fastreduce.deploy.export` wrote.

    Args:
        file: ``.onnx``, ``.xml`` (OpenVINO) or ``.pt2``.
        threads: that the runtime may use on the CPU; None for as many as torch uses. AOTInductor uses torch's own.

    Raises:
        ValueError: another ending, or no such file.
    """
    file = Path(file)
    if file.suffix not in _LOADERS:
        raise ValueError(f"expected a file that ends in {', '.join(map(repr, _LOADERS))}, got {os.fspath(file)!r}")
    if not file.is_file():
        raise ValueError(f"no such file: {os.fspath(file)!r}")
    return _LOADERS[file.suffix](file, torch.get_num_threads() if threads is None else threads)
