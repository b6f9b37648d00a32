"""Every timm family that can be reduced, at tiny cost: against itself unreduced, and against the plain algorithms."""

import copy
import functools

import pytest
import timm
import torch
from timm.models.vision_transformer import Attention
from torch import nn

import fastreduce
from bench.proof import tiny
from tests.helpers.inputs import seeded

FAMILIES = {
    "deit": ("deit_tiny_patch16_224", {}),
    "deit-distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "augreg": ("vit_tiny_patch16_224", {}),
    "flexivit": ("flexivit_small", {}),
    "dinov2": ("vit_small_patch14_dinov2", {"img_size": 70}),
    "dinov2-registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 70}),
    "dinov2-swiglu": ("vit_giant_patch14_dinov2", {"img_size": 70}),
    "tips": ("vit_base_patch14_reg1_tipsv2", {"img_size": 70}),
    "clip": ("vit_base_patch32_clip_224", {"img_size": 128}),
    "clip-quickgelu": ("vit_base_patch32_clip_quickgelu_224", {"img_size": 128}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "siglip-gap": ("vit_base_patch16_siglip_gap_224", {}),
    "gap": ("vit_medium_patch16_gap_240", {}),
    "registers-gap": ("vit_betwixt_patch16_reg4_gap_256", {}),
    "registers-map": ("vit_so150m_patch16_reg4_map_256", {}),
    "aimv2": ("aimv2_large_patch14_224", {"img_size": 70}),
    "internvit": ("vit_intern300m_patch14_448", {"img_size": 70}),
    "beit3": ("beit3_base_patch16_224", {}),
    "hybrid": ("vit_tiny_r_s16_p8_224", {"img_size": 128}),
    "test-vit3": ("test_vit3", {}),
    "not-square": ("vit_tiny_patch16_224", {"img_size": (48, 96)}),
    "odd-grid": ("vit_tiny_patch16_224", {"img_size": (80, 48)}),
    "dynamic": ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
    "qk-norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "scale-norm": ("vit_tiny_patch16_224", {"scale_attn_norm": True, "scale_mlp_norm": True}),
    "no-bias": ("vit_tiny_patch16_224", {"qkv_bias": False, "proj_bias": False}),
    "final-norm-off": ("vit_tiny_patch16_224", {"final_norm": False}),
    "no-positions": ("vit_tiny_patch16_224", {"pos_embed": "none"}),
    "class-avg": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "class-avgmax": ("vit_tiny_patch16_224", {"global_pool": "avgmax"}),
    "class-max": ("vit_tiny_patch16_224", {"global_pool": "max"}),
    "class-map": ("vit_tiny_patch16_224", {"global_pool": "map"}),
    "class-prr": ("vit_tiny_patch16_224", {"global_pool": "prr"}),
    "class-none": ("vit_tiny_patch16_224", {"global_pool": "", "num_classes": 0}),
    "avg-with-prefix": ("vit_tiny_patch16_224", {"global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 2}),
    "no-class-max": ("vit_tiny_patch16_224", {"global_pool": "max", "class_token": False}),
}
IS_OLD = tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 26)  # it may lack some of these
AT = (0, 2)  # with a block after each stage that reduces nothing
SCHEDULE = {"keep_rate": 0.5, "at": AT}


@functools.cache
def _build(family):
    name, changes = FAMILIES[family]
    try:
        return tiny.build(name, **{"img_size": 96, **changes}).double()
    except (AssertionError, RuntimeError, TypeError) as error:
        if not IS_OLD:
            raise
        pytest.skip(f"timm {timm.__version__} has no {name} like this: {error}")


def model_of(family):
    return copy.deepcopy(_build(family))


def _runs():
    for name, arguments in tiny.METHODS.items():
        # At a rate below a half, a stage of exact ToMe takes several rounds.
        schedule = {**SCHEDULE, "keep_rate": 0.3} if name == "tome-exact" else SCHEDULE
        if arguments["method"] == "kmedoids" and "equal_weight" not in arguments:
            schedule = {**SCHEDULE, "at": (1, 2)}  # it needs a block before; the second stage follows the first at once
        yield pytest.param({**arguments, **schedule}, id=name)
    yield pytest.param({"method": "radial", "norm": "linf", "at": tiny.AT, "min_radius": 0.5}, id="radial-contiguous")


RUNS = list(_runs())


@pytest.mark.parametrize("family", FAMILIES)
def test_keep_rate_one_changes_nothing(family):
    model = model_of(family)
    images = tiny.images(model, dtype=torch.float64)
    with torch.no_grad():
        expected = model(images)
        assert expected.std() > 1e-3, "the model does not look at its input"
        for name, arguments in tiny.METHODS.items():
            if name.split("-")[0] in tiny.NEVER_IDLE:
                continue
            fastreduce.patch(model, keep_rate=1.0, at=(1, 3), **arguments)
            torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-10 * expected.abs().max().item())
            fastreduce.unpatch(model)


def _refuses_sampling(model, arguments):
    """Return whether the run is ATS on a model that it cannot serve, and check that it is refused with the reason."""
    if arguments["method"] != "ats" or tiny.can_sample(model):
        return False
    with pytest.raises(ValueError, match=r"class token|global_pool="):
        fastreduce.patch(model, **arguments)
    return True


@pytest.mark.parametrize("arguments", RUNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_plain_algorithm(family, arguments):
    model = model_of(family)
    images = tiny.images(model, dtype=torch.float64)
    if _refuses_sampling(model, arguments):
        return
    with torch.no_grad():
        unreduced = model(images)
        reduced, plain = tiny.reduced_and_plain(model, **arguments)
        expected, logits = plain(images), reduced(images)
    if arguments["method"] == "ats" and model.global_pool == "":
        expected, logits, unreduced = expected[:, :1], logits[:, :1], unreduced[:, :1]  # what padding holds is open
    assert logits.shape == expected.shape
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-8 * expected.abs().max().item())
    # It does reduce: tokens are gone, and with them something of the result.
    assert fastreduce.reduced_counts(model)[-1] < model.patch_embed.num_patches
    if logits.shape == unreduced.shape:
        assert (logits - unreduced).abs().max() > 1e-4 * unreduced.abs().max()


@pytest.mark.parametrize("arguments", RUNS)
@pytest.mark.parametrize("family", ["deit3", "dinov2-registers", "siglip", "class-avgmax", "scale-norm"])
def test_without_fused_attention(family, arguments):
    model = model_of(family)
    images = tiny.images(model, dtype=torch.float64)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    if _refuses_sampling(model, arguments):
        return
    with torch.no_grad():
        reduced, plain = tiny.reduced_and_plain(model, **arguments)
        expected, logits = plain(images), reduced(images)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-8 * expected.abs().max().item())


@pytest.mark.parametrize("arguments", RUNS)
def test_gated_attention(arguments):
    """A gate passes a selection but not a merge, since the gate differs from token to token."""
    model = tiny.build()
    for block in model.blocks:
        block.attn = Attention(48, num_heads=3, qkv_bias=True, gated=True, qk_norm=True, norm_layer=nn.LayerNorm)
    tiny.randomize(model).double()
    images = tiny.images(model, dtype=torch.float64)
    with torch.no_grad():
        reduced, plain = tiny.reduced_and_plain(model, **arguments)
        expected, logits = plain(images), reduced(images)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-8 * expected.abs().max().item())


@pytest.mark.parametrize("arguments", [case for case in RUNS if not case.id.startswith("radial")])
def test_images_of_another_size(arguments):
    """Counts follow the patches that are there."""
    model = model_of("dynamic")
    images = torch.randn(2, 3, 80, 64, dtype=torch.float64, generator=seeded(3))
    with torch.no_grad():
        reduced, plain = tiny.reduced_and_plain(model, **arguments)
        expected = plain(images)
        with fastreduce.record(reduced) as seen:
            logits = reduced(images)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-8 * expected.abs().max().item())
    assert seen.stages[0].num_in == 20


def test_radial_patterns_follow_the_grid_of_the_pass():
    """Patterns have as many patches elsewhere, by ``set_input_size`` or by other images, before and after a copy."""
    wide, high = torch.randn(1, 3, 32, 128), torch.randn(1, 3, 64, 64)
    model = fastreduce.patch(tiny.build(img_size=64, dynamic_img_size=True), "radial", **SCHEDULE)
    kept = {}
    for size in ((32, 128), (64, 64)):
        with fastreduce.record(fastreduce.patch(tiny.build(img_size=size), "radial", **SCHEDULE)) as seen:
            seen._model(torch.zeros(1, 3, *size))
        kept[size] = seen.stages[0].kept_patches.sort(1).values
    assert not torch.equal(kept[32, 128], kept[64, 64])
    fixed = fastreduce.patch(tiny.build(img_size=(32, 128)), "radial", **SCHEDULE)
    fixed.set_input_size((64, 64))
    for reduced, images in ((model, wide), (copy.deepcopy(model), high), (model, high), (fixed, high)):
        with fastreduce.record(reduced) as seen:
            reduced(images)
        assert torch.equal(seen.stages[0].kept_patches.sort(1).values, kept[tuple(images.shape[2:])])


@pytest.mark.parametrize("arguments", RUNS)
@pytest.mark.parametrize("family", ["deit", "dinov2-registers", "siglip", "class-avg"])
def test_lower_precision(family, arguments):
    model = model_of(family)
    images = tiny.images(model)
    if _refuses_sampling(model, arguments):
        return
    with torch.no_grad():
        model, plain = tiny.reduced_and_plain(model, **arguments)
        exact = plain(images.double())
        logits = model.float()(images)
        torch.testing.assert_close(logits.double(), exact, rtol=0, atol=1e-4 * exact.abs().max().item())
        for dtype in (torch.bfloat16, torch.float16):
            rough = model.to(dtype)(images.to(dtype))
            assert rough.dtype == dtype
            assert rough.shape == exact.shape
            assert rough.isfinite().all()


def _same_gradients(model, arguments, images):
    """Hold gradients of the model, of the method's own layers and of the input against the plain algorithm."""
    reduced, plain = tiny.reduced_and_plain(model, **arguments)
    own = dict(reduced.reducers.named_parameters()) if hasattr(reduced, "reducers") else {}
    gradients = []
    for run, parameters in ((plain, {**dict(plain.model.named_parameters()), **plain.layers}), (reduced, None)):
        torch.manual_seed(3)  # of DynamicViT's decisions
        inputs = images.clone().requires_grad_()
        run.train()(inputs).square().sum().backward()
        if parameters is None:
            parameters = {name.removeprefix("reducers."): p for name, p in reduced.named_parameters()}
        found = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        gradients.append({"input": inputs.grad, **found})
        reduced.zero_grad()
    assert set(gradients[0]) == set(gradients[1])
    assert len(gradients[0]) > 20
    assert set(own) <= set(gradients[0])
    largest = max(gradient.abs().max().item() for gradient in gradients[0].values())
    for name, expected in gradients[0].items():
        scale = max(expected.abs().max().item(), 1e-6 * largest)
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=1e-7 * scale, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_parameter(family):
    method = "evit" if family in ("deit", "dinov2-registers", "siglip", "beit3") else "tome"
    model = model_of(family)
    _same_gradients(model, {"method": method, **SCHEDULE}, tiny.images(model, dtype=torch.float64))


@pytest.mark.parametrize("arguments", RUNS)
@pytest.mark.parametrize("family", ["deit", "deit-distilled", "dinov2-registers", "avg-with-prefix"])
def test_gradients_of_every_method(family, arguments):
    model = model_of(family)
    if arguments["method"] in ("ats", "dynamicvit") and not tiny.can_sample(model):
        pytest.skip("this pooling cannot leave out tokens that do not count, which other tests show is said")
    _same_gradients(model, arguments, tiny.images(model, dtype=torch.float64))


def test_the_families_are_what_they_are_called():
    """Should timm change one of them, these tests would no longer test what they say."""
    assert _build("deit-distilled").num_prefix_tokens == 2
    assert _build("dinov2-registers").num_prefix_tokens == 5
    assert _build("registers-gap").cls_token is None
    assert _build("siglip").num_prefix_tokens == 0
    assert _build("siglip").attn_pool is not None
    assert _build("deit3").blocks[0].ls1.gamma.std() > 0.1
    assert not isinstance(_build("clip").norm_pre, nn.Identity)
    assert not isinstance(_build("beit3").blocks[0].attn.norm, nn.Identity)
    assert type(_build("hybrid").patch_embed) is not timm.layers.PatchEmbed
    assert _build("not-square").patch_embed.grid_size == (3, 6)
