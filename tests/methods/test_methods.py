"""Single methods: what is particular to them, beyond the numbers that test_golden.py and test_families.py hold."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import fastreduce
from bench.proof import tiny
from fastreduce.reducers.dynamicvit import KeepPredictor
from fastreduce.reducers.patchmerger import MergerQueries
from fastreduce.reducers.sit import SliceWeights
from tests import golden
from tests.helpers.inputs import seeded

SEVEN = ("dynamicvit", "ats", "kmedoids", "dpcknn", "sit", "patchmerger", "sinkhorn")


def _run(model, images=None):
    with torch.no_grad():
        return model(tiny.images(model) if images is None else images)


def _units(name):
    return golden.below(golden.read("units")[0], f"{name}/")


class TestEdges:
    @pytest.mark.parametrize("method", SEVEN)
    def test_one_token_left(self, method):
        model, plain = tiny.reduced_and_plain(tiny.build().double(), method=method, keep=(2, 1), at=(1, 2))
        images = tiny.images(model, dtype=torch.float64)
        with fastreduce.record(model) as seen:
            logits = _run(model, images)
        torch.testing.assert_close(logits, _run(plain, images), rtol=1e-8, atol=1e-8)
        assert seen.stages[-1].num_out == 1

    @pytest.mark.parametrize("method", SEVEN)
    def test_the_same_count_twice(self, method):
        """A second stage that has nothing to drop passes; ATS samples and soft methods mix all the same."""
        model, plain = tiny.reduced_and_plain(tiny.build().double(), method=method, keep=(8, 8), at=(1, 3))
        images = tiny.images(model, dtype=torch.float64)
        with fastreduce.record(model) as seen:
            torch.testing.assert_close(_run(model, images), _run(plain, images), rtol=1e-8, atol=1e-8)
        assert [stage.block for stage in seen.stages] == ([1, 3] if method in tiny.NEVER_IDLE else [1])

    @pytest.mark.parametrize("method", ["dynamicvit", "ats", "kmedoids", "dpcknn"])
    def test_more_wanted_than_there_is(self, method):
        """Counts made for a larger image: a smaller one keeps what it has (ATS what it samples)."""
        model, plain = tiny.reduced_and_plain(
            tiny.build(dynamic_img_size=True).double(), method=method, keep=(12, 3), at=(1, 2)
        )
        images = torch.randn(2, 3, 48, 48, dtype=torch.float64, generator=seeded(3))
        with fastreduce.record(model) as seen:
            torch.testing.assert_close(_run(model, images), _run(plain, images), rtol=1e-8, atol=1e-8)
        assert seen.stages[0].num_in == 9
        assert seen.stages[-1].num_out <= 3

    @pytest.mark.parametrize("method", ["sit", "patchmerger", "sinkhorn"])
    def test_fewer_tokens_than_a_soft_method_was_made_for(self, method):
        model = fastreduce.patch(tiny.build(dynamic_img_size=True), method, keep=(12, 3), at=(1, 2))
        with pytest.raises(ValueError, match=rf"{method} was made for 12 tokens.*only 9"):
            _run(model, torch.zeros(1, 3, 48, 48))

    def test_fewer_tokens_than_neighbours(self):
        model, plain = tiny.reduced_and_plain(
            tiny.build().double(), method="dpcknn", keep=(3, 2), at=(1, 2), k_neighbors=200
        )
        images = tiny.images(model, dtype=torch.float64)
        torch.testing.assert_close(_run(model, images), _run(plain, images), rtol=1e-8, atol=1e-8)

    @pytest.mark.parametrize("method", SEVEN)
    def test_an_empty_batch(self, method):
        model = fastreduce.patch(tiny.build(), method, keep_rate=0.5, at=tiny.AT)
        assert _run(model, torch.zeros(0, 3, 64, 64)).shape == (0, 7)

    @pytest.mark.parametrize("method", SEVEN)
    def test_images_do_not_depend_on_their_batch(self, method):
        model = tiny.reduced_and_plain(tiny.build().double(), method=method, keep_rate=0.5, at=tiny.AT)[0]
        images = tiny.images(model, batch=3, dtype=torch.float64)
        alone = torch.cat([_run(model, image.unsqueeze(0)) for image in images])
        torch.testing.assert_close(_run(model, images), alone, rtol=1e-10, atol=1e-10)


class TestATS:
    def test_padding_does_not_change_logits(self):
        """Cut to the longest image, or all sampling points: the same numbers."""
        images = tiny.images(tiny.build(), batch=4)
        results = {}
        for trim in (None, True, False):
            model = fastreduce.patch(tiny.build(), "ats", keep_rate=0.9, at=tiny.AT, trim=trim)
            with fastreduce.record(model) as seen:
                results[trim] = _run(model, images), [stage.kept for stage in seen.stages]
        wide = fastreduce.reduced_counts(model)
        assert [kept.shape[1] for kept in results[False][1]] == wide
        assert [kept.shape[1] for kept in results[None][1]] < wide
        for trim in (None, True):
            torch.testing.assert_close(results[trim][0], results[False][0], rtol=1e-5, atol=1e-5)
            for short, long in zip(results[trim][1], results[False][1], strict=True):
                assert torch.equal(short, long[:, : short.shape[1]])
                assert (long[:, short.shape[1] :] == -1).all()

    def test_padding_gets_no_gradient_and_no_weight(self):
        model = fastreduce.patch(tiny.build(), "ats", keep_rate=0.9, at=tiny.AT, trim=False)
        images = tiny.images(model, batch=3).requires_grad_()
        model(images).square().sum().backward()
        trimmed = fastreduce.patch(tiny.build(), "ats", keep_rate=0.9, at=tiny.AT, trim=True)
        again = tiny.images(model, batch=3).requires_grad_()
        trimmed(again).square().sum().backward()
        torch.testing.assert_close(again.grad, images.grad, rtol=1e-4, atol=1e-5 * images.grad.abs().max().item())

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"class_token": False, "global_pool": "avg"}, "class token"),
            ({"global_pool": "max"}, "global_pool='max'"),
            ({"global_pool": "avg", "fc_norm": False}, "global_pool='avg'"),
        ],
    )
    def test_models_that_it_cannot_serve(self, changes, words):
        with pytest.raises(ValueError, match=words):
            fastreduce.patch(tiny.build(**changes), "ats", keep_rate=0.5, at=tiny.AT)

    def test_a_pooling_that_changes_later(self):
        model = fastreduce.patch(tiny.build(), "ats", keep_rate=0.9, at=tiny.AT)
        model.reset_classifier(3, "max")
        with pytest.raises(ValueError, match="global_pool='max'"):
            _run(model, tiny.images(model, batch=4))

    def test_another_default_dtype(self):
        """The padding's bias belongs to the model's own numbers."""
        images = tiny.images(tiny.build(), batch=4)
        model = fastreduce.patch(tiny.build(), "ats", keep_rate=0.9, at=tiny.AT, trim=False)
        expected = _run(model, images)
        for dtype in (torch.float64, torch.float16):
            torch.set_default_dtype(dtype)
            try:
                assert torch.equal(_run(model, images), expected)
            finally:
                torch.set_default_dtype(torch.float32)

    def test_tensors_without_numbers(self):
        """Nobody can know how long the images are: padding stays."""
        model = fastreduce.patch(tiny.build(), "ats", keep_rate=0.9, at=tiny.AT, packed=True)
        images = tiny.images(model)
        expected = _run(model, images)
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert _run(model, torch.empty_like(images)).shape == expected.shape
        assert torch.equal(_run(model, images), expected)
        meta = copy.deepcopy(model).to("meta")
        assert _run(meta, images.to("meta")).shape == expected.shape

    @pytest.mark.parametrize("mode", ["batches", "per image"])
    def test_packed_under_transforms(self, mode):
        model = fastreduce.patch(tiny.build().double(), "ats", keep_rate=0.9, at=tiny.AT, packed=True)
        images = tiny.images(model, batch=4, dtype=torch.float64)
        expected = images.clone().requires_grad_()
        model(expected).square().sum().backward()
        if mode == "per image":
            each = torch.func.vmap(torch.func.grad(lambda image: model(image[None]).square().sum()))(images)
            torch.testing.assert_close(each, expected.grad, rtol=1e-6, atol=1e-9)
        else:
            logits = torch.func.vmap(model)(images.unflatten(0, (2, 2))).flatten(0, 1)
            torch.testing.assert_close(logits, _run(model, images), rtol=1e-9, atol=1e-9)


class TestDynamicViT:
    def test_predictor(self):
        units = _units("predictor")
        predictor = KeepPredictor(16)
        predictor.load_state_dict(golden.below(units, "sd/"))
        out = predictor(units["x"], units["policy"].squeeze(-1).float())
        torch.testing.assert_close(out, units["out"], rtol=1e-5, atol=1e-6)
        everything = predictor(units["x"], None)
        torch.testing.assert_close(everything, predictor(units["x"], torch.ones(2, 11)), rtol=1e-5, atol=1e-6)

    def test_nothing_left_is_no_nan(self):
        """The released code divides zero by zero."""
        units = _units("predictor")
        predictor = KeepPredictor(16)
        predictor.load_state_dict(golden.below(units, "sd/"))
        assert units["out_all_zero_is_nan"].any()
        assert predictor(units["x"], torch.zeros(2, 11)).isfinite().all()

    def test_a_mean_of_nothing_is_zero(self):
        """Where every patch was dropped a mean over patches has nothing to divide by."""
        model = fastreduce.patch(tiny.build(global_pool="avg", fc_norm=True), "dynamicvit", keep_rate=0.5, at=tiny.AT)
        with torch.no_grad():
            for layers in model.reducers.score_predictor:
                layers.out_conv[4].bias.copy_(torch.tensor([-60.0, 60.0]))
        with fastreduce.record(model.train()) as seen:
            logits = model(tiny.images(model))
        assert seen.decisions[-1].sum() == 0
        of_zeros = model.head(model.fc_norm(torch.zeros(2, model.embed_dim)))
        torch.testing.assert_close(logits, of_zeros)
        logits.square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    def test_decisions_only_shrink_and_follow_the_generator(self):
        generator = torch.Generator()
        model = fastreduce.patch(tiny.build(), "dynamicvit", keep_rate=0.5, at=tiny.AT, generator=generator).train()
        images, seen = tiny.images(model), []
        for seed in (1, 1, 2):
            generator.manual_seed(seed)
            with fastreduce.record(model) as record:
                model(images)
            assert len(record.decisions) == 3
            assert not record.stages
            seen.append([decision.detach() for decision in record.decisions])
        for earlier, later in zip(seen[0], seen[0][1:], strict=False):
            assert ((earlier == 0) | (earlier == 1)).all()
            assert (later <= earlier).all()
        assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
        assert not torch.equal(seen[0][0], seen[2][0])

    def test_it_learns_its_ratios(self):
        """The keep-ratio loss alone brings the share of kept tokens to where it should be."""
        torch.manual_seed(0)
        model = fastreduce.patch(tiny.build(), "dynamicvit", keep_rate=0.5, at=(1, 2)).train()
        model.requires_grad_(False)
        model.reducers.requires_grad_(True)
        optimizer = torch.optim.AdamW(model.reducers.parameters(), lr=1e-2)
        images = tiny.images(model, batch=16)

        def shares():
            with fastreduce.record(model) as seen:
                model(images)
            return seen.decisions

        for _ in range(40):
            loss = fastreduce.dynamicvit_loss(torch.zeros(()), shares(), [0.8, 0.3])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = [torch.stack([shares()[stage].mean() for _ in range(5)]).mean().item() for stage in (0, 1)]
        assert found == pytest.approx([0.8, 0.3], abs=0.08)

    def test_poolings_that_cannot_leave_tokens_out(self):
        """Training alone is refused: there tokens stay, and evaluation takes them away."""
        model = fastreduce.patch(tiny.build(global_pool="max"), "dynamicvit", keep_rate=0.5, at=tiny.AT)
        _run(model)
        with pytest.raises(ValueError, match="global_pool='max'"):
            model.train()(tiny.images(model))

    def test_checkpointing_draws_the_same_again(self):
        results = []
        for checkpointing in (False, True):
            model = fastreduce.patch(tiny.build(), "dynamicvit", keep_rate=0.5, at=tiny.AT).train()
            tiny.randomize(model.reducers)
            model.set_grad_checkpointing(checkpointing)
            torch.manual_seed(0)
            images = tiny.images(model).requires_grad_()
            model(images).square().sum().backward()
            results.append(images.grad)
        torch.testing.assert_close(results[1], results[0])
        model.reducers.generator = torch.Generator()
        for call in (model, model.forward_intermediates):
            with pytest.raises(ValueError, match="other noise"):
                call(images)

    def test_training_compiles_in_one_graph(self):
        torch._dynamo.reset()
        model = fastreduce.patch(tiny.build(depth=2), "dynamicvit", keep_rate=0.5, at=(0, 1)).train()
        torch.compile(model, backend="aot_eager", fullgraph=True)(tiny.images(model)).square().sum().backward()
        torch._dynamo.reset()
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_recording_forgets_the_pass_before(self):
        model = fastreduce.patch(tiny.build(), "dynamicvit", keep_rate=0.5, at=tiny.AT).train()
        with fastreduce.record(model) as seen:
            model(tiny.images(model))
            model(tiny.images(model, batch=3))
            assert [len(decision) for decision in seen.decisions] == [3, 3, 3]
            _run(model.eval())
        assert not seen.decisions
        assert len(seen.stages) == 3


class TestKMedoids:
    def test_an_empty_cluster_takes_token_zero(self):
        """Two equal tokens as first medoids: the second cluster gets no member."""
        x = torch.arange(5.0).view(1, 5, 1).expand(1, 5, 3).clone()
        x[0, 2] = x[0, 4]
        weights = torch.tensor([[0.1, 0.2, 5.0, 0.3, 6.0]])
        centers, label = fastreduce.ops.cluster_k_medoids(x, weights, 2, iters=1)
        assert centers.tolist() == [[0, 0]]  # the first by its low weight
        assert not label.any()

    def test_the_weights_are_the_attention_of_the_block_before(self):
        model = tiny.build().double()
        images = tiny.images(model, dtype=torch.float64)
        caught = []
        model.blocks[1].attn.qkv.register_forward_hook(lambda module, inputs, output: caught.append(output))
        fastreduce.patch(model, "kmedoids", keep=(6,), at=2, iters=0)
        with fastreduce.record(model) as seen:
            _run(model, images)
        q, k, _ = caught[0].view(2, 17, 3, 3, 16).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q @ k.transpose(2, 3)) * 16**-0.5).softmax(-1).sum((1, 2))[:, 1:]
        assert torch.equal(seen.stages[0].kept, weights.topk(6, dim=1).indices)
        assert type(model.blocks[0]).__name__ == "Block"


class TestDPCKNN:
    def test_a_score_that_is_more_than_a_linear_layer_is_called(self):
        """Adapters and hooks: only a bare layer's parameters go into the merge."""
        model = fastreduce.patch(tiny.build().double(), "dpcknn", keep_rate=0.5, at=(1, 2))
        tiny.randomize(model.reducers, seed=7)
        images = tiny.images(model, dtype=torch.float64)
        plain = _run(model, images)
        layer = model.reducers.cluster_layers[0].score
        hook = layer.register_forward_hook(lambda module, inputs, output: output * 1.5)
        hooked = _run(model, images)
        hook.remove()
        assert torch.equal(_run(model, images), plain)
        with torch.no_grad():
            layer.weight *= 1.5
            layer.bias *= 1.5
        torch.testing.assert_close(hooked, _run(model, images), rtol=1e-9, atol=1e-9)
        assert not torch.allclose(hooked, plain, rtol=1e-6)

    def test_noise_is_off_unless_a_generator_is_given(self):
        images = tiny.images(tiny.build())

        def kept(noise):
            model = fastreduce.patch(tiny.build(), "dpcknn", keep_rate=0.5, at=tiny.AT, equal_weight=True, noise=noise)
            with fastreduce.record(model) as seen:
                _run(model, images)
            return torch.cat([stage.kept for stage in seen.stages], dim=1)

        assert torch.equal(kept(None), kept(None))
        assert torch.equal(kept(torch.Generator().manual_seed(1)), kept(torch.Generator().manual_seed(1)))

    def test_noise_does_not_depend_on_the_default_dtype(self):
        model = fastreduce.patch(tiny.build(), "dpcknn", keep_rate=0.5, at=tiny.AT, equal_weight=True)
        images = torch.zeros_like(tiny.images(model))  # with noise alone to tell tokens apart
        model.pos_embed.data.zero_()
        found = []
        for dtype in (torch.float32, torch.float64, torch.float16):
            model.reducers.generator = torch.Generator().manual_seed(1)
            torch.set_default_dtype(dtype)
            try:
                with fastreduce.record(model) as seen:
                    _run(model, images)
            finally:
                torch.set_default_dtype(torch.float32)
            found.append(torch.cat([stage.kept for stage in seen.stages], dim=1))
        assert torch.equal(found[1], found[0])
        assert torch.equal(found[2], found[0])

    def test_checkpointing_in_evaluation(self):
        """There too blocks run twice, and the noise is drawn twice."""
        model = fastreduce.patch(tiny.build(), "dpcknn", keep_rate=0.5, at=tiny.AT, noise=torch.Generator()).eval()
        model.set_grad_checkpointing()
        images = tiny.images(model)
        for call in (model, model.forward_intermediates):
            with pytest.raises(ValueError, match="other noise"):
                call(images)
        _run(model, images)  # without a gradient nothing runs twice

    def test_noise_breaks_ties(self):
        """Two equal tokens are equally dense, so neither stands below the other: only noise makes one the peak."""
        block = fastreduce.patch(tiny.build(), "dpcknn", keep=8, at=1, equal_weight=True).blocks[1]
        reducer = block._site.model.reducers
        # Far from one another, and no sum of squares of which rounding could make the two distances differ.
        pairs = torch.arange(8.0).repeat_interleave(2).view(1, 16, 1).expand(1, 16, 48) ** 2
        tokens = fastreduce.Tokens(torch.cat([torch.zeros(1, 1, 48), pairs], dim=1), prefix=1, patches=16)

        def distinct():
            return len(set((reducer.before(block, tokens, 0).plans[0].kept[0] // 2).tolist()))

        assert distinct() < 8
        reducer.generator = torch.Generator().manual_seed(1)
        assert distinct() == 8


class TestSoft:
    @pytest.mark.parametrize("scaled", [False, True])
    def test_patchmerger_unit(self, scaled):
        units, shared = _units(f"patchmerger/scaled{int(scaled)}"), _units("sinkhorn")
        layer = MergerQueries(8, 5)
        layer.load_state_dict(golden.below(_units("patchmerger"), "sd/"))
        normed = layer.norm(shared["x"])
        logits = F.linear(normed, layer.queries * (8**-0.5 if scaled else 1.0))
        merged, logsumexp = fastreduce.ops.soft_merge(logits, normed)
        torch.testing.assert_close(merged, units["out"], rtol=1e-5, atol=1e-6)
        weights = (logits - logsumexp.unsqueeze(1)).exp().transpose(1, 2)
        torch.testing.assert_close(weights, units["attn"], rtol=1e-5, atol=1e-6)

    def test_sit_unit(self):
        units, shared = _units("sit"), _units("sinkhorn")
        layer = SliceWeights(8, 5)
        layer.load_state_dict(golden.below(units, "sd/"))
        logits = layer(shared["x"])
        torch.testing.assert_close(logits.softmax(1).transpose(1, 2), units["weight"], rtol=1e-5, atol=1e-6)
        merged, _ = fastreduce.ops.soft_merge(logits, shared["x"])
        torch.testing.assert_close(merged, units["out"], rtol=1e-5, atol=1e-6)

    def test_sinkhorn_leaves_its_parameter_alone(self):
        """Two forward passes before a backward pass work, too."""
        model = fastreduce.patch(tiny.build(), "sinkhorn", keep_rate=0.5, at=tiny.AT).train()
        before = [layer.v.detach().clone() for layer in model.reducers.cluster_layers]
        images = tiny.images(model)
        (model(images) + model(images)).sum().backward()
        for layer, v in zip(model.reducers.cluster_layers, before, strict=True):
            assert torch.equal(layer.v, v)
            assert layer.v.grad is not None

    def test_sinkhorn_gradients(self):
        """The exact gradient is orthogonal to the centres; the official one is the normalised centres' gradient."""
        gradients = {}
        for gradient in ("official", "exact"):
            model = tiny.build().double()
            fastreduce.patch(model, "sinkhorn", keep_rate=0.5, at=(1,), eps=0.1, gradient=gradient)
            tiny.randomize(model.reducers, seed=3)
            model(tiny.images(model, dtype=torch.float64)).square().sum().backward()
            v = model.reducers.cluster_layers[0].v
            gradients[gradient] = v.grad
        unit, length = F.normalize(v.detach(), dim=-1), v.detach().norm(dim=-1, keepdim=True)
        official = gradients["official"]
        along = (official * unit).sum(-1, keepdim=True)
        assert along.abs().max() > 1e-3 * official.abs().max()
        torch.testing.assert_close((official - along * unit) / length, gradients["exact"])
