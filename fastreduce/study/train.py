"""Fine-tuning with or without token reduction, on accelerate: one process, several GPUs or several machines."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DataLoaderConfiguration
from safetensors.torch import load_file
from timm.data import Mixup
from timm.data.distributed_sampler import RepeatAugSampler
from timm.layers import PatchDropout
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

from ..arguments import counted
from ._lock import hold
from .data import DataSet
from .evaluate import measure_accuracy
from .history import PART, STATE, Epoch, Training, list_states, read_history, read_result, write_history, write_weights
from .objective import Objective, Observed
from .protocol import EMA_WEIGHTS, WEIGHTS, Backbone, Protocol, Reduction, plain_data

__all__ = ["make_accelerator", "parameter_groups", "train"]

_NEW_PARTS = ("head", "pos_embed", "patch_embed", "reducers")
_WITHOUT_DECAY = ("pos_embed", "cls_token", "reg_token", "dist_token")
_log = logging.getLogger("fastreduce")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Make groups for an optimizer: new parts and backbone, each with and without weight decay.

    Returns:
        Those that are not empty, with ``params``, ``weight_decay``, ``new`` and the ``lr_scale`` that timm's schedulers
        respect.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith((".bias", *_WITHOUT_DECAY))
            groups.setdefault((name.startswith(_NEW_PARTS), decays), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0, "new": new, "lr_scale": 1.0}
        for (new, decays), parameters in groups.items()
    ]


def make_accelerator(protocol: Protocol, cpu: bool = False) -> Accelerator:
    """Return what runs the protocol here.

    It runs on the processes that ``accelerate launch`` started, or on this one alone.
    """
    alone = PartialState(cpu=cpu).num_processes == 1
    AcceleratorState._reset_state(reset_partial_state=alone)  # else they refuse another device or precision
    on_cpu = PartialState(cpu=cpu).device.type == "cpu"
    precision = "no" if on_cpu and protocol.mixed_precision == "fp16" else protocol.mixed_precision
    return Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        gradient_accumulation_steps=protocol.accumulate,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=protocol.seed),
    )


@contextmanager
def _muon_in_float32() -> Iterator[None]:
    """Let timm's Muon compute in float32: on a CPU its bfloat16 takes ten times as long."""
    from timm.optim import muon

    before = muon.zeropower_via_newtonschulz
    muon.zeropower_via_newtonschulz = partial(before, dtype=torch.float32)
    try:
        yield
    finally:
        muon.zeropower_via_newtonschulz = before


def _loader(protocol: Protocol, data: DataSet) -> DataLoader:
    sampler = None
    if protocol.repeats > 1:
        # For one process: accelerate shares the batches out.
        sampler = RepeatAugSampler(data.train, num_replicas=1, rank=0, num_repeats=protocol.repeats)
    return DataLoader(
        data.train,
        batch_size=protocol.batch_size,
        sampler=sampler,
        shuffle=sampler is None,
        num_workers=protocol.workers,
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
    )


def _set_seed(seed: int) -> None:
    """Seed all generators, of which numpy's takes 32 bits."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _fingerprint(model: nn.Module) -> str:
    """Return a fingerprint of the weights, in their order."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _describe(
    data: DataSet,
    backbone: Backbone,
    protocol: Protocol,
    reduction: Reduction | None,
    teacher: nn.Module | None,
    processes: int,
) -> dict[str, Any]:
    """Return all that the curve depends on.

    Files and models stand there by what is in them, wherever they are.
    """
    start = plain_data(backbone)
    if backbone.checkpoint is not None:
        start["checkpoint"] = hashlib.sha256(Path(backbone.checkpoint).read_bytes()).hexdigest()
    return {
        "data": {
            "name": data.name,
            "images": [len(data.train), len(data.val)],
            "classes": data.num_classes,
            "image_size": data.image_size,
            "augmentation": plain_data(data.augmentation),
        },
        "backbone": start,
        "teacher": None if teacher is None else _fingerprint(teacher),
        "reduction": None if reduction is None else plain_data(reduction),
        "protocol": plain_data(protocol),
        "processes": processes,
    }


def _check_size(name: str, model: Any, data: DataSet) -> None:
    patches, size = model.patch_embed, (data.image_size, data.image_size)
    if patches.strict_img_size and patches.img_size != size:
        raise ValueError(f"{name} takes images of {patches.img_size} pixels, {data.name} has {size}")


class _Trainer:
    """Everything that a training holds while it runs."""

    def __init__(
        self,
        data: DataSet,
        backbone: Backbone,
        protocol: Protocol,
        reduction: Reduction | None,
        teacher: nn.Module | None,
        accelerator: Accelerator,
    ):
        self.protocol, self.data, self.accelerator = protocol, data, accelerator
        together = protocol.batch_size * accelerator.num_processes
        if len(data.train) < together:
            raise ValueError(
                f"{data.name} has {counted(len(data.train), 'training image')}, fewer than a batch of {together}"
            )
        _set_seed(protocol.seed)  # the same weights in all processes
        self.model = backbone.build(data.num_classes, protocol.drop_path)
        _check_size(backbone.name, self.model, data)
        reduced = None if reduction is None else reduction.apply(self.model)
        if protocol.patch_drop and reduction is not None:
            raise ValueError(f"patch_drop is for unreduced models, got {protocol.patch_drop} with {reduction.label}")
        if protocol.patch_drop:
            prefix: Any = self.model.num_prefix_tokens
            self.patch_drop = self.model.patch_drop = PatchDropout(protocol.patch_drop, prefix)
        fractions, pupil = None, None if protocol.distillation is None else f"{protocol.distillation} distillation"
        if reduction is not None and reduced is not None and reduction.method == "dynamicvit":
            fractions, pupil = reduction.fractions(reduced), pupil or "dynamicvit"
        if pupil is not None and teacher is None:
            if not backbone.knows(data.num_classes):
                raise ValueError(
                    f"{pupil} needs a teacher, and the backbone has no head for the classes of {data.name}: "
                    "give one, such as the unreduced model after its fine-tuning"
                )
            teacher = backbone.build(data.num_classes)
        if teacher is not None:
            teacher = teacher.to(accelerator.device).eval().requires_grad_(False)
        self.objective = Objective(protocol, data.multi_label, teacher, fractions)
        self.mixup: Any = None
        if protocol.mixes and not data.multi_label:
            self.mixup = Mixup(
                mixup_alpha=protocol.mixup,
                cutmix_alpha=protocol.cutmix,
                switch_prob=protocol.mixup_switch,
                label_smoothing=protocol.label_smoothing,
                num_classes=data.num_classes,
            )
        self.optimizer = create_optimizer_v2(
            parameter_groups(self.model, protocol.weight_decay),
            opt=protocol.optimizer,
            lr=protocol.lr * protocol.batch_size * accelerator.num_processes * protocol.accumulate / 1024,
            weight_decay=protocol.weight_decay,
            eps=protocol.eps,
        )
        # Before accelerate changes the model's forward.
        self.ema = None if protocol.ema is None else ModelEmaV3(self.model, decay=protocol.ema).to(accelerator.device)
        observed = self.model if fractions is None else Observed(self.model)
        self.trained, self.stepper, self.loader = accelerator.prepare(observed, self.optimizer, _loader(protocol, data))
        if not len(self.loader):
            raise ValueError(
                f"{data.name} has {counted(len(data.train), 'training image')}, too few for a batch of {together}"
            )
        self.updates = math.ceil(len(self.loader) / protocol.accumulate)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched="cosine",
            num_epochs=protocol.epochs,
            min_lr=protocol.min_lr,
            warmup_lr=protocol.warmup_lr,
            warmup_epochs=protocol.warmup_epochs,
            step_on_epochs=False,
            updates_per_epoch=self.updates,
        )
        # The names of the patched model, in whatever accelerate and DynamicViT wrap it.
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)
        in_float32 = protocol.optimizer == "muon" and accelerator.device.type == "cpu"
        self.stepping = _muon_in_float32 if in_float32 else nullcontext
        _set_seed(protocol.seed + accelerator.process_index)

    def _save_weights(self, models: list[nn.Module], weights: list[Any], place: str | os.PathLike[str]) -> None:
        weights.clear()
        if self.accelerator.is_main_process:
            self.write_weights(Path(place))

    def _load_weights(self, models: list[nn.Module], place: str | os.PathLike[str]) -> None:
        models.clear()
        self.model.load_state_dict(load_file(Path(place) / WEIGHTS))
        if self.ema is not None:
            self.ema.module.load_state_dict(load_file(Path(place) / EMA_WEIGHTS))

    def write_weights(self, place: Path) -> None:
        """Write the weights of the model and of its moving average."""
        write_weights(self.model, place / WEIGHTS)
        if self.ema is not None:
            write_weights(self.ema.module, place / EMA_WEIGHTS)

    def _scale_rates(self, epoch: int) -> None:
        factor = 0.0 if epoch < self.protocol.frozen_epochs else self.protocol.backbone_lr
        for group in self.optimizer.param_groups:
            group["lr_scale"] = 1.0 if group["new"] else factor

    def run_epoch(self, epoch: int, moved: Callable[[float], None]) -> tuple[list[float], float]:
        """Train an epoch, and return the losses of all batches and the last learning rate of the new parts."""
        self.trained.train()
        self._scale_rates(epoch)
        if self.protocol.patch_drop:
            drops = epoch < round(self.protocol.patch_drop_share * self.protocol.epochs)
            self.patch_drop.prob = self.protocol.patch_drop if drops else 0.0
        self.loader.set_epoch(epoch)
        losses, update = [], epoch * self.updates
        for done, (images, labels) in enumerate(self.loader, 1):
            if self.mixup is not None:
                images, labels = self.mixup(images, labels)
            with self.accelerator.accumulate(self.trained):
                self.scheduler.step_update(update)
                with self.accelerator.autocast():
                    loss = self.objective(self.trained, images, labels)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients and self.protocol.clip_norm is not None:
                    self.accelerator.clip_grad_norm_(self.trained.parameters(), self.protocol.clip_norm)
                with self.stepping():
                    self.stepper.step()
                self.stepper.zero_grad()
            losses.append(loss.detach().float())
            if self.accelerator.sync_gradients:
                update += 1
                if self.ema is not None:
                    self.ema.update(self.model)
            moved(done / len(self.loader))
        values = self.accelerator.reduce(torch.stack(losses), "mean").tolist()
        if (bad := next((i for i, value in enumerate(values) if not math.isfinite(value)), None)) is not None:
            raise FloatingPointError(f"the loss became {values[bad]} in batch {bad} of epoch {epoch}: lower the rate")
        return values, next(group["lr"] for group in self.optimizer.param_groups if group["new"])

    def validate(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the accuracy of the model, and of its moving average."""
        settings = {"batch_size": self.protocol.batch_size, "workers": self.protocol.workers}
        results = [
            {} if model is None else measure_accuracy(model, self.data, accelerator=self.accelerator, **settings)
            for model in (self.model, None if self.ema is None else self.ema.module)
        ]
        return results[0], results[1]

    def save_state(self, folder: Path, epochs: Sequence[Epoch], description: Mapping[str, Any]) -> None:
        """Write a checkpoint under its own name, then remove the ones before: there is always a complete one."""
        older = list_states(folder)
        whole = folder / f"{STATE}{len(epochs):05}"
        part = whole.with_name(whole.name + PART)
        self.accelerator.save_state(str(part))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_history(part, epochs, description)
            part.replace(whole)
            for path in older:
                shutil.rmtree(path)
        self.accelerator.wait_for_everyone()

    def finish(self, folder: Path, epochs: Sequence[Epoch], description: Mapping[str, Any]) -> None:
        """Write the weights, then the result, then away with the checkpoints."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.write_weights(folder)
            write_history(folder, epochs, description)
            for path in folder.glob(f"{STATE}*"):
                shutil.rmtree(path)
        self.accelerator.wait_for_everyone()


def train(
    data: DataSet,
    backbone: Backbone,
    protocol: Protocol,
    folder: str | os.PathLike[str],
    *,
    reduction: Reduction | None = None,
    teacher: nn.Module | None = None,
    cpu: bool = False,
    validate_every: int = 1,
    checkpoint_every: int = 1,
    progress: Callable[[str, float, float], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> Training:
    """Fine-tune a backbone, with or without token reduction.

    Where ``accelerate launch`` started several processes, all of them call this, and share the batches out. The same
    arguments give the same curve, on one machine; an interrupted training goes on where its last checkpoint was, with
    the curve that it would have had, and a finished one is read from the folder.

    Example::

        data = open_data("digits")
        backbone = Backbone("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 4}, checkpoint="digits.safetensors")
        reduction = Reduction("topk", keep_rate=0.5)
        train(data, backbone, protocol_for("digits", epochs=5, warmup_epochs=1), "runs/topk-0.5", reduction=reduction)

    Args:
        data: from :func:`~fastreduce.study.data.open_data`.
        backbone: the model and its weights.
        protocol: how; :func:`~fastreduce.study.protocol.protocol_for` has the paper's.
        folder: for ``model.safetensors`` (and ``model_ema.safetensors``), ``training.json`` and, on the way,
            checkpoints, which hold these files too; all processes must see it. While another training has the
            folder, this one waits; the same arguments then give what that one gave.
        reduction: the method, or None for the unreduced model.
        teacher: an unreduced timm model for distillation and for DynamicViT. Default: the backbone with its weights,
            which must have been trained for these classes.
        cpu: stay on the CPU.
        validate_every: epochs between validations, 0 for a single one at the end.
        checkpoint_every: epochs between checkpoints, 0 for none before the end.
        progress: called with what is done, how much of it and out of how much, by the first process.
        on_epoch: called by every process after an epoch and its checkpoint.

    Returns:
        The history and the files.

    Raises:
        ValueError: a folder that holds another training (finished or not), weights that do not fit, a data set smaller
            than a batch, distillation without a teacher, a negative number of epochs between validations or
            checkpoints.
        OSError: the folder cannot be written to.
        FloatingPointError: the loss is not finite.
    """
    for name, value in (("validate_every", validate_every), ("checkpoint_every", checkpoint_every)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    folder = Path(folder)
    accelerator = make_accelerator(protocol, cpu)
    description = _describe(data, backbone, protocol, reduction, teacher, accelerator.num_processes)
    if (finished := read_result(folder, description)) is not None:
        return finished
    if states := list_states(folder):
        read_history(folder, states[-1], description)
    what = data.name if reduction is None else f"{data.name} {reduction.label}"

    def moved(done: float) -> None:
        if progress is not None and accelerator.is_main_process:
            progress(f"training {what}", done, protocol.epochs)

    def waiting(holder: str) -> None:
        _log.warning("%s is in use by %s: waiting for it", folder, holder)

    if protocol.epochs:
        trainer = _Trainer(data, backbone, protocol, reduction, teacher, accelerator)
        work = partial(
            _train, trainer, folder, description, validate_every, checkpoint_every, moved, on_epoch
        )  # fmt: skip
    else:
        work = partial(_leave_untrained, _untrained(data, backbone, reduction), folder, description)
    with ExitStack() as stack:
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold(folder, waiting))
            _remove_remains(folder)
        accelerator.wait_for_everyone()
        # Another process may have finished, or begun, while this one waited for the folder.
        if read_result(folder, description) is None:
            work()
    accelerator.free_memory()
    result = read_result(folder, description)
    assert result is not None
    return result


def _untrained(data: DataSet, backbone: Backbone, reduction: Reduction | None) -> nn.Module:
    """Return the backbone as it is, with the method; ValueError for one with layers that would stay random."""
    if not backbone.knows(data.num_classes):
        raise ValueError(
            f"without training the backbone needs a head for the {counted(data.num_classes, 'class')} of {data.name}"
        )
    model = backbone.build(data.num_classes)
    _check_size(backbone.name, model, data)
    if reduction is not None:
        reduction.apply(model)
        if any(name.startswith("reducers.") for name, _ in model.named_parameters()):
            raise ValueError(f"{reduction.method} has layers to train: epochs must be at least 1")
    return model


def _leave_untrained(model: nn.Module, folder: Path, description: Mapping[str, Any]) -> None:
    """Write what a training of no epochs leaves."""
    if PartialState().is_main_process:
        write_weights(model, folder / WEIGHTS)
        write_history(folder, [], description)
    PartialState().wait_for_everyone()


def _remove_remains(folder: Path) -> None:
    """Remove what a killed process was in the middle of writing."""
    for path in (*folder.glob(f"*{PART}"), *folder.glob(".fastreduce-*"), *folder.glob(f"{STATE}*/.fastreduce-*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _train(
    trainer: _Trainer,
    folder: Path,
    description: Mapping[str, Any],
    validate_every: int,
    checkpoint_every: int,
    moved: Callable[[float], None],
    on_epoch: Callable[[Epoch], None] | None,
) -> None:
    """Train from the last checkpoint of the folder to the end."""
    last = trainer.protocol.epochs
    states = list_states(folder)
    epochs = read_history(folder, states[-1], description) if states else []
    if states:
        trainer.accelerator.load_state(str(states[-1]))
    for epoch in range(len(epochs), last):
        start = time.perf_counter()
        losses, lr = trainer.run_epoch(epoch, lambda part, epoch=epoch: moved(epoch + part))  # type: ignore[misc]
        seconds = time.perf_counter() - start
        measured: tuple[dict[str, float], dict[str, float]] = ({}, {})
        if epoch + 1 == last or (validate_every and (epoch + 1) % validate_every == 0):
            measured = trainer.validate()
        epochs.append(Epoch(losses, lr, *measured, seconds))
        if checkpoint_every and (epoch + 1) % checkpoint_every == 0 and epoch + 1 < last:
            trainer.save_state(folder, epochs, description)
        if on_epoch is not None:
            on_epoch(epochs[-1])
    trainer.finish(folder, epochs, description)
