"""ATS without padding: the same logits, decisions and gradients as padded, and layers that see real tokens only."""

import copy

import pytest
import torch
import torch.nn.functional as F

import fastreduce
from bench.proof import tiny
from fastreduce import backends, ops, reference
from fastreduce.ops.gather_packed import GatherPacked, UnpackTokens
from fastreduce.ops.linear_packed import LinearPacked
from fastreduce.tokens import Tokens
from tests.helpers.inputs import seeded, tokens

OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
AT = {"keep_rate": 0.7, "at": (1, 2)}


def both(model, **options):
    """Return the model with padding and without."""
    return [fastreduce.patch(copy.deepcopy(model), "ats", **AT, packed=packed, **options) for packed in (False, True)]


def run(model, images):
    """Return logits, stages, and gradients by name."""
    torch.manual_seed(0)
    with fastreduce.record(model) as seen:
        logits = model(images)
    logits.square().sum().backward()
    return logits.detach(), seen.stages, {name: value.grad for name, value in model.named_parameters()}


def assert_same(ours, expected):
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-5)
    for stage, other in zip(ours[1], expected[1], strict=True):
        for name in ("num_in", "num_out"):
            assert getattr(stage, name) == getattr(other, name)
        for name in ("kept", "kept_patches", "slot", "patch_slot", "sizes"):
            assert torch.equal(getattr(stage, name), getattr(other, name)), name
    largest = max(value.abs().max() for value in expected[2].values())
    for name, value in expected[2].items():
        assert (ours[2][name] - value).abs().max() <= 1e-5 * largest, name


class TestModel:
    @pytest.mark.parametrize("trim", [None, False], ids=["exact", "with room"])
    @pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"global_pool": "avg"}], ids=["class", "four", "avg"])
    @pytest.mark.parametrize("batch", [1, 3])
    def test_same_logits_decisions_and_gradients(self, batch, options, trim):
        model = tiny.build(**options)
        padded, packed = (run(m, tiny.images(model, batch)) for m in both(model, trim=trim))
        assert_same(packed, padded)
        if batch == 3:
            assert len(set((padded[1][0].kept >= 0).sum(1).tolist())) > 1  # images of different lengths

    def test_images_of_one_length_need_no_packing(self):
        model = tiny.build()
        padded, packed = both(model)
        images = tiny.images(model, 1).expand(3, -1, -1, -1)
        assert torch.equal(packed(images), padded(images))

    def test_no_images(self):
        logits = [model(torch.empty(0, 3, 64, 64)) for model in both(tiny.build())]
        assert logits[0].shape == logits[1].shape

    @pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"])
    def test_other_models(self, name):
        model = tiny.build(name, img_size=56 if "14" in name else 64)
        padded, packed = (run(m, tiny.images(model, 3)) for m in both(model))
        assert_same(packed, padded)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_other_dtypes(self, dtype):
        model = tiny.build().to(dtype)
        padded, packed = (m(tiny.images(model, 3, dtype=dtype)) for m in both(model))
        torch.testing.assert_close(packed, padded, **({"rtol": 0.1, "atol": 0.3} if dtype == torch.bfloat16 else {}))

    def test_layers_see_the_tokens_that_are_there(self):
        model = fastreduce.patch(tiny.build(), "ats", **AT, packed=True)
        rows = []
        for block in list(model.blocks)[1:]:
            block.mlp.register_forward_pre_hook(lambda _, inputs: rows.append(tuple(inputs[0].shape)))
        with fastreduce.record(model) as seen:
            model(tiny.images(model, 3))
        first, second = (3 + int((stage.kept >= 0).sum()) for stage in seen.stages)
        assert rows == [(1, first, 48), (1, second, 48), (1, second, 48)]
        assert second < 3 * (1 + seen.stages[1].num_out)

    def test_features_are_those_of_the_padded_form_with_zeros_behind(self):
        model = tiny.build()
        images = tiny.images(model, 3)
        padded, packed = both(model)
        with fastreduce.record(packed) as seen:
            features = packed.forward_features(images)
        real = F.pad(seen.stages[-1].kept >= 0, (1, 0), value=True)
        assert not real.all()
        expected = padded.forward_features(images)
        assert features.shape == expected.shape
        torch.testing.assert_close(features[real], expected[real], rtol=1e-5, atol=1e-5)
        assert torch.equal(features[~real], model.norm.bias.expand_as(features[~real]))
        final, intermediates = packed.forward_intermediates(images, norm=True)
        torch.testing.assert_close(
            intermediates, padded.forward_intermediates(images, norm=True)[1], rtol=1e-5, atol=1e-5
        )
        assert torch.equal(final, features)

    def test_drop_path_leaves_the_same_images_out(self):
        model = tiny.build(drop_path_rate=0.5, global_pool="avg").train()
        padded, packed = (run(m, tiny.images(model, 5)) for m in both(model))
        assert_same(packed, padded)
        assert not torch.allclose(packed[0], both(model.eval())[1](tiny.images(model, 5)))

    def test_attention_dropout_is_refused_in_training(self):
        model = fastreduce.patch(tiny.build(attn_drop_rate=0.1, proj_drop_rate=0.1), "ats", **AT, packed=True)
        images = tiny.images(model)
        assert model(images).isfinite().all()
        with pytest.raises(ValueError, match=r"block 1 has attn_drop=0\.1.*packed=False"):
            model.train()(images)

    def test_gradient_checkpointing(self):
        results = []
        for checkpointing in (False, True):
            model = fastreduce.patch(tiny.build().train(), "ats", **AT, packed=True)
            model.set_grad_checkpointing(checkpointing)
            results.append(run(model, tiny.images(model, 3)))
        assert_same(*results[::-1])

    def test_autocast(self):
        model = tiny.build()
        padded, packed = both(model)
        with torch.autocast("cpu", torch.bfloat16):
            images = tiny.images(model, 3)
            torch.testing.assert_close(packed(images), padded(images), rtol=0.1, atol=0.3)

    def test_kernels_need_nothing_from_the_device(self, monkeypatch):
        """All is one graph of fixed shapes where kernels run; a number read by the host would be a break."""
        model = tiny.build(drop_path_rate=0.3).train()
        padded, packed = (run(m, tiny.images(model, 3)) for m in both(model, trim=False))
        assert_same(packed, padded)
        monkeypatch.setattr(backends, "INTERPRETING", True)  # resolves to the kernels' operators, whose CPU form runs
        ours = both(model, backend="triton")[1]
        torch._dynamo.reset()
        torch.manual_seed(0)
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        compiled(tiny.images(model, 3)).square().sum().backward()
        torch._dynamo.reset()
        largest = max(value.abs().max() for value in padded[2].values())
        for name, value in ours.named_parameters():
            assert (value.grad - padded[2][name]).abs().max() <= 1e-5 * largest, name

    def test_compiled_on_the_cpu(self):
        model = fastreduce.patch(tiny.build(depth=1, img_size=32), "ats", at=0, keep_rate=0.7, packed=True)
        images = tiny.images(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")(images)
        torch._dynamo.reset()
        torch.testing.assert_close(compiled, model(images), rtol=1e-5, atol=1e-5)

    def test_whole_mlps_are_called_where_they_are_more_than_two_products(self, monkeypatch):
        monkeypatch.setattr(backends, "INTERPRETING", True)
        model, calls = fastreduce.patch(tiny.build(), "ats", **AT, packed=True, trim=False, backend="triton"), []
        images = tiny.images(model)
        expected = model(images)
        model.blocks[2].mlp.register_forward_hook(lambda *_: calls.append("mlp"))
        model.blocks[3].attn.proj.register_forward_hook(lambda *_: calls.append("proj"))
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
        assert calls == ["mlp", "proj"]

    @pytest.mark.parametrize("packed", [None, 1, "yes"])
    def test_option(self, packed):
        with pytest.raises(TypeError, match=f"packed must be True or False, got {packed!r}"):
            fastreduce.patch(tiny.build(), "ats", packed=packed)


def test_packed_tokens_know_their_images():
    x = tokens(2, 5, 4)
    packed, packing = Tokens(x, prefix=1, patches=4).packed()
    assert packing.offsets.tolist() == [0, 5, 10]
    assert packed.batch == 2
    assert packed.num_patches == 4
    assert packed.packed() == (packed, packing)
    assert torch.equal(packed.unpacked().x, x)
    assert packing.spread(torch.tensor([3, 7]), 12).tolist() == [3] * 5 + [7] * 7


def ragged(counts, kept, prefix, channels=3, dtype=torch.float64):
    """Make packed tokens of images with so many patch tokens, which keep so many."""
    offsets = [
        torch.tensor([0, *(prefix + n for n in given)], dtype=torch.int32).cumsum(0).int() for given in (counts, kept)
    ]
    room = 2 if counts else 0
    x = tokens(1, int(offsets[0][-1]) + room, channels, dtype=dtype)
    index = torch.zeros(len(counts), max(kept, default=0), dtype=torch.int64)
    for image, (count, keep) in enumerate(zip(counts, kept, strict=True)):
        index[image, :keep] = torch.randperm(count, generator=seeded(image))[:keep].sort().values
    num_out = int(offsets[1][-1]) + room
    return x, index, tuple(offsets), num_out, tokens(1, num_out, channels, dtype=dtype, seed=1)


RAGGED = [((4, 6, 5), (3, 1, 5), 1), ((2, 0, 3), (2, 0, 1), 0), ((3,), (2,), 2), ((), (), 1)]


class TestOps:
    @pytest.mark.parametrize(("counts", "kept", "prefix"), RAGGED)
    def test_gather_packed(self, counts, kept, prefix):
        x, index, offsets, num_out, residual = ragged(counts, kept, prefix)
        arguments = {"num_out": num_out, "prefix": prefix, "residual": residual}
        out = ops.gather_packed(x, index, offsets, **arguments)
        source, target = (bounds.tolist() for bounds in offsets)
        expected = torch.zeros_like(out)
        for b, keep in enumerate(kept):
            rows = torch.cat([torch.arange(prefix), prefix + index[b, :keep]]) + source[b]
            image = slice(target[b], target[b + 1])
            expected[0, image] = x[0, rows] + residual[0, image]
        assert torch.equal(out, expected)
        call = (x, index, *offsets, prefix, num_out, residual)
        leaves = [x.requires_grad_(), residual.requires_grad_()]
        gradients = []
        for result in (GatherPacked.apply(*call), ops.gather_packed(x, index, offsets, **arguments)):
            grad = tokens(*result.shape, dtype=torch.float64, seed=3)
            grad[:, target[-1] :] = 0.0
            gradients.append(torch.autograd.grad(result, leaves, grad))
        for ours, autograd in zip(*gradients, strict=True):
            assert torch.equal(ours, autograd)

    def test_unpack_tokens(self):
        offsets = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
        x = tokens(1, 9, 2, dtype=torch.float64).requires_grad_()
        out = ops.unpack_tokens(x, offsets, longest=5)
        for b, (begin, end) in enumerate([(0, 3), (3, 3), (3, 7)]):
            assert torch.equal(out[b, : end - begin], x[0, begin:end])
            assert not out[b, end - begin :].any()
        assert torch.autograd.gradcheck(lambda x: UnpackTokens.apply(x, offsets, 5), x)
        assert torch.autograd.gradcheck(lambda x: ops.unpack_tokens(x, offsets, longest=5), x)

    def test_token_offsets(self):
        valid = torch.rand(5, 7, generator=seeded()) < 0.5
        assert ops.token_offsets(valid).tolist() == [int(valid[:b].sum()) for b in range(6)]
        assert ops.token_offsets(valid[:0]).tolist() == [0]

    @pytest.mark.parametrize("bias", [False, True])
    def test_linear_packed(self, bias):
        x, weight = tokens(1, 6, 3, dtype=torch.float64), tokens(4, 3, dtype=torch.float64, seed=1)
        leaves = [x.requires_grad_(), weight.requires_grad_()]
        leaves += [tokens(4, dtype=torch.float64, seed=2).requires_grad_()] if bias else []
        offsets = torch.tensor([0, 2, 4], dtype=torch.int32)

        def call(x, weight, bias=None):
            return LinearPacked.apply(x, weight, bias, offsets)

        out = call(*leaves)
        assert torch.equal(out, ops.linear_packed(x, weight, leaves[2] if bias else None, offsets))
        assert torch.equal(out[:, :4], F.linear(x[:, :4], weight, leaves[2] if bias else None))
        assert not out[:, 4:].any()
        assert torch.autograd.gradcheck(call, leaves)

    def test_scores_are_those_of_every_image_alone(self):
        qkv = tokens(1, 12, 3, 2, 4, dtype=torch.float64)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        offsets = torch.tensor([0, 5, 6, 9], dtype=torch.int32)
        first = q[0].index_select(1, offsets[:-1]).transpose(0, 1)
        scores = ops.cls_value_scores_packed(first, k, v, offsets, 7)
        assert scores.shape == (3, 6)
        for b, (begin, end) in enumerate([(0, 5), (5, 6), (6, 9)]):
            alone = ops.cls_value_scores(first[b : b + 1], k[:, :, begin:end], v[:, :, begin:end])
            assert torch.equal(scores[b : b + 1, : end - begin - 1], alone)
            assert not scores[b, end - begin - 1 :].any()
        with pytest.raises(ValueError, match="k and value must have one shape"):
            ops.cls_value_scores_packed(first, k, v[:, :, 1:], offsets, 7)
        with pytest.raises(ValueError, match="longest must be between 0"):
            ops.cls_value_scores_packed(first, k, v, offsets, -1)

    def test_opcheck(self):
        x, index, offsets, num_out, residual = ragged((4, 6, 5), (3, 1, 5), 1, dtype=torch.float32)
        kernels = torch.ops.fastreduce
        first, k = tokens(3, 2, 4), tokens(1, 2, 18, 4)
        weight = tokens(4, 3)
        for op, arguments in (
            (kernels.token_offsets, (torch.ones(2, 3, dtype=torch.bool),)),
            (kernels.gather_packed, (x, index, *offsets, 1, num_out, residual)),
            (kernels.gather_packed_backward, (residual, index, *offsets, 1, x.shape[1])),
            (kernels.unpack_tokens, (x, offsets[0], 7)),
            (kernels.unpack_tokens_backward, (tokens(3, 7, 3), offsets[0], 20)),
            (kernels.linear_packed, (x, weight, tokens(4), offsets[0])),
            (kernels.linear_packed_backward, (tokens(1, x.shape[1], 4), x, weight, offsets[0], (True, True, False))),
        ):
            torch.library.opcheck(op.default, arguments, test_utils=OPCHECKS)
        scores = (first, k, k, offsets[0], 7, 1, 0.5)
        torch.library.opcheck(kernels.cls_value_scores_packed.default, scores, test_utils=OPCHECKS[:2])

    def test_errors(self):
        x, index, offsets, _, residual = ragged((4, 6), (3, 1), 1)
        short = offsets[0][:2]
        for error, words, call in (
            (ValueError, r"\(1, T, C\), got \(2, 3, 4\)", lambda: ops.unpack_tokens(tokens(2, 3, 4), short, longest=3)),
            (TypeError, "int32, got torch.int64", lambda: ops.unpack_tokens(x, short.long(), longest=3)),
            (ValueError, "longest must be between", lambda: ops.unpack_tokens(x, short, longest=-1)),
            (ValueError, "as many images", lambda: ops.gather_packed(x, index, (short, short), num_out=4)),
            (ValueError, "residual must", lambda: ops.gather_packed(x, index, offsets, num_out=4, residual=residual)),
            (TypeError, "valid must be bool", lambda: ops.token_offsets(index)),
            (ValueError, r"\(1, T, 4\)", lambda: ops.linear_packed(x, tokens(2, 4, dtype=x.dtype), None, short)),
            (ValueError, "bias must", lambda: ops.linear_packed(x, x[0, :2], x[0, 0], short)),
            (ValueError, r"q must have shape \(1, 2, 4\)", lambda: _scores(short)),
        ):
            with pytest.raises(error, match=words):
                call()


def _scores(offsets):
    k = tokens(1, 2, 9, 4)
    return ops.cls_value_scores_packed(tokens(3, 2, 4), k, k, offsets, 5)


def test_capacity_rows_mean_nothing():
    """Rows behind the last image reach no result and no gradient."""
    x, index, offsets, num_out, _ = ragged((4, 6), (3, 1), 1, dtype=torch.float32)
    spoilt = x.clone()
    spoilt[:, offsets[0][-1] :] = float("nan")
    for call in (
        lambda x: ops.gather_packed(x, index, offsets, num_out=num_out),
        lambda x: ops.unpack_tokens(x, offsets[0], longest=8),
        lambda x: ops.linear_packed(x, tokens(4, 3), None, offsets[0]),
        lambda x: reference.linear_packed_backward(x, x, tokens(3, 3), offsets[0])[1],
    ):
        assert torch.equal(call(spoilt), call(x))


@pytest.mark.parametrize("change", ["another module", "a hook", "dropout outside of training", "fused dropout"])
def test_what_has_to_see_the_weights_is_refused(change):
    """There is no matrix of weights: what the user put in their way is not left out in silence."""
    model = tiny.build(attn_drop_rate=0.3).eval()
    for block in model.blocks:
        attention = block.attn
        attention.fused_attn = change == "fused dropout"
        if change == "another module":
            attention.attn_drop = torch.nn.Softmax(-1)
        elif change == "a hook":
            attention.attn_drop.register_forward_hook(lambda module, inputs, output: output * 0.5)
        elif change == "fused dropout":
            attention.training = True
        else:
            attention.attn_drop.train()
    padded, packed = both(model)
    images = tiny.images(model, batch=4)
    assert padded(images).isfinite().all()
    with pytest.raises(ValueError, match=r"attn_drop of block 1 .*packed=False"):
        packed(images)
