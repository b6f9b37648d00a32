"""soft_merge compiles for sm_80 and sm_90 at every shape class within the gates."""

import pytest
import torch

from fastreduce.kernels import soft_merge as kernels
from tests.compiled.gates import ARCHES, check_gates
from tests.helpers.inputs import DTYPES

# (tokens, clusters, channels): more tokens or channels are more steps and programs, not another kernel
SHAPES = [(196, 98, 384), (12, 3, 768)]


def reports_for(arch, logits, x, head, *, of_rows=None, wide=True):
    of_rows = of_rows or x.dtype
    rows = torch.zeros(x.shape[0], (0 if head is None else head.shape[1]) + logits.shape[2], x.shape[2], dtype=of_rows)
    logsumexp = torch.zeros(x.shape[0], logits.shape[2])
    (forward,) = check_gates(arch, lambda: kernels.soft_merge(logits, x, head), wide=wide)
    delta, backward = check_gates(
        arch, lambda: kernels.soft_merge_backward(rows, logits, x, rows, logsumexp), wide=wide
    )
    assert max(delta.load_bytes) == 16 or not wide, delta
    for report in (forward, backward):
        # Tensor cores for half precision; none for float32, where they would round the inputs to 11 bits.
        assert (report.mma_ops > 0) == (of_rows != torch.float32), report
    return forward, backward


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("shape", "dtype"), [*zip(SHAPES, DTYPES[1:], strict=True), (SHAPES[0], DTYPES[0])])
def test_gates(shape, dtype, arch):
    tokens, clusters, channels = shape
    sequence = torch.zeros(2, tokens + 1, channels, dtype=dtype)
    logits = torch.zeros(2, tokens, clusters, dtype=dtype)
    reports = reports_for(arch, logits, sequence[:, 1:], sequence[:, :1])
    assert max(report.registers for report in reports) <= 184, reports


@pytest.mark.parametrize(("dtype", "arch"), [(DTYPES[1], 80), (DTYPES[2], 90)])
def test_gates_of_logits_that_are_not_aligned(dtype, arch):
    """An odd number of clusters, or an odd stride."""
    sequence = torch.zeros(2, 197, 384, dtype=dtype)
    reports_for(arch, torch.zeros(2, 196, 97, dtype=dtype), sequence[:, 1:], sequence[:, :1])
    reports_for(arch, torch.zeros(2, 196, 197, dtype=dtype)[..., :98], sequence[:, 1:], None)
    reports_for(arch, torch.zeros(2, 98, 393, dtype=dtype)[..., :196].mT, sequence[:, 1:], None)


@pytest.mark.parametrize("clusters", [49, 98, 100, 104, 176])
def test_logits_are_loaded_as_wide_as_their_count_allows(clusters):
    x, logits = torch.zeros(2, 196, 384, dtype=torch.float16), torch.zeros(2, 196, clusters, dtype=torch.float16)
    (forward,) = check_gates(90, lambda: kernels.soft_merge(logits, x, None), mma=True)
    assert set(forward.load_bytes) == {min(2 * (clusters & -clusters), 16), 16}, forward


@pytest.mark.parametrize(("dtype", "arch"), [(DTYPES[0], 80), (DTYPES[1], 90)])
def test_gates_of_other_widths_and_strides(dtype, arch):
    odd = torch.zeros(2, 50, 403, dtype=dtype)[..., :201]
    logits = torch.zeros(2, 75, 130, dtype=dtype)
    reports_for(arch, logits[:, :50, ::2], odd, odd[:, :2], wide=False)
    reports_for(arch, logits[:, :64, :40].mT, torch.zeros(2, 40, 208, dtype=dtype), None, wide=False)


@pytest.mark.parametrize("arch", ARCHES[:1])
def test_gates_of_mixed_dtypes(arch):
    logits, x = torch.zeros(2, 196, 98, dtype=torch.float16), torch.zeros(2, 196, 384)
    reports_for(arch, logits, x, x[:, :1], of_rows=torch.float32)
    reports_for(arch, logits, x.half(), x[:, :1], of_rows=torch.float32, wide=False)  # 4 channels a thread
