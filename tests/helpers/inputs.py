"""Inputs that every rung of the ladder shares."""

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(*shape: int, dtype=torch.float32, seed: int = 0, layout: str = "dense") -> torch.Tensor:
    """Draw random tokens; layout "dense", "sliced" (rows of a wider tensor) or "expanded" (batch stride 0)."""
    if layout == "sliced":
        wide = torch.randn(*shape[:-1], 2 * shape[-1] + 1, generator=seeded(seed)).to(dtype)
        return wide[..., : shape[-1]]
    if layout == "expanded":
        return torch.randn(1, *shape[1:], generator=seeded(seed)).to(dtype).expand(shape)
    return torch.randn(*shape, generator=seeded(seed)).to(dtype)


def distinct_indices(batch: int, count: int, high: int, seed: int = 0) -> torch.Tensor:
    generator = seeded(seed)
    rows = [torch.randperm(high, generator=generator)[:count] for _ in range(batch)]
    return torch.stack(rows) if rows else torch.empty(0, count, dtype=torch.int64)


def rewrite(path, content):
    """Write a file anew: to cut an existing one off takes some file systems milliseconds."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    return path
