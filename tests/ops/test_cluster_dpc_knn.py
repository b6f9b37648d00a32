"""cluster_dpc_knn in an ordinary process: the plain transcription, operators, compilation, errors."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastreduce import ops
from tests.helpers.density_peaks import on_a_line, plain_clusters, separated
from tests.helpers.inputs import seeded, tokens

OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
NATIVE = torch.ops.fastreduce
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def assert_plain(x, k, neighbors, noise=None):
    centers, label = ops.cluster_dpc_knn(x, k, neighbors=neighbors, noise=noise)
    for image in range(x.shape[0]):
        noise_of_image = None if noise is None else noise[image].tolist()
        expected = plain_clusters(x[image].tolist(), k, neighbors, noise_of_image)
        assert (centers[image].tolist(), label[image].tolist()) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "num_tokens", "channels", "k", "neighbors"),
    # Both routes of torch.cdist, padded neighbours and not.
    [(2, 17, 24, 5, 5), (1, 1, 1, 1, 5), (1, 40, 16, 40, 9), (1, 70, 8, 12, 3), (1, 30, 33, 1, 30), (0, 9, 8, 3, 5)],
)
def test_random_tokens(batch, num_tokens, channels, k, neighbors, dtype):
    assert_plain(separated(batch, num_tokens, channels, neighbors, dtype=dtype), k, neighbors)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_exact_distances_with_ties(data):
    num_tokens = data.draw(st.integers(1, 40))
    k, neighbors = data.draw(st.integers(1, num_tokens)), data.draw(st.integers(1, 45))
    dtype, seed = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 10**6))
    noise = torch.rand(2, num_tokens, generator=seeded(seed)) if data.draw(st.booleans()) else None
    assert_plain(on_a_line(2, num_tokens, dtype=dtype, seed=seed), k, neighbors, noise)


def test_the_operator_groups_the_labels():
    x = tokens(2, 30, 8)
    centers, label, order, offsets = NATIVE.cluster_dpc_knn(x, 9, 5, None)
    for ours, expected in zip((centers, label), ops.cluster_dpc_knn(x, 9), strict=True):
        assert torch.equal(ours, expected)
    for ours, expected in zip((order, offsets), ops.group_slots(label, 9), strict=True):
        assert torch.equal(ours, expected)
    centers_again, label_again, groups = ops.cluster_dpc_knn_groups(x, 9)
    assert torch.equal(centers, centers_again)
    assert torch.equal(label, label_again)
    assert groups is None  # the reference merges without


def test_the_transcription_can_fail():
    x = separated(1, 17, 24, 5)
    for k, neighbors in ((6, 5), (5, 2)):
        assert plain_clusters(x[0].tolist(), k, neighbors) != plain_clusters(x[0].tolist(), 5, 5)


@pytest.mark.parametrize("num_tokens", [20, 40])
def test_an_image_that_holds_nan_spoils_no_other(num_tokens):
    x = on_a_line(3, num_tokens)
    clean = ops.cluster_dpc_knn(x, 8)
    x[1, 5] = float("nan")
    centers, label = ops.cluster_dpc_knn(x, 8)
    assert centers[1].tolist() == list(range(8))
    assert label[1].gather(0, centers[1]).tolist() == list(range(8))
    for ours, expected in zip((centers, label), clean, strict=True):
        assert torch.equal(ours[::2], expected[::2])


def test_no_gradient():
    x = tokens(2, 9, 8).requires_grad_()
    noise = torch.rand(2, 9, requires_grad=True)
    for result in ops.cluster_dpc_knn(x, 4, noise=noise):
        assert not result.requires_grad


def test_the_same_bits_in_any_batch():
    x = tokens(4, 40, 24)
    whole = ops.cluster_dpc_knn(x, 12)
    for result, again, alone in zip(whole, ops.cluster_dpc_knn(x, 12), ops.cluster_dpc_knn(x[2:3], 12), strict=True):
        assert torch.equal(result, again)
        assert torch.equal(result[2:3], alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    x = tokens(2, 9, 8, dtype=dtype)
    by_sequence = x.transpose(0, 1).contiguous().transpose(0, 1)
    for chosen, noise in ((x, None), (x[:, 1:], torch.rand(2, 8)), (by_sequence, None), (x[:0], None)):
        torch.library.opcheck(NATIVE.cluster_dpc_knn.default, (chosen, 4, 3, noise), test_utils=OPCHECKS)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "cluster",
    [lambda x, k: NATIVE.cluster_dpc_knn(x, k, 3, None), lambda x, k: ops.cluster_dpc_knn(x, k, neighbors=3)],
)
def test_compile_fullgraph(cluster, dynamic):
    def stage(x):
        return cluster(x[:, 1:], x.shape[1] // 3)

    torch._dynamo.reset()
    compiled = torch.compile(stage, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((2, 12, 8), (3, 31, 8)) if dynamic else ((2, 12, 8),):
        x = tokens(*shape)
        for ours, expected in zip(compiled(x), stage(x), strict=True):
            assert torch.equal(ours, expected)


X = tokens(2, 9, 8)
BAD_CALLS = [
    (ValueError, r"x must have shape \(B, N, C\), got \(9, 8\)", lambda: ops.cluster_dpc_knn(X[0], 3)),
    (TypeError, "x must be a tensor .* got list", lambda: ops.cluster_dpc_knn([1.0], 3)),
    (TypeError, "x must be floating point, got torch.int64", lambda: ops.cluster_dpc_knn(X.long(), 3)),
    (ValueError, r"at least 1 channel, got shape \(2, 9, 0\)", lambda: ops.cluster_dpc_knn(X[..., :0], 3)),
    (ValueError, "k must be between 1 and 9, got 0", lambda: ops.cluster_dpc_knn(X, 0)),
    (ValueError, "k must be between 1 and 9, got 10", lambda: ops.cluster_dpc_knn(X, 10)),
    (TypeError, "k must be an integer, got 3.0", lambda: ops.cluster_dpc_knn(X, 3.0)),
    (ValueError, "neighbors must be .* got 0", lambda: ops.cluster_dpc_knn(X, 3, neighbors=0)),
    (TypeError, "neighbors must be an integer, got True", lambda: ops.cluster_dpc_knn(X, 3, neighbors=True)),
    (ValueError, r"noise must have shape \(2, 9\), got \(2, 8\)", lambda: ops.cluster_dpc_knn(X, 3, noise=X[:, 0])),
    (TypeError, "noise must be floating .* torch.int64", lambda: ops.cluster_dpc_knn(X, 3, noise=X[..., 0].long())),
    (ValueError, "x is on cpu and noise on meta", lambda: ops.cluster_dpc_knn(X, 3, noise=X[..., 0].to("meta"))),
    *(
        (kind, message, functools.partial(ops.cluster_dpc_knn, X, 3, backend=backend))
        for backend, kind, message in (
            ("gpu", ValueError, "unknown backend 'gpu'"),
            ("triton", RuntimeError, "'triton' was asked for, but .*TRITON_INTERPRET=1"),
        )
    ),
]


@pytest.mark.parametrize(("kind", "message", "call"), BAD_CALLS)
def test_bad_input_is_quoted(kind, message, call):
    with pytest.raises(kind, match=message):
        call()
