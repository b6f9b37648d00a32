"""The primitives of token reduction: Triton kernels and their PyTorch references behind one function each."""

from .gather_tokens import gather_tokens
from .merge_tokens import group_slots, merge_tokens, prepare_merge, unmerge_tokens
from .received_scores import received_scores

__all__ = ["gather_tokens", "group_slots", "merge_tokens", "prepare_merge", "received_scores", "unmerge_tokens"]
