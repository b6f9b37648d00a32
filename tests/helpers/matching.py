"""Bipartite matching for tests: inputs whose cosines are exact, a plain transcription, and a judgement by value."""

import math
from fractions import Fraction

import torch
from torch import Tensor

from .inputs import seeded


def exact_metric(batch: int, num_tokens: int, dim: int, *, dtype=torch.float32, seed: int = 0) -> Tensor:
    """Draw rows of few entries +-1, times a power of two: cosines are exact in every dtype, and often tied."""
    generator = seeded(seed)
    counts = torch.tensor([0, 1, 4, 4, 4]) if dim >= 4 else torch.tensor([0, 1, 1])
    chosen = counts[torch.randint(0, len(counts), (batch, num_tokens), generator=generator)]
    places = torch.rand(batch, num_tokens, dim, generator=generator).argsort(-1).argsort(-1)
    signs = torch.randint(0, 2, (batch, num_tokens, dim), generator=generator) * 2 - 1
    scales = 2.0 ** torch.randint(-2, 3, (batch, num_tokens, 1), generator=generator)
    return ((places < chosen.unsqueeze(-1)) * signs * scales).to(dtype)


def _signed_square_of_cosine(a: list[float], b: list[float]) -> Fraction:
    """Return numbers in the order of the cosine, without a root: -4 for NaN, 0 for a zero vector."""
    if not all(map(math.isfinite, a + b)):
        return Fraction(-4)
    exact_a, exact_b = list(map(Fraction, a)), list(map(Fraction, b))
    dot = sum(x * y for x, y in zip(exact_a, exact_b, strict=True))
    squares = sum(x * x for x in exact_a) * sum(y * y for y in exact_b)
    return Fraction(0) if squares == 0 else dot * abs(dot) / squares


def plain_slots(rows: list[list[float]], r: int, prefix: int) -> list[int]:
    """Match one image as the paper tells it, one token at a time, in rational arithmetic."""
    tokens = range(len(rows))
    movers = [n for n in tokens if n % 2 == 0 and n >= prefix]
    partners = [n for n in tokens if n % 2 == 1 and n >= prefix]
    edges = []
    for mover in movers:
        found = None
        for partner in partners:
            similarity = _signed_square_of_cosine(rows[mover], rows[partner])
            if found is None or similarity > found[0]:
                found = (similarity, partner)
        if found is not None:
            edges.append((found[0], mover, found[1]))
    edges.sort(key=lambda edge: (-edge[0], edge[1]))
    moved = {mover: partner for _, mover, partner in edges[:r]}
    stay = [*range(prefix), *(n for n in movers if n not in moved), *partners]
    slot = {n: number for number, n in enumerate(stay)}
    return [slot[moved.get(n, n)] for n in tokens]


def assert_slots_by_value(slot: Tensor, metric: Tensor, r: int, prefix: int, *, tolerance: float):
    """Assert that slots are numbered right, and that similarities in float64 miss the best by ``tolerance`` at most."""
    batch, num_tokens, _ = metric.shape
    unit = metric.double() / metric.double().norm(dim=-1, keepdim=True).clamp_min(1e-12)
    similarity = unit @ unit.mT
    tokens = torch.arange(num_tokens)
    receives = (tokens % 2 == 1) & (tokens >= prefix)
    movers = tokens[(tokens % 2 == 0) & (tokens >= prefix)].tolist()
    for image in range(batch):
        owner = {slot[image, n].item(): n for n in tokens[receives].tolist()}
        moved = {n: owner[slot[image, n].item()] for n in movers if slot[image, n].item() in owner}
        stay = [*range(prefix), *(n for n in movers if n not in moved), *tokens[receives].tolist()]
        number = {n: position for position, n in enumerate(stay)}
        assert len(moved) == r
        assert slot[image].tolist() == [number[moved.get(n, n)] for n in tokens.tolist()]
        best = similarity[image].masked_fill(~receives, -math.inf).amax(-1)
        for mover, partner in moved.items():
            assert similarity[image, mover, partner] >= best[mover] - tolerance
        left = [best[n].item() for n in movers if n not in moved]
        if moved and left:
            assert min(best[n].item() for n in moved) >= max(left) - 2 * tolerance
