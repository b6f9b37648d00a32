"""received_scores: kernels against reference in the interpreter, under the sanitizer."""

import pytest
import torch
import torch.nn.functional as F

from fastreduce import ops
from fastreduce.kernels import received_scores as kernels
from tests.helpers.budget import assert_within_budget
from tests.helpers.inputs import DTYPES, seeded, tokens

# (batch, heads, queries, keys, head_dim): 67 rows take two programs, 300 keys several steps, 33 and 72 are masked
SHAPES = [
    (2, 3, 67, 67, 64),
    (1, 2, 9, 5, 72),
    (1, 1, 20, 300, 33),
    (2, 1, 3, 1, 1),
    (1, 1, 18, 18, 256),
    (0, 2, 9, 9, 16),
    (2, 2, 0, 7, 8),
]
ROUTES = pytest.mark.parametrize("max_parts", [32, 0], ids=["parts", "columns"])


@pytest.fixture(autouse=True)
def _route(request, monkeypatch):
    if "max_parts" in request.fixturenames:
        monkeypatch.setattr(kernels, "MAX_PARTS", request.getfixturevalue("max_parts"))


def packed(batch, heads, queries, keys, head_dim, dtype, seed=0):
    """Return q and k as views of one packed qkv."""
    qkv = torch.randn(batch, max(queries, keys), 3, heads, head_dim, generator=seeded(seed)).to(dtype)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q[:, :, :queries], k[:, :, :keys]


def run(q, k, grad, **options):
    leaves = [q.detach().requires_grad_(), k.detach().requires_grad_()]
    scores = ops.received_scores(*leaves, **options)
    return [scores, *torch.autograd.grad(scores, leaves, grad.to(scores.dtype))]


@ROUTES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(shape, dtype, max_parts):
    q, k = packed(*shape, dtype)
    grad = tokens(shape[0], shape[3], seed=2)
    exact = run(q.double(), k.double(), grad, backend="reference")
    attention = torch.softmax(shape[4] ** -0.5 * q.double() @ k.double().transpose(2, 3), dim=-1)
    torch.testing.assert_close(exact[0], attention.sum((1, 2)), atol=1e-12, rtol=1e-12)
    results = [run(q, k, grad, backend=backend) for backend in ("triton", "reference")]
    for triple in zip(*results, exact, strict=True):
        assert_within_budget(*triple, steps=2)


@ROUTES
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_are_read_in_place(dtype, max_parts):
    q, k = packed(2, 2, 21, 21, 24, dtype)
    grad = tokens(2, 21)
    ours = run(q, k, grad, backend="triton")
    by_sequence = [t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for t in (q, k)]
    by_head = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k)]
    sparse_channels = [torch.stack([t, t], -1).flatten(-2)[..., ::2] for t in (q, k)]
    odd_rows = [F.pad(t, (1, 0))[..., 1:] for t in (q, k)]  # of 25, and none begins at a multiple of 16 bytes
    for pair in ((q.contiguous(), k.contiguous()), by_sequence, by_head, sparse_channels, odd_rows):
        for first, second in zip(ours, run(*pair, grad, backend="triton"), strict=True):
            assert torch.equal(first, second)
    shared = k[:1].expand(2, -1, -1, -1)
    assert torch.equal(
        ops.received_scores(q, shared, backend="triton"), ops.received_scores(q, shared.clone(), backend="triton")
    )


@ROUTES
def test_explicit_scale_and_large_logits(max_parts):
    q, k = packed(1, 2, 70, 70, 16, torch.float32)
    grad = tokens(1, 70)
    for scale in (0.3, 40.0):
        ours, plain = (run(q, k, grad, scale=scale, backend=backend) for backend in ("triton", "reference"))
        exact = run(q.double(), k.double(), grad, scale=scale, backend="reference")
        for triple in zip(ours, plain, exact, strict=True):
            if scale < 1:
                assert_within_budget(*triple, steps=2)
            else:  # logits reach 700, where a rounding is 6e-5
                torch.testing.assert_close(triple[0].double(), triple[2], atol=5e-3, rtol=0.0)


@ROUTES
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_keys_of_weight_zero_in_a_whole_step(dtype, max_parts):
    # All logits of the first steps overflow to -inf: they must count for nothing, and not for NaN.
    q, k = torch.ones(1, 1, 3, 64, dtype=dtype), torch.zeros(1, 1, 280, 64, dtype=dtype)
    k[:, :, :256] = -torch.finfo(dtype).max
    scale = 1e34 if dtype == torch.float16 else 1.0
    ours = ops.received_scores(q, k, scale=scale, backend="triton")
    assert (ours[:, :256] == 0.0).all()
    torch.testing.assert_close(ours[:, 256:], torch.full((1, 24), 3 / 24))


@ROUTES
def test_nan_stays_in_its_image(max_parts):
    q, k = packed(2, 2, 9, 9, 8, torch.float32)
    spoilt = k.clone()
    spoilt[0, 1, 3, 5] = float("nan")
    ours = ops.received_scores(q, spoilt, backend="triton")
    assert ours[0].isnan().all()
    assert torch.equal(ours[1:], ops.received_scores(q, k, backend="triton")[1:])


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_nan_beyond_the_last_row_is_not_read(dtype):
    wide_q, wide_k = packed(1, 2, 70, 70, 16, dtype)
    wide_q, wide_k = wide_q.clone(), wide_k.clone()
    wide_q[:, :, 65:] = wide_k[:, :, 66:] = float("nan")
    for result in run(wide_q[:, :, :65], wide_k[:, :, :66], tokens(1, 66), backend="triton"):
        assert torch.isfinite(result).all()


def test_backward_takes_an_expanded_gradient_and_keeps_the_packed_layout():
    q, k = packed(2, 3, 20, 20, 8, torch.float32)
    upstream = tokens(1, 20).expand(2, 20)
    ours, expected = (run(q, k, upstream, backend=backend) for backend in ("triton", "reference"))
    for first, second in zip(ours, expected, strict=True):
        torch.testing.assert_close(first, second, atol=1e-7, rtol=1e-4)
    for grad in ours[1:]:
        assert grad.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("factor", [64.0, 1 / 64])
def test_small_gradients_survive_half_precision(factor):
    """The gradient of a logit is too small for float16, that of q or k is not."""
    q, k = packed(1, 2, 67, 67, 32, torch.float16)
    q, k, grad = q / factor, k * factor, 1e-5 * tokens(1, 67)
    ours, plain = (run(q, k, grad, backend=backend) for backend in ("triton", "reference"))
    exact = run(q.double(), k.double(), grad, backend="reference")
    for triple in zip(ours[1:], plain[1:], exact[1:], strict=True):
        assert_within_budget(*triple)


def test_more_parts_than_one_step_adds_up():
    q, k = packed(1, 7, 200, 70, 16, torch.float16)
    ours = ops.received_scores(q, k, backend="triton")
    torch.testing.assert_close(ours, ops.received_scores(q, k, backend="reference"), atol=1e-5, rtol=1e-5)


@ROUTES
def test_two_launches_and_none_backward(max_parts, monkeypatch):
    from triton.runtime.interpreter import GridExecutor

    launched, call = [], GridExecutor.__call__
    monkeypatch.setattr(
        GridExecutor, "__call__", lambda self, *a, **k: (launched.append(self.fn.__name__), call(self, *a, **k))[1]
    )
    run(*packed(1, 2, 9, 9, 8, torch.float32), tokens(1, 9), backend="triton")
    second = "sum_parts_kernel" if max_parts else "column_sum_kernel"
    assert launched == ["row_softmax_kernel", second]


@ROUTES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_batch_invariance_and_determinism_bitwise(dtype, max_parts):
    q, k = packed(3, 1, 70, 70, 24, dtype)
    grad = tokens(3, 70, seed=3)
    whole, again = (run(q, k, grad, backend="triton") for _ in range(2))
    alone = run(q[2:], k[2:], grad[2:], backend="triton")
    for first, second, one in zip(whole, again, alone, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first[2:], one)
