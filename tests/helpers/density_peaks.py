"""Density-peak clustering for tests: a plain transcription, and inputs on which nothing is nearly tied."""

import math

import torch
from torch import Tensor

from .inputs import seeded


def plain_clusters(
    rows: list[list[float]], k: int, neighbors: int, noise: list[float] | None = None
) -> tuple[list[int], list[int]]:
    """Return centres and labels of one image, one token at a time."""
    tokens = range(len(rows))
    scale = math.sqrt(len(rows[0]))
    distance = [[math.dist(a, b) / scale for b in rows] for a in rows]
    nearest = [sorted(row)[:neighbors] for row in distance]
    density = [math.exp(-sum(d * d for d in row) / len(row)) for row in nearest]
    if noise is not None:
        density = [a + b for a, b in zip(density, noise, strict=True)]
    farthest = max(map(max, distance))
    height = [min([distance[n][m] for m in tokens if density[m] > density[n]], default=farthest) for n in tokens]
    centers = sorted(tokens, key=lambda n: (-density[n] * height[n], n))[:k]
    label = [min(range(k), key=lambda j: (distance[centers[j]][n], j)) for n in tokens]
    for j, center in enumerate(centers):
        label[center] = j
    return centers, label


def _smallest_gap(values: Tensor) -> float:
    values = values.sort().values
    return ((values[1:] - values[:-1]) / values[1:]).min().item() if len(values) > 1 else 1.0


def separated(batch: int, num_tokens: int, channels: int, neighbors: int, *, dtype=torch.float32) -> Tensor:
    """Draw random tokens whose densities, scores and distances from one another differ by 3e-6 or more."""
    images = []
    for seed in range(1000):
        if len(images) == batch:
            break
        generator = seeded(seed)
        spread = 0.4 + torch.rand(num_tokens, 1, generator=generator)
        image = (spread * torch.randn(num_tokens, channels, generator=generator)).to(dtype)
        x = image.double()
        distance = (x.unsqueeze(1) - x).norm(dim=-1) / math.sqrt(channels)
        density = (-distance.sort().values[:, :neighbors].square().mean(-1)).exp()
        height = torch.where(density > density.unsqueeze(1), distance, distance.amax()).amin(-1)
        others = distance + torch.diag(torch.full((num_tokens,), math.nan))
        rows = min((_smallest_gap(row[~row.isnan()]) for row in others), default=1.0)
        if min(_smallest_gap(density), _smallest_gap(density * height), rows) >= 3e-6:
            images.append(image)
    assert len(images) == batch, (num_tokens, channels)
    return torch.stack(images) if images else torch.zeros(0, num_tokens, channels, dtype=dtype)


def on_a_line(batch: int, num_tokens: int, *, dtype=torch.float32, seed: int = 0) -> Tensor:
    """Put tokens at whole numbers on a line in four dimensions: distances are exact in every dtype, and often tied."""
    x = torch.zeros(batch, num_tokens, 4)
    x[..., seed % 4] = torch.randint(-6, 7, (batch, num_tokens), generator=seeded(seed)).float()
    return x.to(dtype)
