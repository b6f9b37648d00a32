"""Writing a model, reduced or not, in a form that needs no fastreduce and no Python class to run."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..names import EXPORT_FORMATS as FORMATS
from .runtimes import IMAGES, described

__all__ = ["FORMATS", "check", "export", "float_nodes"]

MOST_IMAGES = 4096
_SINGLE_FILE = 1 << 30  # protobuf ends at 2 GB: larger weights go into a file of their own


def check(model: nn.Module, images: Any, to: str) -> None:
    """Raise ValueError or TypeError, with the reason, where exporting cannot end well."""
    if to not in FORMATS:
        raise ValueError(f"unknown format {to!r}; expected one of {', '.join(map(repr, FORMATS))}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(images, Tensor) or images.ndim < 2 or not images.shape[0]:
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be a tensor with at least one image, got {shape}")
    if (training := next((name for name, one in model.named_modules() if one.training), None)) is not None:
        part = f"its part {training} is" if training else "the model is"
        raise ValueError(f"{part} in training mode: call model.eval() before exporting it")
    missing = [name for name in FORMATS[to].packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'to={to!r} needs {", ".join(missing)}: pip install "fastreduce[deploy]"')


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Run without what exporters tell their developers."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


def _example(images: Tensor) -> Tensor:
    """Return two example images or more, contiguous: torch.export takes a size of one for a constant.

    AOTInductor compiles for the strides of the example, and checks none.
    """
    return (images if images.shape[0] > 1 else torch.cat([images, images])).contiguous()


def _shapes() -> tuple[Any]:
    return ({0: torch.export.Dim("batch", min=1, max=MOST_IMAGES)},)


def onnx_program(model: nn.Module, images: Tensor, names: Sequence[str] = ("logits",)) -> Any:
    """Capture a model for ONNX with any number of images -> ``torch.onnx.ONNXProgram``.

    Args:
        model: in evaluation mode; of several results the ``names`` say which is which.
        images: an example.
        names: of the results.

    Raises:
        RuntimeError: where the graph takes no other number of images than the example's.
    """
    with _quietly(), torch.no_grad():
        program: Any = torch.onnx.export(
            model,
            (_example(images),),
            dynamo=True,
            dynamic_shapes=_shapes(),
            input_names=["images"],
            output_names=list(names),
            verbose=False,
        )
    if isinstance(program.model.graph.inputs[0].shape[0], int):
        raise RuntimeError(
            "the exported graph takes no other number of images than the example's: something in the model makes a "
            "constant of the batch size"
        )
    return program


def _write_onnx(model: nn.Module, images: Tensor, file: Path, names: Sequence[str]) -> None:
    program = onnx_program(model, images, names)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    program.save(str(file), external_data=size > _SINGLE_FILE)


def _write_openvino(model: nn.Module, images: Tensor, file: Path, names: Sequence[str]) -> None:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        between = Path(folder) / "model.onnx"
        _write_onnx(model, images, between, names)
        openvino.save_model(openvino.convert_model(between), file, compress_to_fp16=False)


class Leaves(nn.Module):
    """A model whose result is its tensors, not an object of a library that whoever loads the file would need.

    Args:
        model: whose result is a tensor, or holds some.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run the model -> its one tensor, or all of them."""
        found = tuple(one for one in tree_leaves(self.model(images)) if isinstance(one, Tensor))
        return found[0] if len(found) == 1 else found


def _write_pt2(model: nn.Module, images: Tensor, file: Path, names: Sequence[str]) -> None:
    with _quietly(), torch.no_grad():
        program = torch.export.export(Leaves(model), (_example(images),), dynamic_shapes=_shapes())
        # Or the number of threads of this process would be compiled into the code.
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(file),
            inductor_configs={
                "cpp.dynamic_threads": True,
                "aot_inductor.metadata": {IMAGES: json.dumps(described(images))},
            },
        )


_WRITE: dict[str, Callable[[nn.Module, Tensor, Path, Sequence[str]], None]] = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
    "pt2": _write_pt2,
}


def export(
    model: nn.Module, images: Tensor, file: str | Path, to: str = "onnx", *, names: Sequence[str] = ("logits",)
) -> Path:
    """Write a model to a file that another runtime reads; any number of images goes in.

    Args:
        model: reduced or not, compiled or not, in evaluation mode. Methods whose images keep different numbers of
            tokens (ATS) are written with padding.
        images: (B, channels, height, width), an example; its size and dtype are the file's.
        file: where to write. OpenVINO's weights go beside it, with the ending ``.bin``; an ONNX model of more than
            1 GB has its weights beside it too.
        to: ``"onnx"``, ``"openvino"`` or ``"pt2"`` (AOTInductor: compiled code for this kind of processor; without
            :func:`load` it takes contiguous images, and checks neither size nor dtype nor memory format).
        names: what the results are called.

    Returns:
        The file.

    Raises:
        ValueError: an unknown format, packages that are missing, no such folder, a model in training mode, or one that
            the format cannot hold.
        TypeError: ``model`` is no module.
        RuntimeError: the model cannot be captured for any number of images.
    """
    check(model, images, to)
    if isinstance(model, torch._dynamo.OptimizedModule):  # what torch.compile made of a model, which is not exported
        model = model._orig_mod
    file = Path(file)
    if file.suffix != FORMATS[to].ending:
        raise ValueError(f"a file for to={to!r} ends in {FORMATS[to].ending!r}, got {file.name!r}")
    if not file.parent.is_dir():
        raise ValueError(f"there is no folder {str(file.parent)!r} to write {file.name!r} to")
    _WRITE[to](model, images, file, names)
    return file


def float_nodes(file: str | Path) -> list[str]:
    """Return the names of the products in an ONNX file that must not be quantised, for ``nodes_to_exclude``.

    These are products of two computed tensors: of attention, of decisions and of merges. ONNX Runtime's static
    quantisation takes them by default. Eight bits for the tokens that are merged falsify the result.

    Args:
        file: written by :func:`export`, also after ``onnxruntime.quantization.shape_inference.quant_pre_process``.

    Raises:
        ValueError: onnx is missing, or such a product has no name.
    """
    if importlib.util.find_spec("onnx") is None:
        raise ValueError('reading an ONNX file needs onnx: pip install "fastreduce[deploy]"')
    import onnx

    graph = onnx.load(str(file), load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm") and not weights & {*node.input}]
    if not all(node.name for node in products):
        raise ValueError(f"a product in {str(file)!r} has no name by which it can be excluded")
    return [node.name for node in products]
