"""Reductions that end in a layer normalisation, and its gradient, compile for sm_80 and sm_90 within the gates."""

import pytest
import torch

from fastreduce.kernels import fuse_tokens, gather_tokens, merge_tokens
from tests.compiled.gates import ARCHES, check_gates

# The last: an odd width, and rows of a wider tensor, so no 16-byte loads to be had.
CASES = [(192, torch.float16), (1024, torch.float32), (1280, torch.float32), (250, torch.bfloat16)]


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("channels", "dtype"), CASES)
def test_gates(channels, dtype, arch):
    wide = channels % 8 == 0
    x = torch.zeros(2, 197, channels + (0 if wide else 75), dtype=dtype)[..., :channels]
    index, order = torch.zeros(2, 98, dtype=torch.int64), torch.zeros(2, 196, dtype=torch.int64)
    groups = torch.zeros(2, 196, dtype=torch.int32), torch.zeros(2, 99, dtype=torch.int32)
    residual, row = x[:, :99], x[0, 0]
    size, statistics = torch.zeros(2, 196), torch.zeros(2, 98, 2)
    norm, learned = (row, row, 1e-6), (x[0, :1], row[:1])
    merging = x[:, 1:], *groups
    upstream = residual[:, 1:], residual[:, 1:], torch.zeros(2, 98, channels, dtype=dtype), statistics, row, True, True
    offsets, bounds, total = (torch.zeros(2, count, dtype=torch.int32) for count in (198, 98, 97))
    headed = True, x[:, 1:], groups[0], bounds
    for most, launch in (
        (64, lambda: gather_tokens.gather_tokens(x, index, 1, residual, *norm)),
        (128, lambda: fuse_tokens.fuse_tokens(x, order, size, 97, 1, residual, row, *norm)),
        (96, lambda: merge_tokens.merge_tokens(*merging, size, residual[:, 1:], 0.0, None, None, None, *norm)),
        (96, lambda: merge_tokens.merge_tokens(*merging, None, None, 1e-6, x[:, :1], *learned, *norm)),
        (128, lambda: gather_tokens.gather_tokens_norm_backward(*upstream, groups[0][:, :98], offsets)),
        (128, lambda: fuse_tokens.fuse_tokens_norm_backward(*upstream, x, order, size, 1, row)),
        (128, lambda: merge_tokens.merge_tokens_norm_backward(*upstream, *headed, size, total.float(), 1e-6, row)),
    ):
        (report,) = check_gates(arch, launch, wide=wide)
        assert report.registers <= most or not wide, report


@pytest.mark.parametrize("arch", ARCHES)
def test_gates_of_a_norm_of_its_own(arch):
    x, scores = torch.zeros(2, 1400, 768, dtype=torch.float16), torch.zeros(2, 1399)
    order, row = torch.zeros(2, 1399, dtype=torch.int64), x[0, 0]
    reports = check_gates(arch, lambda: fuse_tokens.fuse_tokens(x, order, scores, 700, 1, None, None, row, row, 1e-6))
    assert [report.name for report in reports] == ["fuse_tokens_kernel", "norm_rows_kernel"]
    assert reports[1].registers <= 64
