"""Models whose blocks look at positions: against the unreduced model, whose dropped tokens are masked, in float64."""

import copy
import functools

import pytest
import timm
import torch

import fastreduce
from bench.proof import tiny
from tests.helpers.cases import slow_but
from tests.helpers.inputs import seeded

TINY = {"embed_dim": 48, "num_heads": 3}
MODELS = {
    "eva": ("eva_giant_patch14_224", {"img_size": 56}),
    "eva02": ("eva02_tiny_patch14_224", {"img_size": 56}),
    "eva02-post": ("eva02_tiny_patch14_224", {"img_size": 56, "use_post_norm": True}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "pe": ("vit_pe_core_tiny_patch16_384", {}),
    "rope-axial": ("vit_small_patch16_rope_224", {}),
    "rope-mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "grouped": (
        "eva02_tiny_patch14_224",
        {"img_size": 56, "attn_type": "rope", "num_heads": 4, "num_kv_heads": 2, "qkv_fused": False},
    ),
    "beit": ("beit_base_patch16_224", {}),
    "beit-gap": ("beitv2_base_patch16_224", {"global_pool": "token"}),
    "relpos": ("vit_relpos_small_patch16_224", {}),
    "relpos-class": ("vit_relpos_base_patch16_clsgap_224", {"global_pool": "token"}),
    "relpos-shared": ("vit_srelpos_small_patch16_224", {}),
    "relpos-post": ("vit_relpos_base_patch32_plus_rpn_256", {"img_size": 128}),
    "post-norm": ("vit_base_patch16_rpn_224", {}),
    "parallel": ("vit_base_patch16_xp_224", {}),
    "parallel-things": ("vit_small_patch16_18x2_224", {}),
    "naflex": ("naflexvit_base_patch16_gap", {}),
    "qwen3": ("qwen3_vit_88m_enc", {"out_features": 16}),
    "differential": ("vit_dwee_patch16_reg1_gap_256", {}),
    "differential-class": ("vit_dwee_patch16_reg1_gap_256", {"class_token": True, "global_pool": "token"}),
    "differential-parallel": ("vit_dpwee_patch16_reg1_gap_256", {}),
    "cait": ("cait_xxs24_224", {}),
    "gemma4": (
        "gemma4_vit_167m_enc",
        {"head_dim": 16, "intermediate_size": 64, "position_embedding_size": 16, "pooling_kernel_size": 2},
    ),
    "deepseek": ("deepseek_vit_412m_enc", {"out_features": 16, "img_size": 56}),
}
AT = (1, 2)


@functools.cache
def _build(name):
    kind, changes = MODELS[name]
    common = {"depth": 4, "num_classes": 7, "img_size": 64, **TINY, **changes}
    if "enc" in kind:
        del common["num_classes"]
    if "naflex" in kind:
        del common["img_size"]
    try:
        model = timm.create_model(kind, **common)
    except (RuntimeError, TypeError):
        pytest.skip(f"timm {timm.__version__} has no {kind} like this")
    return tiny.randomize(model).double().eval()


def build(name):
    model = copy.deepcopy(_build(name))
    side = MODELS[name][1].get("img_size", 64)
    return model, torch.randn(2, 3, side, side, dtype=torch.float64, generator=seeded(1))


class Masked:
    """The unreduced model, in which no token attends to those that a record says were dropped.

    Hooks give attention a mask through ``scaled_dot_product_attention``, which every model here but CaiT calls.
    """

    def __init__(self, model, seen, prefix):
        self.model, self.seen, self.prefix = model, seen, prefix

    def __call__(self, images, monkeypatch):
        index = {"block": -1}
        attend = torch.nn.functional.scaled_dot_product_attention

        def masked(q, k, v, attn_mask=None, **options):
            hidden = self._hidden(index["block"], q)
            if hidden is not None and hidden.shape[1] == k.shape[2]:  # CaiT's class token attends behind the blocks
                bias = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill(hidden, float("-inf"))[:, None, None]
                attn_mask = bias if attn_mask is None else attn_mask + bias
            return attend(q, k, v, attn_mask=attn_mask, **options)

        def hide(matrix, value):  # (B, M, N, H)
            hidden = self._hidden(index["block"], matrix)
            return matrix if hidden is None else matrix.masked_fill(hidden[:, None, :, None], value)

        hooks = [
            block.register_forward_pre_hook(lambda *_, number=number: index.update(block=number))
            for number, block in enumerate(self.model.blocks)
        ]
        for block in self.model.blocks:
            if hasattr(getattr(block, "attn", None), "proj_l"):  # talking heads, in which no fused attention is called
                hooks.append(block.attn.proj_l.register_forward_hook(lambda _, inputs, out: hide(out, float("-inf"))))
                hooks.append(block.attn.proj_w.register_forward_hook(lambda _, inputs, out: hide(out, 0.0)))
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", masked)
        try:
            return self.model(images)
        finally:
            monkeypatch.undo()
            [hook.remove() for hook in hooks]

    def _hidden(self, block, q):
        """Return (B, N): the keys that are gone before this block's attention."""
        early = [stage for stage in self.seen.stages if stage.block < block or (self.before and stage.block == block)]
        if not early:
            return None
        gone = early[-1].patch_slot < 0
        return torch.cat([gone.new_zeros(len(gone), self.prefix), gone], dim=1)

    before = False


def run(model, images):
    with torch.no_grad():
        return model(images)


@pytest.mark.parametrize("name", MODELS)
def test_keep_rate_one_changes_no_bit(name):
    model, images = build(name)
    expected = run(model, images)
    assert expected.std() > 1e-3, "the model does not look at its input"
    for method in ("topk", "evit", "tome", "dpcknn", "dynamicvit", "radial", "kmedoids"):
        fastreduce.patch(model, method, keep_rate=1.0, at=AT)
        assert torch.equal(run(model, images), expected), method
        fastreduce.unpatch(model)


@pytest.mark.parametrize("method", ["topk", "dynamicvit", "radial"])
@pytest.mark.parametrize("name", MODELS)
def test_selections_equal_masking(name, method, monkeypatch):
    """A gathered position is the patch's own: what is left is as if the dropped tokens were masked."""
    model, images = build(name)
    plain = copy.deepcopy(model)
    fastreduce.patch(model, method, keep_rate=0.5, at=AT)
    tiny.randomize(model.reducers, seed=7)
    features = []
    host = model.blocks[-1]._site.host
    prefix = host.prefix(model)
    with fastreduce.record(model) as seen, torch.no_grad():
        last = model.blocks[-1]
        finish = type(host).finish
        monkeypatch.setattr(
            type(host), "finish", lambda self, m, tokens: features.append(tokens) or finish(self, m, tokens)
        )
        model(images)
        monkeypatch.undo()
    masked = Masked(plain, seen, prefix)
    masked.before = method != "topk"
    outputs = []
    plain.blocks[-1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        masked(images, monkeypatch)
    (tokens,), (expected,) = features, outputs
    assert last.index == len(plain.blocks) - 1
    kept = seen.stages[-1].kept_patches + prefix
    rows = torch.cat([torch.arange(prefix).expand(len(kept), prefix), kept], dim=1)
    expected = expected.gather(1, rows.unsqueeze(-1).expand(-1, -1, expected.shape[2]))
    rounding = 1e-5 if name == "deepseek" else 1e-9  # its norms compute in float32
    torch.testing.assert_close(tokens.x, expected, rtol=0, atol=rounding * expected.abs().max().item())


ROTARY = ("eva", "eva02", "eva02-post", "dinov3", "pe", "rope-axial", "rope-mixed", "grouped", "post-norm")
OTHERS = ("differential-class", "cait")  # they have no positions in their blocks, but an attention of their own
METHODS = {name: options for name, options in tiny.METHODS.items() if not name.endswith(("members", "equal", "scaled"))}
NO_SAMPLING = ("dinov3", "pe")  # they pool over patches in a way that cannot leave padding out
METHODS["tome-after"] = {"method": "tome", "metric": "after"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [*ROTARY, *OTHERS])
def test_equals_the_plain_algorithm(name, method):
    """Merged tokens stand at the place of their destination, centre or strongest source; a fused one nowhere."""
    model, images = build(name)
    arguments = {"keep_rate": 0.5, "at": AT, **METHODS[method]}
    if method == "ats" and (model.cls_token is None or name in (*NO_SAMPLING, "cait")):
        with pytest.raises(ValueError, match=r"class token|global_pool="):
            fastreduce.patch(model, **arguments)
        return
    reduced, plain = tiny.reduced_and_plain(model, **arguments)
    expected = run(plain, images)
    torch.testing.assert_close(run(reduced, images), expected, rtol=0, atol=1e-8 * expected.abs().max().item())


@pytest.mark.parametrize("method", ["topk", "tome", "evit", "kmedoids"])
@pytest.mark.parametrize("name", MODELS)
def test_lower_precision(name, method):
    """A bias of float32 on the logits (ToMe's sizes) does not make the rest of the attention float32."""
    model, images = build(name)
    fastreduce.patch(model, method, keep_rate=0.5, at=AT)
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float16):
            rough = model.to(dtype)(images.to(dtype))
            assert rough.dtype == dtype
            assert rough.isfinite().all()


COMPILED = ("dinov3", "rope-mixed", "beit", "relpos", "parallel", "parallel-things", "naflex", "qwen3", "gemma4")
COMPILED += ("deepseek", *OTHERS)  # one of every layout: the others would take half a minute more


_QUICK = {"eva02", "dinov3", "rope-mixed", "grouped", "beit", "relpos-class", "naflex"}


@pytest.mark.parametrize("name", slow_but(MODELS, *_QUICK))
def test_gradients_checkpoints_and_graphs(name):
    """One step of training: as it is, with checkpoints, and in one graph."""
    results = []
    for way in ("plain", "checkpointed", "compiled")[: 3 if name in COMPILED else 2]:
        torch._dynamo.reset()
        model, images = build(name)
        model, images = model.float().train(), images.float()
        fastreduce.patch(model, "tome", keep_rate=0.5, at=AT)
        model.set_grad_checkpointing(way == "checkpointed")
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if way == "compiled" else model
        torch.manual_seed(0)  # relative positions come from an MLP with dropout
        call(images).square().sum().backward()
        results.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
        assert all(gradient is not None for gradient in results[-1])
    for one, *others in zip(*results, strict=True):
        for other in others:
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3 * one.abs().max().item())


@pytest.mark.parametrize("name", ["differential", "differential-class"])
def test_differential_attention_masked_in_training_and_packed(name):
    """Values are twice as wide as keys, which the operators of these two methods do not take."""
    model, images = build(name)
    arguments = {"method": "dynamicvit", "keep_rate": 0.5, "at": (0, 2)}
    reduced, plain = tiny.reduced_and_plain(model, **arguments)
    answers = []
    for one in (plain.train(), reduced.train()):
        torch.manual_seed(3)
        answers.append(one(images))
    torch.testing.assert_close(*answers, rtol=0, atol=1e-8 * answers[0].abs().max().item())
    if name == "differential-class":
        padded, packed = (
            run(fastreduce.patch(build(name)[0], "ats", keep_rate=0.5, at=AT, packed=way), images)
            for way in (False, True)
        )
        torch.testing.assert_close(packed, padded, rtol=0, atol=1e-9 * padded.abs().max().item())


@pytest.mark.parametrize("name", MODELS)
def test_copies_autocast_and_dense_features(name):
    model, images = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    unreduced = run(model, images)
    fastreduce.patch(model, "topk", keep_rate=0.5, at=AT)
    expected = run(model, images)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, images), expected)
    last = twin.forward_intermediates(images, intermediates_only=True)[-1]
    assert last.shape == (2, 48, 4, 4)
    assert last.abs().amax(1).min() > 0  # a dropped patch shows what it was
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(model.float(), images.float()).isfinite().all()
    fastreduce.unpatch(twin)
    assert torch.equal(run(twin, images), unreduced)
    assert all(torch.equal(value, before[key]) for key, value in twin.state_dict().items())


def test_the_mean_of_positions():
    """A token that was only selected has its own position; a merged one has another."""
    model, images = build("dinov3")
    for method, same in (("topk", True), ("tome", False)):
        found = []
        for positions in ("place", "mean"):
            fastreduce.patch(model, method, keep_rate=0.5, at=AT, positions=positions)
            assert fastreduce.config_of(model).get("positions", "place") == positions
            found.append(run(model, images))
            fastreduce.unpatch(model)
        torch.testing.assert_close(*found, atol=1e-9, rtol=0) if same else None
        assert same or not torch.allclose(*found, atol=1e-6)
    with pytest.raises(ValueError, match="'place' or 'mean', got 'first'"):
        fastreduce.patch(model, "tome", positions="first")


def test_images_of_another_size():
    """Positions are never kept: a model that takes any size takes it reduced."""
    model = tiny.randomize(
        timm.create_model("vit_small_patch16_dinov3", depth=4, num_classes=7, dynamic_img_size=True, **TINY)
    )
    model, plain = model.double().eval(), None
    images = torch.randn(2, 3, 48, 80, dtype=torch.float64, generator=seeded(2))
    _, plain = tiny.reduced_and_plain(model, method="tome", keep_rate=0.5, at=AT)
    expected = run(plain, images)
    torch.testing.assert_close(run(model, images), expected, rtol=0, atol=1e-8 * expected.abs().max().item())


def test_refusals_say_what_is_in_the_way():
    for name, words in (
        ("samvit_base_patch16", "windows need the full grid"),
        ("convit_tiny", "relative positions"),
        ("gemma4_vit_167m", "give the Gemma4VitEncoder inside of it, .encoder"),
    ):
        if name not in timm.list_models():
            continue
        with torch.device("meta"):
            model = timm.create_model(name)
        with pytest.raises(TypeError, match=words):
            fastreduce.patch(model, "topk", keep_rate=0.5)
    model, images = build("cait")
    fastreduce.patch(model, "dynamicvit", keep_rate=0.5, at=AT).train()
    with pytest.raises(ValueError, match="mix their"):
        model(images)
    model, _ = build("dinov3")
    model.reset_classifier(7, "token")
    with pytest.raises(ValueError, match="packed=False"):
        fastreduce.patch(model, "ats", keep_rate=0.5, packed=True)
    model, images = build("beit")
    fastreduce.patch(model, "dynamicvit", keep_rate=0.5, at=AT).train()
    with pytest.raises(ValueError, match="bias that this model adds to every pair"):
        model(images)
    model, images = build("naflex")
    fastreduce.patch(model, "topk", keep_rate=0.5, at=AT)
    patches = images.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 4, 5, 1).reshape(2, 16, -1)
    where = (
        torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1)
        .view(1, 16, 2)
        .expand(2, -1, -1)
    )
    with pytest.raises(ValueError, match="not dictionaries of patches"):
        model({"patches": patches, "patch_coord": where, "patch_valid": torch.ones(2, 16, dtype=torch.bool)})
