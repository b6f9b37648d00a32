"""select_topk compiles for sm_80 and sm_90 at every shape class within the gates."""

import pytest
import torch

from fastreduce.kernels import select_topk as kernels
from tests.compiled.gates import ARCHES, check_gates
from tests.helpers.inputs import DTYPES


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("tokens", [16, 196, 576, 1024, 1025, 4096, 4097])
def test_gates(tokens, arch):
    (report,) = check_gates(arch, lambda: kernels.select_topk(torch.zeros(2, tokens), tokens // 2), wide=False)
    assert report.registers <= 80, report  # a sort of 4,096 has 1,024 threads: 64 registers is all there is


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("tokens", [196, 5000])
def test_gates_half_precision(tokens, dtype):
    check_gates(90, lambda: kernels.select_topk(torch.zeros(2, tokens, dtype=dtype), tokens), wide=False)
