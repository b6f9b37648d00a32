"""What DynamicViT is trained with (Rao et al. 2021, section 3.3, in the weights and forms of Haurum et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from .arguments import as_tuple, is_number, plain

__all__ = ["dynamicvit_loss", "keep_ratio_loss", "token_distillation_loss"]


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
        raise ValueError(f"keep_ratios must have one entry for each of the {stages} stages, got {len(ratios)}")
    for ratio in ratios:
        if not is_number(ratio):
            raise TypeError(f"keep_ratios must hold numbers, got {ratio!r}")
    return [plain(ratio) for ratio in ratios]


def keep_ratio_loss(decisions: Sequence[Tensor], keep_ratios: float | Sequence[float]) -> Tensor:
    """``mean_j mean_b (mean_n decisions[j][b, n] - keep_ratios[j]) ** 2``.

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
    """Difference to the teacher's tokens, over the tokens of the whole batch that were kept to the end.

    Args:
        tokens: (B, P, C) patch tokens of the student after its last norm.
        teacher_tokens: (B, P, C) those of the teacher; no gradient flows into them.
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
    """The task's loss, the keep-ratio loss, and two distillation losses wherever a teacher is given.

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
