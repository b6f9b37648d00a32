"""The files of a training: its history, its weights, and checkpoints on the way."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from .._files import read_json, write_atomically
from .protocol import EMA_WEIGHTS, HISTORY, WEIGHTS

__all__ = [
    "PART",
    "STATE",
    "Epoch",
    "Training",
    "list_states",
    "read_history",
    "read_result",
    "write_history",
    "write_weights",
]

STATE, PART = "epoch-", ".part"


@dataclasses.dataclass(frozen=True)
class Epoch:
    """Results of one epoch.

    Attributes:
        losses: of every batch, the mean over all processes.
        lr: of the last update.
        accuracy: what :func:`~fastreduce.study.evaluate.measure_accuracy` gives, in per cent, or empty where it was not
            measured.
        ema_accuracy: the same of the moving average of the weights, empty without one.
        seconds: without validation.
    """

    losses: list[float]
    lr: float
    accuracy: dict[str, float]
    ema_accuracy: dict[str, float]
    seconds: float

    @property
    def loss(self) -> float:
        """The mean."""
        return math.fsum(self.losses) / len(self.losses)


@dataclasses.dataclass(frozen=True)
class Training:
    """A finished training.

    Attributes:
        epochs: its history.
        weights: ``model.safetensors``, with the names of the patched model.
        ema_weights: ``model_ema.safetensors``, the moving average's, or None.
    """

    epochs: list[Epoch]
    weights: Path
    ema_weights: Path | None


def _check_same(folder: Path, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for part, value in wanted.items():
        held = found.get(part)
        if isinstance(value, dict) and isinstance(held, dict):
            other = [key for key in {**value, **held} if value.get(key) != held.get(key)]
            value, held = ({key: side.get(key) for key in other} for side in (value, held))
        if value != held:
            raise ValueError(
                f"{folder} holds another training: its {part} is {held!r}, wanted was {value!r}; "
                "give another folder, or remove it"
            )


def list_states(folder: Path) -> list[Path]:
    """List the complete checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob(f"{STATE}*") if path.suffix != PART)


def write_weights(model: nn.Module, path: Path) -> None:
    """Write the weights of a model, whole or not at all."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_atomically(path, lambda part: save_file(state, part))


def write_history(place: Path, epochs: Sequence[Epoch], description: Mapping[str, Any]) -> None:
    """Write the epochs so far, and what was trained, to a folder."""
    history = {"description": description, "epochs": [dataclasses.asdict(epoch) for epoch in epochs]}
    write_atomically(place / HISTORY, json.dumps(history, indent=1) + "\n")


def read_history(folder: Path, place: Path, description: Mapping[str, Any]) -> list[Epoch]:
    """Read the epochs behind the result or the checkpoint at a place of the folder.

    Raises:
        ValueError: it holds none, or another training's.
    """
    path = place / HISTORY
    try:
        found = read_json(path)
        epochs = [Epoch(**epoch) for epoch in found["epochs"]]
        held = found["description"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = str(error).removeprefix(f"{path} ")
        raise ValueError(f"{path} is not the result of a training: {why}") from error
    _check_same(folder, description, held)
    return epochs


def read_result(folder: Path, description: Mapping[str, Any]) -> Training | None:
    """Return the training that the folder holds, if it is finished."""
    if not (folder / HISTORY).exists():
        return None
    epochs = read_history(folder, folder, description)
    ema = folder / EMA_WEIGHTS
    return Training(epochs, folder / WEIGHTS, ema if ema.exists() else None)
