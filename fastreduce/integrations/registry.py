"""Registers of the models and blocks that can be reduced: hosts and parts by class.

A library's own are added only once the user has it loaded.

A *host* knows one class of model; it has no state, and reads the model at every call. To bring another library:

1. ``integrations/LIBRARY/parts.py``: a :class:`~.parts.Parts` for each layout of block, and
   ``register_parts(BlockClass, parts)``;
2. ``integrations/LIBRARY/hosts.py``: a :class:`Host` for each class of model, and ``register_host(ModelClass, host)``;
3. name the library in :data:`LIBRARIES`: its bridge is imported when a model of that library is met.
"""

from __future__ import annotations

import abc
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import counted
from ..reducers import ModelShape
from ..tokens import Tokens
from .parts import Parts

__all__ = ["LIBRARIES", "Host", "find_host", "host_of", "parts_of", "register_host", "register_parts", "shape_of"]

# Top-level packages of models -> the module here that registers their hosts and parts.
LIBRARIES = {
    "open_clip": "fastreduce.integrations.open_clip.hosts",
    "timm": "fastreduce.integrations.timm.bridge",
    "transformers": "fastreduce.integrations.hf.hosts",
}

Looks = Literal["class", "patches", "tokens"]

_hosts: dict[type | str, Host] = {}
_parts: dict[type | str, Parts | Callable[[type], Parts]] = {}


class Host(abc.ABC):
    """Knowledge of one class of model that a reducer needs. Stateless: every method is given the model.

    Attributes:
        container: the attribute that holds the blocks, or None where :meth:`blocks` has to look further.
        needs_grid: whether what is behind the blocks needs every patch in its place.
    """

    container: str | None = "blocks"
    needs_grid: bool = False

    @abc.abstractmethod
    def check(self, model: Any) -> None:
        """Raise TypeError or ValueError, with what is in the way and what would work, unless the model is as known."""

    def blocks(self, model: Any) -> Any:
        """Return the container of the blocks, an nn.Sequential or nn.ModuleList."""
        return getattr(model, self.container or "")

    @abc.abstractmethod
    def shape(self, model: Any) -> ModelShape:
        """Return what a reducer may know of the model."""

    @abc.abstractmethod
    def prefix(self, model: Any) -> int:
        """Return the number of leading tokens that are never reduced."""

    @abc.abstractmethod
    def has_class_token(self, model: Any) -> bool:
        """Return whether the first token is a class token."""

    def positions(self, model: Any) -> bool:
        """Return whether blocks look at where a token is, so that ``Tokens.place`` is kept."""
        return False

    def grid(self, model: Any, patches: int) -> tuple[int, int]:
        """Return (rows, columns) of the pass at hand, which has so many patches; raise ValueError if not known."""
        shape = self.shape(model)
        if shape.patches != patches:
            raise ValueError(f"the grid of {counted(patches, 'patch')} is not known: the model's own is {shape.grid}")
        rows, columns = shape.grid
        return rows, columns

    def asks_for_inputs(self, model: Any) -> bool:
        """Return whether somebody will ask in the pass at hand what dropped patches were."""
        return self.needs_grid

    def keeps_every_patch(self, model: Any) -> bool:
        """Return whether no patch is dropped before the blocks, as patch dropout does in training."""
        return True

    @abc.abstractmethod
    def looks(self, model: Any) -> Looks:
        """Return what the model looks at behind its blocks.

        ``"class"``: prefix tokens alone. ``"patches"``: it pools over patches. ``"tokens"``: it hands out what is left.
        """

    def weighs(self, model: Any) -> str | None:
        """Say why a pooling over patches cannot leave rows out, for a refusal; None if it is a plain mean."""
        return None

    def pooled_prefix(self, model: Any) -> int:
        """Return how many leading tokens the pooling leaves out."""
        return self.prefix(model)

    def finish(self, model: Any, tokens: Tokens) -> Tensor:
        """Return what the model's own code behind the blocks gets: where it pools, each patch counts once."""
        if tokens.packing is not None:
            tokens = tokens.unpacked()
        if self.needs_grid:
            return tokens.dense("last")
        if self.looks(model) != "patches":
            return tokens.x
        if any(plan.weights is not None for plan in tokens.plans) and self.weighs(model) is None:
            return self._counted(model, tokens, tokens.mass())
        if any(plan.merges for plan in tokens.plans):
            return tokens.dense()
        present = tokens.valid if tokens.policy is None else tokens.policy
        if present is None:
            return tokens.x
        self.check_pooling(model, model.reducers.name)
        return self._counted(model, tokens, present[:, tokens.prefix :])

    def _counted(self, model: Any, tokens: Tokens, count: Tensor) -> Tensor:
        """Scale rows so that their mean, which divides by the number of rows, counts each patch token ``count`` times.

        ``count`` is (B, n); prefix tokens that are pooled count once.
        """
        outside = self.pooled_prefix(model)
        count = F.pad(count.to(tokens.x.dtype), (tokens.prefix - outside, 0), value=1.0)
        # Of no patch at all (DynamicViT in training) the mean is zero, not zero divided by zero.
        scale = count * (count.shape[1] / count.sum(1, keepdim=True).clamp_min(0.5))
        return tokens.x * F.pad(scale, (outside, 0), value=1.0).unsqueeze(-1)

    def check_pooling(self, model: Any, method: str) -> None:
        """Raise unless tokens that do not count can be kept out of what looks at the tokens behind the blocks."""
        if reason := self.weighs(model):
            raise ValueError(f"{method} keeps another number of tokens in every image, which {reason}")

    def is_checkpointing(self, model: Any) -> bool:
        """Return whether the model runs its blocks again in the backward pass of the pass at hand."""
        return False

    def check_checkpointing(self, model: Any) -> None:
        """Raise where the model's way of checkpointing would lose gradients of reduced blocks."""
        return None

    def install(self, model: Any) -> None:
        """Put what else a patched model needs on it (ways of calling that hand out features)."""
        return None

    def remove(self, model: Any) -> None:
        """Undo :meth:`install`."""
        return None


def register_host(kind: type | str, host: Host) -> None:
    """Let models of a class, and of subclasses without a host of their own, be reduced through ``host``.

    ``kind`` may be ``"library.ClassName"``, of a class that nobody needs to import for it.
    """
    _hosts[kind] = host


def register_parts(kind: type | str, parts: Parts | Callable[[type], Parts]) -> None:
    """Let blocks of a class (not of subclasses, which may have another forward) be done through ``parts``.

    ``kind`` may be ``"library.ClassName"``, as for :func:`register_host`. ``parts`` may be what makes them of the
    class, where versions of a library differ.
    """
    _parts[kind] = parts
    parts_of.cache_clear()


def library_of(kind: type) -> str:
    """Return the name of the top-level package of a class."""
    return kind.__module__.partition(".")[0]


def _load(kind: type) -> None:
    """Import the bridges of the libraries that a class comes from."""
    for base in kind.__mro__:
        library = library_of(base)
        if library in LIBRARIES and library in sys.modules:
            importlib.import_module(LIBRARIES[library])


def name_of(kind: type) -> str:
    """Return ``"library.ClassName"``."""
    return f"{library_of(kind)}.{kind.__name__}"


def find_host(model: object) -> Host | None:
    """Return the host of a model's class, or None where no library's bridge knows it."""
    kind = type(model)
    _load(kind)
    for base in kind.__mro__:
        if (host := _hosts.get(base) or _hosts.get(name_of(base))) is not None:
            return host
    return None


def hosted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules inside a model that a host knows, with the attributes that lead to them, outermost first."""
    for name, module in model.named_modules():
        if name and find_host(module) is not None:
            yield name, module


def host_of(model: object) -> Host:
    """Return the host of a model's class.

    Raises:
        TypeError: no host knows it; the message says what could be given instead.
    """
    host = find_host(model)
    if host is None:
        kind = type(model)
        raise TypeError(f"{kind.__name__} cannot be reduced: it is a {kind.__name__} of {kind.__module__}")
    return host


@functools.cache
def parts_of(kind: Any) -> Parts | None:
    """Return what blocks of a class are made of, or None where that is not known."""
    _load(kind)
    found = _parts.get(kind) or _parts.get(name_of(kind))
    return found if found is None or isinstance(found, Parts) else found(kind)


def shape_of(model: Any) -> ModelShape:
    """Return what a reducer may know of a model."""
    return host_of(model).shape(model)


def is_compiled(model: object) -> bool:
    """Return whether a model is what ``torch.compile`` made of one."""
    return isinstance(model, torch._dynamo.OptimizedModule)
