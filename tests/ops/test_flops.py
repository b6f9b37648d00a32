"""FlopCounterMode counts an operator of ours as the matrix products that it does."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import fastreduce
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


def test_fused_attention_is_counted_as_its_products():
    """Torch has no formula for the CPU's, so that attention would be missing from the unreduced model alone."""
    inputs = heads(requires_grad=True)
    one = 2 * BATCH * HEADS * TOKENS * TOKENS * DIM

    def attend():
        return torch.nn.functional.scaled_dot_product_attention(*inputs)

    assert counted(attend) == 2 * one
    assert counted(lambda: attend().sum().backward()) == (2 + 5) * one


def test_scores_that_come_with_attention_are_counted_once():
    q, k, v = heads()
    _, logsumexp = OURS.attention(q, k, v, 0.5)
    assert counted(lambda: OURS.attention_scores(q, k, logsumexp, "received", None, 0, 0.5)) == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_models_are_counted_in_every_mode(mode):
    """EViT calls modules with a bias; the counter's hooks ask an input that wants a gradient where it came from."""
    model = fastreduce.patch(
        VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, init_values=0.1).eval(),
        "evit",
        keep_rate=0.5,
        at=0,
    )
    with mode():
        assert counted(lambda: model(torch.randn(2, 3, 16, 16))) > 0
