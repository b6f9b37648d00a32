"""Encoders of Hugging Face: tiny random models, every layout, against the unpatched model and a float64 oracle."""

import concurrent.futures
import copy
import inspect
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastreduce
from fastreduce.integrations.registry import host_of, parts_of
from fastreduce.recording import reducer_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install fastreduce[hf])")

AT, KEEP = (1, 2), (9, 4)
IMAGE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
IMAGE |= {"image_size": 32, "patch_size": 8}
VIDEO = {name: value for name, value in IMAGE.items() if name != "patch_size"}
SOUND = {name: value for name, value in IMAGE.items() if name != "image_size"}
SOUND |= {"max_length": 32, "num_mel_bins": 24, "frequency_stride": 6, "time_stride": 6}
VJEPA = {name: value for name, value in IMAGE.items() if name not in ("image_size", "intermediate_size")}
VJEPA |= {"num_attention_heads": 2}  # transformers 5.0 fails where three axes share 8 channels
VJEPA |= {"crop_size": 32, "frames_per_clip": 4, "mlp_ratio": 2.0, "num_pooler_layers": 1}
VJEPA |= {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
# name: model, configuration, what it is given, leading tokens, whether one of them is a class token.
MODELS = {
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGE, "image", 1),
    "deit": ("DeiTForImageClassification", "DeiTConfig", IMAGE, "image", 2),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", IMAGE | {"layerscale_value": 0.5}, "image", 1),
    "dinov2_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", IMAGE, "image", 5),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", IMAGE | {"num_register_tokens": 3}, "image", 4),
    "clip": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", IMAGE, "image", 1),
    "metaclip2": ("MetaClip2VisionModel", "MetaClip2VisionConfig", IMAGE, "image", 1),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", IMAGE, "image", 0),
    "siglip2": ("Siglip2VisionModel", "Siglip2VisionConfig", IMAGE | {"num_patches": 16}, "patches", 0),
    "aimv2": ("Aimv2VisionModel", "Aimv2VisionConfig", IMAGE, "image", 0),
    "ijepa": ("IJepaForImageClassification", "IJepaConfig", IMAGE, "image", 0),
    "vit_msn": ("ViTMSNModel", "ViTMSNConfig", IMAGE, "image", 1),
    "videomae": ("VideoMAEForVideoClassification", "VideoMAEConfig", IMAGE | {"num_frames": 4}, "video", 0),
    "vivit": ("VivitForVideoClassification", "VivitConfig", VIDEO | {"tubelet_size": [2, 8, 8]}, "video", 1),
    "vjepa2": ("VJEPA2ForVideoClassification", "VJEPA2Config", VJEPA, "video", 0),
    "ast": ("ASTForAudioClassification", "ASTConfig", SOUND, "sound", 2),
}
MODELS["vivit"][2]["num_frames"] = 4
SHAPES = {"image": (3, 32, 32), "video": (4, 3, 32, 32), "sound": (32, 24), "patches": (16, 192)}


def build(name):
    model, configuration, options, *_ = MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, configuration)(**options)).eval()
    with torch.no_grad():  # biases and scales are zeros and ones otherwise
        for weight in made.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return made


def inputs_of(name, dtype=torch.float32):
    kind = MODELS[name][3]
    generator = torch.Generator().manual_seed(1)
    given = torch.randn(2, *SHAPES[kind], generator=generator).to(dtype)
    if kind == "patches":
        shapes = torch.tensor([[4, 4], [4, 4]])
        return {"pixel_values": given, "pixel_attention_mask": torch.ones(2, 16).long(), "spatial_shapes": shapes}
    names = {"sound": "input_values", "video": "pixel_values_videos" if name == "vjepa2" else "pixel_values"}
    return {names.get(kind, "pixel_values"): given}


def answer(output):
    """Return what the model is asked for: logits, an embedding, a pooled token."""
    for name in ("logits", "image_embeds", "pooler_output", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    raise AssertionError(f"{type(output).__name__} has no answer")


def run(model, name, dtype=torch.float32, **options):
    with torch.no_grad():
        return model(**inputs_of(name, dtype), **options)


def counts_of(name):
    return fastreduce.reduced_counts(fastreduce.patch(build(name), "topk", keep=KEEP, at=AT))


class Oracle:
    """Top-K in an unpatched model by a mask: a patch that a stage dropped is a key of no later layer.

    An attention implementation of the library's, which also decides, from the whole matrix of weights.
    """

    def __init__(self, model, prefix):
        owners = [one for one in model.modules() if isinstance(one, nn.ModuleList) and len(one) == 4]
        self.layers = owners[0]
        self.number = {id(one): index for index, layer in enumerate(self.layers) for one in layer.modules()}
        self.prefix, self.dropped = prefix, None
        transformers.AttentionInterface.register("fastreduce_oracle", self)
        for module in self.layers.modules():
            if hasattr(module, "config"):
                module.config = copy.copy(module.config)
                module.config._attn_implementation = "fastreduce_oracle"

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **options):
        assert attention_mask is None or not attention_mask.any()  # of SigLIP 2 up to 5.1 there is one of zeros
        weights = (query @ key.transpose(-2, -1)) * scaling
        layer = self.number[id(module)]
        if layer == 0:
            self.dropped = torch.full((query.shape[0], key.shape[2]), 99)  # the layer that dropped a token
        weights = weights.masked_fill((self.dropped < layer)[:, None, None, :], float("-inf")).softmax(-1)
        if layer in AT:
            self.decide(weights, layer)
        return (weights @ value).transpose(1, 2), None

    def decide(self, weights, layer):
        present = self.dropped >= layer
        if self.prefix:
            scores = weights[:, :, 0].mean(1)
        else:
            scores = (weights * present[:, None, :, None]).sum((1, 2))
        scores = scores.masked_fill(~present, -1.0)
        scores[:, : self.prefix] = 9.0
        kept = scores.topk(self.prefix + KEEP[AT.index(layer)], dim=1).indices
        still = torch.zeros_like(present).scatter(1, kept, True)
        self.dropped[present & ~still] = layer

    def expected(self, states):
        """Return the hidden states as they should be: a dropped patch shows what entered the layer that dropped it."""
        states = torch.stack(states)  # (layers + 1, B, N, C)
        for index in range(1, len(states)):
            seen = self.dropped.clamp(max=index)
            states[index] = states.gather(0, seen[None, :, :, None].expand(1, *states.shape[1:]))[0]
        return states


@pytest.mark.parametrize("name", MODELS)
def test_keep_rate_one_changes_nothing(name):
    model = build(name)
    before = run(model, name, output_hidden_states=True)
    keys, layers = list(model.state_dict()), [type(one) for one in model.modules()]
    for method in ("topk", "tome", "evit"):
        fastreduce.patch(model, method, keep_rate=1, at=AT)
        assert list(model.state_dict()) == keys
        after = run(model, name, output_hidden_states=True)
        assert torch.equal(answer(after), answer(before))
        states = zip(after.hidden_states, before.hidden_states, strict=True)
        assert all(torch.equal(one, other) for one, other in states)
        fastreduce.unpatch(model)
        assert [type(one) for one in model.modules()] == layers
    assert torch.equal(answer(run(model, name)), answer(before))


@pytest.mark.parametrize("name", MODELS)
def test_selections_equal_a_float64_oracle(name):
    prefix = MODELS[name][4]
    model = fastreduce.patch(build(name).double(), "topk", keep=KEEP, at=AT)
    assert fastreduce.reduced_counts(model) == list(KEEP)
    found = run(model, name, torch.float64, output_hidden_states=True)
    unpatched = build(name).double()
    oracle = Oracle(unpatched, prefix)
    masked = run(unpatched, name, torch.float64, output_hidden_states=True)
    expected = oracle.expected(masked.hidden_states)
    assert (oracle.dropped < 9).sum(1).tolist() == [expected.shape[2] - prefix - KEEP[1]] * 2
    near = 1e-5 if name == "aimv2" else 1e-10  # its norms compute in float32
    torch.testing.assert_close(torch.stack(found.hidden_states), expected, rtol=near, atol=near)
    if prefix and MODELS[name][0].endswith(("Classification", "Projection")) and "Dinov2" not in name.title():
        torch.testing.assert_close(answer(found), answer(masked), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3", "siglip", "videomae", "vjepa2"])
def test_the_order_of_merging_and_projecting_is_free(name):
    """A hook on the output projection, which looks at all tokens, forbids to merge before it."""
    for method in ("tome", "evit", "kmedoids", "dpcknn"):
        options = {"keep_rate": 0.6, "at": AT, "k_neighbors": 2} if method == "dpcknn" else {"keep_rate": 0.6, "at": AT}
        torch.manual_seed(0)
        model = fastreduce.patch(build(name).double(), method, **options)
        found = answer(run(model, name, torch.float64))
        for parts, block in _layers(model):
            out = getattr(parts.inside(block), parts.out, None) or parts.attention(block).output.dense
            out.register_forward_hook(lambda module, args, output: None)
        torch.testing.assert_close(answer(run(model, name, torch.float64)), found, rtol=1e-10, atol=1e-10)


def _blocks(model):
    return host_of(model).blocks(model)


def _layers(model):
    from fastreduce.integrations.block import ReducedBlock

    return [(one.parts, one) for one in model.modules() if isinstance(one, ReducedBlock)]


def test_a_mean_counts_every_patch_once():
    """The head of VideoMAE takes a plain mean: a merged token counts as often as it has patches."""
    model = fastreduce.patch(build("videomae"), "tome", keep_rate=0.6, at=AT)
    found = run(model, "videomae", output_hidden_states=True)
    full = found.hidden_states[-1]
    assert full.shape[1] == 32
    torch.testing.assert_close(found.logits, model.classifier(model.fc_norm(full.mean(1))))


@pytest.mark.parametrize("name", ["vit", "dinov3", "siglip", "vjepa2", "videomae"])
def test_gradients_and_checkpointing(name):
    model = build(name)
    fastreduce.patch(model, "topk", keep=KEEP, at=AT)
    given = inputs_of(name)

    def gradients():
        model.zero_grad()
        torch.manual_seed(2)  # DINOv3 moves its positions in training
        answer(model(**given)).square().sum().backward()
        return {key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None}

    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = gradients()
    assert any(("layer" in key and key.endswith("q_proj.weight")) or key.endswith("query.weight") for key in plain)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = gradients()
    assert plain.keys() == again.keys()
    for key in plain:
        torch.testing.assert_close(again[key], plain[key])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="reentrant"):
        gradients()


def test_a_mean_by_a_mask_gets_every_patch():
    options = {"vision_config": IMAGE | {"num_patches": 16}, "text_config": IMAGE | {"vocab_size": 9}}
    model = transformers.Siglip2ForImageClassification(transformers.Siglip2Config(**options)).eval()
    found = run(fastreduce.patch(model, "topk", keep=KEEP, at=AT), "siglip2", output_hidden_states=True)
    full = model.vision_model.post_layernorm(found.hidden_states[-1])
    torch.testing.assert_close(found.logits, model.classifier(full.mean(1)))
    fastreduce.patch(fastreduce.unpatch(model), "topk", keep=KEEP, at=AT, fill="zero")  # what dense features show
    again = run(model, "siglip2", output_hidden_states=True)
    assert torch.equal(again.logits, found.logits)
    assert again.hidden_states[-1].eq(0).all(2).sum(1).tolist() == [12, 12]


def test_eager_attention_is_respected():
    model = build("vit").double()
    given = answer(run(fastreduce.patch(model, "topk", keep=KEEP, at=AT), "vit", torch.float64))
    fastreduce.unpatch(model).set_attn_implementation("eager")
    fastreduce.patch(model, "topk", keep=KEEP, at=AT)
    # The library's eager attention takes its softmax in float32.
    torch.testing.assert_close(answer(run(model, "vit", torch.float64)), given, rtol=1e-6, atol=1e-6)


def pooled(output):
    """Return the answer, of tokens alone the class token."""
    found = answer(output)
    return found[:, 0] if found.ndim == 3 else found


def padded(name, real):
    """Make a batch of which every image but the first has ``real`` patches, in the last rows padding."""
    given = inputs_of(name, torch.float64)
    patches = 16 if name == "siglip2" else (SHAPES["sound"][0] // 6) * 3 if name == "ast" else 16
    mask = torch.ones(2, patches if name == "siglip2" else MODELS[name][4] + patches)
    mask[1, mask.shape[1] - patches + real :] = 0
    if name == "siglip2":
        shapes = torch.tensor([[4, 4], [real // 3, 3]])
        return given | {"pixel_attention_mask": mask.long(), "spatial_shapes": shapes}
    return given | {"attention_mask": mask}


def unpadded(model, name, real):
    """Return the answer for the second image of :func:`padded` alone, without its padding."""
    given = {key: one[1:2] for key, one in padded(name, real).items()}
    if name == "siglip2":
        given |= {key: given[key][:, :real] for key in ("pixel_values", "pixel_attention_mask")}
        return pooled(model(**given))
    del given["attention_mask"]
    cut = MODELS[name][4] + real
    embeddings = next(one for key, one in model.named_modules() if key.endswith("embeddings"))
    handle = embeddings.register_forward_hook(lambda module, args, output: output[:, :cut])
    found = pooled(model(**given))
    handle.remove()
    return found


def _takes_masks(name):
    """Return whether this version hands the layers a mask: kin of ViT from 5.9 on."""
    block = _blocks(build(name))[0]
    return "attention_mask" in inspect.signature(type(block).forward).parameters


TAKE_PADDING = [name for name in ("vit", "deit", "dinov2_registers", "vit_msn", "ast", "siglip2") if _takes_masks(name)]


@pytest.mark.parametrize("eager", [False, True], ids=["sdpa", "eager"])
@pytest.mark.parametrize("real", [12, 6])
@pytest.mark.parametrize("name", TAKE_PADDING)
def test_a_padded_image_gives_what_it_gives_without_padding(name, real, eager):
    """With as many tokens kept: of an image with fewer than the schedule keeps, padding is kept behind them."""
    # The library's eager attention takes its softmax in float32, its norms likewise.
    near = {"rtol": 1e-5, "atol": 1e-5} if eager else {"rtol": 1e-10, "atol": 1e-10}
    for method, options in (("topk", {}), ("evit", {}), ("evit", {"normalize": True}), ("ats", {"points": "exact"})):
        if method == "ats" and (name == "siglip2" or real < KEEP[0]):
            continue  # without a class token it is refused; its points are of the schedule, whatever there is
        model = build(name).double()
        if eager:
            model.set_attn_implementation("eager")
        with torch.no_grad():
            fastreduce.patch(model, method, keep=KEEP, at=AT, **options)
            found = pooled(model(**padded(name, real)))
            full = pooled(run(model, name, torch.float64))
            fastreduce.unpatch(model)
            fastreduce.patch(model, method, keep=[min(count, real) for count in KEEP], at=AT, **options)
            torch.testing.assert_close(found[1:], unpadded(model, name, real), **near)
            torch.testing.assert_close(found[:1], full[:1], **near)


@pytest.mark.parametrize("name", TAKE_PADDING)
def test_padding_without_reduction(name):
    model = build(name).double()
    with torch.no_grad():
        before = pooled(model(**padded(name, 12)))
        fastreduce.patch(model, "topk", keep_rate=1, at=AT)
        torch.testing.assert_close(pooled(model(**padded(name, 12))), before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", TAKE_PADDING)
def test_checkpointing_with_padding(name):
    """A layer runs again after a pass without a mask, and where there is a GPU in a thread of the engine's."""
    model = fastreduce.patch(build(name).double(), "topk", keep=KEEP, at=AT).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    given = padded(name, 12)
    masks = {key: None for key in given if key.endswith("mask")}

    def gradients(*, thread):
        model.zero_grad()
        loss = pooled(model(**given)).square().sum()
        model(**given | masks)
        with concurrent.futures.ThreadPoolExecutor(1) as other:
            other.submit(loss.backward).result() if thread else loss.backward()
        return {key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None}

    plain = gradients(thread=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for thread in (False, True):
        again = gradients(thread=thread)
        assert plain.keys() == again.keys()
        for key in plain:
            torch.testing.assert_close(again[key], plain[key])


only_with_masks = pytest.mark.skipif(
    "vit" not in TAKE_PADDING, reason=f"ViT takes no mask in transformers {transformers.__version__}"
)


class TestHiddenStates:
    def test_forms(self):
        model = build("vit")
        missing = [state is None for state in run(model, "vit", output_hidden_states=[-2]).hidden_states]
        shapes = {"full": [17] * 5, "reduced": [17, 17, 10, 5, 5]}
        for form, tokens in shapes.items():
            fastreduce.patch(model, "topk", keep=KEEP, at=AT, hidden_states=form)
            states = run(model, "vit", output_hidden_states=True).hidden_states
            assert [state.shape[1] for state in states] == tokens
            some = run(model, "vit", output_hidden_states=[-2]).hidden_states
            assert [state is None for state in some] == missing  # older versions take any list for a yes
            assert torch.equal(some[-2], states[-2])
            by_tuple = run(model, "vit", output_hidden_states=True, return_dict=False)
            assert torch.equal(by_tuple[1][2], states[2])
            fastreduce.unpatch(model)

    def test_zeros(self):
        model = fastreduce.patch(build("dinov3"), "topk", keep=KEEP, at=AT, fill="zero")
        last = run(model, "dinov3", output_hidden_states=True).hidden_states[-1]
        assert last.eq(0).all(2).sum(1).tolist() == [12, 12]

    def test_last_hidden_state_is_full_unless_asked(self):
        for form, tokens in (("full", 20), ("reduced", 8)):
            model = fastreduce.patch(build("dinov3"), "topk", keep=KEEP, at=AT, hidden_states=form)
            assert run(model, "dinov3").last_hidden_state.shape[1] == tokens

    def test_the_librarys_hooks_do_not_slow_it_down(self):
        """The library's hooks hang on attentions once hidden states were asked for, and change nothing."""
        model = fastreduce.patch(build("vit"), "topk", keep=KEEP, at=AT)
        run(model, "vit", output_hidden_states=True)
        parts, block = _layers(model)[0]
        if hasattr(transformers.utils, "output_capturing"):  # up to 5.1 it wraps forward for a pass
            assert parts.attention(block)._forward_hooks or parts.inside(block)._forward_hooks
        assert parts.geometry(block).module is None
        seen = []
        hook = parts.attention(block).register_forward_hook
        hook(lambda module, args, output: seen.append(parts.as_added(output).shape))
        run(model, "vit")
        assert seen == [(2, 17, 32)]

    def test_backbone(self):
        config = transformers.Dinov2Config(**IMAGE, out_features=["stage2", "stage4"])
        model = transformers.Dinov2Backbone(config).eval()
        before = run(model, "dinov2").feature_maps
        after = run(fastreduce.patch(model, "tome", keep_rate=0.5, at=AT), "dinov2").feature_maps
        assert [one.shape for one in after] == [one.shape for one in before]

    def test_packed_is_refused(self):
        model = fastreduce.patch(build("vit"), "ats", keep=KEEP, at=AT, packed=True)
        with pytest.raises(ValueError, match="packed=False"):
            run(model, "vit", output_hidden_states=True)


def llava(feature_layer=-2):
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**IMAGE),
        text_config=transformers.LlamaConfig(**text, num_key_value_heads=2, vocab_size=40),
        image_token_index=39,
        vision_feature_layer=feature_layer,
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize(("form", "tokens"), [("full", 16), ("reduced", 4)])
def test_tower_of_a_model_of_images_and_text(form, tokens):
    model = llava()
    words = torch.tensor([[1] + [39] * tokens + [2, 3]])
    given = {"input_ids": words, "pixel_values": inputs_of("vit")["pixel_values"][:1]}
    fastreduce.patch(model, "topk", keep=KEEP, at=AT, hidden_states=form)
    with torch.no_grad():
        logits = model(**given).logits
        alone = fastreduce.patch(llava().model.vision_tower, "topk", keep=KEEP, at=AT, hidden_states=form)
        state = alone(given["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        seen = model.get_image_features(given["pixel_values"]).pooler_output[0]
        torch.testing.assert_close(seen, model.model.multi_modal_projector(state)[0])
    assert logits.shape == (1, tokens + 3, 40)
    fastreduce.unpatch(model)


@pytest.mark.parametrize("method", ["topk", "evit"])
@pytest.mark.parametrize("name", ["siglip", "siglip2", "aimv2"])
def test_tokens_and_pooling_of_an_encoder_inside_of_something(name, method):
    """A model around it may read the full grid, and the pooling is that of the encoder alone."""

    class Around(transformers.PreTrainedModel):
        _supports_sdpa = True

        def __init__(self, eyes):
            super().__init__(eyes.config)
            self.eyes = eyes

        def forward(self, **given):
            return self.eyes(**given, output_hidden_states=True)

    given = inputs_of(name)
    if name == "siglip2":
        given = {key: one.to(given[key].dtype) for key, one in padded(name, 12).items()}
    with torch.no_grad():
        alone = fastreduce.patch(build(name), method, keep=KEEP, at=AT)(**given)
        model = fastreduce.patch(Around(build(name)), method, keep=KEEP, at=AT)
        found = model(**given)
        inner = getattr(model.eyes, "vision_model", model.eyes)  # up to transformers 5.4
        norm = inner.rms_norm if name == "aimv2" else inner.post_layernorm
        assert found.last_hidden_state.shape == (2, 16, 32)
        torch.testing.assert_close(found.last_hidden_state, norm(found.hidden_states[-1]))
        torch.testing.assert_close(found.pooler_output, alone.pooler_output)
        fastreduce.unpatch(model)
        torch.testing.assert_close(model(**given).pooler_output, build(name)(**given).pooler_output, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["topk", "sit"])
def test_save_and_load(method, tmp_path):
    model = fastreduce.patch(build("vit"), method, keep=KEEP, at=AT, backend="reference")
    before = answer(run(model, "vit"))
    model.save_pretrained(tmp_path)
    assert fastreduce.save_config(model, tmp_path) == tmp_path / "fastreduce.json"
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    assert not torch.equal(answer(run(loaded, "vit")), before)
    assert fastreduce.load_config(loaded, tmp_path) is loaded
    assert fastreduce.config_of(loaded)["backend"] == "reference"
    torch.testing.assert_close(answer(run(loaded, "vit")), before, rtol=0, atol=0)


def test_config_of_timm_and_its_errors(tmp_path):
    from bench.proof import tiny

    model = fastreduce.patch(tiny.build(), "tome", keep_rate=(0.5, 0.25), at=AT, rounds="exact")
    fastreduce.set_keep_rate(model, 0.7)
    fastreduce.save_config(model, tmp_path / "mine.json")
    loaded = fastreduce.load_config(tiny.build(), tmp_path / "mine.json", backend="reference")
    assert fastreduce.config_of(loaded) | {"backend": "auto"} == fastreduce.config_of(model) | {"at": list(AT)}
    with pytest.raises(FileNotFoundError, match="save_config"):
        fastreduce.load_config(tiny.build(), tmp_path)
    (tmp_path / "fastreduce.json").write_text("[]")
    with pytest.raises(ValueError, match="names no method"):
        fastreduce.load_config(tiny.build(), tmp_path)
    drawn = fastreduce.patch(tiny.build(), "dynamicvit", keep_rate=0.5, at=AT, generator=torch.Generator())
    with pytest.raises(ValueError, match="generator"):
        fastreduce.save_config(drawn, tmp_path)


def test_copies_and_records():
    model = fastreduce.patch(build("dinov3"), "topk", keep=KEEP, at=AT)
    twin = copy.deepcopy(model)
    with fastreduce.record(twin) as seen:
        found = run(twin, "dinov3", output_hidden_states=True)
    torch.testing.assert_close(
        found.hidden_states[-1], run(model, "dinov3", output_hidden_states=True).hidden_states[-1]
    )
    assert seen.stages[1].kept_patches.shape == (2, KEEP[1])
    fastreduce.unpatch(twin)
    assert fastreduce.is_patched(model)


def test_compiles_as_one_graph():
    model = fastreduce.patch(build("dinov3"), "topk", keep=KEEP, at=AT)
    expected = answer(run(model, "dinov3"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(answer(run(compiled, "dinov3")), expected)


@pytest.mark.parametrize("name", ["vit", "siglip", "siglip2", "metaclip2"])
def test_a_compiled_model_gives_the_same_hidden_states(name):
    """The library breaks graphs where it first collects them, and what one graph notes the next has to know."""
    given = inputs_of(name)
    if name == "siglip2":  # padding is noted likewise
        given = {key: one.to(given[key].dtype) for key, one in padded(name, 12).items()}
    torch._dynamo.reset()
    with torch.no_grad():
        expected = fastreduce.patch(build(name), "topk", keep=KEEP, at=AT)(**given, output_hidden_states=True)
        compiled = torch.compile(fastreduce.patch(build(name), "topk", keep=KEEP, at=AT), backend="eager")
        found = compiled(**given, output_hidden_states=True)
    torch.testing.assert_close(answer(found), answer(expected))
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(one, other)


class TestSubclasses:
    """A class of the user's with the library's forward is that of the library; with a forward of its own it is new."""

    @pytest.mark.parametrize("name", ["vit", "videomae", "siglip", "dinov3", "vjepa2"])
    def test_same_numbers(self, name):
        model = build(name)
        other = type("Mine", (type(model),), {})(model.config).eval()
        other.load_state_dict(model.state_dict())
        for one in (model, other):
            fastreduce.patch(one, "topk", keep=KEEP, at=AT)
        expected, found = (run(one, name, output_hidden_states=True) for one in (model, other))
        assert torch.equal(answer(found), answer(expected))
        states = zip(found.hidden_states, expected.hidden_states, strict=True)
        assert all(torch.equal(one, two) for one, two in states)

    @pytest.mark.parametrize(
        ("kind", "options", "words"),
        [
            ("ViTForMaskedImageModeling", {}, "reconstructs"),
            ("VideoMAEForVideoClassification", {"num_frames": 4, "use_mean_pooling": False}, "first patch"),
        ],
    )
    def test_same_refusals(self, kind, options, words):
        base = getattr(transformers, kind)
        config = base.config_class(**IMAGE | options)
        with pytest.raises(TypeError, match=words):
            fastreduce.patch(type("Mine", (base,), {})(config), "topk", keep=KEEP, at=AT)

    def test_a_forward_of_its_own_gets_the_full_grid(self):
        class Dense(transformers.ViTForImageClassification):
            def forward(self, pixel_values):
                return self.vit(pixel_values).last_hidden_state

        model = fastreduce.patch(Dense(transformers.ViTConfig(**IMAGE)).eval(), "topk", keep=KEEP, at=AT)
        assert run(model, "vit").shape == (2, 17, 32)


class TestRefusals:
    def test_attentions(self):
        model = fastreduce.patch(build("clip"), "topk", keep=KEEP, at=AT)
        model.set_attn_implementation("eager")
        with pytest.raises(ValueError, match="gives no attentions"):
            run(model, "clip", output_attentions=True)

    @only_with_masks
    def test_masks_that_are_no_padding(self):
        model = fastreduce.patch(build("vit"), "topk", keep=KEEP, at=AT)
        pairs = torch.ones(2, 1, 17, 17).tril().bool()
        with pytest.raises(ValueError, match="hides others from each"):
            model(**inputs_of("vit"), attention_mask=pairs)

    @pytest.mark.parametrize(
        ("method", "options", "words"),
        [("tome", {}, "tome cannot tell padding"), ("ats", {"packed": True}, "ats with packed=True cannot tell")],
    )
    @only_with_masks
    def test_methods_that_know_no_padding(self, method, options, words):
        model = fastreduce.patch(build("vit"), method, keep=KEEP, at=AT, **options)
        with pytest.raises(ValueError, match=words):
            model(**inputs_of("vit"), attention_mask=torch.ones(2, 17).index_fill(1, torch.tensor([16]), 0))

    @pytest.mark.skipif(not _takes_masks("dinov2"), reason=f"DINOv2 takes no mask in {transformers.__version__}")
    def test_a_mean_that_counts_padding(self):
        model = fastreduce.patch(build("dinov2"), "topk", keep=KEEP, at=AT)
        with pytest.raises(ValueError, match="behind a norm"):
            model(**inputs_of("dinov2"), attention_mask=torch.ones(2, 17).index_fill(1, torch.tensor([16]), 0))

    @pytest.mark.parametrize(
        ("kind", "config", "options", "words"),
        [
            ("ViTForMaskedImageModeling", "ViTConfig", IMAGE, "reconstructs"),
            ("VideoMAEForVideoClassification", "VideoMAEConfig", IMAGE | {"use_mean_pooling": False}, "first patch"),
            ("LlamaModel", "LlamaConfig", {"num_hidden_layers": 1, "vocab_size": 9}, "none of the encoders"),
            ("SwinModel", "SwinConfig", {"depths": [1], "num_heads": [1], "embed_dim": 8}, "windows"),
            ("DonutSwinModel", "DonutSwinConfig", {"depths": [1], "num_heads": [1], "embed_dim": 8}, "windows"),
            ("SegformerModel", "SegformerConfig", {}, "hierarchy"),
            ("ViTMAEModel", "ViTMAEConfig", IMAGE, "leaves patches out itself"),
        ],
    )
    def test_models(self, kind, config, options, words):
        small = options | (
            {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1} if kind[0] == "L" else {}
        )
        model = getattr(transformers, kind)(getattr(transformers, config)(**small))
        with pytest.raises(TypeError, match=words):
            fastreduce.patch(model, "topk")
        assert not fastreduce.is_patched(model)

    def test_axes(self):
        with pytest.raises(ValueError, match="rows and columns"):
            fastreduce.patch(build("vivit"), "radial", norm="l2")

    def test_attention_of_the_users(self):
        class Mine(nn.Module):
            def forward(self, x, *args, **kwargs):
                return x, None

        model = build("vit")
        _blocks(model)[2].attention = Mine()
        with pytest.raises(TypeError, match="Mine attention"):
            fastreduce.patch(model, "topk", at=AT)

    def test_inside_of_something(self):
        small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
        words = transformers.LlamaConfig(**small, vocab_size=9)
        both = nn.ModuleDict({"words": transformers.LlamaModel(words), "eyes": build("siglip")})
        with pytest.raises(TypeError, match=r"give the SiglipVisionModel inside of it, \.eyes"):
            fastreduce.patch(both, "topk")
        clips = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**IMAGE))
        model = llava()
        model.second_tower = clips
        with pytest.raises(TypeError, match=r"\.model\.vision_tower and the CLIPVisionModel \.second_tower"):
            fastreduce.patch(model, "topk")

    def test_timm_inside(self):
        """The message leads to timm's model, which is reduced inside of what the library made around it."""
        config = transformers.TimmBackboneConfig(
            backbone="vit_tiny_patch16_224", out_indices=[5, 11], use_pretrained_backbone=False
        )
        model = transformers.TimmBackbone(config).eval()
        with pytest.raises(TypeError, match=r"give the VisionTransformer of timm inside of it, \._backbone\.model$"):
            fastreduce.patch(model, "topk")
        images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            before = model(images).feature_maps
            fastreduce.patch(model._backbone.model, "topk", keep_rate=0.5, at=8)
            after = model(images).feature_maps
        torch.testing.assert_close(after[0], before[0])
        assert after[1].shape == before[1].shape
        assert not torch.equal(after[1], before[1])

    def test_other_versions(self):
        model = build("dinov2")
        block = _blocks(model)[2]
        parts = parts_of(type(block))
        delattr(parts.inside(block), parts.qkv[1])
        with pytest.raises(TypeError, match=rf"no {parts.qkv[1]}.*another version"):
            fastreduce.patch(model, "topk", at=AT)

    def test_bad_form(self):
        with pytest.raises(ValueError, match="'full' or 'reduced'"):
            fastreduce.patch(build("vit"), "topk", hidden_states="dense")


@pytest.mark.parametrize("method", sorted(fastreduce.REDUCERS))
def test_every_method(method):
    options = {"k_neighbors": 2} if method == "dpcknn" else {}
    schedule = {"norm": "l2"} if method == "radial" else {"keep": KEEP}
    torch.manual_seed(0)
    model = fastreduce.patch(build("dinov3"), method, at=AT, **schedule, **options)
    output = run(model, "dinov3", output_hidden_states=True)
    assert [state.shape for state in output.hidden_states] == [(2, 20, 32)] * 5
    assert output.last_hidden_state.isfinite().all()
    assert reducer_of(model).name == method


def test_nothing_is_imported_that_is_not_needed():
    code = "import sys, timm, fastreduce; from bench.proof import tiny; fastreduce.patch(tiny.build(), 'topk');"
    code += "assert not {'transformers', 'open_clip'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_folder_is_opened(tmp_path):
    from fastreduce.integrations.hf.folders import answer_of, open_folder

    build("vit").save_pretrained(tmp_path)
    opened = open_folder(f"hf:{tmp_path}")
    assert opened.config["input_size"] == (3, 32, 32)
    assert torch.equal(answer_of(run(opened.model, "vit")), answer(run(build("vit"), "vit")))
    words = '{"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": true,'
    (tmp_path / "preprocessor_config.json").write_text(words + '"image_mean": [0.1, 0.2, 0.3], "resample": 3}')
    config = open_folder(tmp_path).config
    assert (config["crop_pct"], config["mean"], config["interpolation"]) == (32 / 36, (0.1, 0.2, 0.3), "bicubic")
    with pytest.raises(ValueError, match=r"no config\.json"):
        open_folder(tmp_path / "nothing")
    with pytest.raises(TypeError, match="neither logits"):
        answer_of(object())
