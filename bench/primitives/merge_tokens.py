"""The size-weighted mean of every slot: of matched tokens (ToMe), of clusters with learned weights (DPC-KNN)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.primitives import Inputs, Outputs, Primitive, Shape, nbytes, randn
from bench.primitives._norm import with_norm
from fastreduce import ops


def matched_slots(shape: Shape, generator: torch.Generator) -> Tensor:
    """Return (B, N): what matching gives if as many tokens merge as can, half of the patches."""
    metric = randn(generator, shape.dtype, shape.batch, shape.tokens, 64)
    return ops.match_tokens(metric, shape.kept, backend="reference")


def _make(shape: Shape, generator: torch.Generator) -> Inputs:
    """Make sizes as an earlier merge left them. The released code's matching hands on indices instead of slots."""
    batch, tokens, channels = shape.batch, shape.tokens, shape.channels
    slot, num_out = matched_slots(shape, generator), tokens - shape.kept
    even, first_odd = slot[:, ::2], num_out - tokens // 2
    moving = (even < first_odd).long().argsort(dim=1, stable=True)  # those that merge first, in ascending position
    merged, stays = moving[:, : shape.kept], moving[:, shape.kept :]
    return {
        "x": randn(generator, shape.dtype, batch, tokens, channels),
        "slot": slot,
        "num_out": num_out,
        "size": torch.randint(1, 5, (batch, tokens), generator=generator, device=generator.device).float(),
        "residual": randn(generator, shape.dtype, batch, num_out, channels),
        "indices": (merged, stays, even.gather(1, merged) - first_odd),
    }


def _call(*, indices: Any, **arguments: Any) -> Outputs:
    """Merge, grouping by slot included; ``indices`` are for the plain algorithm."""
    return ops.merge_tokens(**arguments)


def _plain(inputs: Inputs) -> Outputs:
    """Gather rows with an expanded index and scatter them into sums, as the rows' sizes; sizes in x's dtype."""
    x = inputs["x"]
    merged, stays, partner = (index.unsqueeze(-1) for index in inputs["indices"])

    def sums(values: Tensor) -> Tensor:
        width = values.shape[-1]
        even, odd = values[:, ::2], values[:, 1::2]
        moving = even.gather(1, merged.expand(-1, -1, width))
        received = odd.scatter_add(1, partner.expand(-1, -1, width), moving)
        return torch.cat([even.gather(1, stays.expand(-1, -1, width)), received], dim=1)

    size = inputs["size"].to(x.dtype).unsqueeze(-1)
    total = sums(size)
    return sums(x * size) / total + inputs["residual"], total.squeeze(-1)


def _floor(inputs: Inputs, outputs: Outputs) -> int:
    return nbytes(*(inputs[name] for name in ("x", "slot", "size", "residual")), *outputs)


def _backward_floor(inputs: Inputs, outputs: Outputs, gradients: Outputs) -> int:
    """Count the upstream gradient, which is the residual's gradient itself and is read for x's."""
    merged, _ = outputs
    grad_x, _ = gradients
    return nbytes(inputs["slot"], inputs["size"], merged, grad_x)


def _make_learned(shape: Shape, generator: torch.Generator) -> Inputs:
    """Make patches and class token views of the tokens; no cluster is empty; a layer as it is initialised."""
    batch, patches, channels, clusters = shape.batch, shape.patches, shape.channels, shape.kept
    device = generator.device
    tokens = randn(generator, shape.dtype, batch, shape.tokens, channels)
    label = torch.randint(clusters, (batch, patches), generator=generator, device=device)
    label[:, :clusters] = torch.arange(clusters, device=device)
    shuffle = torch.rand(batch, patches, generator=generator, device=device).argsort(dim=1)
    return {
        "x": tokens[:, 1:],
        "slot": label.gather(1, shuffle),
        "num_out": clusters,
        "weight": 0.02 * randn(generator, shape.dtype, 1, channels),
        "bias": torch.zeros(1, dtype=shape.dtype, device=device),
        "eps": 1e-6,
        "head": tokens[:, :1],
    }


def _call_learned(*, weight: torch.Tensor, bias: torch.Tensor, **arguments: Any) -> Outputs:
    return ops.merge_tokens(log_size=(weight, bias), **arguments)


def _plain_learned(inputs: Inputs) -> Outputs:
    """Take the layer's exponential, in float32 at least, and add weighted rows up at flat indices over all images."""
    x, clusters = inputs["x"], inputs["num_out"]
    batch, _, channels = x.shape
    score = F.linear(x, inputs["weight"], inputs["bias"])
    size = score.to(torch.promote_types(x.dtype, torch.float32)).exp().flatten(0, 1)
    flat = (inputs["slot"] + clusters * torch.arange(batch, device=x.device).unsqueeze(1)).flatten()
    total = size.new_zeros(batch * clusters, 1).index_add(0, flat, size)
    rows = size / (total + inputs["eps"])[flat] * x.flatten(0, 1)
    merged = rows.new_zeros(batch * clusters, channels).index_add(0, flat, rows).view(batch, clusters, channels)
    return torch.cat([inputs["head"], merged.to(x.dtype)], dim=1), total.view(batch, clusters).detach()


def _floor_learned(inputs: Inputs, outputs: Outputs) -> int:
    return nbytes(*(inputs[name] for name in ("x", "slot", "weight", "bias", "head")), *outputs)


def _backward_floor_learned(inputs: Inputs, outputs: Outputs, gradients: Outputs) -> int:
    """Count the upstream gradient without the head's part, which is the head's gradient itself."""
    upstream = outputs[0][:, inputs["head"].shape[1] :]
    grad_x, grad_weight, _ = gradients
    return nbytes(upstream, *(inputs[name] for name in ("x", "slot", "weight", "bias")), grad_x, grad_weight)


MERGE_TOKENS = Primitive(
    "merge_tokens",
    make=_make,
    call=_call,
    plain=_plain,
    floor=_floor,
    gradients=("x", "residual"),
    backward_floor=_backward_floor,
)
MERGE_TOKENS_NORM = with_norm(MERGE_TOKENS, _call)
MERGE_TOKENS_LEARNED = Primitive(
    "merge_tokens_learned",
    make=_make_learned,
    call=_call_learned,
    plain=_plain_learned,
    floor=_floor_learned,
    gradients=("x", "weight", "head"),  # the bias cancels out: its gradient is next to nothing
    backward_floor=_backward_floor_learned,
)
