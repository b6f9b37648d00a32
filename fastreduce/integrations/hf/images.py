"""A model of Hugging Face as the commands take models: images in, one tensor out, in timm's words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...tokens import Tokens
from ..registry import register_host
from .folders import answer_of
from .hosts import EncoderHost
from .plain import PlainView, wanted_options
from .towers import images_in, layers_at, towers_in

__all__ = ["ImageModel", "head_of", "hold_input"]

# What a head is called that turns features into logits; its input is what fidelity compares.
_HEADS = ("classifier", "cls_classifier")
_LAST_NORMS = ("layernorm", "post_layernorm", "norm", "rms_norm")


class _Grid(NamedTuple):
    """The patches of an image, as timm's ``patch_embed`` tells of them."""

    grid_size: tuple[int, int]
    num_patches: int


class _Passed(NamedTuple):
    """Output of one pass: (B, C) for the head, and (B, classes) or None."""

    pooled: Tensor
    logits: Tensor | None


class ImageModel(nn.Module):
    """An encoder of images, alone or with a head, that takes a tensor and gives one.

    Args:
        model: of transformers; the parts of it are shared.
        config: what its images must be like, as :func:`~.folders.open_folder` tells.

    Attributes:
        model: the argument.
        input_config: the other argument.
        norm: the last norm of the encoder.

    Raises:
        TypeError: a model that cannot be reduced, that takes no images, or that gives neither logits nor an embedding.
    """

    reducers: Any

    def __init__(self, model: nn.Module, config: Mapping[str, Any]):
        super().__init__()
        self.model = model
        self.training = model.training
        self.input_config = dict(config)
        HOST.check(self)
        _, tower, known = next(towers_in(self))
        if not images_in(tower):
            raise TypeError(
                f"{type(model).__name__} takes no plain images, which the commands make: patch it in Python"
            )
        self._shape = HOST.shape(self)
        object.__setattr__(self, "_last_norm", _last_norm(tower, f"{layers_at(tower, known)}."))
        self._watching: dict[str, Any] | None = None
        with torch.no_grad():
            images = next(model.parameters()).new_zeros(1, *self.input_config["input_size"])
            answer_size = self(images).shape[1]
        self.num_classes = answer_size if self._has_logits else 0

    @property
    def blocks(self) -> Any:
        """The encoder's layers."""
        return HOST.blocks(self)

    @property
    def num_prefix_tokens(self) -> int:
        """Class, distillation and register tokens."""
        return self._shape.prefix

    @property
    def embed_dim(self) -> int:
        """The width of a token."""
        return self._shape.channels

    @property
    def cls_token(self) -> bool | None:
        """None without a class token."""
        return True if self._shape.has_class_token else None

    @property
    def patch_embed(self) -> _Grid:
        """The grid of patches."""
        rows, columns = self._shape.grid
        return _Grid((rows, columns), rows * columns)

    @property
    def global_pool(self) -> str:
        """``"token"``, or ``"avg"`` for a head that looks at patches."""
        return "avg" if HOST.looks(self) == "patches" else "token"

    @property
    def plain_mean(self) -> bool:
        """True if the head takes the mean over patches, with no norm before it."""
        return HOST.looks(self) == "patches" and HOST.weighs(self) is None

    @property
    def norm(self) -> nn.Module:
        """The last norm."""
        return self.__dict__["_last_norm"]

    @property
    def _has_logits(self) -> bool:
        return self._head() is not None

    def _head(self) -> Any:
        return head_of(self.model)

    def forward(self, images: Tensor) -> Tensor:
        """Turn images (B, 3, height, width) into (B, classes) logits, or (B, C) an embedding or the pooled token."""
        return self.answer(self.model(pixel_values=images))

    def answer(self, output: Any) -> Tensor:
        """Return what is asked for of the model's output; of tokens without a pooling the class token."""
        found = answer_of(output)
        if found.ndim == 3:
            if self.cls_token is None:
                raise TypeError(
                    f"{type(self.model).__name__} hands out its patches alone: one with a head or a pooling is wanted"
                )
            found = found[:, 0]
        if found.ndim != 2:
            raise TypeError(f"{type(self.model).__name__} gives {tuple(found.shape)}, where (B, C) is wanted")
        return found

    def forward_features(self, images: Tensor) -> Tensor:
        """Run it, like timm's method of this name."""
        return self(images)

    def forward_intermediates(
        self, images: Tensor, *, indices: Any, norm: bool, output_fmt: str, return_prefix_tokens: bool = False
    ) -> tuple[_Passed, list[Any]]:
        """Return what :meth:`forward_head` takes, and of the last layer (B, P, C) patches on the full grid, normed.

        With ``return_prefix_tokens`` a pair of the patches and of (B, prefix, C) the other tokens.
        """
        assert norm
        assert output_fmt == "NLC"
        assert list(indices) == [self._shape.depth - 1]
        seen = self._watching = {}
        handles = [self.blocks[-1].register_forward_hook(_hold_rows(seen))]
        if (head := self._head()) is not None:
            handles.append(head.register_forward_pre_hook(hold_input(seen)))
        try:
            answer = self(images)
        finally:
            self._watching = None
            for handle in handles:
                handle.remove()
        rows = seen["grid"] if "grid" in seen else self.norm(seen["rows"])
        prefix = self.num_prefix_tokens
        features = _Passed(seen.get("pooled", answer), answer if self._has_logits else None)
        return features, [(rows[:, prefix:], rows[:, :prefix]) if return_prefix_tokens else rows[:, prefix:]]

    def forward_head(self, features: _Passed, pre_logits: bool = False) -> Any:
        """Return what the head read in the pass that gave the features, or what it made of that."""
        return features.pooled if pre_logits else features.logits

    def block_options(self, images: Tensor) -> dict[str, Any]:
        """Return what the layers are called with beside the tokens of these images: tables of positions, no mask."""
        seen: dict[str, Any] = wanted_options(self.blocks[0])

        def hold(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            seen.update({name: value for name, value in kwargs.items() if name == "position_embeddings"})

        handle = self.blocks[0].register_forward_pre_hook(hold, with_kwargs=True)
        try:
            self(images)
        finally:
            handle.remove()
        return seen

    def plain(self) -> PlainView:
        """Return the unreduced model as the plain algorithms take it; parameters and buffers are shared."""
        if hasattr(self, "reducers"):
            raise ValueError("the plain form needs the unpatched model; call fastreduce.unpatch first")
        return PlainView(self)


def _last_norm(tower: nn.Module, layers: str) -> nn.Module:
    """Find the norm behind an encoder's layers."""
    for name, module in tower.named_modules():
        if name.rpartition(".")[2] in _LAST_NORMS and layers not in f"{name}.":
            return module
    return nn.Identity()


def _hold_rows(seen: dict[str, Any]) -> Callable[..., None]:
    def hold(module: nn.Module, args: Any, output: Any) -> None:
        seen["rows"] = output[0] if isinstance(output, tuple) else output

    return hold


def hold_input(seen: dict[str, Any]) -> Callable[..., None]:
    """Return a hook before a forward pass that keeps the first argument under ``pooled``."""

    def hold(module: nn.Module, args: Any) -> None:
        seen["pooled"] = args[0]

    return hold


def head_of(model: nn.Module) -> nn.Module | None:
    """Return what turns the features of a model of transformers into logits, or None."""
    return next((head for name in _HEADS if (head := model._modules.get(name)) is not None), None)


class _ImageHost(EncoderHost):
    """:class:`ImageModel`: the model in it decides."""

    def inside(self, model: Any) -> Any:
        """Return the model of transformers."""
        return model.model

    def finish(self, model: Any, tokens: Tokens) -> Tensor:
        """Return what the model's own code behind the layers gets, and keep the full grid for who asked for it."""
        if model._watching is not None:
            seen = tokens if tokens.packing is None else tokens.unpacked()
            model._watching["grid"] = seen.replace(model.norm(seen.x)).dense("zero")
        return super().finish(model, tokens)


HOST = _ImageHost()
register_host(ImageModel, HOST)
