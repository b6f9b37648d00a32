"""The loss of a training: labels, a teacher, and what DynamicViT is to keep."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.loss import AsymmetricLossMultiLabel, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from ..integrations.timm import record
from ..reducers.dynamicvit import dynamicvit_loss
from .protocol import Protocol

__all__ = ["Objective", "Observed"]


class Observed(nn.Module):
    """A model whose forward pass, the only one that gradients are synchronised for, also gives tokens and decisions."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return logits, patch tokens and decisions of (B, 3, height, width) images."""
        with record(self.model) as seen:
            features = self.model.forward_features(images)
        return self.model.forward_head(features), features[:, self.model.num_prefix_tokens :], seen.decisions


class Objective:
    """The loss of a batch."""

    def __init__(
        self,
        protocol: Protocol,
        multi_label: bool,
        teacher: Any,
        fractions: list[float] | None,
    ):
        self.protocol, self.teacher, self.fractions = protocol, teacher, fractions
        self.base: nn.Module
        if multi_label:
            gamma_neg, gamma_pos, clip = protocol.asymmetry
            self.base = AsymmetricLossMultiLabel(gamma_neg=gamma_neg, gamma_pos=gamma_pos, clip=clip)
        elif protocol.mixes:
            self.base = SoftTargetCrossEntropy()
        else:
            self.base = LabelSmoothingCrossEntropy(protocol.label_smoothing)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a batch, a scalar."""
        tokens, decisions = None, []
        if self.fractions is None:
            logits = model(images)
        else:
            logits, tokens, decisions = model(images)
        teacher_logits = teacher_tokens = None
        if self.teacher is not None:
            with torch.no_grad():
                features = self.teacher.forward_features(images)
                teacher_logits = self.teacher.forward_head(features).float()
                teacher_tokens = features[:, self.teacher.num_prefix_tokens :].float()
        loss = self.base(logits, labels)
        if self.protocol.distillation is not None:
            assert teacher_logits is not None
            share = self.protocol.distillation_weight
            loss = (1 - share) * loss + share * self._distilled(logits, teacher_logits)
        if self.fractions is None:
            return loss
        given: dict[str, Any] = {}
        if teacher_logits is not None:
            given = {"logits": logits, "teacher_logits": teacher_logits}
            given |= {"tokens": tokens, "teacher_tokens": teacher_tokens}
        return dynamicvit_loss(
            loss,
            decisions,
            self.fractions,
            ratio_weight=self.protocol.ratio_weight,
            logit_weight=self.protocol.logit_weight,
            token_weight=self.protocol.token_weight,
            **given,
        )

    def _distilled(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        if self.protocol.distillation == "hard":
            return F.cross_entropy(logits, teacher_logits.argmax(1))
        temperature = self.protocol.temperature
        student, teacher = (logits / temperature).log_softmax(1), (teacher_logits / temperature).log_softmax(1)
        return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
