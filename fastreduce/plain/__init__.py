"""The published algorithms, written plainly: the work is done as the study's released code does it.

Every block builds its whole attention matrix, scores are read from it, tokens are sorted, gathered with an expanded
index and scattered into sums. Nothing of fastreduce's own operators or rewrites is used here, so that it can be

* the oracle: ``PlainModel(copy.deepcopy(model).double(), ...)`` decides and computes in float64;
* the baseline of ``fastreduce compare``, beside :class:`FreeSlice`, the ideal whose decision costs nothing;
* the documentation of what each method computes.

Both run the modules of an unpatched timm Vision Transformer and import neither timm nor the rest of fastreduce.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FreeSlice", "PlainModel"]

_OPTIONS: dict[str, dict[str, Any]] = {
    "topk": {},
    "evit": {"normalize": False},
    "dynamicvit": {},
    "ats": {"points": "official"},
    "tome": {"r": None, "rounds": "official", "prop_attn": True},
    "kmedoids": {"iters": 3, "cost": "all", "equal_weight": False, "first": 0},
    "dpcknn": {"k_neighbors": 5, "equal_weight": False},
    "sit": {},
    "patchmerger": {"scaled": False},
    "sinkhorn": {"eps": 1.0, "iters": 3, "gradient": "official"},
    "radial": {"norm": "l2", "schedule": None, "min_radius": 1.0},
}

# Methods that reduce what enters a block.
_BEFORE = ("radial", "dynamicvit", "kmedoids", "dpcknn", "sit", "patchmerger", "sinkhorn")


@dataclasses.dataclass
class _Walk:
    """What one forward pass carries from block to block."""

    x: Tensor  # (B, N, C), prefix first
    patches: int  # patch tokens before any reduction
    size: Tensor | None = None  # (B, N) patches that each token stands for
    home: Tensor | None = None  # (B, patches) the token that each patch is in
    valid: Tensor | None = None  # (B, N) False for padding
    matrix: Tensor | None = None  # (B, H, N, N) attention of the block before
    decisions: list[Tensor] = dataclasses.field(default_factory=list)  # (B, patches) each: 1 for kept


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """X (B, N, C), index (B, K) -> (B, K, C)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _distance(x: Tensor) -> Tensor:
    """X (B, N, C) -> (B, N, N), in float32 for half precision, as autocast does it: not all shapes exist otherwise."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    return torch.cdist(x, x)


def _embed(model: Any, images: Tensor) -> Tensor:
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))


def _check_unpatched(model: Any) -> None:
    if hasattr(model, "reducers"):
        raise ValueError("the plain form needs the unpatched model; call fastreduce.unpatch first, or give it a copy")


class PlainModel(nn.Module):
    """A timm Vision Transformer with one of the methods, done as the released code does it.

    Where that code has no answer, the plain meaning is taken: without a class token, a token's score is the attention
    that it receives, averaged over heads and queries; prefix tokens (class, distillation, registers) are never reduced;
    after ToMe, K-Medoids and DPC-KNN, pooling over patches counts each patch once; where images keep different numbers
    of tokens, the mean is that of the ones that count. Radial patterns drop tokens instead of masking them. DPC-KNN's
    density has no noise. After a forward pass of DynamicViT in training, :attr:`decisions` holds what was drawn.

    Args:
        model: an unpatched timm ``VisionTransformer``; its modules are shared, not copied.
        method: any name in ``fastreduce.REDUCERS``.
        at: blocks at which the stages stand.
        keep_rate: stage i keeps ``int(patches * keep_rate ** (i + 1))`` patch tokens; or a sequence of fractions.
        keep: instead, a sequence of counts.
        fused: use ``scaled_dot_product_attention`` in blocks whose attention matrix no one reads.
        layers: the method's own parameters under the released code's names (``score_predictor.0.in_conv.0.weight``,
            ``cluster_layers.0.queries``, ...), for instance ``dict(patched.reducers.named_parameters())``.
        **options: as in :func:`fastreduce.patch`.

    Raises:
        ValueError: a patched model, an unknown method, or a learned one without layers.
        TypeError: an option that the method does not have.
    """

    model: Any

    def __init__(
        self,
        model: nn.Module,
        method: str,
        *,
        at: int | Sequence[int],
        keep_rate: float | Sequence[float] | None = None,
        keep: int | Sequence[int] | None = None,
        fused: bool = False,
        layers: Mapping[str, Tensor] | None = None,
        **options: Any,
    ):
        super().__init__()
        if method not in _OPTIONS:
            raise ValueError(f"unknown method {method!r}; expected one of {', '.join(map(repr, _OPTIONS))}")
        if unknown := set(options) - set(_OPTIONS[method]):
            raise TypeError(f"{method!r} has no option {min(unknown)!r}")
        _check_unpatched(model)
        self.model = model
        self.training = model.training
        self.method = method
        self.at = (at,) if isinstance(at, int) else tuple(at)
        self.keep_rate = keep_rate
        self.keep = (keep,) if isinstance(keep, int) else keep
        self.fused = fused
        self.options = {**_OPTIONS[method], **options}
        learned = method in ("dynamicvit", "sit", "patchmerger", "sinkhorn")
        if not layers and (learned or (method == "dpcknn" and not self.options["equal_weight"])):
            raise ValueError(f"{method!r} has parameters of its own; give them as layers")
        self.layers = dict(layers or {})
        self.decisions: list[Tensor] = []
        self.prefix: int = self.model.num_prefix_tokens
        if method == "radial":
            for stage, kept in enumerate(self._radial_patterns(self.model.patch_embed.grid_size)):
                self.register_buffer(f"kept_{stage}", kept, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) -> logits (B, classes)."""
        model = self.model
        x = _embed(model, images)
        walk = _Walk(x, patches=x.shape[1] - self.prefix)
        for index, block in enumerate(model.blocks):
            stage = self.at.index(index) if index in self.at else None
            if stage is not None and self.method in _BEFORE:
                getattr(self, f"_{self.method}")(walk, stage)
            if stage is not None and self.method == "ats":
                self._ats(block, walk, stage)
            else:
                keys = self._attention(block, walk, reads=self._reads(index))
                if stage is not None and self.method in ("topk", "evit"):
                    getattr(self, f"_{self.method}")(walk, self._count(stage, walk.patches))
                elif stage is not None and self.method == "tome":
                    self._tome(walk, keys, stage)
            walk.x = walk.x + block.drop_path2(block.ls2(block.mlp(block.norm2(walk.x))))
        self.decisions = walk.decisions
        if model.global_pool not in ("", "token"):
            self._prepare_pooling(walk)
        return model.forward_head(model.norm(walk.x))

    def _prepare_pooling(self, walk: _Walk) -> None:
        """Make the mean over all rows the one that is meant."""
        if walk.home is not None:  # repeat every merged token, so that pooling counts each patch once
            patches = _rows(walk.x[:, self.prefix :], walk.home)
            walk.x = torch.cat([walk.x[:, : self.prefix], patches], dim=1)
        present = walk.decisions[-1] if walk.decisions else walk.valid
        if present is not None:
            if walk.decisions:
                present = F.pad(present, (self.prefix, 0), value=1.0)
            outside = 0 if getattr(self.model, "pool_include_prefix", False) else self.prefix
            counted = present[:, outside:].to(walk.x.dtype)
            share = counted / counted.mean(dim=1, keepdim=True)
            walk.x = torch.cat([walk.x[:, :outside], walk.x[:, outside:] * share.unsqueeze(-1)], dim=1)

    def _layer(self, stage: int, name: str) -> Tensor:
        return self.layers[f"{'score_predictor' if self.method == 'dynamicvit' else 'cluster_layers'}.{stage}.{name}"]

    def _reads(self, index: int) -> bool:
        """Whether anyone looks at the attention matrix of a block."""
        if self.method in ("topk", "evit"):
            return index in self.at
        return self.method == "kmedoids" and index + 1 in self.at and not self.options["equal_weight"]

    def _count(self, stage: int, patches: int) -> int:
        """Patch tokens that a stage keeps."""
        if self.keep is not None:
            return self.keep[stage]
        rate: Any = self.keep_rate
        # Of a small image at least one stays.
        return max(1, int(patches * (rate ** (stage + 1) if isinstance(rate, (int, float)) else rate[stage])))

    def _query_key_value(self, block: Any, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) -> three of (B, H, N, D)."""
        attn = block.attn
        batch, tokens, _ = normed.shape
        q, k, v = attn.qkv(normed).reshape(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return attn.q_norm(q), attn.k_norm(k), v

    def _weights(self, block: Any, walk: _Walk, q: Tensor, k: Tensor) -> Tensor:
        """The attention matrix (B, H, N, N), before dropout."""
        logits = (q @ k.transpose(-2, -1)) * block.attn.scale
        if walk.size is not None and self.options["prop_attn"]:
            logits = logits + walk.size.log()[:, None, None, :]
        if walk.valid is not None:
            seen = walk.valid[:, None, :, None] & walk.valid[:, None, None, :]
            logits = logits.masked_fill(~seen, -torch.finfo(logits.dtype).max)
        if self.method != "dynamicvit" or not self.training:
            return logits.softmax(dim=-1)
        tokens = q.shape[2]
        policy = F.pad(walk.decisions[-1], (self.prefix, 0), value=1.0) if walk.decisions else q.new_ones(1, tokens)
        policy = policy.to(torch.promote_types(q.dtype, torch.float32))[:, None, None, :]
        seen = policy + (1 - policy) * torch.eye(tokens, dtype=policy.dtype, device=q.device)
        logits = logits.to(policy.dtype)
        grown = (logits - logits.amax(dim=-1, keepdim=True)).exp() * seen
        return (grown + 1e-6 / tokens) / (grown.sum(dim=-1, keepdim=True) + 1e-6)

    def _project(self, block: Any, out: Tensor, normed: Tensor) -> Tensor:
        """Attention's result (B, H, M, D) -> (B, M, C), ready to be added."""
        attn = block.attn
        out = out.transpose(1, 2).flatten(2)
        if getattr(attn, "norm", None) is not None:
            out = attn.norm(out)
        if getattr(attn, "gate", None) is not None:
            out = out * attn.gate(normed).sigmoid()
        return block.drop_path1(block.ls1(attn.proj_drop(attn.proj(out))))

    def _attention(self, block: Any, walk: _Walk, *, reads: bool) -> Tensor:
        """``x + proj(softmax(q k^T + log size) v)``; keeps the matrix and returns the keys (B, H, N, D)."""
        attn, normed = block.attn, block.norm1(walk.x)
        q, k, v = self._query_key_value(block, normed)
        walk.matrix = None
        if self.fused and not reads and not (self.training and self.method == "dynamicvit"):
            size = walk.size if self.options.get("prop_attn") else None
            bias = None if size is None else size.log()[:, None, None, :].to(q.dtype)
            mask = bias if walk.valid is None else walk.valid[:, None, None, :]  # no method has both
            dropout = attn.attn_drop.p if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=attn.scale)
        else:
            weights = self._weights(block, walk, q, k)
            walk.matrix = weights if self.method == "dynamicvit" else attn.attn_drop(weights)
            out = walk.matrix.to(v.dtype) @ v
        walk.x = walk.x + self._project(block, out, normed)
        return k

    def _scores(self, matrix: Tensor) -> Tensor:
        """(B, H, N, N) -> (B, patches): what the class token, or else the average token, attends to."""
        rows = matrix.mean(dim=1)
        received = rows[:, 0] if self.model.cls_token is not None else rows.mean(dim=1)
        return received[:, self.prefix :]

    def _topk(self, walk: _Walk, keep: int) -> None:
        """Keep the tokens of the highest scores, best first."""
        head, patches = walk.x[:, : self.prefix], walk.x[:, self.prefix :]
        if keep < patches.shape[1]:
            assert walk.matrix is not None
            kept = self._scores(walk.matrix).topk(keep, dim=1).indices
            walk.x = torch.cat([head, _rows(patches, kept)], dim=1)

    def _evit(self, walk: _Walk, keep: int) -> None:
        """The same, and one more token: the sum of all the others, each times its score."""
        head, patches = walk.x[:, : self.prefix], walk.x[:, self.prefix :]
        if keep >= patches.shape[1]:
            return
        assert walk.matrix is not None
        scores = self._scores(walk.matrix)
        order = scores.argsort(dim=1, descending=True, stable=True)
        kept, rest = order[:, :keep], order[:, keep:].sort(dim=1).values
        weights = scores.gather(1, rest).unsqueeze(-1)
        if self.options["normalize"]:
            weights = weights / weights.sum(dim=1, keepdim=True)
        fused = (_rows(patches, rest) * weights).sum(dim=1, keepdim=True)
        walk.x = torch.cat([head, _rows(patches, kept), fused], dim=1)

    def _ats(self, block: Any, walk: _Walk, stage: int) -> None:
        """Attention whose query rows are sampled by the class token's attention times the length of the values."""
        prefix, normed = self.prefix, block.norm1(walk.x)
        q, k, v = self._query_key_value(block, normed)
        matrix = block.attn.attn_drop(self._weights(block, walk, q, k))
        scores = (matrix[:, :, 0] * v.norm(dim=-1)).sum(dim=1)[:, prefix:]
        cumulated = (scores / (scores.sum(dim=1, keepdim=True) + 1e-6)).cumsum(dim=1)
        parts = self._count(stage, walk.patches) + 1
        start, end, step = 1 / (2 * parts), (2 * parts - 1) / (2 * parts), 2 / (2 * parts)
        steps = torch.arange(start, end, step, dtype=torch.float32, device="cpu")
        points = max(1, len(steps)) if self.options["points"] == "official" else parts - 1
        grid = (2 * torch.arange(points, device=q.device) + 1).to(scores.dtype) / (2 * parts)
        nearest = (grid[None, :, None] - cumulated[:, None, :]).abs().min(dim=2).indices
        chosen = [row.unique() for row in nearest]
        longest = max(len(row) for row in chosen)
        index = torch.stack([F.pad(row, (0, longest - len(row)), value=-1) for row in chosen])
        head = torch.arange(prefix, device=index.device).expand(len(index), prefix)
        rows = torch.cat([head, (index + prefix).masked_fill(index < 0, 0)], dim=1)
        walk.valid = F.pad(index >= 0, (prefix, 0), value=True)
        picked = matrix.gather(2, rows[:, None, :, None].expand(-1, matrix.shape[1], -1, matrix.shape[3]))
        walk.x = _rows(walk.x, rows) + self._project(block, picked.to(v.dtype) @ v, _rows(normed, rows))

    def _predict(self, stage: int, tokens: Tensor, present: Tensor) -> Tensor:
        """Log-probabilities (B, N, 2) of keeping and dropping."""

        def linear(name: str, x: Tensor) -> Tensor:
            return F.linear(x, self._layer(stage, f"{name}.weight"), self._layer(stage, f"{name}.bias"))

        weight, bias = (self._layer(stage, f"in_conv.0.{name}") for name in ("weight", "bias"))
        hidden = F.gelu(linear("in_conv.1", F.layer_norm(tokens, tokens.shape[-1:], weight, bias)))
        local, shared = hidden.chunk(2, dim=-1)
        shared = (shared * present).sum(dim=1, keepdim=True) / present.sum(dim=1, keepdim=True) + 1e-6
        mixed = torch.cat([local, shared.expand_as(local)], dim=-1)
        return linear("out_conv.4", F.gelu(linear("out_conv.2", F.gelu(linear("out_conv.0", mixed))))).log_softmax(-1)

    def _noise(self, like: Tensor) -> Tensor:
        return torch.empty_like(like).exponential_()

    def _dynamicvit(self, walk: _Walk, stage: int) -> None:
        """Before the block, keep what the predictor scores highest; in training, only decide."""
        head, patches = walk.x[:, : self.prefix], walk.x[:, self.prefix :]
        if self.training:
            before = walk.decisions[-1] if walk.decisions else patches.new_ones(patches.shape[:2])
            predicted = self._predict(stage, patches, before.unsqueeze(-1))
            soft = (predicted - self._noise(predicted).log()).softmax(dim=-1)
            hard = torch.zeros_like(soft).scatter(-1, soft.argmax(dim=-1, keepdim=True), 1.0)
            walk.decisions.append((hard - soft.detach() + soft)[..., 0] * before)
            return
        keep = self._count(stage, walk.patches)
        if keep < patches.shape[1]:
            scores = self._predict(stage, patches, patches.new_ones(*patches.shape[:2], 1))[..., 0]
            kept = scores.argsort(dim=1, descending=True, stable=True)[:, :keep]
            walk.x = torch.cat([head, _rows(patches, kept)], dim=1)

    def _move_home(self, walk: _Walk, slot: Tensor) -> None:
        walk.home = slot if walk.home is None else slot.gather(1, walk.home)

    def _kmedoids(self, walk: _Walk, stage: int) -> None:
        """Before the block, keep the medoids of clusters of the tokens."""
        head, patches = walk.x[:, : self.prefix], walk.x[:, self.prefix :]
        keep, batch = self._count(stage, walk.patches), len(patches)
        if keep >= patches.shape[1]:
            return
        distance = _distance(patches)
        if self.options["equal_weight"]:
            weights = torch.ones_like(distance[..., 0])
            first = self.options["first"]
            medoids = torch.full((batch, 1), first if isinstance(first, int) else first[stage], device=head.device)
            for _ in range(keep - 1):
                farthest = _rows(distance, medoids).amax(dim=1).scatter(1, medoids, 0.0)
                medoids = torch.cat([medoids, farthest.argmax(dim=1, keepdim=True)], dim=1)
        else:
            assert walk.matrix is not None
            weights = walk.matrix.detach().sum(dim=(1, 2))[:, self.prefix :]
            medoids = weights.topk(keep, dim=1).indices

        def labels() -> Tensor:
            return distance.gather(2, medoids.unsqueeze(1).expand(-1, distance.shape[1], -1)).argmin(dim=2)

        for _ in range(self.options["iters"]):
            label, medoids = labels(), medoids.clone()
            for cluster in range(keep):
                outside = (label != cluster).unsqueeze(2)
                if self.options["cost"] == "all":
                    cost = weights.unsqueeze(2) * distance
                else:
                    cost = weights.unsqueeze(1) * distance * ~outside.transpose(1, 2)
                medoids[:, cluster] = cost.masked_fill(outside, 1e6).sum(dim=2).argmin(dim=1)
        self._move_home(walk, labels())
        walk.x = torch.cat([head, _rows(patches, medoids)], dim=1)

    def _dpcknn(self, walk: _Walk, stage: int) -> None:
        """Before the block, merge clusters around peaks of density."""
        head, patches = walk.x[:, : self.prefix], walk.x[:, self.prefix :]
        keep, (batch, tokens, channels) = self._count(stage, walk.patches), patches.shape
        if keep >= tokens:
            return
        distance = _distance(patches) / channels**0.5
        near = distance.topk(min(self.options["k_neighbors"], tokens), dim=2, largest=False).values
        density = (-(near**2).mean(dim=2)).exp()
        denser = density[:, None, :] > density[:, :, None]
        largest = distance.flatten(1).max(dim=1).values[:, None, None]
        peak = torch.where(denser, distance, largest).min(dim=2).values
        centers = (density * peak).argsort(dim=1, descending=True, stable=True)[:, :keep]
        label = _rows(distance, centers).argmin(dim=1)
        label.scatter_(1, centers, torch.arange(keep, device=label.device).expand(batch, keep))
        score = torch.zeros_like(patches[..., :1])
        if not self.options["equal_weight"]:
            score = F.linear(patches, self._layer(stage, "score.weight"), self._layer(stage, "score.bias"))
        flat = (label + keep * torch.arange(batch, device=label.device).unsqueeze(1)).flatten()
        # The published exp(score) overflows: over numerator and denominator, exp of the cluster's greatest, if above 0.
        own = F.one_hot(label, keep).bool()
        greatest = score.expand(-1, -1, keep).where(own, 0.0).amax(dim=1).clamp_min(0.0).view(-1, 1)
        weights = (score - greatest[flat].view_as(score)).exp()
        total = weights.new_zeros(batch * keep, 1).index_add(0, flat, weights.flatten(0, 1)) + 1e-6 * (-greatest).exp()
        share = (weights.flatten(0, 1) / total[flat]) * patches.flatten(0, 1)
        merged = patches.new_zeros(batch * keep, channels).index_add(0, flat, share)
        self._move_home(walk, label)
        walk.x = torch.cat([head, merged.view(batch, keep, channels)], dim=1)

    def _sit(self, walk: _Walk, stage: int) -> None:
        """Before the block, sum up the tokens with the weights of a perceptron."""
        head, patches = walk.x[:, : self.prefix], walk.x[:, self.prefix :]

        def parts(name: str) -> tuple[Tensor, Tensor]:
            return self._layer(stage, f"weight.{name}.weight"), self._layer(stage, f"weight.{name}.bias")

        hidden = F.gelu(F.linear(F.layer_norm(patches, patches.shape[-1:], *parts("0")), *parts("1")))
        weights = (self._layer(stage, "scale") * F.linear(hidden, *parts("3"))).softmax(dim=1)
        walk.x = torch.cat([head, weights.transpose(1, 2) @ patches], dim=1)

    def _patchmerger(self, walk: _Walk, stage: int) -> None:
        """Before the block, attend from learned queries to normalised tokens."""
        head, patches = walk.x[:, : self.prefix], walk.x[:, self.prefix :]
        weight, bias = self._layer(stage, "norm.weight"), self._layer(stage, "norm.bias")
        patches = F.layer_norm(patches, patches.shape[-1:], weight, bias)
        logits = self._layer(stage, "queries") @ patches.transpose(1, 2)
        if self.options["scaled"]:
            logits = logits * patches.shape[-1] ** -0.5
        walk.x = torch.cat([head, logits.softmax(dim=-1) @ patches], dim=1)

    def _sinkhorn(self, walk: _Walk, stage: int) -> None:
        """Before the block, transport normalised tokens to normalised centres."""
        head, patches = walk.x[:, : self.prefix], walk.x[:, self.prefix :]
        v = self._layer(stage, "v")
        centers = F.normalize(v, dim=-1)
        if self.options["gradient"] == "official":
            centers = centers.detach() + (v - v.detach())
        patches = F.normalize(patches, dim=-1)
        logits = (centers @ patches.transpose(1, 2)) / self.options["eps"]
        margin = -math.log(logits.shape[1] + logits.shape[2])
        columns = logits.new_zeros(len(logits), 1, logits.shape[2])
        for _ in range(self.options["iters"]):
            rows = margin - (logits + columns).logsumexp(dim=2, keepdim=True)
            columns = margin - (logits + rows).logsumexp(dim=1, keepdim=True)
        walk.x = torch.cat([head, (logits + rows + columns - margin).exp() @ patches], dim=1)

    def _tome(self, walk: _Walk, keys: Tensor, stage: int) -> None:
        """Merge similar tokens, weighted by their sizes; a matching merges at most half of them."""
        present = walk.x.shape[1] - self.prefix
        exact, r = self.options["rounds"] == "exact", self.options["r"]
        if r is not None:
            wanted = r if isinstance(r, int) else r[stage]
        elif exact:
            wanted = present - self._count(stage, walk.patches)
        else:  # as if the stages before had reached their counts
            before = self._count(stage - 1, walk.patches) if stage else walk.patches
            wanted = before - self._count(stage, walk.patches)
        metric = keys.detach().mean(dim=1)
        while wanted > 0 and present > 1:
            merges = min(wanted, present // 2)
            wanted, present = wanted - merges, present - merges
            again = exact and wanted > 0 and present > 1
            metric = self._match_and_merge(walk, metric, merges, again)
            if not again:
                return

    def _match_and_merge(self, walk: _Walk, metric: Tensor, r: int, again: bool) -> Tensor:
        """The r tokens of even position closest to one of odd position join it; returns the next round's metric."""
        prefix = self.prefix
        even, odd = prefix % 2, 1 - prefix % 2  # positions count the prefix, which takes no part
        unit = (metric / metric.norm(dim=-1, keepdim=True))[:, prefix:]
        best, destination = (unit[:, even::2] @ unit[:, odd::2].transpose(1, 2)).max(dim=-1)
        order = best.argsort(dim=1, descending=True, stable=True)
        merged, stays = order[:, :r], order[:, r:].sort(dim=1).values
        destination = destination.gather(1, merged)

        def sums(values: Tensor) -> Tensor:
            head, patches = values[:, :prefix], values[:, prefix:]
            source, target = patches[:, even::2], patches[:, odd::2]
            index = destination.unsqueeze(-1).expand(-1, -1, values.shape[-1])
            return torch.cat([head, _rows(source, stays), target.scatter_add(1, index, _rows(source, merged))], dim=1)

        size = walk.x.new_ones(walk.x.shape[:2]) if walk.size is None else walk.size
        size = size.unsqueeze(-1)
        total = sums(size)
        walk.x = sums(walk.x * size) / total
        walk.size = total.squeeze(-1)
        if self.model.global_pool not in ("", "token"):
            slot = torch.empty(unit.shape[:2], dtype=torch.int64, device=unit.device)
            first, last = stays.shape[1], unit.shape[1] - r
            rank = torch.arange(last, device=unit.device).expand(unit.shape[0], last)
            joined = torch.empty_like(order).scatter(1, merged, destination + first)
            slot[:, even::2] = joined.scatter(1, stays, rank[:, :first])
            slot[:, odd::2] = rank[:, first:]
            self._move_home(walk, slot)
        return sums(metric * size) / total if again else metric

    def _radial_patterns(self, grid: tuple[int, int]) -> list[Tensor]:
        """What each stage keeps of the tokens present: those inside its radius, in float32 as the released code."""
        linspace = functools.partial(torch.linspace, dtype=torch.float32, device="cpu")
        y, x = torch.meshgrid(*(linspace(-size // 2, size // 2, size) for size in grid), indexing="ij")
        norms = {"l1": y.abs() + x.abs(), "l2": (y**2 + x**2).sqrt(), "linf": torch.maximum(y.abs(), x.abs())}
        distance = norms[self.options["norm"]]
        schedule = self.options["schedule"]
        if schedule is None:
            schedule = "contiguous" if self.keep_rate is None and self.keep is None else "stages"
        if schedule == "contiguous":
            first, last = self.at[0], self.at[-1]
            smallest = float(self.options["min_radius"])
            if smallest <= 0:
                smallest = distance[grid[0] // 2, grid[1] // 2].item()
            points = linspace(distance[0, 0].item(), smallest, last - first + 3)
            limits = list(points if first == 0 else points[1:])[: last - first + 1]
            self.at = tuple(range(first, last + 1))
        else:
            rings = distance.unique()
            held = [int((distance <= ring).sum()) for ring in rings]
            limits = []
            for stage in range(len(self.at)):
                wanted = self._count(stage, distance.numel())
                limits.append(rings[min(range(len(rings)), key=lambda ring: abs(held[ring] - wanted))])
        present, patterns = torch.arange(distance.numel(), device="cpu"), []
        for limit in limits:
            kept = (distance.flatten()[present] <= limit).nonzero().squeeze(1)
            present = present[kept]
            patterns.append(kept)
        return patterns

    def _radial(self, walk: _Walk, stage: int) -> None:
        """Before the block, drop what lies outside the radius."""
        kept = self.get_buffer(f"kept_{stage}").expand(walk.x.shape[0], -1)
        walk.x = torch.cat([walk.x[:, : self.prefix], _rows(walk.x[:, self.prefix :], kept)], dim=1)


class FreeSlice(nn.Module):
    """The unreduced model that, between attention and MLP, simply cuts its tokens: a reduction whose decision is free.

    Args:
        model: an unpatched timm ``VisionTransformer``; its modules are shared, not copied.
        counts: patch tokens left after each stage.
        blocks: the blocks at which the stages stand.

    Raises:
        ValueError: a patched model, or a count for each block missing.
    """

    model: Any

    def __init__(self, model: nn.Module, counts: Sequence[int], blocks: Sequence[int]):
        super().__init__()
        _check_unpatched(model)
        if len(counts) != len(blocks):
            raise ValueError(f"counts must have one entry for each of the {len(blocks)} blocks, got {counts!r}")
        self.model = model
        self.counts = dict(zip(blocks, counts, strict=True))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) -> logits (B, classes)."""
        model = self.model
        x = _embed(model, images)
        for index, block in enumerate(model.blocks):
            x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
            if index in self.counts:
                x = x[:, : model.num_prefix_tokens + self.counts[index]]
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return model.forward_head(model.norm(x))
