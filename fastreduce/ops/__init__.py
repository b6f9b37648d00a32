"""The primitives of token reduction: Triton kernels and their PyTorch references behind one function each."""

from .cls_scores import cls_scores
from .fuse_tokens import fuse_tokens
from .gather_tokens import gather_tokens
from .match_tokens import match_tokens
from .merge_tokens import group_slots, merge_tokens, prepare_merge, unmerge_tokens
from .received_scores import received_scores
from .select_topk import select_topk

__all__ = [
    "cls_scores",
    "fuse_tokens",
    "gather_tokens",
    "group_slots",
    "match_tokens",
    "merge_tokens",
    "prepare_merge",
    "received_scores",
    "select_topk",
    "unmerge_tokens",
]
