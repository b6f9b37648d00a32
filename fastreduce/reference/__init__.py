"""The readable PyTorch specification of every primitive: CPU path, fallback and oracle of the kernels.

Each file holds one primitive: the forward formula, and the backward formula wherever its kernel has one. Everything
computes in float32 (float64 for float64 inputs) and casts once at the end.
"""

from ._rows import accumulator, with_prefix
from .cls_scores import cls_scores, cls_scores_backward
from .fuse_tokens import fuse_tokens, fuse_tokens_backward
from .gather_tokens import gather_tokens, scatter_tokens
from .match_tokens import match_tokens
from .merge_tokens import group_slots, merge_tokens, merge_tokens_backward, sum_slots, unmerge_tokens
from .received_scores import received_scores
from .select_topk import select_topk

__all__ = [
    "accumulator",
    "cls_scores",
    "cls_scores_backward",
    "fuse_tokens",
    "fuse_tokens_backward",
    "gather_tokens",
    "group_slots",
    "match_tokens",
    "merge_tokens",
    "merge_tokens_backward",
    "received_scores",
    "scatter_tokens",
    "select_topk",
    "sum_slots",
    "unmerge_tokens",
    "with_prefix",
]
