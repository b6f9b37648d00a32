"""Promises of every operator, by the kernels: second derivatives, unchecked twins, empty dimensions."""

import functools
import sys

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from bench.proof.operator_counts import OperatorCounts
from fastreduce import ops
from fastreduce.ops import unchecked
from tests.helpers.operators import CASES, DIFFERENTIABLE, as_arguments, flat, rows_of


@pytest.fixture(autouse=True)
def _poisoned():
    """Fill ``torch.empty`` with NaN and the largest integers: memory that is not written must not be read."""
    torch.use_deterministic_algorithms(True)  # torch.utils.deterministic.fill_uninitialized_memory holds by default
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def _second(case, function, dtype, backend):
    """Return first gradients, and the gradients of the sum of their squares."""
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


def _nothing():
    """List calls in which something other than a whole dimension is empty."""
    x, heads, scores = torch.randn(2, 6, 4), torch.randn(2, 3, 6, 4), torch.rand(2, 5)
    none, slot = torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.int64)
    order = torch.arange(5).expand(2, -1)
    zeros, ones = torch.zeros(3, dtype=torch.int32), torch.ones(2, 6)
    packed = torch.randn(1, 0, 4)
    whole = torch.arange(3, dtype=torch.int32) * 6
    return {
        "select_topk of none": lambda **o: ops.select_topk(scores, 0, **o),
        "select_topk of all": lambda **o: ops.select_topk(scores, 5, **o),
        "gather_tokens of the prefix": lambda **o: ops.gather_tokens(x, none, **o),
        "gather_tokens of nothing": lambda **o: ops.gather_tokens(x, none, prefix=0, **o),
        "gather_tokens_norm of nothing": lambda **o: ops.gather_tokens(x, none, prefix=0, norm=(None, None, 1e-6), **o),
        "gather_tokens behind all": lambda **o: ops.gather_tokens(x, slot, prefix=6, **o),
        "fuse_tokens of all": lambda **o: ops.fuse_tokens(x, order, scores, 0, **o),
        "fuse_tokens of none": lambda **o: ops.fuse_tokens(x, order, scores, 5, **o),
        "fuse_tokens of a prefix only": lambda **o: ops.fuse_tokens(x, none, scores[:, :0], 0, prefix=6, **o),
        "match_tokens of none": lambda **o: ops.match_tokens(x, 0, **o),
        "match_tokens of a prefix only": lambda **o: ops.match_tokens(x, 0, prefix=6, **o),
        "merge_tokens without a head": lambda **o: ops.merge_tokens(x, slot, 3, head=x[:, :0], **o),
        "merge_tokens of no token": lambda **o: ops.merge_tokens(x[:, :0], none, 3, **o),
        "merge_tokens_norm of no token": lambda **o: ops.merge_tokens(x[:, :0], none, 3, norm=(None, None, 1e-6), **o),
        "unmerge_tokens to none": lambda **o: ops.unmerge_tokens(x, none, **o),
        "unmerge_tokens of no slot": lambda **o: ops.unmerge_tokens(x[:, :0], slot - 1, **o),
        "group_slots of none": lambda **o: ops.group_slots(none, 3, **o),
        "soft_merge to none": lambda **o: ops.soft_merge(torch.randn(2, 6, 0), x, **o),
        "soft_merge without a head": lambda **o: ops.soft_merge(x, x, head=x[:, :0], **o),
        "sinkhorn_merge without a head": lambda **o: ops.sinkhorn_merge(x, x[0, :2], head=x[:, :0], **o),
        "attention of no query": lambda **o: ops.attention(heads[:, :, :0], heads, heads, **o),
        "attention of no chosen query": lambda **o: ops.attention(heads, heads, heads, index=none, prefix=0, **o),
        "attention of a prefix only": lambda **o: ops.attention(heads, heads, heads, index=none, prefix=6, **o),
        "attention behind all": lambda **o: ops.attention(heads, heads, heads, index=slot, prefix=6, **o),
        "attention hidden from all": lambda **o: ops.attention(
            heads, heads, heads, bias=torch.full((2, 6), -torch.inf), **o
        ),
        "attention_cls_scores of a prefix only": lambda **o: ops.attention_cls_scores(
            heads, heads, heads, prefix=6, **o
        ),
        "attention_received_scores of no query": lambda **o: ops.attention_received_scores(
            heads[:, :, :0], heads, heads, **o
        ),
        "received_scores of no query": lambda **o: ops.received_scores(heads[:, :, :0], heads, **o),
        "cls_scores of a prefix only": lambda **o: ops.cls_scores(heads[:, :, 0], heads, prefix=6, **o),
        "cluster_k_medoids without a step": lambda **o: ops.cluster_k_medoids(x, ones, 2, iters=0, **o),
        "cluster_k_medoids of all": lambda **o: ops.cluster_k_medoids(x, ones, 6, **o),
        "cluster_dpc_knn of all": lambda **o: ops.cluster_dpc_knn(x, 6, neighbors=99, **o),
        "sample_tokens of one": lambda **o: ops.sample_tokens(scores, 1, prefix=0, **o),
        "sample_tokens without weight": lambda **o: ops.sample_tokens(scores * 0, 3, **o),
        "token_offsets of none": lambda **o: ops.token_offsets(ones > 1, **o),
        "gather_packed of no token": lambda **o: ops.gather_packed(
            packed, slot, (zeros, zeros), num_out=2, prefix=0, **o
        ),
        "gather_packed to no row": lambda **o: ops.gather_packed(
            packed, none, (zeros, zeros), num_out=0, prefix=0, **o
        ),
        "unpack_tokens of no token": lambda **o: ops.unpack_tokens(packed, zeros, longest=1, **o),
        "unpack_tokens to none": lambda **o: ops.unpack_tokens(packed, zeros, longest=0, **o),
        "unpack_tokens of no image": lambda **o: ops.unpack_tokens(packed, zeros[:1], longest=2, **o),
        "attention of packed images without keys": lambda **o: ops.attention_packed(
            heads.new_zeros(1, 3, 12, 4),
            heads[:1, :, :0],
            heads[:1, :, :0],
            offsets=(whole, zeros),
            longest=(6, 0),
            **o,
        ),
        "linear_packed of no token": lambda **o: ops.linear_packed(packed, torch.randn(3, 4), None, zeros, **o),
        "linear_packed to none": lambda **o: ops.linear_packed(x[:1], torch.randn(0, 4), None, zeros[:2], **o),
        "linear_packed from none": lambda **o: ops.linear_packed(x[:1, :, :0], torch.zeros(3, 0), None, whole[:2], **o),
    }


@pytest.mark.parametrize("name", _nothing())
def test_nothing_to_do(name):
    """The reference's result, or a ValueError with the reason from both."""
    answers = []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        try:
            answers.append(flat(_nothing()[name](backend=backend)))
        except ValueError as error:
            answers.append(str(error))
    if isinstance(answers[0], str) or isinstance(answers[1], str):
        assert answers[0] == answers[1]
        return
    for reference, kernels in zip(*answers, strict=True):
        assert reference.shape == kernels.shape
        torch.testing.assert_close(kernels, reference, rtol=1e-4, atol=1e-5)


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
        merge = functools.partial(ops.merge_tokens, norm=(gain, None, 1e-6)) if norm else ops.merge_tokens
        results = merge(leaves["x"], slot, 3, **options, eps=1e-3, backend=backend)
        sum((one * torch.arange(12.0).view(1, 3, 4)).square().sum() for one in results if one.requires_grad).backward()
        found[backend] = *results, *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)
    assert len(found["triton"]) == len(found["reference"])
    for ours, theirs in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    grad = found["triton"][3 if norm else 2]
    assert not grad[0, [1, 4]].any()
    assert not grad[1].any()


def _gather(x):
    return ops.gather_tokens(x, torch.tensor([[0, 2]]), backend="triton")


class TestWhoSeesTheOperator:
    """Launches in eager mode are direct; whatever records operators sees them nevertheless."""

    def test_make_fx(self):
        graph = torch.fx.experimental.proxy_tensor.make_fx(_gather)(torch.randn(1, 5, 4))
        assert "fastreduce.gather_tokens.default" in graph.code
        x = torch.randn(1, 5, 4)
        assert torch.equal(graph(x), _gather(x))

    def test_dispatch_mode(self):
        with OperatorCounts() as operators:
            _gather(torch.randn(1, 5, 4))
        assert operators.counts["gather_tokens"] == 1

    def test_fake_tensors(self):
        with torch._subclasses.FakeTensorMode() as mode:
            assert _gather(mode.from_tensor(torch.randn(1, 5, 4))).shape == (1, 3, 4)

    def test_export(self):
        class Module(torch.nn.Module):
            def forward(self, x):
                return _gather(x)

        exported = torch.export.export(Module(), (torch.randn(1, 5, 4),))
        assert "fastreduce.gather_tokens.default" in exported.graph_module.code

    def test_jit_trace(self):
        x = torch.randn(1, 5, 4)
        traced = torch.jit.trace(_gather, x, check_trace=False)
        assert "fastreduce::gather_tokens" in str(traced.graph)
        other = torch.randn(1, 5, 4)
        assert torch.equal(traced(other), _gather(other))

    def test_compile_with_and_without_gradients(self):
        torch._dynamo.reset()
        compiled = torch.compile(_gather, fullgraph=True, backend="aot_eager")
        x = torch.randn(1, 5, 4, requires_grad=True)
        with torch.no_grad():
            assert torch.equal(compiled(x), _gather(x))
        compiled(x).sum().backward()
        assert x.grad.sum() == 12

    def test_autocast_leaves_the_dtype_alone(self):
        with torch.autocast("cpu", torch.bfloat16):
            assert _gather(torch.randn(1, 5, 4)).dtype == torch.float32

    def test_subclasses_of_tensors_go_to_the_dispatcher(self):
        pair = TwoTensor(torch.randn(1, 5, 4), torch.randn(1, 5, 4))
        index = torch.tensor([[0, 2]])
        found = ops.gather_tokens(pair, TwoTensor(index, index), backend="triton")
        assert isinstance(found, TwoTensor)
        assert torch.equal(found.b, _gather(pair.b))

    def test_without_a_gradient_there_is_no_function(self, monkeypatch):
        monkeypatch.setattr(sys.modules["fastreduce.ops.gather_tokens"].GatherTokens, "apply", None)
        monkeypatch.setattr(torch.ops.fastreduce.gather_tokens, "default", None)
        assert _gather(torch.randn(1, 5, 4)).shape == (1, 3, 4)
        with torch.no_grad():
            _gather(torch.randn(1, 5, 4, requires_grad=True))
        with pytest.raises(TypeError):
            _gather(torch.randn(1, 5, 4, requires_grad=True))

    def test_forward_mode_says_that_there_is_no_such_derivative(self):
        with torch.autograd.forward_ad.dual_level():
            x = torch.autograd.forward_ad.make_dual(torch.randn(1, 5, 4), torch.ones(1, 5, 4))
            with pytest.raises(RuntimeError, match="jvp"):
                _gather(x)

    def test_transforms_refuse_the_kernels(self):
        with pytest.raises(RuntimeError, match=r"'triton' was asked for, but kernels .* torch\.func"):
            torch.func.vmap(lambda x: _gather(x[None]))(torch.randn(3, 5, 4))

    def test_a_recorded_backward_pass_equals_another(self):
        """``create_graph`` goes by the reference: the same first gradients, up to rounding."""
        x = torch.randn(1, 5, 4, requires_grad=True)
        (plain,) = torch.autograd.grad(_gather(x).square().sum(), x)
        (recorded,) = torch.autograd.grad(_gather(x).square().sum(), x, create_graph=True)
        torch.testing.assert_close(plain, recorded)
        assert recorded.requires_grad


def _negative(value):
    return torch._neg_view(-value)


def _changed(value, change, floats=True):
    """Return an argument with its tensors changed, or those of floating point alone."""
    if isinstance(value, tuple):
        return tuple(_changed(one, change, floats) for one in value)
    wanted = isinstance(value, torch.Tensor) and (value.is_floating_point() or not floats)
    return change(value) if wanted else value


@pytest.mark.parametrize("name", CASES)
def test_values_that_are_not_in_memory(name):
    """Tensors with the negative bit, such as of ``x.conj().imag``."""
    case = CASES[name]
    values = case.arguments(dtype=torch.float32)
    found, expected = (
        case.call(as_arguments({one: _changed(value, way) for one, value in values.items()}), backend="triton")
        for way in (_negative, torch.clone)
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_gradients_that_are_not_in_memory():
    x, index = torch.randn(2, 6, 4, requires_grad=True), torch.tensor([[0, 2]] * 2)
    upstream = torch.randn(2, 3, 4)
    expected, found = (
        torch.autograd.grad(ops.gather_tokens(x, index, backend="triton"), x, one)[0]
        for one in (upstream, _negative(upstream))
    )
    assert torch.equal(found, expected)


def _with_gaps(tensor):
    """Return the numbers with others, which nobody may read, between them."""
    others = torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor + 100_000
    return torch.stack([tensor, ~tensor if tensor.dtype == torch.bool else others], -1)[..., 0]


def _inside_out(tensor):
    """Return the numbers with the first axis last in memory."""
    return tensor.permute(*reversed(range(tensor.ndim))).contiguous().permute(*reversed(range(tensor.ndim)))


@pytest.mark.parametrize("layout", [_with_gaps, _inside_out])
@pytest.mark.parametrize("name", CASES)
def test_tensors_of_any_layout(name, layout):
    """All arguments at once, and in the backward pass too."""
    case, found = CASES[name], []
    for way in (layout, torch.clone):
        values = {one: _changed(value, way, floats=False) for one, value in case.arguments(dtype=torch.float32).items()}
        leaves = [values[one].requires_grad_() for one in case.differentiable]
        results = flat(getattr(ops, case.operator)(**as_arguments(values), backend="triton"))
        rows = [one for one in results if one.requires_grad]
        upstream = [way(torch.linspace(-1, 1, one.numel()).view(one.shape)) for one in rows]
        grads = torch.autograd.grad(rows, leaves, upstream, materialize_grads=True) if rows else ()
        found.append([*(one.detach() for one in results), *grads])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("layout", [_with_gaps, _inside_out, lambda groups: groups[:1].expand_as(groups)])
def test_groups_of_any_layout(layout):
    slot = torch.tensor([[0, 2, 1, 2, 0]] * 2)
    groups = ops.group_slots(slot, 3, backend="triton")
    for call, x in ((ops.merge_tokens, torch.randn(2, 5, 4)), (ops.unmerge_tokens, torch.randn(2, 3, 4))):
        arguments = (x, slot, 3) if call is ops.merge_tokens else (x, slot)
        results = []
        for own in (groups, tuple(map(layout, groups))):
            leaf = x.clone().requires_grad_()
            out = flat(call(leaf, *arguments[1:], groups=own, backend="triton"))[0]
            results.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
        assert all(map(torch.equal, *results))
