"""The embedded study's settings, and the training of a whole study."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from fastreduce.integrations.timm import reduced_counts, unpatch
from fastreduce.reducers import REDUCERS
from fastreduce.study import recipe as recipes
from fastreduce.study.history import Epoch
from fastreduce.study.layouts import LAYOUTS
from fastreduce.study.protocol import DATA_SETS, Backbone, protocol_for
from fastreduce.study.recipe import DIGITS, DIGITS_QUICK, Capacity, paper_recipe, reductions, train_all

from .test_train import BACKBONE, PLAIN, few_digits, worker_server


@pytest.mark.parametrize("recipe", [DIGITS, DIGITS_QUICK])
def test_every_method_can_do_the_digits(recipe):
    models = list(recipe.models)
    rates = len({reduction.keep_rate for reduction in recipe.reductions})
    pruning = 4 if recipe is DIGITS else 1
    assert len({model.place for model in models}) == len(models) == 1 + 11 * rates + 1 + pruning * rates
    assert [model.place for model in models if model.reduction is None] == ["unreduced", "width-24/unreduced"]
    (capacity,) = recipe.capacities
    assert all(reduction in recipe.reductions for reduction in capacity.reductions)
    assert [block.attn.num_heads for block in capacity.backbone.build(10).blocks] == [3] * 12
    model = recipe.backbone.build(10)
    assert len(model.blocks) == 12
    images = torch.randn(2, 3, 32, 32)
    for reduction in recipe.reductions:
        reduction.apply(model)
        counts = reduced_counts(model)
        assert len(counts) == 3
        if reduction.keep_rate == 0.25:
            with torch.no_grad():
                assert model(images).shape == (2, 10)
        unpatch(model)


def test_labels():
    radial, dpcknn = reductions(("radial", "dpcknn"), (0.5,), dpcknn={"k_neighbors": 4})
    assert (radial.label, dpcknn.label) == ("radial-l2-0.5", "dpcknn-0.5")
    assert radial.options == {"norm": "l2", "schedule": "stages"}
    assert dataclasses.replace(dpcknn, keep_rate=(0.5, 0.25)).label == "dpcknn-0.5-0.25"


def test_tome_leaves_as_many_tokens_as_the_others():
    """One matching leaves at least half: below that rate several are needed."""
    few, half, own = reductions(("tome",), (0.25, 0.5)) + reductions(("tome",), (0.25,), tome={"rounds": "official"})
    assert (few.options, half.options, own.options) == ({"rounds": "exact"}, {}, {"rounds": "official"})
    model = DIGITS.backbone.build(10)
    assert reduced_counts(few.apply(model)) == [16, 4, 1]


def test_names_are_those_of_the_package():
    assert tuple(REDUCERS) == recipes._METHODS
    assert ("digits", *LAYOUTS) == DATA_SETS
    with pytest.raises(ValueError, match="unknown method 'tom'; did you mean 'tome'"):
        reductions(("tom",), (0.5,))


def test_torch_is_not_needed_to_refuse_a_recipe():
    script = (
        "import sys; from fastreduce.study.recipe import DIGITS, paper_recipe, reductions\n"
        "paper_recipe('coco')\n"
        "assert not {'torch', 'timm', 'numpy'} & {*sys.modules}, [*sys.modules]"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_papers_recipe():
    paper = paper_recipe("nabirds", "deit_tiny_patch16_224")
    assert (paper.fine_tuning, paper.training) == (protocol_for("nabirds"), None)
    assert paper.augmentation.rand_augment is None
    assert len(paper.reductions) == 44
    two = paper_recipe("coco", capacities=["deit_tiny_patch16_224"])
    assert len(list(two.models)) == 2 * len(list(paper.models)) == 90
    with pytest.raises(ValueError, match="a name of its own, got deit_small_patch16_224, deit_small_patch16_224"):
        paper_recipe("coco", capacities=["deit_small_patch16_224"])
    with pytest.raises(ValueError, match="'hf_hub:timm/deit'"):
        paper_recipe("coco", capacities=["hf_hub:timm/deit"])
    with pytest.raises(ValueError, match="the paper has no digits"):
        paper_recipe("digits")
    assert Backbone("deit_tiny_patch16_224", pretrained=True).knows(1000)
    assert not Backbone("deit_tiny_patch16_224").knows(1000)


@pytest.mark.slow  # test_run and the commands train too
def test_train_all(tmp_path, monkeypatch):
    protocol = dataclasses.replace(PLAIN, epochs=1)
    narrow = dataclasses.replace(BACKBONE, options={**BACKBONE.options, "embed_dim": 8})
    tiny = dataclasses.replace(
        DIGITS,
        backbone=BACKBONE,
        training=protocol,
        fine_tuning=protocol,
        reductions=reductions(("sit",), (0.5,)),
        capacities=(Capacity("narrow", narrow, reductions(("topk",), (0.5,))),),
    )
    monkeypatch.setattr("fastreduce.study.data.open_data", lambda *arguments, **named: few_digits(16))
    said = []
    alone = train_all(tiny, tmp_path / "alone", cpu=True, progress=lambda *words: said.append(words))
    own, further = ["backbone", "unreduced", "sit-0.5"], ["narrow/backbone", "narrow/unreduced", "narrow/topk-0.5"]
    assert list(alone) == own + further
    assert said[-1] == ("training digits topk-0.5", 6, 6)
    for name, training in alone.items():
        assert training.weights == tmp_path / "alone" / name / "model.safetensors"
        assert load_file(training.weights)["cls_token"].shape[-1] == (16 if name in own else 8)
    assert alone["unreduced"].epochs[0].losses != alone["backbone"].epochs[0].losses

    server = worker_server()
    monkeypatch.setattr(recipes.multiprocessing, "get_context", lambda kind: server)
    together = train_all(tiny, tmp_path / "together", jobs=2, cpu=True, progress=lambda *words: said.append(words))
    assert said[-1] == ("training digits", 6, 6)

    def curves(trainings):
        return {name: [_without_clock(epoch) for epoch in found.epochs] for name, found in trainings.items()}

    assert curves(together) == curves(alone)
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        train_all(tiny, tmp_path, jobs=0)


def test_a_model_waits_for_what_it_starts_or_learns_from(tmp_path):
    before = {place: step[1] for place, step in recipes._steps(DIGITS_QUICK, tmp_path, None, True).items()}
    assert {place: before[place] for place in ("topk-0.25", "width-24/topk-0.25", "width-24/backbone")} == {
        "topk-0.25": "backbone",
        "width-24/topk-0.25": "width-24/backbone",
        "width-24/backbone": None,
    }
    paper = paper_recipe("coco", capacities=["deit_tiny_patch16_224"])
    before = {place: step[1] for place, step in recipes._steps(paper, tmp_path, None, True).items()}
    assert {place: needed for place, needed in before.items() if needed} == {
        f"{folder}dynamicvit-{rate}": f"{folder}unreduced"
        for folder in ("", "deit_tiny_patch16_224/")
        for rate in (0.25, 0.5, 0.7, 0.9)
    }


def _without_clock(epoch: Epoch) -> Epoch:
    return dataclasses.replace(epoch, seconds=0.0)
