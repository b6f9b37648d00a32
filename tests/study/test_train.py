"""The study's training and evaluation, on a few digits and a tiny model."""

import dataclasses
import json
import logging
import math
import multiprocessing
import os
import signal
import threading

import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from timm.loss import LabelSmoothingCrossEntropy
from torch import nn

import fastreduce
from fastreduce.study._lock import hold
from fastreduce.study.data import Images, Shifts, open_data
from fastreduce.study.evaluate import evaluate, measure_accuracy
from fastreduce.study.measures import mean_average_precision
from fastreduce.study.protocol import Backbone, Protocol, Reduction, load_trained, protocol_for
from fastreduce.study.train import make_accelerator, parameter_groups, train

OPTIONS = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2}
BACKBONE = Backbone("vit_tiny_patch16_224", OPTIONS)
PLAIN = protocol_for(
    "digits", epochs=2, warmup_epochs=1, batch_size=8, accumulate=1, lr=0.1, drop_path=0.0, label_smoothing=0.0
)
STILL = Shifts(0.0, 0.0, 0.0, 0.0)
EVERYTHING = dataclasses.replace(
    PLAIN,
    epochs=4,
    accumulate=2,
    drop_path=0.2,
    label_smoothing=0.1,
    mixup=0.8,
    cutmix=1.0,
    repeats=3,
    ema=0.9,
    backbone_lr=0.5,
    frozen_epochs=1,
    clip_norm=1.0,
)


def few_digits(images=40, multi_label=False, augmentation=None):
    data = open_data("digits", image_size=16, augmentation=augmentation)
    train, val = (
        Images(split.sources[:count], split.labels[:count], split.transform)
        for split, count in ((data.train, images), (data.val, 21))
    )
    if multi_label:
        for split in (train, val):
            split.labels = torch.nn.functional.one_hot(split.labels, 10).to(torch.uint8)
    return dataclasses.replace(data, train=train, val=val, multi_label=multi_label)


def worker_server():
    """Return how to start workers that inherit no threads of other tests' autograd, and import nothing themselves."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.study.few_digits"])
    return server


def losses(training):
    return [loss for epoch in training.epochs for loss in epoch.losses]


class Stop(Exception):
    pass


def test_interrupted_training_goes_on_with_the_same_curve(tmp_path):
    data, reduction = few_digits(), Reduction("topk", 0.5)
    torch.manual_seed(3)
    whole = train(data, BACKBONE, EVERYTHING, tmp_path / "whole", reduction=reduction, cpu=True)
    assert len(losses(whole)) == 4 * 5

    def stop(epoch):
        counted.append(epoch)
        if len(counted) == 2:
            raise Stop

    counted = []
    with pytest.raises(Stop):
        train(data, BACKBONE, EVERYTHING, tmp_path / "parts", reduction=reduction, cpu=True, on_epoch=stop)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["epoch-00002"]
    held = {path.name for path in (tmp_path / "parts" / "epoch-00002").iterdir()}
    assert {"model.safetensors", "model_ema.safetensors", "training.json"} < held
    with pytest.raises(ValueError, match="parts holds another training: its reduction is"):
        train(data, BACKBONE, EVERYTHING, tmp_path / "parts", reduction=Reduction("sit", 0.5), cpu=True)
    (tmp_path / "parts" / "epoch-00003.part").mkdir()  # as a checkpoint that was being written looks
    torch.manual_seed(4)
    rest = []
    parts = train(data, BACKBONE, EVERYTHING, tmp_path / "parts", reduction=reduction, cpu=True, on_epoch=rest.append)
    assert len(rest) == 2

    def floats(training):
        return [(e.losses, e.lr, e.accuracy, e.ema_accuracy) for e in training.epochs]

    assert floats(parts) == floats(whole)
    for ours, theirs in ((parts.weights, whole.weights), (parts.ema_weights, whole.ema_weights)):
        found, expected = load_file(ours), load_file(theirs)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    for weights, accuracy in ((whole.weights, "accuracy"), (whole.ema_weights, "ema_accuracy")):
        model = load_trained(BACKBONE, reduction, weights, 10)
        assert measure_accuracy(model, data, batch_size=8) == getattr(whole.epochs[-1], accuracy)
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [
        "model.safetensors",
        "model_ema.safetensors",
        "training.json",
    ]


def test_a_finished_training_is_read_and_another_one_is_refused(tmp_path):
    data = few_digits(16)
    first = train(data, BACKBONE, PLAIN, tmp_path, cpu=True)
    changed = (tmp_path / "model.safetensors").stat().st_mtime_ns
    again = train(data, BACKBONE, PLAIN, tmp_path, cpu=True)
    assert again == first
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == changed
    with pytest.raises(ValueError, match="another training: its reduction is None"):
        train(data, BACKBONE, PLAIN, tmp_path, cpu=True, reduction=Reduction("topk", 0.5))
    with pytest.raises(ValueError, match="another training: its teacher is None"):
        train(data, BACKBONE, PLAIN, tmp_path, cpu=True, teacher=BACKBONE.build(10))
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(ValueError, match=r"training\.json is not the result of a training"):
        train(data, BACKBONE, PLAIN, tmp_path, cpu=True)


def _train_until_killed(folder):
    train(few_digits(), BACKBONE, EVERYTHING, folder, reduction=Reduction("topk", 0.5), cpu=True)


def test_a_training_that_is_killed_at_any_point_has_the_same_curve(tmp_path):
    data, reduction = few_digits(), Reduction("topk", 0.5)
    whole = train(data, BACKBONE, EVERYTHING, tmp_path / "whole", reduction=reduction, cpu=True)
    workers, kills, seconds = worker_server(), 0, 0.1
    for _ in range(30):
        process = workers.Process(target=_train_until_killed, args=(tmp_path / "killed",))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills, seconds = kills + 1, 1.15 * seconds
    assert kills > 1
    killed = train(data, BACKBONE, EVERYTHING, tmp_path / "killed", reduction=reduction, cpu=True)
    assert [(e.losses, e.lr, e.accuracy) for e in killed.epochs] == [(e.losses, e.lr, e.accuracy) for e in whole.epochs]
    held = load_file(killed.weights)
    assert all(torch.equal(held[name], value) for name, value in load_file(whole.weights).items())


def test_a_training_waits_while_another_has_the_folder(tmp_path, caplog):
    def leave(record):
        left.set()
        return True

    data, left, done = few_digits(8), threading.Event(), []
    holding = threading.Event()

    def other():
        with hold(tmp_path, lambda holder: None):
            holding.set()
            assert left.wait(60)
            done.append("left")

    thread = threading.Thread(target=other)
    thread.start()
    assert holding.wait(60)
    log = logging.getLogger("fastreduce")
    log.addFilter(leave)  # the other one leaves when this one says that it waits
    try:
        train(data, BACKBONE, dataclasses.replace(PLAIN, epochs=1), tmp_path, cpu=True, on_epoch=done.append)
    finally:
        log.removeFilter(leave)
        thread.join()
    assert done[0] == "left"
    assert f"{tmp_path} is in use by process {os.getpid()}: waiting for it" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "training.json"]


@pytest.mark.parametrize("seed", [2**32, 2**63 - 1])
def test_seeds_beyond_numpys(tmp_path, seed):
    protocol = dataclasses.replace(PLAIN, epochs=1, mixup=0.8, seed=seed)
    first, again = (train(few_digits(8), BACKBONE, protocol, tmp_path / name, cpu=True) for name in "ab")
    assert losses(first) == losses(again)


def _train_in_processes(folder, batch_size):
    torch.set_num_threads(1)
    # The term of the tokens is a mean over those kept in a process, of which there are not equally many in each.
    protocol = dataclasses.replace(PLAIN, batch_size=batch_size, accumulate=2, ema=0.9, token_weight=0.0)
    data = few_digits(32, augmentation=STILL)
    reduction = Reduction("dynamicvit", (1.0,), at=(3,))
    torch.manual_seed(1)  # of the teacher
    train(data, BACKBONE, protocol, folder, reduction=reduction, teacher=BACKBONE.build(10), cpu=True)


def test_two_processes_are_one_with_a_double_batch(tmp_path, monkeypatch):
    """DynamicViT's own layers and hidden outputs included; its noise is switched off."""
    from fastreduce.reducers.dynamicvit import DynamicViT

    monkeypatch.setattr(DynamicViT, "noise", lambda self, like: torch.ones_like(like))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # accelerate would set as many as there are cores
    debug_launcher(_train_in_processes, (str(tmp_path / "two"), 8), num_processes=2)
    _train_in_processes(str(tmp_path / "one"), 16)
    one, two = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("one", "two"))
    assert (one["description"]["processes"], two["description"]["processes"]) == (1, 2)
    for ours, theirs in zip(one["epochs"], two["epochs"], strict=True):
        assert len(ours["losses"]) == 2
        assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-5)
        assert theirs["lr"] == ours["lr"]
        # 21 images in batches of 8 for two processes: the last ones are seen twice, and counted once
        assert theirs["accuracy"] == ours["accuracy"]
    assert one["epochs"][0]["losses"][0] > one["epochs"][-1]["losses"][-1]


@pytest.mark.parametrize("multi_label", [False, True])
def test_loss_of_the_first_batch(tmp_path, multi_label):
    data = few_digits(16, multi_label, STILL)
    protocol = dataclasses.replace(PLAIN, epochs=1, batch_size=16, label_smoothing=0.1)
    training = train(data, BACKBONE, protocol, tmp_path, cpu=True)
    torch.manual_seed(protocol.seed)
    model = BACKBONE.build(10)
    images, labels = map(torch.stack, zip(*(data.train[i] for i in range(16)), strict=True))
    logits = model(images)
    if multi_label:
        p, negative = logits.sigmoid(), (1.05 - logits.sigmoid()).clamp(max=1)
        each = labels * p.log() + (1 - labels) * (1 - negative) ** 4 * negative.log()
        expected = -each.sum() / 16  # timm before 1.0.20 had the sum
        assert training.epochs[0].losses[0] in (pytest.approx(expected.item()), pytest.approx(16 * expected.item()))
        assert training.epochs[0].accuracy.keys() == {"map"}
    else:
        expected = LabelSmoothingCrossEntropy(0.1)(logits, labels)
        assert training.epochs[0].losses[0] == pytest.approx(expected.item())
        assert training.epochs[0].accuracy.keys() == {"top1", "top5"}


def _first_loss(folder, protocol, backbone=BACKBONE, **arguments):
    data = few_digits(8, augmentation=STILL)
    return train(data, backbone, protocol, folder, cpu=True, **arguments).epochs[0].losses[0]


def test_distillation(tmp_path):
    protocol = dataclasses.replace(PLAIN, epochs=1)
    torch.manual_seed(5)
    teacher = BACKBONE.build(10)
    nn.init.normal_(teacher.head.weight)
    base = _first_loss(tmp_path / "base", protocol)
    save_file(teacher.state_dict(), tmp_path / "start.safetensors")
    started = dataclasses.replace(BACKBONE, checkpoint=tmp_path / "start.safetensors")
    alone = _first_loss(tmp_path / "alone", protocol, started)
    own = dataclasses.replace(protocol, distillation="soft", distillation_weight=0.25)
    assert _first_loss(tmp_path / "own", own, started) == pytest.approx(0.75 * alone)  # it starts where its teacher is
    with pytest.raises(ValueError, match="hard distillation needs a teacher, and the backbone has no head"):
        _first_loss(tmp_path / "none", dataclasses.replace(protocol, distillation="hard"))
    torch.manual_seed(protocol.seed)
    student, data = BACKBONE.build(10), few_digits(8, augmentation=STILL)
    images = torch.stack([data.train[i][0] for i in range(8)])
    logits, wanted = student(images), teacher(images)
    cold = (wanted / 2).softmax(1)
    terms = {
        "soft": 4 * (cold * (cold.log() - (logits / 2).log_softmax(1))).sum(1).mean(),
        "hard": torch.nn.functional.nll_loss(logits.log_softmax(1), wanted.argmax(1)),
    }
    for form, term in terms.items():
        changed = dataclasses.replace(protocol, distillation=form, distillation_weight=0.25, temperature=2.0)
        found = _first_loss(tmp_path / form, changed, teacher=teacher)
        assert found == pytest.approx(0.75 * base + 0.25 * term.item(), rel=1e-4)


def test_dynamicvit_learns_from_the_backbone(tmp_path):
    protocol = dataclasses.replace(PLAIN, epochs=1)
    reduction = Reduction("dynamicvit", 0.5)
    with pytest.raises(ValueError, match="the backbone has no head for the classes of digits: give one"):
        _first_loss(tmp_path, protocol, reduction=reduction)
    save_file(BACKBONE.build(10).state_dict(), tmp_path / "weights.safetensors")
    backbone = dataclasses.replace(BACKBONE, checkpoint=tmp_path / "weights.safetensors")
    assert backbone.knows(10)
    assert not backbone.knows(11)
    terms = {
        name: _first_loss(tmp_path / name, dataclasses.replace(protocol, **changes), backbone, reduction=reduction)
        for name, changes in {
            "all": {},
            "ratio": {"logit_weight": 0.0, "token_weight": 0.0},
            "base": {"ratio_weight": 0.0, "logit_weight": 0.0, "token_weight": 0.0},
            "logits": {"ratio_weight": 0.0, "token_weight": 0.0},
            "tokens": {"ratio_weight": 0.0, "logit_weight": 0.0},
        }.items()
    }
    parts = {name: terms[name] - terms["base"] for name in ("ratio", "logits", "tokens")}
    assert all(part > 0 for part in parts.values())
    assert terms["all"] - terms["base"] == pytest.approx(sum(parts.values()), rel=1e-4)


def test_groups_and_rates(tmp_path):
    model = Reduction("sit", 0.5).apply(BACKBONE.build(10))
    groups = parameter_groups(model, 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: (g["new"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == len(names) == sum(len(group["params"]) for group in groups)
    assert found["pos_embed"] == (True, 0.0)
    assert found["cls_token"] == (False, 0.0)
    assert found["patch_embed.proj.weight"] == (True, 0.05)
    assert found["head.bias"] == (True, 0.0)
    assert found["reducers.cluster_layers.0.weight.1.weight"] == (True, 0.05)
    assert found["blocks.0.attn.qkv.weight"] == (False, 0.05)
    assert found["blocks.0.norm1.weight"] == (False, 0.0)

    torch.manual_seed(PLAIN.seed)
    before = BACKBONE.build(10).state_dict()
    frozen = dataclasses.replace(PLAIN, epochs=1, warmup_epochs=0, frozen_epochs=1, accumulate=2, ema=0.25)
    training = train(few_digits(16), BACKBONE, frozen, tmp_path / "frozen", cpu=True)
    after, average = load_file(training.weights), load_file(training.ema_weights)
    for name, value in before.items():
        new = name.startswith(("head", "pos_embed", "patch_embed"))
        assert torch.equal(after[name], value) != new, name
        torch.testing.assert_close(average[name], 0.25 * value + 0.75 * after[name])


def test_rates_follow_warm_up_and_cosine(tmp_path):
    protocol = dataclasses.replace(PLAIN, epochs=4, warmup_epochs=2, accumulate=2, lr=1.024, min_lr=0.001)
    epochs = train(few_digits(32), BACKBONE, protocol, tmp_path, cpu=True, validate_every=0).epochs
    highest = 1.024 * 16 / 1024
    # two updates in an epoch; the line from warmup_lr reaches its end with update 4
    assert epochs[0].lr == pytest.approx(1e-6 + (highest - 1e-6) / 4)
    assert epochs[1].lr == pytest.approx(1e-6 + (highest - 1e-6) * 3 / 4)
    assert epochs[3].lr == pytest.approx(0.001 + (highest - 0.001) * (1 + math.cos(math.pi * 7 / 8)) / 2)
    assert [bool(epoch.accuracy) for epoch in epochs] == [False, False, False, True]


def test_a_backbone_gets_a_new_head_for_other_classes(tmp_path):
    trained = train(few_digits(8), BACKBONE, dataclasses.replace(PLAIN, epochs=1), tmp_path, cpu=True)
    again = dataclasses.replace(BACKBONE, checkpoint=trained.weights)
    held = load_file(trained.weights)
    moved = dataclasses.replace(BACKBONE, checkpoint=tmp_path / "moved.safetensors")
    moved.checkpoint.write_bytes(trained.weights.read_bytes())
    short = dataclasses.replace(PLAIN, epochs=1)
    first = train(few_digits(8), again, short, tmp_path / "again", cpu=True)
    assert train(few_digits(8), moved, short, tmp_path / "again", cpu=True) == first
    assert torch.equal(again.build(10).head.weight, held["head.weight"])
    other = again.build(3)
    assert other.head.weight.shape == (3, 16)
    assert torch.equal(other.blocks[0].attn.qkv.weight, held["blocks.0.attn.qkv.weight"])
    with pytest.raises(ValueError, match="does not fit"):
        dataclasses.replace(again, options={**OPTIONS, "embed_dim": 32}).build(10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 7}, "batch_size must be even, got 7"),
        ({"epochs": -1}, "epochs must not be negative, got -1"),
        ({"warmup_epochs": 31}, r"between 0 and epochs \(30\), got 31"),
        ({"ema": 1.0}, r"ema must lie in \[0, 1\), got 1.0"),
        ({"clip_norm": 0.0}, "clip_norm must be positive, got 0.0"),
        ({"seed": -1}, r"seed must be from 0 to 2\^63 - 1, got -1"),
        ({"seed": 2**63}, "seed must be from 0"),
        ({"lr": math.inf}, "lr must be finite, got inf"),
        ({"temperature": math.nan}, "temperature must be finite, got nan"),
        ({"asymmetry": (1.0, math.nan, 0.0)}, "asymmetry must be finite"),
        ({"asymmetry": (1.0, -1.0, 0.0)}, "asymmetry must be three numbers that are not negative"),
        ({"workers": -1}, "workers must not be negative, got -1"),
        ({"distillation_weight": 2.0}, "distillation_weight must lie between 0 and 1, got 2.0"),
        ({"distillation": "warm"}, "distillation must be one of None, 'soft', 'hard', got 'warm'"),
    ],
)
def test_protocols_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**changes)


def test_a_data_set_smaller_than_a_batch(tmp_path):
    with pytest.raises(ValueError, match="digits has 4 training images, fewer than a batch of 8"):
        train(few_digits(4), BACKBONE, PLAIN, tmp_path, cpu=True)


@pytest.mark.parametrize("name", ["validate_every", "checkpoint_every"])
def test_negative_numbers_of_epochs(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must not be negative, got -1"):
        train(few_digits(), BACKBONE, PLAIN, tmp_path / "new", cpu=True, **{name: -1})
    assert not (tmp_path / "new").exists()


def test_images_of_another_size(tmp_path):
    large = dataclasses.replace(BACKBONE, options={**OPTIONS, "img_size": 32})
    with pytest.raises(ValueError, match=r"takes images of \(32, 32\) pixels, digits has \(16, 16\)"):
        train(few_digits(), large, PLAIN, tmp_path, cpu=True)


def test_evaluation():
    data = few_digits()
    torch.manual_seed(0)
    model = BACKBONE.build(10)
    nn.init.normal_(model.head.weight)
    images, labels = map(torch.stack, zip(*(data.val[i] for i in range(len(data.val))), strict=True))
    best = model(images).topk(5).indices
    found = evaluate(model, data, batch_size=8, rounds=3)
    assert found.accuracy["top1"] == pytest.approx(100 * (best[:, 0] == labels).double().mean().item())
    assert found.accuracy["top5"] == pytest.approx(100 * (best == labels[:, None]).any(1).double().mean().item())
    assert measure_accuracy(model, data, accelerator=make_accelerator(PLAIN, cpu=True), batch_size=8) == found.accuracy
    assert (found.images, found.batch_size, found.tokens) == (21, 8, [])
    assert found.images_per_second_quartiles[0] <= found.images_per_second <= found.images_per_second_quartiles[1]
    json.dumps(dataclasses.asdict(found))
    for method, tokens in (("topk", [8, 4, 2]), ("evit", [9, 5, 3]), ("ats", None)):
        if tokens is None:  # attention so sharp that images keep fewer tokens than ATS allows them
            for block in model.blocks:
                nn.init.normal_(block.attn.qkv.weight)
        fastreduce.patch(model, method, keep_rate=0.5)
        reduced = evaluate(model, data, batch_size=8, rounds=3)
        assert reduced.gmacs < 0.8 * found.gmacs
        if tokens is None:
            with fastreduce.record(model) as seen:
                model(images)
            tokens = [(stage.kept >= 0).sum(1).double().mean().item() for stage in seen.stages]
            most = fastreduce.reduced_counts(model)
            assert all(0 < mean <= count for mean, count in zip(tokens, most, strict=True))
            assert any(mean < count - 0.01 for mean, count in zip(tokens, most, strict=True))
        assert reduced.tokens == pytest.approx(tokens)
        fastreduce.unpatch(model)


def test_evaluation_of_several_labels():
    data = few_digits(multi_label=True)
    model = BACKBONE.build(10)
    nn.init.normal_(model.head.weight)
    images, labels = map(torch.stack, zip(*(data.val[i] for i in range(len(data.val))), strict=True))
    expected = mean_average_precision(model(images).detach().numpy(), labels.numpy())
    assert evaluate(model, data, batch_size=8, rounds=3).accuracy == {"map": pytest.approx(expected)}


@pytest.fixture(autouse=True)
def _forget_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
