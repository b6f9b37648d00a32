"""DynamicViT: a small network predicts which tokens to keep (Rao et al. 2021)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import unchecked as ops
from ..tokens import Plan, Tokens
from .base import AttentionBlock, ModelShape, Reducer, ScheduledReducer, gather, is_bare, is_unhooked
from .schedule import KeepSchedule

__all__ = ["DynamicViT"]


class KeepPredictor(nn.Module):
    """Log-probabilities of keeping and dropping a token, from the token itself and from the mean of those present."""

    def __init__(self, channels: int):
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(channels, channels // 2),
            nn.GELU(),
            nn.Linear(channels // 2, channels // 4),
            nn.GELU(),
            nn.Linear(channels // 4, 2),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, present: Tensor | None = None, prefix: int = 0) -> Tensor:
        """X (B, prefix + N, C), present (B, N) 0 or 1, or None for all -> (B, N, 2); index 0 is keeping."""
        # The prefix goes through, and is left out where it matters: cut off before, the rest would be copied.
        hidden = self.in_conv(x)
        half = hidden.shape[-1] // 2
        patches = hidden[:, prefix:, half:]
        if present is None:
            mean = patches.mean(1)
        else:
            present = present.to(hidden.dtype)
            # Where nothing is left the released code divides zero by zero.
            mean = torch.einsum("bn,bnc->bc", present, patches) / present.sum(1, keepdim=True).clamp_min(0.5)
        mean = mean + 1e-6  # to the quotient, as the released code has it
        return F.log_softmax(self._mix(hidden[..., :half], mean)[:, prefix:], dim=-1)

    def _mix(self, own: Tensor, shared: Tensor) -> Tensor:
        """What ``out_conv`` makes of (B, N, C/2) each token's own half and (B, C/2) the one that an image shares."""
        first: Any = self.out_conv[0]
        if type(self.out_conv) is not nn.Sequential or not is_unhooked(self.out_conv) or not is_bare(first):
            return self.out_conv(torch.cat([own, shared.unsqueeze(1).expand_as(own)], dim=-1))
        # The same for all tokens: one product for the image instead of a concatenation.
        half = own.shape[-1]
        mixed = F.linear(own, first.weight[:, :half])
        mixed = mixed + F.linear(shared, first.weight[:, half:], first.bias).unsqueeze(1)
        for layer in list(self.out_conv)[1:]:
            mixed = layer(mixed)
        return mixed


class DynamicViT(ScheduledReducer):
    """Keep the tokens that a learned predictor scores highest.

    In training no token is removed: each stage draws a keep decision for every token (Gumbel-softmax, straight
    through), and from there on attention does not see dropped ones. The decisions are what the losses need::

        with fastreduce.record(model) as seen:
            features = model.forward_features(images)
        logits = model.forward_head(features)
        loss = fastreduce.dynamicvit_loss(logits, labels, seen.decisions, keep_ratios, ...)

    In evaluation mode the best tokens are kept, best first. Blocks before the first stage attend as they always do; the
    released code uses its masked attention there too, with nothing masked, which differs by less than 1e-6.

    Args:
        blocks: where the stages stand.
        schedule: tokens kept at each stage in evaluation.
        channels: width of the tokens, for the predictors ``reducers.score_predictor.*``.
        generator: source of the decisions' noise in training, on the model's device; None for torch's global one.
        backend: see :func:`fastreduce.backend`.
    """

    name = "dynamicvit"

    def __init__(
        self,
        blocks: tuple[int, ...],
        schedule: KeepSchedule,
        channels: int,
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ):
        super().__init__(blocks, schedule, backend)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {generator!r}")
        self.generator = generator
        self.score_predictor = nn.ModuleList(KeepPredictor(channels) for _ in blocks)

    @classmethod
    def make(cls, shape: ModelShape, /, **arguments: Any) -> Reducer:
        """Knows the width of the tokens."""
        if shape.channels % 4:
            raise ValueError(f"dynamicvit needs a width that is a multiple of 4, got {shape.channels}")
        return super().make(shape, channels=shape.channels, **arguments)

    def before(self, block: AttentionBlock, tokens: Tokens, stage: int) -> Tokens:
        """Decide."""
        return self._decide(tokens, stage) if self.training else self._select(block, tokens, stage)

    def _select(self, block: AttentionBlock, tokens: Tokens, stage: int) -> Tokens:
        keep = self.schedule.count(stage, tokens.patches)
        if keep >= tokens.num_patches:
            return tokens
        prefix = tokens.prefix
        scores = self.score_predictor[stage](tokens.x, prefix=prefix)[..., 0]
        kept = ops.select_topk(scores, keep, backend=tokens.backend)
        x, normed = gather(block.attention_norm(tokens), tokens.x, kept, prefix=prefix, backend=tokens.backend)
        plan = Plan(self.blocks[stage], tokens.num_patches, keep, kept=kept)
        return tokens.replace(x, normed=normed, plans=(*tokens.plans, plan))

    def noise(self, like: Tensor) -> Tensor:
        """Exponential noise E of the shape of ``like``; -log E is what Gumbel-softmax adds to the log-probabilities."""
        return torch.empty_like(like, memory_format=torch.contiguous_format).exponential_(generator=self.generator)

    def _decide(self, tokens: Tokens, stage: int) -> Tokens:
        prefix, previous = tokens.prefix, tokens.decisions[-1] if tokens.decisions else None
        log_probabilities = self.score_predictor[stage](tokens.x, previous, prefix)
        soft = (log_probabilities - self.noise(log_probabilities).log()).softmax(-1)
        hard = F.one_hot(soft.argmax(-1), 2).to(soft.dtype)
        decision = (hard - soft.detach() + soft)[..., 0]
        if previous is not None:
            decision = decision * previous
        policy = F.pad(decision, (prefix, 0), value=1.0)
        return tokens.replace(tokens.x, policy=policy, decisions=(*tokens.decisions, decision))
