"""group_slots, merge_tokens, unmerge_tokens compile for sm_80 and sm_90 at every shape class within the gates."""

import pytest
import torch

from fastreduce.kernels import merge_tokens as kernels
from tests.compiled.gates import ARCHES, check_gates
from tests.inputs import DTYPES


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [192, 384, 768, 1024])
def test_gates(channels, dtype, arch):
    x, residual = torch.zeros(2, 197, channels, dtype=dtype), torch.zeros(2, 99, channels, dtype=dtype)
    slot, size, total = torch.zeros(2, 197, dtype=torch.int64), torch.ones(2, 197), torch.ones(2, 99)
    groups = torch.zeros(2, 197, dtype=torch.int32), torch.zeros(2, 100, dtype=torch.int32)
    check_gates(arch, lambda: kernels.merge_tokens(x, *groups, size, residual))
    check_gates(arch, lambda: kernels.merge_tokens(x, *groups, None, None))
    check_gates(arch, lambda: kernels.spread_slots(residual, slot, size, total))
    check_gates(arch, lambda: kernels.spread_slots(residual, slot))
    check_gates(arch, lambda: kernels.sum_slots(x, slot, 99))


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("num_tokens", [197, 577, 1025, 4097])
def test_gates_of_the_grouping(num_tokens, arch):
    slot = torch.zeros(2, num_tokens, dtype=torch.int64)
    check_gates(arch, lambda: kernels.group_slots(slot, num_tokens // 2), wide=False)
