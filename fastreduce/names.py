"""What the methods are called in print, and the families that the paper's study sorts them into."""

from __future__ import annotations

__all__ = ["FAMILIES", "TITLES"]

FAMILIES: dict[str, tuple[str, ...]] = {
    "Pruning": ("topk", "evit", "dynamicvit", "ats"),
    "Hard merging": ("tome", "kmedoids", "dpcknn"),
    "Soft merging": ("sit", "patchmerger", "sinkhorn"),
    "Static": ("radial_l1", "radial_l2", "radial_linf"),
}
TITLES = {
    "none": "Unreduced",
    **{"topk": "Top-K", "evit": "EViT", "dynamicvit": "DynamicViT", "ats": "ATS", "tome": "ToMe"},
    **{"kmedoids": "K-Medoids", "dpcknn": "DPC-KNN", "sit": "SiT", "patchmerger": "PatchMerger"},
    **{"sinkhorn": "Sinkhorn", "radial_l1": "Radial ℓ1", "radial_l2": "Radial ℓ2", "radial_linf": "Radial ℓ∞"},
}
