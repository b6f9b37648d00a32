"""cluster_dpc_knn: the kernels against the reference in the interpreter, under the sanitizer. Decisions are exact."""

import pytest
import torch

from fastreduce import ops
from fastreduce.kernels import cluster_dpc_knn as kernels
from tests.density_peaks import on_a_line, separated
from tests.inputs import DTYPES, seeded, tokens

# (batch, tokens, channels, centres, neighbors): both routes of torch.cdist, one tile and several, one chunk and several
SHAPES = [(2, 17, 24, 5, 5), (1, 1, 1, 1, 5), (0, 9, 8, 3, 5), (1, 70, 80, 66, 4), (1, 26, 33, 1, 3), (2, 9, 16, 9, 8)]


def check(x, k, neighbors=5, noise=None):
    ours, plain = (
        ops.cluster_dpc_knn(x, k, neighbors=neighbors, noise=noise, backend=backend)
        for backend in ("triton", "reference")
    )
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == torch.int64
        assert a.is_contiguous()
        assert torch.equal(a, b)
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "num_tokens", "channels", "k", "neighbors"), SHAPES)
def test_shapes(batch, num_tokens, channels, k, neighbors, dtype):
    centers, label = check(separated(batch, num_tokens, channels, neighbors, dtype=dtype), k, neighbors)
    assert torch.equal(label.gather(1, centers), torch.arange(k).expand(batch, k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "k"), [(12, 1), (13, 13), (40, 9), (130, 75)])
def test_ties_go_to_the_lower_index(num_tokens, k, dtype):
    check(on_a_line(1, num_tokens, dtype=dtype), k, neighbors=4)


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
def test_noise_decides(dtype):
    x = on_a_line(2, 20, dtype=dtype)
    for noise in (torch.rand(2, 20, generator=seeded(7)), torch.rand(20, 2, generator=seeded(7)).t().to(dtype)):
        assert not torch.equal(check(x, 6, noise=noise)[0], check(x, 6)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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
def test_an_image_that_holds_nan(num_tokens, place):
    x = on_a_line(2, num_tokens)
    x[1, place, 3] = float("nan")
    centers, _ = check(x, 12, 4)
    assert centers[1].tolist() == list(range(12))
    assert torch.equal(centers[:1], check(x[:1], 12, 4)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_determinism_and_batch_invariance(dtype):
    x = tokens(3, 67, 20, dtype=dtype)
    whole = ops.cluster_dpc_knn(x, 30, backend="triton")
    again, alone = (ops.cluster_dpc_knn(part, 30, backend="triton") for part in (x, x[2:3]))
    for result, same, one in zip(whole, again, alone, strict=True):
        assert torch.equal(result, same)
        assert torch.equal(result[2:3], one)


def test_four_launches(monkeypatch):
    launched = []
    for name in ("density_kernel", "score_kernel", "select_topk", "label_kernel"):
        kernel = getattr(kernels, name)

        class Counted:
            def __init__(self, kernel=kernel, name=name):
                self.kernel, self.name = kernel, name

            def __getitem__(self, grid):
                launched.append(self.name)
                return self.kernel[grid]

            def __call__(self, *args):
                launched.append(self.name)
                return self.kernel(*args)

        monkeypatch.setattr(kernels, name, Counted())
    check(separated(1, 17, 24, 5), 5)
    assert launched == ["density_kernel", "score_kernel", "select_topk", "label_kernel"]
