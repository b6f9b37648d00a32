"""Costs of a reduction: outputs held against the unreduced model's, and accuracy before and after."""

from .accuracy import Accuracy, paired_accuracy
from .measures import MEASURES, Fidelity, fidelities, fidelity
from .outputs import Outputs, model_outputs, unreduced_copy

__all__ = [
    "MEASURES",
    "Accuracy",
    "Fidelity",
    "Outputs",
    "fidelities",
    "fidelity",
    "model_outputs",
    "paired_accuracy",
    "unreduced_copy",
]
