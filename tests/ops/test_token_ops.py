"""gather, group, merge, unmerge, match in an ordinary process: operators, gradients, compilation, errors, numbers."""

import functools

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastreduce import ops, reference
from fastreduce.ops.fuse_tokens import FuseTokens
from fastreduce.ops.gather_tokens import GatherTokens
from fastreduce.ops.merge_tokens import MergeTokens, UnmergeTokens
from tests.helpers.budget import EPS
from tests.helpers.cases import slow_but
from tests.helpers.inputs import distinct_indices, seeded, tokens
from tests.helpers.matching import assert_slots_by_value, exact_metric, plain_slots

OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
NATIVE = torch.ops.fastreduce
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def slots(batch=2, num_tokens=9, num_out=4, low=0, seed=0):
    return torch.randint(low, num_out, (batch, num_tokens), generator=seeded(seed))


def sizes(batch=2, num_tokens=9, dtype=torch.float32):
    return torch.randint(1, 5, (batch, num_tokens), generator=seeded(3)).to(dtype)


def layer(dtype=torch.float32, channels=5):
    """Weight and bias that give sizes."""
    return tokens(1, channels, seed=4).div(3).to(dtype), torch.full((1,), -0.25, dtype=dtype)


LAYER = layer()
NORM = tokens(5, seed=5), tokens(5, seed=6)


def layouts(x):
    """Return the same tokens, dense and with the sequence axis first in memory."""
    return x, x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_gather(dtype):
    index, residual = distinct_indices(2, 3, 7), tokens(2, 4, 5, dtype=dtype, seed=1)
    for x in layouts(tokens(2, 8, 5, dtype=dtype)):
        for added in (residual, residual.float(), None):
            torch.library.opcheck(NATIVE.gather_tokens.default, (x, index, 1, added), test_utils=OPCHECKS)
    for grad in layouts(residual):
        torch.library.opcheck(NATIVE.gather_tokens_backward.default, (grad, index, 1, 8), test_utils=OPCHECKS)


# Shapes and aliases do not depend on the dtype; bfloat16 finds what is not cast.
ONE_QUICK = slow_but(DTYPES, torch.bfloat16)


@pytest.mark.parametrize("dtype", ONE_QUICK)
def test_opcheck_merge(dtype):
    slot, residual = slots(), tokens(2, 4, 5, dtype=dtype, seed=1)
    torch.library.opcheck(NATIVE.group_slots.default, (slot, 4), test_utils=OPCHECKS)
    groups = NATIVE.group_slots(slot, 4)
    for x in layouts(tokens(2, 9, 5, dtype=dtype)):
        for size in (sizes(), None):
            for added in (residual, residual.float(), None):
                for eps, head in ((0.0, None), (1e-6, x[:, :2])):
                    arguments = (x, slot, *groups, size, added, eps, head)
                    torch.library.opcheck(NATIVE.merge_tokens.default, arguments, test_utils=OPCHECKS)
    x = tokens(2, 9, 5, dtype=dtype)
    for chosen, residual_or_none, head in ((x, residual, None), (x[:, 1:], None, x[:, :1])):
        slot_of, groups_of = (slot, groups) if head is None else (slot[:, 1:], NATIVE.group_slots(slot[:, 1:], 4))
        arguments = (chosen, slot_of, *groups_of, None, residual_or_none, 1e-6, head, *layer(dtype))
        torch.library.opcheck(NATIVE.merge_tokens.default, arguments, test_utils=OPCHECKS)
    total = NATIVE.merge_tokens(x, slot, *groups, sizes(), None, 0.0, None)[1]
    for grad in layouts(residual):
        arguments = (grad, slot, *groups, sizes(), total, 1e-6)
        torch.library.opcheck(NATIVE.merge_tokens_backward.default, arguments, test_utils=OPCHECKS)
        for weight in (None, layer(dtype)[0]):
            arguments = (grad, x, slot, *groups, sizes(), total, 1e-6, weight)
            torch.library.opcheck(NATIVE.merge_tokens_size_backward.default, arguments, test_utils=OPCHECKS)


@pytest.mark.parametrize("dtype", ONE_QUICK)
def test_opcheck_norms(dtype):
    x, slot, order = tokens(2, 9, 5, dtype=dtype), slots(), distinct_indices(2, 8, 8)
    weight, bias, residual = tokens(5, seed=5), tokens(5, seed=6, dtype=dtype), tokens(2, 4, 5, dtype=dtype, seed=1)
    groups, scores = NATIVE.group_slots(slot, 4), tokens(2, 8, seed=2)
    norm = weight, bias, 1e-6
    for call, arguments in (
        (NATIVE.gather_tokens, (x, order[:, :3], 1, None, None, None, 1e-6)),
        (NATIVE.gather_tokens, (x, order[:, :3], 1, residual, *norm)),
        (NATIVE.fuse_tokens, (x, order, scores, 2, 1, residual.float(), bias, *norm)),
        (NATIVE.merge_tokens, (x, slot, *groups, sizes(), residual, 0.0, None, None, None, *norm)),
        (NATIVE.merge_tokens, (x, slot, *groups, None, None, 1e-6, x[:, :2], *layer(dtype), *norm)),
    ):
        torch.library.opcheck(call.default, arguments, test_utils=OPCHECKS)
    out, _, statistics = NATIVE.gather_tokens(x, order[:, :3], 1, residual, weight, bias, 1e-6)
    total = NATIVE.merge_tokens(x, slot, *groups, sizes(), None, 0.0, None)[1]
    for grad in layouts(tokens(2, 4, 5, dtype=dtype, seed=3)):
        for rows, grad_out, scale, leaf_of_sizes in ((True, grad, weight, x), (False, None, None, None)):
            shared = grad_out, grad, out, statistics, scale, rows, rows
            for call, arguments in (
                (NATIVE.gather_tokens_norm_backward, (order[:, :3], 1, 9)),
                (NATIVE.fuse_tokens_norm_backward, (x, order, scores, 1, scale)),
                (NATIVE.merge_tokens_norm_backward, (False, leaf_of_sizes, slot, *groups, sizes(), total, 0.0, None)),
            ):
                torch.library.opcheck(call.default, (*shared, *arguments), test_utils=OPCHECKS)
    learned = layer(dtype)
    out, total, _, statistics, size = NATIVE.merge_tokens(x, slot, *groups, None, None, 0.0, x[:, :2], *learned, *norm)
    shared = out, out, out, statistics, weight, True, False, True
    arguments = x, slot, *groups, size, total, 0.0, learned[0]
    torch.library.opcheck(NATIVE.merge_tokens_norm_backward.default, (*shared, *arguments), test_utils=OPCHECKS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_unmerge_and_match(dtype):
    slot = slots(low=-1)
    groups = NATIVE.group_slots(slot, 4)
    for x in layouts(tokens(2, 4, 5, dtype=dtype)):
        torch.library.opcheck(NATIVE.unmerge_tokens.default, (x, slot, *groups), test_utils=OPCHECKS)
    for grad in layouts(tokens(2, 9, 5, dtype=dtype)):
        torch.library.opcheck(NATIVE.unmerge_tokens_backward.default, (grad, slot, *groups), test_utils=OPCHECKS)
    for metric in layouts(tokens(2, 9, 5, dtype=dtype)):
        torch.library.opcheck(NATIVE.match_tokens.default, (metric, 3, 1), test_utils=OPCHECKS)
    keys = tokens(2, 9, 2, 5, dtype=dtype).transpose(1, 2)
    torch.library.opcheck(NATIVE.match_tokens.default, (keys, 3, 1), test_utils=OPCHECKS)
    assert torch.equal(ops.match_tokens(keys, 3), ops.match_tokens(keys.mean(1), 3))


def test_opcheck_of_slots_in_any_layout_and_of_empty_batches():
    slot = slots(low=-1)
    for chosen in (*layouts(slot), slot.int(), slot[:1].expand(2, -1), slot[:0]):
        torch.library.opcheck(NATIVE.group_slots.default, (chosen, 4), test_utils=OPCHECKS)
        x = tokens(chosen.shape[0], 4, 5, dtype=torch.float16)
        arguments = (x, chosen, *NATIVE.group_slots(chosen, 4))
        torch.library.opcheck(NATIVE.unmerge_tokens.default, arguments, test_utils=OPCHECKS)
    groups = NATIVE.group_slots(slot[:0], 4)
    torch.library.opcheck(
        NATIVE.merge_tokens.default, (tokens(0, 9, 5), slot[:0], *groups, None, None, 0.0, None), test_utils=OPCHECKS
    )
    for metric in (tokens(0, 9, 5), tokens(1, 9, 5, dtype=torch.float16).expand(3, -1, -1), tokens(2, 5, 9).mT):
        for r, prefix in ((0, 1), (4, 1), (3, 2)):
            torch.library.opcheck(NATIVE.match_tokens.default, (metric, r, prefix), test_utils=OPCHECKS)


# The CPU implementation of the operators is the reference, so gradcheck checks its explicit backward formulas.
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_gradcheck_gather(prefix):
    index = torch.tensor([[4, 0, 4], [1, 1, 1]])  # repeated on purpose
    leaves = leaf(tokens(2, 8, 3).double()), leaf(tokens(2, prefix + 3, 3, seed=1).double())
    assert torch.autograd.gradcheck(lambda x, r: GatherTokens.apply(x, index, prefix, r), leaves)
    assert torch.autograd.gradcheck(lambda x: GatherTokens.apply(x, index, prefix, None), leaves[:1])


@pytest.mark.parametrize("size", [None, sizes(dtype=torch.float64)])
def test_gradcheck_merge(size):
    slot = slots()
    groups = NATIVE.group_slots(slot, 4)
    leaves = leaf(tokens(2, 9, 3).double()), leaf(tokens(2, 4, 3, seed=1).double())
    assert torch.autograd.gradcheck(lambda x, r: MergeTokens.apply(x, slot, *groups, size, r, 0.0, None)[0], leaves)


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("prefix", [0, 2])
def test_gradcheck_merge_with_learned_weights(prefix, eps):
    slot = torch.tensor([[0, 3, 3, 1, 3, 0], [1, 1, 1, 1, 1, 5]])  # slots 2 and 4 stay empty
    groups = NATIVE.group_slots(slot, 6)
    x, size = leaf(tokens(2, 6 + prefix, 3).double()), leaf(torch.rand(2, 6, generator=seeded(1)).double() + 0.2)
    residual = leaf(tokens(2, 6, 3, seed=1).double())

    def function(x, size, residual):
        head = x[:, :prefix] if prefix else None
        return MergeTokens.apply(x[:, prefix:], slot, *groups, size, residual, eps, head)[0]

    def plain(x, size, residual):
        head = x[:, :prefix] if prefix else None
        return ops.merge_tokens(x[:, prefix:], slot, 6, size=size, residual=residual, eps=eps, head=head)[0]

    for run in (function, plain):
        assert torch.autograd.gradcheck(run, (x, size, residual))
        assert torch.autograd.gradcheck(lambda size, run=run: run(x.detach(), size, residual.detach()), (size,))


@pytest.mark.parametrize("prefix", [0, 2])
def test_gradcheck_merge_with_sizes_by_a_layer(prefix):
    slot = torch.tensor([[0, 3, 3, 1, 3, 0], [1, 1, 1, 1, 1, 5]])  # slots 2 and 4 stay empty
    groups = NATIVE.group_slots(slot, 6)
    leaves = [leaf(t.double()) for t in (tokens(2, 6 + prefix, 3), *layer(channels=3), tokens(2, 6, 3, seed=1))]

    def function(x, weight, bias, residual):
        head = x[:, :prefix] if prefix else None
        return MergeTokens.apply(x[:, prefix:], slot, *groups, None, residual, 0.1, head, weight, bias)[0]

    def plain(x, weight, bias, residual):
        options = {"log_size": (weight, bias), "residual": residual, "eps": 0.1}
        return ops.merge_tokens(x[:, prefix:], slot, 6, head=x[:, :prefix] if prefix else None, **options)[0]

    for run in (function, plain):
        assert torch.autograd.gradcheck(run, leaves)
        for wanted in range(4):  # the others are constants
            given = [t if place == wanted else t.detach() for place, t in enumerate(leaves)]
            assert torch.autograd.gradcheck(run, given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_by_a_layer_are_its_exponentials(dtype):
    whole, slot, (weight, bias) = tokens(2, 10, 5, dtype=dtype), slots(), layer(dtype)
    x = whole[:, 1:]
    merged, total = ops.merge_tokens(x, slot, 4, log_size=(weight, bias), eps=1e-6)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = weight.to(wide), bias.to(wide)
    size = torch.stack([(row.to(wide) @ weight[0] + bias).exp() for row in x.flatten(0, 1)]).view(2, 9)
    for ours, expected in zip((merged, total), ops.merge_tokens(x, slot, 4, size=size, eps=1e-6), strict=True):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, rtol=0, atol=4 * EPS[ours.dtype] * expected.abs().max().item())


def test_sizes_by_a_layer_under_autocast():
    x, slot, learned = leaf(tokens(2, 9, 5)), slots(), [leaf(t) for t in layer()]
    expected, _ = ops.merge_tokens(x, slot, 4, log_size=tuple(learned))
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            merged, total = ops.merge_tokens(x.to(dtype), slot, 4, log_size=tuple(learned))
            assert (merged.dtype, total.dtype) == (dtype, torch.float32)
            torch.testing.assert_close(merged.float(), expected, rtol=0.02, atol=0.02)
            gradients = torch.autograd.grad(merged.float().square().sum(), [x, *learned])
            assert all(gradient.dtype == torch.float32 and gradient.any() for gradient in gradients)


def test_learned_weights_by_the_formula():
    x, slot, size, grad = tokens(2, 9, 5), slots(), leaf(sizes() / 4), tokens(2, 5, 5, seed=2)
    merged, total = ops.merge_tokens(x[:, 1:], slot[:, 1:], 4, size=size[:, 1:], eps=1e-6, head=x[:, :1])
    (ours,) = torch.autograd.grad(merged, size, grad)
    expected = torch.zeros(2, 9)
    for b in range(2):
        for n in range(1, 9):
            m = slot[b, n]
            difference = x[b, n] - merged[b, 1 + m].detach()
            expected[b, n] = grad[b, 1 + m] @ difference / (total[b, m] + 1e-6)
    torch.testing.assert_close(ours, expected)
    assert torch.equal(merged[:, :1], x[:, :1])
    assert not total.requires_grad


def test_gradcheck_unmerge():
    slot = slots(low=-1)
    groups = NATIVE.group_slots(slot, 4)
    assert torch.autograd.gradcheck(lambda x: UnmergeTokens.apply(x, slot, *groups), leaf(tokens(2, 4, 3).double()))


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_token_of_no_slot_is_left_out(batch, sized):
    """By the mean of each slot, written out; a slot that no token has is zero."""
    slot, x, size = slots(batch, low=-1), tokens(batch, 9, 5).double(), sizes(batch, dtype=torch.float64)
    slot[slot == 2] = -1
    weights = size if sized else torch.ones_like(size)
    means, sums = torch.zeros(batch, 4, 5, dtype=torch.float64), torch.zeros(batch, 4, dtype=torch.float64)
    for image in range(batch):
        for one in range(4):
            of_it = slot[image] == one
            sums[image, one] = weights[image, of_it].sum()
            if of_it.any():
                means[image, one] = (x[image, of_it] * weights[image, of_it, None]).sum(0) / sums[image, one]
    assert (slot == -1).any(1).all()
    for chosen in (slot, slot.int()):
        merged, total = ops.merge_tokens(x, chosen, 4, size=size if sized else None, backend="reference")
        torch.testing.assert_close(merged, means)
        torch.testing.assert_close(total, sums)


def norm_ways(kernels):
    """Return every reduction with a norm, by its Function or by the reference.

    It takes x (2, 9, 3), extra (2, 9, 3), sizes and a norm.
    """
    order, slot = distinct_indices(2, 8, 8), torch.tensor([[0, 3, 3, 1, 3, 0, 1, 1, 2], [1, 1, 4, 1, 1, 1, 0, 4, 4]])
    groups, kept = NATIVE.group_slots(slot, 5), torch.tensor([[4, 0, 4], [1, 1, 1]])

    def gather(x, extra, size, weight, bias):
        if kernels:
            return GatherTokens.apply(x, kept, 1, extra[:, :4], weight, bias, 0.1)
        return ops.gather_tokens(x, kept, residual=extra[:, :4], norm=(weight, bias, 0.1))

    def fuse(x, extra, size, weight, bias):
        added = extra[:, :5], extra[0, 5]
        if kernels:
            return FuseTokens.apply(x, order, size[:, 1:], 3, 1, *added, weight, bias, 0.1)
        options = {"residual": added[0], "residual_bias": added[1], "norm": (weight, bias, 0.1)}
        return ops.fuse_tokens(x, order, size[:, 1:], 3, **options)

    def merge(x, extra, size, weight, bias):
        if kernels:
            merged, _, normed = MergeTokens.apply(
                x, slot, *groups, size, extra[:, :5], 0.1, extra[:, 5:7], None, None, weight, bias, 0.1
            )
            return merged, normed
        options = {"size": size, "residual": extra[:, :5], "head": extra[:, 5:7], "eps": 0.1}
        return ops.merge_tokens(x, slot, 5, **options, norm=(weight, bias, 0.1))[::2]

    def merge_learned(x, extra, size, weight, bias):
        learned = extra[:1, 0], size[0, :1]
        if kernels:
            merged, _, normed = MergeTokens.apply(x, slot, *groups, None, None, 0.1, None, *learned, weight, bias, 0.1)
            return merged, normed
        options = {"log_size": learned, "eps": 0.1, "norm": (weight, bias, 0.1)}
        return ops.merge_tokens(x, slot, 5, **options)[::2]

    return {"gather": gather, "fuse": fuse, "merge": merge, "merge_learned": merge_learned}


@pytest.mark.parametrize("way", ["gather", "fuse", "merge", "merge_learned"])
def test_gradcheck_norms(way):
    whole = [
        tokens(2, 9, 3),
        tokens(2, 9, 3, seed=1),
        torch.rand(2, 9, generator=seeded(2)) + 0.5,
        tokens(3),
        tokens(3),
    ]
    leaves = [leaf(tensor.double()) for tensor in whole]
    run = norm_ways(kernels=True)[way]
    assert torch.autograd.gradcheck(run, leaves)
    upstream = [tokens(*out.shape, seed=4).double() for out in run(*leaves)]
    for used, affine in ((slice(0, 1), True), (slice(1, 2), True), (slice(0, 2), False)):  # one output alone, no affine
        results = []
        for kernels in (True, False):
            norm = leaves[3:] if affine else (None, None)
            outs = norm_ways(kernels)[way](*leaves[:3], *norm)
            results.append((*outs, *torch.autograd.grad(outs[used], leaves, upstream[used], allow_unused=True)))
        for ours, plain in zip(*results, strict=True):
            zeros = [torch.zeros(()) if value is None else value for value in (ours, plain)]
            torch.testing.assert_close(*(value + torch.zeros_like(zeros[0] + zeros[1]) for value in zeros))


def test_norms_are_pytorchs():
    weight, bias, expected = tokens(5, seed=1), tokens(5, seed=2), nn.LayerNorm(5, eps=1e-3)
    with torch.no_grad():
        expected.weight.copy_(weight), expected.bias.copy_(bias)
    norm = {"norm": (weight, bias, 1e-3)}
    for out, normed in (
        ops.gather_tokens(X, INDEX, residual=X[:, :4], **norm),
        ops.fuse_tokens(X, distinct_indices(2, 8, 8), X[:, 1:, 0], 3, **norm),
        ops.merge_tokens(X, SLOT, 4, **norm)[::2],
    ):
        torch.testing.assert_close(normed, expected(out))
    for dtype in (torch.float16, torch.bfloat16):  # weight and bias keep their own dtype
        out, normed = ops.gather_tokens(X.to(dtype), INDEX, **norm)
        assert normed.dtype == dtype
        assert torch.equal(normed, expected(out.float()).to(dtype))


def test_function_and_reference_have_the_same_gradients():
    x, slot, size, residual = tokens(2, 9, 5), slots(), sizes(), tokens(2, 4, 5, seed=1)
    groups, grad = NATIVE.group_slots(slot, 4), tokens(2, 6, 5, seed=2)
    results = []
    for run in (
        lambda x, r, s: MergeTokens.apply(x, slot, *groups, s, r, 1e-6, x[:, :2])[0],
        lambda x, r, s: ops.merge_tokens(x, slot, 4, size=s, residual=r, eps=1e-6, head=x[:, :2])[0],
    ):
        leaves = leaf(x), leaf(residual), leaf(size)
        results.append(torch.autograd.grad(run(*leaves), leaves, grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_function_and_reference_have_the_same_gradients_of_a_layer(x_dtype):
    x, slot, grad = tokens(2, 9, 5, dtype=x_dtype), slots(), tokens(2, 6, 5, dtype=x_dtype, seed=2)
    groups, results = NATIVE.group_slots(slot, 4), []
    for run in (
        lambda x, *learned: MergeTokens.apply(x, slot, *groups, None, None, 0.25, x[:, :2], *learned)[0],
        lambda x, *learned: ops.merge_tokens(x, slot, 4, log_size=learned, eps=0.25, head=x[:, :2])[0],
    ):
        leaves = leaf(x), *map(leaf, layer())
        results.append(torch.autograd.grad(run(*leaves), leaves, grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, **({"rtol": 0.02, "atol": 0.05} if x_dtype != torch.float32 else {}))


def by_functions(x, metric):
    """Run a merging and a pruning stage, and back, through the autograd functions that the kernels use."""
    slot, _, _ = NATIVE.match_tokens(metric, 3, 1)
    groups = NATIVE.group_slots(slot, 6)
    merged, total = MergeTokens.apply(x, slot, *groups, metric.exp().sum(-1), None, 1e-6, None)
    learned, _ = MergeTokens.apply(x, slot, *groups, None, None, 1e-6, None, *LAYER)
    kept = GatherTokens.apply(merged, total[:, 1:].topk(3)[1], 1, None)
    whole = UnmergeTokens.apply(merged, slot, *groups).sum(1) + kept.sum(1) + learned.sum(1)
    order = total[:, 1:].argsort(dim=1)
    kept = GatherTokens.apply(merged, order[:, :3], 1, None, *NORM, 1e-3)
    fused = FuseTokens.apply(merged, order, total[:, 1:], 2, 1, kept[0], None, *NORM, 1e-3)
    residual = fused[1].mean(1, keepdim=True).expand(-1, 6, -1)
    again = MergeTokens.apply(x, slot, *groups, None, residual, 1e-6, None, *LAYER, *NORM, 1e-3)
    return whole + again[0].sum(1) + again[2].sum(1)


def by_reference(x, metric):
    slot = ops.match_tokens(metric, 3)
    merged, total = ops.merge_tokens(x, slot, 6, size=metric.exp().sum(-1), eps=1e-6)
    learned, _ = ops.merge_tokens(x, slot, 6, log_size=LAYER, eps=1e-6)
    kept = ops.gather_tokens(merged, total[:, 1:].topk(3)[1])
    whole = ops.unmerge_tokens(merged, slot).sum(1) + kept.sum(1) + learned.sum(1)
    kept = ops.gather_tokens(merged, total[:, 1:].topk(3)[1], norm=(*NORM, 1e-6))
    return whole + kept[0].sum(1) + kept[1].square().sum(1)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", [by_functions, by_reference])
def test_compile_fullgraph(stage, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(stage, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 5) if dynamic else (2,):
        x, metric = leaf(tokens(batch, 9, 5)), tokens(batch, 9, 4, seed=1)
        outs = stage(x, metric), compiled(x, metric)
        torch.testing.assert_close(*outs)
        torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in outs))


def test_dynamic_batch_compiles_once():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(by_functions, fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 3, 7):
        compiled(leaf(tokens(batch, 9, 5)), tokens(batch, 9, 4))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "match", [lambda m, r: NATIVE.match_tokens(m, r, 1)[0], lambda m, r: ops.match_tokens(m, r, backend="reference")]
)
def test_compile_with_a_count_that_follows_the_shape(match):
    def shrink(x):
        r = x.shape[1] // 4
        return NATIVE.group_slots(match(x, r), x.shape[1] - r)

    torch._dynamo.reset()
    compiled = torch.compile(shrink, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in (8, 12, 17):
        x = tokens(2, num_tokens, 5)
        for ours, expected in zip(compiled(x), shrink(x), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("stage", [by_functions, by_reference])
def test_export(stage):
    class Stage(nn.Module):
        def forward(self, x, metric):
            return stage(x, metric)

    batch = torch.export.Dim("batch", min=2, max=16)
    example = tokens(2, 9, 5), tokens(2, 9, 4, seed=1)
    exported = torch.export.export(Stage(), example, dynamic_shapes=({0: batch}, {0: batch})).module()
    other = tokens(3, 9, 5, seed=2), tokens(3, 9, 4, seed=3)
    torch.testing.assert_close(exported(*other), stage(*other))


X, INDEX, SLOT, METRIC = tokens(2, 9, 5), torch.zeros(2, 3, dtype=torch.int64), slots(), tokens(2, 9, 4)
BAD_CALLS = [
    (ValueError, r"x must have shape \(B, N, C\), got \(9, 5\)", lambda: ops.gather_tokens(X[0], INDEX)),
    (TypeError, "x must be a tensor .* got list", lambda: ops.gather_tokens([1.0], INDEX)),
    (TypeError, "x must be floating point, got torch.int64", lambda: ops.gather_tokens(X.long(), INDEX)),
    (TypeError, "index must hold .* got torch.float32", lambda: ops.gather_tokens(X, INDEX.float())),
    (TypeError, "index must hold .* got torch.bool", lambda: ops.gather_tokens(X, INDEX.bool())),
    (ValueError, "prefix must be .* 9, got 10", lambda: ops.gather_tokens(X, INDEX, prefix=10)),
    (ValueError, "prefix must be .* got -1", lambda: ops.gather_tokens(X, INDEX, prefix=-1)),
    (ValueError, r"batch size 2, got shape \(1, 3\)", lambda: ops.gather_tokens(X, INDEX[:1])),
    (ValueError, r"residual .* \(2, 4, 5\), got \(2, 3, 5\)", lambda: ops.gather_tokens(X, INDEX, residual=X[:, :3])),
    (ValueError, "index on meta", lambda: ops.gather_tokens(X, INDEX.to("meta"))),
    *(
        (kind, message, functools.partial(call, norm=norm))
        for kind, message, norm in (
            (ValueError, r"weight must have shape \(5,\), got \(4,\)", (torch.ones(4), None, 0.1)),
            (ValueError, r"bias must have shape \(C\), got \(1, 5\)", (None, X[:1, 0], 0.1)),
            (TypeError, "bias must be floating point, got torch.int64", (None, INDEX[0, :1], 0.1)),
            (ValueError, "x is on cpu and weight on meta", (X[0, 0].to("meta"), None, 0.1)),
            (TypeError, "eps of norm must be a number, got None", (None, None, None)),
            (ValueError, "eps of norm must be .* finite, got -1.0", (None, None, -1.0)),
            (TypeError, r"norm must be None or \(weight, bias, eps\), got 0.1", 0.1),
            (TypeError, r"norm must be None or \(weight, bias, eps\), got \(None,\)", (None,)),
        )
        for call in (
            functools.partial(ops.gather_tokens, X, INDEX),
            functools.partial(ops.fuse_tokens, X, SLOT[:, 1:], X[:, 1:, 0], 3),
            functools.partial(ops.merge_tokens, X, SLOT, 4),
        )
    ),
    (ValueError, "num_out must be .* got 0", lambda: ops.merge_tokens(X, SLOT, 0)),
    (TypeError, "num_out must be an integer, got 4.0", lambda: ops.merge_tokens(X, SLOT, 4.0)),
    (ValueError, r"slot must have shape \(2, 9\), got \(2, 8\)", lambda: ops.merge_tokens(X, SLOT[:, :8], 4)),
    (
        ValueError,
        r"size must have shape \(2, 9\), got \(2, 4\)",
        lambda: ops.merge_tokens(X, SLOT, 4, size=X[:, :4, 0]),
    ),
    (ValueError, r"residual .* \(2, 4, 5\), got \(2, 9, 5\)", lambda: ops.merge_tokens(X, SLOT, 4, residual=X)),
    *(
        (kind, message, functools.partial(ops.merge_tokens, X, SLOT, 4, **options))
        for kind, message, options in (
            (ValueError, "size and log_size exclude each other", {"size": sizes(), "log_size": layer()}),
            (TypeError, "log_size must be a pair of weight and bias, got Tensor", {"log_size": layer()[0]}),
            (TypeError, "log_size must be a pair of weight and bias, got tuple", {"log_size": layer()[:1]}),
            (ValueError, r"weight must have shape \(1, 5\), got \(1, 4\)", {"log_size": layer(channels=4)}),
            (ValueError, r"weight must have shape \(1, C\), got \(5,\)", {"log_size": (X[0, 0], X[0, 0, :1])}),
            (ValueError, r"bias must have shape \(1,\), got \(5,\)", {"log_size": (X[0, :1], X[0, 0])}),
            (TypeError, r"bias must be a tensor of shape \(1\), got NoneType", {"log_size": (X[0, :1], None)}),
            (TypeError, "weight must be floating point, got torch.int64", {"log_size": layer(torch.int64)}),
            (ValueError, "x is on cpu and weight on meta", {"log_size": (X[0, :1].to("meta"), X[0, 0, :1])}),
        )
    ),
    (TypeError, "eps must be a number, got '1'", lambda: ops.merge_tokens(X, SLOT, 4, eps="1")),
    (TypeError, "eps must be a number, got True", lambda: ops.merge_tokens(X, SLOT, 4, eps=True)),
    (ValueError, "eps must be .* finite, got -1.0", lambda: ops.merge_tokens(X, SLOT, 4, eps=-1.0)),
    (ValueError, "eps must be .* finite, got nan", lambda: ops.merge_tokens(X, SLOT, 4, eps=float("nan"))),
    (ValueError, r"head must have shape \(B, P, C\), got \(2, 5\)", lambda: ops.merge_tokens(X, SLOT, 4, head=X[:, 0])),
    (
        ValueError,
        r"head must have shape \(2, P, 5\), got \(1, 9, 5\)",
        lambda: ops.merge_tokens(X, SLOT, 4, head=X[:1]),
    ),
    (TypeError, "x is torch.float32 and head torch.float64", lambda: ops.merge_tokens(X, SLOT, 4, head=X.double())),
    (ValueError, "x is on cpu and head on meta", lambda: ops.merge_tokens(X, SLOT, 4, head=X.to("meta"))),
    (TypeError, "slot must hold .* got torch.float32", lambda: ops.unmerge_tokens(X, SLOT.float())),
    (ValueError, r"batch size 2, got shape \(1, 9\)", lambda: ops.unmerge_tokens(X, SLOT[:1])),
    (ValueError, "r must be between 0 and 4, got 5", lambda: ops.match_tokens(METRIC, 5)),
    (ValueError, "r must be between 0 and 4, got -1", lambda: ops.match_tokens(METRIC, -1)),
    (ValueError, r"metric must have shape \(B, N, D\), got \(2, 9\)", lambda: ops.match_tokens(METRIC[..., 0], 1)),
    (TypeError, "metric must be floating point, got torch.int64", lambda: ops.match_tokens(METRIC.long(), 1)),
    (TypeError, "r must be an integer, got 1.0", lambda: ops.match_tokens(METRIC, 1.0)),
    (TypeError, "r must be an integer, got True", lambda: ops.match_tokens(METRIC, True)),
    (ValueError, "r must be between 0 and 3, got 4", lambda: ops.match_tokens(METRIC, 4, prefix=3)),
    (ValueError, "prefix must be between 0 and 9, got 10", lambda: ops.match_tokens(METRIC, 0, prefix=10)),
    (TypeError, "prefix must be an integer, got '1'", lambda: ops.match_tokens(METRIC, 0, prefix="1")),
    (ValueError, r"at least 2 tokens, got shape \(2, 1, 4\)", lambda: ops.match_tokens(METRIC[:, :1], 0)),
    (ValueError, r"at least one head, got shape \(2, 0, 9, 4\)", lambda: ops.match_tokens(METRIC[:, None][:, :0], 0)),
    (TypeError, "metric must be a tensor .* got NoneType", lambda: ops.match_tokens(None, 0)),
    (ValueError, r"slot must have shape \(B, N\), got \(9,\)", lambda: ops.group_slots(SLOT[0], 4)),
    (TypeError, "slot must hold .* got torch.uint8", lambda: ops.group_slots(SLOT.byte(), 4)),
    (ValueError, "num_out must be .* got -2", lambda: ops.group_slots(SLOT, -2)),
    (ValueError, r"x must have shape \(B, N, C\), got \(9, 5\)", lambda: ops.merge_tokens(X[0], SLOT, 4)),
    (TypeError, "x must be floating point, got torch.bool", lambda: ops.merge_tokens(X.bool(), SLOT, 4)),
    (ValueError, "x is on cpu and slot on meta", lambda: ops.merge_tokens(X, SLOT.to("meta"), 4)),
    (ValueError, "x is on cpu and size on meta", lambda: ops.merge_tokens(X, SLOT, 4, size=sizes().to("meta"))),
    (
        ValueError,
        "x is on cpu and residual on meta",
        lambda: ops.merge_tokens(X, SLOT, 4, residual=X[:, :4].to("meta")),
    ),
    (ValueError, r"x must have shape \(B, M, C\), got \(2, 9\)", lambda: ops.unmerge_tokens(X[..., 0], SLOT)),
    (TypeError, "x must be floating point, got torch.int64", lambda: ops.unmerge_tokens(X.long(), SLOT)),
    (ValueError, "x is on cpu and slot on meta", lambda: ops.unmerge_tokens(X, SLOT.to("meta"))),
    *(
        (kind, message, functools.partial(call, backend=backend))
        for backend, kind, message in (
            ("gpu", ValueError, "unknown backend 'gpu'"),
            ("triton", RuntimeError, "'triton' was asked for, but .*TRITON_INTERPRET=1"),
        )
        for call in (
            functools.partial(ops.gather_tokens, X, INDEX),
            functools.partial(ops.group_slots, SLOT, 4),
            functools.partial(ops.prepare_merge, SLOT, 4),
            functools.partial(ops.merge_tokens, X, SLOT, 4),
            functools.partial(ops.unmerge_tokens, X, SLOT),
            functools.partial(ops.match_tokens, METRIC, 1),
        )
    ),
]


@pytest.mark.parametrize(("kind", "message", "call"), BAD_CALLS)
def test_bad_input_is_quoted(kind, message, call):
    with pytest.raises(kind, match=message):
        call()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 3), st.integers(1, 12), st.integers(1, 6), st.integers(1, 5), st.booleans(), st.integers(0, 10**6)
)
def test_merge_is_the_loop(batch, num_tokens, num_out, channels, sized, seed):
    x, slot = tokens(batch, num_tokens, channels, seed=seed).double(), slots(batch, num_tokens, num_out, seed=seed)
    size = sizes(batch, num_tokens, torch.float64) if sized else torch.ones(batch, num_tokens, dtype=torch.float64)
    merged, total = ops.merge_tokens(x, slot, num_out, size=size if sized else None)
    for b in range(batch):
        for m in range(num_out):
            members = (slot[b] == m).nonzero().squeeze(1)
            weight = size[b, members]
            expected = (
                (weight.unsqueeze(1) * x[b, members]).sum(0) / weight.sum() if len(members) else x.new_zeros(channels)
            )
            torch.testing.assert_close(merged[b, m], expected)
            assert total[b, m] == weight.sum()
    assert torch.equal(total.sum(1), size.sum(1))
    spread = ops.unmerge_tokens(merged, slot)
    torch.testing.assert_close((spread * size.unsqueeze(-1)).sum(1), (x * size.unsqueeze(-1)).sum(1))


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_merge_in_lower_precision_errs_by_its_roundings(dtype, num_tokens, sized, with_residual, seed):
    x, slot = tokens(2, num_tokens, 3, dtype=dtype, seed=seed), slots(2, num_tokens, 4, seed=seed).int()
    size = sizes(2, num_tokens) if sized else None
    residual = tokens(2, 4, 3, dtype=dtype, seed=seed + 1) if with_residual else None
    merged, total = ops.merge_tokens(x, slot, 4, size=size, residual=residual)
    assert (merged.dtype, total.dtype) == (dtype, torch.float32)
    wide = None if residual is None else residual.double()
    exact, exact_total = ops.merge_tokens(x.double(), slot, 4, size=size, residual=wide)
    assert torch.equal(total.double(), exact_total)
    tolerance = 2 * EPS[dtype] * (x.abs().max() + 1 + (0 if residual is None else residual.abs().max())).item()
    torch.testing.assert_close(merged.double(), exact, rtol=0, atol=tolerance)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_match_is_the_plain_transcription(data):
    num_tokens = data.draw(st.integers(2, 14))
    prefix = data.draw(st.integers(0, min(5, num_tokens)))
    r = data.draw(st.integers(0, (num_tokens - prefix) // 2))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    dim, seed = data.draw(st.sampled_from([1, 4, 7])), data.draw(st.integers(0, 10**6))
    metric = exact_metric(2, num_tokens, dim, dtype=dtype, seed=seed)
    for place in data.draw(st.lists(st.integers(0, num_tokens - 1), max_size=3)):
        metric[0, place] = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    slot = ops.match_tokens(metric, r, prefix=prefix)
    assert slot.tolist() == [plain_slots(rows, r, prefix) for rows in metric.tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_match_of_random_metrics_by_value(dtype):
    for prefix in (0, 1, 2):
        metric = tokens(2, 40, 24, dtype=dtype, seed=prefix)
        slot = ops.match_tokens(metric, 13, prefix=prefix)
        assert_slots_by_value(slot, metric, 13, prefix, tolerance=8 * EPS[torch.float32])


def test_the_judgement_by_value_can_fail():
    metric = tokens(1, 12, 6)
    slot = ops.match_tokens(metric, 3)
    wrong_count, wrong_number, wrong_partner = (slot.clone() for _ in range(3))
    wrong_number[0, [1, 3]] = slot[0, [3, 1]]
    mover = next(n for n in range(2, 12, 2) if slot[0, n] in slot[0, 1::2])
    wrong_partner[0, mover] = slot[0, 1] if slot[0, mover] != slot[0, 1] else slot[0, 3]
    for bad, r in ((wrong_count, 4), (wrong_number, 3), (wrong_partner, 3)):
        with pytest.raises(AssertionError):
            assert_slots_by_value(bad, metric, r, 1, tolerance=1e-6)


def test_unmerge_leaves_dropped_tokens_zero():
    x, slot = tokens(1, 2, 3), torch.tensor([[1, -1, 0, 1]])
    expected = torch.stack([x[0, 1], torch.zeros(3), x[0, 0], x[0, 1]]).unsqueeze(0)
    assert torch.equal(ops.unmerge_tokens(x, slot), expected)


def test_references_give_the_same_bits_in_any_batch():
    x, slot, metric, index = tokens(4, 9, 5), slots(4), tokens(4, 9, 6, seed=1), distinct_indices(4, 3, 8)
    grad = tokens(4, 4, 5, seed=2)
    total = reference.merge_tokens(x, slot, 4, sizes(4), None)[1]

    def size_gradient(rows):
        return reference.merge_tokens_size_backward(grad[rows], x[rows], slot[rows], sizes(4)[rows], total[rows], 1e-6)

    for run in (
        lambda rows: reference.gather_tokens(x[rows], index[rows], 1, None),
        lambda rows: reference.scatter_tokens(grad[rows], index[rows], 1, 9),
        lambda rows: reference.group_slots(slot[rows], 4)[0],
        lambda rows: reference.merge_tokens(x[rows], slot[rows], 4, sizes(4)[rows], None)[0],
        lambda rows: reference.merge_tokens_backward(grad[rows], slot[rows], sizes(4)[rows], total[rows]),
        lambda rows: size_gradient(rows)[1],
        lambda rows: reference.unmerge_tokens(x[rows], slot[rows]),
        lambda rows: reference.sum_slots(x[rows], slot[rows], 4),
        lambda rows: reference.match_tokens(metric[rows], 3, 1),
    ):
        whole = run(slice(None))
        assert torch.equal(whole, run(slice(None)))
        assert torch.equal(whole[2:3], run(slice(2, 3)))
