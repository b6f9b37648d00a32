"""sinkhorn_merge: kernels against reference in the interpreter, under the sanitizer."""

import pytest
import torch

from fastreduce import ops
from fastreduce.kernels import _workspace, sinkhorn_merge_backward
from fastreduce.kernels import sinkhorn_merge as kernels
from tests.helpers.budget import assert_within_budget
from tests.helpers.inputs import DTYPES, tokens

# (batch, tokens, clusters, channels, head rows); 70 tokens and 67 clusters are a tile and a bit, 20 is a padded row
SHAPES = [
    (2, 17, 4, 24, 1),
    (1, 70, 20, 33, 2),
    (1, 9, 67, 16, 0),
    (3, 5, 2, 8, None),
    (1, 2, 3, 3, 1),
    (0, 9, 3, 8, 1),
    (1, 12, 16, 70, None),
]


def inputs(batch, num_tokens, clusters, channels, num_head, dtype=torch.float32, layout="dense"):
    """Make tokens behind the rows that form the head, centres of unit length, and an upstream gradient."""
    prefix = num_head or 0
    sequence = tokens(batch, prefix + num_tokens, channels, dtype=dtype, layout=layout)
    centers = torch.nn.functional.normalize(tokens(clusters, channels, seed=1, layout=layout), dim=1).to(dtype)
    grad = tokens(batch, prefix + clusters, channels, dtype=dtype, seed=2, layout=layout)
    return sequence[:, prefix:], centers, None if num_head is None else sequence[:, :prefix], grad


def forward_and_backward(x, centers, head, grad, backend, eps=1.0, iters=3):
    leaves = [tensor.detach().requires_grad_() for tensor in (x, centers, head) if tensor is not None]
    outputs = ops.sinkhorn_merge(
        leaves[0],
        leaves[1],
        eps=eps,
        iters=iters,
        head=leaves[2] if head is not None else None,
        backend=backend,
    )
    return [*outputs, *torch.autograd.grad(outputs[0], leaves, grad.to(outputs[0].dtype))]


def check(arguments, steps=8, **options):
    """Compare; the plan's errors come from the scores, which grow with 1 / eps, in sums taken in another order."""
    exact = [tensor if tensor is None else tensor.double() for tensor in arguments]
    results = [
        forward_and_backward(*arguments, "triton", **options),
        forward_and_backward(*arguments, "reference", **options),
        forward_and_backward(*exact, "reference", **options),
    ]
    for triple in zip(*results, strict=True):
        assert_within_budget(*triple, steps=steps)
    return results[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["dense", "sliced", "expanded"])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(shape, layout, dtype):
    merged, similarity, token_bias, _, *_ = check(inputs(*shape, dtype, layout))
    batch, num_tokens, clusters, channels, num_head = shape
    assert merged.shape == (batch, (num_head or 0) + clusters, channels)
    assert similarity.shape == (batch, num_tokens, clusters)
    assert token_bias.shape == (batch, num_tokens)


@pytest.mark.parametrize(("eps", "iters"), [(1.0, 1), (0.3, 2), (0.05, 5), (0.01, 3)])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_iterations_and_temperatures(dtype, eps, iters):
    arguments = inputs(1, 70, 6, 12, 1, dtype)
    check(arguments, steps=8 + 1 / eps, eps=eps, iters=iters)


@pytest.mark.parametrize("dtype", DTYPES)
def test_clusters_that_lie_far_from_every_token(dtype):
    """All weight is on one cluster until the biases move it: exponentials of -200 must not be lost."""
    x, centers, head, grad = inputs(1, 10, 3, 4, 1, dtype)
    x = x.abs()
    centers = torch.eye(3, 4).to(dtype)
    centers[1:] = -centers[1:]
    check((x, centers, head, grad), steps=256, eps=0.01, iters=4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_rows_are_copied_bit_for_bit(dtype):
    x, centers, _, _ = inputs(2, 9, 4, 70, 1, dtype)
    head = tokens(2, 5, 75, dtype=dtype, seed=3)[..., :70]
    head[:, 2, 3] = float("nan")
    merged = ops.sinkhorn_merge(x, centers, head=head, backend="triton")[0]
    assert torch.equal(merged[:, :5].nan_to_num(7.0), head.nan_to_num(7.0))
    assert torch.isfinite(merged[:, 5:]).all()


@pytest.mark.parametrize(
    ("x_dtype", "centers_dtype", "head_dtype"),
    [
        (torch.float16, torch.float32, torch.float16),
        (torch.float32, torch.bfloat16, None),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
    ],
)
def test_mixed_dtypes(x_dtype, centers_dtype, head_dtype):
    x, centers, head, grad = inputs(2, 20, 5, 16, 1)
    head = None if head_dtype is None else head.to(head_dtype)
    grad = grad if head_dtype is not None else grad[:, 1:]
    x, centers = x.to(x_dtype), centers.to(centers_dtype)
    dtypes = [tensor.dtype for tensor in check((x, centers, head, grad))]
    assert dtypes[0] == (torch.promote_types(x_dtype, head_dtype) if head_dtype else x_dtype)
    assert dtypes[4:] == [x_dtype, centers_dtype, *([head_dtype] if head_dtype else [])]


def test_zero_tokens_and_clamped_norms():
    x, centers, head, grad = inputs(1, 9, 4, 8, 1)
    x[:, 2], x[:, 5] = 0.0, 1e-14
    results = check((x, centers, head, grad))
    assert results[4][0, 2].abs().max() > 1e6  # the slope of x / 1e-12


def test_any_strides():
    _, centers, head, grad = inputs(2, 11, 4, 8, 1)
    by_sequence, transposed = tokens(11, 2, 8).transpose(0, 1), tokens(2, 8, 11).mT
    for x in (by_sequence, transposed, tokens(2, 22, 8)[:, ::2], tokens(2, 11, 24)[..., 8:16]):
        for rows in (head, head[:1].expand(2, 3, 8)):
            upstream = grad if rows is head else tokens(2, 7, 8, seed=4)
            check((x, centers.T.contiguous().T, rows, upstream))


def test_a_token_that_is_not_a_number_spoils_its_image_only():
    x, centers, head, grad = inputs(3, 9, 4, 8, 1)
    clean = forward_and_backward(x, centers, head, grad, "triton")
    x[1, 2] = float("nan")
    spoilt = forward_and_backward(x, centers, head, grad, "triton")
    for ours, before in zip(spoilt[:5], clean[:5], strict=True):
        assert torch.equal(ours[::2], before[::2])
    assert spoilt[0][1, 1:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariance_and_determinism_bitwise(dtype):
    x, centers, head, grad = inputs(4, 70, 18, 40, 1, dtype)
    whole = forward_and_backward(x, centers, head, grad, "triton", eps=0.1)
    again = forward_and_backward(x, centers, head, grad, "triton", eps=0.1)
    alone = forward_and_backward(x[2:3], centers, head[2:3], grad[2:3], "triton", eps=0.1)
    for index, (first, second, one) in enumerate(zip(whole, again, alone, strict=True)):
        assert torch.equal(first, second)
        if index != 5:  # the centres' gradient is a sum over the batch
            assert torch.equal(first[2:3], one)


def test_centers_gradient_over_groups_of_images(monkeypatch):
    monkeypatch.setattr(sinkhorn_merge_backward, "CENTER_PARTS", 2)
    check(inputs(5, 6, 3, 8, 1))


def test_many_clusters():
    """Rows of 1,104 columns: two tokens a step, and the next power of two of clusters."""
    check(inputs(1, 3, 1100, 4, None), steps=16)


def without_similarities(x, centers, head, backend, **options):
    with torch.no_grad():
        merged, none, *biases = ops.sinkhorn_merge(
            x, centers, head=head, similarity=False, backend=backend, **{"eps": 1.0, **options}
        )
    assert none is None
    return [merged, *biases]


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning", "ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("images", [1, 2, 5])
def test_similarities_that_are_not_kept(images, dtype, monkeypatch):
    """The same bits, in a workspace for some images at a time, beside an image that is not a number."""
    x, centers, head, _ = inputs(5, 17, 4, 24, 1, dtype, "sliced")
    x[1, 2] = float("nan")
    merged, _, *biases = ops.sinkhorn_merge(x, centers, head=head, eps=0.1, backend="triton")
    monkeypatch.setattr(_workspace, "WORKSPACE", images * 4 * (17 + 2) * 16 + 1)
    launched = []
    kernel = kernels.plan_biases_kernel

    class Spy:
        def __getitem__(self, grid):
            def launch(similarity, *rest, **settings):
                launched.append((grid[0], similarity.shape[0]))
                kernel[grid](similarity, *rest, **settings)

            return launch

    monkeypatch.setattr(kernels, "plan_biases_kernel", Spy())
    ours = without_similarities(x, centers, head, "triton", eps=0.1)
    for one, other in zip(ours, (merged, *biases), strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    assert launched == [(min(images, 5 - first), images) for first in range(0, 5, images)]
    for empty in without_similarities(x[:0], centers, head[:0], "triton"):
        assert empty.shape[0] == 0


def test_a_gradient_keeps_them():
    x, centers, _, _ = inputs(1, 5, 4, 8, 1)
    merged, none, *_ = ops.sinkhorn_merge(x, centers.requires_grad_(), similarity=False, backend="triton")
    assert merged.requires_grad
    assert none is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_cluster_takes_every_token_whatever_its_centre(dtype):
    x, centers, _, _ = inputs(2, 20, 1, 8, None, dtype)
    merged, *_, grad_centers = forward_and_backward(x, centers, None, torch.ones(2, 1, 8), "triton")
    total = torch.nn.functional.normalize(x.float(), dim=2).sum(1, keepdim=True)
    torch.testing.assert_close(merged.float(), total, atol=0.03 if dtype != torch.float32 else 1e-5, rtol=1e-2)
    assert grad_centers.abs().max() < 1e-5
