"""Everything that a user may have hung on a part of a model, tried on every part with every method.

``python -m tests.helpers.patch_cases --cases 10000`` tries so many cases drawn at random, and
``tests/models/test_patch_cases.py`` some of them.
A case changes one part of a model, before patching or after it, and asks of the reduced model: with a keep rate of 1
the outputs, gradients and calls of the part are those of the unreduced model with the same change; with 0.5 those
of the plain form; or it is refused, with an error that says why. A silent difference is a failure.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import fastreduce
from bench.proof import tiny
from fastreduce.plain import PlainModel

AT = (1, 2)
PARTS = (
    *("blocks", "block", "norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"),
    *("attn.qkv", "attn.q_norm", "attn.k_norm", "attn.attn_drop", "attn.norm", "attn.gate", "attn.proj"),
    *("attn.proj_drop", "mlp.fc1", "mlp.act", "mlp.fc2"),
)
INDEX = 2  # the block whose part is changed; a stage stands in it, and another before it
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "full": {"init_values": 0.5, "qk_norm": True, "scale_attn_norm": True, "reg_tokens": 2},
    "pooled": {"global_pool": "avg", "class_token": False},
}


class _Squash(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(2 * x)


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.25 * weight


def _parent(model: Any, part: str) -> tuple[Any, str]:
    if part == "blocks":
        return model, "blocks"
    if part == "block":
        return model.blocks, str(INDEX)
    block = model.blocks[INDEX]
    owner, _, name = part.rpartition(".")
    return (block.get_submodule(owner) if owner else block), name


def _part(model: Any, part: str) -> Any:
    owner, name = _parent(model, part)
    return getattr(owner, name, None) if not isinstance(owner, nn.Sequential) else owner[int(name)]


def _hook(module: nn.Module, calls: list[int]) -> None:
    def change(_: Any, __: Any, output: Any) -> Any:
        calls.append(1)
        return torch.tanh(2 * output)

    module.register_forward_hook(change)


def _token_hook(module: nn.Module, calls: list[int]) -> None:
    def change(_: Any, __: Any, output: Any) -> Any:
        calls.append(1)
        return output - output.mean(1, keepdim=True) if output.ndim == 3 else output

    module.register_forward_hook(change)


def _watch(module: nn.Module, calls: list[int]) -> None:
    module.register_forward_hook(lambda *_: calls.append(1))


def _pre_hook(module: nn.Module, calls: list[int]) -> None:
    def change(_: Any, inputs: Any) -> Any:
        calls.append(1)
        return (torch.tanh(2 * inputs[0]), *inputs[1:])

    module.register_forward_pre_hook(change)


def _kwargs_hook(module: nn.Module, calls: list[int]) -> None:
    module.register_forward_pre_hook(lambda _, inputs, kwargs: calls.append(1), with_kwargs=True)


def _backward_hook(module: nn.Module, calls: list[int]) -> None:
    def change(_: Any, grad_input: Any, grad_output: Any) -> Any:
        calls.append(1)
        return tuple(None if grad is None else 2 * grad for grad in grad_input)

    module.register_full_backward_hook(change)


def _backward_pre_hook(module: nn.Module, calls: list[int]) -> None:
    module.register_full_backward_pre_hook(lambda *_: calls.append(1))


def _own_forward(module: nn.Module, calls: list[int]) -> None:
    forward = module.forward

    def own(*inputs: Any, **options: Any) -> Any:
        calls.append(1)
        return 1.5 * forward(*inputs, **options)

    module.forward = own  # type: ignore[method-assign]


def _own_class(module: nn.Module, calls: list[int]) -> None:
    base: Any = type(module)

    class Own(base):
        def forward(self, *inputs: Any, **options: Any) -> Any:
            calls.append(1)
            return 1.5 * super().forward(*inputs, **options)

    module.__class__ = Own


def _parametrized(module: nn.Module, calls: list[int]) -> None:
    if isinstance(getattr(module, "weight", None), Tensor):
        parametrize.register_parametrization(module, "weight", _Doubled())


def _pruned(module: nn.Module, calls: list[int]) -> None:
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2:
        prune.l1_unstructured(module, "weight", amount=0.3)


def _frozen(module: nn.Module, calls: list[int]) -> None:
    module.requires_grad_(False)
    module.eval()


def _extras(module: nn.Module, calls: list[int]) -> None:
    module.register_buffer("own_buffer", torch.ones(3))
    module.register_parameter("own_parameter", nn.Parameter(torch.ones(2)))
    module.own_attribute = "kept"  # type: ignore[assignment]


CHANGES: dict[str, Callable[[nn.Module, list[int]], None]] = {
    "hook": _hook,
    "hook over tokens": _token_hook,
    "watch": _watch,
    "pre-hook": _pre_hook,
    "hook with kwargs": _kwargs_hook,
    "backward hook": _backward_hook,
    "backward pre-hook": _backward_pre_hook,
    "own forward": _own_forward,
    "own class": _own_class,
    "parametrized": _parametrized,
    "pruned": _pruned,
    "frozen": _frozen,
    "extras": _extras,
}
# Replacing a part altogether takes its owner: by another module, or by nothing where timm has nothing.
REPLACEMENTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "followed": lambda module: nn.Sequential(module, _Squash()),
    "identity": lambda module: nn.Identity(),
    "squashed": lambda module: _Squash(),
}


class Case(NamedTuple):
    """One part changed in one way, before or after patching with one method."""

    model: str
    part: str
    change: str
    before: bool
    method: str
    fused: bool
    train: bool
    rate: float


def all_cases() -> list[Case]:
    """Return every combination."""
    lists = (MODELS, PARTS, (*CHANGES, *REPLACEMENTS), (True, False), tiny.METHODS, (True, False), (True, False))
    return [Case(*values) for values in itertools.product(*lists, (1.0, 0.5))]


def _build(case: Case) -> Any:
    model = tiny.build(depth=4, img_size=32, patch_size=8, **MODELS[case.model]).train(case.train)
    for block in model.blocks:
        block.attn.fused_attn = case.fused
    return model


def _change(model: Any, case: Case, calls: list[int]) -> bool:
    """Change the part; False where the model has none, or it is not this one's to have."""
    part = _part(model, case.part)
    if part is None:
        return False
    if case.change in CHANGES:
        CHANGES[case.change](part, calls)
        return True
    if case.part in ("blocks", "block"):
        return False
    owner, name = _parent(model, case.part)
    setattr(owner, name, REPLACEMENTS[case.change](part).train(part.training))
    return True


def _run(model: Any, images: Tensor, calls: list[int], seed: int = 3) -> tuple[Tensor, Tensor | None, int]:
    """Return logits, the gradient of the images in training, and how often the part was called."""
    calls.clear()
    images = images.clone().requires_grad_(model.training)
    torch.manual_seed(seed)
    with torch.set_grad_enabled(model.training):
        logits = model(images)
        if model.training:
            logits.square().sum().backward()
    model.zero_grad()
    return logits.detach(), images.grad, len(calls)


def _close(found: Tensor | None, expected: Tensor | None, tolerance: float = 2e-4) -> bool:
    if found is None or expected is None:
        return found is expected
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1e-3))


class Outcome(NamedTuple):
    """Outcome of a case: ``kind`` is "same", "refused", "absent" (nothing to try) or "wrong"; ``why`` says more."""

    kind: str
    why: str = ""


def outcome(case: Case) -> Outcome:
    """Try a case."""
    rate, options = case.rate, dict(tiny.METHODS[case.method])
    idle = options["method"] not in tiny.NEVER_IDLE
    if rate == 1.0 and not idle:
        return Outcome("absent", "the method changes the model at a rate of 1 too")
    schedule: dict[str, Any] = {"at": AT, "keep_rate": rate}
    arguments = {**schedule, **options}
    unreduced, calls, reduced_calls = _build(case), [], []
    if not _change(unreduced, case, calls):
        return Outcome("absent", "the model has no such part")
    images = tiny.images(_build(case), seed=5)
    try:
        expected = _run(unreduced, images, calls)
    except Exception as error:
        return Outcome("absent", f"timm itself does not run this: {error}")
    model = _build(case)
    try:
        if case.before:
            _change(model, case, reduced_calls)
        fastreduce.patch(model, **arguments)
        if not case.before:
            _change(model, case, reduced_calls)
        if list(model.reducers.parameters()):
            tiny.randomize(model.reducers, seed=7)
        found = _run(model, images, reduced_calls)
    except (TypeError, ValueError, AttributeError) as error:
        said = str(error)
        if isinstance(error, AttributeError) and "fastreduce.Tokens" not in said:
            return Outcome("wrong", f"AttributeError: {said}")
        return Outcome("refused", said) if len(said) > 20 else Outcome("wrong", f"an error that says little: {said}")
    if found[2] != expected[2]:
        return Outcome("wrong", f"the part is called {found[2]} times instead of {expected[2]}")
    if case.method == "dynamicvit" and case.train:
        return Outcome("same", "called as often; it decides by chance")
    if rate < 1.0:
        # The plain form does not call the first three and scores after the fourth; plain ATS projects kept rows only.
        unlike = case.part in ("blocks", "block", "attn", "attn.attn_drop")
        if unlike or (case.method == "ats" and case.change == "hook over tokens"):
            return Outcome("same", "called as often")
        expected = _plain(case, model, images)
    if not _close(found[0], expected[0]):
        return Outcome("wrong", f"logits differ by {(found[0] - expected[0]).abs().max():.1e}")
    return Outcome("same") if _close(found[1], expected[1]) else Outcome("wrong", "gradients differ")


def _plain(case: Case, model: Any, images: Tensor) -> tuple[Tensor, Tensor | None, int]:
    """Return what the plain form of the changed model gives."""
    calls: list[int] = []
    changed = _build(case)
    _change(changed, case, calls)
    layers = dict(copy.deepcopy(model.reducers).named_parameters())
    plain = PlainModel(changed, layers=layers, at=AT, keep_rate=case.rate, **tiny.METHODS[case.method]).train(
        case.train
    )
    return _run(plain, images, calls)


def main() -> int:
    """Try cases drawn at random and print every failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--refusals", action="store_true", help="print what was refused, and why")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    everything = all_cases()
    drawn = random.Random(arguments.seed).sample(everything, min(arguments.cases, len(everything)))
    began, counts = time.monotonic(), Counter()
    for case in drawn:
        found = outcome(case)
        counts[found.kind] += 1
        if found.kind == "wrong":
            print(f"{case}: {found.why}", flush=True)
        elif arguments.refusals and found.kind == "refused":
            print(f"{case}: {found}", flush=True)
    print(f"{len(drawn)} of {len(everything)} cases: {dict(counts)}, {time.monotonic() - began:.0f} s")
    return bool(counts["wrong"])


if __name__ == "__main__":
    sys.exit(main())
