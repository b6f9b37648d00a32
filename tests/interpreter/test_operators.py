"""What every operator promises, by the kernels: second derivatives, unchecked twins, empty dimensions."""

import functools

import pytest
import torch

from fastreduce import ops
from fastreduce.ops import unchecked

from ..operators import CASES, DIFFERENTIABLE, as_arguments, flat, rows_of


@pytest.fixture(autouse=True)
def _poisoned():
    """What is not written must not be read: ``torch.empty`` gives NaN and the largest integers."""
    torch.use_deterministic_algorithms(True)  # torch.utils.deterministic.fill_uninitialized_memory holds by default
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def _second(case, function, dtype, backend):
    """First gradients, and the gradients of the sum of their squares."""
    values = case.arguments(dtype=dtype)
    leaves = [values[name].requires_grad_() for name in case.differentiable]
    rows = rows_of(case, function, values, backend=backend)
    loss = sum((one.double() * torch.linspace(0.5, 1.5, one.numel()).view(one.shape)).square().sum() for one in rows)
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    penalty = sum(one.double().square().sum() for one in first)
    return first, torch.autograd.grad(penalty, leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_are_those_of_the_reference(name):
    """A gradient penalty; where PyTorch's fused attention has no second derivative, the policy's formula stands in."""
    case = CASES[name]
    function = getattr(ops, case.operator)
    found = _second(case, function, torch.float32, "triton")
    if case.twice:
        expected = _second(case, function, torch.float64, "reference")
    else:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            expected = _second(case, function, torch.float64, "reference")
    for ours, theirs in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-4, atol=2e-4 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("name", CASES)
def test_unchecked_twins_give_the_same_bits(name):
    case = CASES[name]
    values = as_arguments(case.arguments(dtype=torch.float32))
    expected = flat(getattr(ops, case.operator)(**values, backend="triton"))
    found = flat(getattr(unchecked, case.operator)(**values, backend="triton"))
    assert len(expected) == len(found)
    assert all(map(torch.equal, expected, found))


# B, H, N and C in turn; N at the least that the operator takes.
EMPTY = {"no image": {"b": 0}, "no head": {"h": 0}, "no token": {"n": 0}, "one token": {"n": 1}, "no channel": {"c": 0}}


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("name", CASES)
def test_empty_dimensions(name, empty):
    """The reference's result, or a ValueError with the reason from both."""
    case = CASES[name]
    values = as_arguments(case.arguments(**EMPTY[empty], dtype=torch.float32))
    answers = []
    for backend in ("reference", "triton"):
        try:
            answers.append(flat(getattr(ops, case.operator)(**values, backend=backend)))
        except ValueError as error:
            answers.append(str(error))
    if isinstance(answers[0], str):
        assert answers[0] == answers[1]
        return
    assert not isinstance(answers[1], str), answers[1]
    for reference, kernels in zip(*answers, strict=False):
        assert reference.shape == kernels.shape
        torch.testing.assert_close(kernels, reference, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("sizes", ["none", "given", "by a layer"])
def test_tokens_of_no_slot_take_no_part(sizes, norm):
    """Slot -1: kernels do not visit these tokens; results and gradients are defined nevertheless."""
    torch.manual_seed(0)
    x, slot = torch.randn(2, 6, 4), torch.tensor([[0, -1, 1, 0, -1, 2], [-1] * 6])
    size, weight, bias, gain = torch.rand(2, 6) + 0.5, torch.full((1, 4), 0.3), torch.zeros(1), torch.rand(4)
    found = {}
    for backend in ("reference", "triton"):
        leaves = {"x": x.clone(), "size": size.clone(), "weight": weight.clone(), "bias": bias.clone()}
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        options = {
            "none": {},
            "given": {"size": leaves["size"]},
            "by a layer": {"log_size": (leaves["weight"], leaves["bias"])},
        }[sizes]
        merge = functools.partial(ops.merge_tokens_norm, weight=gain) if norm else ops.merge_tokens
        results = merge(leaves["x"], slot, 3, **options, eps=1e-3, backend=backend)
        sum((one * torch.arange(12.0).view(1, 3, 4)).square().sum() for one in results if one.requires_grad).backward()
        found[backend] = *results, *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)
    assert len(found["triton"]) == len(found["reference"])
    for ours, theirs in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    grad = found["triton"][3 if norm else 2]
    assert not grad[0, [1, 4]].any()
    assert not grad[1].any()
