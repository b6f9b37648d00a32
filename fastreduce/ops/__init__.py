"""The primitives of token reduction: Triton kernels and their PyTorch references behind one function each."""

from .attention import attention, attention_packed, attention_policy
from .attention_scores import attention_cls_scores, attention_received_scores
from .cls_scores import cls_scores, cls_value_scores, cls_value_scores_packed
from .cluster_dpc_knn import cluster_dpc_knn, cluster_dpc_knn_groups
from .cluster_k_medoids import cluster_k_medoids
from .fuse_tokens import fuse_tokens
from .gather_packed import gather_packed, token_offsets, unpack_tokens
from .gather_tokens import gather_tokens
from .linear_packed import linear_packed
from .match_tokens import match_tokens, match_tokens_groups
from .merge_tokens import merge_tokens, unmerge_tokens
from .received_scores import received_scores
from .rotate_tokens import rotate_tokens
from .sample_tokens import sample_tokens
from .select_topk import select_topk
from .sinkhorn_merge import sinkhorn_merge
from .slots import group_slots, prepare_merge
from .soft_merge import soft_merge

__all__ = [
    "attention",
    "attention_cls_scores",
    "attention_packed",
    "attention_policy",
    "attention_received_scores",
    "cls_scores",
    "cls_value_scores",
    "cls_value_scores_packed",
    "cluster_dpc_knn",
    "cluster_dpc_knn_groups",
    "cluster_k_medoids",
    "fuse_tokens",
    "gather_packed",
    "gather_tokens",
    "group_slots",
    "linear_packed",
    "match_tokens",
    "match_tokens_groups",
    "merge_tokens",
    "prepare_merge",
    "received_scores",
    "rotate_tokens",
    "sample_tokens",
    "select_topk",
    "sinkhorn_merge",
    "soft_merge",
    "token_offsets",
    "unmerge_tokens",
    "unpack_tokens",
]
