"""Whole patched models on the kernels: every reducer calls them, and logits and gradients are the reference's."""

import copy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import fastreduce
from bench.proof import tiny

METHODS = [
    ("topk", {"keep_rate": 0.5}),
    ("evit", {"keep_rate": 0.5}),
    ("evit", {"keep_rate": 0.5, "normalize": True}),
    ("tome", {"keep_rate": 0.6}),
    ("tome", {"keep": [6, 1], "rounds": "exact"}),
    ("radial", {"norm": "l1", "keep_rate": 0.5}),
    ("dynamicvit", {"keep_rate": 0.5}),
    ("ats", {"keep_rate": 0.6}),
    ("ats", {"keep_rate": 0.6, "trim": False}),
    ("kmedoids", {"keep_rate": 0.5}),
    ("kmedoids", {"keep_rate": 0.5, "cost": "members"}),
    ("kmedoids", {"keep_rate": 0.5, "equal_weight": True, "first": 3}),
    ("dpcknn", {"keep_rate": 0.5}),
    ("sit", {"keep_rate": 0.5}),
    ("patchmerger", {"keep_rate": 0.5}),
    ("sinkhorn", {"keep_rate": 0.5, "eps": 0.2}),
]
USES = {
    "topk": ["class_logits", "sort_scores", "attention", "gather_tokens"],
    "evit": ["attention", "class", "sort_scores", "fuse_tokens"],
}
USES |= {"tome": ["best_match", "assign_slots", "reduce_slots", "attention"], "radial": ["gather_tokens"]}
USES |= {
    "dynamicvit": ["sort_scores", "gather_tokens"],
    "dynamicvit in training": ["attention", "mean_values"],
    "ats": ["class_logits", "sample_tokens", "attention", "gather_tokens"],
    "kmedoids": ["attention", "received", "squared_lengths", "token_distances", "iterate_clusters", "gather_tokens"],
    "dpcknn": ["squared_lengths", "density", "cluster", "reduce_slots"],
    "sit": ["soft_merge"],
    "patchmerger": ["soft_merge"],
    "sinkhorn": ["squared_lengths", "similarity", "plan_biases", "plan_sums"],
}


def _model(**options) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 20, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 5}
    model = VisionTransformer(**{**sizes, **options})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def _run(model, images):
    model.zero_grad()
    torch.manual_seed(0)  # of DynamicViT's decisions: the model is in training mode
    logits = model(images)
    logits.square().sum().backward()
    return logits.detach(), {name: value.grad.clone() for name, value in model.named_parameters()}


KINDS = [{}, {"reg_tokens": 2}, {"global_pool": "avg"}]


# Every method on one kind of model, in turn; the methods that select, and those that merge, on all.
@pytest.mark.parametrize(
    ("method", "schedule", "options"),
    [
        (*method, options)
        for place, method in enumerate(METHODS)
        for turn, options in enumerate(KINDS)
        if turn == place % len(KINDS) or method[0] in ("topk", "tome")
    ],
)
def test_kernels_give_the_reference_model(method, schedule, options):
    model, images = _model(**options), torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    logits, gradients, layers = {}, {}, None
    for backend in ("triton", "reference"):
        patched = fastreduce.patch(copy.deepcopy(model), method, at=(1, 2), backend=backend, **schedule)
        if hasattr(patched, "reducers"):
            layers = tiny.randomize(patched.reducers).state_dict() if layers is None else layers
            patched.reducers.load_state_dict(layers)
        logits[backend], gradients[backend] = _run(patched, images)
    torch.testing.assert_close(logits["triton"], logits["reference"], rtol=1e-4, atol=1e-4)
    largest = max(value.abs().max() for value in gradients["reference"].values())
    for name, value in gradients["triton"].items():
        difference = (value - gradients["reference"][name]).abs().max()
        assert difference <= 1e-4 * largest, (name, difference, largest)


@pytest.mark.parametrize("use", list(USES))
def test_every_kernel_is_called_by_its_reducer(use, monkeypatch):
    from triton.runtime.interpreter import GridExecutor

    launched, call = set(), GridExecutor.__call__

    def spy(self, *args, **kwargs):
        launched.add(self.fn.__name__.removesuffix("_kernel"))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", spy)
    method, _, training = use.partition(" in ")
    model = fastreduce.patch(_model(), method, at=1, keep_rate=0.5, backend="triton").train(bool(training))
    with torch.no_grad():
        model(torch.randn(1, 3, 20, 20))
    for kernel in USES[use]:
        assert kernel in launched, (kernel, launched)


def test_kernels_score_a_model_without_a_class_token():
    model, images = _model(class_token=False, global_pool="avg"), torch.randn(2, 3, 20, 20)
    logits = {}
    for backend in ("triton", "reference"):
        patched = fastreduce.patch(copy.deepcopy(model), "topk", at=1, keep_rate=0.5, backend=backend)
        with torch.no_grad():
            logits[backend] = patched(images)
    torch.testing.assert_close(logits["triton"], logits["reference"], rtol=1e-4, atol=1e-4)


def test_a_norm_with_a_hook_is_called():
    """Hooks of either direction: the launch that would do its work too leaves it alone."""
    model, called = fastreduce.patch(_model(), "topk", at=(1, 2), keep_rate=0.5, backend="triton"), []
    model.blocks[1].norm2.register_forward_hook(lambda *_: called.append("forward"))
    model.blocks[2].norm2.register_full_backward_hook(lambda *_: called.append("backward"))
    _run(model, torch.randn(1, 3, 20, 20))
    assert called == ["forward", "backward"]
