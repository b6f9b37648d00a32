"""A reduction in a file: the same numbers after it, no leftovers of another method, no file of somebody else's lost."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fastreduce
from bench.proof import tiny

AT = (1, 2)


@pytest.mark.parametrize("number", [np.float32, torch.tensor])
@pytest.mark.parametrize("rate", [0.7, (0.7, 0.3)])
def test_numbers_of_32_bits_are_written_as_they_are_read(number, rate, tmp_path):
    """float32's 0.7 is meant as 0.7: of 10 x 10 patches 70 stay, and 69 of 0.699999988."""
    at = 1 if rate == 0.7 else AT
    given = number(rate) if rate == 0.7 else np.asarray(rate, np.float32)
    model = fastreduce.patch(tiny.build(img_size=160), "topk", keep_rate=given, at=at)
    file = fastreduce.save_config(model, tmp_path)
    assert json.loads(file.read_text())["config"]["keep_rate"] == (0.7 if rate == 0.7 else [0.7, 0.3])
    loaded = fastreduce.load_config(tiny.build(img_size=160), tmp_path)
    counts = fastreduce.integrations.patching.reduced_counts
    assert counts(loaded) == counts(model) == ([70] if rate == 0.7 else [70, 30])


def test_layers_of_the_method_before_are_taken_away(tmp_path):
    fastreduce.save_config(fastreduce.patch(tiny.build(), "sit", keep_rate=0.5, at=AT), tmp_path)
    assert (tmp_path / "fastreduce.safetensors").is_file()
    fastreduce.save_config(fastreduce.patch(tiny.build(), "topk", keep_rate=0.5, at=AT), tmp_path)
    assert not (tmp_path / "fastreduce.safetensors").exists()
    assert fastreduce.config_of(fastreduce.load_config(tiny.build(), tmp_path))["method"] == "topk"


def test_a_changed_argument_may_leave_layers_over(tmp_path):
    fastreduce.save_config(fastreduce.patch(tiny.build(), "dpcknn", keep_rate=0.5, at=AT), tmp_path)
    model = fastreduce.load_config(tiny.build(), tmp_path, equal_weight=True)
    assert not model.reducers.state_dict()


@pytest.mark.parametrize("method", ["topk", "sit"])
def test_weights_of_the_model_are_not_overwritten(method, tmp_path):
    """A config named like the weights: the layers' file would be theirs."""
    save_file({"head": torch.ones(2)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    model = fastreduce.patch(tiny.build(), method, keep_rate=0.5, at=AT)
    if method == "sit":
        with pytest.raises(ValueError, match=r"model\.safetensors.*another name"):
            fastreduce.save_config(model, tmp_path / "model.json")
        assert not (tmp_path / "model.json").exists()
    else:
        fastreduce.save_config(model, tmp_path / "model.json")
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("fault", ["width", "junk", "method"])
def test_layers_that_do_not_fit_leave_the_model(fault, tmp_path):
    fastreduce.save_config(fastreduce.patch(tiny.build(), "sit", keep_rate=0.5, at=AT), tmp_path)
    if fault == "junk":
        (tmp_path / "fastreduce.safetensors").write_bytes(b"junk")
    model = tiny.build(**({"embed_dim": 96} if fault == "width" else {}))
    images, changes = tiny.images(model), {"method": "patchmerger"} if fault == "method" else {}
    expected = model(images)
    with pytest.raises(ValueError, match=r"fastreduce\.safetensors"):
        fastreduce.load_config(model, tmp_path, **changes)
    assert not fastreduce.is_patched(model)
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("name", ["model", "config"])
def test_a_config_holds_no_model(name):
    with pytest.raises(ValueError, match=f"'{name}' among the arguments"):
        fastreduce.patch(tiny.build(), config={"config": {"method": "topk", name: 1}})
