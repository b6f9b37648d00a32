"""soft_merge: kernels against reference in the interpreter, under the sanitizer."""

import pytest
import torch

from fastreduce import ops
from tests.helpers.budget import EPS, assert_within_budget
from tests.helpers.inputs import DTYPES, seeded, tokens

# (batch, tokens, clusters, channels, head); 140 tokens, 130 clusters and 144 channels are two tiles
SHAPES = [
    (2, 17, 5, 24, 1),
    (1, 140, 130, 144, 2),
    (1, 75, 66, 70, 3),
    (3, 9, 1, 8, 0),
    (1, 1, 3, 33, 1),
    (2, 40, 12, 20, None),
    (1, 6, 0, 8, 1),
    (0, 9, 3, 8, 1),
]


def inputs(batch, num_tokens, clusters, channels, head, dtype, layout="dense"):
    logits = 3 * torch.randn(batch, num_tokens, clusters, generator=seeded(1))
    x = tokens(batch, num_tokens, channels, dtype=dtype, layout=layout)
    first = None if head is None else tokens(batch, head, channels, dtype=dtype, seed=2, layout=layout)
    grad = tokens(batch, (head or 0) + clusters, channels, dtype=dtype, seed=3, layout=layout)
    return logits.to(dtype), x, first, grad


def forward_and_backward(logits, x, head, grad, backend):
    leaves = [tensor.detach().requires_grad_() for tensor in (logits, x, head) if tensor is not None]
    rows, logsumexp = ops.soft_merge(leaves[0], leaves[1], head=leaves[2] if leaves[2:] else None, backend=backend)
    assert not logsumexp.requires_grad
    return [rows, logsumexp, *torch.autograd.grad(rows, leaves, grad.to(rows.dtype))]


def check(logits, x, head, grad):
    """Hold kernels against the reference and float64; return what the kernels made."""
    exact = [None if tensor is None else tensor.double() for tensor in (logits, x, head, grad)]
    made = [
        forward_and_backward(logits, x, head, grad, "triton"),
        forward_and_backward(logits, x, head, grad, "reference"),
        forward_and_backward(*exact, "reference"),
    ]
    rows, logsumexp, grad_logits, grad_x, *grad_head = zip(*made, strict=True)
    assert_within_budget(*rows, steps=2)  # sums in another order; the weights are rounded before the product
    assert_within_budget(*logsumexp, steps=2)
    # The weights are made anew, from the rounded logsumexp.
    remade = logsumexp[0].abs().max().item() * EPS[torch.float32] if logsumexp[0].numel() else 0.0
    assert_within_budget(*grad_x, steps=2 + remade / EPS[x.dtype])
    for triple in grad_head:
        assert_within_budget(*triple)
    # A weight times x . grad less its mean. The kernel takes the mean from the rounded rows, so that the roundings do
    # not cancel where the values do.
    ours, reference, goal = grad_logits
    assert ours.dtype == reference.dtype
    assert ours.isfinite().all()
    if ours.numel():
        magnitude = (exact[1].abs() @ exact[3][:, -logits.shape[2] :].abs().mT).max()
        ours_error, reference_error = ((tensor.double() - goal).abs().max() for tensor in (ours, reference))
        allowed = (EPS[rows[0].dtype] + remade) * magnitude
        assert ours_error <= reference_error + allowed, (ours_error, reference_error, allowed)
    return made[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["dense", "sliced", "expanded"])
@pytest.mark.parametrize(("batch", "num_tokens", "clusters", "channels", "head"), SHAPES)
def test_forward_and_backward(batch, num_tokens, clusters, channels, head, layout, dtype):
    check(*inputs(batch, num_tokens, clusters, channels, head, dtype, layout))


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_is_copied_bit_for_bit(dtype):
    logits, x, head, _ = inputs(2, 17, 5, 140, 3, dtype)
    assert torch.equal(ops.soft_merge(logits, x, head=head, backend="triton")[0][:, :3], head)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arrange", ["transposed", "sliced", "every other", "expanded", "batch last"])
def test_logits_of_any_stride(arrange, dtype):
    logits, x, head, grad = inputs(2, 37, 8, 24, 1, dtype)
    logits = {
        "transposed": lambda: logits.mT.contiguous().mT,
        "sliced": lambda: torch.cat([logits, logits], 2)[..., 3:11],
        "every other": lambda: torch.stack([logits, logits], -1)[..., 0],
        "expanded": lambda: logits[:1].expand(2, -1, -1),
        "batch last": lambda: logits.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    }[arrange]()
    check(logits, x, head, grad)


@pytest.mark.parametrize("clusters", [1, 2, 4, 6, 8, 12])
def test_every_alignment_of_the_logits(clusters):
    check(*inputs(3, 11, clusters, 16, 1, torch.float16))


def test_tokens_behind_a_prefix_are_read_in_place():
    logits, sequence, _, grad = inputs(2, 18, 5, 24, 1, torch.float32)
    check(logits[:, 1:], sequence[:, 1:], sequence[:, :1], grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lowest", [float("-inf"), None])
def test_masked_tokens_have_no_weight(lowest, dtype):
    logits, x, head, grad = inputs(2, 75, 5, 24, 1, dtype)
    hidden = torch.ones(75, dtype=torch.bool)
    hidden[[3, 40, 41, 70]] = False  # the first and the last step hold one token that is seen
    logits[:, hidden] = torch.finfo(dtype).min if lowest is None else lowest
    logits[:, :, 4] = torch.where(torch.arange(75) == 74, 1.0, logits[:, :, 4])  # nothing before the last step
    logits[:, :74, 4] = torch.finfo(dtype).min if lowest is None else lowest
    rows, _, grad_logits, grad_x, _ = check(logits, x, head, grad)
    assert torch.equal(rows[:, -1], x[:, 74])
    assert (grad_logits[:, hidden, :4] == 0).all()
    assert (grad_x[:, hidden][:, :-1] == 0).all()


def test_equal_logits_give_the_mean_whatever_their_size():
    x = tokens(2, 40, 8)
    for value in (0.0, 1e30, -1e30, torch.finfo(torch.float32).min):
        rows, logsumexp = ops.soft_merge(torch.full((2, 40, 3), value), x, backend="triton")
        torch.testing.assert_close(rows, x.mean(1, keepdim=True).expand(2, 3, 8))
        torch.testing.assert_close(logsumexp, torch.full((2, 3), value + torch.tensor(40.0).log().item()))


def test_small_weights_hand_on_their_gradient():
    """float16 ends at 6e-8: a loss that is scaled up, as float16 training does, must reach tokens of less weight."""
    logits = torch.tensor([[[0.0], [-17.0], [-19.0]]], dtype=torch.float16)  # weights 1, 4e-8, 6e-9
    x = tokens(1, 3, 16, dtype=torch.float16)
    grad = 4096 * (1 + torch.rand(1, 1, 16, generator=seeded(3))).half()
    ours = forward_and_backward(logits, x, None, grad, "triton")[3]
    expected = logits.double().softmax(1) * grad.double()
    assert (ours.double() - expected).abs().max(2)[0].le(0.01 * expected.amax(2)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_cluster(dtype):
    logits, x, head, grad = inputs(1, 40, 5, 24, 1, dtype)
    clean, _, *clean_grads = forward_and_backward(logits, x, head, grad, "triton")
    logits[0, 35, 2], logits[0, 2, 4] = float("nan"), float("inf")
    for backend in ("triton", "reference"):
        rows, logsumexp, grad_logits, *_ = forward_and_backward(logits, x, head, grad, backend)
        assert rows[0, [3, 5]].isnan().all()
        assert logsumexp[0, 2].isnan()
        assert grad_logits[0, :, [2, 4]].isnan().all()
        fine = [0, 1, 3]
        if backend == "triton":
            assert torch.equal(rows[0, [0, 1, 2, 4]], clean[0, [0, 1, 2, 4]])
            assert torch.equal(grad_logits[0][:, fine], clean_grads[0][0][:, fine])


@pytest.mark.parametrize(
    ("of_logits", "of_x", "of_head", "of_rows"),
    [
        (torch.float16, torch.float32, torch.float32, torch.float32),  # autocast: a float32 stream, half logits
        (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_mixed_dtypes_promote(of_logits, of_x, of_head, of_rows):
    logits, x, head, grad = inputs(2, 40, 5, 24, 1, torch.float32)
    made = check(logits.to(of_logits), x.to(of_x), head.to(of_head), grad.to(of_rows))
    assert [tensor.dtype for tensor in made] == [of_rows, torch.float32, of_logits, of_x, of_head]


def test_batch_invariance_and_determinism_bitwise():
    arguments = inputs(4, 40, 12, 48, 1, torch.float16)
    whole = forward_and_backward(*arguments, "triton")
    alone = forward_and_backward(*(tensor[2:3] for tensor in arguments), "triton")
    again = forward_and_backward(*arguments, "triton")
    for first, one, second in zip(whole, alone, again, strict=True):
        assert torch.equal(first[2:3], one)
        assert torch.equal(first, second)
