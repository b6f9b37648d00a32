"""DynamicViT: a small network predicts which tokens to keep (Rao et al. 2021), and what it is trained with.

The losses stand in section 3.3; their weights and forms are Haurum et al.'s (2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import as_tuple, counted, is_number, plain
from ..ops import unchecked as ops
from ..tokens import Plan, Tokens
from .base import ModelShape, Reducer, ScheduledReducer
from .block import AttentionBlock, gather, is_bare, is_unhooked
from .schedule import KeepSchedule

__all__ = ["DynamicViT", "dynamicvit_loss", "keep_ratio_loss", "token_distillation_loss"]


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
        """Score x (B, prefix + N, C), present (B, N) 0 or 1, or None for all -> (B, N, 2); index 0 is keeping."""
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
        """Apply ``out_conv`` to each token's own half (B, N, C/2) and to (B, C/2), the half that an image shares."""
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
        """Make one that knows the width of the tokens."""
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
        return tokens.reduced(x, plan, normed=normed)

    def noise(self, like: Tensor) -> Tensor:
        """Draw exponential noise E shaped like ``like``; Gumbel-softmax adds -log E to the log-probabilities."""
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


def _ratios(keep_ratios: float | Sequence[float], decisions: Sequence[Tensor]) -> list[float]:
    """Return a ratio for each stage, or raise; a single rate is powered as by :func:`fastreduce.patch`."""
    stages = len(decisions)
    if not stages:
        raise ValueError(
            "there are no decisions: DynamicViT makes them in training mode (model.train()), "
            "inside fastreduce.record(model)"
        )
    if is_number(keep_ratios):
        return [plain(keep_ratios) ** (stage + 1) for stage in range(stages)]
    ratios = as_tuple("keep_ratios", keep_ratios)
    if len(ratios) != stages:
        raise ValueError(f"keep_ratios must have one entry a stage ({counted(stages, 'stage')}), got {len(ratios)}")
    for ratio in ratios:
        if not is_number(ratio):
            raise TypeError(f"keep_ratios must hold numbers, got {ratio!r}")
    return [plain(ratio) for ratio in ratios]


def keep_ratio_loss(decisions: Sequence[Tensor], keep_ratios: float | Sequence[float]) -> Tensor:
    """Return ``mean_j mean_b (mean_n decisions[j][b, n] - keep_ratios[j]) ** 2``.

    Args:
        decisions: (B, P) for each stage, 1 for kept tokens; ``Record.decisions`` of :func:`fastreduce.record`.
        keep_ratios: the fraction of the P patches that each stage should keep; or a rate r, for r, r ** 2, ...

    Returns:
        A scalar, differentiable in the decisions.

    Raises:
        ValueError: no decisions, or another number of ratios.
        TypeError: ratios that are no numbers.
    """
    ratios = _ratios(keep_ratios, decisions)
    terms = [(kept.mean(1) - ratio).square().mean() for kept, ratio in zip(decisions, ratios, strict=True)]
    return sum(terms[1:], terms[0]) / len(terms)


def token_distillation_loss(
    tokens: Tensor, teacher_tokens: Tensor, kept: Tensor, form: Literal["mse", "kl"] = "mse"
) -> Tensor:
    """Return the difference to the teacher's tokens, over the tokens of the whole batch that were kept to the end.

    Args:
        tokens: (B, P, C) patch tokens of the student after its last norm.
        teacher_tokens: (B, P, C) the teacher's tokens; no gradient flows into them.
        kept: (B, P), above 0.5 where a token was kept; no gradient flows into it.
        form: ``"mse"``: mean squared difference of their elements; ``"kl"``: Kullback-Leibler divergence of the softmax
            over channels, teacher against student, averaged over the tokens.

    Returns:
        A scalar; 0 where no token was kept.

    Raises:
        ValueError: shapes that differ, or an unknown form.
    """
    if tokens.shape != teacher_tokens.shape or tokens.shape[:2] != kept.shape:
        raise ValueError(
            f"tokens and teacher_tokens must be (B, P, C) and kept (B, P), got {tuple(tokens.shape)}, "
            f"{tuple(teacher_tokens.shape)} and {tuple(kept.shape)}"
        )
    if form not in ("mse", "kl"):
        raise ValueError(f"form must be 'mse' or 'kl', got {form!r}")
    counts = (kept.detach() > 0.5).to(tokens.dtype)
    teacher_tokens = teacher_tokens.detach()
    if form == "mse":
        each = (tokens - teacher_tokens).square().mean(-1)
    else:
        student, teacher = tokens.log_softmax(-1), teacher_tokens.log_softmax(-1)
        each = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    # Weights instead of a selection: its size would have to be known on the host.
    return (each * counts).sum() / counts.sum().clamp_min(1.0)


def dynamicvit_loss(
    base: Tensor,
    decisions: Sequence[Tensor],
    keep_ratios: float | Sequence[float],
    *,
    logits: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    tokens: Tensor | None = None,
    teacher_tokens: Tensor | None = None,
    base_weight: float = 1.0,
    ratio_weight: float = 2.0,
    logit_weight: float = 0.5,
    token_weight: float = 0.5,
    token_form: Literal["mse", "kl"] = "mse",
) -> Tensor:
    """Return the task's loss, the keep-ratio loss, and two distillation losses wherever a teacher is given.

    Example::

        with fastreduce.record(model) as seen:
            features = model.forward_features(images)
        logits = model.forward_head(features)
        with torch.no_grad():
            teacher_features = teacher.forward_features(images)
        loss = fastreduce.dynamicvit_loss(
            F.cross_entropy(logits, labels), seen.decisions, [0.7, 0.49, 0.343],
            logits=logits, teacher_logits=teacher.forward_head(teacher_features),
            tokens=features[:, 1:], teacher_tokens=teacher_features[:, 1:],
        )

    Args:
        base: the task's loss, a scalar.
        decisions: (B, P) for each stage, from ``Record.decisions``.
        keep_ratios: the fraction of the P patches that each stage should keep; or a rate r, for r, r ** 2, ...
        logits: (B, classes) of the student; with ``teacher_logits`` (B, classes), KL(teacher || student) per image at
            temperature 1.
        teacher_logits: see ``logits``; no gradient flows into them.
        tokens: (B, P, C) patch tokens of the student after its last norm; with ``teacher_tokens`` (B, P, C), see
            :func:`token_distillation_loss`.
        teacher_tokens: see ``tokens``.
        base_weight: factor of the task's loss.
        ratio_weight: factor of :func:`keep_ratio_loss`.
        logit_weight: factor of the logits' divergence.
        token_weight: factor of :func:`token_distillation_loss`.
        token_form: its form.

    Returns:
        A scalar.

    Raises:
        ValueError: no decisions, numbers or shapes that do not fit, or only one of student and teacher.
        TypeError: ratios that are no numbers.
    """
    for name, student, teacher in (("logits", logits, teacher_logits), ("tokens", tokens, teacher_tokens)):
        if (student is None) != (teacher is None):
            raise ValueError(f"give both {name} and teacher_{name}, or neither")
    loss = base_weight * base + ratio_weight * keep_ratio_loss(decisions, keep_ratios)
    if logits is not None and teacher_logits is not None:
        student, teacher = logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
        loss = loss + logit_weight * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    if tokens is not None and teacher_tokens is not None:
        loss = loss + token_weight * token_distillation_loss(tokens, teacher_tokens, decisions[-1], token_form)
    return loss
