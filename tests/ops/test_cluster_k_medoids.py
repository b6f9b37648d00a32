"""cluster_k_medoids in an ordinary process: the official step bit for bit, operators, compilation, errors."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.primitives.cluster_k_medoids import plain_k_medoids
from fastreduce import ops, reference
from fastreduce.reference import _images
from tests.helpers.inputs import DTYPES, distinct_indices, seeded, tokens

OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
CASES = [(2, 17, 8, 5), (1, 1, 3, 1), (3, 26, 4, 26), (2, 60, 48, 30), (1, 196, 48, 96), (0, 9, 4, 3)]


def distinct_weights(batch, num_tokens, seed=1):
    """Return weights of which no two are alike: the official start orders equal ones as chance has it.

    They are exact in float16.
    """
    return distinct_indices(batch, num_tokens, num_tokens, seed=seed).view(batch, num_tokens) / 8 + 0.25


def make_tokens(kind, batch, num_tokens, channels, seed=0):
    """Return the patch tokens of a longer sequence, as a model hands them over."""
    x = tokens(batch, num_tokens + 1, channels, seed=seed)
    if kind == "tied":
        x = (x * 1.5).round()
    if kind == "duplicate":
        x = x[:, torch.randint(0, num_tokens // 3 + 1, (num_tokens + 1,), generator=seeded(seed))]
    return x[:, 1:]


@pytest.mark.parametrize("iters", [0, 1, 3])
@pytest.mark.parametrize("kind", ["random", "tied", "duplicate"])
@pytest.mark.parametrize(("batch", "num_tokens", "channels", "k"), CASES)
def test_the_official_step_bit_for_bit(batch, num_tokens, channels, k, kind, iters):
    for seed in range(3):
        x = make_tokens(kind, batch, num_tokens, channels, seed)
        for weights in (distinct_weights(batch, num_tokens, seed), None):
            first = seed % num_tokens
            ours = ops.cluster_k_medoids(x, weights, k, iters=iters, first=first)
            expected = plain_k_medoids(x, weights, k, iters=iters, first=first)
            for index, plain in zip(ours, expected, strict=True):
                assert index.dtype == torch.int64
                assert torch.equal(index, plain)


def test_empty_clusters_are_among_those_cases():
    x = make_tokens("duplicate", 2, 60, 48)
    _, label = ops.cluster_k_medoids(x, distinct_weights(2, 60), 30, iters=0)
    assert any(row.unique().numel() < 30 for row in label)


@pytest.mark.parametrize("cost", ["all", "members"])
def test_a_batch_that_is_cut_into_parts(cost, monkeypatch):
    """A few images at a time, with a smaller last part, give the same bits."""
    x, weights = make_tokens("random", 5, 40, 24), torch.rand(5, 40, generator=seeded())
    for of_tokens in (weights, None):
        whole = ops.cluster_k_medoids(x, of_tokens, 9, cost=cost)
        with monkeypatch.context() as patch:
            patch.setattr(_images, "WORKSPACE", 2 * 16 * 40 * 40)
            assert len(_images.image_parts(5, 16 * 40 * 40)) == 3
            for index, other in zip(ops.cluster_k_medoids(x, of_tokens, 9, cost=cost), whole, strict=True):
                assert torch.equal(index, other)


@pytest.mark.parametrize("dtype", [*DTYPES[1:], torch.float64])
def test_other_dtypes(dtype):
    x, weights = make_tokens("random", 2, 40, 16).to(dtype), distinct_weights(2, 40).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for of_tokens in (weights, None):
        ours = ops.cluster_k_medoids(x, of_tokens, 9)
        expected = plain_k_medoids(x.to(wide), None if of_tokens is None else of_tokens.to(wide), 9)
        for index, plain in zip(ours, expected, strict=True):
            assert torch.equal(index, plain)


def slow_members(points, weights, k, iters):
    """Cluster as the method means to, token by token; points lie on a line, so that every distance is exact."""
    count = len(points)
    centers = sorted(range(count), key=lambda n: -weights[n])[:k]

    def labels():
        return [min(range(k), key=lambda j: abs(points[n] - points[centers[j]])) for n in range(count)]

    for _ in range(iters):
        label = labels()
        for j in range(k):
            inside = [n for n in range(count) if label[n] == j]
            cost = {n: sum(weights[i] * abs(points[n] - points[i]) for i in inside) for n in inside}
            centers[j] = min(inside, key=cost.get) if inside else 0
    return centers, labels()


@settings(max_examples=80, deadline=None)
@given(data=st.data(), num_tokens=st.integers(1, 12), iters=st.integers(0, 4))
def test_cost_of_the_members_against_plain_loops(data, num_tokens, iters):
    k = data.draw(st.integers(1, num_tokens))
    points = data.draw(st.lists(st.integers(-6, 6), min_size=num_tokens, max_size=num_tokens))
    weights = data.draw(st.lists(st.integers(0, 5), min_size=num_tokens, max_size=num_tokens))
    x = torch.tensor(points, dtype=torch.float32).view(1, num_tokens, 1)
    of_tokens = torch.tensor(weights, dtype=torch.float32).unsqueeze(0)
    ours = ops.cluster_k_medoids(x, of_tokens, k, iters=iters, cost="members")
    assert tuple(t[0].tolist() for t in ours) == slow_members(points, weights, k, iters)


def test_ties_go_to_the_lower_index():
    x = torch.tensor([0.0, 4.0, 2.0, 2.0, 0.0, 4.0]).view(1, 6, 1)
    centers, label = ops.cluster_k_medoids(x, torch.tensor([[1.0, 3.0, 1.0, 1.0, 3.0, 1.0]]), 2, iters=0)
    assert centers.tolist() == [[1, 4]]
    assert label.tolist() == [[1, 0, 0, 0, 1, 0]]
    centers, label = ops.cluster_k_medoids(x, torch.ones(1, 6), 3, iters=0)
    assert centers.tolist() == [[0, 1, 2]]
    centers, label = ops.cluster_k_medoids(x, torch.ones(1, 6), 3, iters=2)
    assert centers.tolist() == [[0, 1, 2]]


def test_the_start_without_weights_follows_the_largest_distance():
    x = torch.tensor([0.0, 1.0, 5.0, 9.0]).view(1, 4, 1)
    centers, _ = ops.cluster_k_medoids(x, None, 3, iters=0, first=0)
    assert centers.tolist() == [[0, 3, 1]]  # token 1 is 8 from token 3; token 2 is farther from both, but only by 5


@pytest.mark.parametrize("cost", ["all", "members"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("num_tokens", [9, 40])
def test_what_is_not_a_number_stays_within_bounds(num_tokens, bad, cost):
    x = tokens(2, num_tokens, 4)
    x[:, [1, 5], 2] = bad
    weights = torch.rand(2, num_tokens, generator=seeded())
    weights[0, 3] = float("nan")
    for of_tokens in (weights, None):
        centers, label = ops.cluster_k_medoids(x, of_tokens, 4, cost=cost)
        assert ((centers >= 0) & (centers < num_tokens)).all()
        assert ((label >= 0) & (label < 4)).all()
    centers, _ = ops.cluster_k_medoids(x, weights, num_tokens, iters=0)
    assert centers[0, -1] == 3


@pytest.mark.parametrize("cost", ["all", "members"])
def test_batch_invariance_and_determinism(cost):
    x, weights = tokens(5, 50, 24), torch.rand(5, 50, generator=seeded())
    for of_tokens in (weights, None):
        whole = ops.cluster_k_medoids(x, of_tokens, 12, cost=cost)
        again = ops.cluster_k_medoids(x, of_tokens, 12, cost=cost)
        alone = ops.cluster_k_medoids(x[2:3], None if of_tokens is None else of_tokens[2:3], 12, cost=cost)
        for first, second, one in zip(whole, again, alone, strict=True):
            assert torch.equal(first, second)
            assert torch.equal(first[2:3], one)


def test_no_gradient_and_inputs_untouched():
    x, weights = tokens(2, 30, 6).requires_grad_(), torch.rand(2, 30, generator=seeded()).requires_grad_()
    before = x.detach().clone(), weights.detach().clone()
    for cost in ("all", "members"):
        for out in ops.cluster_k_medoids(x, weights, 5, cost=cost):
            assert not out.requires_grad
    assert torch.equal(x, before[0])
    assert torch.equal(weights, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype):
    x, weights = tokens(2, 10, 6, dtype=dtype)[:, 1:], distinct_weights(2, 9)
    by_sequence = tokens(9, 2, 6, dtype=dtype).transpose(0, 1)
    for tensor in (x, by_sequence):
        for of_tokens in (weights, weights.mT.contiguous().mT):
            arguments = tensor, of_tokens, 4, 2
            torch.library.opcheck(torch.ops.fastreduce.cluster_k_medoids.default, arguments, test_utils=OPCHECKS)


def by_operator(x, weights, k, members=False):
    return torch.ops.fastreduce.cluster_k_medoids(x, weights, k, 3)


def by_reference(x, weights, k, members):
    return ops.cluster_k_medoids(x, weights, k, cost="members" if members else "all", backend="reference")


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("call", "members"), [(by_operator, False), (by_reference, False), (by_reference, True)])
def test_compile_fullgraph(call, members, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, num_tokens in ((2, 30), (5, 30), (3, 34)) if dynamic else ((2, 30),):
        x, weights = tokens(batch, num_tokens + 1, 6)[:, 1:], distinct_weights(batch, num_tokens)
        for ours, expected in zip(compiled(x, weights, 7, members), call(x, weights, 7, members), strict=True):
            assert torch.equal(ours, expected)


def test_dynamic_batch_compiles_once():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(by_reference, fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 3, 7):
        compiled(tokens(batch, 30, 6), distinct_weights(batch, 30), 7, False)
    assert counter.frame_count == 1


def test_reference_and_operator_are_one():
    x, weights = tokens(2, 30, 6), distinct_weights(2, 30)
    plain = reference.cluster_k_medoids(x, weights, 7, 3, False, 0)
    for ours, expected in zip(by_operator(x, weights, 7), plain, strict=True):
        assert torch.equal(ours, expected)


def test_refuses():
    x, weights = torch.zeros(2, 5, 3), torch.zeros(2, 5)
    good = {"x": x, "weights": weights, "k": 2}
    for kind, message, changed in (
        (TypeError, r"x must be a tensor of shape \(B, N, C\), got list", {"x": [1.0]}),
        (ValueError, r"x must have shape \(B, N, C\), got \(5, 3\)", {"x": x[0]}),
        (TypeError, "x must be floating point, got torch.int64", {"x": x.long()}),
        (ValueError, r"weights must have shape \(B, N\), got \(5,\)", {"weights": weights[0]}),
        (TypeError, "weights must be floating point, got torch.int64", {"weights": weights.long()}),
        (ValueError, "x is on cpu and weights on meta", {"weights": weights.to("meta")}),
        (ValueError, r"weights must have shape \(2, 5\), got \(2, 4\)", {"weights": weights[:, 1:]}),
        (ValueError, "unknown cost 'mean'; expected one of 'all', 'members'", {"cost": "mean"}),
        (ValueError, "k must be between 1 and 5, got 0", {"k": 0}),
        (ValueError, "k must be between 1 and 5, got 6", {"k": 6}),
        (TypeError, "k must be an integer, got 2.0", {"k": 2.0}),
        (ValueError, "iters must be between 0 and 2147483647, got -1", {"iters": -1}),
        (TypeError, "iters must be an integer, got True", {"iters": True}),
        (ValueError, "first must be between 0 and 4, got 5", {"first": 5}),
        (ValueError, "x must have at least one token, got shape", {"x": x[:, :0], "weights": None}),
        (ValueError, "unknown backend 'best'", {"backend": "best"}),
        (RuntimeError, "'triton' was asked for", {"backend": "triton"}),
    ):
        with pytest.raises(kind, match=message):
            ops.cluster_k_medoids(**{**good, **changed})
    assert functools.reduce(lambda a, b: a and b.shape[0] == 2, ops.cluster_k_medoids(**good), True)
