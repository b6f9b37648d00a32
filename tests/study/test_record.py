"""Recordings of tiny models: the same as what fastreduce.record shows image by image, in one small file."""

import copy
import json
import math
import random
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

import fastreduce
from bench.proof.tiny import build, images, randomize
from fastreduce.study.comparison import compare, token_statistics
from fastreduce.study.record import ColumnWriter, Run, best_classes, feature_blocks, open_recording, record_images
from tests.helpers.inputs import rewrite, seeded

BATCHES = (4, 3)


def data(model, classes=7):
    pictures = images(model, sum(BATCHES))
    target = torch.randint(0, classes, (sum(BATCHES),), generator=seeded(5))
    return pictures, target


def recorded(model, path, **arguments):
    pictures, target = data(model)
    batches = list(zip(pictures.split(BATCHES), target.split(BATCHES), strict=True))
    return record_images(model, batches, path, dataset="made up", backbone="tiny", **arguments)


def reduced(method, rate=0.5, **options):
    model = fastreduce.patch(build(), method, keep_rate=rate, at=(1, 2), **options)
    if hasattr(model, "reducers"):
        randomize(model.reducers, seed=7)
    return model.train()


@pytest.mark.parametrize(
    ("method", "columns"),
    [
        *[(method, ("kept",)) for method in ("topk", "evit", "ats")],
        *[("kmedoids", ("kept", "slots")), ("tome", ("slots",)), ("sit", ("slots",))],
    ],
)
def test_every_image_is_recorded(method, columns, tmp_path):
    model = reduced(method)
    path = tmp_path / "run.safetensors"
    told = []
    recording = recorded(model, path, keep_rate=0.5, feature_dtype="float16", progress=told.append)
    assert model.training
    assert told == [4, 7]
    assert list(tmp_path.iterdir()) == [path]
    assert (recording.images, recording.blocks, recording.grid, recording.depth) == (7, (1, 2), (4, 4), 4)
    assert {name for name in ("kept", "slots") if getattr(recording, name)} == {*columns}
    pictures, target = data(model)
    model.eval()
    with fastreduce.record(model) as seen, torch.no_grad():
        logits = model(pictures)
    for stage in seen.stages:
        if "kept" in columns:
            kept = recording.kept[stage.block]
            assert kept.dtype == np.int8
            for index in range(7):  # another batch pads ATS elsewhere
                assert list(kept[index][kept[index] >= 0]) == [
                    *filter(lambda patch: patch >= 0, stage.kept_patches[index])
                ]
        alone = stage.patch_slot[3].masked_fill(
            stage.patch_slot[3] == stage.num_out - 1, -1
        )  # without EViT's fused one
        assert np.array_equal(recording.pattern(stage.block, 3), alone if method == "evit" else stage.patch_slot[3])
        if "slots" in columns:
            assert recording.slots[stage.block].dtype == np.uint8
            assert np.array_equal(recording.slots[stage.block], stage.patch_slot)
    assert np.array_equal(recording.outputs["prediction"][:, 0], logits.argmax(1))
    assert recording.run.accuracy == pytest.approx(100 * (logits.argmax(1) == target).float().mean().item(), abs=1e-4)
    assert recording.run.name == f"{method} tiny 0.5"
    everything = load_file(path)
    assert everything.keys() == recording.columns.keys()
    for name, array in recording.columns.items():
        assert isinstance(array, np.memmap)
        assert np.array_equal(array, everything[name])


def test_features_are_the_class_token_after_its_blocks(tmp_path):
    model = build()
    recording = recorded(model, tmp_path / "a")
    assert recording.run.method == "none"
    assert math.isfinite(recording.run.accuracy)
    assert tuple(recording.features) == feature_blocks(4) == (1, 2, 3)
    tokens = model.forward_intermediates(data(model)[0], norm=False, return_prefix_tokens=True, intermediates_only=True)
    for block in (1, 2, 3):
        found = torch.from_numpy(np.array(recording.features[block]))
        torch.testing.assert_close(found, tokens[block][1][:, 0], rtol=1e-5, atol=1e-5)
    again = recorded(reduced("topk"), tmp_path / "b", keep_rate=0.5)
    assert again.features[1].shape == (7, 48)
    assert not np.array_equal(again.features[3], recording.features[3])
    assert feature_blocks(12) == (3, 6, 9, 11)


def test_packed_tokens_are_recorded_as_padded_ones(tmp_path):
    padded, packed = (
        recorded(reduced("ats", packed=packed), tmp_path / str(packed), keep_rate=0.5) for packed in (False, True)
    )
    for name, column in padded.columns.items():
        np.testing.assert_allclose(packed.columns[name], column, rtol=1e-4, atol=1e-4)


def test_recordings_are_compared_from_their_files(tmp_path):
    for method, rate in (("topk", 0.5), ("topk", 0.8), ("evit", 0.5)):
        recorded(reduced(method, rate), tmp_path / f"{method}{rate}", keep_rate=rate, features=())
    opened = [open_recording(path) for path in sorted(tmp_path.iterdir())]
    (rates,) = compare(opened, "keep_rate")
    assert rates["keep_rate_a"] == 0.8
    assert rates["ioa_2"] > rates["iou_2"] > 0
    both, back = compare(opened, "method")
    assert both["iou_1"] == back["iou_1"] == 1  # the same weights score the first stage
    statistics = token_statistics(opened[1])
    assert list(statistics.share) == [8 / 16, 4 / 16]
    assert statistics.depth.mean() == statistics.pooled[0] == (8 * 1 + 4 * 2 + 4 * 4) / 16


def test_equal_logits_go_to_the_lower_class_and_nan_to_none():
    """As fidelity counts them: torch.topk takes any of several largest, and NaN for the largest."""
    logits = torch.randn(3000, 40, generator=seeded(2)).bfloat16()
    best = best_classes(logits)
    tied = (logits == logits.amax(1, keepdim=True)).sum(1) > 1
    assert tied.sum() > 20
    assert torch.equal(best[:, 0], logits.argmax(1))
    again = np.argsort(-logits.float().numpy(), axis=1, kind="stable")[:, :5]
    assert np.array_equal(best.numpy(), again)
    logits[1, 30] = torch.nan
    assert best_classes(logits)[:3, 0].tolist() == [again[0, 0], -1, again[2, 0]]
    assert best_classes(logits[:, :3]).shape == (3000, 3)


def test_logits_that_are_nan_are_right_for_no_image(tmp_path):
    model = build()
    torch.nn.init.constant_(model.head.bias, torch.nan)
    pictures, _ = data(model)
    recording = record_images(
        model, [(pictures, torch.zeros(len(pictures), dtype=torch.int64))], tmp_path / "a", dataset="", backbone=""
    )
    assert recording.run.accuracy == 0
    assert (recording.outputs["prediction"] == -1).all()


def test_several_labels_an_image(tmp_path):
    from fastreduce.study.measures import mean_average_precision

    model = build()
    pictures, _ = data(model)
    target = (torch.rand(7, 7, generator=seeded(3)) < 0.3).float()
    batches = zip(pictures.split(BATCHES), target.split(BATCHES), strict=True)
    recording = record_images(model, batches, tmp_path / "a", dataset="d", backbone="b", features=(3,))
    with torch.no_grad():
        logits = model(pictures)
    assert recording.run.accuracy == pytest.approx(mean_average_precision(logits, target))
    assert np.array_equal(recording.outputs["target"], target)


def test_an_interrupted_recording_leaves_nothing(tmp_path):
    model = build().train()

    def batches():
        yield data(model)[0][:1], torch.zeros(1, dtype=torch.long)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_images(model, batches(), tmp_path / "a", dataset="d", backbone="b")
    assert not list(tmp_path.iterdir())
    assert model.training
    assert not any(block._forward_hooks for block in model.blocks)


def test_writing_and_reading_take_the_memory_of_a_batch(tmp_path):
    tracemalloc.start()
    with ColumnWriter(tmp_path / "a") as writer:
        for index in range(100):
            writer.append(
                {"small": np.full((100, 3), index, np.int8), "large": np.full((100, 1024), index, np.float16)}
            )
        assert np.array_equal(writer.column("small")[::100, 0], np.arange(100))
        writer.metadata = {"kind": "made up"}
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 4e6  # of 20 MB
    written = (tmp_path / "a").read_bytes()
    length = int.from_bytes(written[:8], "little")
    assert length % 8 == 0
    assert json.loads(written[8 : 8 + length])["large"]["data_offsets"][0] == 0  # aligned: wide types come first
    with safe_open(tmp_path / "a", "np") as file:
        assert file.metadata() == {"kind": "made up"}
        assert np.array_equal(file.get_slice("large")[::100, 5:6].ravel(), np.arange(100))


def test_a_recording_fits_its_estimate():
    """The bytes that the module's docstring states for DeiT-S: four features of 384, three stages at 0.9."""
    features, kept, outputs = 4 * 384, 2 * (176 + 158 + 142), 2 * (5 + 1)
    assert (4 * features + kept + outputs) * 50_000 == pytest.approx(0.36e9, rel=0.02)
    assert (2 * features + kept + outputs) * 50_000 == pytest.approx(0.20e9, rel=0.02)


def test_what_cannot_be_recorded_is_said(tmp_path):
    model = build()
    about = {"dataset": "d", "backbone": "b"}
    with pytest.raises(ValueError, match=r"keep_rate is 0\.5, and the model is not patched"):
        record_images(model, [], tmp_path / "a", **about, keep_rate=0.5)
    with pytest.raises(ValueError, match="keep_rate is None, and the model is patched with topk"):
        record_images(reduced("topk"), [], tmp_path / "a", **about)
    with pytest.raises(ValueError, match="no images"):
        record_images(model, [], tmp_path / "a", **about)
    with pytest.raises(ValueError, match=r"from 0 to 3, got \(4,\)"):
        record_images(model, [], tmp_path / "a", **about, features=(4,))
    with pytest.raises(ValueError, match="got 'int8'"):
        record_images(model, [], tmp_path / "a", **about, feature_dtype="int8")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):  # before any image is looked at
        record_images(model, iter([None]), tmp_path, **about)
    with pytest.raises(FileNotFoundError, match="none/a"):
        record_images(model, iter([None]), tmp_path / "none" / "a", **about)
    with pytest.raises(ValueError, match="no class token"):
        record_images(build("vit_base_patch16_siglip_224"), [], tmp_path / "a", **about, features=(1,))
    with ColumnWriter(tmp_path / "b") as writer:
        writer.append({"x": np.zeros((2, 3))})
        with pytest.raises(ValueError, match=r"x was float64 \(3,\) an image, now it is float64 \(4,\)"):
            writer.append({"x": np.zeros((2, 4))})
        with pytest.raises(ValueError, match="the columns were x, now they are y"):
            writer.append({"y": np.zeros((2, 3))})
    (tmp_path / "c").write_bytes(b"hello, this is text")
    for name in "bc":
        with pytest.raises(ValueError, match="is not a recording"):
            open_recording(tmp_path / name)
    assert Run("d", "b").name == "none b"


FORMAT = "fastreduce-recording-1"


def small_recording(path):
    """Return a recording of two images in four patches, its header and what follows it."""
    with ColumnWriter(path) as writer:
        writer.append(
            {
                "kept.1": np.array([[0, 3], [-1, 2]], np.int8),
                "slots.2": np.zeros((2, 4), np.uint8),
                "features.1": np.ones((2, 3), np.float16),
                "outputs.prediction": np.array([[1], [0]], np.int16),
                "outputs.target": np.array([1, 0], np.int16),
                "kept.3": np.zeros((2, 0), np.int8),
            }
        )
        about = {"run": {"dataset": "d", "backbone": "b", "accuracy": math.nan}, "grid": [2, 2], "depth": 4}
        writer.metadata = {FORMAT: json.dumps(about)}
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def put(path, header, data):
    words = header if isinstance(header, bytes) else json.dumps(header).encode()
    return rewrite(path, len(words).to_bytes(8, "little") + words + data)


def test_columns_without_a_token_are_read(tmp_path):
    header, data = small_recording(tmp_path / "a")
    found = open_recording(tmp_path / "a")
    assert found.kept[3].shape == (2, 0)
    assert found.pattern(1, 1).tolist() == [-1, -1, 1, -1]
    assert open_recording(put(tmp_path / "b", header, data)).columns.keys() == found.columns.keys()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kept.4": None}, "unknown column 'kept.4'"),
        ({"kept.01": None}, "unknown column 'kept.01'"),
        ({"zzz.3": None}, "unknown column 'zzz.3'"),
        ({"outputs.": None}, "unknown column 'outputs.'"),
        ({"kept.1": {"dtype": "F8_E4M3"}}, "unknown type 'F8_E4M3'"),
        ({"kept.1": {"dtype": ["I8"]}}, r"unknown type \['I8'\]"),
        ({"kept.1": {"shape": [-2, -2]}}, r"shape \[-2, -2\]"),
        ({"kept.1": {"shape": [2.0, 2]}}, r"shape \[2.0, 2\]"),
        ({"kept.1": {"shape": "22"}}, "shape '22'"),
        ({"kept.1": {"shape": []}}, r"shape \[\]"),
        ({"kept.1": {"shape": [4]}}, "different numbers of images"),
        ({"kept.1": {"shape": [2, 3]}}, "has 4 bytes for the shape"),
        ({"kept.1": {"data_offsets": [0]}}, r"at \[0\]"),
        ({"kept.1": {"data_offsets": [True, 5]}}, r"at \[True, 5\]"),
        ({"kept.1": {"data_offsets": [0, 4]}}, "gap or overlap"),
        ({"kept.1": {"data_offsets": [2**70, 2**70 + 4]}}, "gap or overlap"),
        ({"kept.1": {"dtype": "BOOL"}}, "column 'kept.1' is bool"),
        ({"features.1": {"dtype": "I16"}}, "column 'features.1' is int16"),
        ({"slots.2": {"shape": [2, 2, 2]}}, "column 'slots.2' is uint8"),
        ({"kept.1": 3}, "lacks dtype, shape or data_offsets"),
    ],
)
def test_a_damaged_column_is_named(tmp_path, change, words):
    header, data = small_recording(tmp_path / "a")
    for name, new in change.items():
        if new is None:
            header[name] = header.pop("kept.1")
        else:
            header[name] = {**header[name], **new} if isinstance(new, dict) else new
    with pytest.raises(ValueError, match=words) as raised:
        open_recording(put(tmp_path / "b", header, data))
    assert str(raised.value).startswith(f"{tmp_path / 'b'} is not a recording of fastreduce: ")


def test_a_file_that_goes_on_is_damaged(tmp_path):
    header, data = small_recording(tmp_path / "a")
    with pytest.raises(ValueError, match="columns have 32 bytes, the file 35"):
        open_recording(put(tmp_path / "b", header, data + b"abc"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"grid": [2, 2.0]}, "is no size"),
        ({"grid": [4]}, "is no size"),
        ({"grid": [0, 4]}, "is no size"),
        ({"grid": [1, 2]}, "column 'slots.2'|beyond the grid"),
        ({"grid": [1, 3]}, "column 'kept.1' names patches or tokens beyond|column 'slots.2'"),
        ({"depth": True}, "is no size"),
        ({"depth": 10**400}, "is no size"),
        ({"depth": 3}, r"unknown column 'kept\.3'"),
        ({"grid": [2**40, 1]}, "is no size"),
        ({"run": {"dataset": "d"}}, "Run lacks the field 'backbone'"),
        ({"run": {"dataset": "d", "backbone": "b", "x": 1}}, "Run has no field 'x'"),
        ({"run": {"dataset": 3, "backbone": "b"}}, "dataset of Run must be str, got 3"),
        ({"run": {"dataset": "d", "backbone": "b", "accuracy": "9"}}, "accuracy of Run must be float, got '9'"),
        ({"run": {"dataset": "d", "backbone": "b", "keep_rate": [1]}}, r"keep_rate of Run must be float \| None"),
        ({"run": {"dataset": "d", "backbone": "b", "parameters": True}}, "parameters of Run must be int, got True"),
        ({"run": []}, "Run must be an object"),
    ],
)
def test_a_damaged_description_is_named(tmp_path, change, words):
    header, data = small_recording(tmp_path / "a")
    about = json.loads(header["__metadata__"][FORMAT])
    header["__metadata__"][FORMAT] = json.dumps({**about, **change})
    with pytest.raises(ValueError, match=words):
        open_recording(put(tmp_path / "b", header, data))


JUNK = [None, True, -1, 0, 1.5, 1e999, math.nan, 2**80, "", "kept.1", [], {}, [[]], {"a": 1}, [0, 0], [2**62, 4]]


def places(value, at=()):
    """Return the way to everything in parsed JSON."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*at, key))


def test_whatever_is_damaged_ends_in_one_line(tmp_path):
    header, data = small_recording(tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    chance = random.Random(0)
    contents = [whole[:end] for end in range(len(whole))]
    for at in list(places(header))[1:]:  # every entry becomes everything
        for junk in JUNK:
            changed = copy.deepcopy(header)
            inner = changed
            for key in at[:-1]:
                inner = inner[key]
            inner[at[-1]] = junk
            contents.append(put(tmp_path / "b", changed, data).read_bytes())
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            content[chance.randrange(len(whole) - len(data))] = chance.randrange(256)
        contents.append(bytes(content))
    metadata = json.dumps(header["__metadata__"]).encode()
    for words in (b"[" * 100_000, b'{"a":' * 50_000, b'{"a":1,"a":2}', b"{}", b"null", b"\xff\xfe{}", b"9" * 5000):
        contents.append(put(tmp_path / "b", words, data).read_bytes())
        contents.append(put(tmp_path / "b", b'{"__metadata__":' + metadata[:-1] + b',"x":' + words, data).read_bytes())
        deep = {**header, "__metadata__": {FORMAT: words.decode("latin-1")}}
        contents.append(put(tmp_path / "b", deep, data).read_bytes())
    refused = 0
    for content in contents:
        rewrite(tmp_path / "b", content)
        try:
            found = open_recording(tmp_path / "b")
        except ValueError as error:
            refused += str(error).startswith(f"{tmp_path / 'b'} ") and len(str(error).splitlines()) == 1
        else:  # then it can be used
            token_statistics(found)
            refused += 1
    assert refused == len(contents)
