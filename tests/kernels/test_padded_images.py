"""Padded images on the kernels: what the reference gives, and an image alone gives what it gives beside others."""

import copy

import pytest
import torch

import fastreduce

transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install fastreduce[hf])")

from tests.models.test_hf import AT, KEEP, TAKE_PADDING, build, padded, pooled  # noqa: E402

METHODS = {
    "topk": {},
    "evit": {},
    "evit normalized": {"normalize": True},
    "ats": {"points": "exact"},
    "ats untrimmed": {"points": "exact", "trim": False},
}


def _gradients(model, given):
    """Answers and gradients of one step."""
    model.zero_grad()
    found = pooled(model(**given))
    found.square().sum().backward()
    return found.detach(), {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


# Every method with a class token and, but for ATS, without; of the other models one method.
RUNS = [("vit", method) for method in METHODS] + [("siglip2", method) for method in METHODS if "ats" not in method]
RUNS += [(name, "topk") for name in ("deit", "dinov2_registers", "vit_msn", "ast")]


@pytest.mark.parametrize(("name", "method"), [run for run in RUNS if run[0] in TAKE_PADDING])
def test_kernels_give_the_reference_model(name, method):
    """In float32; of the second image 6 patches are no padding, so that the first stage keeps some of that."""
    kind = method.split()[0]
    model, found = build(name), {}
    given = {key: one.float() if one.is_floating_point() else one for key, one in padded(name, 6).items()}
    for backend in ("triton", "reference"):
        twin = fastreduce.patch(copy.deepcopy(model), kind, keep=KEEP, at=AT, backend=backend, **METHODS[method])
        found[backend] = _gradients(twin, given)
    (answer, gradients), (expected, wanted) = found["triton"], found["reference"]
    assert wanted.keys() == gradients.keys()
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)
    largest = max(one.abs().max() for one in wanted.values())
    for key, one in gradients.items():
        assert (one - wanted[key]).abs().max() <= 1e-4 * largest, key
