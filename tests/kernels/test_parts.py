"""More images than one launch takes give the bits that they give in one."""

import pytest
import torch

from bench.primitives import Shape, differentiate, load_primitives
from fastreduce import ops
from fastreduce.kernels import _launch
from tests.helpers.inputs import tokens

SMALL = ("attention_bias", "cls_scores", "cluster_dpc_knn", "cluster_k_medoids", "fuse_tokens_norm", "match_tokens")
SMALL += ("gather_tokens_norm", "merge_tokens_norm", "received_scores", "select_topk", "sinkhorn_merge", "soft_merge")
SUMMED = {"sinkhorn_merge", "fuse_tokens_norm", "gather_tokens_norm", "merge_tokens_norm"}  # over the images


@pytest.mark.parametrize("name", SMALL)
def test_primitives(name, monkeypatch):
    primitive = load_primitives()[name]
    inputs = primitive.make(Shape("deit_tiny", 6, 3), torch.Generator().manual_seed(0))

    def call(arguments):
        return primitive.call(**arguments, backend="triton")

    def results():
        found = list(call(inputs))
        if primitive.gradients:
            backward, _ = differentiate(call, inputs, primitive.gradients)
            found += backward()
        return found

    whole = results()
    monkeypatch.setattr(_launch, "MOST_IMAGES", 2)
    for result, expected in zip(results(), whole, strict=True):
        if name in SUMMED and expected.shape[0] != 3:
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(result, expected)


def test_packed_attention(monkeypatch):
    q, k, v = (tokens(1, 2, 20, 16, seed=seed).requires_grad_() for seed in range(3))
    offsets = torch.tensor([0, 3, 3, 9, 14, 17], dtype=torch.int32)
    found = []
    for most in (65_535, 2):
        monkeypatch.setattr(_launch, "MOST_IMAGES", most)
        out = ops.attention_packed(q, k, v, (offsets, offsets), (6, 6), backend="triton")
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for one, several in zip(*found, strict=True):
        assert torch.equal(one, several)
