"""Whole patched models on the kernels: every reducer calls them, and logits and gradients are the reference's."""

import copy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import fastreduce

METHODS = [
    ("topk", {"keep_rate": 0.5}),
    ("evit", {"keep_rate": 0.5}),
    ("evit", {"keep_rate": 0.5, "normalize": True}),
    ("tome", {"keep_rate": 0.6}),
    ("tome", {"keep": [6, 1], "rounds": "exact"}),
    ("radial", {"norm": "l1", "keep_rate": 0.5}),
]
USES = {"topk": ["class_logits", "sort_scores", "gather_tokens"], "evit": ["class_logits", "fuse_tokens"]}
USES |= {"tome": ["best_match", "assign_slots", "group_slots", "reduce_slots"], "radial": ["gather_tokens"]}


def _model(**options) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 20, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 5}
    model = VisionTransformer(**{**sizes, **options})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def _run(model, images):
    model.zero_grad()
    logits = model(images)
    logits.square().sum().backward()
    return logits.detach(), {name: value.grad.clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"global_pool": "avg"}], ids=["class", "registers", "avg"])
@pytest.mark.parametrize(("method", "schedule"), METHODS)
def test_kernels_give_the_reference_model(method, schedule, options):
    model, images = _model(**options), torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    logits, gradients = {}, {}
    for backend in ("triton", "reference"):
        patched = fastreduce.patch(copy.deepcopy(model), method, at=(1, 2), backend=backend, **schedule)
        logits[backend], gradients[backend] = _run(patched, images)
    torch.testing.assert_close(logits["triton"], logits["reference"], rtol=1e-4, atol=1e-4)
    largest = max(value.abs().max() for value in gradients["reference"].values())
    for name, value in gradients["triton"].items():
        difference = (value - gradients["reference"][name]).abs().max()
        assert difference <= 1e-4 * largest, (name, difference, largest)


@pytest.mark.parametrize("method", ["topk", "evit", "tome", "radial"])
def test_every_kernel_is_called_by_its_reducer(method, monkeypatch):
    from triton.runtime.interpreter import GridExecutor

    launched, call = set(), GridExecutor.__call__

    def spy(self, *args, **kwargs):
        launched.add(self.fn.__name__.removesuffix("_kernel"))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", spy)
    model = fastreduce.patch(_model(), method, at=1, keep_rate=0.5, backend="triton")
    with torch.no_grad():
        model(torch.randn(1, 3, 20, 20))
    for kernel in USES[method]:
        assert kernel in launched, (kernel, launched)


def test_received_scores_have_no_kernel_and_say_so():
    model = _model(class_token=False, global_pool="avg")
    patched = fastreduce.patch(model, "topk", at=1, keep_rate=0.5, backend="triton")
    with pytest.raises(NotImplementedError, match="received_scores"):
        patched(torch.randn(1, 3, 20, 20))
