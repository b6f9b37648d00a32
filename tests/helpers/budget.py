"""The error budget: against float64, a kernel errs no more than the reference in the same dtype, plus a rounding."""

import torch

EPS = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float64: 2**-52}


def assert_within_budget(kernel: torch.Tensor, reference: torch.Tensor, exact: torch.Tensor, *, steps: float = 1.0):
    """Assert that a kernel errs no more than the reference in its dtype and ``steps`` roundings of the largest value.

    Both errors are taken against ``exact``, in float64.
    """
    assert kernel.dtype == reference.dtype, (kernel.dtype, reference.dtype)
    assert kernel.shape == exact.shape == reference.shape, (kernel.shape, reference.shape, exact.shape)
    if kernel.numel() == 0:
        return
    assert torch.isfinite(kernel).all() or not torch.isfinite(exact).all(), "the kernel made a NaN or an infinity"
    step = steps * EPS[kernel.dtype] * exact.abs().max().item()
    kernel_error = (kernel.double() - exact).abs().max().item()
    reference_error = (reference.double() - exact).abs().max().item()
    assert kernel_error <= reference_error + step, (kernel_error, reference_error, step)
