"""FlopCounterMode counts an operator of ours as the matrix products that it does."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fastreduce import ops

BATCH, HEADS, TOKENS, DIM = 2, 3, 9, 8
OURS = torch.ops.fastreduce


def heads(requires_grad=False):
    return [torch.randn(BATCH, HEADS, TOKENS, DIM, requires_grad=requires_grad) for _ in range(3)]


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_every_operator_has_a_formula():
    assert ops  # which registers them
    names = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("fastreduce::")}
    assert len(names) > 20
    for name in names:
        assert getattr(OURS, name.partition("::")[2]) in flop_registry, name


def _matches():
    OURS.match_tokens(torch.randn(BATCH, TOKENS, DIM), 2, 1)


def _received():
    q, k, _ = heads()
    OURS.received_scores(q, k, 0.5)


def _fuses():
    order = torch.arange(TOKENS - 1).expand(BATCH, -1).contiguous()
    ops.fuse_tokens(torch.randn(BATCH, TOKENS, DIM), order, torch.rand(BATCH, TOKENS - 1), 3)


@pytest.mark.parametrize(
    ("call", "products"),
    [
        (_matches, BATCH * ((TOKENS + 1) // 2) * (TOKENS // 2) * DIM),
        (_received, BATCH * HEADS * TOKENS * TOKENS * DIM),
        (_fuses, BATCH * (TOKENS - 1) * DIM),
    ],
)
def test_operators_count_their_products(call, products):
    assert counted(call) == 2 * products


def test_packed_operators_read_where_images_are():
    tokens = torch.randn(1, 10, DIM)
    offsets = torch.tensor([0, 4, 10], dtype=torch.int32)
    weight = torch.randn(5, DIM)
    assert counted(lambda: OURS.linear_packed(tokens, weight, None, offsets)) == 2 * 10 * DIM * 5
