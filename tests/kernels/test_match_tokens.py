"""match_tokens: both kernels against reference in the interpreter, under the sanitizer."""

import pytest
import torch

from fastreduce import ops, reference
from fastreduce.kernels import match_tokens as kernels
from tests.helpers.budget import EPS
from tests.helpers.inputs import DTYPES, tokens
from tests.helpers.matching import assert_slots_by_value, exact_metric

NAN, INF = float("nan"), float("inf")
# Even and odd counts, one chunk of channels and several, more than one tile of either set.
SHAPES = [(2, 17, 8), (1, 2, 4), (2, 3, 5), (3, 12, 80), (0, 9, 8), (1, 70, 33), (1, 141, 24), (1, 6, 1)]


def check(metric, r, prefix=1):
    ours, groups = ops.match_tokens_groups(metric, r, prefix=prefix, backend="triton")
    assert ours.dtype == torch.int64
    assert ours.is_contiguous()
    assert torch.equal(ours, ops.match_tokens(metric, r, prefix=prefix, backend="reference"))
    for found, expected in zip(groups, reference.group_slots(ours, metric.shape[-2] - r), strict=True):
        assert found.dtype == torch.int32
        assert torch.equal(found, expected)
    return ours


@pytest.mark.parametrize("num_tokens", [70, 71])
def test_groups_by_the_same_program_and_by_another(num_tokens, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_GROUPED", 70)
    check(exact_metric(2, num_tokens, 8), 20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "num_tokens", "dim"), SHAPES)
def test_exact_cosines_with_ties(batch, num_tokens, dim, dtype):
    metric = exact_metric(batch, num_tokens, dim, dtype=dtype)
    most = (num_tokens - 1) // 2
    for r in {0, most // 2, most}:
        check(metric, r)


def packed_keys(batch, heads, num_tokens, dim, dtype):
    """Return a view of a packed qkv, as attention has its keys."""
    packed = tokens(batch, num_tokens, 3 * heads * dim, dtype=dtype).unflatten(2, (3, heads, dim))
    return packed.permute(2, 0, 3, 1, 4)[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "num_tokens", "dim", "before"),
    [(3, 30, 40, ()), (1, 9, 8, ()), (3, 12, 33, DTYPES), (2, 12, 136, DTYPES[1:])],
)
def test_keys_are_averaged_as_the_reference_does_it(heads, num_tokens, dim, before, dtype, monkeypatch):
    """Means are equal to the bit, so that equal cosines are tied alike, made while loading or in a pass before."""
    mean_keys, passes = kernels.mean_keys, []
    keys = packed_keys(2, heads, num_tokens, dim, dtype)
    assert torch.equal(mean_keys(keys), keys.mean(1))
    r = num_tokens // 4
    assert torch.equal(ops.match_tokens(keys, r, backend="triton"), ops.match_tokens(keys.mean(1), r, backend="triton"))
    monkeypatch.setattr(kernels, "mean_keys", lambda keys: passes.append(keys) or mean_keys(keys))
    metric = exact_metric(2, num_tokens, dim, dtype=dtype)
    keys[:] = metric.unsqueeze(1) * torch.arange(2 - heads, heads + 1, 2).view(-1, 1, 1)  # of mean 1
    assert torch.equal(check(keys, r, 3), check(metric, r, 3))
    assert len(passes) == (dtype in before)
    if heads > 1:
        monkeypatch.setattr(kernels, "MAX_SWEEPS", 0)
        check(keys, r)
        assert len(passes) == (dtype in before) + 1


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_means_of_even_tokens_serve_every_step(dtype):
    """Means of two tiles of even tokens against several of odd ones are as from a metric; of an image as in a batch."""
    metric = exact_metric(2, 520, 24, dtype=dtype)
    keys = metric.unsqueeze(1) * torch.tensor([-1.0, 3.0], dtype=dtype).view(-1, 1, 1)
    similarity, place = kernels.best_matches(keys, 3)
    for found, expected in zip((similarity, place), kernels.best_matches(metric.unsqueeze(1), 3), strict=True):
        assert torch.equal(found[:, 2:], expected[:, 2:])
    random = packed_keys(2, 2, 300, 24, dtype)
    for found, expected in zip(kernels.best_matches(random[1:], 1), kernels.best_matches(random, 1), strict=True):
        assert torch.equal(found[:, 1:], expected[1:, 1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_tiles_of_even_tokens_average_their_keys(dtype):
    assert kernels.averages_while_loading(512, 64, dtype, 12)
    assert not kernels.averages_while_loading(513, 64, dtype, 12)
    assert not kernels.averages_while_loading(512, 64, dtype, 1)
    assert kernels.averages_while_loading(128, 64, dtype, 17) == (dtype != torch.float32)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("num_tokens", [12, 13])
def test_prefix(prefix, num_tokens):
    metric = exact_metric(2, num_tokens, 6, seed=prefix)
    metric[:, :prefix] = metric[:, prefix : prefix + 1]  # the closest partners, if they were not protected
    for r in range((num_tokens - prefix) // 2 + 1):
        slot = check(metric, r, prefix)
        assert torch.equal(slot[:, :prefix], torch.arange(prefix).expand(2, -1))
        assert (slot[:, prefix:] >= prefix).all()
        assert slot.amax() == num_tokens - r - 1


def test_prefix_of_all_tokens():
    assert torch.equal(check(exact_metric(1, 5, 4), 0, 5), torch.arange(5).unsqueeze(0))
    assert torch.equal(check(exact_metric(1, 4, 4), 0, 3), torch.arange(4).unsqueeze(0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "dim"), [(30, 64), (129, 20)])
def test_random_metrics_by_value(num_tokens, dim, dtype):
    metric = tokens(1, num_tokens, dim, dtype=dtype)
    slot = ops.match_tokens(metric, num_tokens // 3, backend="triton")
    # Products of half precision are exact and summed in float32, so rounding is float32's in every dtype.
    assert_slots_by_value(slot, metric, num_tokens // 3, 1, tolerance=8 * EPS[torch.float32])


def test_all_tokens_equal():
    """Everything is tied: the first of the even tokens move, all to the first odd one."""
    slot = check(torch.ones(1, 9, 4), 3)
    assert slot.tolist() == [[0, 2, 2, 3, 2, 4, 2, 5, 1]]


def test_ties_across_tiles_go_to_the_lower_index():
    metric = torch.zeros(1, 300, 4)
    metric[:, ::2, 0] = 1.0
    metric[:, [141, 143, 299], 0] = 1.0  # equal partners in two tiles and two positions
    metric[:, 1, 1] = 1.0
    slot = check(metric, 140)
    assert (slot[0, 2:282:2] == slot[0, 141]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_rows_and_opposite_rows(dtype):
    metric = exact_metric(2, 14, 4, dtype=dtype, seed=3)
    metric[:, 1::2] = -metric[:, :1]
    metric[:, [2, 7]] = 0.0
    for r in (1, 3, 6):
        check(metric, r)
    check(torch.zeros(1, 8, 4, dtype=dtype), 2)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_similarity_that_is_not_a_number_counts_least(bad, dtype):
    for places in ([2], [3], [2, 3], list(range(1, 16, 2)), list(range(0, 16, 2)), list(range(16))):
        metric = exact_metric(1, 16, 4, dtype=dtype, seed=5)
        metric[:, places, 1] = bad
        check(metric, 3)
        check(metric, 5, 4)


def test_not_a_number_loses_to_opposite_directions():
    metric = torch.tensor([1.0, NAN, 3.0, -1.0, 1.0, NAN, 0.5, -4.0]).view(1, 8, 1)
    slot = check(metric, 3, 0)
    assert slot[0, 0] == slot[0, 2] == slot[0, 4] == slot[0, 3]


def test_negative_zero_ties_with_zero():
    metric = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0], [1.0, 0.0], [0.0, 1.0]]).unsqueeze(0)
    for r in range(3):
        check(metric, r, 0)
        check(-metric, r, 0)
    partner = [-1e-37, 1e18]  # a cosine of -1e-55, which is -0.0 in float32, against 0.0
    assert check(torch.tensor([[[1e18, 0.0], partner, [0.0, 0.0], partner]]), 1, 0).tolist() == [[1, 1, 0, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_strides(dtype):
    qkv = exact_metric(2, 11, 24, dtype=dtype)
    by_sequence = exact_metric(11, 2, 8, dtype=dtype)
    not_dense = exact_metric(2, 8, 11, dtype=dtype)
    flipped_later = exact_metric(1, 22, 8, dtype=dtype)[:, ::2].expand(3, -1, -1)
    for metric in (qkv[..., 8:16], qkv[:, 1:, 3:20], by_sequence.transpose(0, 1), not_dense.mT, flipped_later):
        check(metric, 4)


def test_small_norms_are_not_lost():
    metric = exact_metric(1, 20, 8) * 2.0**-20
    check(metric, 7)


@pytest.mark.parametrize(("num_tokens", "r"), [(40, 0), (40, 9), (41, 20), (33, 1)])
def test_keys_that_do_not_fit_in_registers(num_tokens, r, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_KEYS", 8)
    check(exact_metric(1, num_tokens, 4, seed=r), r)


def test_a_longer_sequence():
    """More warps and more scans than the small shapes need."""
    metric = exact_metric(1, 700, 4, dtype=torch.float16)
    check(metric, 200)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariance_and_determinism(dtype):
    metric = tokens(4, 75, 40, dtype=dtype)
    whole = ops.match_tokens(metric, 30, backend="triton")
    assert torch.equal(whole, ops.match_tokens(metric, 30, backend="triton"))
    assert torch.equal(whole[2:3], ops.match_tokens(metric[2:3], 30, backend="triton"))
