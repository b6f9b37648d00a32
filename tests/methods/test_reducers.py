"""Reducers apart from their numbers: patterns, small images, layers that others wrap, schedules, options, messages."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import fastreduce
from bench.proof import tiny
from fastreduce import ops
from fastreduce.integrations.registry import shape_of as _shape_of
from fastreduce.reducers import REDUCERS, make_reducer
from fastreduce.reducers import base as reducer_base
from fastreduce.reducers.ats import official_points
from fastreduce.reducers.block import is_bare, is_unhooked
from fastreduce.reducers.radial import ring_radius
from fastreduce.reference.sample_tokens import sampling_grid
from tests.helpers.inputs import seeded

LEARNED = ("dynamicvit", "dpcknn", "sit", "patchmerger", "sinkhorn")
AT = (1, 2)
# Parts K for which the released code looks up K points instead of K - 1 (golden/small/units: ats/grid_len).
ONE_POINT_MORE = {
    *(3, 7, 12, 14, 19, 27, 34, 35, 36, 39, 42, 47, 48, 51, 55, 56, 58, 60, 63, 72, 76, 84, 98, 103, 107, 110, 111),
    *(112, 119, 126, 131, 134, 141, 155, 161, 171, 178, 184, 188, 192, 196, 197),
}


def _patched(method, model=None, seed=7, **arguments):
    model = tiny.build() if model is None else model
    fastreduce.patch(model, method, **{"keep_rate": 0.5, "at": AT, **arguments})
    if method in LEARNED:
        tiny.randomize(model.reducers, seed=seed)
    return model


def _run(model, images=None):
    with torch.no_grad():
        return model(tiny.images(model) if images is None else images)


class TestRadial:
    @pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
    def test_rings_do_not_depend_on_the_default_dtype_or_device(self, norm):
        expected = make_reducer("radial", _shape_of(tiny.build(img_size=224)), keep_rate=0.7, at=AT, norm=norm)
        for setting in (torch.float64, torch.bfloat16, torch.float16):
            before = torch.get_default_dtype()
            torch.set_default_dtype(setting)
            try:
                with torch.device("meta"):
                    found = make_reducer("radial", _shape_of(tiny.build(img_size=224)), keep_rate=0.7, at=AT, norm=norm)
            finally:
                torch.set_default_dtype(before)
            assert found.patterns(14, 14) == expected.patterns(14, 14)

    def test_the_released_codes_rounding(self):
        """Rounding is torch.linspace's where the CPU fuses a product with a sum; l2 splits equal rings at 14 x 14."""
        assert len(set(ring_radius((14, 14), "l1"))) == 16
        assert len(set(ring_radius((14, 14), "l2"))) == 27

    def test_meta_and_empty(self):
        source = _patched("radial")
        with torch.device("meta"):
            model = _patched("radial", tiny.build())
        assert model(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, 7)
        model.to_empty(device="cpu").load_state_dict(source.state_dict())
        assert torch.equal(_run(model), _run(source))
        assert not [name for name in source.state_dict() if "reducer" in name]

    def test_the_grid_of_the_pass(self):
        """Another grid has another pattern, the same as a model of this size."""
        shape = _shape_of(tiny.build())
        reducer = make_reducer("radial", shape, keep_rate=0.5, at=AT)
        assert reducer.patterns(2, 8) != reducer.patterns(8, 2)
        other = make_reducer("radial", _shape_of(tiny.build(img_size=(32, 128))), keep_rate=0.5, at=AT)
        assert reducer.patterns(2, 8) == other.patterns(2, 8)
        tokens = fastreduce.Tokens(torch.randn(1, 17, 48), prefix=1, patches=16, grid=(2, 8))
        block = _patched("radial").blocks[1]
        kept = reducer.before(block, tokens, 0).plans[0].kept
        assert kept.tolist() == list(other.patterns(2, 8)[0])
        with pytest.raises(ValueError, match=r"grid of \(4, 4\), got 20 patches"):
            reducer.before(block, fastreduce.Tokens(torch.randn(1, 21, 48), prefix=1, patches=20), 0)

    def test_inference_first_and_training_after(self):
        model = _patched("radial")
        with torch.inference_mode():
            model(tiny.images(model))
        for each in (model, copy.deepcopy(model)):
            each(tiny.images(model)).sum().backward()

    def test_captured(self):
        torch._dynamo.reset()
        model = _patched("radial")
        images = tiny.images(model)
        expected = _run(model)
        for fresh in (model, _patched("radial")):  # with patterns placed before, and without
            compiled = torch.compile(fresh, backend="aot_eager", fullgraph=True)
            assert torch.equal(_run(compiled, images), expected)
        for strict in (False, True):
            exported = torch.export.export(_patched("radial"), (images,), strict=strict)
            assert torch.equal(exported.module()(images), expected)
        torch._dynamo.reset()


class TestSmallImages:
    @pytest.mark.parametrize("name", [name for name in tiny.METHODS if not name.startswith("radial")])
    @pytest.mark.parametrize("size", [48, 32, 16])
    def test_a_token_stays(self, name, size):
        """A token stays, in the plain form as in ours: 7, 3 and 1 of 16 patches, fewer on smaller grids."""
        model, plain = tiny.reduced_and_plain(
            tiny.build(dynamic_img_size=True).double(), keep_rate=0.45, at=tiny.AT, **tiny.METHODS[name]
        )
        images = torch.randn(2, 3, size, size, dtype=torch.float64, generator=seeded(3))
        if name.split("-")[0] in ("sit", "patchmerger", "sinkhorn") and size < 48:
            with pytest.raises(ValueError, match="image is too small"):
                _run(model, images)
            return
        logits = _run(model, images)
        assert logits.isfinite().all()
        torch.testing.assert_close(logits, _run(plain, images), rtol=1e-8, atol=1e-8)

    def test_radial(self):
        for norm in ("l1", "l2", "linf"):
            for options in ({"keep_rate": 0.3}, {}):
                reducer = make_reducer("radial", _shape_of(tiny.build()), at=AT, norm=norm, **options)
                for grid in ((1, 1), (2, 2), (1, 5), (3, 2)):
                    assert min(map(len, reducer.patterns(*grid))) >= 1

    def test_the_models_own_size_is_refused(self):
        with pytest.raises(ValueError, match="would keep 0 of 16 tokens"):
            fastreduce.patch(tiny.build(), "topk", keep_rate=0.05, at=AT)


class TestSamplingPoints:
    def test_as_many_as_the_released_code(self):
        """The released code has a table of its own, of up to 197 parts."""
        expected = [parts if parts in ONE_POINT_MORE else parts - 1 for parts in range(2, 198)]
        assert [official_points(parts) for parts in range(2, 198)] == expected

    def test_grid(self):
        for parts in (3, 7, 12, 126):
            points = official_points(parts)
            assert points == parts
            expected = torch.arange(1 / (2 * parts), (2 * parts - 1) / (2 * parts), 2 / (2 * parts))
            torch.testing.assert_close(sampling_grid(points, parts).float(), expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("points", ["official", "exact"])
    def test_against_the_plain_form(self, points):
        """The released code has a point more with 7 parts of 16 patches."""
        model, plain = tiny.reduced_and_plain(tiny.build().double(), method="ats", keep=(11, 6), at=AT, points=points)
        images = tiny.images(model, batch=8, dtype=torch.float64)
        torch.testing.assert_close(_run(model, images), _run(plain, images), rtol=1e-8, atol=1e-8)
        assert fastreduce.reduced_counts(model) == ([12, 7] if points == "official" else [11, 6])

    def test_operator(self):
        scores = torch.ones(1, 8)
        assert ops.sample_tokens(scores, 8, parts=8)[0].tolist() == [list(range(8))]
        assert torch.equal(ops.sample_tokens(scores, 5)[0], ops.sample_tokens(scores, 5, parts=6)[0])
        with pytest.raises(ValueError, match="parts must be between 5"):
            ops.sample_tokens(scores, 5, parts=4)
        with pytest.raises(ValueError, match="points must be 'official' or 'exact', got 'all'"):
            fastreduce.patch(tiny.build(), "ats", points="all")


class _Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.5


class _Half(nn.Module):
    def forward(self, weight):
        return weight * 0.5


def _own_layers(model):
    modules = model.reducers.named_modules()
    return [(name, module) for name, module in modules if dict(module.named_parameters(recurse=False))]


class TestLayersAreCalled:
    """Layers are called, not read: what wraps a layer, or brings its weights when it is called, works."""

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("method", LEARNED)
    def test_parameters_that_are_there_only_while_a_layer_runs(self, method, training):
        model = _patched(method).train(training)
        for each in model.modules():
            if isinstance(each, nn.Dropout):
                each.p = 0.0
        images = tiny.images(model)
        torch.manual_seed(0)
        expected = model(images)

        def bring(module, inputs):
            for name, value in module.kept.items():
                module._parameters[name] = nn.Parameter(value)

        def take(module, inputs, output):
            for name in module.kept:
                module._parameters[name] = nn.Parameter(torch.full_like(module.kept[name], math.nan))

        layers = _own_layers(model)
        assert layers
        for _, module in layers:
            module.kept = {name: value.detach().clone() for name, value in module.named_parameters(recurse=False)}
            take(module, None, None)
            module.register_forward_pre_hook(bring)
            module.register_forward_hook(take)
        torch.manual_seed(0)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("kind", ["subclass", "parametrization", "pruning", "forward", "hook"])
    @pytest.mark.parametrize("method", LEARNED)
    def test_what_wraps_a_layer_counts(self, method, kind):
        model = _patched(method)
        before = _run(model)
        layers = [module for _, module in _own_layers(model) if isinstance(module, nn.Linear)]
        for layer in layers if kind != "parametrization" else [module for _, module in _own_layers(model)]:
            if kind == "subclass":
                layer.__class__ = _Scaled
            elif kind == "parametrization":
                for name, _ in list(layer.named_parameters(recurse=False)):
                    parametrize.register_parametrization(layer, name, _Half())
            elif kind == "pruning":
                prune.random_unstructured(layer, "weight", 0.5)
            elif kind == "forward":
                layer.forward = lambda x, layer=layer: nn.functional.linear(x, layer.weight, layer.bias) * 1.5
            else:
                layer.register_forward_hook(lambda module, inputs, output: output * 1.5)
        if method == "sinkhorn" or (not layers and kind != "parametrization"):
            return  # no linear layer; half a centre is the same direction
        assert not torch.allclose(_run(model), before, rtol=1e-4)

    @pytest.mark.parametrize("method", LEARNED)
    @pytest.mark.filterwarnings("ignore")
    def test_dynamic_quantization(self, method):
        model = _patched(method)
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        difference = (_run(quantized) - _run(model)).abs().max()
        assert 0 < difference < 0.5 * _run(model).abs().max()

    def test_bare(self):
        layer = nn.Linear(4, 4)
        assert is_bare(layer)
        for register in (
            nn.modules.module.register_module_forward_hook,
            nn.modules.module.register_module_forward_pre_hook,
            nn.modules.module.register_module_full_backward_hook,
            nn.modules.module.register_module_full_backward_pre_hook,
        ):
            handle = register(lambda *arguments: None)
            assert is_unhooked(layer)  # counters of operations use them, and are to count what is done without
            assert is_bare(layer)
            handle.remove()
        for register in (
            layer.register_forward_hook,
            layer.register_forward_pre_hook,
            layer.register_full_backward_hook,
            layer.register_full_backward_pre_hook,
        ):
            handle = register(lambda *arguments: None)
            assert not is_bare(layer)
            handle.remove()
        layer.forward = layer.forward
        assert not is_bare(layer)

    def test_weights_of_their_own_kind_are_not_bare(self):
        class Quantised(torch.Tensor):
            pass

        layer = nn.Linear(4, 4)
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantised))
        assert not is_bare(layer)

    @pytest.mark.parametrize("method", LEARNED)
    def test_checkpoint_keys(self, method):
        keys = {
            "dynamicvit": "score_predictor.0.out_conv.0.weight",
            "dpcknn": "cluster_layers.0.score.weight",
            "sit": "cluster_layers.0.scale",
            "patchmerger": "cluster_layers.0.queries",
            "sinkhorn": "cluster_layers.0.v",
        }
        assert f"reducers.{keys[method]}" in _patched(method).state_dict()


class TestConcerns:
    @pytest.fixture(autouse=True)
    def _nothing_said(self, monkeypatch):
        monkeypatch.setattr(reducer_base, "_said", set())

    def _warned(self, method, times=1, **arguments):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(times):
                fastreduce.patch(tiny.build(), method, **{"at": tiny.AT, **arguments})
        return [str(one.message) for one in caught]

    @pytest.mark.parametrize("method", sorted(REDUCERS))
    def test_untrained_layers_once(self, method):
        found = self._warned(method, times=2, **({} if method == "radial" else {"keep_rate": 0.7}))
        assert len(found) == (method in LEARNED)
        assert all(method in message and "load_official" in message for message in found)
        assert make_reducer(method, _shape_of(tiny.build()), at=AT).untrained == (method in LEARNED)

    def test_rates_that_tome_does_not_reach(self):
        (message,) = self._warned("tome", keep=(4, 2, 1))
        assert "rounds='exact'" in message
        assert "[8, 6, 5]" in message
        assert not self._warned("tome", keep=(4, 2, 1), rounds="exact")

    def test_stages_that_do_nothing(self):
        (message,) = self._warned("topk", keep_rate=[0.7, 0.7, 0.7])
        assert "stages 2 and 3 will do nothing" in message
        assert not self._warned("ats", keep_rate=[0.7, 0.7, 0.7])
        assert not self._warned("evit", keep_rate=1.0)


class TestToMeWithoutProportionalAttention:
    @pytest.mark.parametrize("fused", [False, True])
    def test_plain(self, fused):
        model = tiny.build().double()
        for block in model.blocks:
            block.attn.fused_attn = fused
        model, plain = tiny.reduced_and_plain(model, method="tome", keep_rate=0.5, at=tiny.AT, prop_attn=False)
        images = tiny.images(model, dtype=torch.float64)
        logits = _run(model, images)
        torch.testing.assert_close(logits, _run(plain, images), rtol=1e-8, atol=1e-8)
        proportional = fastreduce.patch(tiny.build().double(), "tome", keep_rate=0.5, at=tiny.AT)
        assert not torch.allclose(_run(proportional, images), logits, rtol=1e-4)


class TestReschedule:
    @pytest.mark.parametrize("method", ["topk", "evit", "dynamicvit", "ats", "tome", "kmedoids", "dpcknn", "radial"])
    def test_as_if_patched_so(self, method):
        model = _patched(method, keep_rate=0.7)
        model.reducers.reschedule(_shape_of(model), keep_rate=0.5)
        expected = _patched(method, keep_rate=0.5)
        assert fastreduce.reduced_counts(model) == fastreduce.reduced_counts(expected)
        assert torch.equal(_run(model), _run(expected))
        model.reducers.reschedule(_shape_of(model), keep=[9, 5])
        assert torch.equal(_run(model), _run(_patched(method, keep_rate=None, keep=[9, 5])))

    @pytest.mark.parametrize("method", sorted(REDUCERS))
    def test_refused_and_left_alone(self, method):
        model = _patched(method)
        before = fastreduce.reduced_counts(model)
        for arguments in ({"keep_rate": 1.5}, {"keep": [4, 9]}, {"keep": [4]}, {}, {"keep_rate": 0.5, "at": 9}):
            with pytest.raises(ValueError):
                model.reducers.reschedule(_shape_of(model), **arguments)
        assert fastreduce.reduced_counts(model) == before

    def test_what_was_made_for_its_counts(self):
        for method in ("sit", "patchmerger", "sinkhorn"):
            with pytest.raises(ValueError, match=rf"{method} has layers made for \[8, 4\] tokens"):
                _patched(method).reducers.reschedule(_shape_of(tiny.build()), keep_rate=0.7)
        with pytest.raises(ValueError, match="dynamicvit has layers for 2 stages, got at=1"):
            _patched("dynamicvit").reducers.reschedule(_shape_of(tiny.build()), keep_rate=0.7, at=1)
        with pytest.raises(ValueError, match="contiguous radial schedule has no keep rate"):
            _patched("radial", keep_rate=None).reducers.reschedule(_shape_of(tiny.build()), keep_rate=0.7)


class TestOptions:
    @pytest.mark.parametrize("number", [np.float32, np.float64, torch.tensor, np.array])
    def test_numbers_of_every_kind(self, number):
        shape = _shape_of(tiny.build(img_size=160))  # of 100 patches 0.7 keeps 70, float32's 0.7 would keep 69
        reducer = make_reducer("topk", shape, keep_rate=number(0.7), at=1)
        assert reducer.counts(shape) == [70]
        rates = [number(0.7), number(0.5)]
        assert make_reducer("topk", shape, keep_rate=rates, at=AT).counts(shape) == [70, 50]

    def test_integers_and_arrays(self):
        shape = _shape_of(tiny.build())
        assert make_reducer("topk", shape, keep=np.array([9, 4]), at=torch.tensor([1, 2])).counts(shape) == [9, 4]
        assert make_reducer("topk", shape, keep=np.int64(9), at=np.int64(1)).counts(shape) == [9]
        assert make_reducer("tome", shape, r=np.int64(2)).r == (2, 2, 2, 2)
        assert make_reducer("kmedoids", shape, at=AT, iters=torch.tensor(2), first=np.int32(1)).iters == 2
        assert make_reducer("dpcknn", shape, at=AT, k_neighbors=np.int64(3), equal_weight=np.True_).equal_weight
        assert make_reducer("sinkhorn", shape, at=AT, eps=np.float32(0.1), iters=np.int8(2)).eps == 0.1
        assert make_reducer("radial", shape, at=AT, min_radius=np.float32(0.5)).min_radius == 0.5

    @pytest.mark.parametrize("name", ["ToMe", "TOPK", "Top-K", "DPC-KNN", "k_medoids", "SiT"])
    def test_names_in_any_case(self, name):
        assert make_reducer(name, _shape_of(tiny.build()), at=AT).name == name.lower().replace("-", "").replace("_", "")

    @pytest.mark.parametrize(
        ("method", "options", "kind", "words"),
        [
            (None, {}, TypeError, "name of a method, got None; one of ats, dpcknn"),
            (0.5, {}, TypeError, "name of a method, got 0.5; one of ats, dpcknn"),
            ("tomm", {}, ValueError, "unknown method 'tomm'; did you mean 'tome'"),
            ("topk", {"keep_ratio": 0.5}, TypeError, "did you mean 'keep_rate'"),
            ("tome", {"r": 0.3}, TypeError, "r must be an integer, or a sequence with one for each block .* got 0.3"),
            ("tome", {"r": "all"}, TypeError, "r must be an integer, or a sequence with one for each block, got 'all'"),
            ("tome", {"prop_attn": 1}, TypeError, "prop_attn must be True or False, got 1"),
            ("topk", {"keep_rate": "half"}, TypeError, "keep_rate must be a number or a sequence .* got 'half'"),
            ("topk", {"at": "3"}, TypeError, "at must be a block index or a sequence of block indices, got '3'"),
            ("sinkhorn", {"eps": math.inf}, ValueError, "eps must be finite, got inf"),
            ("kmedoids", {"iters": -1}, ValueError, "iters must be at least 0, got -1"),
        ],
    )
    def test_messages(self, method, options, kind, words):
        with pytest.raises(kind, match=words):
            make_reducer(method, _shape_of(tiny.build()), **{"at": AT, **options})


class TestDynamicViTLoss:
    def test_a_rate(self):
        decisions = [torch.ones(1, 4), torch.tensor([[1.0, 0.0, 0.0, 1.0]])]
        base = torch.zeros(())
        for rate in (0.5, np.float32(0.5), torch.tensor(0.5)):
            found = fastreduce.dynamicvit_loss(base, decisions, rate)
            assert found == fastreduce.dynamicvit_loss(base, decisions, [0.5, 0.25])

    def test_messages(self):
        with pytest.raises(ValueError, match=r"no decisions.*training mode"):
            fastreduce.dynamicvit_loss(torch.zeros(()), [], [0.5])
        with pytest.raises(TypeError, match="keep_ratios must hold numbers, got 'x'"):
            fastreduce.dynamicvit_loss(torch.zeros(()), [torch.ones(1, 4)], ["x"])

    def test_compiles_in_one_graph(self):
        torch._dynamo.reset()
        generator = seeded(1)
        decisions = [torch.rand(2, 9, generator=generator) for _ in range(2)]
        student, teacher = torch.randn(2, 5, generator=generator), torch.randn(2, 5, generator=generator)

        def loss(student, *decisions):
            return fastreduce.dynamicvit_loss(
                student.sum(),
                decisions,
                [0.7, 0.5],
                logits=student,
                teacher_logits=teacher,
                tokens=student[:, None].expand(2, 9, 5),
                teacher_tokens=teacher[:, None].expand(2, 9, 5),
            )

        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(student, *decisions), loss(student, *decisions))
        torch._dynamo.reset()


@pytest.mark.parametrize("name", tiny.METHODS)
def test_gradients_of_every_sample(name):
    """vmap over images of a functional call, against one backward pass an image."""
    model = tiny.build(depth=3)
    fastreduce.patch(model, keep_rate=0.5, at=AT, **tiny.METHODS[name])
    if hasattr(model, "reducers"):
        tiny.randomize(model.reducers, seed=7)
    images = tiny.images(model, batch=3)
    weights = {key: value.detach() for key, value in model.named_parameters()}

    def loss(weights, image):
        return torch.func.functional_call(model, weights, (image[None],)).square().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, images)
    for number, image in enumerate(images):
        model.zero_grad()
        model(image[None]).square().sum().backward()
        for key, parameter in model.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            scale = max(1.0, expected.abs().max().item())
            torch.testing.assert_close(together[key][number], expected, rtol=1e-3, atol=1e-3 * scale, msg=key)
