"""The saliency network in PyTorch is the one in the wheel, and bench.quality measures it rightly."""

import json

import numpy as np
import pytest
import torch

import fastreduce
from bench import quality, saliency
from fastreduce.quality import model_outputs

reason = saliency.missing_reason()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))


@pytest.fixture(scope="module")
def network():
    return saliency.load_saliency()


@pytest.fixture(scope="module")
def images():
    return quality.sample_images(1).take([0, 1]).tensor(quality.input_config(saliency.load_saliency()[0]))


def test_encoder_and_decoder_are_exact(network, images):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime, which the wheel's network is held against")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(str(saliency.model_file()), options, providers=["CPUExecutionProvider"])
    wanted = session.run(None, {"input_image": images.numpy()})[0]
    encoder, decoder = network
    with torch.inference_mode():
        found = decoder(encoder.forward_features(images)[:, 1:])
        exact = decoder.double()(encoder.double().forward_features(images.double())[:, 1:])
        encoder.float(), decoder.float()
    assert np.ptp(wanted) > 0.3
    assert np.abs(wanted - exact.numpy()).max() < 1e-5
    assert (found - exact).abs().max() < 1e-5


def test_a_row_of_the_table_has_the_right_values(network, images):
    encoder, decoder = network
    yardstick = quality.Yardstick(encoder, decoder, images)
    row = quality.measure(encoder, yardstick, "topk", method="topk", keep_rate=0.5)
    assert not fastreduce.is_patched(encoder)
    assert row["counts"] == [128, 64, 32]
    with torch.inference_mode():
        before = decoder(encoder.forward_features(images)[:, 1:])
        fastreduce.patch(encoder, "topk", keep_rate=0.5)
        with fastreduce.record(encoder) as seen:
            features = encoder.forward_features(images)
        after = decoder(seen.stages[-1].unmerge(features, fill="zero")[:, 1:])
        outputs = model_outputs(encoder, images)
        fastreduce.unpatch(encoder)
    errors = (after - before).abs().mean((1, 2, 3))
    assert row["images"]["saliency_error"] == pytest.approx(errors.tolist(), abs=2e-5)
    assert row["mean"]["saliency_error"] == pytest.approx(errors.mean().item(), abs=1e-6)
    assert torch.equal(outputs.patches, seen.stages[-1].unmerge(features, fill="zero")[:, 1:])


def test_the_command_writes_table_and_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quality, "sample_images", lambda crops: _few(crops))
    file = tmp_path / "quality.json"
    assert quality.main(["--methods", "tome,evit", "--keep-rate", "0.7", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    table = capsys.readouterr().out
    by_label = {row["label"]: row["mean"] for row in result["methods"]}
    assert by_label["tome"]["patch_cosine"] > by_label["evit"]["patch_cosine"] > 0.5
    for label, means in by_label.items():
        assert f"| `{label}` | {means['class_cosine']:.3f} | {means['patch_cosine']:.3f} |" in table


def _few(crops):
    from fastreduce.quality.images import sample_images

    return sample_images(crops).take([0, 1])


def test_another_file_is_refused(monkeypatch):
    monkeypatch.setattr(saliency, "_SHA256", "0" * 64)
    with pytest.raises(FileNotFoundError, match="another file"):
        saliency.model_file()
