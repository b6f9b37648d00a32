"""The functions of ``fastreduce.ops`` under the same names, without checks, for callers that know their arguments.

``backend`` is required: ``"triton"`` or ``"reference"``, as ``fastreduce.backends.resolve`` returns it.
Numbers must be Python's own. Arguments that the checked functions refuse have no defined result here.
"""

from .attention import attention_packed_unchecked as attention_packed
from .attention import attention_policy_unchecked as attention_policy
from .attention import attention_unchecked as attention
from .attention_scores import attention_cls_scores_unchecked as attention_cls_scores
from .attention_scores import attention_received_scores_unchecked as attention_received_scores
from .cls_scores import cls_scores_unchecked as cls_scores
from .cls_scores import cls_value_scores_packed_unchecked as cls_value_scores_packed
from .cls_scores import cls_value_scores_unchecked as cls_value_scores
from .cluster_dpc_knn import cluster_dpc_knn_groups_unchecked as cluster_dpc_knn_groups
from .cluster_dpc_knn import cluster_dpc_knn_unchecked as cluster_dpc_knn
from .cluster_k_medoids import cluster_k_medoids_unchecked as cluster_k_medoids
from .fuse_tokens import fuse_tokens_unchecked as fuse_tokens
from .gather_packed import gather_packed_unchecked as gather_packed
from .gather_packed import token_offsets_unchecked as token_offsets
from .gather_packed import unpack_tokens_unchecked as unpack_tokens
from .gather_tokens import gather_tokens_unchecked as gather_tokens
from .linear_packed import linear_packed_unchecked as linear_packed
from .match_tokens import match_tokens_groups_unchecked as match_tokens_groups
from .match_tokens import match_tokens_unchecked as match_tokens
from .merge_tokens import merge_tokens_unchecked as merge_tokens
from .merge_tokens import unmerge_tokens_unchecked as unmerge_tokens
from .received_scores import received_scores_unchecked as received_scores
from .rotate_tokens import rotate_tokens_unchecked as rotate_tokens
from .sample_tokens import sample_tokens_unchecked as sample_tokens
from .select_topk import select_topk_unchecked as select_topk
from .sinkhorn_merge import sinkhorn_merge_unchecked as sinkhorn_merge
from .slots import group_slots_unchecked as group_slots
from .slots import prepare_merge_unchecked as prepare_merge
from .soft_merge import soft_merge_unchecked as soft_merge

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
