"""The readable PyTorch specification of every primitive: CPU path, fallback and oracle of the kernels.

Each file holds one primitive: the forward formula, and the backward formula wherever its kernel has one. Everything
computes in float32 (float64 for float64 inputs) and casts once at the end.

On the CPU an image gets the same bits in every batch, and with and without gradients, for a given number of threads and
a given memory layout of the image. PyTorch's own layers (linear, convolution) and compiled graphs do not promise this.
"""

from ._export import greatest_of_slots
from ._norm import layer_norm, layer_norm_backward, with_norm
from ._rows import accumulator, with_prefix
from .attention import (
    attention,
    attention_backward,
    attention_policy,
    attention_policy_backward,
    attention_policy_with_sums,
    attention_scores,
    attention_with_sums,
    key_scores,
)
from .cls_scores import (
    cls_scores,
    cls_scores_backward,
    cls_scores_with_sums,
    cls_value_scores,
    cls_value_scores_packed,
)
from .cluster_dpc_knn import cluster_dpc_knn
from .cluster_k_medoids import cluster_k_medoids
from .fuse_tokens import fuse_tokens, fuse_tokens_backward
from .gather_packed import (
    gather_packed,
    gather_packed_backward,
    token_offsets,
    unpack_tokens,
    unpack_tokens_backward,
)
from .gather_tokens import gather_tokens, scatter_tokens
from .linear_packed import linear_packed, linear_packed_backward
from .match_tokens import match_tokens
from .merge_tokens import (
    learned_sizes,
    merge_tokens,
    merge_tokens_backward,
    merge_tokens_size_backward,
    sum_slots,
    unmerge_tokens,
)
from .received_scores import received_scores, received_scores_backward
from .rotate_tokens import (
    mean_rows,
    rotate_tokens,
    rotate_tokens_backward,
    rotate_tokens_table_backward,
    table_rows,
)
from .sample_tokens import sample_tokens
from .select_topk import select_topk
from .sinkhorn_merge import sinkhorn_merge, sinkhorn_merge_backward, sinkhorn_merge_inference
from .slots import group_slots
from .soft_merge import soft_merge, soft_merge_backward

__all__ = [
    "accumulator",
    "attention",
    "attention_backward",
    "attention_policy",
    "attention_policy_backward",
    "attention_policy_with_sums",
    "attention_scores",
    "attention_with_sums",
    "cls_scores",
    "cls_scores_backward",
    "cls_scores_with_sums",
    "cls_value_scores",
    "cls_value_scores_packed",
    "cluster_dpc_knn",
    "cluster_k_medoids",
    "fuse_tokens",
    "fuse_tokens_backward",
    "gather_packed",
    "gather_packed_backward",
    "gather_tokens",
    "greatest_of_slots",
    "group_slots",
    "key_scores",
    "layer_norm",
    "layer_norm_backward",
    "learned_sizes",
    "linear_packed",
    "linear_packed_backward",
    "match_tokens",
    "mean_rows",
    "merge_tokens",
    "merge_tokens_backward",
    "merge_tokens_size_backward",
    "received_scores",
    "received_scores_backward",
    "rotate_tokens",
    "rotate_tokens_backward",
    "rotate_tokens_table_backward",
    "sample_tokens",
    "scatter_tokens",
    "select_topk",
    "sinkhorn_merge",
    "sinkhorn_merge_backward",
    "sinkhorn_merge_inference",
    "soft_merge",
    "soft_merge_backward",
    "sum_slots",
    "table_rows",
    "token_offsets",
    "unmerge_tokens",
    "unpack_tokens",
    "unpack_tokens_backward",
    "with_norm",
    "with_prefix",
]
