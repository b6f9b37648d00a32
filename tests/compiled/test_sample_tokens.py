"""sample_tokens compiles for sm_80 and sm_90 at every shape class within the gates: one kernel, no spill."""

import pytest
import torch

from fastreduce.kernels import sample_tokens as kernels
from tests.compiled.gates import ARCHES, check_gates
from tests.helpers.inputs import DTYPES

CLASSES = [
    (1, 1),
    (196, 1),
    (16, 4),
    (196, 98),
    (137, 96),
    (576, 288),
    (1024, 922),
    (4096, 2048),
    (4097, 4096),
    (196, 4096),
    (9000, 100),
]


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("tokens", "budget"), CLASSES)
def test_gates(tokens, budget, arch):
    (report,) = check_gates(arch, lambda: kernels.sample_tokens(torch.zeros(2, tokens), budget, 1), wide=False)
    assert report.registers <= 64, report


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_gates_half_precision(dtype):
    check_gates(90, lambda: kernels.sample_tokens(torch.zeros(2, 196, dtype=dtype), 98, 1), wide=False)
