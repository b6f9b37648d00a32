"""cluster_dpc_knn compiles for sm_80 and sm_90 at every shape class within the gates."""

import pytest
import torch

from fastreduce.kernels import cluster_dpc_knn as kernels
from tests.compiled.gates import ARCHES, check_gates
from tests.helpers.inputs import DTYPES

# Tested with their own primitives.
OTHERS = (
    "squared_lengths_kernel",
    "sort_scores_kernel",
    "rank_scores_kernel",
    "group_slots_kernel",
)


def reports_for(arch, x, k, *, neighbors=5, noise=None):
    reports = check_gates(arch, lambda: kernels.cluster_dpc_knn(x, k, neighbors, noise), wide=False)
    computing = [report for report in reports if report.name not in OTHERS]
    several = x.shape[1] > kernels.most_tokens(x.dtype)
    assert len(reports) == (6 if several else 3)
    assert [report.name for report in computing] == [
        "density_kernel",
        *(["score_kernel", "label_kernel"] if several else ["cluster_kernel"]),
    ]
    for report in computing:
        # Tensor cores for half precision; none for float32, where they would round the inputs to 11 bits.
        assert (report.mma_ops > 0) == (x.dtype != torch.float32), report
        yield report


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("num_tokens", "k", "channels", "dtype"),
    [
        (196, 98, 192, torch.float16),
        (196, 176, 384, torch.bfloat16),
        (49, 24, 192, torch.float32),
        (256, 192, 1024, torch.float16),
        (257, 192, 1024, torch.float16),
        (576, 288, 768, torch.float32),
        (4097, 2048, 384, torch.float32),
    ],
)
def test_gates(num_tokens, k, channels, dtype, arch):
    x = torch.zeros(2, 1 + num_tokens, channels, dtype=dtype)[:, 1:]
    for report in reports_for(arch, x, k):
        assert 16 in report.load_bytes, report
        # Two programs a multiprocessor, but for the densities under Triton 3.6 on sm_80: they take 174.
        assert report.registers <= (192 if report.name == "density_kernel" and arch == 80 else 128), report


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "channels"), [(33, 33), (192, 48)])
def test_gates_of_other_widths_and_strides(width, channels, dtype, arch):
    x = torch.zeros(2, 50, width, dtype=dtype)[..., :channels]
    list(reports_for(arch, x, 7, noise=torch.zeros(2, 50)))


@pytest.mark.parametrize(("num_tokens", "k", "neighbors"), [(1, 1, 1), (49, 1, 2), (49, 24, 49)])
def test_gates_of_the_numbers_of_neighbors_and_centres(num_tokens, k, neighbors, monkeypatch):
    for limit in (64, 0):
        monkeypatch.setattr(kernels, "most_tokens", lambda dtype, limit=limit: limit)
        for dtype in DTYPES[:2]:
            list(reports_for(80, torch.zeros(2, num_tokens, 48, dtype=dtype), k, neighbors=neighbors))
