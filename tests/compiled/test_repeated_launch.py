"""Launches are repeated without their launcher, argument for argument as it would have launched them."""

import dataclasses
import gc
import itertools
import operator
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import triton
from torch.overrides import TorchFunctionMode
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bench.proof import idle
from fastreduce import ops
from fastreduce.kernels import _direct, _repeat, gather_tokens, received_scores, select_topk
from tests.compiled.launches import described, noting, tensors_of, workspaces
from tests.helpers.operators import CASES, as_arguments, flat

# Before their launches, between them or after them, they have PyTorch compute something.
BY_PYTHON = {
    "attention._triton_backward": "attention of chosen queries",
    "fuse_tokens.fuse_tokens_norm_backward": "fuse_tokens_norm",
    "gather_tokens._triton_backward": "gather_tokens",
    "gather_tokens._triton_norm_backward": "gather_tokens_norm",
    "merge_tokens.merge_tokens_norm_backward": "merge_tokens_norm",
    "sinkhorn_merge_backward.sinkhorn_merge_backward": "sinkhorn_merge",
}


@dataclasses.dataclass
class Call:
    """A call of a launcher.

    Attributes:
        name: of the launcher.
        repeated: whether the launcher itself was not called.
    """

    name: str
    args: tuple[Any, ...]
    result: Any
    repeated: bool


class Keeping(TorchFunctionMode):
    """Keeps all that PyTorch makes within the block, so that no address comes again."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.kept.append(function(*args, **(kwargs or {})))
        return self.kept[-1]


@pytest.fixture
def launches(monkeypatch):
    with noting(monkeypatch) as found:
        yield found


@pytest.fixture
def calls(launches, monkeypatch):
    """Compare every call of a launcher with what the launcher does by itself for the same arguments."""
    found: list[Call] = []
    call, launch = _repeat.Repeated.__call__, _direct._Direct._launch
    by_python = []

    def noted(self, *args, **options):
        by_python.append(self)
        return launch(self, *args, **options)

    def checked(self, *args):
        first, before = len(launches), len(by_python)
        with Keeping():
            result = call(self, *args)
            own, through = launches[first:], len(by_python) > before
            second = len(launches)
            expected = self.launcher(*args)
            theirs = launches[second:]
            same_launches(args, own, result, theirs, expected)
        found.append(Call(name_of(self), args, result, bool(own) and not through))
        return result

    monkeypatch.setattr(_repeat.Repeated, "__call__", checked)
    monkeypatch.setattr(_direct._Direct, "_launch", noted)
    return found


def name_of(repeated):
    place = repeated.launcher.__closure__[repeated.launcher.__code__.co_freevars.index("function")].cell_contents
    return f"{place.__module__.rpartition('.')[2]}.{place.__name__}"


def same_launches(args, own, result, theirs, expected):
    assert described(own, theirs, args, result) == described(theirs, theirs, args, expected)
    assert type(result) is type(expected)
    for ours, its in zip(tensors_of(result), tensors_of(expected), strict=True):
        assert (ours.shape, ours.stride(), ours.dtype, ours.device) == (its.shape, its.stride(), its.dtype, its.device)
        assert ours.is_inference() == its.is_inference()
        assert ours.data_ptr() != its.data_ptr() or not its.numel()
        assert not ours.requires_grad
    used = workspaces(own, theirs, args, result)
    spans = sorted(
        [*used, *((one.data_ptr(), one.data_ptr() + one.nbytes) for one in tensors_of(result) if one.numel())]
    )
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


def run(case, arguments, *, training):
    """Call an operator, and its gradient for gradients that are dense."""
    values = dict(arguments)
    if training:
        for name in case.differentiable:
            if values[name] is not None and values[name].is_floating_point():
                values[name] = values[name].clone().requires_grad_()
    results = flat(getattr(ops, case.operator)(**as_arguments(values), backend="triton"))
    rows = [one for one in results if one.requires_grad]
    if rows:
        wanted = [values[name] for name in case.differentiable]
        torch.autograd.grad(rows, wanted, [torch.randn_like(one) for one in rows], allow_unused=True)
    return results


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", CASES)
def test_every_operator_launches_the_same_again(calls, name, training):
    case = CASES[name]
    if training and not case.differentiable:
        pytest.skip("has no gradient")
    alive = []
    for dtype, shape in ((torch.float32, (2, 2, 9, 16)), (torch.bfloat16, (2, 4, 17, 16))):
        turns = []
        for _ in range(4):
            first = len(calls)
            values = case.arguments(*shape, dtype=dtype)
            alive.append((values, run(case, values, training=training)))
            turns.append(calls[first:])
        names = [[one.name for one in turn] for turn in turns]
        assert bool(names[0]) != ("members" in name)  # the reference's, on every device
        assert names == names[:1] * 4
        assert not any(one.repeated for turn in turns[:2] for one in turn)
        left = {one.name for turn in turns[2:] for one in turn if not one.repeated}
        assert left <= set(BY_PYTHON)


@pytest.mark.parametrize(
    "empty",
    [{"n": 0}, *(pytest.param(one, marks=pytest.mark.slow) for one in ({"n": 1}, {"b": 0}, {"h": 0}, {"c": 0}))],
    ids=str,
)
@pytest.mark.parametrize("name", CASES)
def test_empty_dimensions_launch_the_same_again(calls, name, empty):
    case = CASES[name]
    for _ in range(4):
        try:
            run(case, case.arguments(**empty, dtype=torch.float32), training=False)
        except ValueError:  # no such shape
            assert not calls


def test_what_is_left_to_python_is_named(calls):
    """The set above holds nothing that could be repeated."""
    for name in BY_PYTHON.values():
        for _ in range(3):
            run(CASES[name], CASES[name].arguments(2, 2, 9, 16, dtype=torch.float32), training=True)
    last = {one.name: one.repeated for one in calls}
    assert {name for name, repeated in last.items() if not repeated} == set(BY_PYTHON)


X, INDEX = torch.randn(2, 9, 16), torch.zeros(2, 4, dtype=torch.int64)


def gather(x=X, index=INDEX, **options):
    return ops.gather_tokens(x, index, **options, backend="triton")


def repeated_of(function):
    """Return what calls a launcher, new and with nothing kept."""
    return _repeat.Repeated(function)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"x": X.half()}, id="half"),
        pytest.param({"index": INDEX.int()}, id="int32"),
        pytest.param({"x": torch.randn(2 * 9 * 16 + 1)[1:].view(2, 9, 16)}, id="not-aligned"),
        pytest.param({"x": torch.randn(2, 9, 32)[:, :, :16]}, id="rows-of-wider"),
        pytest.param({"x": torch.randn(9, 2, 16).transpose(0, 1)}, id="batch-inside"),
        pytest.param({"x": torch.randn(2, 9, 15)}, id="odd-width"),
        pytest.param({"x": torch.randn(2, 8, 16)}, id="fewer-tokens"),
        pytest.param({"x": torch.nn.Parameter(X, requires_grad=False)}, id="parameter"),
        pytest.param({"index": INDEX[:, :3]}, id="fewer-kept"),
        pytest.param({"residual": torch.randn(2, 5, 16)}, id="residual"),
        pytest.param({"prefix": 0}, id="no-prefix"),
        pytest.param({"norm": (None, None, 1e-6)}, id="norm"),
        pytest.param({"norm": (None, None, 1e-5)}, id="norm-other-eps"),
        pytest.param({"norm": (torch.ones(16), None, 1e-6)}, id="norm-weight"),
    ],
)
def test_other_arguments_are_other_launches(calls, change):
    for _ in range(3):
        gather()
    for _ in range(3):
        gather(**change)
    gather()
    kept = ["x"] if isinstance(change.get("x"), torch.nn.Parameter) else []
    expected = [False, False, True] + ([True] * 3 if kept else [False, False, True]) + [True]
    assert [one.repeated for one in calls] == expected


def test_one_and_true_and_one_point_zero_are_three_keys(launches):
    seen = []
    launcher = repeated_of(lambda x, value: seen.append(value) or torch.empty_like(x))
    for value in (1, True, 1.0) * 2:
        launcher(X, value)
    assert len(launcher.kept) == 3
    assert [type(value) for value in seen] == [int, bool, float] * 2


def test_a_tensor_with_the_negative_bit_is_copied_every_time(launches, calls):
    """Its memory holds minus its values."""
    for _ in range(3):
        gather()
    negative = torch._neg_view(X)
    for _ in range(3):
        gather(negative)
    assert [one.repeated for one in calls] == [False, False, True] + [False] * 3
    assert {one.arguments[0] for one in launches[:-6]} == {X.data_ptr()}
    assert X.data_ptr() not in {one.arguments[0] for one in launches[-6:]}


def test_numbers_of_a_tuple_are_told_apart_too(launches):
    seen = []
    launcher = repeated_of(lambda x, values: seen.append(values) or torch.empty_like(x))
    for value in (1, True, 1.0) * 2:
        launcher(X, (value, 2))
    assert len(launcher.kept) == 3
    assert [type(value) for value, _ in seen] == [int, bool, float] * 2


def test_views_of_one_tensor_and_tensors_of_their_own_are_told_apart(calls):
    """Their shapes and strides are the same; an address must not be found by that of another input."""
    for packed in (True, True, True, False):
        one = [torch.randn(2, 9, 3, 2, 16) for _ in range(1 if packed else 3)]
        q, k, v = (one[place % len(one)].permute(2, 0, 3, 1, 4)[place] for place in range(3))
        ops.attention(q, k, v, backend="triton")
    assert [one.repeated for one in calls] == [False, False, True, True]


def test_one_tensor_given_twice_is_not_taken_for_two(calls):
    q, k = torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    for pair in ((q, q), (q, q), (q, k), (k, q), (k, k)):
        ops.received_scores(*pair, backend="triton")
    assert [one.repeated for one in calls] == [False, False, True, True, True]


def test_the_stream_is_asked_for_at_every_call(launches, monkeypatch):
    streams = iter(range(100, 200))
    monkeypatch.setattr(idle.IdleDriver, "get_current_stream", lambda self, device: next(streams))
    for _ in range(4):
        gather()
    assert len({one.stream for one in launches}) == 4


def test_every_device_has_launches_of_its_own(launches, calls, monkeypatch):
    """A kernel is loaded for one device, and the streams are that device's."""
    current = [0]
    monkeypatch.setattr(idle.IdleDriver, "get_current_device", lambda self: current[0])
    monkeypatch.setattr(idle.IdleDriver, "get_current_stream", lambda self, device: 100 + device)
    for device in (0, 0, 0, 1, 1, 1, 0):
        current[0] = device
        gather()
    assert [one.repeated for one in calls] == [False, False, True, False, False, True, True]
    assert [one.stream for one in launches[::2]] == [100, 100, 100, 101, 101, 101, 100]


def test_results_are_new_at_every_call(launches):
    results = [gather() for _ in range(5)]
    assert len({one.data_ptr() for one in results}) == 5
    assert len({one.untyped_storage()._cdata for one in results}) == 5


@pytest.mark.parametrize("inference", [False, True])
def test_results_are_inference_tensors_where_they_would_be(calls, inference):
    with torch.inference_mode(inference):
        results = [gather(norm=(None, None, 1e-6)) for _ in range(4)]
    assert calls[-1].repeated
    assert all(one.is_inference() == inference for result in results for one in result)


def test_what_is_kept_keeps_no_tensor_alive(launches):
    launcher = repeated_of(received_scores.received_scores)
    for _ in range(4):
        q, k = torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
        alive = [weakref.ref(one) for one in (q, k, launcher(q, k, 0.25))]
        del q, k
        assert [one() for one in alive] == [None] * 3
    (plan,) = launcher.kept.values()
    assert plan is not None


def test_compiled_kernels_are_kept_alive(launches):
    """Triton unloads a compiled kernel that nobody holds."""
    kernel = _direct._Direct(triton.jit(select_topk.sort_scores_kernel.kernel.fn))

    def launcher(scores):
        out = torch.empty(2, 3, dtype=torch.int64)
        kernel[(2,)](scores, out, 9, 3, (9, 1), BLOCK=32, num_warps=1)
        return out

    kept = repeated_of(launcher)
    scores = torch.randn(2, 9)
    for _ in range(3):
        kept(scores)
    ((own, *_),) = kernel.kept.values()
    compiled = weakref.ref(own)
    del own
    alive = []
    for cache in (kernel.device_caches, kernel.kept, kept.kept):
        cache.clear()
        gc.collect()
        alive.append(compiled() is not None)
    assert alive == [True, True, False]


def test_hooks_of_a_profiler_see_every_launch(launches, calls):
    for _ in range(3):
        gather()
    seen = []
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        gather()
        gather()
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    gather()
    assert [one.repeated for one in calls] == [False, False, True, False, False, True]


def test_hooks_of_a_kernel_are_called(launches):
    kernel = gather_tokens.gather_tokens_kernel.kernel
    for _ in range(3):
        gather()
    seen = []
    kernel.pre_run_hooks.append(lambda *args, **options: seen.append(1))
    try:
        gather()
    finally:
        kernel.pre_run_hooks.pop()
    assert seen == [1]


def test_what_a_profiler_saw_first_is_repeated_later(launches, calls):
    seen = []
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        for _ in range(3):
            gather()
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    for _ in range(3):
        gather()
    assert [one.repeated for one in calls] == [False] * 4 + [True] * 2


def test_a_harness_that_replaces_triton_sees_every_launch(launches, monkeypatch):
    for _ in range(3):
        gather()
    seen = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: seen.append(self))
    gather()
    gather()
    assert len(seen) == 2
    assert len(launches) == 3


def test_another_driver_has_launches_of_its_own(launches):
    launcher = repeated_of(select_topk.select_topk)
    scores = torch.randn(2, 9)
    for _ in range(3):
        launcher(scores, 3)
    before = driver.active
    with idle.idle_driver():
        assert driver.active is not before
        launcher(scores, 3)
        assert list(launcher.kept.values()) == [_repeat._SEEN]


def test_what_is_kept_is_bounded(launches, monkeypatch):
    monkeypatch.setattr(_repeat, "_MOST_KEPT", 3)
    launcher = repeated_of(select_topk.select_topk)
    for tokens in (8, 9, 10, 11, 12):
        for _ in range(3):
            launcher(torch.randn(2, tokens), 3)
        assert len(launcher.kept) <= 3


def test_more_images_than_a_launch_takes(launches):
    """Parts are put together by a copy, so the launcher is called every time."""
    launcher = repeated_of(select_topk.select_topk)
    scores = torch.randn(65_537, 3)
    for _ in range(3):
        assert launcher(scores, 2).shape == (65_537, 2)
    assert list(launcher.kept.values()) == [None]
    assert [one.grid[0] for one in launches] == [65_535, 2] * 3


KEPT = torch.randn(2, 9)


@pytest.mark.parametrize(
    "launcher",
    [
        lambda x: x.new_empty(2).zero_(),
        lambda x: torch.zeros(2),
        lambda x: x.sum(0),
        lambda x: -x,
        lambda x: x + 1,
        lambda x: x,
        lambda x: x.t(),
        lambda x: x.clone(),
        lambda x: x[torch.tensor([1, 0])],
        lambda x: torch.empty(3 if x[0, 0].item() > 2 else 2),
        lambda x: torch.empty(3 if bool(x[0, 0] > 2) else 2),
        lambda x: torch.empty(int(x.shape[0] + 0 * x[0, 0]), 9),
        lambda x: torch.full((2, 9), float(x.max())),
        lambda x: KEPT,
        lambda x: (torch.empty_like(x), x.abs()),
        lambda x: x.t().contiguous(),
        lambda x: torch.from_numpy(x.numpy().copy()),
    ],
)
def test_what_pytorch_computes_is_not_repeated(launches, launcher):
    kept = repeated_of(launcher)
    for turn in range(4):
        x = torch.full((2, 9), float(turn))
        result, expected = kept(x), launcher(x)
        for ours, theirs in zip(tensors_of(result), tensors_of(expected), strict=True):
            assert ours.shape == theirs.shape
    assert list(kept.kept.values()) == [None]


@pytest.mark.parametrize(
    "launcher",
    [
        lambda x, n: x[n],
        lambda x, n: x[n, 0],
        lambda x, n: x[:, n],
        lambda x, n: x[n:],
        lambda x, n: x[0:9:n],
        lambda x, n: x.select(0, n),
        lambda x, n: torch.select(x, 0, index=n),
        lambda x, n: x.narrow(0, n, 2),
        lambda x, n: x.narrow(0, 0, n),
        lambda x, n: x.transpose(0, n),
        lambda x, n: x.unbind(n),
        lambda x, n: x[:1].expand(n, 9),
        lambda x, n: torch.empty(n),
        lambda x, n: torch.empty(n, 9),
        lambda x, n: torch.empty((9, n)),
        lambda x, n: torch.empty(size=(9, n)),
        lambda x, n: torch.empty_strided((n, 9), (9, 1)),
        lambda x, n: x.new_empty(n, 9),
        lambda x, n: x.new_empty((9, n)),
        lambda x, n: x.new_empty(int(n)),
        lambda x, n: x.new_empty(operator.index(n)),
        lambda x, n: x.new_empty(len(range(n))),
        lambda x, n: x.new_empty([0, 1, 2, 3][n]),
        lambda x, n: x.new_empty(round(float(n))),
        lambda x, n: x.new_empty(2 if n else 3),
        lambda x, n: x.new_empty(n.tolist()),
        lambda x, n: x.new_empty(int(str(n.item()))),
        lambda x, n: x.new_empty(len(f"{n}")),
        lambda x, n: x.new_empty(int(np.asarray(n))),
        lambda x, n: x.new_empty(int(memoryview(n.numpy())[()])),
    ],
)
def test_what_a_number_in_a_tensor_decides_is_not_repeated(launches, launcher):
    """A view of it is not repeated either: its place is the number's, and would be taken for a constant."""

    def launching(x, n):
        found = launcher(x, n)
        view = found if isinstance(found, torch.Tensor) else found[0]
        out = torch.empty(2, 3, dtype=torch.int64)
        select_topk.sort_scores_kernel[(2,)](view, out, 9, 3, (9, 1), BLOCK=32, num_warps=1)
        return out

    kept = repeated_of(launching)
    for value in (1, 1, 1):
        try:
            kept(torch.randn(4, 9), torch.tensor(value))
        except TypeError:  # PyTorch takes no tensor there
            assert list(kept.kept.values()) == [_repeat._SEEN]
            return
    assert list(kept.kept.values()) == [None]


def test_a_kernel_s_argument_that_nobody_knows_is_not_repeated(launches):
    def launcher(x):
        out = torch.empty(2, 3, dtype=torch.int64)
        select_topk.sort_scores_kernel[(2,)](KEPT, out, 9, 3, (9, 1), BLOCK=32, num_warps=1)
        return out

    kept = repeated_of(launcher)
    for _ in range(3):
        kept(X)
    assert list(kept.kept.values()) == [None]
    assert [one.arguments[0] for one in launches] == [KEPT.data_ptr()] * 3


def test_a_view_of_an_input_is_found_by_its_offset(launches):
    def launcher(x, y):
        out = torch.empty(2, 3, dtype=torch.int64)
        space = torch.empty(3, 40)
        first, _, last = space
        for scores in (x[1], y.narrow(0, 1, 1).squeeze(0), first, last[5:]):
            select_topk.sort_scores_kernel[(2,)](scores, out[1:], 9, 3, (9, 1), BLOCK=32, num_warps=1)
        return out

    kept = repeated_of(launcher)
    for _ in range(4):
        x, y = torch.randn(2, 2, 9), torch.randn(2, 2, 9)
        first = len(launches)
        out = kept(x, y)
        one, other, space, end = (launch.arguments[0] for launch in launches[first:])
        assert (one - x.data_ptr(), other - y.data_ptr(), end - space) == (72, 72, 4 * (2 * 40 + 5))
        assert {launch.arguments[1] for launch in launches[first:]} == {out.data_ptr() + 24}
    (plan,) = kept.kept.values()
    assert plan is not None


def test_workspaces_without_a_byte(launches):
    def launcher(x):
        out = torch.empty(2, 3, dtype=torch.int64)
        nothing = torch.empty(0, 5)
        select_topk.sort_scores_kernel[(2,)](x, out, 9, 3, (9, 1), BLOCK=32, num_warps=1)
        select_topk.sort_scores_kernel[(2,)](nothing, out, 9, 3, (9, 1), BLOCK=32, num_warps=1)
        return out

    kept = repeated_of(launcher)
    for _ in range(4):
        out = kept(X)
        assert [one.arguments[:2] for one in launches[-2:]] == [(X.data_ptr(), out.data_ptr()), (0, out.data_ptr())]
    (plan,) = kept.kept.values()
    assert plan is not None


def test_a_workspace_with_gaps_is_all_there(launches):
    def launcher(x):
        out = torch.empty(2, 3, dtype=torch.int64)
        for space in (torch.empty_strided((2, 9), (5000, 1)), torch.empty(9)):
            select_topk.sort_scores_kernel[(2,)](space, out, 9, 3, (9, 1), BLOCK=32, num_warps=1)
        return out

    kept = repeated_of(launcher)
    for _ in range(3):
        kept(X)
    gaps, other = (one.arguments[0] for one in launches[-2:])
    assert other - gaps >= 4 * 5009


def test_a_result_that_is_expanded_has_all_its_memory(launches):
    """As large as the allocation, but no such tensor may be allocated in its place."""

    def launcher(x):
        room = torch.empty(3, 3)
        select_topk.sort_scores_kernel[(2,)](x, room, 9, 3, (9, 1), BLOCK=32, num_warps=1)
        return room[0].expand(3, 3)

    kept = repeated_of(launcher)
    for _ in range(4):
        result = kept(X)
        assert (result.shape, result.stride()) == ((3, 3), (0, 1))
        assert result.untyped_storage().nbytes() == 36
    (plan,) = kept.kept.values()
    assert plan is not None


def test_results_that_are_views_of_one_allocation(launches):
    def launcher(x):
        first, second = torch.empty(2, 5, 4)
        return first, second.t(), first

    kept = repeated_of(launcher)
    for _ in range(4):
        first, second, again = kept(X)
        assert second.data_ptr() - first.data_ptr() == 80
        assert (first.stride(), second.stride(), second.shape) == ((4, 1), (1, 4), (4, 5))
        assert first.untyped_storage().data_ptr() == again.untyped_storage().data_ptr()
        assert first.data_ptr() == again.data_ptr()
    (plan,) = kept.kept.values()
    assert plan is not None


def test_a_list_stays_a_list_and_a_lone_tensor_alone(launches):
    for launcher in (lambda x: [torch.empty_like(x)], lambda x: (torch.empty_like(x),), torch.empty_like):
        kept = repeated_of(launcher)
        kinds = {type(kept(X)) for _ in range(4)}
        assert kinds == {type(launcher(X))}
        assert all(plan is not None for plan in kept.kept.values())


def test_kinds_of_arguments_that_nobody_knows_are_not_kept(launches):
    kept = repeated_of(lambda x, *others: torch.empty_like(x))
    for value in ([1, 2], (X,), object(), torch.float32):
        kept(X, value)
    assert not kept.kept


def test_an_error_leaves_nothing_behind(launches):
    def launcher(x):
        raise RuntimeError("no")

    kept = repeated_of(launcher)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="no"):
            kept(X)
    assert not _direct.is_recorded()
    assert list(kept.kept.values()) == [_repeat._SEEN]


def test_a_launcher_within_another_is_written_down_with_it(launches):
    inner = repeated_of(select_topk.select_topk)

    def launcher(scores):
        return inner(scores, 3), inner(scores, 2)

    outer = repeated_of(launcher)
    scores = torch.randn(2, 9)
    for _ in range(4):
        inner(scores, 3)
    before = len(launches)
    for _ in range(3):
        outer(torch.randn(2, 9))
    assert len(launches) - before == 6
    (plan,) = outer.kept.values()
    assert len(plan.launches) == 2


def test_threads_write_down_their_own(launches):
    """One thread launches while another writes down."""
    inside, done = threading.Event(), threading.Event()

    def launcher(scores):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert done.wait(30)
        return select_topk.select_topk(scores, 3)

    kept = repeated_of(launcher)
    scores = torch.randn(2, 9)
    kept(scores)
    thread = threading.Thread(target=lambda: kept(scores))
    thread.start()
    assert inside.wait(30)
    received_scores.received_scores(torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16), 0.25)
    done.set()
    thread.join(30)
    (plan,) = kept.kept.values()
    assert [kernel.__name__ for kernel in plan.kernels] == ["sort_scores_kernel"]


def test_allocation_where_pytorch_has_no_short_way(launches, monkeypatch):
    monkeypatch.delattr(torch._C._dynamo.guards, "_empty_strided_cpu")
    kept = repeated_of(select_topk.select_topk)
    for _ in range(4):
        result = kept(torch.randn(2, 9), 3)
        assert (result.shape, result.dtype) == ((2, 3), torch.int64)


def test_compiled_and_recorded_calls_go_through_the_operator(launches, calls):
    """``make_fx`` sees one operator, as before."""
    from torch.fx.experimental.proxy_tensor import make_fx

    for _ in range(3):
        gather()
    graph = make_fx(lambda x, index: gather(x, index), tracing_mode="fake")(X, INDEX)
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert called[0] == "fastreduce.gather_tokens.default"
    assert len(calls) == 3
