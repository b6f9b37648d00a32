"""rotate_tokens compiles for sm_80 and sm_90 at every shape class within the gates."""

import pytest
import torch

from fastreduce.kernels import rotate_tokens as kernels
from tests.compiled.gates import ARCHES, check_gates, with_dtypes


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("channels", "dtype"), with_dtypes([64, 128]))
def test_gates(arch, dtype, channels, half):
    x = torch.zeros(2, 197, 3, 6, channels, dtype=dtype)[:, :, 0].transpose(1, 2)
    place = torch.zeros(2, 196, dtype=torch.int32)
    for heads in (1, 6):
        table = torch.zeros(heads, 196, channels, dtype=dtype)
        check_gates(arch, lambda table=table: kernels.rotate_tokens(x, table, table, place, 1, half))
        check_gates(arch, lambda table=table: kernels.rotate_tokens_backward(x, table, table, None, 1, half))
