"""fuse_tokens compiles for sm_80 and sm_90 at every shape class within the gates."""

import pytest
import torch

from fastreduce.kernels import fuse_tokens as kernels
from tests.compiled.gates import ARCHES, check_gates, with_dtypes


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("shape", "dtype"), with_dtypes([(197, 192), (197, 384), (577, 768), (1025, 1024)]))
def test_gates(shape, dtype, arch):
    tokens, channels = shape
    keep = tokens // 2
    x = torch.zeros(2, tokens, channels, dtype=dtype)
    order, scores = torch.zeros(2, tokens - 1, dtype=torch.int64), torch.zeros(2, tokens - 1)
    residual = torch.zeros(2, keep + 2, channels, dtype=dtype)

    for added in ((None, None), (residual, None), (residual, residual[0, 0])):
        (forward,) = check_gates(arch, lambda: kernels.fuse_tokens(x, order, scores, keep, 1, *added))  # noqa: B023
        if added[1] is None:
            assert set(forward.load_bytes) <= {4, 8, 16}, forward  # 8: int64 order, 4: scores; nothing of x is narrower
        arguments = residual, x, order, scores, keep, 1, added[1]
        (backward,) = check_gates(arch, lambda: kernels.fuse_tokens_backward(*arguments))  # noqa: B023
        assert max(forward.registers, backward.registers) <= 128, (forward, backward)
