"""Fidelity against the unreduced model: right values, streaming, and a model that is left as it was."""

import copy
import math
from functools import partial

import pytest
import timm
import torch
from torch import nn

import fastreduce
from bench.proof.tiny import randomize
from fastreduce.integrations.hf.images import ImageModel
from fastreduce.quality import Outputs, model_outputs, unreduced_copy
from fastreduce.quality.measures import image_fidelity
from fastreduce.quality.tuning.losses import Calibration
from tests.helpers.inputs import seeded

AT = (1, 3)


def _model(**options):
    arguments = {"depth": 4, "embed_dim": 48, "num_heads": 3, "num_classes": 7, "img_size": 64, "patch_size": 8}
    kind = timm.models.vision_transformer.VisionTransformer
    return randomize(kind(**{**arguments, **options})).eval()


def _images(count=5):
    return torch.randn(count, 3, 64, 64, generator=seeded(3))


def _outputs(logits, features):
    """Make outputs of one image with two patches: one vector stands for class token and pooled features."""
    rows = torch.tensor([features], dtype=torch.float32)
    return Outputs(rows[:, 0], torch.tensor([logits]), rows[:, 0], rows[:, 1:], rows[:, 1:])


def test_measures_are_what_they_are_called():
    before = _outputs([math.log(0.75), math.log(0.25)], [[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
    after = _outputs([math.log(0.25), math.log(0.75)], [[3.0, 3.0], [0.0, 0.5], [0.0, 0.0]])
    found = image_fidelity(before, after._replace(patches_last=torch.tensor([[[0.0, 1.0], [3.0, 4.0]]])))
    assert found["agreement"].tolist() == [0.0]
    assert found["kl"].item() == pytest.approx(0.75 * math.log(3) - 0.25 * math.log(3), rel=1e-6)
    assert found["class_cosine"].item() == found["pooled_cosine"].item() == pytest.approx(2**-0.5, rel=1e-6)
    assert found["patch_cosine"].item() == pytest.approx((1 + 0) / 2, rel=1e-6)
    assert found["patch_cosine_last"].item() == pytest.approx((1 + 0.6) / 2, rel=1e-6)


def test_kl_is_of_the_unreduced_model_to_the_reduced():
    before = _outputs([math.log(0.9), math.log(0.1)], [[1.0, 0.0]] * 3)
    after = _outputs([math.log(0.6), math.log(0.4)], [[1.0, 0.0]] * 3)
    wanted = 0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4)
    assert image_fidelity(before, after)["kl"].item() == pytest.approx(wanted, rel=1e-5)


def test_a_small_kl_is_told_from_rounding():
    """In float32 the terms of 1,000 classes cancel to some 1e-7, whatever the divergence is."""
    logits = torch.randn(8, 1000, generator=seeded(5))
    other = logits + 1e-4 * torch.randn(8, 1000, generator=seeded(6))
    pooled = torch.ones(8, 4)
    found = image_fidelity(Outputs(pooled, logits, None), Outputs(pooled, other, None))["kl"]
    p, q = logits.double().softmax(1), other.double().softmax(1)
    wanted = (p * (p / q).log()).sum(1)
    assert wanted.max() < 1e-7
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=0)


def test_a_reduction_that_keeps_everything_loses_nothing():
    model = fastreduce.patch(_model(), "topk", keep_rate=1.0, at=AT)
    found = fastreduce.fidelity(model, _images())
    assert found.images == 5
    assert found.mean("agreement") == 1.0
    assert found.mean("kl") == pytest.approx(0, abs=1e-6)
    for name in ("class_cosine", "pooled_cosine", "patch_cosine", "patch_cosine_last"):
        assert found.values[name].min() > 1 - 1e-5, name


@pytest.mark.parametrize("method", ["topk", "ats"])
def test_dropped_patches_count_zero_or_their_last_token(method):
    """Followed patch by patch, with hooks of its own in place of the plans' composition."""
    model, images = _model(), _images(2)
    final = unreduced_copy(fastreduce.patch(model, method, keep_rate=0.6, at=AT)).forward_features(images)[:, 1:]
    entered = {}
    handles = [
        model.blocks[block].register_forward_pre_hook(
            partial(
                lambda module, inputs, block: entered.__setitem__(block, getattr(inputs[0], "x", inputs[0])),
                block=block,
            )
        )
        for block in AT
    ]
    with torch.no_grad(), fastreduce.record(model) as seen:
        reduced = model.forward_features(images)[:, 1:]
    for handle in handles:
        handle.remove()
    found = fastreduce.fidelity(model, images)
    for image in range(2):
        token_of = {patch: patch for patch in range(64)}
        last = {}
        for stage in seen.stages:
            kept = [index for index in stage.kept[image].tolist() if index >= 0]
            for patch, token in list(token_of.items()):
                if token in kept:
                    token_of[patch] = kept.index(token)
                else:
                    last[patch] = model.norm(entered[stage.block][image, 1 + token])
                    del token_of[patch]
        assert len(last) > 10
        cosine = partial(torch.cosine_similarity, dim=0)
        alive = sum(cosine(reduced[image, token], final[image, patch]).item() for patch, token in token_of.items())
        gone = sum(cosine(vector, final[image, patch]).item() for patch, vector in last.items())
        assert found.values["patch_cosine"][image].item() == pytest.approx(alive / 64, abs=1e-5)
        assert found.values["patch_cosine_last"][image].item() == pytest.approx((alive + gone) / 64, abs=1e-5)


def test_merged_patches_show_the_token_that_they_are_in():
    model = fastreduce.patch(_model(), "tome", keep_rate=0.6, at=AT)
    found = fastreduce.fidelity(model, _images())
    assert torch.equal(found.values["patch_cosine"], found.values["patch_cosine_last"])
    unreduced = unreduced_copy(model)
    with torch.no_grad(), fastreduce.record(model) as seen:
        features = model.forward_features(_images())[:, 1:]
        final = unreduced.forward_features(_images())[:, 1:]
    token_of = seen.stages[-1].patch_slot
    dense = torch.stack([rows[slots] for rows, slots in zip(features, token_of, strict=True)])
    wanted = torch.cosine_similarity(dense, final, dim=-1).mean(1)
    assert torch.allclose(found.values["patch_cosine"], wanted, atol=1e-5)


def test_logits_and_pooled_features_are_those_of_a_plain_call():
    for options in ({}, {"global_pool": "avg", "class_token": False, "no_embed_class": True}):
        model = fastreduce.patch(_model(**options), "evit", keep_rate=0.5, at=AT)
        outputs = model_outputs(model, _images())
        with torch.no_grad():
            logits = model(_images())
            assert torch.allclose(outputs.logits, logits, atol=1e-6)
            assert torch.allclose(model.head(outputs.pooled), logits, atol=1e-6)
        assert (outputs.class_token is None) == bool(options)
        assert outputs.patches.shape == (5, 64, 48)


def test_batches_of_any_size_and_from_a_loader_give_the_same():
    model, images = fastreduce.patch(_model(), "topk", keep_rate=0.6, at=AT), _images(5)
    labels = torch.tensor([0, 1, 2, 3, 4])
    whole = fastreduce.fidelity(model, images, labels=labels)
    loader = ((images[start : start + 2], labels[start : start + 2]) for start in (0, 2, 4))
    for other in (
        fastreduce.fidelity(model, images, labels=labels.tolist(), batch_size=3),
        fastreduce.fidelity(model, loader),
    ):
        assert other.accuracy == whole.accuracy
        for name, values in whole.values.items():
            assert torch.allclose(values, other.values[name], atol=1e-5), name
    unlabelled = fastreduce.fidelity(model, [images[:2], images[2:]])
    assert unlabelled.accuracy is None
    assert torch.allclose(unlabelled.values["kl"], whole.values["kl"], atol=1e-5)


def test_accuracy_counts_the_labels_that_each_model_finds():
    model, images = _model(), _images(8)
    with torch.no_grad():
        before = model(images).argmax(1)
        after = fastreduce.patch(model, "topk", keep_rate=0.3, at=AT)(images).argmax(1)
    labels = before.clone()
    labels[0] = (before[0] + 1) % 7
    found = fastreduce.fidelity(model, images, labels=labels).accuracy
    assert found.before == 7 / 8
    assert found.after == (after == labels).float().mean().item()
    assert found.difference == pytest.approx(found.after - found.before)


def test_another_model_can_be_the_unreduced_one():
    model, images = _model(), _images()
    other = randomize(_model(), seed=9)
    found = fastreduce.fidelity(fastreduce.patch(model, "topk", keep_rate=1.0, at=AT), images, unreduced=other)
    with torch.no_grad():
        wanted = torch.cosine_similarity(model.forward_features(images)[:, 0], other.forward_features(images)[:, 0])
    assert torch.allclose(found.values["class_cosine"], wanted, atol=1e-5)


def test_the_model_is_left_as_it_was():
    model = fastreduce.patch(_model(), "topk", keep_rate=0.6, at=AT).train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    fastreduce.fidelity(model, _images(2))
    assert [module.training for module in model.modules()] == modes
    assert fastreduce.is_patched(model)
    assert not any(module._forward_pre_hooks for module in model.blocks.modules())


def test_summary_has_mean_median_and_worst_decile():
    values = torch.arange(11, dtype=torch.float32) / 10
    found = fastreduce.Fidelity({"kl": values, "pooled_cosine": values}).summary()
    assert found["images"] == 11
    assert found["kl"] == pytest.approx({"mean": 0.5, "median": 0.5, "worst_decile": 0.9})
    assert found["pooled_cosine"] == pytest.approx({"mean": 0.5, "median": 0.5, "worst_decile": 0.1})


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"images": torch.zeros(3, 64, 64)}, ValueError, r"\(3, 64, 64\)"),
        ({"images": torch.zeros(0, 3, 64, 64)}, ValueError, "at least 1"),
        ({"images": torch.zeros(1, 3, 64, 64, dtype=torch.uint8)}, TypeError, "uint8"),
        ({"images": 7}, TypeError, "7"),
        ({"images": []}, ValueError, "no images"),
        ({"images": [{"x": 1}]}, TypeError, "dict"),
        (
            {"images": torch.zeros(2, 3, 64, 64).unbind()},
            ValueError,
            r"a batch must be \(N, .* got images \(3, 64, 64\)",
        ),
        ({"images": torch.zeros(2, 3, 64, 64), "labels": [1.0, 2.0]}, TypeError, "class indices, got torch.float32"),
        ({"images": torch.zeros(2, 3, 64, 64), "labels": [1]}, ValueError, r"\(1,\)"),
        ({"images": torch.zeros(2, 3, 64, 64), "labels": [1, 7]}, ValueError, "between 0 and 6.*got 7"),
        ({"images": torch.zeros(2, 3, 64, 64), "labels": [-1, 2]}, ValueError, "got -1"),
        ({"images": torch.zeros(2, 3, 64, 64), "batch_size": 0}, ValueError, "batch_size.*0"),
        ({"images": torch.zeros(2, 3, 64, 64), "batch_size": 2.5}, TypeError, "batch_size.*2.5"),
        ({"images": torch.zeros(2, 3, 64, 64), "labels": ["a", "b"]}, TypeError, "labels.*'a'"),
        ({"images": [torch.zeros(1, 3, 64, 64)], "labels": [1]}, ValueError, "loader"),
        ({"images": [(torch.zeros(1, 3, 64, 64), [1]), torch.zeros(2, 3, 64, 64)]}, ValueError, "labels for 1 of 3"),
        ({"images": torch.zeros(2, 3, 64, 64), "unreduced": _model(num_classes=5)}, ValueError, "got 5 and 7"),
    ],
)
def test_wrong_arguments_are_said(arguments, error, words):
    model = fastreduce.patch(_model(), "topk", keep_rate=0.6, at=AT)
    with pytest.raises(error, match=words):
        fastreduce.fidelity(model, **arguments)


def test_a_patched_model_is_no_unreduced_one():
    """Against itself a patched model lost most of its patches."""
    model = fastreduce.patch(_model(), "topk", keep_rate=0.6, at=AT)
    with pytest.raises(ValueError, match="given as unreduced is patched"):
        fastreduce.fidelity(model, _images(), unreduced=model)


def test_logits_that_are_nan_agree_with_nothing():
    """The index of the largest of them would be that of the first NaN, class 0 where all are."""
    model = fastreduce.patch(_model(), "topk", keep_rate=0.6, at=AT)
    images = torch.randn(3, 3, 64, 64, generator=seeded(1))
    images[1] = torch.nan
    found = fastreduce.fidelity(model, images, labels=[0, 0, 0])
    assert found.values["agreement"].isnan().tolist() == [False, True, False]
    right = model(images[::2]).argmax(1) == 0
    assert found.accuracy.after == pytest.approx(right.sum().item() / 3)
    unreduced, broken = _model(), fastreduce.patch(_model(), "topk", keep_rate=0.6, at=AT)
    torch.nn.init.constant_(broken.head.bias, torch.nan)
    assert fastreduce.fidelity(broken, images[::2], unreduced=unreduced).mean("agreement") == 0
    # tune counts them as wrong, too
    with torch.no_grad():
        classes = Calibration(unreduced, images).measured("topk", keep_rate=0.6, at=AT)[1:]
    assert [one[1] for one in classes] == [-1, -1]
    assert classes[0][::2].tolist() == unreduced(images[::2]).argmax(1).tolist()


def test_models_of_other_libraries_are_compared_by_their_answer():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=4, num_attention_heads=3, intermediate_size=96, image_size=64, patch_size=8
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    images = _images(3)
    with torch.no_grad():
        before = model.vit(images).last_hidden_state[:, 0]
        fastreduce.patch(model, "topk", keep_rate=0.3, at=AT)
        after = model.vit(images).last_hidden_state[:, 0]
    found = fastreduce.fidelity(model, images)
    assert set(found.values) == {"agreement", "kl", "pooled_cosine"}
    # what the head reads, as compare has it, not the logits
    assert torch.allclose(found.values["pooled_cosine"], torch.cosine_similarity(before, after), atol=1e-5)
    size = {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "crop_mode": "squash"}
    wrapped = fastreduce.patch(ImageModel(fastreduce.unpatch(copy.deepcopy(model)), size), "topk", keep_rate=0.3, at=AT)
    for name, values in found.values.items():
        assert torch.allclose(fastreduce.fidelity(wrapped, images).values[name], values, atol=1e-6)
    assert found.values["pooled_cosine"].max() < 1
    assert fastreduce.is_patched(model)


def test_wrong_models_are_said():
    with pytest.raises(ValueError, match="not patched"):
        fastreduce.fidelity(_model(), _images(1))
    with pytest.raises(TypeError, match="got 3"):
        fastreduce.fidelity(3, _images(1))
    with pytest.raises(TypeError, match="Identity gives Tensor"):
        model_outputs(nn.Identity(), _images(1))
    headless = fastreduce.patch(_model(num_classes=0), "topk", keep_rate=0.6, at=AT)
    assert set(fastreduce.fidelity(headless, _images(1)).values) == {
        *("class_cosine", "pooled_cosine", "patch_cosine", "patch_cosine_last")
    }
    with pytest.raises(ValueError, match="no head"):
        fastreduce.fidelity(headless, _images(1), labels=[0])
    with pytest.raises(ValueError, match="agreement"):
        fastreduce.fidelity(headless, _images(1)).mean("agreement")
