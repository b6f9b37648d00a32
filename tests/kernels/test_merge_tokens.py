"""group_slots, merge_tokens, unmerge_tokens: kernels against reference in the interpreter, under the sanitizer."""

import pytest
import torch

from bench.proof.traffic import traffic
from fastreduce import ops
from fastreduce.kernels import merge_tokens as kernels
from tests.helpers.budget import assert_within_budget
from tests.helpers.inputs import DTYPES, seeded, tokens

# (batch, tokens, slots, channels): odd, single, more slots than tokens, empty batch, more than one block of each.
SHAPES = [(2, 17, 9, 24), (1, 1, 1, 1), (3, 9, 14, 33), (0, 5, 3, 8), (1, 70, 40, 16), (1, 5, 2, 1030)]


def random_slots(batch, num_tokens, num_out, *, low=0, seed=0):
    return torch.randint(low, num_out, (batch, num_tokens), generator=seeded(seed))


def random_sizes(*shape, dtype=torch.float32):
    return torch.randint(1, 8, shape, generator=seeded(5)).to(dtype)


def merged_three_ways(x, slot, num_out, size, residual, grad, *, groups=None):
    """Return merged rows, sizes and gradients: by the kernels, by the reference, and by the reference in float64."""
    results = []
    for backend, cast in (("triton", None), ("reference", None), ("reference", torch.float64)):
        leaves = [(t if cast is None else t.to(cast)).detach().requires_grad_() for t in (x, residual) if t is not None]
        merged, total = ops.merge_tokens(
            leaves[0],
            slot,
            num_out,
            size=size,
            residual=leaves[1] if residual is not None else None,
            groups=groups if backend == "triton" else None,
            backend=backend,
        )
        upstream = grad.to(merged.dtype)
        results.append([merged, total, *torch.autograd.grad(merged, leaves, upstream)])
    return list(zip(*results, strict=True))


@pytest.mark.parametrize("slots", ["random", "dropped"])
@pytest.mark.parametrize(("batch", "num_tokens", "num_out", "channels"), SHAPES)
def test_groups(batch, num_tokens, num_out, channels, slots):
    slot = random_slots(batch, num_tokens, num_out, low=-1 if slots == "dropped" else 0)
    for cast in (slot, slot.int(), slot.t().contiguous().t(), torch.stack([slot, slot], -1)[..., 1]):
        ours, plain = (ops.group_slots(cast, num_out, backend=backend) for backend in ("triton", "reference"))
        for a, b in zip(ours, plain, strict=True):
            assert a.dtype == b.dtype == torch.int32
            assert torch.equal(a, b)


@pytest.mark.parametrize("fill", [-1, 0, 4])
def test_groups_where_one_slot_takes_all(fill):
    slot = torch.full((2, 70), fill)
    order, offsets = ops.group_slots(slot, 5, backend="triton")
    assert torch.equal(order, torch.arange(70, dtype=torch.int32).expand(2, -1))
    assert offsets[0].tolist() == [70 if fill < m else 0 for m in range(6)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["dense", "sliced", "expanded", "dropped"])
@pytest.mark.parametrize(("batch", "num_tokens", "num_out", "channels"), SHAPES)
def test_merge_forward_and_backward(batch, num_tokens, num_out, channels, layout, dtype):
    low, layout = (-1, "dense") if layout == "dropped" else (0, layout)  # tokens of no slot
    x = tokens(batch, num_tokens, channels, dtype=dtype, layout=layout)
    residual = tokens(batch, num_out, channels, dtype=dtype, seed=1, layout=layout)
    grad = tokens(batch, num_out, channels, dtype=dtype, seed=2, layout=layout)
    slot, size = random_slots(batch, num_tokens, num_out, low=low), random_sizes(batch, num_tokens)
    for triple in merged_three_ways(x, slot, num_out, size, residual, grad):
        assert_within_budget(*triple)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_size", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_merge_with_and_without_its_options(with_residual, with_size, dtype):
    x, grad = tokens(2, 11, 40, dtype=dtype), tokens(2, 6, 40, dtype=dtype, seed=2)
    residual = tokens(2, 6, 40, dtype=dtype, seed=1) if with_residual else None
    slot, size = random_slots(2, 11, 6).int(), random_sizes(2, 11, dtype=dtype) if with_size else None
    groups = ops.group_slots(slot, 6, backend="triton")
    for triple in merged_three_ways(x, slot, 6, size, residual, grad, groups=groups):
        assert_within_budget(*triple)


@pytest.mark.parametrize("with_size", [True, False])
def test_empty_slots_give_zeros_or_the_residual(with_size):
    x, residual = tokens(1, 4, 8), tokens(1, 6, 8, seed=1)
    slot, size = torch.tensor([[1, 4, 4, 1]]), random_sizes(1, 4) if with_size else None
    merged, total = ops.merge_tokens(x, slot, 6, size=size, backend="triton")
    empty = torch.tensor([0, 2, 3, 5])
    assert not merged[0, empty].any()
    assert not total[0, empty].any()
    merged, _ = ops.merge_tokens(x, slot, 6, size=size, residual=residual, backend="triton")
    assert torch.equal(merged[0, empty], residual[0, empty])


def test_a_slot_of_size_zero_is_zero_and_so_is_its_gradient():
    x = tokens(1, 5, 8).requires_grad_()
    slot, size = torch.tensor([[0, 0, 1, 1, 2]]), torch.tensor([[0.0, 2.0, 0.0, 0.0, 1.0]])
    merged, total = ops.merge_tokens(x, slot, 3, size=size, backend="triton")
    (grad,) = torch.autograd.grad(merged.sum(), x)
    assert torch.equal(total, torch.tensor([[2.0, 0.0, 1.0]]))
    assert torch.equal(merged, torch.stack([x[:, 1], torch.zeros(1, 8), x[:, 4]], 1))
    assert torch.equal(grad, torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0]).view(1, 5, 1).expand(1, 5, 8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_slot_takes_all(dtype):
    x, grad, slot = tokens(2, 50, 16, dtype=dtype), tokens(2, 3, 16, dtype=dtype, seed=1), torch.full((2, 50), 1)
    for triple in merged_three_ways(x, slot, 3, random_sizes(2, 50), None, grad):
        assert_within_budget(*triple)


def test_a_slot_of_one_token_is_that_token_bit_for_bit():
    x, slot = tokens(2, 9, 24, dtype=torch.bfloat16), torch.randperm(9, generator=seeded()).expand(2, -1)
    merged, _ = ops.merge_tokens(x, slot, 9, backend="triton")
    assert torch.equal(ops.unmerge_tokens(merged, slot, backend="triton"), x)


def test_mixed_dtypes():
    x, residual = tokens(1, 7, 16, dtype=torch.bfloat16), tokens(1, 4, 16, seed=1)
    grad, slot = tokens(1, 4, 16, seed=2), random_slots(1, 7, 4)
    for size in (random_sizes(1, 7, dtype=torch.float16), random_sizes(1, 7, dtype=torch.int64)):
        results = merged_three_ways(x, slot, 4, size, residual, grad)
        assert [ours.dtype for ours, _, _ in results] == [torch.float32] * 2 + [torch.bfloat16, torch.float32]
        # The reference rounds the mean to bfloat16 before it adds the residual; the kernel does not.
        for ours, reference, exact in results:
            assert_within_budget(ours, reference, exact)


def test_prepared_groups_serve_several_merges():
    slot = random_slots(2, 9, 4)
    groups = ops.prepare_merge(slot, 4, backend="triton")
    assert groups is not None
    assert ops.prepare_merge(slot, 4, backend="reference") is None
    for dtype in DTYPES:
        x = tokens(2, 9, 8, dtype=dtype)
        for prepared, plain in zip(
            ops.merge_tokens(x, slot, 4, groups=groups, backend="triton"),
            ops.merge_tokens(x, slot, 4, backend="triton"),
            strict=True,
        ):
            assert torch.equal(prepared, plain)


def test_sequence_first_and_packed_views():
    by_sequence = tokens(9, 2, 16).transpose(0, 1)
    packed = tokens(2, 9, 3, 16)[:, :, 1]
    channels_first = tokens(2, 16, 9).mT
    slot, size = random_slots(2, 9, 4), random_sizes(9, 2).t()
    for x in (by_sequence, packed, channels_first):
        residual, grad = tokens(4, 2, 16, seed=1).transpose(0, 1), tokens(4, 2, 16, seed=2).transpose(0, 1)
        for triple in merged_three_ways(x, slot, 4, size, residual, grad):
            assert_within_budget(*triple)


def test_a_gradient_of_stride_zero():
    x, slot = tokens(2, 9, 16).requires_grad_(), random_slots(2, 9, 4)
    merged, total = ops.merge_tokens(x, slot, 4, backend="triton")
    (grad,) = torch.autograd.grad(merged.sum(), x)
    expected = 1.0 / total.gather(1, slot)
    torch.testing.assert_close(grad, expected.unsqueeze(-1).expand(2, 9, 16))


def weighted_three_ways(whole, prefix, slot, num_out, size, grad, *, eps, size_dtype=torch.float32):
    """Do likewise with learned weights and rows in front: merged, sizes, gradients of all tokens and weights."""
    results = []
    for backend, cast in (("triton", None), ("reference", None), ("reference", torch.float64)):
        x = (whole if cast is None else whole.to(cast)).detach().requires_grad_()
        weight = size.to(size_dtype if cast is None else cast).detach().requires_grad_()
        merged, total = ops.merge_tokens(
            x[:, prefix:],
            slot,
            num_out,
            size=weight,
            eps=eps,
            head=x[:, :prefix] if prefix else None,
            backend=backend,
        )
        assert not total.requires_grad
        results.append([merged, total, *torch.autograd.grad(merged, (x, weight), grad.to(merged.dtype))])
    return list(zip(*results, strict=True))


def check_weighted(triples):
    merged, total, grad_x, grad_size = triples
    for triple in (merged, total, grad_x):
        assert_within_budget(*triple)
    # A difference of two sums: it errs by their roundings, not by its own.
    assert_within_budget(*grad_size, steps=8)


@pytest.mark.parametrize(("layout", "dtype"), list(zip(["dense", "sliced", "expanded"], DTYPES, strict=True)))
@pytest.mark.parametrize(("batch", "num_tokens", "num_out", "channels"), SHAPES)
def test_learned_weights_behind_a_head(batch, num_tokens, num_out, channels, layout, dtype):
    whole = tokens(batch, 1 + num_tokens, channels, dtype=dtype, layout=layout)
    grad = tokens(batch, 1 + num_out, channels, dtype=dtype, seed=2, layout=layout)
    slot = random_slots(batch, num_tokens, num_out)
    size = torch.rand(batch, num_tokens, generator=seeded(5)) + 0.5
    check_weighted(weighted_three_ways(whole, 1, slot, num_out, size, grad, eps=1e-6))


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("eps", [0.0, 0.25])
@pytest.mark.parametrize("size_dtype", DTYPES)
def test_learned_weights_of_any_dtype(size_dtype, eps, prefix):
    slot = random_slots(2, 9, 4).int()
    size = random_sizes(9, 2).t() / 4  # exact in every dtype
    whole, grad = tokens(2, 9 + prefix, 24), tokens(2, 4 + prefix, 24, seed=2)
    check_weighted(weighted_three_ways(whole, prefix, slot, 4, size, grad, eps=eps, size_dtype=size_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_learned_weights_of_more_tokens_than_a_block_and_more_channels_than_a_program(dtype):
    for num_tokens, channels in ((70, 8), (3, 1030)):
        whole, grad = tokens(1, num_tokens, channels, dtype=dtype), tokens(1, 5, channels, dtype=dtype, seed=2)
        size, slot = torch.rand(1, num_tokens, generator=seeded(5)), random_slots(1, num_tokens, 5)
        check_weighted(weighted_three_ways(whole, 0, slot, 5, size, grad, eps=1e-6))


def layer(channels, dtype=torch.float32):
    """Weight and bias that give random tokens sizes between about 0.3 and 3."""
    return tokens(1, channels, seed=6).div(2 * channels**0.5).to(dtype), torch.full((1,), -0.25, dtype=dtype)


def learned_three_ways(whole, prefix, slot, num_out, grad, *, eps=0.25, layer_dtype=None, residual=None):
    """Do likewise with sizes by a layer: merged, sizes, gradients of all tokens and of the layer."""
    results = []
    constants = [whole, *layer(whole.shape[2], layer_dtype or whole.dtype), *([] if residual is None else [residual])]
    for backend, cast in (("triton", None), ("reference", None), ("reference", torch.float64)):
        leaves = [(t if cast is None else t.to(cast)).detach().requires_grad_() for t in constants]
        merged, total = ops.merge_tokens(
            leaves[0][:, prefix:],
            slot,
            num_out,
            log_size=(leaves[1], leaves[2]),
            residual=None if residual is None else leaves[3],
            eps=eps,
            head=leaves[0][:, :prefix] if prefix else None,
            backend=backend,
        )
        assert not total.requires_grad
        results.append([merged, total, *torch.autograd.grad(merged, leaves, grad.to(merged.dtype))])
    return list(zip(*results, strict=True))


def check_learned(triples):
    merged, *others = triples
    assert_within_budget(*merged)
    for triple in others:  # sums of exponentials, differences of sums: they err by their roundings, not by their own
        assert_within_budget(*triple, steps=8)


@pytest.mark.parametrize(("layout", "dtype"), list(zip(["dense", "sliced", "expanded"], DTYPES, strict=True)))
@pytest.mark.parametrize(("batch", "num_tokens", "num_out", "channels"), SHAPES)
def test_sizes_by_a_layer(batch, num_tokens, num_out, channels, layout, dtype):
    whole = tokens(batch, 1 + num_tokens, channels, dtype=dtype, layout=layout)
    grad = tokens(batch, 1 + num_out, channels, dtype=dtype, seed=2, layout=layout)
    check_learned(learned_three_ways(whole, 1, random_slots(batch, num_tokens, num_out), num_out, grad))


@pytest.mark.parametrize("layer_dtype", DTYPES)
@pytest.mark.parametrize("residual_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_by_a_layer_of_any_dtype_with_a_residual(dtype, residual_dtype, layer_dtype):
    whole, grad = tokens(2, 11, 24, dtype=dtype), tokens(2, 6, 24, dtype=dtype, seed=2)
    residual = None if residual_dtype is None else tokens(2, 4, 24, dtype=residual_dtype, seed=1)
    options = {"layer_dtype": layer_dtype, "residual": residual}
    check_learned(learned_three_ways(whole, 2, random_slots(2, 9, 4).int(), 4, grad, **options))


@pytest.mark.parametrize("channels", [24, 1030])
def test_sizes_by_a_layer_are_those_given(channels):
    """More channels than a program holds: every program finds the same sizes."""
    x, slot, (weight, bias) = tokens(2, 9, channels), random_slots(2, 9, 4), layer(channels)
    groups = ops.group_slots(slot, 4, backend="triton")
    merged, total, size = kernels.merge_tokens(x, *groups, None, None, 1e-6, None, weight, bias)
    torch.testing.assert_close(size, (x @ weight[0] + bias).exp())
    for ours, given in zip((merged, total), kernels.merge_tokens(x, *groups, size, None, 1e-6), strict=True):
        assert torch.equal(ours, given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_by_a_layer_are_the_same_bits_in_any_batch(dtype):
    slot, (weight, bias) = random_slots(3, 13, 5), layer(24, dtype)

    def run(images):
        x = tokens(3, 14, 24, dtype=dtype)[images].requires_grad_()
        options = {"log_size": (weight, bias), "eps": 1e-6, "head": x[:, :1], "backend": "triton"}
        merged, total = ops.merge_tokens(x[:, 1:], slot[images], 5, **options)
        return merged, total, *torch.autograd.grad(merged, x, tokens(3, 6, 24, dtype=dtype, seed=2)[images])

    whole = run(slice(None))
    for again, alone, result in zip(run(slice(None)), run(slice(1, 2)), whole, strict=True):
        assert torch.equal(again, result)
        assert torch.equal(alone, result[1:2])


def test_a_layer_of_constants_still_moves_the_tokens():
    """Gradients of the tokens go through the sizes too, those of a frozen layer are not asked for."""
    x, slot, grad, (weight, bias) = tokens(2, 9, 8), random_slots(2, 9, 4), tokens(2, 4, 8, seed=2), layer(8)
    gradients = []
    for backend in ("triton", "reference"):
        leaf = x.clone().requires_grad_()
        merged, _ = ops.merge_tokens(leaf, slot, 4, log_size=(weight, bias), backend=backend)
        gradients.append(torch.autograd.grad(merged, leaf, grad)[0])
    torch.testing.assert_close(*gradients)
    with_sizes = leaf.detach().requires_grad_()
    merged, _ = ops.merge_tokens(with_sizes, slot, 4, size=(x @ weight[0] + bias).exp(), backend="triton")
    assert not torch.allclose(torch.autograd.grad(merged, with_sizes, grad)[0], gradients[0])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_score_that_is_no_number_spoils_its_slot_only():
    x, slot = tokens(1, 6, 8), torch.tensor([[0, 1, 1, 2, 0, 2]])
    x[0, 1, 0] = float("inf")
    for backend in ("triton", "reference"):
        merged, total = ops.merge_tokens(x, slot, 3, log_size=(torch.ones(1, 8), torch.zeros(1)), backend=backend)
        assert total.isnan().tolist() == [[False, True, False]]
        assert merged.isnan().any(2).tolist() == [[False, True, False]]


def test_eps_is_added_to_the_divisor_only():
    x, slot = torch.ones(1, 3, 8), torch.tensor([[0, 0, 2]])
    for size, expected in ((None, [2.0, 0.0, 1.0]), (torch.tensor([[0.5, 0.0, 3.0]]), [0.5, 0.0, 3.0])):
        merged, total = ops.merge_tokens(x, slot, 3, size=size, eps=0.5, backend="triton")
        assert total.tolist() == [expected]
        torch.testing.assert_close(merged[0, :, 0], total[0] / (total[0] + 0.5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_rows_are_copied_and_the_residual_meets_the_merged_ones_only(dtype):
    whole, slot = tokens(2, 8, 40, dtype=dtype), random_slots(2, 5, 3)
    for head in (whole[:, :3], whole[:, :0], tokens(3, 2, 40, dtype=dtype).transpose(0, 1)):
        for residual in (None, tokens(2, 3, 40, dtype=dtype, seed=1), tokens(2, 3, 40, seed=1)):
            leaf = head.detach().requires_grad_()
            options = {"size": random_sizes(2, 5), "residual": residual, "backend": "triton"}
            merged, total = ops.merge_tokens(whole[:, 3:], slot, 3, head=leaf, **options)
            plain, plain_total = ops.merge_tokens(whole[:, 3:], slot, 3, **options)
            assert torch.equal(merged, torch.cat([head.to(plain.dtype), plain], 1))
            assert torch.equal(total, plain_total)
            grad = tokens(*merged.shape, dtype=merged.dtype, seed=2)
            assert torch.equal(torch.autograd.grad(merged, leaf, grad)[0], grad[:, : head.shape[1]].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_gradients_are_the_same_bits_in_any_batch(dtype):
    slot, size = random_slots(3, 13, 5), torch.rand(3, 13, generator=seeded(5))

    def run(images):
        x = tokens(3, 14, 24, dtype=dtype)[images].requires_grad_()
        weight = size[images].clone().requires_grad_()
        merged, _ = ops.merge_tokens(x[:, 1:], slot[images], 5, size=weight, eps=1e-6, head=x[:, :1], backend="triton")
        return merged, *torch.autograd.grad(merged, (x, weight), tokens(3, 6, 24, dtype=dtype, seed=2)[images])

    whole = run(slice(None))
    for again, alone, result in zip(run(slice(None)), run(slice(1, 2)), whole, strict=True):
        assert torch.equal(again, result)
        assert torch.equal(alone, result[1:2])


def test_a_weight_that_is_not_a_number_stays_in_its_slot():
    x, slot = tokens(1, 6, 8), torch.tensor([[0, 1, 1, 2, 0, 2]])
    size = torch.tensor([[1.0, float("nan"), 1.0, 2.0, 1.0, 1.0]]).requires_grad_()
    merged, _ = ops.merge_tokens(x, slot, 3, size=size, backend="triton")
    (grad,) = torch.autograd.grad(merged, size, tokens(1, 3, 8, seed=2))
    assert torch.equal(grad.isnan(), slot == 1)


def test_constant_sizes_get_no_gradient_and_keep_no_tokens():
    slot, size = random_slots(1, 5, 3), random_sizes(1, 5)
    for backend in ("triton", "reference"):
        x = tokens(1, 5, 8).requires_grad_()
        merged, total = ops.merge_tokens(x, slot, 3, size=size, backend=backend)
        assert not total.requires_grad
        if backend == "triton":
            assert not any(saved is x for saved in merged.grad_fn.saved_tensors)


@pytest.mark.parametrize(("layout", "dtype"), list(zip(["dense", "sliced", "expanded"], DTYPES, strict=True)))
@pytest.mark.parametrize(("batch", "num_tokens", "num_slots", "channels"), SHAPES)
def test_unmerge_forward_and_backward(batch, num_tokens, num_slots, channels, layout, dtype):
    x = tokens(batch, num_slots, channels, dtype=dtype, layout=layout)
    grad = tokens(batch, num_tokens, channels, dtype=dtype, seed=1, layout=layout)
    slot = random_slots(batch, num_tokens, num_slots, low=-1)
    results = []
    for backend, cast in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        leaf = x.to(cast).detach().requires_grad_()
        out = ops.unmerge_tokens(leaf, slot, backend=backend)
        results.append([out, *torch.autograd.grad(out, leaf, grad.to(cast))])
    assert torch.equal(results[0][0], results[1][0])
    for triple in zip(*results, strict=True):
        assert_within_budget(*triple)


def test_unmerge_with_groups_takes_one_launch_a_way():
    slot, x = random_slots(2, 9, 4, low=-1), tokens(2, 4, 8).requires_grad_()
    groups = ops.group_slots(slot, 4, backend="triton")
    with traffic() as counted:
        out = ops.unmerge_tokens(x, slot, groups=groups, backend="triton")
        torch.autograd.grad(out.sum(), x)
    assert dict(counted.launches) == {"spread_slots_kernel": 1, "reduce_slots_kernel": 1}
    assert torch.equal(out, ops.unmerge_tokens(x, slot, backend="triton"))


@pytest.mark.parametrize("num_slots", [3, 0])
def test_unmerge_of_dropped_tokens_only(num_slots):
    x = tokens(2, num_slots, 8).requires_grad_()
    out = ops.unmerge_tokens(x, torch.full((2, 6), -1, dtype=torch.int32), backend="triton")
    assert out.shape == (2, 6, 8)
    assert not out.any()
    assert not torch.autograd.grad(out.sum(), x)[0].any()


def test_no_tokens_and_no_channels():
    merged, total = ops.merge_tokens(torch.zeros(2, 0, 8), torch.zeros(2, 0).long(), 3, backend="triton")
    assert torch.equal(merged, torch.zeros(2, 3, 8))
    assert torch.equal(total, torch.zeros(2, 3))
    for x in (torch.zeros(2, 0, 8), torch.zeros(0, 4, 8)):
        size = torch.ones(x.shape[:2], requires_grad=True)
        slot = torch.zeros(x.shape[:2], dtype=torch.int64)
        merged, _ = ops.merge_tokens(x, slot, 3, size=size, head=x[:, :1], backend="triton")
        assert not torch.autograd.grad(merged.sum(), size)[0].any()
        learned = torch.ones(1, 8, requires_grad=True), torch.ones(1, requires_grad=True)
        merged, _ = ops.merge_tokens(x, slot, 3, log_size=learned, head=x[:, :1], backend="triton")
        assert not any(grad.any() for grad in torch.autograd.grad(merged.sum(), learned))
    assert ops.unmerge_tokens(tokens(2, 3, 8), torch.zeros(2, 0).long(), backend="triton").shape == (2, 0, 8)
    assert ops.unmerge_tokens(tokens(2, 3, 0), torch.zeros(2, 4).long(), backend="triton").shape == (2, 4, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_determinism_and_batch_invariance_bitwise(dtype):
    slot, size = random_slots(3, 13, 5), random_sizes(3, 13)

    def run(images):
        x = tokens(3, 13, 24, dtype=dtype)[images].requires_grad_()
        residual = tokens(3, 5, 24, dtype=dtype, seed=1)[images]
        merged, total = ops.merge_tokens(x, slot[images], 5, size=size[images], residual=residual, backend="triton")
        spread = ops.unmerge_tokens(merged, slot[images], backend="triton")
        (grad,) = torch.autograd.grad(spread, x, tokens(3, 13, 24, dtype=dtype, seed=2)[images])
        return merged, total, spread, grad

    whole = run(slice(None))
    for again, alone, result in zip(run(slice(None)), run(slice(1, 2)), whole, strict=True):
        assert torch.equal(again, result)
        assert torch.equal(alone, result[1:2])


def test_rows_are_summed_in_index_order():
    """The order of a sum is its rounding: the same tokens in the same order, whatever else the image holds."""
    x = tokens(1, 20, 8)
    for offset in (0, 3, 12):
        slot = torch.full((1, 20), 1)
        slot[:, offset : offset + 8] = 0
        sums = kernels.sum_slots(x, slot, 2)
        expected = torch.zeros(8)
        for n in range(offset, offset + 8):
            expected = expected + x[0, n]
        assert torch.equal(sums[0, 0], expected)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("scale", [0.1, 12.0, 1000.0])
def test_learned_sizes_that_would_overflow(scale, norm):
    """Against a softmax in float64, whatever the scores: the greatest first, last, or in the middle of its slot."""
    x = tokens(2, 23, 24)
    slot = torch.randint(0, 6, (2, 23), generator=seeded(3))
    weight, bias = scale * tokens(1, 24, seed=4), tokens(1, seed=5)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    grad = tokens(2, 6, 24, seed=6)

    def run(backend):
        options = {"log_size": (leaves[1], leaves[2]), "eps": 1e-6, "backend": backend}
        if norm:
            options["norm"] = None, None, 1e-6
        merged, size, *_ = ops.merge_tokens(x, slot, 6, **options)
        return [merged, *torch.autograd.grad(merged, leaves, grad), size]

    double = [leaf.detach().double().requires_grad_() for leaf in leaves]
    score = (double[0] @ double[1][0] + double[2]).unsqueeze(1)
    own = torch.arange(6)[None, :, None] == slot[:, None, :]
    greatest = score.where(own, -torch.inf).amax(2, keepdim=True).clamp_min(0.0)
    exponential = (score - greatest).masked_fill(~own, -torch.inf).exp()
    share = exponential / (exponential.sum(2, keepdim=True) + 1e-6 * (-greatest).exp())
    exact = share @ double[0]
    exact = [exact, *torch.autograd.grad(exact, double, grad.double())]
    size = (exponential.sum(2) * greatest.squeeze(2).clamp_max(40.0).exp()).float()
    for backend in ("triton", "reference"):
        *ours, ours_size = run(backend)
        for result, expected in zip(ours, exact, strict=True):
            assert result.isfinite().all()
            # A score of float32 is rounded, and its exponential with it.
            bound = 1e-4 * (1 + scale) * max(1.0, expected.abs().max().item())
            assert (result - expected).abs().max() <= bound
        torch.testing.assert_close(ours_size, size, rtol=1e-3 * (1 + scale / 10), atol=1e-6)
