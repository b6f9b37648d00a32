"""The timm integration: everything around the numbers, which test_golden.py and test_families.py hold."""

import ast
import copy
import inspect
import io
import math
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import LayerScale
from torch import nn

import fastreduce
import fastreduce.plain
from bench.proof import tiny
from fastreduce.plain import FreeSlice, PlainModel
from fastreduce.tokens import Tokens
from tests.helpers.cases import quick

SCHEDULE = {"keep_rate": 0.5, "at": tiny.AT}
METHODS = (*fastreduce.REDUCERS, "evit-normalized", "tome-exact")
RUNS = [pytest.param({**tiny.METHODS[name], **SCHEDULE}, id=name) for name in METHODS]
FOUR = [case for case in RUNS if case.id in ("topk", "evit", "tome", "radial")]
LEARNED = [case for case in RUNS if case.id in ("dynamicvit", "dpcknn", "sit", "patchmerger", "sinkhorn")]
PLAIN_NAMES = [case for case in RUNS if "-" not in case.id]


VERSION = f"timm {timm.__version__}"


def _takes(method, option):
    return option in inspect.signature(getattr(timm.models.VisionTransformer, method)).parameters


def _pools(pool):
    """Return whether this version of timm has a pooling."""
    try:
        tiny.build(global_pool=pool)
    except AssertionError:
        return False
    return True


POOLS = [pool for pool in ("token", "avg", "avgmax", "max", "map", "") if _pools(pool)]  # the lowest version has four
only_with_checkpoints = pytest.mark.skipif(
    not hasattr(timm.layers, "set_reentrant_ckpt"), reason=f"{VERSION} has reentrant checkpoints alone"
)


def run(model, images=None):
    with torch.no_grad():
        return model(tiny.images(model) if images is None else images)


def assert_same(model, before):
    """Check that the model has the very same blocks, attributes and weights as when ``snapshot`` was taken."""
    modules, attributes, state = before
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    assert set(vars(model)) == attributes
    now = model.state_dict()
    assert list(now) == list(state)
    assert all(torch.equal(now[key], value) for key, value in state.items())


def snapshot(model):
    modules = [(name, id(module)) for name, module in model.named_modules()]
    return modules, set(vars(model)), copy.deepcopy(model.state_dict())


class TestPatchAndUnpatch:
    @pytest.mark.parametrize("arguments", RUNS)
    def test_unpatch_restores_the_very_same_model(self, arguments):
        model = tiny.build()
        before, expected = snapshot(model), run(model)
        parameters = dict(model.named_parameters())
        assert fastreduce.patch(model, **arguments) is model
        assert not torch.equal(run(model), expected)
        assert [key for key in model.state_dict() if not key.startswith("reducers.")] == list(before[2])
        assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
        assert fastreduce.unpatch(model) is model
        assert_same(model, before)
        assert torch.equal(run(model), expected)

    @pytest.mark.parametrize("arguments", FOUR)
    def test_state_dicts_go_both_ways(self, arguments):
        source, target = fastreduce.patch(tiny.build(seed=1), **arguments), tiny.build(seed=2)
        target.load_state_dict(source.state_dict(), strict=True)
        fastreduce.patch(target, **arguments)
        assert torch.equal(run(target), run(source))
        plain = tiny.build(seed=3)
        source.load_state_dict(plain.state_dict(), strict=True)
        assert torch.equal(run(fastreduce.unpatch(source)), run(plain))

    @pytest.mark.parametrize("arguments", LEARNED)
    def test_learned_layers_are_part_of_the_model(self, arguments):
        """Learned layers are in the state dict under ``reducers.``, have the model's dtype and mode, and are saved."""
        model = fastreduce.patch(tiny.build().bfloat16().train(), **arguments)
        own = {name: p for name, p in model.named_parameters() if name.startswith("reducers.")}
        assert len(own) >= 3
        assert all(parameter.dtype == torch.bfloat16 and parameter.requires_grad for parameter in own.values())
        assert all(module.training for module in model.modules())
        source = tiny.reduced_and_plain(tiny.build(), **arguments)[0]
        target = fastreduce.patch(tiny.build(seed=4), **arguments)
        assert not torch.equal(run(target), run(source))
        target.load_state_dict(source.state_dict(), strict=True)
        assert torch.equal(run(target), run(source))
        with pytest.raises(RuntimeError, match=r"reducers\."):
            tiny.build().load_state_dict(source.state_dict(), strict=True)

    def test_patching_twice(self):
        model = fastreduce.patch(tiny.build(), "topk", **SCHEDULE)
        before, expected = snapshot(model), run(model)
        with pytest.raises(ValueError, match=r"already patched with 'topk'.*unpatch"):
            fastreduce.patch(model, "evit", **SCHEDULE)
        assert_same(model, before)
        assert torch.equal(run(model), expected)
        fastreduce.patch(fastreduce.unpatch(model), "evit", **SCHEDULE)

    def test_what_is_not_patched(self):
        for call in (fastreduce.unpatch, fastreduce.reduced_counts, lambda model: fastreduce.record(model).__enter__()):
            with pytest.raises(ValueError, match="not patched"):
                call(tiny.build())

    @pytest.mark.parametrize("arguments", PLAIN_NAMES)
    def test_deepcopy_is_independent(self, arguments):
        model = fastreduce.patch(tiny.build(), **arguments)
        twin = copy.deepcopy(model)
        expected = run(model)
        assert torch.equal(run(twin), expected)
        tiny.randomize(twin, seed=5)
        changed = run(twin)
        assert not torch.equal(changed, expected)
        assert torch.equal(run(model), expected)
        twin.eval().forward_intermediates(tiny.images(twin))  # that of the copy, not of the original
        assert twin.forward_intermediates.model is twin
        own = {id(module) for module in model.modules()}
        assert not own & {id(module) for module in fastreduce.unpatch(twin).modules()}
        if not hasattr(model, "reducers"):  # else unpatching took the method's own layers away
            assert torch.equal(run(fastreduce.patch(twin, **arguments)), changed)

    @pytest.mark.parametrize("arguments", PLAIN_NAMES)
    def test_whole_models_can_be_saved(self, arguments):
        model = fastreduce.patch(tiny.build(), **arguments)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert torch.equal(run(loaded), run(model))
        before = run(fastreduce.unpatch(model))
        assert torch.equal(run(fastreduce.unpatch(loaded)), before)

    def test_what_is_replaced_meanwhile_stays_replaced(self):
        model = tiny.build()
        mlp, attn = model.blocks[3].mlp, model.blocks[2].attn
        fastreduce.patch(model, "topk", **SCHEDULE)
        model.blocks[3].mlp = replacement = nn.Identity()
        model.blocks[2].attn.proj = projection = nn.Linear(48, 48)
        model.blocks[0].ls1 = scale = LayerScale(48)
        patched = run(model)
        fastreduce.unpatch(model)
        assert model.blocks[3].mlp is replacement
        assert model.blocks[2].attn is attn
        assert attn.proj is projection
        assert model.blocks[0].ls1 is scale
        model.blocks[3].mlp = mlp
        assert not torch.equal(run(fastreduce.patch(model, "topk", **SCHEDULE)), patched)

    def test_modes_follow(self):
        model = fastreduce.patch(tiny.build(drop_path_rate=0.2).train(), "tome", **SCHEDULE)
        assert all(module.training for module in model.modules())
        model.eval()
        assert not any(module.training for module in model.modules())
        fastreduce.unpatch(model)
        assert not any(module.training for module in model.modules())
        assert all(module.training for module in model.train().modules())

    @pytest.mark.parametrize("arguments", PLAIN_NAMES)
    def test_double_and_back(self, arguments):
        """Conversions reach whatever the reducer holds."""
        torch.manual_seed(0)  # of layers that a method adds: random scores may nearly tie
        model = fastreduce.patch(tiny.build(), **arguments)
        expected, images = run(model), tiny.images(model)
        torch.testing.assert_close(run(model.double(), images.double()).float(), expected, rtol=1e-4, atol=1e-4)
        meta = copy.deepcopy(model).to("meta")
        assert run(meta, images.to("meta").double()).shape == expected.shape

    def test_at_single_block_and_default(self):
        assert fastreduce.reduced_counts(fastreduce.patch(tiny.build(), "topk", keep_rate=0.5, at=2)) == [8]
        assert fastreduce.reduced_counts(fastreduce.patch(tiny.build(), "topk")) == [11, 7, 5]  # 0.7 at 1, 2, 3
        assert fastreduce.reduced_counts(fastreduce.patch(tiny.build(), "topk", keep=5, at=2)) == [5]
        deep = fastreduce.patch(tiny.build(depth=12), "topk", keep_rate=0.5)
        assert deep.reducers.blocks == (3, 6, 9)


def _bad(identifier, error, words, **arguments):
    return pytest.param(arguments, error, words, id=identifier)


AT2 = {"at": (1, 2)}
BAD = [
    _bad("method", ValueError, ["'topq'", "'topk'"], method="topq"),
    _bad("method-unlike", ValueError, ["'nothing'", "evit", "tome"], method="nothing"),
    _bad("option", TypeError, ["'topk'", "'normalize'"], method="topk", normalize=True),
    _bad("option-inside", TypeError, ["'topk'", "'shape'"], method="topk", shape=3),
    _bad("option-schedule", TypeError, ["'tome'", "'schedule'"], method="tome", schedule="stages"),
    _bad("option-of-evit", TypeError, ["'evit'", "'rounds'", "normalize"], method="evit", rounds="exact"),
    _bad("backend", ValueError, ["'cuda'", "'triton'"], method="topk", backend="cuda"),
    _bad("rate-zero", ValueError, ["0.0", "(0, 1]"], method="topk", keep_rate=0.0),
    _bad("rate-negative", ValueError, ["-0.5", "(0, 1]"], method="evit", keep_rate=-0.5),
    _bad("rate-large", ValueError, ["1.5", "(0, 1]"], method="tome", keep_rate=1.5),
    _bad("rate-nan", ValueError, ["nan", "(0, 1]"], method="topk", keep_rate=math.nan),
    _bad("rate-text", TypeError, ["'half'"], method="topk", keep_rate="half"),
    _bad("rate-bool", TypeError, ["True"], method="topk", keep_rate=True),
    _bad("rate-in-list", ValueError, ["2.0"], method="topk", keep_rate=(0.5, 2.0), **AT2),
    _bad("rates-few", ValueError, ["2 blocks", "(0.5,)"], method="topk", keep_rate=(0.5,), **AT2),
    _bad("rates-many", ValueError, ["2 blocks", "(0.9, 0.5, 0.2)"], method="evit", keep_rate=(0.9, 0.5, 0.2), **AT2),
    _bad("rates-rise", ValueError, ["stage 1", "12", "8"], method="topk", keep_rate=(0.5, 0.75), **AT2),
    _bad("rate-empties", ValueError, ["stage 2", "0 of 16"], method="topk", keep_rate=0.3),
    _bad("keep-large", ValueError, ["17", "16"], method="topk", keep=(17, 3), **AT2),
    _bad("keep-zero", ValueError, ["stage 1", "0 of 16"], method="evit", keep=(8, 0), **AT2),
    _bad("keep-negative", ValueError, ["-2"], method="tome", keep=(8, -2), **AT2),
    _bad("keep-float", TypeError, ["8.0"], method="topk", keep=(8.0, 4), **AT2),
    _bad("keep-scalar-float", TypeError, ["8.0"], method="topk", keep=8.0, at=1),
    _bad("keep-few", ValueError, ["2", "(8,)"], method="topk", keep=(8,), **AT2),
    _bad("keep-one-number", ValueError, ["2", "8"], method="topk", keep=8, **AT2),
    _bad("keep-rises", ValueError, ["stage 1", "9", "8"], method="topk", keep=(8, 9), **AT2),
    _bad("both", ValueError, ["0.5", "(8, 4)"], method="topk", keep_rate=0.5, keep=(8, 4), **AT2),
    _bad("at-range", ValueError, ["4", "0 and 3"], method="topk", at=(1, 4)),
    _bad("at-negative", ValueError, ["-1", "0 and 3"], method="topk", at=-1),
    _bad("at-unsorted", ValueError, ["(2, 1)", "increasing"], method="topk", at=(2, 1)),
    _bad("at-twice", ValueError, ["(2, 2)", "increasing"], method="tome", at=(2, 2)),
    _bad("at-empty", ValueError, ["empty"], method="topk", at=()),
    _bad("at-float", TypeError, ["1.5"], method="topk", at=(1.5,)),
    _bad("at-scalar-float", TypeError, ["1.5"], method="topk", at=1.5),
    _bad("at-text", TypeError, ["'12'"], method="topk", at="12"),
    _bad("at-bool", TypeError, ["True"], method="topk", at=(True,)),
    _bad("r-negative", ValueError, ["-3"], method="tome", r=-3),
    _bad("r-float", TypeError, ["2.5"], method="tome", r=(2.5, 1), **AT2),
    _bad("r-scalar-float", TypeError, ["2.5"], method="tome", r=2.5),
    _bad("r-length", ValueError, ["2", "(1, 1, 1)"], method="tome", r=(1, 1, 1), **AT2),
    _bad("r-and-rate", ValueError, ["r=2", "0.5"], method="tome", r=2, keep_rate=0.5),
    _bad("rounds", ValueError, ["'twice'", "'official'", "'exact'"], method="tome", rounds="twice"),
    _bad("norm", ValueError, ["'l3'", "'linf'"], method="radial", norm="l3"),
    _bad("schedule", ValueError, ["'all'", "'stages'"], method="radial", schedule="all"),
    _bad("contiguous-rate", ValueError, ["0.5"], method="radial", schedule="contiguous", keep_rate=0.5),
    _bad(
        "radius-empties",
        ValueError,
        ["stage 2", "no patch", "0.715"],
        method="radial",
        norm="l2",
        min_radius=0.01,
        at=(1, 3),
    ),
    _bad("radius-nan", ValueError, ["nan"], method="radial", min_radius=math.nan),
    _bad("radius-text", TypeError, ["'far'"], method="radial", min_radius="far"),
    _bad("radius-of-stages", ValueError, ["2.0", "contiguous"], method="radial", min_radius=2.0, keep_rate=0.5),
    _bad("normalize-text", TypeError, ["'yes'"], method="evit", normalize="yes"),
    _bad("channels-inside", TypeError, ["'dpcknn'", "'channels'"], method="dpcknn", channels=3),
    _bad("trim-number", TypeError, ["1"], method="ats", trim=1),
    _bad("generator-seed", TypeError, ["7"], method="dynamicvit", generator=7),
    _bad("medoids-first-block", ValueError, ["block 0", "equal_weight"], method="kmedoids", at=(0, 2)),
    _bad("medoids-iters", ValueError, ["-1"], method="kmedoids", iters=-1),
    _bad("medoids-iters-float", TypeError, ["1.5"], method="kmedoids", iters=1.5),
    _bad("medoids-cost", ValueError, ["'own'", "'members'"], method="kmedoids", cost="own"),
    _bad("medoids-equal", TypeError, ["1"], method="kmedoids", equal_weight=1),
    _bad("medoids-first", ValueError, ["16 tokens", "16"], method="kmedoids", equal_weight=True, first=16),
    _bad(
        "medoids-first-of-a-stage",
        ValueError,
        ["8 tokens", "got 8"],
        method="kmedoids",
        equal_weight=True,
        first=(15, 8),
        keep=(8, 4),
        **AT2,
    ),
    _bad("medoids-first-few", ValueError, ["2 blocks", "(1,)"], method="kmedoids", first=(1,), **AT2),
    _bad("medoids-first-negative", ValueError, ["-1"], method="kmedoids", first=-1),
    _bad("medoids-first-text", TypeError, ["'a'"], method="kmedoids", first="a"),
    _bad("neighbors-none", ValueError, ["0"], method="dpcknn", k_neighbors=0),
    _bad("neighbors-float", TypeError, ["5.0"], method="dpcknn", k_neighbors=5.0),
    _bad("noise-number", TypeError, ["1e-06"], method="dpcknn", noise=1e-6),
    _bad("dpc-equal", TypeError, ["None"], method="dpcknn", equal_weight=None),
    _bad("scaled-text", TypeError, ["'yes'"], method="patchmerger", scaled="yes"),
    _bad("eps-zero", ValueError, ["0"], method="sinkhorn", eps=0),
    _bad("eps-infinite", ValueError, ["inf"], method="sinkhorn", eps=math.inf),
    _bad("eps-nan", ValueError, ["nan"], method="sinkhorn", eps=math.nan),
    _bad("eps-text", TypeError, ["'1'"], method="sinkhorn", eps="1"),
    _bad("sinkhorn-iters", ValueError, ["0"], method="sinkhorn", iters=0),
    _bad("sinkhorn-iters-float", TypeError, ["3.0"], method="sinkhorn", iters=3.0),
    _bad("gradient", ValueError, ["'proper'", "'exact'"], method="sinkhorn", gradient="proper"),
    _bad("more-clusters-than-tokens", ValueError, ["17", "16"], method="sit", keep=(17, 3), **AT2),
]


@pytest.mark.parametrize(("arguments", "error", "words"), BAD)
def test_bad_arguments(arguments, error, words):
    model = tiny.build()
    before, expected = snapshot(model), run(model)
    with pytest.raises(error) as raised:
        fastreduce.patch(model, **arguments)
    assert type(raised.value) is error
    message = str(raised.value)
    assert all(word in message for word in words), message
    assert_same(model, before)
    assert torch.equal(run(model), expected)


class _OwnForward(timm.models.vision_transformer.VisionTransformer):
    def forward_features(self, x):
        return super().forward_features(x)


REFUSED = [
    ("swin_tiny_patch4_window7_224", {"img_size": 224}, TypeError, "SwinTransformer cannot be reduced: its windows"),
    ("samvit_base_patch16_224", {}, TypeError, "VisionTransformerSAM cannot be reduced"),
    ("xcit_nano_12_p8_224", {}, TypeError, "Xcit cannot be reduced: its attention is over channels"),
    ("resnet18", None, TypeError, "ResNet cannot be reduced: it is a ResNet of timm.models.resnet"),
]


@pytest.mark.parametrize(("name", "changes", "error", "words"), REFUSED, ids=[case[0] for case in REFUSED])
def test_refused_models(name, changes, error, words):
    if changes is None:
        model = timm.create_model(name)
    elif name.startswith("swin"):
        model = timm.create_model(name, embed_dim=12, num_classes=7)
    else:
        model = timm.create_model(name, **{**tiny.SMALL, "img_size": 64, **changes})
    before = snapshot(model)
    with pytest.raises(error, match=words):
        fastreduce.patch(model, "topk", keep_rate=0.5)
    assert_same(model, before)


def test_other_refusals():
    for model, error, words in (
        (torch.compile(tiny.build(), backend="eager"), ValueError, "compiled already.*patch first"),
        (_OwnForward(img_size=64, **tiny.SMALL), TypeError, "forward_features of its own"),
        (nn.Linear(3, 3), TypeError, "Linear cannot be reduced"),
        (
            timm.create_model("vit_tiny_patch16_224", features_only=True, img_size=64, depth=4),
            TypeError,
            "FeatureGetter",
        ),
    ):
        with pytest.raises(error, match=words):
            fastreduce.patch(model, "topk", keep_rate=0.5)
    dropping = tiny.build(patch_drop_rate=0.25)
    with pytest.raises(ValueError, match="patch_drop_rate"):
        fastreduce.patch(dropping, "radial", keep_rate=0.5)
    assert not hasattr(dropping, "reducers")


class TestBackends:
    def test_triton_never_falls_back(self):
        model = fastreduce.patch(tiny.build(), "topk", backend="triton", **SCHEDULE)
        with pytest.raises(RuntimeError, match=r"'triton' was asked for, but .*CPU"):
            run(model)

    @pytest.mark.parametrize("arguments", FOUR)
    def test_context_and_argument_agree(self, arguments):
        expected = run(fastreduce.patch(tiny.build(), **arguments))
        assert torch.equal(run(fastreduce.patch(tiny.build(), backend="reference", **arguments)), expected)
        model = fastreduce.patch(tiny.build(), **arguments)
        with fastreduce.backend("reference"):
            assert torch.equal(run(model), expected)
        with fastreduce.backend("triton"), pytest.raises(RuntimeError, match="CPU"):
            run(model)
        assert torch.equal(run(model), expected)


class TestDeterminism:
    @pytest.mark.parametrize("arguments", RUNS)
    def test_same_bits_every_time(self, arguments):
        model = fastreduce.patch(tiny.build(), **arguments)
        images = tiny.images(model, batch=5)
        expected = run(model, images)
        assert all(torch.equal(run(model, images), expected) for _ in range(3))

    @pytest.mark.parametrize("arguments", RUNS)
    def test_an_image_does_not_depend_on_its_batch(self, arguments):
        """Up to the rounding of the CPU's own matrix products, which block by batch size."""
        model = fastreduce.patch(tiny.build().double(), **arguments)
        images = tiny.images(model, batch=5, dtype=torch.float64)
        together = run(model, images)
        alone = torch.cat([run(model, image.unsqueeze(0)) for image in images])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-11)

    @pytest.mark.parametrize("arguments", FOUR)
    def test_empty_batch(self, arguments):
        model = fastreduce.patch(tiny.build(), **arguments)
        assert run(model, torch.empty(0, 3, 64, 64)).shape == (0, 7)

    @pytest.mark.parametrize("arguments", FOUR)
    def test_not_a_number_does_not_crash(self, arguments):
        model = fastreduce.patch(tiny.build(), **arguments)
        images = tiny.images(model)
        expected = run(model, images)
        spoiled = images.clone()
        spoiled[0] = math.nan
        logits = run(model, spoiled)
        assert logits[0].isnan().all()
        torch.testing.assert_close(logits[1], expected[1], rtol=1e-5, atol=1e-5)


class TestRecord:
    @pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
    @pytest.mark.parametrize("arguments", RUNS)
    def test_contents_are_consistent(self, arguments, name):
        model = fastreduce.patch(tiny.build(name, img_size=112), **arguments)
        patches, present = model.patch_embed.num_patches, model.patch_embed.num_patches
        with fastreduce.record(model) as seen:
            run(model)
        assert [stage.block for stage in seen.stages] == list(tiny.AT)
        soft, ragged = model.reducers.name in tiny.NEVER_IDLE[1:], model.reducers.ragged
        for stage, count in zip(seen.stages, fastreduce.reduced_counts(model), strict=True):
            assert stage.num_out <= count if ragged else stage.num_out == count
        sizes_before, before = torch.ones(2, patches, dtype=torch.int64), None
        for stage in seen.stages:
            assert stage.num_in == present
            present = stage.num_out
            assert stage.slot.shape == (2, stage.num_in)
            assert stage.patch_slot.shape == (2, patches)
            assert stage.sizes.shape == (2, stage.num_out)
            assert stage.slot.min() >= -1
            assert stage.slot.max() < stage.num_out
            # Sizes: of the patches, and of the tokens that came in.
            kept = stage.patch_slot >= 0
            assert torch.equal(stage.sizes.sum(1), kept.sum(1))
            spare = torch.zeros(2, stage.num_out + 1, dtype=torch.int64).scatter_add(1, stage.slot + 1, sizes_before)
            assert torch.equal(spare[:, 1:], stage.sizes)
            sizes_before = stage.sizes
            if soft or arguments["method"] in ("tome", "evit", "kmedoids", "dpcknn"):
                assert (stage.sizes.sum(1) == patches).all()
            assert stage.merges == (arguments["method"] in ("tome", "kmedoids", "dpcknn"))
            if soft:
                weights = stage.weights
                assert weights.shape == (2, stage.num_in, stage.num_out)
                total = weights.sum(2 if arguments["method"] == "sinkhorn" else 1)
                torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-4, atol=1e-4)
                assert torch.equal(stage.slot, weights.argmax(2))
                strongest = weights.argmax(1)
                assert torch.equal(stage.sources, strongest if before is None else before.gather(1, strongest))
                before = stage.sources
            if soft or arguments["method"] == "tome":
                assert stage.kept is None
                assert stage.kept_patches is None
                assert soft or (stage.sizes >= 1).all()
                continue
            assert stage.weights is None
            assert torch.equal(stage.sources, stage.kept_patches)
            assert stage.kept.shape == stage.kept_patches.shape == (2, stage.num_out)
            fused = arguments["method"] == "evit"
            real = stage.kept[:, :-1] if fused else stage.kept
            order = torch.arange(stage.num_out).expand(2, -1)
            if ragged:
                count = (real >= 0).sum(1, keepdim=True)
                assert torch.equal(real >= 0, order < count)  # padding at the end
                ascending = real.masked_fill(real < 0, stage.num_in)
                assert torch.equal(ascending.sort(1)[0], ascending)
                assert count.max() == stage.num_out
                assert torch.equal(stage.sizes, (real >= 0).long())
            else:
                assert (real >= 0).all()
            assert all(len(set(row) - {-1}) == len([n for n in row if n >= 0]) for row in real.tolist())
            found = stage.slot.gather(1, real.clamp_min(0))
            assert torch.equal(found[real >= 0], order[:, : real.shape[1]][real >= 0])
            if fused:
                assert (stage.kept[:, -1] == -1).all()
                assert ((stage.slot == stage.num_out - 1).sum(1) == stage.num_in - stage.num_out + 1).all()
            single = stage.kept_patches >= 0
            found = stage.patch_slot.gather(1, stage.kept_patches.clamp_min(0))
            assert torch.equal(found[single], order[single])

    def test_scores_decide_what_is_kept(self):
        """The first stage against the attention matrix itself."""
        model = tiny.build()
        images = tiny.images(model)
        with torch.no_grad():
            x = model.blocks[0](model._pos_embed(model.patch_embed(images)))
            block = model.blocks[1]
            q, k, _ = block.attn.qkv(block.norm1(x)).view(2, 17, 3, 3, 16).permute(2, 0, 3, 1, 4)
            scores = (q @ k.transpose(2, 3) / 4).softmax(-1)[:, :, 0, 1:].mean(1)
        fastreduce.patch(model, "topk", **SCHEDULE)
        with fastreduce.record(model) as seen:
            run(model, images)
        assert torch.equal(seen.stages[0].kept, scores.argsort(1, descending=True)[:, :8])

    def test_only_the_latest_pass_and_only_inside(self):
        model = fastreduce.patch(tiny.build(), "topk", **SCHEDULE)
        with fastreduce.record(model) as seen:
            run(model, tiny.images(model, batch=3))
            run(model, tiny.images(model, batch=2))
        run(model, tiny.images(model, batch=5))
        assert len(seen.stages) == 3
        assert all(len(stage.slot) == 2 for stage in seen.stages)

    def test_records_can_be_nested(self):
        model = fastreduce.patch(tiny.build(), "topk", **SCHEDULE)
        with fastreduce.record(model) as outer:
            with fastreduce.record(model) as inner:
                run(model)
            run(model, tiny.images(model, batch=3))
        assert len(inner.stages) == len(outer.stages) == 3
        assert len(inner.stages[0].slot) == 2
        assert len(outer.stages[0].slot) == 3

    def test_stages_that_reduce_nothing(self):
        model = fastreduce.patch(tiny.build(), "topk", keep=(8, 8, 4), at=tiny.AT)
        with fastreduce.record(model) as seen:
            run(model)
        assert [(stage.block, stage.num_in, stage.num_out) for stage in seen.stages] == [(1, 16, 8), (3, 8, 4)]
        whole = fastreduce.patch(tiny.build(), "topk", keep_rate=1.0, at=tiny.AT)
        with fastreduce.record(whole) as seen:
            run(whole)
        assert seen.stages == []

    def test_a_pass_that_reduces_nothing_leaves_nothing_of_the_one_before(self):
        """``keep`` counts: a smaller image has no more tokens than that."""
        model = fastreduce.patch(tiny.build(dynamic_img_size=True), "topk", keep=(8, 6, 4), at=tiny.AT)
        with fastreduce.record(model) as seen:
            run(model)
            run(model, torch.zeros(1, 3, 32, 32))
        assert seen.stages == []

    @pytest.mark.parametrize("arguments", RUNS)
    def test_unmerge(self, arguments):
        model = fastreduce.patch(tiny.build(), **arguments)
        with fastreduce.record(model) as seen:
            run(model)
        for stage in seen.stages:
            features = torch.randn(2, stage.num_out, 5)
            full = stage.unmerge(features, fill="zero")
            assert full.shape == (2, 16, 5)
            for image in range(2):
                for patch, slot in enumerate(stage.patch_slot[image].tolist()):
                    expected = torch.zeros(5) if slot < 0 else features[image, slot]
                    assert torch.equal(full[image, patch], expected)
            prefix = torch.randn(2, 1, 5)
            both = stage.unmerge(torch.cat([prefix, features], 1), fill="zero")
            assert torch.equal(both, torch.cat([prefix, full], 1))
            with pytest.raises(ValueError, match=f"{stage.num_out} tokens.*got {stage.num_out + 2}"):
                stage.unmerge(torch.zeros(2, stage.num_out + 2, 5))
            with pytest.raises(ValueError, match="48 channels, got features of 5: give fill='zero'"):
                stage.unmerge(features)
            with pytest.raises(ValueError, match="'last' or 'zero', got 'mean'"):
                stage.unmerge(features, fill="mean")

    @only_with_checkpoints
    def test_gradient_checkpointing_adds_nothing(self):
        """Checkpointing runs blocks again in the backward pass."""
        model = fastreduce.patch(tiny.build(), "topk", **SCHEDULE).train()
        model.set_grad_checkpointing()
        with fastreduce.record(model) as seen:
            logits = model(tiny.images(model))
            before = list(seen.stages)
            logits.sum().backward()
        assert [stage.block for stage in before] == list(tiny.AT)
        assert seen.stages == before

    def test_it_survives_an_error(self):
        model = fastreduce.patch(tiny.build(), "topk", **SCHEDULE)
        with pytest.raises(RuntimeError), fastreduce.record(model):
            run(model, torch.zeros(1, 5, 64, 64))
        assert all(getattr(block, "recorder", None) is None for block in model.blocks)


class TestCounts:
    @pytest.mark.parametrize(
        "arguments",
        [
            *(case.values[0] for case in RUNS),
            {"method": "topk", "keep": (12, 5), "at": (0, 3)},
            {"method": "evit", "keep": (12, 12), "at": (1, 3)},
            {"method": "tome", "r": 3, "at": (0, 1, 2, 3)},
            {"method": "tome", "r": (9, 0, 4), "at": tiny.AT},
            {"method": "tome", "r": (14,), "at": 2, "rounds": "exact"},
            {"method": "tome", "keep_rate": 0.25, "at": (1, 3)},
            {"method": "tome", "keep_rate": 0.25, "at": (1, 3), "rounds": "exact"},
            {"method": "radial", "norm": "l1", "at": (0, 2)},
            {"method": "radial", "norm": "linf", "keep": (9, 4), "at": (0, 2)},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("changes", [{}, {"reg_tokens": 1}, {"class_token": False, "global_pool": "avg"}], ids=str)
    def test_reduced_counts_are_the_real_ones(self, arguments, changes):
        model = tiny.build(**changes)
        if arguments["method"] == "ats" and model.cls_token is None:
            with pytest.raises(ValueError, match="class token"):
                fastreduce.patch(model, **arguments)
            return
        model, plain = tiny.reduced_and_plain(model, **arguments)
        expected = run(plain, tiny.images(model))
        outputs = {}
        for index, block in enumerate(model.blocks):
            block.register_forward_hook(lambda module, inputs, output, index=index: outputs.update({index: output}))
        torch.testing.assert_close(run(model), expected, rtol=1e-3, atol=1e-3)
        prefix = model.num_prefix_tokens
        for block, count in zip(model.reducers.blocks, fastreduce.reduced_counts(model), strict=True):
            if isinstance(outputs[block], Tokens):
                there = outputs[block].num_patches
            elif model.global_pool == "token":
                there = outputs[block].shape[1] - prefix
            else:
                continue
            assert there == count or (arguments["method"] == "ats" and there < count)

    def test_r_acts_in_every_block_by_default(self):
        model = fastreduce.patch(tiny.build(), "tome", r=3)
        assert model.reducers.blocks == (0, 1, 2, 3)
        assert fastreduce.reduced_counts(model) == [13, 10, 7, 4]

    def test_exact_rounds_reach_the_count(self):
        arguments = {"keep_rate": 0.25, "at": (1, 3)}
        assert fastreduce.reduced_counts(fastreduce.patch(tiny.build(), "tome", **arguments)) == [8, 5]
        exact = fastreduce.patch(tiny.build(), "tome", rounds="exact", **arguments)
        assert fastreduce.reduced_counts(exact) == [4, 1]


class TestForwards:
    """The ways in which timm and its users call a model."""

    @pytest.mark.parametrize("pool", POOLS)
    @pytest.mark.parametrize("arguments", FOUR)
    def test_features_and_head(self, arguments, pool):
        model = fastreduce.patch(tiny.build(global_pool=pool), **arguments)
        images = tiny.images(model)
        with torch.no_grad():
            features = model.forward_features(images)
            torch.testing.assert_close(model.forward_head(features), run(model, images))
            pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == ((2, 48) if pool else features.shape)
        left = fastreduce.reduced_counts(model)[-1]
        dense = arguments["method"] in ("tome", "evit") and pool not in ("token", "")
        assert features.shape == (2, 1 + (16 if dense else left), 48)

    def test_merged_tokens_are_pooled_by_size(self):
        model = fastreduce.patch(tiny.build(global_pool="avg"), "tome", **SCHEDULE)
        seen_tokens = []
        model.blocks[2].register_forward_hook(lambda module, inputs, output: seen_tokens.append(output))
        with torch.no_grad(), fastreduce.record(model) as seen:
            features = model.forward_features(tiny.images(model))
        last = seen.stages[-1]
        assert seen_tokens[0].sizes.sum(1).tolist() == [17.0, 17.0]
        for image in range(2):
            for token in range(last.num_out):
                copies = features[image, 1:][last.patch_slot[image] == token]
                assert len(copies) == last.sizes[image, token]
                assert torch.equal(copies, copies[:1].expand_as(copies))

    @pytest.mark.parametrize("arguments", FOUR)
    @pytest.mark.parametrize("at", [0, 2, 3, (0, 3)])
    def test_blocks_one_by_one(self, arguments, at):
        model = fastreduce.patch(tiny.build(), **{**arguments, "at": at})
        images = tiny.images(model)
        with torch.no_grad():
            x = model._pos_embed(model.patch_embed(images))
            for block in model.blocks:
                x = block(x)
            assert torch.equal(model.forward_head(model.norm(x)), run(model, images))

    def test_tokens_explain_themselves(self):
        model = fastreduce.patch(tiny.build(), "topk", **SCHEDULE)
        with torch.no_grad():
            x = model.blocks[0](model._pos_embed(model.patch_embed(tiny.images(model))))
            tokens = model.blocks[1](x)
        assert isinstance(tokens, Tokens)
        for use in (lambda: tokens[:, 0], lambda: torch.relu(tokens), lambda: F.linear(tokens, torch.zeros(1, 48))):
            with pytest.raises(TypeError, match=r"fastreduce\.Tokens"):
                use()
        with pytest.raises(TypeError, match=r"block 2 of a reduced model takes fastreduce\.Tokens"):
            model.blocks[2](x)

    @pytest.mark.skipif(not _takes("forward", "attn_mask"), reason=f"{VERSION} takes no masks")
    @pytest.mark.parametrize("arguments", FOUR)
    def test_masks_are_refused(self, arguments):
        model = fastreduce.patch(tiny.build(), **arguments)
        images, mask = tiny.images(model), torch.zeros(17, 17)
        for call in (
            lambda: model(images, attn_mask=mask),
            lambda: model(images, is_causal=True),
            lambda: model.forward_features(images, attn_mask=mask),
            lambda: model.forward_intermediates(images, attn_mask=mask),
            lambda: model.forward_intermediates(images, is_causal=True),
            lambda: model.get_intermediate_layers(images, attn_mask=mask),
        ):
            with pytest.raises(ValueError, match="attn_mask"):
                call()

    def test_blocks_that_are_cut_off(self):
        """Timm cuts models short this way; the block that is last then gives the tensor."""
        model = fastreduce.patch(tiny.build(), "topk", **SCHEDULE)
        images = tiny.images(model)
        expected = model.forward_intermediates(images, indices=[1], output_fmt="NLC", intermediates_only=True)[0]
        original = model.blocks[1]._site.original
        model.prune_intermediate_layers([1])
        assert model.forward_features(images).shape == (2, 9, 48)
        found = model.forward_intermediates(images, indices=[1], output_fmt="NLC", intermediates_only=True)[0]
        assert torch.equal(found, expected)
        assert len(fastreduce.unpatch(model).blocks) == 2
        assert model.blocks[1] is original

    def test_slices_explain_themselves(self):
        model = fastreduce.patch(tiny.build(), "topk", **SCHEDULE)
        x = model._pos_embed(model.patch_embed(tiny.images(model)))
        assert isinstance(model.blocks[:2](x), Tokens)
        with pytest.raises(TypeError, match=r"block 2 of a reduced model takes fastreduce\.Tokens"):
            model.blocks[2:](x)

    @only_with_checkpoints
    @pytest.mark.parametrize("before", [False, True])
    @pytest.mark.parametrize("arguments", PLAIN_NAMES)
    def test_gradient_checkpointing(self, arguments, before):
        results = []
        for checkpointing in (False, True):
            model = tiny.build()
            if before:
                model.set_grad_checkpointing(checkpointing)
            fastreduce.patch(model, **arguments).train()
            if hasattr(model, "reducers"):
                tiny.randomize(model.reducers)
            if not before:
                model.set_grad_checkpointing(checkpointing)
            images = tiny.images(model).requires_grad_()
            torch.manual_seed(0)
            logits = model(images)
            logits.square().sum().backward()
            gradients = [parameter.grad for parameter in model.parameters()]
            assert all(gradient is not None for gradient in gradients)
            results.append([logits.detach(), images.grad, *gradients])
        for plain, checkpointed in zip(*results, strict=True):
            torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())

    @only_with_checkpoints
    @pytest.mark.parametrize("training", [True, False])
    def test_reentrant_checkpointing_is_refused(self, training):
        """Reentrant checkpointing looks for tensors among a block's inputs, and would give no gradients."""
        model = fastreduce.patch(tiny.build(), "topk", **SCHEDULE).train(training)
        model.set_grad_checkpointing()
        timm.layers.set_reentrant_ckpt(True)
        try:
            with pytest.raises(ValueError, match="set_reentrant_ckpt"):
                model(tiny.images(model))
            if not training:  # our own way of calling the blocks is another
                assert model.forward_intermediates(tiny.images(model))[0].requires_grad
        finally:
            timm.layers.set_reentrant_ckpt(False)
        model(tiny.images(model)).sum().backward()
        assert model.blocks[2].attn.qkv.weight.grad is not None

    @only_with_checkpoints
    def test_checkpointed_intermediates(self):
        model = fastreduce.patch(tiny.build(), "tome", **SCHEDULE).train()
        images = tiny.images(model)
        expected = model.forward_intermediates(images)
        model.set_grad_checkpointing()
        final, intermediates = model.forward_intermediates(images)
        torch.testing.assert_close(final, expected[0])
        torch.testing.assert_close(intermediates, expected[1])
        final.sum().backward()

    @only_with_checkpoints
    def test_checkpointing_saves_memory_in_intermediates(self):
        """``set_grad_checkpointing`` holds for ``forward_intermediates`` too, as in timm."""
        model = fastreduce.patch(tiny.build(), "topk", **SCHEDULE).train()
        model.set_grad_checkpointing()
        calls = []
        model.blocks[2].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
        model.forward_intermediates(tiny.images(model))[0].sum().backward()
        assert len(calls) == 2

    @pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224", "deit3_small_patch16_224"])
    @pytest.mark.parametrize("arguments", FOUR)
    def test_head_can_be_reset(self, arguments, name):
        model = fastreduce.patch(tiny.build(name), **arguments)
        for pool in ("avg", "") if "siglip" in name else [one for one in ("avg", "token", "max") if one in POOLS]:
            model.reset_classifier(5, pool)
            tiny.randomize(model.head)
            model.eval()
            images = tiny.images(model)
            logits = run(model, images)
            assert logits.shape[-1] == 5
            fastreduce.unpatch(model)
            torch.testing.assert_close(logits, run(PlainModel(model, **arguments), images), rtol=1e-3, atol=1e-3)
            fastreduce.patch(model, **arguments)


class TestIntermediates:
    @pytest.mark.parametrize(
        "name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_medium_patch16_gap_240"]
    )
    @pytest.mark.parametrize("arguments", RUNS)
    def test_equals_record_and_unmerge(self, arguments, name):
        """Each block's tokens, brought to the full grid with what ``record`` saw."""
        model = tiny.build(name, img_size=(48, 80) if "16" in name else (42, 70))
        if arguments["method"] == "ats" and not tiny.can_sample(model):
            pytest.skip("ATS is refused for this model, which test_families.py shows")
        fastreduce.patch(model, **arguments)
        images, prefix = tiny.images(model), model.num_prefix_tokens
        outputs = []
        hooks = [block.register_forward_hook(lambda m, i, output: outputs.append(output)) for block in model.blocks]
        with fastreduce.record(model) as seen, torch.no_grad():
            final = model.forward_features(images)
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            result, spatial = model.forward_intermediates(images, output_fmt="NLC")
            both = model.forward_intermediates(images, return_prefix_tokens=True, intermediates_only=True)
            normed = model.forward_intermediates(images, norm=True, output_fmt="NLC", intermediates_only=True)
        assert torch.equal(result, final)
        assert len(spatial) == len(both) == len(normed) == 4
        for index, output in enumerate(outputs):
            rows = output.x if isinstance(output, Tokens) else output
            stages = [stage for stage in seen.stages if stage.block <= index]
            dense = rows.shape[1] - prefix == model.patch_embed.num_patches
            expected = rows if dense else stages[-1].unmerge(rows)
            torch.testing.assert_close(spatial[index], expected[:, prefix:])
            grid, heads = both[index] if prefix else (both[index], None)
            assert grid.shape == (2, 48, 3, 5)
            assert grid.is_contiguous()
            assert torch.equal(grid.flatten(2).transpose(1, 2), spatial[index])
            if prefix:
                torch.testing.assert_close(heads, expected[:, :prefix])
            # Dropped patches are what they were as they entered the block that dropped them.
            here = torch.ones(2, 15, dtype=torch.bool)
            for stage in stages:
                dropped = here & (stage.patch_slot < 0)
                assert torch.equal(spatial[index][dropped], spatial[stage.block - 1][dropped])
                here = stage.patch_slot >= 0
            with torch.no_grad():
                torch.testing.assert_close(normed[index], model.norm(spatial[index]))
        layers = model.reducers.state_dict()
        fastreduce.patch(fastreduce.unpatch(model), fill="zero", **arguments)
        model.reducers.load_state_dict(layers)
        with torch.no_grad():
            zeros = model.forward_intermediates(images, norm=True, output_fmt="NLC", intermediates_only=True)
        if seen.stages:
            here = seen.stages[-1].patch_slot >= 0
            assert (zeros[-1][~here] == 0).all()
            torch.testing.assert_close(zeros[-1][here], normed[-1][here])

    def test_options(self):
        model = fastreduce.patch(tiny.build(), "tome", **SCHEDULE)
        images, calls = tiny.images(model), []
        model.blocks[3].mlp.register_forward_hook(lambda *_: calls.append(1))
        with torch.no_grad():
            final, everything = model.forward_intermediates(images)
            some = model.forward_intermediates(images, indices=[1, 3], intermediates_only=True)
            last = model.forward_intermediates(images, indices=2, intermediates_only=True)
            calls.clear()
            early = model.forward_intermediates(images, indices=[0, 2], stop_early=True, intermediates_only=True)
            assert calls == []
            as_dict = model.forward_intermediates(images, output_dict=True, return_prefix_tokens=True)
            small = model.forward_intermediates(images, output_dict=True, intermediates_only=True)
            layers = model.get_intermediate_layers(images, n=[1, 2], reshape=True, return_prefix_tokens=True, norm=True)
            normed = model.forward_intermediates(images, norm=True, intermediates_only=True)
            plain_layers = model.get_intermediate_layers(images, n=1)
        assert [torch.equal(a, everything[i]) for a, i in zip(some, (1, 3), strict=True)] == [True, True]
        assert [torch.equal(a, everything[i]) for a, i in zip(last, (2, 3), strict=True)] == [True, True]
        assert [torch.equal(a, everything[i]) for a, i in zip(early, (0, 2), strict=True)] == [True, True]
        assert set(as_dict) == {"image_intermediates", "image_intermediates_prefix", "image_features"}
        assert torch.equal(as_dict["image_features"], final)
        assert [x.shape for x in as_dict["image_intermediates_prefix"]] == [(2, 1, 48)] * 4
        assert set(small) == {"image_intermediates"}
        assert [torch.equal(layer[0], normed[i]) for layer, i in zip(layers, (1, 2), strict=True)] == [True, True]
        assert torch.equal(plain_layers[0], everything[3].flatten(2).transpose(1, 2))
        with pytest.raises((ValueError, AssertionError), match="NCHW"):
            model.forward_intermediates(images, output_fmt="NHWC")

    def test_unreduced_it_is_timms_own(self):
        """Same structure and numbers at keep rate 1, for every combination of options."""
        plain = tiny.build("vit_small_patch14_reg4_dinov2", img_size=(42, 70))
        reduced = fastreduce.patch(copy.deepcopy(plain), "tome", keep_rate=1.0)
        images = tiny.images(plain)
        for number in range(2**5):
            flags = ("return_prefix_tokens", "norm", "stop_early", "intermediates_only", "output_dict")
            flags = [flag for flag in flags if _takes("forward_intermediates", flag)]
            options = {flag: bool(number >> bit & 1) for bit, flag in enumerate(flags)}
            for indices in (None, 2, [0, 2], [-1]):
                for output_fmt in ("NCHW", "NLC"):
                    arguments = {"indices": indices, "output_fmt": output_fmt, **options}
                    with torch.no_grad():
                        expected = plain.forward_intermediates(images, **arguments)
                        found = reduced.forward_intermediates(images, **arguments)
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class TestTraining:
    @pytest.mark.parametrize("arguments", [case for case in RUNS if case.id != "dynamicvit"])
    def test_without_dropout_training_is_evaluation(self, arguments):
        model = fastreduce.patch(tiny.build(), **arguments)
        expected = run(model)
        torch.testing.assert_close(run(model.train()), expected)

    @pytest.mark.parametrize("arguments", RUNS)
    def test_all_kinds_of_dropout(self, arguments):
        rates = {
            "proj_drop_rate": 0.2,
            "attn_drop_rate": 0.2,
            "drop_path_rate": 0.3,
            "drop_rate": 0.1,
            "pos_drop_rate": 0.1,
        }
        if arguments["method"] != "radial":
            rates["patch_drop_rate"] = 0.25
        model = fastreduce.patch(tiny.build(**rates), **{**arguments, "keep_rate": 0.7})
        images = tiny.images(model, batch=4).requires_grad_()
        expected = run(model)
        model.train()
        torch.manual_seed(0)
        logits = model(images)
        logits.square().sum().backward()
        assert logits.isfinite().all()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        torch.manual_seed(0)
        assert torch.equal(model(images), logits)
        assert not torch.equal(model(images), logits)
        assert torch.equal(run(model.eval()), expected)

    @pytest.mark.parametrize("drop", ["proj_drop_rate", "drop_path_rate", "attn_drop_rate"])
    @pytest.mark.parametrize("method", ["topk", "evit", "tome"])
    def test_dropout_has_the_plain_mean_and_spread(self, method, drop):
        """Over many draws, the branch of the reducing block scatters as the plain algorithm's does."""
        model = tiny.build(depth=1, **{drop: 0.3})
        if drop == "drop_path_rate":  # timm's rates start from 0
            model.blocks[0].drop_path1 = timm.layers.DropPath(0.3)
        model.blocks[0].mlp = _Silent()
        arguments = {"method": method, "keep_rate": 0.5, "at": 0}
        images = tiny.images(model, batch=1).expand(3000, -1, -1, -1)
        model.train()
        torch.manual_seed(0)
        with torch.no_grad():
            plain = _last_rows(model, PlainModel(model, **arguments), images)
            found = _last_rows(model, fastreduce.patch(model, **arguments), images)
        scale = plain.std(0).mean().item()
        assert scale > 1e-2
        # With dropout on the scores, the plain (official) one selects differently from draw to draw.
        rows = slice(0, 1) if drop == "attn_drop_rate" else slice(None)
        found, plain = found[:, rows], plain[:, rows]
        error = ((found.var(0) + plain.var(0)) / len(images)).sqrt() + 1e-6 * scale
        assert ((found.mean(0) - plain.mean(0)).abs() / error).max() < 5
        torch.testing.assert_close(found.std(0), plain.std(0), rtol=0.12, atol=0.02 * scale)

    def test_a_few_steps_learn(self):
        torch.manual_seed(0)
        model = fastreduce.patch(tiny.build(drop_path_rate=0.1), "evit", **SCHEDULE).train()
        images, labels = tiny.images(model, batch=8), torch.arange(8) % 7
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(25):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert sum(losses[-3:]) < 0.5 * sum(losses[:3])

    def test_frozen_parts_need_no_gradient(self):
        model = fastreduce.patch(tiny.build(), "tome", **SCHEDULE).requires_grad_(False)
        model.head.requires_grad_(True)
        model(tiny.images(model)).sum().backward()
        assert model.head.weight.grad is not None
        assert model.blocks[3].mlp.fc1.weight.grad is None


class _Silent(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def _last_rows(model, run, images):
    """Return what reaches the final norm, (draws, tokens, channels)."""
    caught = []
    hook = model.norm.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    run(images)
    hook.remove()
    return caught[0]


class TestForeignLayers:
    """Projections that somebody replaced or hooked are called as they are, never read behind their backs."""

    class Adapter(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear, self.low = linear, nn.Linear(48, linear.out_features, bias=False)

        def forward(self, x):
            return self.linear(x) + self.low(x)

    @pytest.mark.parametrize("arguments", RUNS)
    def test_adapters(self, arguments):
        model = tiny.build()
        for block in model.blocks:
            block.attn.qkv, block.attn.proj = self.Adapter(block.attn.qkv), self.Adapter(block.attn.proj)
        model, plain = tiny.reduced_and_plain(model, **arguments)
        torch.testing.assert_close(run(model), run(plain, tiny.images(model)), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("arguments", RUNS)
    def test_every_part_of_a_block_runs(self, arguments):
        """Also those that do nothing in most models."""
        model = tiny.build().double()
        for block in model.blocks:
            block.ls1, block.ls2, block.drop_path1, block.drop_path2 = (LayerScale(48, 0.3) for _ in range(4))
            block.attn.proj_drop = LayerScale(48, 0.3)
            block.attn.proj_drop.p = 0.1
        tiny.randomize(model)
        images = tiny.images(model, dtype=torch.float64)
        model.train()
        model, plain = tiny.reduced_and_plain(model, **arguments)
        torch.manual_seed(0)
        expected = run(plain, images)
        torch.manual_seed(0)
        # Before DynamicViT's first stage the plain form masks, with nothing to mask, which is not quite a softmax.
        tolerance = 1e-4 if arguments["method"] == "dynamicvit" else 1e-9
        torch.testing.assert_close(run(model, images), expected, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("arguments", RUNS)
    def test_hooks(self, arguments):
        """Weight pruning and the like recompute the weight in a hook before every call."""
        model = tiny.build()
        calls = []
        for layer in (model.blocks[2].attn.qkv, model.blocks[2].attn.proj):
            layer.register_forward_pre_hook(lambda module, inputs: calls.append(module))
            layer.register_forward_hook(lambda module, inputs, output: output * 2)
        images = tiny.images(model)
        model, plain = tiny.reduced_and_plain(model, **arguments)
        expected = run(plain, images)
        calls.clear()
        torch.testing.assert_close(run(model, images), expected, rtol=1e-3, atol=1e-3)
        assert set(calls) == {model.blocks[2].attn.qkv, model.blocks[2].attn.proj}

    @pytest.mark.parametrize("arguments", RUNS)
    def test_parametrized_weights(self, arguments):
        model = tiny.build()
        for block in model.blocks:
            nn.utils.parametrizations.weight_norm(block.attn.qkv)
            nn.utils.parametrizations.weight_norm(block.attn.proj)
        images = tiny.images(model)
        model, plain = tiny.reduced_and_plain(model, **arguments)
        torch.testing.assert_close(run(model, images), run(plain, images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("arguments", RUNS)
def test_autocast(arguments):
    model = tiny.reduced_and_plain(tiny.build(), **arguments)[0]
    images = tiny.images(model)
    expected = run(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        logits = run(model, images)
    assert logits.dtype == torch.bfloat16
    unreduced = run(fastreduce.unpatch(model), images)
    # Decisions may turn; the logits must stay nearer than reduction itself moves them.
    distance = (logits.float() - expected).norm() / expected.norm()
    assert distance < 0.5, distance
    assert (logits.float() - expected).norm() < (unreduced - expected).norm()


@pytest.mark.parametrize("arguments", PLAIN_NAMES)
def test_autocast_trains(arguments):
    model = fastreduce.patch(tiny.build(), **arguments).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tiny.images(model)).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def _short(arguments, name="vit_tiny_patch16_224"):
    """Return a reduced model of two blocks, because compilation takes its time."""
    at = (1,) if arguments["method"] == "kmedoids" else (0, 1)
    return fastreduce.patch(tiny.build(name, depth=2), **{**arguments, "at": at})


class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("arguments", quick(RUNS, "topk", "ats", "tome", "kmedoids", "dpcknn", "sinkhorn"))
    def test_one_graph(self, arguments):
        """The model without a class token and with pooling over patches is the longer one."""
        name = "vit_tiny_patch16_224" if arguments["method"] == "ats" else "vit_base_patch16_siglip_224"
        model = _short(arguments, name)
        images = tiny.images(model, batch=3)
        expected = run(model, images)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(run(compiled, images), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("arguments", quick(PLAIN_NAMES, "ats", "tome"))
    def test_dynamic_batch(self, arguments):
        model = _short(arguments)
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
        for batch in (3, 2, 5):
            images = tiny.images(model, batch=batch)
            torch.testing.assert_close(run(compiled, images), run(model, images), rtol=1e-4, atol=1e-4)
        with torch._dynamo.config.patch(error_on_recompile=True):
            run(compiled, tiny.images(model, batch=7))

    @pytest.mark.parametrize(
        "arguments", quick([case for case in PLAIN_NAMES if case.id != "dynamicvit"], "evit", "tome", "dpcknn")
    )
    def test_training(self, arguments):
        model = _short(arguments).train()
        images = tiny.images(model)
        model(images).square().sum().backward()
        expected = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        torch.compile(model, backend="aot_eager", fullgraph=True)(images).square().sum().backward()
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())

    def test_compiled_in_place_before(self):
        """``model.compile()`` keeps the model itself, so that patching it afterwards is seen."""
        model = tiny.build()
        images, expected = tiny.images(model), run(fastreduce.patch(tiny.build(), "topk", **SCHEDULE))
        model.compile(backend="eager")
        unreduced = run(model, images)
        torch.testing.assert_close(run(fastreduce.patch(model, "topk", **SCHEDULE), images), expected)
        torch.testing.assert_close(run(fastreduce.unpatch(model), images), unreduced)

    def test_unpatching_the_compiled_model(self):
        model = tiny.build()
        before, expected = snapshot(model), run(model)
        compiled = torch.compile(fastreduce.patch(model, "radial", **SCHEDULE), backend="eager")
        run(compiled, tiny.images(model))
        assert fastreduce.unpatch(compiled) is compiled
        vars(model).pop("_is_torch_compile", None)  # torch.compile's own mark
        assert_same(model, before)
        torch.testing.assert_close(run(compiled, tiny.images(model)), expected)

    @pytest.mark.slow  # tests/bench compiles with it too
    def test_inductor(self):
        model = fastreduce.patch(tiny.build(depth=1), "tome", keep_rate=0.5, at=0)
        images = tiny.images(model)
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(run(compiled, images), run(model, images), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("arguments", quick(PLAIN_NAMES, "topk", "tome"))  # tests/deploy exports all
    def test_export(self, arguments):
        model = _short(arguments)
        images = tiny.images(model)
        with torch.no_grad():
            static = torch.export.export(model, (images,))
            torch.testing.assert_close(static.module()(images), model(images), rtol=1e-4, atol=1e-4)
            batch = torch.export.Dim("batch", min=1, max=64)
            dynamic = torch.export.export(model, (images,), dynamic_shapes=({0: batch},)).module()
            for size in (2, 1, 7):
                images = tiny.images(model, batch=size)
                torch.testing.assert_close(dynamic(images), model(images), rtol=1e-4, atol=1e-4)

    def test_record_under_compilation(self):
        """Recording works whether or not the compiled graph was made before."""
        model = _short(FOUR[0].values[0])
        images = tiny.images(model)
        with fastreduce.record(model) as expected:
            run(model, images)
        compiled = torch.compile(model, backend="eager")
        run(compiled, images)
        with fastreduce.record(model) as seen:
            run(compiled, images)
        assert len(seen.stages) == 2
        assert torch.equal(seen.stages[-1].kept_patches, expected.stages[-1].kept_patches)


class TestPlain:
    def test_it_needs_the_unpatched_model(self):
        model = fastreduce.patch(tiny.build(), "topk", **SCHEDULE)
        for make in (lambda: PlainModel(model, "topk", **SCHEDULE), lambda: FreeSlice(model, (8,), (2,))):
            with pytest.raises(ValueError, match="unpatch"):
                make()

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match=r"'topq'.*'topk'"):
            PlainModel(tiny.build(), "topq", **SCHEDULE)
        with pytest.raises(TypeError, match="'evit' has no option 'rounds'"):
            PlainModel(tiny.build(), "evit", rounds="exact", **SCHEDULE)
        with pytest.raises(ValueError, match=r"block in \(1, 2\), got"):
            FreeSlice(tiny.build(), (8,), (1, 2))

    def test_free_slice(self):
        model = tiny.build()
        images = tiny.images(model)
        with torch.no_grad():
            whole = FreeSlice(model, (16, 16), (1, 3))(images)
            torch.testing.assert_close(whole, model(images))
            shapes = []
            model.blocks[2].mlp.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
            cut = FreeSlice(model, (8, 3), (1, 2))(images)
        assert shapes[0] == (2, 4, 48)
        assert cut.shape == whole.shape
        assert not torch.equal(cut, whole)


def test_models_of_the_readme():
    """The two lines that everybody copies, at full size once."""
    model = timm.create_model("deit_tiny_patch16_224", depth=12).eval()
    fastreduce.patch(model, "topk", keep_rate=0.5, at=(3, 6, 9))
    assert run(model, torch.randn(1, 3, 224, 224)).shape == (1, 1000)
    assert fastreduce.reduced_counts(model) == [98, 49, 24]
    assert re.search("topk", repr(fastreduce.unpatch(model))) is None


def test_plain_is_independent():
    """``plain`` shares no code with what it is the oracle of."""
    files = sorted(Path(fastreduce.plain.__file__).parent.glob("*.py"))
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    assert len(files) > 5
    assert all(node.level in (0, 1) for node in nodes if isinstance(node, ast.ImportFrom))
    imports = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    imports |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in imports} <= {
        *("__future__", "collections", "dataclasses", "functools", "math", "torch", "typing")
    }
