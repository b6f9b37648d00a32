"""open_clip's image towers: tiny random models of both layouts, against the unpatched tower and a float64 oracle."""

import copy

import pytest
import torch
from torch import nn

import fastreduce

pytest.importorskip("open_clip", reason="open_clip is not installed (pip install fastreduce[open-clip])")
from open_clip import model as open_clip_model
from open_clip.transformer import VisionTransformer

AT, KEEP = (1, 2), (9, 4)
SMALL = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 4, "heads": 4, "mlp_ratio": 2.0, "output_dim": 16}
MODELS = {
    "own": {},
    "scaled": {"ls_init_value": 0.5, "pool_type": "avg", "final_ln_after_pool": True},
    "custom": {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True},
    "custom_bare": {"block_type": "custom"},
    "attention_pool": {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 5},
    "tokens": {"output_tokens": True},
}


def build(name, **changes):
    torch.manual_seed(0)
    model = VisionTransformer(**(SMALL | MODELS[name] | changes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def clip():
    torch.manual_seed(0)
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2}
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 4, "head_width": 8}
    return open_clip_model.CLIP(16, vision, text).eval()


def images(dtype=torch.float32):
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def run(model, dtype=torch.float32):
    with torch.no_grad():
        found = model(images(dtype))
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("name", MODELS)
def test_keep_rate_one_changes_nothing(name):
    model = build(name)
    before, keys = run(model), list(model.state_dict())
    for method in ("topk", "tome", "evit"):
        fastreduce.patch(model, method, keep_rate=1, at=AT)
        assert list(model.state_dict()) == keys
        assert torch.equal(run(model), before)
        fastreduce.unpatch(model)
    assert all(type(block).__module__.startswith("open_clip") for block in model.transformer.resblocks)
    assert "forward_intermediates" not in vars(model.transformer)


def _masked(model):
    """Run an unpatched tower with Top-K by masks -> (states around each block, the block that dropped each token)."""
    blocks = model.transformer.resblocks
    dropped = torch.full((2, 17), 99)
    states = [model._embeds(images(torch.float64))]
    for index, block in enumerate(blocks):
        mask = torch.zeros(2, 17, dtype=torch.float64).masked_fill_(dropped < index, float("-inf"))
        every = mask[:, None, None].expand(2, 4, 17, 17).reshape(8, 17, 17)
        if index in AT:
            attn, normed = block.attn, block.ln_1(states[-1])
            q, k, _ = (normed @ attn.in_proj_weight.T + attn.in_proj_bias).chunk(3, -1)
            q, k = (one.unflatten(2, (4, 8)).transpose(1, 2) for one in (q, k))
            if hasattr(attn, "ln_q"):
                q, k = attn.ln_q(q), attn.ln_k(k)
            logits = q[:, :, :1] @ k.transpose(-2, -1) / 8**0.5 + mask[:, None, None]
            scores = logits.softmax(-1).mean((1, 2))
            scores[:, 0] = 9.0
            kept = scores.topk(1 + KEEP[AT.index(index)], 1).indices
            still = torch.zeros(2, 17, dtype=torch.bool).scatter(1, kept, True)
            states.append(block(states[-1], attn_mask=every))
            dropped[(dropped >= index) & ~still] = index
        else:
            states.append(block(states[-1], attn_mask=every))
    return states, dropped


@pytest.mark.parametrize("name", ["own", "scaled", "custom", "custom_bare", "tokens"])
def test_selections_equal_a_float64_oracle(name):
    model = build(name).double()
    with torch.no_grad():
        states, dropped = _masked(model)
    fastreduce.patch(model, "topk", keep=KEEP, at=AT)
    with torch.no_grad():
        found = model.forward_intermediates(images(torch.float64), output_fmt="NLC", output_extra_tokens=True)
    states = torch.stack(states)
    # The norms of the custom layout compute in float32.
    near = 1e-5 if name.startswith("custom") else 1e-10
    pairs = zip(found["image_intermediates_prefix"], found["image_intermediates"], strict=True)
    for index, (head, patches) in enumerate(pairs, start=1):
        seen = dropped.clamp(max=index)[None, :, :, None].expand(1, *states.shape[1:])
        expected = states.gather(0, seen)[0]
        torch.testing.assert_close(torch.cat([head, patches], 1), expected, rtol=near, atol=near)
    torch.testing.assert_close(found["image_features"], run(model, torch.float64))


@pytest.mark.parametrize("name", ["own", "scaled", "custom", "custom_bare"])
def test_the_order_of_merging_and_projecting_is_free(name):
    """A hook on the output projection, which looks at all tokens, forbids to merge before it."""
    for method in ("tome", "evit", "kmedoids"):
        model = fastreduce.patch(build(name).double(), method, keep_rate=0.6, at=AT)
        found = run(model, torch.float64)
        for block in model.transformer.resblocks:
            block.attn.out_proj.register_forward_hook(lambda module, args, output: None)
        near = 1e-6 if name.startswith("custom") else 1e-10
        torch.testing.assert_close(run(model, torch.float64), found, rtol=near, atol=near)


def test_hooks_on_attention_see_what_it_returns():
    model = fastreduce.patch(build("own"), "topk", keep=KEEP, at=AT)
    before, seen = run(model), []
    model.transformer.resblocks[1].attn.register_forward_hook(lambda module, args, output: seen.append(output[0].shape))
    torch.testing.assert_close(run(model), before)
    assert seen == [(2, 17, 32)]


def test_a_mean_counts_every_patch_once():
    model = fastreduce.patch(build("scaled"), "tome", keep_rate=0.6, at=AT)
    with torch.no_grad():
        found = model.forward_intermediates(images(), indices=[3], output_fmt="NLC")
        expected = model.ln_post(found["image_intermediates"][0].mean(1)) @ model.proj
    torch.testing.assert_close(run(model), expected)


def test_two_towers():
    model = clip()
    with torch.no_grad():
        before = model.encode_image(images())
        fastreduce.patch(model, "topk", keep=KEEP, at=AT)
        after = model.encode_image(images())
        twin = copy.deepcopy(model)
        alone = fastreduce.patch(clip().visual, "topk", keep=KEEP, at=AT)
        torch.testing.assert_close(after, alone(images()))
        torch.testing.assert_close(twin.encode_image(images()), after)
    assert not torch.equal(before, after)
    assert fastreduce.reduced_counts(model) == list(KEEP)
    with fastreduce.record(model) as seen, torch.no_grad():
        model.encode_image(images())
    assert [stage.num_out for stage in seen.stages] == list(KEEP)
    with torch.no_grad():
        assert torch.equal(fastreduce.unpatch(model).encode_image(images()), before)


@pytest.mark.parametrize("name", ["own", "custom"])
def test_gradients_and_checkpointing(name):
    model = fastreduce.patch(build(name), "topk", keep=KEEP, at=AT).train()

    def gradients():
        model.zero_grad()
        model(images()).square().sum().backward()
        return {key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None}

    plain = gradients()
    assert len(plain) == len(list(model.parameters()))
    if name == "custom":  # open_clip itself calls these with too many arguments
        return
    model.set_grad_checkpointing()
    again = gradients()
    for key in plain:
        torch.testing.assert_close(again[key], plain[key])


def test_compiles_as_one_graph():
    model = fastreduce.patch(build("own", layers=3), "tome", keep_rate=0.6, at=AT)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(model))


@pytest.mark.parametrize("method", sorted(fastreduce.REDUCERS))
def test_every_method(method):
    options = {"k_neighbors": 2} if method == "dpcknn" else {}
    schedule = {"norm": "l2"} if method == "radial" else {"keep": KEEP}
    model = fastreduce.patch(build("own"), method, at=AT, **schedule, **options)
    assert run(model).isfinite().all()
    with torch.no_grad():
        found = model.forward_intermediates(images(), indices=2)
    assert [one.shape for one in found["image_intermediates"]] == [(2, 32, 4, 4)] * 2


class TestRefusals:
    def test_timms_tower(self):
        config = open_clip_model.CLIPVisionCfg(timm_model_name="vit_tiny_patch16_224", image_size=224)
        tower = open_clip_model._build_vision_tower(16, config)
        with pytest.raises(TypeError, match=r"\.trunk"):
            fastreduce.patch(tower, "topk")
        model = clip()
        model.visual = tower
        with pytest.raises(TypeError, match=r"\.visual\.trunk"):
            fastreduce.patch(model, "topk")
        fastreduce.patch(model.visual.trunk, "topk", keep_rate=0.7)
        assert fastreduce.is_patched(model)

    def test_layouts(self):
        with pytest.raises(TypeError, match="scaled cosine"):
            fastreduce.patch(build("own", scaled_cosine_attn=True), "topk")
        model = build("own")
        for block in model.transformer.resblocks:
            block.attn.batch_first = False
        with pytest.raises(TypeError, match="batch_first=True"):
            fastreduce.patch(model, "topk")

    def test_masks(self):
        model = fastreduce.patch(build("own"), "topk", keep=KEEP, at=AT)
        with pytest.raises(ValueError, match="attn_mask"):
            model.transformer(torch.randn(2, 17, 32), attn_mask=torch.zeros(17, 17))

    def test_ragged(self):
        with pytest.raises(ValueError, match="final_ln_after_pool=True"):
            fastreduce.patch(build("attention_pool"), "ats", keep=KEEP, at=AT)

    def test_other_attentions(self):
        model = build("own")
        model.transformer.resblocks[2].attn = nn.Identity()
        with pytest.raises(TypeError, match="is a Identity"):
            fastreduce.patch(model, "topk", at=AT)
