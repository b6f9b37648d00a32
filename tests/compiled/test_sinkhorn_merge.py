"""sinkhorn_merge compiles for sm_80 and sm_90 at every shape class within the gates."""

import pytest
import torch

from fastreduce.kernels import _workspace
from fastreduce.kernels import sinkhorn_merge as kernels
from fastreduce.kernels.sinkhorn_merge_backward import sinkhorn_merge_backward
from tests.compiled.gates import ARCHES, check_gates

# (tokens, clusters, channels, dtype): keep rates .5, .25 and .9 of DeiT-T/S/B, and more tokens
CASES = [
    (196, 98, 384, torch.float16),
    (196, 98, 384, torch.float32),
    (576, 144, 768, torch.bfloat16),
    (4096, 3686, 1024, torch.bfloat16),
    (196, 12, 192, torch.float16),
]


def reports_for(arch, tokens, clusters, channels, dtype, *, width=None, prefix=1, head_dtype=None, wide=True):
    sequence = torch.zeros(2, prefix + tokens, width or channels, dtype=dtype)[..., :channels]
    x, head = sequence[:, prefix:], sequence[:, :prefix].to(head_dtype or dtype)
    centers = torch.zeros(clusters, channels, dtype=dtype)
    merged, similarity, _, *saved = kernels.sinkhorn_merge(x[:0], centers, 1.0, 3, head[:0])
    forward = check_gates(arch, lambda: kernels.sinkhorn_merge(x, centers, 1.0, 3, head), wide=wide)
    merged, similarity, *saved = (tensor.new_zeros(2, *tensor.shape[1:]) for tensor in (merged, similarity, *saved))
    grad = merged[:, prefix:]
    backward = check_gates(
        arch,
        lambda: sinkhorn_merge_backward(grad, x, centers, similarity, *saved, 1.0),
        wide=wide,
    )
    assert [len(forward), len(backward)] == [4, 4]
    return forward[1:], backward


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("case", CASES)
def test_gates(case, arch):
    (scores, biases, sums), (log_plan, biases_back, scores_back, last) = reports_for(arch, *case)
    half = case[3] != torch.float32
    for report in (scores, sums, log_plan, last):  # float32 products are exact
        assert (report.mma_ops > 0) == half, report
    for report in (scores, biases, sums, log_plan, biases_back, scores_back):
        assert report.registers <= 192, report
        assert 16 in report.load_bytes, report
    for report in (scores, log_plan, scores_back):
        assert 16 in report.store_bytes, report


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gates_of_other_widths_and_strides(dtype):
    reports_for(90, 70, 20, 33, dtype, width=75, wide=False)


@pytest.mark.parametrize("arch", ARCHES)
def test_gates_of_a_head_of_another_dtype(arch):
    reports_for(arch, 196, 98, 384, torch.float16, head_dtype=torch.float32)


@pytest.mark.parametrize("arch", ARCHES)
def test_gates_of_similarities_that_are_not_kept(arch, monkeypatch):
    """Image by image: what Triton specialises by the number of the first one changes no kernel's gates."""
    sequence, centers = torch.zeros(3, 197, 384, dtype=torch.float16), torch.zeros(98, 384, dtype=torch.float16)
    monkeypatch.setattr(_workspace, "WORKSPACE", 1)
    reports = check_gates(
        arch, lambda: kernels.sinkhorn_merge_inference(sequence[:, 1:], centers, 1.0, 2, sequence[:, :1]), wide=False
    )
    assert len(reports) == 10
    for name in {report.name for report in reports[1:]}:
        first, *others = [report for report in reports if report.name == name]
        assert {(one.occupancy, *one.load_bytes) for one in others} <= {(first.occupancy, *first.load_bytes)}
