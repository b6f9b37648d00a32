"""attention: kernels against reference in the interpreter, under the sanitizer."""

import pytest
import torch

from bench.proof.traffic import traffic
from fastreduce import ops, reference
from fastreduce.kernels import attention as kernels
from tests.helpers.budget import EPS, assert_within_budget
from tests.helpers.inputs import DTYPES, seeded, tokens

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")  # NumPy's: a hidden key

# (batch, heads, queries, keys, head_dim); a tile holds 32 or 64 rows, 80 channels are padded to 128
SQUARE = [(2, 2, 70, 70, 64), (1, 1, 1, 1, 1), (1, 3, 17, 17, 80), (2, 1, 33, 33, 32), (0, 2, 9, 9, 16)]
OTHER = [(1, 2, 3, 67, 16), (1, 1, 40, 5, 33), (1, 2, 0, 7, 8), (1, 1, 9, 9, 160)]


def packed(batch, heads, num_tokens, head_dim, dtype=torch.float32, seed=0, strength=1.0):
    """Return q, k and v as views of one packed qkv."""
    qkv = torch.randn(batch, num_tokens, 3, heads, head_dim, generator=seeded(seed))
    qkv[:, :, :2] *= strength
    return qkv.to(dtype).permute(2, 0, 3, 1, 4).unbind(0)


def policies(batch, num_tokens, dtype=torch.float32, seed=0):
    """Draw hidden and seen keys, and some that are half seen; nobody else is seen in the last image."""
    generator = seeded(seed + 50)
    policy = (torch.rand(batch, num_tokens, generator=generator) < 0.5).float()
    policy[:, ::3] = torch.rand(batch, num_tokens, generator=generator)[:, ::3]
    if batch > 1:
        policy[-1] = 0.0
    return policy.to(dtype)


def attend(q, k, v, policy=None, **options):
    """Attend, plain or under a policy."""
    if policy is None:
        return ops.attention(q, k, v, **options)
    return ops.attention_policy(q, k, v, policy, **options)


def run(backend, q, k, v, policy, grad, cast=None, **options):
    leaves = [t.detach().to(cast or t.dtype).requires_grad_() for t in (q, k, v, policy) if t is not None]
    out = attend(*leaves, backend=backend, **options)
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def check(q, k, v, policy, steps=4.0, **options):
    """Allow steps of q's dtype for the policy too: the weights are rounded to it before a dot."""
    grad = tokens(*q.shape, seed=9).to(q.dtype)
    ours = run("triton", q, k, v, policy, grad, **options)
    plain = run("reference", q, k, v, policy, grad, **options)
    exact = run("reference", q, k, v, policy, grad, torch.float64, **options)
    for triple in zip(ours, plain, exact, strict=True):
        assert_within_budget(*triple, steps=steps * EPS[q.dtype] / EPS[triple[0].dtype])
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "heads", "queries", "keys", "head_dim"), SQUARE)
def test_policy(batch, heads, queries, keys, head_dim, dtype):
    check(*packed(batch, heads, keys, head_dim, dtype), policies(batch, keys))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "heads", "queries", "keys", "head_dim"), SQUARE[:2] + OTHER)
def test_plain(batch, heads, queries, keys, head_dim, dtype):
    q = packed(batch, heads, queries, head_dim, dtype, seed=1)[0]
    _, k, v = packed(batch, heads, keys, head_dim, dtype)
    check(q, k, v, None)


def dominated(gap, dtype):
    """Return inputs of which every ninth key is hidden, its logit larger than the others by about the gap."""
    q, k, v = (t.clone() for t in packed(1, 2, 70, 16, dtype))
    policy = policies(1, 70)
    policy[:, 5::9] = 0.0
    q[..., 0], k[..., 0] = 4.0, 0.0
    k[:, :, 5::9, 0] = gap
    return q, k, v, policy


@pytest.mark.parametrize("places", [(3, 66), (3, 40), (66, 68)])
def test_the_first_of_the_largest_logits_gets_the_gradient_of_the_maximum(places):
    """Keys 64 to 69 are a step of their own, which comes before the others."""
    q, k, v = (t.clone() for t in packed(1, 2, 70, 64, torch.float16, strength=0.1))
    q[..., 0], k[..., 0] = 4.0, 0.0
    k[:, :, list(places)] = k[:, :, places[:1]]
    k[:, :, list(places), 0] = 8.0
    check(q, k, v, policies(1, 70, torch.float16), eps=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gap", [8.0, 13.0])
def test_hidden_keys_that_dominate_the_row(gap, dtype):
    # The weights of the keys that are seen are down at eps, where the maximum's own gradient counts.
    check(*dominated(gap, dtype), steps=48 if dtype == torch.float32 else 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_keys_beside_which_nothing_is_seen(dtype):
    # Every key has the weight eps / N then, but for the hidden ones' own.
    q, k, v, policy = dominated(30.0, dtype)
    grad = tokens(*q.shape, seed=9).to(q.dtype)
    ours = run("triton", q, k, v, policy, grad)
    exact = run("reference", q, k, v, policy, grad, torch.float64)
    torch.testing.assert_close(exact[0][:, :, 4], v.double().mean(2), atol=1e-4, rtol=0)
    for index in (0, 3):
        torch.testing.assert_close(ours[index], exact[index].to(dtype), atol=1e-5, rtol=4 * EPS[dtype])
    for index in (1, 2):  # about 1e-4, which a rounding of the result outweighs
        torch.testing.assert_close(ours[index].double(), exact[index], atol=max(2e-5, 10 * EPS[dtype]), rtol=0)


def test_the_gradient_of_the_maximum_goes_to_the_first_key_that_reaches_it():
    q, k, v, policy = dominated(8.0, torch.float32)
    k[:, :, 5::9] = k[:, :, 5:6]
    grad = tokens(*q.shape, seed=9)
    ours = run("triton", q, k, v, policy, grad, eps=0.1)
    for a, b in zip(ours, run("reference", q, k, v, policy, grad, eps=0.1), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strong_logits_and_options(dtype):
    q, k, v = packed(1, 2, 40, 16, dtype, strength=3.0)
    policy = policies(1, 40)
    steps = 40 if dtype == torch.float32 else 4  # a rounding of a logit near 40 is forty of its exponential
    ours = check(q, k, v, policy.to(dtype), steps, scale=0.5, eps=0.01)
    assert ours[4].dtype == dtype
    check(q, k, v, policy, steps, scale=0.5, eps=0.0)
    check(q, k, v, None, steps, scale=0.5)


def test_a_policy_of_ones_is_nearly_plain_attention():
    q, k, v = packed(2, 2, 40, 16)
    plain = ops.attention(q, k, v, backend="triton")
    torch.testing.assert_close(
        ops.attention_policy(q, k, v, torch.ones(2, 40), backend="triton"), plain, atol=1e-5, rtol=0
    )


def test_keys_below_every_number():
    # Negative by rounding counts as hidden; a key of weight zero in a whole tile counts for nothing.
    q, k, v = packed(1, 1, 70, 16)
    policy = policies(1, 70)
    policy[0, 3] = 0.0
    slightly = policy.clone()
    slightly[0, 3] = -1e-9
    torch.testing.assert_close(
        attend(q, k, v, slightly, backend="triton"),
        attend(q, k, v, policy, backend="triton"),
        atol=0,
        rtol=0,
    )
    low = torch.zeros(1, 1, 70, 16)
    low[:, :, :64] = -3e38
    ours = ops.attention(torch.ones(1, 1, 2, 16), low, v, backend="triton")
    torch.testing.assert_close(ours, v[:, :, 64:].mean(2, keepdim=True).expand(-1, -1, 2, -1))


@pytest.mark.parametrize("policy", [None, policies(2, 21)])
def test_strided_inputs_are_read_in_place(policy):
    q, k, v = packed(2, 2, 21, 16)
    ours = attend(q, k, v, policy, backend="triton")
    dense = [t.contiguous() for t in (q, k, v)]
    sequence_first = [t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for t in (q, k, v)]
    sparse_channels = [torch.stack([t, t], -1).flatten(-2)[..., ::2] for t in (q, k, v)]
    for views in (dense, sequence_first, sparse_channels):
        other = None if policy is None else policy.t().contiguous().t()
        assert torch.equal(ours, attend(*views, other, backend="triton"))
    shared = [t[:1].expand(2, -1, -1, -1) for t in (q, k, v)]
    expected = attend(*(t.clone() for t in shared), policy, backend="triton")
    assert torch.equal(attend(*shared, policy, backend="triton"), expected)


@pytest.mark.parametrize("policy", [None, policies(2, 21)])
def test_expanded_gradient_and_memory_order(policy):
    q, k, v = packed(2, 2, 21, 16)
    grad = torch.ones(2, 1, 1, 1).expand(2, 2, 21, 16)
    ours = run("triton", q, k, v, policy, grad)
    for a, b in zip(ours, run("reference", q, k, v, policy, grad), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    for tensor in ours[:4]:
        assert tensor.transpose(1, 2).is_contiguous()


def test_nan_stays_in_its_image():
    q, k, v = packed(2, 2, 40, 16)
    policy = policies(3, 40)[:2]
    spoilt = k.clone()
    spoilt[0, 1, 3, 5] = float("nan")
    for mask in (policy, None):
        grad = torch.ones(2, 2, 40, 16)
        whole = run("triton", q, spoilt, v, mask, grad)
        fine = run("triton", q, k, v, mask, grad)
        assert whole[0][0, 1].isnan().all()
        assert torch.equal(whole[0][0, 0], fine[0][0, 0])
        for a, b in zip(whole, fine, strict=True):
            assert torch.equal(a[1:], b[1:])
    unknown = policy.clone()
    unknown[0, 7] = float("nan")
    out = attend(q, k, v, unknown, backend="triton")
    expected = attend(q, k, v, unknown, backend="reference")
    assert torch.equal(out.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("policy", [None, policies(2, 40)])
def test_sums_for_the_backward_pass(policy, dtype):
    q, k, v = packed(2, 2, 40, 16, dtype)
    wide = [t.double() for t in (q, k, v)]
    if policy is None:
        _, *sums = kernels.attention(q, k, v, 0.25)
        _, *exact = reference.attention_with_sums(*wide, 0.25)
    else:
        _, *sums = kernels.attention_policy(q, k, v, policy, 0.25, 1e-6)
        _, *exact = reference.attention_policy_with_sums(*wide, policy.double(), 0.25, 1e-6)
    for ours, best in zip(sums, exact, strict=True):
        torch.testing.assert_close(ours.double(), best, atol=2e-6, rtol=2e-6)


def test_batch_invariance_bitwise():
    q, k, v = packed(3, 2, 70, 16, torch.float16)
    policy = policies(3, 70)
    grad = tokens(3, 2, 70, 16, seed=3, dtype=torch.float16)
    whole = run("triton", q, k, v, policy, grad)
    alone = run("triton", q[1:2], k[1:2], v[1:2], policy[1:2], grad[1:2])
    for a, b in zip(whole, alone, strict=True):
        assert torch.equal(a[1:2], b)
    for a, b in zip(whole, run("triton", q, k, v, policy, grad), strict=True):
        assert torch.equal(a, b)


def test_head_dims_beyond_the_kernels():
    q, k, v = packed(1, 1, 3, 257)
    with pytest.raises(ValueError, match="the kernels take up to 256 channels a head, got 257"):
        ops.attention(q, k, v, backend="triton")


def bias_of(batch, num_tokens, dtype=torch.float32):
    """Return a bias: every fifth key is seen by nobody, and the last image has no other."""
    bias = tokens(batch, num_tokens, seed=4)
    bias[:, 2::5] = -torch.inf
    if batch > 1:
        bias[-1] = -torch.inf
    return bias.to(dtype)


def index_of(batch, patches, count):
    """Return an index as ATS pads it: the last ones name the first patch again."""
    index = torch.randint(patches, (batch, count), generator=seeded(6))
    index[:, count // 2 :] = 0
    return index


def one_row(q, k, v, bias=None, **options):
    """Return an image of many tokens, one without queries, one without keys, a small one, and rows past the end."""
    most = k.shape[2]
    bounds = [0, most - 20, most - 20, most - 18, most - 15], [0, most - 22, most - 20, most - 20, most - 19]
    offsets = tuple(torch.tensor(bound, dtype=torch.int32) for bound in bounds)
    return ops.attention_packed(q, k, v, offsets, (most - 20, most - 20), bias=bias, **options)


def chosen_in_one_row(q, k, v, bias=None, **options):
    """Make packed images of which each keeps a few queries: none of the second, only the class token's of the last."""
    most = k.shape[2]
    bounds = [0, 12, 12, 17, 18], [0, most - 10, most - 8, most - 3, most - 2]
    offsets = tuple(torch.tensor(bound, dtype=torch.int32) for bound in bounds)
    index = torch.zeros(4, 12, dtype=torch.int64)
    index[0, :11] = torch.randperm(most - 11, generator=seeded(6))[:11].sort().values
    index[2, :4] = torch.arange(4)
    options = {"longest": (12, most - 10), "num_out": 23, **options}
    return ops.attention_packed(q, k, v, offsets, bias=bias, index=index, **options)


# What is called with q, k, v, a bias and options.
OPTIONS = {
    "bias": lambda q, k, v, b, **options: ops.attention(q, k, v, bias=b, **options),
    "index": lambda q, k, v, b, **options: ops.attention(q, k, v, index=index_of(2, k.shape[2] - 1, 20), **options),
    "index, bias": lambda q, k, v, b, **options: ops.attention(
        q, k, v, bias=b, index=index_of(2, k.shape[2], 9).int(), prefix=0, **options
    ),
    "class": lambda q, k, v, b, **options: ops.attention_cls_scores(q, k, v, **options),
    "class, bias": lambda q, k, v, b, **options: ops.attention_cls_scores(q, k, v, bias=b, prefix=2, **options),
    "received": lambda q, k, v, b, **options: ops.attention_received_scores(q, k, v, **options),
    "received, bias": lambda q, k, v, b, **options: ops.attention_received_scores(q, k, v, bias=b, **options),
    "one row": lambda q, k, v, b, **options: one_row(q[:1], k[:1], v[:1], **options),
    "one row, bias": lambda q, k, v, b, **options: one_row(q[:1], k[:1], v[:1], b[:1], **options),
    "one row, index": lambda q, k, v, b, **options: chosen_in_one_row(q[:1], k[:1], v[:1], **options),
    "one row, index, bias": lambda q, k, v, b, **options: chosen_in_one_row(q[:1], k[:1], v[:1], b[:1], **options),
}


@pytest.fixture
def unwritten_is_nan():
    """Fill memory that is only reserved with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def run_option(name, backend, inputs, cast=None):
    """Return results, of which -inf counts as nothing, and the gradients of all but the hidden keys' bias."""
    leaves = [t.detach().to(cast or t.dtype).requires_grad_() for t in inputs]
    outs = OPTIONS[name](*leaves, backend=backend)
    outs = [torch.where(out == -torch.inf, 0.0, out) for out in (outs if isinstance(outs, tuple) else (outs,))]
    upstream = [tokens(*out.shape, seed=9).to(inputs[0].dtype).to(out.dtype) for out in outs]
    return [*outs, *torch.autograd.grad(outs, leaves, upstream, materialize_grads=True)]


# 37 tokens are two tiles of float32, 70 are two of half precision, of which the second is nearly empty.
@pytest.mark.parametrize(
    ("name", "num_tokens", "head_dim", "dtype"),
    [
        *((name, 37, 16, torch.float32) for name in OPTIONS),
        *((name, 70, 9, torch.float16) for name in ("bias", "received, bias", "one row, bias", "one row, index, bias")),
        *((name, 70, 16, torch.bfloat16) for name in ("index, bias", "class, bias")),
    ],
)
@pytest.mark.usefixtures("unwritten_is_nan")
def test_options(name, num_tokens, head_dim, dtype):
    q, k, v = packed(2, 2 if dtype == torch.float32 else 1, num_tokens, head_dim, dtype)
    inputs = (q, k, v, bias_of(2, num_tokens, torch.float32 if dtype != torch.float16 else dtype).t().contiguous().t())
    ours = run_option(name, "triton", inputs)
    plain = run_option(name, "reference", inputs)
    exact = run_option(name, "reference", inputs, torch.float64)
    steps = 16 if dtype == torch.float32 else 4  # the roundings of a logit near 8
    for triple in zip(ours, plain, exact, strict=True):
        assert_within_budget(*triple, steps=steps * EPS[dtype] / EPS[triple[0].dtype])
    if name in ("bias", "one row"):  # a query that sees no key
        nothing = ours[0][-1] if name == "bias" else ours[0][:, :, num_tokens - 20 : num_tokens - 18]
        assert not nothing.any()


@pytest.mark.parametrize("name", ["class", "received"])
def test_scores_of_logits_far_below_zero(name):
    """exp(0 - logsumexp) is infinite: a key past the end must not get it."""
    ones = torch.ones(1, 1, 5, 16)
    q, k = (sign * 5.0 * ones + 0.01 * tokens(1, 1, 5, 16, seed=seed) for sign, seed in ((1, 1), (-1, 2)))
    inputs = (q, k, tokens(1, 1, 5, 16), torch.zeros(1, 5))
    ours, plain = (run_option(name, backend, inputs) for backend in ("triton", "reference"))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_options_do_not_look_at_other_images():
    q, k, v = packed(2, 1, 37, 16)
    bias = tokens(2, 37, seed=4)
    for name in ("index, bias", "class, bias", "received, bias"):
        whole = run_option(name, "triton", (q, k, v, bias))
        other = [torch.cat([t[:1], 3.0 * t[:1]]) for t in (q, k, v, bias)]
        for a, b in zip(whole, run_option(name, "triton", other), strict=True):
            assert torch.equal(a[:1], b[:1])
    # A packed image has the bits of an image alone, wherever it begins.
    out = one_row(q[:1], k[:1], v[:1], bias[:1], backend="triton")
    alone = ops.attention(q[:1, :, :17], k[:1, :, :15], v[:1, :, :15], bias=bias[:1, :15], backend="triton")
    assert torch.equal(out[:, :, :17], alone)
    last = [t[:1, :, rows] for t, rows in ((q, slice(19, 22)), (k, slice(17, 18)), (v, slice(17, 18)))]
    assert torch.equal(out[:, :, 19:22], ops.attention(*last, bias=bias[:1, 17:18], backend="triton"))
    assert not out[:, :, 22:].any()
    # As does one whose queries are chosen.
    out = chosen_in_one_row(q[:1], k[:1], v[:1], bias[:1], backend="triton")
    alone = (t[:1, :, 29:34] for t in (q, k, v))
    assert torch.equal(out[:, :, 12:17], ops.attention(*alone, bias=bias[:1, 29:34], backend="triton"))


@pytest.mark.usefixtures("unwritten_is_nan")
def test_empty_options():
    q, k, v = packed(2, 1, 5, 8)
    none = torch.zeros(2, 0, dtype=torch.int64)
    assert ops.attention(q, k, v, index=none, prefix=0, backend="triton").shape == (2, 1, 0, 8)
    for tensor in (q, k, v):
        tensor.requires_grad_()
    out = ops.attention(q, k, v, index=none, prefix=1, backend="triton")
    torch.testing.assert_close(out, ops.attention(q, k, v)[:, :, :1])
    scores = ops.attention_received_scores(q[:, :, :0], k, v, backend="triton")[1]
    assert not scores.any()
    assert ops.attention_cls_scores(q, k, v, prefix=5, backend="triton")[1].shape == (2, 0)
    assert ops.attention_cls_scores(q[:0], k[:0], v[:0], backend="triton")[1].shape == (0, 4)
    bound = torch.zeros(1, dtype=torch.int32)
    for offsets in ((bound, bound), (torch.zeros(3, dtype=torch.int32),) * 2):
        chosen = {"index": torch.zeros(len(offsets[0]) - 1, 2, dtype=torch.int64), "num_out": 3}
        for options in ({}, chosen):
            out = ops.attention_packed(q[:1], k[:1], v[:1], offsets, (0, 0), backend="triton", **options)
            grads = torch.autograd.grad(out.sum(), (q, k, v))
            assert not any(t.any() for t in (out, *grads))


LAUNCHES = {
    "bias": (["attention"], ["grad_queries", "grad_keys", "sum_heads"]),
    "index": (["attention"], ["grad_queries", "grad_keys", "group_slots", "reduce_slots"]),
    "class": (["attention", "class"], ["grad_queries", "grad_keys"]),
    "received": (["attention", "received", "sum_heads"], ["grad_queries", "grad_keys"]),
    "one row": (["attention"], ["grad_queries", "grad_keys"]),
    "one row, index": (["attention"], ["grad_queries", "grad_keys", "scatter_packed"]),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches(name):
    leaves = [t.detach().requires_grad_() for t in packed(2, 1, 23, 8)]
    bias = tokens(2, 23).requires_grad_()
    with traffic() as forward:
        outs = OPTIONS[name](*leaves, bias, backend="triton")
    with traffic() as backward:
        sum(out.sum() for out in (outs if isinstance(outs, tuple) else (outs,))).backward()
    for counted, expected in zip((forward, backward), LAUNCHES[name], strict=True):
        assert dict(counted.launches) == {f"{kernel}_kernel": 1 for kernel in expected}
    if name == "bias":
        with traffic() as backward:
            OPTIONS[name](*leaves, bias.detach(), backend="triton").sum().backward()
        assert "sum_heads_kernel" not in backward.launches
    if name == "received":  # whoever only reads the scores pays for no sweep of theirs
        with traffic() as plain:
            ops.attention(*leaves, backend="triton").sum().backward()
        with traffic() as one:
            OPTIONS[name](*leaves, bias, backend="triton")[0].sum().backward()
        assert one.loads["grad_queries_kernel"] == plain.loads["grad_queries_kernel"]
