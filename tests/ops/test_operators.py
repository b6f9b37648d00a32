"""Promises of every operator, by the reference and in general: derivatives, arguments, vmap, unchecked twins."""

import contextlib
import functools
import inspect

import numpy as np
import pytest
import torch

from fastreduce import ops
from fastreduce.ops import _library, unchecked
from tests.helpers.operators import CASES, DIFFERENTIABLE, as_arguments, flat, parameters, rows_of


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_of_the_reference(name):
    """PyTorch's fused attention on the CPU has none, which it says; its formula has."""
    case = CASES[name]
    values = case.arguments(b=1, h=1, n=4, c=2)
    leaves = tuple(values[one].requires_grad_() for one in case.differentiable)

    def run(*tensors):
        changed = {**values, **dict(zip(case.differentiable, tensors, strict=True))}
        return tuple(rows_of(case, getattr(ops, case.operator), changed, backend="reference"))

    with contextlib.ExitStack() as stack:
        if not case.twice:
            stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        assert torch.autograd.gradgradcheck(run, leaves, atol=1e-5)


class TestUncheckedTwins:
    def test_names(self):
        assert unchecked.__all__ == ops.__all__
        assert all(getattr(unchecked, name) is not getattr(ops, name) for name in ops.__all__)

    @pytest.mark.parametrize("operator", ops.__all__)
    def test_signatures(self, operator):
        """The same, but that the backend is required."""
        ours, theirs = (inspect.signature(getattr(room, operator)).parameters for room in (unchecked, ops))
        assert list(ours) == list(theirs)
        for name, parameter in ours.items():
            if name != "backend":
                assert (parameter.kind, parameter.default) == (theirs[name].kind, theirs[name].default), name
        assert ours["backend"].default is inspect.Parameter.empty
        assert ours["backend"].kind is inspect.Parameter.KEYWORD_ONLY

    @pytest.mark.parametrize("name", CASES)
    def test_results(self, name):
        case = CASES[name]
        values = as_arguments(case.arguments(dtype=torch.float32))
        found = flat(getattr(unchecked, case.operator)(**values, backend="reference"))
        expected = case.call(values, backend="reference")
        assert len(found) == len(expected)
        assert all(map(torch.equal, found, expected))

    def test_gradients(self):
        x = torch.randn(1, 5, 4, requires_grad=True)
        unchecked.gather_tokens(x, torch.tensor([[0, 2]]), backend="reference").sum().backward()
        assert x.grad.sum() == 12


def _numbers():
    """List case, argument and value of every number that an operator takes."""
    for name, case in CASES.items():
        for argument, value in case.arguments().items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                yield name, argument


_KINDS = {
    "numpy": lambda value: np.int64(value) if isinstance(value, int) else np.float32(value),
    "numpy without an axis": lambda value: np.array(value),
    "tensor": lambda value: torch.tensor(value),
}


class TestArguments:
    @pytest.mark.parametrize("kind", _KINDS)
    @pytest.mark.parametrize(("name", "argument"), list(_numbers()))
    def test_every_kind_of_number_is_one(self, name, argument, kind):
        case = CASES[name]
        values = case.arguments(dtype=torch.float32)
        number = _KINDS[kind](values[argument])
        plain = as_arguments({**values, argument: number.item()})
        expected = case.call(plain, backend="reference")
        found = case.call(as_arguments({**values, argument: number}), backend="reference")
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize(("name", "argument"), list(_numbers()))
    def test_what_is_no_number_is_quoted(self, name, argument):
        case = CASES[name]
        values = case.arguments(dtype=torch.float32)
        whole = isinstance(values[argument], int)
        wrong = ["three", True, np.bool_(True), torch.ones(2), torch.tensor(True), 1j, [1], object()]
        wrong += [2.0, np.float32(2), torch.tensor(2.0)] if whole else []
        for value in wrong:
            with pytest.raises(TypeError, match=rf"{argument} must be an? (integer|number), got"):
                case.call(as_arguments({**values, argument: value}))
        for value in [-1] if whole else [float("nan"), float("inf"), np.float32("nan")]:
            with pytest.raises(ValueError, match=rf"{argument} must be .*, got"):
                case.call(as_arguments({**values, argument: value}))

    @pytest.mark.parametrize("name", CASES)
    def test_whatever_is_wrong_is_named(self, name):
        """An argument of another type, dtype, shape or device, or None: an error that names it, or a result."""
        case = CASES[name]
        values = as_arguments(case.arguments(dtype=torch.float32))
        for argument in parameters(case.operator):
            original = values.get(argument)
            wrong = [None, "x", 1.5, object(), [1.0], (), torch.ones(()), torch.ones(1, 1, 1, 1, 1), torch.ones(7, 3)]
            if isinstance(original, torch.Tensor):
                wrong += [original.to("meta"), original.to(torch.complex64), original.bool(), original[..., :-1]]
                wrong += [original[None], original.numpy(), original.tolist(), original.to(torch.int8)]
                wrong += [original.double() if original.is_floating_point() else original.float()]
            if isinstance(original, tuple):
                wrong += [original[:1], (*original, *original), (None, None), original[0], tuple(map(str, original))]
            for value in wrong:
                try:
                    case.call({**values, argument: value}, backend="reference")
                except (TypeError, ValueError) as error:
                    if not _explains(str(error), argument):
                        pytest.fail(f"{argument}={value!r}: {error}")
                except IndexError:  # values are not checked: fewer columns than the offsets say
                    if (name, argument) != ("gather_packed", "index"):
                        raise

    def test_an_unknown_backend_is_quoted(self):
        with pytest.raises(ValueError, match="3"):
            ops.select_topk(torch.rand(1, 2), 1, backend=3)


def _explains(message, argument):
    """Return whether it names the argument, or is one of ours about the relation of two."""
    ours = ("must be", "must have", "exclude", "goes with", "need", "takes", "got")
    named = argument in message or any(word in message for word in ours)
    return named and "object has no attribute" not in message and "aten::" not in message


_NOT_IN_TURN = {
    "attention of packed images",
    "cls_value_scores_packed",
    "gather_packed",
    "linear_packed",
    "token_offsets",
}
_NOT_IN_TURN |= {"unpack_tokens"}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", [name for name in CASES if name not in _NOT_IN_TURN])
def test_vmap_over_images(name):
    """``vmap``, and gradients of every image by itself, as the whole batch gives them."""
    case, batch = CASES[name], 5
    values = case.arguments(b=batch, dtype=torch.float64)
    mapped = [one for one, value in values.items() if isinstance(value, torch.Tensor) and value.shape[0] == batch]

    def single(*images, **changed):
        arguments = {**values, **{one: image[None] for one, image in zip(mapped, images, strict=True)}, **changed}
        return flat(getattr(ops, case.operator)(**as_arguments(arguments)))

    images = [values[one] for one in mapped]
    expected = case.call(as_arguments(values))
    for ours, theirs in zip(torch.func.vmap(single)(*images), expected, strict=True):
        torch.testing.assert_close(ours.flatten(0, 1), theirs)
    wanted = tuple(place for place, one in enumerate(mapped) if one in case.differentiable)
    if not wanted:
        return

    def loss(*images):
        return sum(one.square().sum() for one in single(*images) if one.is_floating_point())

    each = torch.func.vmap(torch.func.grad(loss, argnums=wanted))(*images)
    leaves = [images[place].clone().requires_grad_() for place in wanted]
    whole = {**values, **{mapped[place]: leaf for place, leaf in zip(wanted, leaves, strict=True)}}
    sum(one.square().sum() for one in rows_of(case, getattr(ops, case.operator), whole)).backward()
    for ours, leaf in zip(each, leaves, strict=True):
        torch.testing.assert_close(ours, leaf.grad)


class _Cuda:
    """torch.cuda, as far as a launch asks for it."""

    def __init__(self, current):
        self.current, self.entered = current, []

    def current_device(self):
        return self.current

    @contextlib.contextmanager
    def device(self, index):
        self.entered.append(index)
        before, self.current = self.current, index
        try:
            yield
        finally:
            self.current = before


class _On(torch.Tensor):
    """A tensor that says which GPU it lies on."""

    @staticmethod
    def at(index):
        tensor = torch.zeros(2).as_subclass(_On)
        tensor.index = index
        return tensor

    def get_device(self):
        return self.index


class TestDeviceGuard:
    @pytest.mark.parametrize(("current", "lies", "entered"), [(0, 0, []), (0, 1, [1]), (1, 0, [0]), (2, -1, [])])
    def test_a_launch_happens_on_the_device_of_its_tensors(self, monkeypatch, current, lies, entered):
        cuda = _Cuda(current)
        monkeypatch.setattr(_library.torch, "cuda", cuda)
        seen = []
        launch = _library._on_its_device(lambda *args: seen.append(cuda.current))
        launch(None, _On.at(lies), 3)
        assert cuda.entered == entered
        assert seen == [lies if lies >= 0 else current]
        assert cuda.current == current

    def test_the_device_is_left_on_an_error(self, monkeypatch):
        cuda = _Cuda(0)
        monkeypatch.setattr(_library.torch, "cuda", cuda)
        with pytest.raises(ZeroDivisionError):
            _library._on_its_device(lambda tensor: 1 / 0)(_On.at(1))
        assert cuda.current == 0

    def test_every_operator_is_guarded(self):
        """Both ways to a kernel go through the guard: the dispatcher's, and the direct one."""
        source = inspect.getsource(_library._define)
        assert source.count("_on_its_device") == 1
        assert "impl(name, launch" in source
        assert "return launch(*args)" in source

    def test_a_declared_operator(self, monkeypatch):
        """The signature is the schema, the result the fake; a launcher gets dense rows, and only what it takes."""
        seen = []

        @_library.operator(
            lambda *args: seen.append(args) or [args[0] + 1],
            lambda x, slot, k, extra=None: [x + k],
            name="of_a_test",
            dense="x extra",
            skip="slot",
        )
        def declared(
            x: torch.Tensor, slot: torch.Tensor, k: int, extra: torch.Tensor | None = None
        ) -> list[torch.Tensor]:
            return [x.new_empty(x.shape)]

        own = torch.ops.fastreduce.of_a_test.default
        assert (
            str(own._schema) == "fastreduce::of_a_test(Tensor x, Tensor slot, SymInt k, Tensor? extra=None) -> Tensor[]"
        )
        x, slot = torch.ones(2, 6)[:, ::2], torch.zeros(2)
        assert torch.equal(declared(x, slot, 3)[0], x + 3)
        torch.library.opcheck(own, (x, slot, 3), test_utils=("test_schema",))
        monkeypatch.setattr(_library, "_runs_here", lambda args: True)
        declared(x, slot, 3, None)
        ((first, *others),) = seen
        assert first.is_contiguous()
        assert others == [3, None]

    @pytest.mark.parametrize("name", CASES)
    def test_tensors_of_several_devices_are_refused(self, name):
        case = CASES[name]
        values = as_arguments(case.arguments(dtype=torch.float32))
        tensors = [one for one, value in values.items() if isinstance(value, torch.Tensor)]
        pairs = [one for one, value in values.items() if isinstance(value, tuple) and one != "longest"]
        for one in tensors if len(tensors) + len(pairs) > 1 else []:
            with pytest.raises(ValueError, match=r"is on (cpu|meta) and .* on (cpu|meta); they must be on one device"):
                case.call({**values, one: values[one].to("meta")}, backend="reference")
        for one in pairs:
            moved = tuple(part.to("meta") if isinstance(part, torch.Tensor) else part for part in values[one])
            with pytest.raises(ValueError, match="must be on one device"):
                case.call({**values, one: moved}, backend="reference")


class TestGroups:
    """The result of prepare_merge is an argument too."""

    X, SLOT = torch.randn(2, 6, 4), torch.tensor([[0, 1, 2, 1, 0, 2]] * 2)

    @pytest.mark.parametrize(
        ("kind", "message", "changed"),
        [
            (TypeError, "groups must be a pair of order and offsets, got int", lambda order, offsets: 3),
            (TypeError, "groups must be a pair .*, got tuple", lambda order, offsets: (order,)),
            (TypeError, "order of groups must be a tensor", lambda order, offsets: (None, offsets)),
            (
                TypeError,
                "order of groups must be int32, got torch.int64",
                lambda order, offsets: (order.long(), offsets),
            ),
            (ValueError, r"order of groups must have shape \(2, 6\), got", lambda order, offsets: (order[:1], offsets)),
            (ValueError, r"offsets of groups must have shape \(2, 4\)", lambda order, offsets: (order, offsets[:, 1:])),
            (
                ValueError,
                "slot is on cpu and order of groups on meta",
                lambda *both: tuple(one.to("meta") for one in both),
            ),
        ],
    )
    def test_refuses(self, kind, message, changed):
        groups = changed(*ops.group_slots(self.SLOT, 3))
        for call in (
            functools.partial(ops.merge_tokens, self.X, self.SLOT, 3),
            functools.partial(ops.merge_tokens, self.X, self.SLOT, 3, norm=(None, None, 1e-6)),
            functools.partial(ops.unmerge_tokens, self.X[:, :3], self.SLOT),
        ):
            with pytest.raises(kind, match=message):
                call(groups=groups)
