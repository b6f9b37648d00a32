"""Packed tokens: kernels against references in the interpreter, under the sanitizer, and a whole model on them."""

import collections
import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

import fastreduce
from bench.proof import tiny
from fastreduce import ops
from fastreduce.kernels import linear_packed as products
from fastreduce.reference import linear_packed_backward
from tests.helpers.budget import assert_within_budget
from tests.helpers.inputs import DTYPES, seeded, tokens
from tests.ops.test_packed import ragged

BACKENDS = (("triton", None), ("reference", None), ("reference", torch.float64))
# patch tokens of every image, kept ones, prefix, channels
RAGGED = [((4, 6, 5), (3, 1, 5), 1, 24), ((2, 0, 3), (2, 0, 1), 0, 33), ((3,), (3,), 2, 1030), ((), (), 1, 8)]


def results(call, leaves, grad_rows=None):
    """Return output and gradients by the kernels, the reference, and the reference in float64."""
    made = []
    for backend, cast in BACKENDS:
        given = [leaf.to(cast or leaf.dtype).detach().requires_grad_() for leaf in leaves]
        out = call(*given, backend=backend)
        grad = tokens(*out.shape, dtype=leaves[0].dtype, seed=9).to(out.dtype)
        if grad_rows is not None:
            grad[:, grad_rows:] = 0.0
        made.append([out, *torch.autograd.grad(out, given, grad)])
    return zip(*made, strict=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("counts", "kept", "prefix", "channels"), RAGGED)
def test_gather_packed(counts, kept, prefix, channels, dtype):
    x, index, offsets, num_out, residual = ragged(counts, kept, prefix, channels, dtype)
    wide = torch.cat([x, x], dim=2)[..., :channels]

    def call(x, residual, backend):
        return ops.gather_packed(x, index, offsets, num_out=num_out, prefix=prefix, residual=residual, backend=backend)

    for triple in results(call, [x, residual], int(offsets[1][-1])):
        assert_within_budget(*triple)
    assert torch.equal(call(wide, residual, "triton"), call(x, residual, "triton"))
    index = torch.stack([index, index], dim=2)[..., 1].int()  # of any stride
    assert torch.equal(call(x, None, "triton"), call(x, None, "reference"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("counts", "longest"), [((3, 0, 4), 5), ((7,), 7), ((), 3), ((0, 0), 2)])
def test_unpack_tokens(counts, longest, dtype):
    offsets = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).int()
    x = tokens(1, sum(counts) + 1, 20, dtype=dtype)

    def call(x, backend):
        return ops.unpack_tokens(x, offsets, longest=longest, backend=backend)

    for kernel, reference, _ in results(call, [x]):
        assert torch.equal(kernel, reference)


@pytest.mark.parametrize("shape", [(0, 3), (1, 0), (3, 130), (70, 9)])
def test_token_offsets(shape):
    valid = torch.rand(*shape, 2, generator=seeded()) < 0.6
    for given in (valid[..., 0], valid[..., 0].contiguous()):
        assert torch.equal(ops.token_offsets(given, backend="triton"), ops.token_offsets(given, backend="reference"))


# rows, of which there are so many, ins, outs; 700 rows are summed in parts by float32, 48 channels fill no tile
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "real", "ins", "outs"),
    [(150, 67, 48, 144), (5, 5, 33, 7), (64, 0, 16, 16), (0, 0, 8, 8), (1030, 700, 16, 20)],
)
def test_linear_packed(rows, real, ins, outs, dtype):
    offsets = torch.tensor([0, real // 2, real], dtype=torch.int32)
    x, weight = tokens(1, rows, ins, dtype=dtype), tokens(outs, ins, dtype=dtype, seed=1)
    bias = tokens(outs, dtype=dtype, seed=2)

    def call(x, weight, bias, backend):
        return ops.linear_packed(x, weight, bias, offsets, backend=backend)

    for triple in results(call, [x, weight, bias]):
        assert_within_budget(*triple)
    spoilt = x.masked_fill((torch.arange(rows) >= real)[:, None], float("nan")).requires_grad_()
    out = ops.linear_packed(spoilt, weight.requires_grad_(), None, offsets, backend="triton")
    assert not out[:, real:].any()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), [spoilt, weight]))


@pytest.mark.parametrize(
    ("place", "programs"),
    [(0, ("packed_product_kernel", 3)), (1, ("packed_weight_kernel", 3)), (2, ("packed_weight_kernel", 1))],
)
def test_gradients_of_what_is_frozen_are_not_computed(place, programs, monkeypatch):
    launched, call = [], GridExecutor.__call__

    def launch(self, *args, **kwargs):
        launched.append((self.fn.__name__, math.prod(self.grid)))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    leaves = [tokens(1, 40, 150), tokens(33, 150, seed=1), tokens(33, seed=2)]
    leaves[place].requires_grad_()
    offsets, grad = torch.tensor([0, 35], dtype=torch.int32), tokens(1, 40, 33, seed=3)
    out = ops.linear_packed(*leaves, offsets, backend="triton")
    launched.clear()
    (alone,) = torch.autograd.grad(out, leaves[place], grad)
    assert launched == [programs]
    wanted = [place == other for other in range(3)]
    expected = linear_packed_backward(grad, *leaves[:2], offsets, wanted)
    torch.testing.assert_close(alone, expected[place], atol=1e-5, rtol=1e-5)
    assert [gradient.numel() for gradient in expected] == [alone.numel() * asked for asked in wanted]


def test_linear_packed_does_not_look_at_the_room_or_at_other_images():
    x, weight = tokens(1, 300, 32, dtype=torch.float16), tokens(24, 32, dtype=torch.float16, seed=1)
    whole = ops.linear_packed(x, weight, None, torch.tensor([0, 140, 290], dtype=torch.int32), backend="triton")
    alone = ops.linear_packed(x[:, :140], weight, None, torch.tensor([0, 140], dtype=torch.int32), backend="triton")
    assert torch.equal(whole[:, :140], alone)
    assert products.grad_weight_parts(384, 1152, 256 * 100, torch.float16) > 1
    assert products.grad_weight_parts(384, 1152, 511, torch.float16) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("counts", "head_dim", "prefix"), [((70, 1, 9), 64, 1), ((3, 5), 33, 2), ((), 8, 1)])
def test_scores(counts, head_dim, prefix, dtype):
    offsets = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).int()
    qkv = tokens(1, sum(counts) + 3, 3, 3, head_dim, dtype=dtype)
    qkv[:, sum(counts) :] = float("nan")  # what is behind the last image is not read
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    first, longest = q[0].index_select(1, offsets[:-1]).transpose(0, 1), max(counts, default=4) + 2
    ours, reference, exact = (
        ops.cls_value_scores_packed(
            *(t.to(cast or dtype) for t in (first, k, v)), offsets, longest, prefix=prefix, backend=backend
        )
        for backend, cast in BACKENDS
    )
    assert_within_budget(ours, reference, exact, steps=4)
    for b, count in enumerate(counts):
        assert not ours[b, max(count - prefix, 0) :].any()
        rows = slice(int(offsets[b]), int(offsets[b + 1]))
        alone = ops.cls_value_scores(first[b : b + 1], k[:, :, rows], v[:, :, rows], prefix=prefix, backend="triton")
        torch.testing.assert_close(ours[b, : count - prefix], alone[0], rtol=1e-5, atol=1e-5)


class _Asked(TorchDispatchMode):
    """Operators by which the host gets to know a number from the device, or a shape that depends on one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2"), name
        return function(*args, **(kwargs or {}))


def test_whole_model(monkeypatch):
    from triton.runtime.interpreter import GridExecutor

    launched, launch = collections.Counter(), GridExecutor.__call__

    def spy(self, *args, **kwargs):
        launched[self.fn.__name__.removesuffix("_kernel")] += 1
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", spy)
    base = tiny.build(img_size=48, global_pool="avg")
    images, results = tiny.images(base, 3), []
    for backend, trim, asked in (("triton", False, True), ("reference", None, False)):
        options = {"keep_rate": 0.7, "at": (1, 2), "packed": True, "trim": trim, "backend": backend}
        model = fastreduce.patch(copy.deepcopy(base), "ats", **options)
        with fastreduce.record(model) as seen:
            logits = model(images)
        logits.square().sum().backward()
        kept = [stage.kept_patches for stage in seen.stages]
        results.append((logits.detach(), kept, {name: value.grad for name, value in model.named_parameters()}))
        if asked:
            before = launched.copy()
            with torch.no_grad(), _Asked():
                model(images)
            # One a stage, of the tokens with their residual: queries are chosen where they are.
            assert (launched - before)["gather_packed"] == 2
    ours, expected = results
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-4, atol=1e-4)
    for one, other in zip(ours[1], expected[1], strict=True):
        assert torch.equal(one[:, : other.shape[1]], other)
        assert (one[:, other.shape[1] :] < 0).all()
    largest = max(value.abs().max() for value in expected[2].values())
    for name, value in expected[2].items():
        assert (ours[2][name] - value).abs().max() <= 1e-5 * largest, name
    assert launched.keys() >= {"token_offsets", "gather_packed", "scatter_packed", "packed_product", "packed_weight"}
