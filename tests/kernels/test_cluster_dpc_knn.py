"""cluster_dpc_knn: the kernels against the reference in the interpreter, under the sanitizer. Decisions are exact."""

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

import fastreduce
from bench.proof import tiny
from fastreduce import ops
from fastreduce.kernels import cluster_dpc_knn as kernels
from tests.helpers.density_peaks import on_a_line, separated
from tests.helpers.inputs import DTYPES, seeded, tokens

# (batch, tokens, channels, centres, neighbors): both routes of torch.cdist, one tile and several, one chunk and several
SHAPES = [(2, 17, 24, 5, 5), (1, 1, 1, 1, 5), (0, 9, 8, 3, 5), (1, 70, 80, 66, 4), (1, 26, 33, 1, 3), (2, 9, 16, 9, 8)]


ROUTES = {"one program an image": 256, "several programs an image": 0}


@pytest.fixture(params=ROUTES.values(), ids=ROUTES)
def route(request, monkeypatch):
    """Take both routes, whatever the number of tokens."""
    monkeypatch.setattr(kernels, "most_tokens", lambda dtype: request.param)


@pytest.fixture
def launched(monkeypatch):
    """Return the names of the kernels, as they are launched."""
    names, call = [], GridExecutor.__call__

    def spy(self, *args, **kwargs):
        names.append(self.fn.__name__.removesuffix("_kernel"))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", spy)
    return names


def check(x, k, neighbors=5, noise=None):
    options = {"neighbors": neighbors, "noise": noise}
    centers, label, groups = ops.cluster_dpc_knn_groups(x, k, **options, backend="triton")
    plain = ops.cluster_dpc_knn(x, k, **options, backend="reference")
    for ours, expected in zip((centers, label), plain, strict=True):
        assert ours.dtype == torch.int64
        assert ours.is_contiguous()
        assert torch.equal(ours, expected)
    for ours, expected in zip(groups, ops.group_slots(label, k, backend="reference"), strict=True):
        assert ours.dtype == torch.int32
        assert torch.equal(ours, expected)
    return centers, label


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "num_tokens", "channels", "k", "neighbors"), SHAPES)
@pytest.mark.usefixtures("route")
def test_shapes(batch, num_tokens, channels, k, neighbors, dtype):
    centers, label = check(separated(batch, num_tokens, channels, neighbors, dtype=dtype), k, neighbors)
    assert torch.equal(label.gather(1, centers), torch.arange(k).expand(batch, k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "k"), [(12, 1), (13, 13), (40, 9), (130, 75)])
@pytest.mark.usefixtures("route")
def test_ties_go_to_the_lower_index(num_tokens, k, dtype):
    check(on_a_line(1, num_tokens, dtype=dtype), k, neighbors=4)


@pytest.mark.usefixtures("route")
def test_all_tokens_equal():
    centers, label = check(torch.ones(1, 12, 4), 5)
    assert centers.tolist() == [list(range(5))]
    assert label.tolist() == [[0, 1, 2, 3, 4] + [0] * 7]


@pytest.mark.parametrize("neighbors", [1, 7, 8, 9, 16, 21, 40])
def test_more_neighbors_than_stay_in_registers(neighbors):
    check(on_a_line(1, 22, seed=1), 7, neighbors)
    if neighbors > 2:  # one neighbour is the token itself, and of two the nearest pairs are tied: rounding decides
        check(separated(1, 34, 12, neighbors), 9, neighbors)


def test_several_sweeps_over_several_tiles():
    check(on_a_line(1, 70, seed=2), 20, 19)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("route")
def test_noise_decides(dtype):
    x = on_a_line(2, 20, dtype=dtype)
    for noise in (torch.rand(2, 20, generator=seeded(7)), torch.rand(20, 2, generator=seeded(7)).t().to(dtype)):
        assert not torch.equal(check(x, 6, noise=noise)[0], check(x, 6)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("route")
def test_any_strides(dtype):
    dense = separated(2, 18, 24, 5, dtype=dtype)
    behind_a_class_token = torch.cat([tokens(2, 1, 24, dtype=dtype), dense], 1)[:, 1:]
    by_sequence = dense.transpose(0, 1).contiguous().transpose(0, 1)
    packed = torch.stack([dense, dense + 1, dense], 2)[:, :, 2]
    channels_first = dense.mT.contiguous().mT
    expanded = dense[:1].expand(2, -1, -1)
    for x in (behind_a_class_token, by_sequence, packed, channels_first, expanded):
        check(x, 7)


@pytest.mark.parametrize("num_tokens", [20, 70])
@pytest.mark.parametrize("place", [0, 11])
@pytest.mark.usefixtures("route")
def test_an_image_that_holds_nan(num_tokens, place):
    x = on_a_line(2, num_tokens)
    x[1, place, 3] = float("nan")
    centers, _ = check(x, 12, 4)
    assert centers[1].tolist() == list(range(12))
    assert torch.equal(centers[:1], check(x[:1], 12, 4)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("route")
def test_determinism_and_batch_invariance(dtype):
    x = tokens(3, 67, 20, dtype=dtype)
    whole, again, alone = (kernels.cluster_dpc_knn(part, 30, 5, None) for part in (x, x, x[2:3]))
    for result, same, one in zip(whole, again, alone, strict=True):
        assert torch.equal(result, same)
        assert torch.equal(result[2:3], one)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 256), (torch.float32, 64)])
def test_launches(dtype, most, launched):
    """Up to the limit one program does all that follows the densities."""
    for num_tokens in (17, most, most + 1):
        check(on_a_line(1, num_tokens, dtype=dtype, seed=3), 40 if num_tokens > 40 else 5)
    several = ["squared_lengths", "density", "score", "sort_scores", "label", "group_slots"]
    assert launched == [*["squared_lengths", "density", "cluster"] * 2, *several]


@pytest.mark.parametrize("equal_weight", [False, True])
def test_launches_of_a_stage(equal_weight, launched):
    """The groups come with the labels, and the learned weights with the merge."""
    model = tiny.build()
    fastreduce.patch(model, "dpcknn", at=2, keep=[8], equal_weight=equal_weight, backend="triton")
    with torch.no_grad():
        model(tiny.images(model))
    assert launched == ["squared_lengths", "density", "cluster", "reduce_slots"]


@pytest.mark.parametrize("more", [0, 1])
def test_around_the_limit(more, launched):
    x = tokens(1, kernels.most_tokens(torch.float32) + more, 8)
    for k in (1, x.shape[1]):
        x[:, :: x.shape[1] // 7] = x[:, :1].clone()  # tokens that coincide
        centers, label, (order, offsets) = ops.cluster_dpc_knn_groups(x, k, backend="triton")
        assert torch.equal(label.gather(1, centers), torch.arange(k).expand(1, k))
        for ours, expected in zip((order, offsets), ops.group_slots(label, k, backend="reference"), strict=True):
            assert torch.equal(ours, expected)
    assert ("cluster" in launched) == (more == 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_routes_are_the_same_bits(dtype, monkeypatch):
    x = tokens(2, 90, 20, dtype=dtype)
    results = []
    for limit in ROUTES.values():
        monkeypatch.setattr(kernels, "most_tokens", lambda dtype, limit=limit: limit)
        results.append(kernels.cluster_dpc_knn(x, 33, 5, None))
    for one, several in zip(*results, strict=True):
        assert torch.equal(one, several)
