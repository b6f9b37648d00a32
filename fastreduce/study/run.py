"""A whole study: train every method at every keep rate, evaluate, record, compare, correlate, draw, report."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from torch.utils.data import DataLoader

from .._files import read_json, write_atomically
from ._lock import hold
from .analysis import Study, analyse
from .data import DataSet
from .evaluate import Evaluation, Examination, examine, time_in_turns
from .pages import write_study
from .protocol import load_trained
from .recipe import Model, Recipe, train_all
from .record import UNREDUCED, Recording, open_recording, record_images
from .train import Training

__all__ = ["run_study"]

_ROUNDS = 10  # in which speeds are measured
_log = logging.getLogger("fastreduce")
_Progress = Callable[[str, float, float], None]


def _judge(
    recipe: Recipe, model: Model, weights: Path, data: DataSet, folder: Path, device: torch.device
) -> tuple[Recording, Examination]:
    """Record and examine a trained model, or read what an earlier call wrote."""
    reduction, capacity = model.reduction, model.capacity
    recorded, evaluated = folder / "recording.safetensors", folder / "evaluation.json"
    if not (evaluated.exists() and recorded.exists()):
        for remains in folder.glob(f".{recorded.name}.*"):  # left by a process that was killed while it recorded
            shutil.rmtree(remains, ignore_errors=True)
        trained: Any = load_trained(capacity.backbone, reduction, weights, data.num_classes).to(device)
        size, workers = min(recipe.fine_tuning.batch_size, len(data.val)), recipe.fine_tuning.workers
        rate = None if reduction is None else reduction.keep_rate
        first = rate[0] if isinstance(rate, tuple) else rate
        # Features are compared over images, of which there must be more than neurons.
        enough = len(data.val) > trained.num_features
        recording = record_images(
            trained,
            DataLoader(data.val, batch_size=size, num_workers=workers),
            recorded,
            dataset=data.name,
            backbone=capacity.name,
            method=UNREDUCED if reduction is None else reduction.variant,
            keep_rate=first,
            features=None if enough else (),
        )
        found = examine(trained, recording, data, batch_size=size)
        write_atomically(evaluated, json.dumps(dataclasses.asdict(found), indent=1) + "\n")
    return open_recording(recorded), _read_examination(evaluated)


def _read_examination(path: Path) -> Examination:
    try:
        held = read_json(path)
        return Examination(**{field.name: held[field.name] for field in dataclasses.fields(Examination)})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not what a study wrote: remove it, and it is made again") from error


def _measure_speeds(
    recipe: Recipe, trained: Mapping[str, Training], data: DataSet, folder: Path, device: torch.device, said: _Progress
) -> dict[str, list[float]]:
    """Measure images per second by place, models of one backbone in turns; or read what an earlier call wrote."""
    path, places = folder / "speed.json", [model.place for model in recipe.models]
    about = {"device": str(device), "threads": torch.get_num_threads(), "batch_size": recipe.fine_tuning.batch_size}
    try:
        held = read_json(path)
        if held["about"] == about and [*held["images_per_second"]] == places:
            return held["images_per_second"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the speed is measured again
    speeds: dict[str, list[float]] = {}
    for capacity in dict.fromkeys(model.capacity.name for model in recipe.models):
        said(f"timing {capacity} in turns", len(speeds), len(places))
        models = {
            model.place: load_trained(
                model.capacity.backbone, model.reduction, trained[model.place].weights, data.num_classes
            ).to(device)
            for model in recipe.models
            if model.capacity.name == capacity
        }
        speeds |= time_in_turns(models, data, batch_size=recipe.fine_tuning.batch_size, rounds=_ROUNDS)
    write_atomically(path, json.dumps({"about": about, "images_per_second": speeds}, indent=1) + "\n")
    return speeds


def _seconds(training: Training) -> float:
    return sum(epoch.seconds for epoch in training.epochs)


def run_study(
    recipe: Recipe,
    folder: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    jobs: int = 1,
    cpu: bool = False,
    progress: _Progress | None = None,
) -> Study | None:
    """Run a study from training to report.

    What is in the folder already is not done again: an interrupted study goes on where it was. While another study has
    the folder, this one waits.

    Args:
        recipe: what is trained, and how.
        folder: gets ``report.html``, ``summary.md``, ``results.json``, ``tables/``, ``pictures/`` and, under
            ``models/``, the weights, histories and recordings of every model.
        root: the folder of the data set; none for digits.
        jobs: how many models are trained at a time; see :func:`~fastreduce.study.recipe.train_all`.
        cpu: stay on the CPU.
        progress: called with what is done, how much of it and out of how much.

    Returns:
        The study; None in the processes of ``accelerate launch`` but the first, which help to train.

    Raises:
        ValueError: the folder holds another study; a data set or a model that does not fit.
        OSError: the data set is not there, or the folder cannot be written to.
    """
    folder = Path(folder)
    data = recipe.open(root)
    state = PartialState(cpu=cpu)
    with ExitStack() as stack:
        if state.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(
                hold(folder, lambda holder: _log.warning("%s is in use by %s: waiting for it", folder, holder))
            )
        return _run(recipe, folder, data, state, root, jobs, cpu, progress)


def _run(
    recipe: Recipe,
    folder: Path,
    data: DataSet,
    state: PartialState,
    root: str | os.PathLike[str] | None,
    jobs: int,
    cpu: bool,
    progress: _Progress | None,
) -> Study | None:
    said: _Progress = progress or (lambda what, done, total: None)
    trained = train_all(recipe, folder / "models", root=root, jobs=jobs, cpu=cpu, progress=progress)
    places = {model.place for model in recipe.models}
    seconds = {
        "training backbones": sum(_seconds(one) for place, one in trained.items() if place not in places),
        "fine-tuning": sum(_seconds(trained[place]) for place in places),
    }
    if not state.is_main_process:
        return None
    start = time.perf_counter()
    recordings, examinations = [], []
    for done, model in enumerate(recipe.models):
        said("evaluating and recording", done, len(places))
        weights = trained[model.place].weights
        judged = _judge(recipe, model, weights, data, folder / "models" / model.place, state.device)
        recordings.append(judged[0])
        examinations.append(judged[1])
    seconds["evaluating and recording"] = time.perf_counter() - start
    start = time.perf_counter()
    speeds = _measure_speeds(recipe, trained, data, folder / "models", state.device, said)
    seconds["timing"] = time.perf_counter() - start
    evaluations = [
        Evaluation.of(found, speeds[model.place]) for found, model in zip(examinations, recipe.models, strict=True)
    ]
    said("comparing and drawing", 0, 1)
    study = analyse(recordings, evaluations, seconds)
    write_study(study, recipe, data, folder, state.device)
    return study
