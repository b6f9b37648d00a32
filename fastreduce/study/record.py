"""Records of what a model did with every image of a data set, in one compact file of columns.

The file is a plain safetensors file: a tensor is a column, and an image a row of it. It is written batch by batch and
read memory-mapped, so that neither needs memory for more than a batch of images. ImageNet's validation images take
0.36 GB, for DeiT-S with class features after four blocks and with three stages. In float16 they take about half.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
import reprlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .._files import from_json, parse_json, safetensors_header
from ..arguments import counted
from ..integrations.timm import Stage, is_patched, record, reduced_counts, reducer_of
from ..tokens import Tokens
from .measures import mean_average_precision

__all__ = [
    "UNREDUCED",
    "ColumnWriter",
    "Recording",
    "Run",
    "best_classes",
    "feature_blocks",
    "open_recording",
    "record_images",
]

UNREDUCED = "none"
_FORMAT = "fastreduce-recording-1"
_KINDS = ("kept", "slots", "features")
_LARGEST = 4096  # patches along a side, or blocks: far beyond any model, and not yet too much for memory
_NAMES = {
    "bool": "BOOL",
    **{f"{kind}{bits}": f"{kind[0].upper()}{bits}" for kind in ("uint", "int") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
}

Array = NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """A model's run over a data set: which model saw which images, and how well it did.

    Attributes:
        dataset: name of the data set.
        backbone: name of the model that was reduced.
        method: name of the reduction, ``"none"`` for the unreduced model.
        keep_rate: of the first stage; None for the unreduced model, and for radial patterns without one.
        accuracy: top-1 or mean average precision in per cent, NaN where unknown.
        parameters: of the model, which orders backbones by capacity.
    """

    dataset: str
    backbone: str
    method: str = UNREDUCED
    keep_rate: float | None = None
    accuracy: float = math.nan
    parameters: int = 0

    @property
    def name(self) -> str:
        """Name for messages and tables: ``topk deit_small_patch16_224 0.5``."""
        rate = "" if self.keep_rate is None else f" {self.keep_rate:g}"
        return f"{self.method} {self.backbone}{rate}"


@dataclasses.dataclass(frozen=True)
class Recording:
    """A run with what it did; arrays read from a file are memory-mapped and read-only.

    Attributes:
        run: which model and data set.
        grid: rows and columns of patches; P is their product.
        depth: number of blocks.
        kept: by the block of each stage (images, K) integer, the original patches that are left after it, -1 for
            padding and for fused tokens. Methods without a kept set (ToMe, soft merging) have none.
        slots: by block (images, P) integer, the token that every original patch is in; merging methods only. Soft
            merging: the token that it weighs most in.
        features: by block (images, C) floating, the class token after it.
        outputs: ``prediction`` (images, up to 5) integer, best first, -1 where the logits have NaN, with ``target``
            (images,) integer; of multi-label data ``scores`` (images, classes) float32 with ``target`` (images,
            classes) uint8.
    """

    run: Run
    grid: tuple[int, int]
    depth: int
    kept: Mapping[int, Array] = dataclasses.field(default_factory=dict)
    slots: Mapping[int, Array] = dataclasses.field(default_factory=dict)
    features: Mapping[int, Array] = dataclasses.field(default_factory=dict)
    outputs: Mapping[str, Array] = dataclasses.field(default_factory=dict)

    @property
    def patches(self) -> int:
        """P."""
        return self.grid[0] * self.grid[1]

    @property
    def columns(self) -> dict[str, Array]:
        """Arrays of all columns, under their names in the file."""
        named = {f"{kind}.{block}": array for kind in _KINDS for block, array in getattr(self, kind).items()}
        return named | {f"outputs.{name}": array for name, array in self.outputs.items()}

    @property
    def images(self) -> int:
        """Number of images."""
        return max((len(array) for array in self.columns.values()), default=0)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks at which a stage reduced something."""
        return tuple(sorted({*self.kept, *self.slots}))

    def pattern(self, block: int, image: int) -> NDArray[np.int64]:
        """Return (P,): the token that every original patch of one image is in after a stage, -1 for lost ones."""
        if block in self.slots:
            return self.slots[block][image].astype(np.int64)
        kept = self.kept[block][image].astype(np.int64)
        slots = np.full(self.patches, -1)
        slots[kept[kept >= 0]] = np.flatnonzero(kept >= 0)
        return slots


def _smallest(low: int, high: int) -> np.dtype[Any]:
    """Return the smallest integer type that holds low to high."""
    kinds = (np.uint8, np.int8, np.int16, np.int32) if low >= 0 else (np.int8, np.int16, np.int32)
    return np.dtype(next(kind for kind in kinds if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max))


class ColumnWriter:
    """Writes columns of unknown length, piece by piece, and joins them into one safetensors file when it is left.

    Until then the pieces lie in a temporary folder beside ``path``; an exception removes them and leaves no file.

    Args:
        path: of the file.

    Raises:
        OSError: a folder, or one in which nothing can be written.

    Attributes:
        metadata: strings for the file's header, until it is closed.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        if self.path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        try:
            self._folder = tempfile.TemporaryDirectory(dir=self.path.parent, prefix=f".{self.path.name}.")
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        self._pieces: dict[str, tuple[IO[bytes], np.dtype[Any], tuple[int, ...]]] = {}
        self._lengths: dict[str, int] = {}

    def __enter__(self) -> ColumnWriter:
        return self

    def append(self, columns: Mapping[str, Array]) -> None:
        """Add rows: arrays whose first dimension is one length, and the rest as in the first call.

        Raises:
            ValueError: other columns, types or shapes than in the first call.
        """
        if not self._pieces:
            for index, (name, array) in enumerate(columns.items()):
                piece: IO[bytes] = open(Path(self._folder.name) / str(index), "w+b")  # noqa: SIM115
                self._pieces[name] = (piece, array.dtype, array.shape[1:])
                self._lengths[name] = 0
        if columns.keys() != self._pieces.keys():
            raise ValueError(f"the columns were {', '.join(self._pieces)}, now they are {', '.join(columns)}")
        for name, array in columns.items():
            piece, dtype, shape = self._pieces[name]
            if (array.dtype, array.shape[1:]) != (dtype, shape):
                raise ValueError(f"{name} was {dtype} {shape} an image, now it is {array.dtype} {array.shape[1:]}")
            piece.write(np.ascontiguousarray(array).data)
            self._lengths[name] += len(array)

    def column(self, name: str) -> Array:
        """Return what was written to a column so far, memory-mapped."""
        piece, dtype, shape = self._pieces[name]
        piece.flush()
        return np.memmap(piece.name, dtype, "r", shape=(self._lengths[name], *shape))

    def _write(self, file: IO[bytes]) -> None:
        header: dict[str, Any] = {"__metadata__": self.metadata}
        end = 0
        # Wide types first, so that every column lies at a multiple of its type.
        names = sorted(self._pieces, key=lambda name: -self._pieces[name][1].itemsize)
        for name in names:
            piece, dtype, shape = self._pieces[name]
            start, end = end, end + piece.tell()
            shape = (self._lengths[name], *shape)
            header[name] = {"dtype": _NAMES[dtype.name], "shape": shape, "data_offsets": [start, end]}
        words = json.dumps(header).encode()
        words += b" " * (-len(words) % 8)
        file.write(len(words).to_bytes(8, "little") + words)
        for name in names:
            piece = self._pieces[name][0]
            piece.seek(0)
            shutil.copyfileobj(piece, file, 1 << 20)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                whole = Path(self._folder.name) / "whole"
                with open(whole, "wb") as file:
                    self._write(file)
                os.replace(whole, self.path)
        finally:
            for piece, _, _ in self._pieces.values():
                piece.close()
            self._folder.cleanup()


def _whole_numbers(value: Any, count: int | None = None) -> bool:
    """Tell whether parsed JSON is a list of (so many) integers that are not negative."""
    return (
        isinstance(value, list)
        and (count is None or len(value) == count)
        and all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in value)
    )


def _check_about(about: Any) -> None:
    """Raise unless it says which model saw the images."""
    if not isinstance(about, dict) or not {"run", "grid", "depth"} <= about.keys():
        raise ValueError("its description lacks run, grid or depth")
    grid, depth = about["grid"], [about["depth"]]
    if not _whole_numbers(grid, 2) or not _whole_numbers(depth) or not all(0 < one <= _LARGEST for one in grid + depth):
        raise ValueError(f"grid {reprlib.repr(grid)} or depth {reprlib.repr(depth[0])} is no size")


def _place_of(name: str, depth: int) -> tuple[str, Any]:
    """Split ``kept.3`` into ("kept", 3); raise for a name that no column has."""
    kind, _, key = name.partition(".")
    if kind == "outputs" and key:
        return kind, key
    if kind not in _KINDS or not re.fullmatch("0|[1-9][0-9]{0,5}", key) or int(key) >= depth:
        raise ValueError(f"it has the unknown column {name!r}")
    return kind, int(key)


def _columns(header: Mapping[str, Any], size: int) -> list[tuple[str, np.dtype[Any], tuple[int, ...], int]]:
    """List name, type, shape and first byte of every column; together they are the ``size`` bytes after the header."""
    kinds = {short: np.dtype(name) for name, short in _NAMES.items()}
    columns, ends = [], []
    for name, column in header.items():
        if not isinstance(column, dict) or not {"dtype", "shape", "data_offsets"} <= column.keys():
            raise ValueError(f"column {name!r} lacks dtype, shape or data_offsets")
        dtype, shape, offsets = column["dtype"], column["shape"], column["data_offsets"]
        if not isinstance(dtype, str) or dtype not in kinds:
            raise ValueError(f"column {name!r} is of the unknown type {dtype!r}")
        if not _whole_numbers(shape) or not shape or not _whole_numbers(offsets, 2):
            raise ValueError(f"column {name!r} has the shape {shape!r} at {offsets!r}")
        if offsets[1] - offsets[0] != math.prod(shape) * kinds[dtype].itemsize:
            raise ValueError(f"column {name!r} has {offsets[1] - offsets[0]} bytes for the shape {shape!r}")
        columns.append((name, kinds[dtype], tuple(shape), offsets[0]))
        ends.append((offsets[0], offsets[1]))
    end = 0
    for begin, stop in sorted(ends):
        if begin != end:
            raise ValueError(f"its columns leave a gap or overlap at byte {min(begin, end)}")
        end = stop
    if end != size:
        raise ValueError(f"its columns have {end} bytes, the file {size}")
    if len({shape[0] for _, _, shape, _ in columns}) > 1:
        raise ValueError("its columns have different numbers of images")
    return columns


def _check_kinds(recording: Recording) -> None:
    """Raise where a column does not have the type, shape and values of its kind."""
    for name, array in recording.columns.items():
        kind = name.partition(".")[0]
        wanted = {"features": "f", "outputs": "iuf"}.get(kind, "iu")
        known = kind == "outputs" or (array.ndim == 2 and (kind != "slots" or array.shape[1] == recording.patches))
        if array.dtype.kind not in wanted or not known or array.ndim > 2:
            raise ValueError(f"column {name!r} is {array.dtype} {array.shape}")
        if kind in ("kept", "slots") and array.size and not -1 <= array.min() <= array.max() < recording.patches:
            raise ValueError(f"column {name!r} names patches or tokens beyond the grid {recording.grid}")


def open_recording(path: str | os.PathLike[str]) -> Recording:
    """Read what :func:`record_images` wrote, memory-mapped.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is no recording, or a damaged one; the message gives the file and what is wrong.
    """
    try:
        with open(path, "rb") as file:
            header, start = safetensors_header(file, path)
            size = os.fstat(file.fileno()).st_size - start
        words = header.pop("__metadata__", None)
        if not isinstance(words, dict) or not isinstance(words.get(_FORMAT), str):
            raise ValueError("it has no description of one")
        about = parse_json(words[_FORMAT], path)
        _check_about(about)
        groups: dict[str, dict[Any, Array]] = {kind: {} for kind in (*_KINDS, "outputs")}
        for name, dtype, shape, offset in _columns(header, size):
            kind, key = _place_of(name, about["depth"])
            empty = not math.prod(shape)  # an empty array cannot be mapped
            groups[kind][key] = (
                np.empty(shape, dtype) if empty else np.memmap(path, dtype, "r", offset=start + offset, shape=shape)
            )
        run = from_json(Run, about["run"], path)
        recording = Recording(run, (about["grid"][0], about["grid"][1]), about["depth"], **groups)
        _check_kinds(recording)
    except ValueError as error:
        where = os.fspath(path)
        raise ValueError(f"{where} is not a recording of fastreduce: {str(error).removeprefix(f'{where} ')}") from error
    return recording


def feature_blocks(depth: int) -> tuple[int, ...]:
    """Return the blocks whose class features are compared: a quarter, half and three quarters, and the last one.

    For twelve blocks these are the paper's: 3, 6, 9 and 11.
    """
    return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4, depth - 1}))


@contextmanager
def _class_features(model: Any, blocks: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the class token after each of the blocks, (B, C), of the latest forward pass."""
    seen: dict[int, Tensor] = {}

    def keep(block: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor | Tokens) -> None:
            seen[block] = (output.unpacked().x if isinstance(output, Tokens) else output)[:, 0]

        return hook

    handles = [model.blocks[block].register_forward_hook(keep(block)) for block in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _stage_columns(stages: Sequence[Stage], widths: Mapping[int, int], patches: int) -> dict[str, Array]:
    columns = {}
    for stage in stages:
        if stage.patch_slot.shape[1] != patches:
            raise ValueError(
                f"every image must have the model's {counted(patches, 'patch')}, got {stage.patch_slot.shape[1]}"
            )
        if stage.kept_patches is not None:
            kept = stage.kept_patches.cpu().numpy()
            padding = ((0, 0), (0, widths[stage.block] - kept.shape[1]))
            columns[f"kept.{stage.block}"] = np.pad(kept.astype(_smallest(-1, patches)), padding, constant_values=-1)
        if stage.merges or stage.kept_patches is None:
            slots = stage.patch_slot.cpu().numpy()
            columns[f"slots.{stage.block}"] = slots.astype(_smallest(0, widths[stage.block]))
    return columns


def best_classes(logits: Tensor) -> Tensor:
    """Return (B, up to 5) classes, best first, of equal logits the lower one; -1 for images whose logits have NaN."""
    best = logits.sort(dim=1, descending=True, stable=True).indices[:, :5]
    return best.masked_fill(logits.isnan().any(1, keepdim=True), -1)


def _output_columns(logits: Tensor, target: Tensor) -> dict[str, Array]:
    if target.ndim == 2:
        scores = logits.float().cpu().numpy()
        return {"outputs.scores": scores, "outputs.target": (target > 0).cpu().numpy().astype(np.uint8)}
    small = _smallest(-1, max(5, logits.shape[1]))
    return {
        "outputs.prediction": best_classes(logits).cpu().numpy().astype(small),
        "outputs.target": target.cpu().numpy().astype(small),
    }


def _accuracy(writer: ColumnWriter, names: Iterable[str]) -> float:
    target = writer.column("outputs.target")
    if "outputs.scores" in names:
        return mean_average_precision(writer.column("outputs.scores"), target)
    return float(100 * (writer.column("outputs.prediction")[:, 0] == target).mean())


def record_images(
    model: Any,
    batches: Iterable[tuple[Tensor, Tensor]],
    path: str | os.PathLike[str],
    *,
    dataset: str,
    backbone: str,
    method: str | None = None,
    keep_rate: float | None = None,
    features: Sequence[int] | None = None,
    feature_dtype: str = "float32",
    progress: Callable[[int], None] = lambda images: None,
) -> Recording:
    """Run a model over a data set, without gradient and in evaluation mode, and record what it does with every image.

    Args:
        model: a timm Vision Transformer, patched or not.
        batches: (images (B, 3, height, width), targets) each; targets (B,) integer, or (B, classes) 0 and 1 for
            multi-label data. To be compared, recordings must have seen the same images in the same order.
        path: of the file that is written; an interrupted recording leaves none.
        dataset: name of the data set.
        backbone: name of the model.
        method: name of the reduction (with its variant: ``"radial_l2"``); by default the reducer's own, and ``"none"``
            for a model that is not patched.
        keep_rate: of the first stage; None for an unreduced model, and for radial patterns without one.
        features: blocks after which the class token is recorded; by default :func:`feature_blocks`, none for a model
            without class token.
        feature_dtype: ``"float32"``, ``"float16"`` or ``"float64"``.
        progress: is told the number of images so far, after every batch.

    Returns:
        The recording, opened from the file, with the accuracy on these batches.

    Raises:
        ValueError: no images, no such block, class features of a model without class token, an unknown dtype, or a
            keep rate that does not fit the model.
    """
    depth, grid = len(model.blocks), tuple(model.patch_embed.grid_size)
    reducer = reducer_of(model) if is_patched(model) else None
    if (reducer is None) != (keep_rate is None) and (reducer is None or reducer.name != "radial"):
        state = "not patched" if reducer is None else f"patched with {reducer.name}"
        raise ValueError(f"keep_rate is {keep_rate}, and the model is {state}")
    if features is None:
        features = feature_blocks(depth) if model.cls_token is not None else ()
    if features and model.cls_token is None:
        raise ValueError("the model has no class token whose features could be recorded; give features=()")
    if not all(0 <= block < depth for block in features):
        raise ValueError(f"features must be blocks from 0 to {depth - 1}, got {tuple(features)}")
    if feature_dtype not in ("float16", "float32", "float64"):
        raise ValueError(f"feature_dtype must be float16, float32 or float64, got {feature_dtype!r}")
    widths = {} if reducer is None else dict(zip(reducer.blocks, reduced_counts(model), strict=True))
    weight, training = next(model.parameters()), model.training
    done, names = 0, set[str]()
    model.eval()
    try:
        with ColumnWriter(path) as writer, _class_features(model, features) as seen, torch.inference_mode():
            for images, target in batches:
                images, stages = images.to(weight.device, weight.dtype), []
                if reducer is None:
                    logits = model(images)
                else:
                    with record(model) as recorder:
                        logits = model(images)
                    stages = recorder.stages
                columns = _stage_columns(stages, widths, math.prod(grid))
                for block in features:
                    columns[f"features.{block}"] = seen[block].to(getattr(torch, feature_dtype)).cpu().numpy()
                columns |= _output_columns(logits, target)
                names.update(columns)
                writer.append(columns)
                done += len(images)
                progress(done)
            if not done:
                raise ValueError("there were no images to record")
            run = Run(
                dataset,
                backbone,
                method if method is not None else UNREDUCED if reducer is None else reducer.name,
                keep_rate,
                _accuracy(writer, names),
                sum(parameter.numel() for parameter in model.parameters()),
            )
            about = {"run": dataclasses.asdict(run), "grid": grid, "depth": depth}
            writer.metadata = {_FORMAT: json.dumps(about)}
    finally:
        model.train(training)
    return open_recording(path)
