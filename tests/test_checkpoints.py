"""Weights from files: which set is taken; what is refused, changing nothing; and that nothing of a file is run."""

import argparse
import collections
import copy
import datetime
import functools
import importlib
import io
import json
import logging
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import threading
import warnings
import zipfile

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import fastreduce
from fastreduce._files import check_weights_file
from fastreduce.checkpoints import read_checkpoint, read_weights, write_weights

from .helpers.inputs import rewrite

SMALL = {"img_size": 32, "patch_size": 16, "embed_dim": 12, "depth": 2, "num_heads": 1, "num_classes": 3}


def build(seed=0):
    torch.manual_seed(seed)
    return timm.models.VisionTransformer(**SMALL).eval()


RAW, AVERAGED = build(1).state_dict(), build(2).state_dict()


def allowed():
    """Return what may be read, less what another library allows when something imports it meanwhile."""
    classes = torch.serialization.get_safe_globals()
    return {one for one in classes if not getattr(one, "__module__", "").startswith("torchao")}


ALLOWED = allowed()  # torch has some of its own


def is_same(model, state):
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[key], value) for key, value in state.items())


def refused(checkpoint, *words, model=None, error=ValueError, **arguments):
    """Load into a model, which must fail with one line of all these words and leave the model as it was."""
    model = build() if model is None else model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error) as raised:
        fastreduce.load_official(model, checkpoint, **arguments)
    message = str(raised.value)
    assert all(word in message for word in words), message
    assert len(message.splitlines()) == 1
    assert "weights_only" not in message
    assert "\033" not in message
    assert is_same(model, before)
    return message


class Config:
    def __init__(self):
        self.rate = 0.7


class Slots:
    __slots__ = ("rate",)


def everything_harmless():
    """Return what training scripts put beside their weights."""
    config, slots = Config(), Slots()
    config.self, slots.rate = config, 0.5
    return {
        "epoch": 3,
        "args": argparse.Namespace(
            keep_rate=[0.7], output_dir=pathlib.Path("/tmp/x"), when=datetime.datetime(2023, 1, 1)
        ),
        "best": np.float64(79.5),
        "confusion": np.eye(3),
        "names": np.array(["a", None], dtype=object),
        "counts": collections.defaultdict(int, a=3),
        "queue": collections.deque([1, 2]),
        "config": config,
        "slots": slots,
        "norm": functools.partial(torch.nn.LayerNorm, eps=1e-6),
        "version": torch.__version__,
        "optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(3))], 0.1, momentum=0.9).state_dict(),
        "window": slice(1, 2),
        "set": {frozenset([1])},
        "complex": 1j,
        "bytes": b"x",
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_what_lies_beside_the_weights_is_not_read(tmp_path, zipped):
    path = tmp_path / "best_checkpoint.pth"
    content = {"model": RAW, **everything_harmless()}
    if not zipped:
        del content["norm"]  # these files hold the source of a module's class, which torch does not read
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert is_same(fastreduce.load_official(build(), path), RAW)
    found = read_weights(path)
    assert found.keys() == content.keys()
    for name in ("args", "config", "slots", "best"):  # nobody's class was made use of
        assert type(found[name]) not in (argparse.Namespace, Config, Slots, np.float64)
    assert not vars(found["config"])
    assert allowed() == ALLOWED


def test_no_module_is_imported_for_a_file(tmp_path, monkeypatch):
    """A class that is not installed here is no obstacle, and one that is, is not imported."""
    (tmp_path / "theirs.py").write_text("class Config:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    theirs = importlib.import_module("theirs")
    torch.save({"model": {"a": torch.ones(2)}, "c": theirs.Config()}, tmp_path / "a.pth")
    monkeypatch.delitem(sys.modules, "theirs")
    assert read_checkpoint(tmp_path / "a.pth").state["a"].tolist() == [1, 1]
    assert "theirs" not in sys.modules
    (tmp_path / "theirs.py").unlink()
    assert read_checkpoint(tmp_path / "a.pth").state["a"].tolist() == [1, 1]


class Runs:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def touch(path):
    pathlib.Path(path).write_text("ran")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("what", ["system", "eval", "exec", "open", "own", "popen", "import", "partial", "getattr"])
def test_nothing_in_a_file_is_run(tmp_path, what, zipped):
    marker = str(tmp_path / "ran")
    hostile = {
        "system": Runs(os.system, f"touch {marker}"),
        "eval": Runs(eval, f"open({marker!r}, 'w')"),
        "exec": Runs(exec, f"open({marker!r}, 'w')"),
        "open": Runs(open, marker, "w"),
        "own": Runs(touch, marker),
        "popen": Runs(subprocess.Popen, ["touch", marker]),
        "import": Runs(__import__, "this"),
        "partial": Runs(functools.partial(touch, marker)),
        "getattr": Runs(getattr, pathlib.Path(marker), "touch"),
    }[what]
    path = tmp_path / "a.pth"
    sys.modules.pop("this", None)
    torch.save({"model": RAW, "x": hostile}, path, _use_new_zipfile_serialization=zipped)
    if what == "partial":  # its call is one of a plain value; the value is empty, and not called
        with pytest.raises(ValueError, match=r"a\.pth"):
            fastreduce.load_official(build(), path)
    else:
        refused(path, "a.pth", "holds more than weights")
    assert not os.path.exists(marker)
    assert "this" not in sys.modules


def test_threads_that_read_do_not_disturb_one_another(tmp_path):
    """torch keeps what is allowed in one place; a reader that ends must not take it from another."""
    paths = [tmp_path / f"{index}.pth" for index in range(2)]
    for path in paths:
        torch.save({"model": RAW, **everything_harmless()}, path)
    errors = []

    def read(path):
        try:
            for _ in range(10):
                read_weights(path)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(path,)) for path in paths * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert allowed() == ALLOWED


def test_what_the_user_allows_stays_allowed(tmp_path):
    torch.save({"model": RAW, "config": Config()}, tmp_path / "a.pth")
    with torch.serialization.safe_globals([Config]):
        assert isinstance(read_weights(tmp_path / "a.pth")["config"], Config)
        assert allowed() == ALLOWED | {Config}


EMA_BEST = [True, np.bool_(True), torch.tensor(True), 1, np.float64(1.0)]


@pytest.mark.parametrize("flag", [*EMA_BEST, False, np.bool_(False), torch.tensor(False), 0, None], ids=repr)
@pytest.mark.parametrize("saved", [True, False])
def test_the_set_that_the_paper_evaluates_is_taken(tmp_path, flag, saved):
    checkpoint = {"model": RAW, "model_ema": AVERAGED, "ema_best": flag, "args": argparse.Namespace()}
    if saved:
        torch.save(checkpoint, tmp_path / "a.pth")
    source = tmp_path / "a.pth" if saved else checkpoint
    wanted = AVERAGED if any(flag is known for known in EMA_BEST) else RAW
    assert is_same(fastreduce.load_official(build(), source), wanted)
    assert is_same(fastreduce.load_official(build(), source, weights="ema"), AVERAGED)
    assert is_same(fastreduce.load_official(build(), source, weights="model"), RAW)
    assert is_same(fastreduce.load_official(build(), source, weights="model_ema"), AVERAGED)


@pytest.mark.parametrize(
    ("checkpoint", "weights", "wanted", "taken"),
    [
        (RAW, "auto", RAW, ""),
        (RAW, "model", RAW, ""),
        ({"state_dict": RAW, "state_dict_ema": AVERAGED}, "auto", RAW, "state_dict"),
        ({"state_dict": RAW, "state_dict_ema": AVERAGED}, "ema", AVERAGED, "state_dict_ema"),
        ({"state_dict_ema": AVERAGED}, "auto", AVERAGED, "state_dict_ema"),
        ({"model_ema": AVERAGED, "ema_best": False}, "auto", AVERAGED, "model_ema"),
        ({"module": RAW, "optimizer": {"state": {0: {"m": torch.ones(2)}}}}, "auto", RAW, "module"),
        ({"model": {"state_dict": RAW, "epoch": 3}}, "auto", RAW, "model/state_dict"),
        ({"backbone": RAW, "epoch": 3, "loss": 0.1}, "auto", RAW, "backbone"),
        ({"student": RAW, "teacher": AVERAGED}, "teacher", AVERAGED, "teacher"),
    ],
)
def test_sets(checkpoint, weights, wanted, taken, caplog):
    with caplog.at_level(logging.INFO, "fastreduce"):
        assert is_same(fastreduce.load_official(build(), checkpoint, weights=weights), wanted)
    assert read_checkpoint(checkpoint, weights).taken == taken
    assert not taken or repr(taken) in caplog.text
    ambiguous = weights == "auto" and {"state_dict", "state_dict_ema"} <= checkpoint.keys()
    assert ambiguous == any(record.levelno == logging.WARNING for record in caplog.records)


@pytest.mark.parametrize(
    ("checkpoint", "weights", "words"),
    [
        ({"model": RAW}, "ema", ["got 'ema'", "it holds model"]),
        ({"model": RAW, "model_ema": AVERAGED}, "best", ["'auto', 'model', 'ema'", "got 'best'", "model, model_ema"]),
        (RAW, "ema", ["weights='ema'", "one plain set"]),
        ({"model": RAW, "ema_best": True}, "auto", ["ema_best", "holds only model", "weights='model'"]),
        ({"model": RAW, "model_ema": AVERAGED, "ema_best": "x"}, "auto", ["'ema_best'", "got 'x'"]),
        ({"model": RAW, "model_ema": AVERAGED, "ema_best": torch.ones(2)}, "auto", ["'ema_best'"]),
        ({"student": RAW, "teacher": AVERAGED}, "auto", ["several sets", "'student' or 'teacher'"]),
        ({"epoch": 3, "args": argparse.Namespace()}, "auto", ["no weights", "epoch (an int), args (a Namespace)"]),
        ({"model": build()}, "auto", ["no weights", "model (a VisionTransformer)"]),
    ],
)
def test_sets_that_are_not_there(checkpoint, weights, words):
    refused(checkpoint, *words, weights=weights)


def test_wrong_arguments():
    for wrong in (3, None, [RAW], io.BytesIO()):
        refused(wrong, "path or a dict", error=TypeError)
    refused(RAW, "got 3", weights=3, error=TypeError)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got a str"):
        fastreduce.load_official("deit", RAW)


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "module.module._orig_mod.", "model.module."],
)
def test_prefixes_of_wrappers(prefix):
    assert is_same(fastreduce.load_official(build(), {f"{prefix}{key}": value for key, value in RAW.items()}), RAW)
    inside = {key.replace("blocks.1.", "blocks.1._orig_mod."): value for key, value in RAW.items()}
    assert is_same(fastreduce.load_official(build(), {"state_dict": inside}), RAW)


def test_wrapped_models_are_read_and_written():
    averaged = torch.optim.swa_utils.AveragedModel(build(1))
    assert is_same(fastreduce.load_official(build(), averaged.state_dict()), RAW)
    parallel = nn.DataParallel(build())
    assert fastreduce.load_official(parallel, RAW) is parallel
    assert is_same(parallel.module, RAW)
    compiled = torch.compile(build())
    fastreduce.load_official(compiled, parallel.state_dict())
    assert is_same(compiled._orig_mod, RAW)


def test_a_methods_own_layers_come_under_reducers():
    model = fastreduce.patch(build(), "dynamicvit", keep_rate=0.5, at=(1,))
    wanted = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    official = {f"module.{key.removeprefix('reducers.')}": value for key, value in wanted.items()}
    assert any(key.startswith("module.score_predictor.") for key in official)
    assert is_same(fastreduce.load_official(model, {"model": official}), wanted)
    assert is_same(fastreduce.load_official(model, wanted), wanted)


class Wrapped(torch.Tensor):
    pass


def quantised(value):
    return torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value.to_sparse(), ["sparse"]),
        (lambda value: value.to_sparse_csr(), ["sparse"]),
        (lambda value: value.to("meta"), ["meta device"]),
        (quantised, ["quantised", "qint8"]),
        (lambda value: value.to(torch.complex64), ["complex", "floating-point"]),
        (lambda value: value.to(torch.float8_e4m3fn), ["float8_e4m3fn"]),
        (lambda value: value.to(torch.int64), ["integer (torch.int64)", "floating-point (torch.float32)"]),
        (lambda value: value.to(torch.uint8), ["integer"]),
        (lambda value: value > 0, ["torch.bool"]),
        (lambda value: value.as_subclass(Wrapped), ["a Wrapped, not a plain tensor"]),
        (lambda value: value.numpy(), ["a ndarray, not a tensor"]),
        (lambda value: value.tolist(), ["a list, not a tensor"]),
        (lambda value: None, ["a NoneType"]),
        (lambda value: value.T, ["(12, 3)", "(3, 12)"]),
        (lambda value: value.flatten(), ["(36,)", "(3, 12)"]),
        (lambda value: value[None], ["(1, 3, 12)"]),
        (lambda value: torch.full_like(value, 1e300, dtype=torch.float64), ["too large for torch.float32", "1e+300"]),
        (lambda value: torch.nested.nested_tensor([value[0], value[1]]), ["nested"]),
        (lambda value: nn.parameter.UninitializedParameter(), ["UninitializedParameter"]),
    ],
)
def test_a_value_that_does_not_fit_changes_nothing(change, words):
    state = {key: value + 1 for key, value in RAW.items()}
    state["head.weight"] = change(RAW["head.weight"])
    refused(state, "head.weight is ", *words)


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.double(),
        lambda value: value.bfloat16(),
        lambda value: value.half(),
        lambda value: nn.Parameter(value),
        lambda value: value.T.contiguous().T,
        lambda value: value[:1].expand(3, 12),
        lambda value: torch.full_like(value, float("nan")),
        lambda value: torch.full_like(value, -float("inf")),
        lambda value: torch.stack([value, value], -1)[..., 0],
        lambda value: value.requires_grad_() * 2,
    ],
)
def test_a_value_that_fits_is_taken(change):
    value = change(RAW["head.weight"].clone())
    model = fastreduce.load_official(build(), {**RAW, "head.weight": value})
    torch.testing.assert_close(model.head.weight.data, value.detach().float(), rtol=0, atol=0, equal_nan=True)
    assert model.head.weight.requires_grad
    assert model.head.weight.is_leaf


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.update({3: torch.zeros(1)}), ["must be strings, got 3"]),
        (lambda state: state.update({b"head.bias": torch.zeros(3)}), ["must be strings, got b'head.bias'"]),
        (lambda state: state.update({("head", "bias"): torch.zeros(3)}), ["must be strings"]),
        (lambda state: state.update({"module.head.bias": torch.zeros(3)}), ["head.bias twice", "'module.head.bias'"]),
        (
            lambda state: state.update({"score_predictor.0.x": torch.zeros(3)}),
            ["unexpected reducers.score_predictor.0.x"],
        ),
        (lambda state: state.pop("head.bias"), ["missing head.bias"]),
        (lambda state: state.update({"a\n\x1b[1mb\u2028\ud800": torch.zeros(3)}), [r"a\n\x1b[1mb\u2028\ud800"]),
        (
            lambda state: state.update({"head.bais": state.pop("head.bias")}),
            ["missing head.bias; unexpected head.bais"],
        ),
    ],
)
def test_keys_that_do_not_fit_change_nothing(change, words):
    state = {key: value + 1 for key, value in RAW.items()}
    change(state)
    refused(state, *words)
    refused({"model": state}, *words)


def test_half_models_take_what_they_can_hold():
    model = build().half()
    fastreduce.load_official(model, RAW)
    assert torch.equal(model.head.weight, RAW["head.weight"].half())
    refused({**RAW, "head.weight": torch.full((3, 12), 1e6)}, "too large for torch.float16", "1e+06", model=model)


def test_models_that_cannot_be_loaded_are_named():
    meta = build().to("meta")
    with pytest.raises(ValueError, match="cls_token of the model is on the meta device"):
        fastreduce.load_official(meta, RAW)
    with torch.inference_mode():
        model = build()
    refused(RAW, "of the model is a tensor of inference mode", model=model)
    model = torch.ao.quantization.quantize_dynamic(build(), {nn.Linear}, torch.qint8)
    with pytest.raises(ValueError, match="of the model is "):
        fastreduce.load_official(model, RAW)
    model = build()
    torch.nn.utils.parametrizations.weight_norm(model.head)
    refused(RAW, "missing head.parametrizations.weight.original0", "unexpected head.weight", model=model)
    model = build()
    model.head.weight = nn.Parameter(model.head.weight.data.as_subclass(Wrapped))
    refused({key: value + 1 for key, value in RAW.items()}, "head.weight of the model is a Wrapped", model=model)


def test_tied_tensors_must_agree():
    def tied():
        model = build()
        model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
        return model

    refused({key: value + 1 for key, value in RAW.items()}, "blocks.0.mlp.fc1.weight", "one tensor", model=tied())
    state = {**RAW, "blocks.1.mlp.fc1.weight": RAW["blocks.0.mlp.fc1.weight"]}
    assert is_same(fastreduce.load_official(tied(), state), state)


def test_a_state_of_the_models_own_memory():
    """Two weights that change places: each is read before it is overwritten."""
    model = build()
    before = copy.deepcopy(model.state_dict())
    state = dict(model.state_dict())
    one, other = (f"blocks.{index}.mlp.fc1.weight" for index in range(2))
    state[one], state[other] = state[other], state[one]
    fastreduce.load_official(model, state)
    assert torch.equal(model.state_dict()[one], before[other])
    assert torch.equal(model.state_dict()[other], before[one])


def test_a_load_that_fails_midway_is_undone():
    state = {key: value + 1 for key, value in RAW.items()}
    for error in (RuntimeError("disk\non fire"), KeyboardInterrupt()):
        model = build()

        def fail(*_, error=error):
            raise error

        model.norm.register_load_state_dict_pre_hook(fail)  # comes after the blocks
        kind = ValueError if isinstance(error, RuntimeError) else KeyboardInterrupt
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(kind, match="cannot be loaded into VisionTransformer: " if kind is ValueError else None):
            fastreduce.load_official(model, state)
        assert is_same(model, before)


def header_of(**entries):
    words = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": value} for name, value in entries.items()})
    return struct.pack("<Q", len(words)) + words.encode()


def archive(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name, content in members.items():
            made.writestr(f"archive/{name.replace('_', '.')}", content)
    return file.getvalue()


def picture():
    file = io.BytesIO()
    Image.new("RGB", (9, 7)).save(file, "jpeg")
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.pth", b"", ["not a .safetensors or torch.save file of weights"]),
        ("a.safetensors", b"", ["not a .safetensors or torch.save file of weights"]),
        ("photo.jpg", picture(), ["not a .safetensors or torch.save file of weights"]),
        ("photo.pth", picture(), ["not a .safetensors or torch.save file of weights"]),
        ("photo.safetensors", picture(), ["not a .safetensors or torch.save file of weights"]),
        ("a.json", b'{"a": 1}', ["not a .safetensors or torch.save file of weights"]),
        ("a.pth", b"hello, this is text", ["not a .safetensors or torch.save file of weights"]),
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ["Git LFS"]),
        ("a.json", json.dumps({"metadata": {}, "weight_map": {"a": "b"}}).encode(), ["index of weights in several"]),
        ("model-00001-of-00003.safetensors", b"", ["part 1 of 3 files"]),
        ("a.zip", archive(readme_txt="x"), ["another zip archive"]),
        ("a.pt", archive(data_pkl="x", constants_pkl="x"), ["TorchScript"]),
        ("a.pth", archive(data_pkl="x"), ["damaged or no file of weights"]),
        ("a.pth", archive(data_pkl="x")[:60], ["damaged or incomplete"]),
        ("a.pth", pickle.dumps({"a": 1}), ["damaged or no file of weights"]),
        ("a.safetensors", header_of(a=[0, 400]), ["damaged or no file of weights"]),
        ("a.safetensors", struct.pack("<Q", 200_000) + b"{" * 200_000, ["damaged or no file of weights"]),
    ],
    ids=lambda value: "bytes" if isinstance(value, bytes) else None,  # an archive's hold the time of day
)
def test_files_that_hold_no_weights(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    refused(path, str(path), *words)
    refused(str(path), str(path), *words)


def test_an_entry_that_occurs_twice_is_refused(tmp_path):
    entry = '"head.bias": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    words = f"{{{entry}, {entry}}}".encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(words)) + words + b"\0" * 4)
    refused(tmp_path / "a.safetensors", "damaged")


def test_content_decides_and_not_the_name(tmp_path):
    save_file(RAW, tmp_path / "weights.bin", {"format": "pt", "note": "é"})
    torch.save(RAW, tmp_path / "weights.safetensors")
    for name in ("weights.bin", "weights.safetensors"):
        assert is_same(fastreduce.load_official(build(), tmp_path / name), RAW)


def test_folders_and_paths_that_are_not_there(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(tmp_path, "is a folder; give a file, such as model.safetensors")
    refused(tmp_path / "none.pth", "none.pth", error=FileNotFoundError)


def test_other_things_than_dicts(tmp_path):
    for content, words in (
        ([1, 2], "a list"),
        (torch.zeros(3), "one tensor"),
        (build(), "a timm.models.vision_transformer.VisionTransformer"),
        ({"model": pytest.approx}, ".approx)"),
    ):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=r"a\.pth holds") as raised:
            read_checkpoint(tmp_path / "a.pth")
        if not isinstance(content, nn.Module):
            assert words in str(raised.value)


def test_the_check_needs_no_torch(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(picture())
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pth")
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    assert check_weights_file(tmp_path / "a.pth") == "torch"
    assert check_weights_file(tmp_path / "a.safetensors") == "safetensors"
    script = (
        "import sys\nfrom fastreduce._files import check_weights_file\n"
        f"try:\n    check_weights_file({str(tmp_path / 'photo.jpg')!r})\n"
        "except ValueError as error:\n    print(error, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.endswith("photo.jpg is not a .safetensors or torch.save file of weights False\n"), done.stderr


def small_files(tmp_path):
    state = {"a": torch.ones(2), "b": torch.zeros(2, 2, dtype=torch.int64)}
    torch.save({"model": state, "args": argparse.Namespace(x=1)}, tmp_path / "a.pth")
    torch.save(
        {"model": state, "args": argparse.Namespace(x=1)}, tmp_path / "b.pth", _use_new_zipfile_serialization=False
    )
    save_file(state, tmp_path / "c.safetensors")
    return [tmp_path / name for name in ("a.pth", "b.pth", "c.safetensors")]


def is_refused(path, content):
    """Return whether reading ends in one line; anything but that and success is an error, a library's warning too."""
    rewrite(path, content)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            read_checkpoint(path)
        except ValueError as error:
            return len(str(error).splitlines()) == 1 and not seen
    assert not seen
    return False


def test_a_file_that_is_cut_is_refused_wherever(tmp_path):
    for path in small_files(tmp_path):
        whole = path.read_bytes()
        for end in range(0, len(whole), 1 if len(whole) < 500 else 7):
            assert is_refused(tmp_path / "cut", whole[:end]), f"{path.name} cut at {end}"


@given(st.sampled_from("abc"), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=5))
@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_damaged_file_is_read_or_refused(tmp_path, which, changes):
    files = {path.name[0]: path for path in small_files(tmp_path)}
    content = bytearray(files[which].read_bytes())
    for place, value in changes:
        content[int(place * len(content))] = value
    is_refused(tmp_path / "damaged", bytes(content))


def test_weights_are_written_whole_for_everybody_to_read(tmp_path):
    before = os.umask(0o022)
    try:
        path = write_weights(tmp_path / "model.safetensors", build(1).state_dict())
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644
    assert is_same(fastreduce.load_official(build(), path), RAW)
    for place in ("/dev/full", tmp_path / "none" / "a.safetensors"):
        with pytest.raises(OSError, match=str(place)):
            write_weights(place, RAW)
