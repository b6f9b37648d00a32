"""Attention in every use: hidden keys, biased keys, chosen queries, packed images, and with scores of the keys."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from bench.primitives import DTYPES, Inputs, Other, Outputs, Primitive, Shape, nbytes, packed_qkv
from fastreduce import ops


def _make(shape: Shape, generator: torch.Generator) -> Inputs:
    """Make inputs in which seven of ten keys are seen, the class token always."""
    q, k, v = packed_qkv(shape, generator)
    policy = torch.rand(shape.batch, shape.tokens, generator=generator, device=generator.device) < 0.7
    policy[:, 0] = True
    return {"q": q, "k": k, "v": v, "policy": policy.to(shape.dtype)}


def _plain(inputs: Inputs) -> Outputs:
    """Build the whole matrix, its softmax with the policy in float32 at least, as the released code has it."""
    q, k, v, policy = inputs.values()
    tokens, wide = k.shape[2], torch.promote_types(q.dtype, torch.float32)
    logits = (q @ k.transpose(2, 3)) * k.shape[-1] ** -0.5
    seen = policy[:, None, None, :].to(wide)
    seen = seen + (1 - seen) * torch.eye(tokens, dtype=wide, device=q.device)
    grown = (logits - logits.amax(dim=-1, keepdim=True)).to(wide).exp() * seen
    weights = (grown + 1e-6 / tokens) / (grown.sum(dim=-1, keepdim=True) + 1e-6)
    return (weights.to(v.dtype) @ v,)


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [value for value in inputs.values() if isinstance(value, Tensor)]


def _floor(inputs: Inputs, outputs: Outputs) -> int:
    return nbytes(*_tensors(inputs), *outputs)


def _backward_floor(inputs: Inputs, outputs: Outputs, gradients: Outputs) -> int:
    """Count all inputs once more, the upstream gradient, and the gradients."""
    return nbytes(*_tensors(inputs), *outputs, *gradients)


class _Own(NamedTuple):
    """Rows that one program owns: queries of the forward pass and of q's gradient, keys of k's and v's."""

    forward: int
    grad_queries: int
    grad_keys: int


def _own(inputs: Inputs, scored: bool = False) -> _Own:
    from fastreduce.kernels._attention import attention_tiles

    with_options = scored or any(name in inputs for name in ("bias", "index", "offsets"))
    forward, grad_queries, grad_keys = attention_tiles(
        inputs["q"].shape[3], inputs["q"].dtype, aligned=True, with_options=with_options
    )
    return _Own(forward["BLOCK_M"], grad_queries["BLOCK_M"], grad_keys["BLOCK_N"])


def _tiled(inputs: Inputs) -> int:
    """Count Q and the result once; K, V and every head's copy of the policy or the bias once a tile of queries."""
    q, k, v, *of_keys = _tensors(inputs)
    sweeps = math.ceil(q.shape[2] / _own(inputs).forward)
    return 2 * nbytes(q) + sweeps * (nbytes(k, v) + q.shape[1] * nbytes(*of_keys))


def _goes_at_once(inputs: Inputs, queries: int) -> bool:
    """Return whether one program holds all queries of a head, and makes all gradients."""
    from fastreduce.kernels._attention import takes_whole, whole_tile

    q = inputs["q"]
    if "policy" in inputs or not takes_whole():
        return False
    return whole_tile(queries, q.shape[3], q.dtype, aligned=True) is not None


def _backward_tiled(inputs: Inputs, scored: bool = False) -> int:
    """Count K, V and the policy once a tile of queries, then Q and the upstream gradient once a tile of keys.

    Where all is done at once: Q, the upstream gradient, the result, K and V once.
    """
    q, k, v, *of_keys = _tensors(inputs)
    if not scored and _goes_at_once(inputs, q.shape[2]):
        return 3 * nbytes(q) + nbytes(k, v) + nbytes(q, k, v) + q.shape[1] * nbytes(*of_keys)
    own = _own(inputs, scored)
    over_keys = math.ceil(q.shape[2] / own.grad_queries)
    over_queries = math.ceil(k.shape[2] / own.grad_keys)
    others = (over_keys + 1) * q.shape[1] * nbytes(*of_keys)
    return (1 + over_queries) * 2 * nbytes(q) + (1 + over_keys) * nbytes(k, v) + nbytes(q, k, v) + others


def _policy_backward_tiled(inputs: Inputs) -> int:
    return _backward_tiled(inputs) + nbytes(inputs["policy"])


def _call(operator: Callable[..., Tensor] = ops.attention, **arguments: Any) -> Outputs:
    return (operator(**arguments),)


def _weights(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the whole matrix."""
    logits = (q @ k.transpose(2, 3)) * k.shape[-1] ** -0.5
    return (logits if bias is None else logits + bias[:, None, None, :]).softmax(dim=-1).to(q.dtype)


def _make_bias(shape: Shape, generator: torch.Generator) -> Inputs:
    """Make a bias: every token stands for up to four patches."""
    q, k, v = packed_qkv(shape, generator)
    size = torch.randint(1, 5, (shape.batch, shape.tokens), generator=generator, device=generator.device)
    return {"q": q, "k": k, "v": v, "bias": size.float().log()}


def _plain_bias(inputs: Inputs) -> Outputs:
    q, k, v, bias = inputs.values()
    return (_weights(q, k, bias) @ v,)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)


def _sdpa_bias(inputs: Inputs) -> Outputs:
    q, k, v, bias = inputs.values()
    return (_sdpa(q, k, v, bias.to(q.dtype)[:, None, None, :]),)


@torch.compile(dynamic=False)
def _flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return flex_attention(q, k, v, score_mod=lambda score, b, head, m, n: score + bias[b, n])


def _flex_bias(inputs: Inputs) -> Outputs:
    return (_flex(*inputs.values()),)


def _make_index(shape: Shape, generator: torch.Generator) -> Inputs:
    """Choose half of the patches, of which the last fifth is padding."""
    q, k, v = packed_qkv(shape, generator)
    noise = torch.rand(shape.batch, shape.patches, generator=generator, device=generator.device)
    index = noise.topk(shape.kept).indices
    index[:, shape.kept - shape.kept // 5 :] = 0
    return {"q": q, "k": k, "v": v, "index": index}


def _chosen(q: Tensor, index: Tensor) -> Tensor:
    rows = torch.nn.functional.pad(index + 1, (1, 0))
    return q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))


def _plain_index(inputs: Inputs) -> Outputs:
    q, k, v, index = inputs.values()
    return (_weights(_chosen(q, index), k) @ v,)


def _sdpa_index(inputs: Inputs) -> Outputs:
    q, k, v, index = inputs.values()
    return (_sdpa(_chosen(q, index), k, v),)


def _index_floor(inputs: Inputs, outputs: Outputs) -> int:
    _, k, v, index = inputs.values()
    return nbytes(k, v, index) + 2 * nbytes(*outputs)


def _index_backward_floor(inputs: Inputs, outputs: Outputs, gradients: Outputs) -> int:
    return _index_floor(inputs, outputs) + nbytes(*gradients)


def _index_bytes(inputs: Inputs) -> tuple[int, int, int]:
    """Return the number of queries, bytes of their rows, and of the index for every head."""
    q, index = inputs["q"], inputs["index"]
    queries = 1 + index.shape[1]
    return queries, nbytes(q) // q.shape[2] * queries, q.shape[1] * nbytes(index)


def _index_tiled(inputs: Inputs) -> int:
    queries, rows, index = _index_bytes(inputs)
    sweeps = math.ceil(queries / _own(inputs).forward)
    return 2 * rows + index + sweeps * nbytes(inputs["k"], inputs["v"])


def _index_backward_tiled(inputs: Inputs) -> int:
    """Count as without an index, of fewer queries; then their gradients are added up."""
    q, k, v, _ = inputs.values()
    queries, rows, index = _index_bytes(inputs)
    if _goes_at_once(inputs, queries):
        return 3 * rows + index + nbytes(k, v) + 2 * rows + nbytes(q, k, v)
    own = _own(inputs)
    over_keys = math.ceil(queries / own.grad_queries)
    over_queries = math.ceil(k.shape[2] / own.grad_keys)
    gradients = 2 * rows + nbytes(q, k, v)
    return (1 + over_queries) * (2 * rows + index) + (1 + over_keys) * nbytes(k, v) + gradients


def _make_packed(shape: Shape, generator: torch.Generator) -> Inputs:
    """Make images of which each keeps fewer tokens than the one before; an eighth of the rows is past the end."""
    lengths = [shape.tokens - image * shape.tokens // (2 * shape.batch) for image in range(shape.batch)]
    bounds = [0, *itertools.accumulate(lengths)]
    one = Shape(shape.model, bounds[-1] + bounds[-1] // 8, 1, shape.dtype)
    q, k, v = packed_qkv(one, generator)
    offsets = torch.tensor(bounds, dtype=torch.int32, device=generator.device)
    return {"q": q, "k": k, "v": v, "offsets": (offsets, offsets), "longest": (shape.tokens, shape.tokens)}


def _lengths(inputs: Inputs) -> list[int]:
    return inputs["offsets"][0].diff().tolist()


def _plain_packed(inputs: Inputs) -> Outputs:
    """Attend image by image."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    lengths = _lengths(inputs)
    sizes = [*lengths, q.shape[2] - sum(lengths)]
    pieces = [_weights(a, b) @ c for a, b, c in zip(*(t.split(sizes, 2)[:-1] for t in (q, k, v)), strict=True)]
    return (torch.nn.functional.pad(torch.cat(pieces, 2), (0, 0, 0, sizes[-1])),)


def _packed_floor(inputs: Inputs, outputs: Outputs) -> int:
    row = nbytes(inputs["q"]) // inputs["q"].shape[2]
    return 3 * row * sum(_lengths(inputs)) + nbytes(*outputs)


def _packed_backward_floor(inputs: Inputs, outputs: Outputs, gradients: Outputs) -> int:
    row = nbytes(inputs["q"]) // inputs["q"].shape[2]
    return 4 * row * sum(_lengths(inputs)) + nbytes(*gradients)


def _packed_tiled(inputs: Inputs) -> int:
    """Count every image alone, and the result's rows, all of them."""
    q = inputs["q"]
    row, own = nbytes(q) // q.shape[2], _own(inputs).forward
    return nbytes(q) + row * sum(length + 2 * length * math.ceil(length / own) for length in _lengths(inputs))


def _packed_backward_tiled(inputs: Inputs) -> int:
    q = inputs["q"]
    row, own = nbytes(q) // q.shape[2], _own(inputs)
    if _goes_at_once(inputs, max(_lengths(inputs))):
        return 3 * nbytes(q) + 5 * row * sum(_lengths(inputs))
    read = 0
    for length in _lengths(inputs):
        sweeps = math.ceil(length / own.grad_queries) + math.ceil(length / own.grad_keys)
        read += (4 + 2 * sweeps) * length
    return 3 * nbytes(q) + row * read


def _make_plain(shape: Shape, generator: torch.Generator) -> Inputs:
    q, k, v = packed_qkv(shape, generator)
    return {"q": q, "k": k, "v": v}


def _scores(kind: str) -> tuple[Callable[..., Outputs], Callable[[Inputs], Outputs], Callable[[Inputs], Outputs]]:
    """List ours, the whole matrix, and PyTorch's attention beside our small kernel for the scores alone."""
    call: Callable[..., Outputs] = ops.attention_cls_scores if kind == "class" else ops.attention_received_scores

    def plain(inputs: Inputs) -> Outputs:
        q, k, v = inputs.values()
        weights = _weights(q, k)
        return weights @ v, weights[:, :, 0, 1:].mean(1) if kind == "class" else weights.sum((1, 2))

    def apart(inputs: Inputs) -> Outputs:
        q, k, v = inputs.values()
        return _sdpa(q, k, v), ops.cls_scores(q[:, :, 0], k) if kind == "class" else ops.received_scores(q, k)

    return call, plain, apart


def _class_tiled(inputs: Inputs) -> int:
    return _tiled(inputs) + nbytes(inputs["k"])


def _class_backward_tiled(inputs: Inputs) -> int:
    return _backward_tiled(inputs, scored=True) + nbytes(inputs["k"])


def _received_tiled(inputs: Inputs) -> int:
    """Count K once more, and Q once a tile of keys."""
    q, k = inputs["q"], inputs["k"]
    return _tiled(inputs) + nbytes(k) + math.ceil(k.shape[2] / _own(inputs).forward) * nbytes(q)


def _received_backward_tiled(inputs: Inputs) -> int:
    """Count K once more a tile of queries."""
    q, k = inputs["q"], inputs["k"]
    over_keys = math.ceil(q.shape[2] / _own(inputs, scored=True).grad_queries)
    return _backward_tiled(inputs, scored=True) + over_keys * nbytes(k)


_COMMON: dict[str, Any] = {"floor": _floor, "gradients": ("q", "k", "v"), "backward_floor": _backward_floor}

ATTENTION_POLICY = Primitive(
    "attention_policy",
    make=_make,
    call=functools.partial(_call, ops.attention_policy),
    plain=_plain,
    **(_COMMON | {"gradients": ("q", "k", "v", "policy")}),
    tiled=_tiled,
    backward_tiled=_policy_backward_tiled,
)
ATTENTION_BIAS = Primitive(
    "attention_bias",
    make=_make_bias,
    call=_call,
    plain=_plain_bias,
    **_COMMON,
    tiled=_tiled,
    backward_tiled=_backward_tiled,
    others={"sdpa": Other(_sdpa_bias), "flex": Other(_flex_bias, on_cpu=False, compiles=True)},
)
ATTENTION_INDEX = Primitive(
    "attention_index",
    make=_make_index,
    call=_call,
    plain=_plain_index,
    floor=_index_floor,
    gradients=("q", "k", "v"),
    backward_floor=_index_backward_floor,
    tiled=_index_tiled,
    backward_tiled=_index_backward_tiled,
    others={"sdpa": Other(_sdpa_index)},
)
ATTENTION_PACKED = Primitive(
    "attention_packed",
    make=_make_packed,
    call=functools.partial(_call, ops.attention_packed),
    plain=_plain_packed,
    floor=_packed_floor,
    gradients=("q", "k", "v"),
    backward_floor=_packed_backward_floor,
    tiled=_packed_tiled,
    backward_tiled=_packed_backward_tiled,
)
_call_class, _plain_class, _apart_class = _scores("class")
ATTENTION_CLASS = Primitive(
    "attention_cls_scores",
    make=_make_plain,
    call=_call_class,
    plain=_plain_class,
    **_COMMON,
    tiled=_class_tiled,
    backward_tiled=_class_backward_tiled,
    others={"sdpa": Other(_apart_class)},
)
_call_received, _plain_received, _apart_received = _scores("received")
ATTENTION_RECEIVED = Primitive(
    "attention_received_scores",
    make=_make_plain,
    call=_call_received,
    plain=_plain_received,
    **_COMMON,
    tiled=_received_tiled,
    backward_tiled=_received_backward_tiled,
    others={"sdpa": Other(_apart_received)},
)


HEAD_DIMS = (32, 48, 64, 80, 96, 128)


def _launch(head_dim: int, dtype: torch.dtype, aligned: bool, call: str, bias: str, used: Sequence[str]) -> None:
    """Launch forward and backward of one use, on zeros; unaligned rows lie an odd number of elements apart."""
    images, tokens = 1 if "offsets" in used else 2, 197

    def heads(rows: int) -> Tensor:
        return torch.zeros(images, rows, 6, head_dim + (not aligned), dtype=dtype)[..., :head_dim].transpose(1, 2)

    options: dict[str, Any] = {}
    if "index" in used:
        options["index"] = torch.zeros(3 if "offsets" in used else images, tokens // 2, dtype=torch.int64)
    if "offsets" in used:
        options |= {"offsets": tuple(torch.zeros(2, 4, dtype=torch.int32)), "longest": (tokens, tokens)}
    if len(used) == 2:
        options["num_out"] = tokens
    if bias:
        options["policy" if bias == "policy" else "bias"] = torch.zeros(images, tokens)
    leaves = [heads(tokens).requires_grad_() for _ in "qkv"]
    if bias in ("policy", "learned"):
        leaves.append(options["policy" if bias == "policy" else "bias"].requires_grad_())
    kind = "policy" if bias == "policy" else "packed" if "offsets" in used else call
    operators = {
        "": ops.attention,
        "policy": ops.attention_policy,
        "packed": ops.attention_packed,
        "class": ops.attention_cls_scores,
        "received": ops.attention_received_scores,
    }
    made = operators[kind](*leaves[:3], **options, backend="triton")
    outs = made if isinstance(made, tuple) else (made,)
    torch.autograd.grad(outs, leaves, [heads(outs[0].shape[2]), *map(torch.zeros_like, outs[1:])])


def every_launch() -> Iterator[tuple[str, torch.dtype, bool, Callable[[], None]]]:
    """Return all options at all head dimensions: what each is, dtype, whether rows are aligned to 16 bytes, launch.

    For the compile report, where no option may make a kernel spill.
    """
    uses: list[tuple[str, str, tuple[str, ...]]] = [("", "policy", ())]
    for bias in ("", "constant", "learned"):
        uses += [("", bias, used) for used in ((), ("index",), ("offsets",), ("index", "offsets"))]
        uses += [("class", bias, ()), ("received", bias, ())]
    for head_dim, dtype, aligned in itertools.product(HEAD_DIMS, DTYPES.values(), (True, False)):
        for call, bias, used in uses:
            words = (call, bias and f"{bias}-bias".replace("policy-bias", "policy"), *used)
            name = "-".join(("head", str(head_dim), "aligned" if aligned else "odd", *filter(None, words)))
            yield name, dtype, aligned, functools.partial(_launch, head_dim, dtype, aligned, call, bias, used)
