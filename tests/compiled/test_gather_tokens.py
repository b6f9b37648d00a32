"""gather_tokens compiles for sm_80 and sm_90 at every shape class within the gates."""

import pytest
import torch

from fastreduce.kernels import gather_tokens as kernels
from tests.compiled.gates import ARCHES, check_gates, with_dtypes


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("channels", "dtype"), with_dtypes([192, 384, 768, 1024]))
def test_gates(arch, dtype, channels):
    x = torch.zeros(2, 197, channels, dtype=dtype)
    index = torch.zeros(2, 98, dtype=torch.int64)
    residual = torch.zeros(2, 99, channels, dtype=dtype)

    check_gates(arch, lambda: kernels.gather_tokens(x, index, 1, residual))
    check_gates(arch, lambda: kernels.gather_tokens(x, index, 1, None))
