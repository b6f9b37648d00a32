"""Reductions that end in a layer normalisation: kernels against reference in the interpreter, under the sanitizer."""

import pytest
import torch
import torch.nn.functional as F

from bench.proof.traffic import traffic
from fastreduce import ops
from fastreduce.kernels import fuse_tokens as fuse_kernels
from fastreduce.kernels import merge_tokens as merge_kernels
from tests.helpers.budget import EPS, assert_within_budget
from tests.helpers.inputs import DTYPES, distinct_indices, seeded, tokens

# (batch, tokens, kept, channels, prefix): odd, several programs an image backward, an empty batch, rows wider than
# those of the plain kernels' programs.
SHAPES = [(2, 17, 5, 24, 1), (2, 100, 63, 8, 1), (3, 9, 4, 33, 0), (0, 9, 3, 8, 1), (1, 7, 3, 1030, 2)]
WAYS = ["gather", "fuse", "merge", "merge_learned"]


NO_AFFINE = (None, None, 1e-6)


def inputs(batch, num_in, keep, channels, prefix, dtype, layout="dense", norm_dtype=None):
    """Make leaves of all the ways, and what is constant; an index that is taken twice, an empty slot."""
    repeated = distinct_indices(batch, keep, num_in - prefix)
    repeated[:, -1] = repeated[:, 0]
    leaves = {
        "x": tokens(batch, num_in, channels, dtype=dtype, layout=layout),
        "residual": tokens(batch, prefix + keep + 1, channels, dtype=dtype, seed=1, layout=layout),
        "weight": tokens(channels, seed=2).to(norm_dtype or dtype),
        "bias": tokens(channels, seed=3).to(norm_dtype or dtype),
        "size": torch.rand(batch, num_in, generator=seeded(4)) + 0.5,
        "log_weight": tokens(1, channels, seed=5).div(2 * channels**0.5).to(dtype),
        "log_bias": torch.full((1,), -0.25, dtype=dtype),
    }
    order = distinct_indices(batch, num_in - prefix, num_in - prefix)
    slot = torch.randint(1, keep, (batch, num_in - prefix), generator=seeded(6))
    return leaves, {"index": repeated, "order": order, "slot": slot, "keep": keep, "prefix": prefix}


def reduce(way, leaves, constants, backend, *, norm=("weight", "bias")):
    """Return what stays and its norm."""
    x, residual, size, keep, prefix = (
        *(leaves[name] for name in ("x", "residual", "size")),
        *list(constants.values())[3:],
    )
    options = {
        "norm": (*(leaves[name] if name in norm else None for name in ("weight", "bias")), 1e-3),
        "backend": backend,
    }
    if way == "gather":
        return ops.gather_tokens(x, constants["index"], prefix=prefix, residual=residual[:, 1:], **options)
    if way == "fuse":
        options |= {"prefix": prefix, "residual": residual, "residual_bias": leaves["log_weight"][0]}
        return ops.fuse_tokens(x, constants["order"], size[:, prefix:], keep, **options)
    options |= {"residual": residual[:, prefix + 1 :], "head": x[:, :prefix] if prefix else None, "eps": 0.25}
    if way == "merge":
        options["size"] = size[:, prefix:]
    else:
        options["log_size"] = leaves["log_weight"], leaves["log_bias"]
    return ops.merge_tokens(x[:, prefix:], constants["slot"], keep, **options)[::2]


def differentiated(way, leaves, constants, backend, cast=None, **options):
    """Return the rows, normed rows, and the gradients of the leaves that the way uses, by name."""
    leaves = {name: (t if cast is None else t.to(cast)).detach().requires_grad_() for name, t in leaves.items()}
    out, normed = reduce(way, leaves, constants, backend, **options)
    upstream = [tokens(*out.shape, seed=seed).to(normed.dtype) for seed in (7, 8)]
    gradients = torch.autograd.grad((out, normed), list(leaves.values()), upstream, allow_unused=True)
    return {"out": out, "normed": normed} | dict(zip(leaves, gradients, strict=True))


def check(way, leaves, constants, **options):
    ours, plain, exact = (
        differentiated(way, leaves, constants, backend, cast, **options)
        for backend, cast in (("triton", None), ("reference", None), ("reference", torch.float64))
    )
    widest = EPS[leaves["x"].dtype]
    for name, kernel in ours.items():
        assert (kernel is None) == (plain[name] is None), name
        if kernel is not None:
            # Gradients are sums of rounded ones; that of a layer's bias nearly cancels out.
            steps = 2 if name in ("out", "normed") else (256 if name == "log_bias" else 16) * widest / EPS[kernel.dtype]
            assert_within_budget(kernel, plain[name], exact[name], steps=steps)


@pytest.mark.parametrize(("layout", "dtype"), list(zip(["dense", "sliced", "expanded"], DTYPES, strict=True)))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_forward_and_backward(way, shape, layout, dtype):
    check(way, *inputs(*shape, dtype, layout))


@pytest.mark.parametrize("way", WAYS)
def test_norms_of_any_dtype_or_none(way):
    for norm_dtype, norm in ((torch.float32, ("weight", "bias")), (torch.float16, ("bias",)), (None, ())):
        check(way, *inputs(2, 9, 4, 24, 1, torch.bfloat16, norm_dtype=norm_dtype), norm=norm)


@pytest.mark.parametrize("way", WAYS)
def test_rows_are_those_of_the_plain_reduction_and_statistics_those_of_the_rows(way):
    leaves, constants = inputs(2, 12, 5, 40, 1, torch.bfloat16)
    out, normed = reduce(way, leaves, constants, "triton")
    norm = (leaves[name].float() for name in ("weight", "bias"))
    expected = F.layer_norm(out.float(), (40,), *norm, 1e-3)
    assert_within_budget(normed, expected.bfloat16(), expected.double())
    if way == "gather":
        plain = ops.gather_tokens(leaves["x"], constants["index"], residual=leaves["residual"][:, 1:], backend="triton")
        assert torch.equal(out, plain)


@pytest.mark.parametrize("way", WAYS)
def test_one_output_alone_has_a_gradient(way):
    leaves, constants = inputs(2, 9, 4, 8, 1, torch.float32)
    for used in (0, 1):
        results = []
        for backend in ("triton", "reference"):
            wanted = {name: tensor.clone().requires_grad_() for name, tensor in leaves.items()}
            out = reduce(way, wanted, constants, backend)[used]
            grad = tokens(*out.shape, seed=7)
            results.append(torch.autograd.grad(out, list(wanted.values()), grad, allow_unused=True))
        for ours, plain in zip(*results, strict=True):
            if ours is None or plain is None:
                assert all(value is None or not value.any() for value in (ours, plain))
            else:
                torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_bits_in_any_batch(way):
    leaves, constants = inputs(3, 33, 12, 48, 1, torch.float16)
    several = ("x", "residual", "size")

    def run(images):
        chosen = {name: tensor[images] if name in several else tensor for name, tensor in leaves.items()}
        picked = {name: value[images] if torch.is_tensor(value) else value for name, value in constants.items()}
        wanted = [chosen[name].requires_grad_() for name in several[:2]]
        out, normed = reduce(way, chosen, picked, "triton")
        grad = tokens(*leaves["residual"].shape, dtype=torch.float16, seed=7)[images][:, : out.shape[1]]
        return out, normed, *torch.autograd.grad((out, normed), wanted, (grad, grad))

    whole = run(slice(None))
    for again, alone, result in zip(run(slice(None)), run(slice(1, 2)), whole, strict=True):
        assert torch.equal(again, result)
        assert torch.equal(alone, result[1:2])


def test_launches():
    counts = {}
    for way in WAYS:
        leaves, constants = inputs(1, 9, 4, 24, 1, torch.float32)
        wanted = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
        with traffic() as counted:
            out, normed = reduce(way, wanted, constants, "triton")
        with traffic() as back:
            torch.autograd.grad((out, normed), list(wanted.values()), (out, normed), allow_unused=True)
        counts[way] = dict(counted.launches), dict(back.launches)
    merging = {"group_slots_kernel": 1, "reduce_slots_kernel": 1}, {"merge_tokens_norm_backward_kernel": 1}
    assert counts == {
        "gather": (
            {"gather_tokens_kernel": 1},
            {"group_slots_kernel": 1, "gather_tokens_norm_backward_kernel": 1},
        ),
        "fuse": ({"fuse_tokens_kernel": 1}, {"fuse_tokens_norm_backward_kernel": 1}),
        "merge": merging,
        "merge_learned": merging,
    }


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_wanted_is_not_written_and_does_not_matter(way):
    leaves, constants = inputs(2, 9, 4, 24, 1, torch.float32)

    def run(names):
        wanted = {name: tensor.detach().requires_grad_(name in names) for name, tensor in leaves.items()}
        out, normed = reduce(way, wanted, constants, "triton")
        asked = [wanted[name] for name in names]
        with traffic() as counted:
            gradients = torch.autograd.grad((out, normed), asked, (out.detach(), normed.detach()), allow_unused=True)
        return dict(zip(names, gradients, strict=True)), counted.stores.total(), out.numel()

    everything, _, _ = run(list(leaves))
    stores = {}
    for name in ("x", "residual", "weight", "bias"):
        alone, stores[name], rows = run([name])
        assert torch.equal(alone[name], everything[name])
    kept = rows // 5 * 4 if way.startswith("merge") else rows  # the others are those of a head
    partial_sums = 2 * 2 * 24  # of one program an image
    assert stores["residual"] - 4 * kept == stores["weight"] - 4 * partial_sums == stores["bias"] - 4 * partial_sums


@pytest.mark.parametrize("learned", [False, True])
def test_tokens_of_no_slot_get_zeros(learned):
    """Results are as if these tokens were not there."""
    x, slot = tokens(1, 40, 8), torch.arange(40).remainder(3)[None] - 1
    stays = (slot >= 0)[0]
    results = []
    for rows in (torch.full((40,), True), stays):
        leaves = [x[:, rows], tokens(1, 8, seed=1) / 4 if learned else torch.rand(1, 40, generator=seeded(2))[:, rows]]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        options = {"log_size": (leaves[1], torch.zeros(1))} if learned else {"size": leaves[1]}
        out = ops.merge_tokens(leaves[0], slot[:, rows], 2, norm=NO_AFFINE, backend="triton", **options)[::2]
        results.append(torch.autograd.grad(out, leaves, [tokens(1, 2, 8, seed=seed) for seed in (3, 4)]))
    (grad_x, grad_size), (expected_x, expected_size) = results
    assert not grad_x[:, ~stays].any()
    assert torch.equal(grad_x[:, stays], expected_x)
    if learned:
        torch.testing.assert_close(grad_size, expected_size)
    else:
        assert not grad_size[:, ~stays].any()
        assert torch.equal(grad_size[:, stays], expected_size)


def test_a_long_rest_is_normed_by_a_launch_of_its_own(monkeypatch):
    monkeypatch.setattr(fuse_kernels, "MOST_SUMMED", 2)
    leaves, constants = inputs(2, 17, 5, 24, 1, torch.float32)
    check("fuse", leaves, constants)
    with traffic() as counted:
        reduce("fuse", leaves, constants, "triton")
    assert dict(counted.launches) == {"fuse_tokens_kernel": 1, "norm_rows_kernel": 1}


def test_wide_rows_do_not_share_a_program():
    assert [merge_kernels._side_by_side(block_c, None, 1) for block_c in (256, 1024, 2048)] == [4, 4, 1]
    assert merge_kernels._side_by_side(256, None, None) == 1


def test_no_channels_and_no_rows():
    norm = torch.zeros(0), torch.zeros(0), 1e-6
    out, normed = ops.gather_tokens(torch.zeros(2, 5, 0), torch.zeros(2, 3).long(), norm=norm, backend="triton")
    assert out.shape == normed.shape == (2, 4, 0)
    x = torch.zeros(2, 5, 8, requires_grad=True)
    out, normed = ops.gather_tokens(x, torch.zeros(2, 0).long(), prefix=0, norm=NO_AFFINE, backend="triton")
    assert normed.shape == (2, 0, 8)
    assert not torch.autograd.grad((out, normed), x, (out, normed))[0].any()


def test_no_channels_no_tokens_and_a_residual():
    x, scores = torch.zeros(2, 5, 0, requires_grad=True), torch.ones(2, 4, requires_grad=True)
    order = torch.arange(4).expand(2, -1)
    out = ops.fuse_tokens(x, order, scores, 2, norm=NO_AFFINE, backend="triton")
    assert not torch.autograd.grad(out, (x, scores), out)[1].any()
    residual = tokens(2, 3, 8).requires_grad_()
    slot, x = torch.zeros(2, 0).long(), torch.zeros(2, 0, 8)
    merged, _, normed = ops.merge_tokens(x, slot, 3, residual=residual, norm=NO_AFFINE, backend="triton")
    expected = F.layer_norm(residual, (8,), eps=1e-6)
    torch.testing.assert_close((merged, normed), (residual, expected))
    grads = tokens(2, 3, 8, seed=1)
    ours, plain = (torch.autograd.grad(result, residual, grads) for result in (normed, expected))
    torch.testing.assert_close(ours, plain)
