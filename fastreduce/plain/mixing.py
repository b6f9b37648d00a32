"""Methods that make every new token of all the old ones: SiT, PatchMerger, Sinkhorn."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import PlainAttention
from .walk import Walk, moved

__all__ = ["Mixtures"]


class Mixtures(PlainAttention):
    """Weights between old and new tokens, and their sums."""

    def _sit(self, walk: Walk, stage: int) -> None:
        """Sum up the tokens before the block with the weights of a perceptron."""
        head, patches = walk.x[:, : self.prefix], walk.x[:, self.prefix :]

        def parts(name: str) -> tuple[Tensor, Tensor]:
            return self._layer(stage, f"weight.{name}.weight"), self._layer(stage, f"weight.{name}.bias")

        hidden = F.gelu(F.linear(F.layer_norm(patches, patches.shape[-1:], *parts("0")), *parts("1")))
        weights = (self._layer(stage, "scale") * F.linear(hidden, *parts("3"))).softmax(dim=1)
        self._share_out(walk, weights)
        walk.place = moved(walk.place, weights.argmax(dim=1))
        walk.x = torch.cat([head, weights.transpose(1, 2) @ patches], dim=1)

    def _patchmerger(self, walk: Walk, stage: int) -> None:
        """Attend from learned queries to normalised tokens before the block."""
        head, patches = walk.x[:, : self.prefix], walk.x[:, self.prefix :]
        weight, bias = self._layer(stage, "norm.weight"), self._layer(stage, "norm.bias")
        patches = F.layer_norm(patches, patches.shape[-1:], weight, bias)
        logits = self._layer(stage, "queries") @ patches.transpose(1, 2)
        if self.options["scaled"]:
            logits = logits * patches.shape[-1] ** -0.5
        weights = logits.softmax(dim=-1)
        self._share_out(walk, weights.transpose(1, 2))
        walk.place = moved(walk.place, weights.argmax(dim=2))
        walk.x = torch.cat([head, weights @ patches], dim=1)

    def _sinkhorn(self, walk: Walk, stage: int) -> None:
        """Transport normalised tokens to normalised centres before the block."""
        head, patches = walk.x[:, : self.prefix], walk.x[:, self.prefix :]
        v = self._layer(stage, "v")
        centers = F.normalize(v, dim=-1)
        if self.options["gradient"] == "official":
            centers = centers.detach() + (v - v.detach())
        patches = F.normalize(patches, dim=-1)
        logits = (centers @ patches.transpose(1, 2)) / self.options["eps"]
        margin = -math.log(logits.shape[1] + logits.shape[2])
        columns = logits.new_zeros(len(logits), 1, logits.shape[2])
        for _ in range(self.options["iters"]):
            rows = margin - (logits + columns).logsumexp(dim=2, keepdim=True)
            columns = margin - (logits + rows).logsumexp(dim=1, keepdim=True)
        plan = (logits + rows + columns - margin).exp()
        self._share_out(walk, plan.transpose(1, 2))
        walk.place = moved(walk.place, plan.argmax(dim=2))
        walk.x = torch.cat([head, plan @ patches], dim=1)
