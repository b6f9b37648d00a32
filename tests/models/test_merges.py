"""Merges in blocks that no plain form is written for, against the unreduced model with its own blocks, in float64."""

import copy
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastreduce
from bench.proof import tiny
from fastreduce.integrations.registry import host_of
from fastreduce.plain.model import BEFORE, OPTIONS, PlainModel
from fastreduce.plain.walk import Walk, rows_of
from tests.models.test_positions import AT, MODELS, build

PAIRS = ("beit", "beit-gap", "relpos", "relpos-class", "relpos-shared", "relpos-post")
ALIKE = ("parallel", "parallel-things", "naflex", "differential", "differential-parallel")
ROTARY = ("qwen3", "deepseek", "gemma4")
METHODS = {
    "tome": {"method": "tome"},
    "tome-exact": {"method": "tome", "rounds": "exact", "keep_rate": 0.3},
    "kmedoids": {"method": "kmedoids"},
    "dpcknn": {"method": "dpcknn"},
    "evit": {"method": "evit"},
    "sit": {"method": "sit", "keep": (8, 4)},
    "patchmerger": {"method": "patchmerger", "keep": (8, 4)},
    "sinkhorn": {"method": "sinkhorn", "eps": 0.1, "keep": (8, 4)},
}


class Written(PlainModel):
    """A method of the plain algorithms that acts on the full grid of an unreduced model, between its own blocks.

    The tokens that are left stand in rows of the grid, and no other row is a key. Where the model rotates, that is the
    row of a token's place; elsewhere the first rows, and the bias of a pair is read at the places of its tokens.
    """

    def __init__(self, model, layers, method, at, rotary, keep_rate=None, keep=None, **options):
        nn.Module.__init__(self)
        host = host_of(model)
        self.method, self.at, self.keep_rate, self.keep = method, at, keep_rate, keep
        self.options, self.layers, self.late_class = {**OPTIONS[method], **options}, layers, False
        self.prefix, self.rotary = host.prefix(model), rotary
        self.model = types.SimpleNamespace(global_pool="token", cls_token=host.has_class_token(model) or None)
        self.own, self.block, self.seen = [model], -1, []

    def rows(self):
        """(B, N) the row of the grid in which each token at hand stands."""
        place = self.walk.place
        patches = place if self.rotary else torch.arange(place.shape[1]).expand_as(place)
        return torch.cat([torch.arange(self.prefix).expand(len(place), -1), patches + self.prefix], dim=1)

    def act(self, x, keys=None):
        """Let the method act on the tokens in x (B, T, C), and write what is left of them there."""
        stage = self.at.index(self.block)
        self.walk.x = rows_of(x, self.rows())
        step = getattr(self, f"_{self.method}")
        if self.method == "evit":
            step(self.walk, self._count(stage, self.walk.patches))
        else:
            step(self.walk, *(() if keys is None else (keys,)), stage)
        x.scatter_(1, self.rows().unsqueeze(-1).expand_as(self.walk.x), self.walk.x)

    def enter(self, number, x):
        """Before a block."""
        self.block = number
        if number == 0:
            place = torch.arange(x.shape[1] - self.prefix).expand(len(x), -1)
            self.walk = Walk(x, patches=place.shape[1], place=place)
        if number in self.at and self.method in BEFORE:
            self.act(x)
        self.seen = []

    def attended(self, x):
        """Between the halves of a block."""
        if self.seen and self.block in self.at and self.method not in BEFORE:
            self.act(x, self.keys if self.method == "tome" else None)
        self.seen = []

    @property
    def keys(self):
        return torch.cat([k for k, _ in self.seen], dim=1)

    def attend(self, attend, q, k, v, attn_mask=None, scale=None, **options):
        """Stand in for PyTorch's attention: no key but the tokens at hand, each for as many patches as it has."""
        rows, place, walk = self.rows(), self.walk.place, self.walk
        bias = torch.full((len(q), q.shape[2]), float("-inf"), dtype=q.dtype)
        size = torch.zeros(rows.shape, dtype=q.dtype) if walk.size is None else walk.size.log()
        bias = bias.scatter(1, rows, size)[:, None, None]
        if attn_mask is not None:
            source = torch.arange(q.shape[2]).repeat(len(q), 1)
            source = source.scatter(1, rows[:, self.prefix :], place.clamp_min(0) + self.prefix)
            pair = attn_mask.expand(len(q), -1, -1, -1)
            pair = pair.gather(2, source[:, None, :, None].expand(-1, pair.shape[1], -1, pair.shape[3]))
            pair = pair.gather(3, source[:, None, None].expand_as(pair))
            none = torch.zeros(source.shape, dtype=torch.bool).scatter(1, rows[:, self.prefix :], place < 0)
            bias = bias + pair.masked_fill(none[:, None, :, None] | none[:, None, None], 0.0)
        out = attend(q, k, v, attn_mask=bias, scale=scale, **options)
        weights = (q @ k.transpose(-2, -1) * (q.shape[3] ** -0.5 if scale is None else scale) + bias).softmax(-1)
        index = rows[:, None, :, None]
        weights = weights.gather(2, index.expand(-1, weights.shape[1], -1, weights.shape[3]))
        weights = weights.gather(3, rows[:, None, None].expand(-1, weights.shape[1], weights.shape[2], -1))
        self.seen.append((k.gather(2, index.expand(-1, k.shape[1], -1, k.shape[3])), weights))
        walk.matrix = torch.cat([one for _, one in self.seen], dim=1)
        return out

    def __call__(self, images, monkeypatch):
        """(B, N, C) what is behind the last block."""
        (model,), attend, last = self.own, F.scaled_dot_product_attention, []
        for number, block in enumerate(model.blocks):
            block.register_forward_pre_hook(lambda _, args, number=number: self.enter(number, args[0]))
            block.register_forward_hook(lambda _, args, out: self.attended(out))  # where there are no halves
            if (half := _second_half(block)) is not None:
                half.register_forward_pre_hook(lambda _, args: self.attended(args[0]))
        model.blocks[-1].register_forward_hook(lambda _, args, out: last.append(out))
        monkeypatch.setattr(
            F, "scaled_dot_product_attention", lambda *args, **named: self.attend(attend, *args, **named)
        )
        with torch.no_grad():
            model(images)
        monkeypatch.undo()
        return rows_of(last[0], self.rows())


def _second_half(block):
    """The module that gets the tokens between the halves of a block, or None where both run side by side."""
    if "Parallel" in type(block).__name__:
        return block.ffns[0] if hasattr(block, "ffns") else None
    if "Post" in type(block).__name__:
        return block.mlp
    return block.norm3 if hasattr(block, "norm3") else block.norm2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [*PAIRS, *ALIKE, *ROTARY])
def test_merges_equal_the_unreduced_model(name, method, monkeypatch):
    """Decisions, sizes and places as the plain algorithm has them, attention and MLP as the model has them."""
    rotary = name in ROTARY
    if rotary and method in ("evit", "sit", "patchmerger", "sinkhorn"):
        pytest.skip("its tokens have no row each: one stands nowhere, or two stand at the same place")
    model, images = build(name)
    plain = copy.deepcopy(model)
    options = {"at": AT, **METHODS[method]}
    if "keep" not in options:
        options.setdefault("keep_rate", 0.5)
    if rotary and options["method"] == "tome":
        options["metric"] = "after"  # the keys that attention gets
    fastreduce.patch(model, **options)
    layers = dict(tiny.randomize(model.reducers, seed=7).named_parameters())
    written = Written(plain, layers, rotary=rotary, **options)
    expected = written(images, monkeypatch)
    found, host = [], type(host_of(model))
    finish = host.finish
    monkeypatch.setattr(host, "finish", lambda self, m, tokens: found.append(tokens) or finish(self, m, tokens))
    with torch.no_grad():
        model(images)
    (tokens,) = found
    assert tokens.x.shape == expected.shape
    assert tokens.num_patches < written.walk.patches
    assert tokens.place is None or torch.equal(tokens.place.long(), written.walk.place)
    rounding = 1e-5 if name == "deepseek" else 1e-9  # its norms compute in float32
    torch.testing.assert_close(tokens.x, expected, rtol=0, atol=rounding * expected.abs().max().item())


def test_every_layout_is_there():
    """Here, or in test_positions.py against the plain algorithm."""
    from tests.models import test_positions

    assert set(MODELS) == {*PAIRS, *ALIKE, *ROTARY, *test_positions.ROTARY, *test_positions.OTHERS}
