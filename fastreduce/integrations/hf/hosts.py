"""Hugging Face's models: an encoder alone, with a head, or inside a model of images and text."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from ...reducers import ModelShape
from ...tokens import Tokens, compose_kept
from ..registry import Host, Looks, find_host, hosted, library_of, register_host
from . import parts as _parts
from .hidden_states import (
    PASS,
    forget_forwards,
    forget_masks,
    forget_passes,
    masked_pooling,
    watch_masks,
    watch_passes,
)
from .towers import Tower, holder_of, known_name, known_of, layers_at, library_class, owner_of, towers_in

__all__ = ["EncoderHost"]

assert _parts  # registers the layers

# Heads that take a mean over patches, and whether a norm comes before it.
_MEANS = {
    "CLIPForImageClassification": False,
    "MetaClip2ForImageClassification": False,
    "VideoMAEForVideoClassification": False,
    "Dinov2ForImageClassification": True,
    "Dinov2WithRegistersForImageClassification": True,
    "IJepaForImageClassification": True,
    "SiglipForImageClassification": True,
    "Siglip2ForImageClassification": True,
}
# Heads that look at the class token (and the distillation token) alone.
_BY_CLASS = frozenset(
    {"ViTForImageClassification", "ViTMSNForImageClassification", "VivitForVideoClassification"}
    | {"DeiTForImageClassification", "DeiTForImageClassificationWithTeacher", "ASTForAudioClassification"}
    | {"CLIPModel", "CLIPVisionModelWithProjection", "MetaClip2Model", "MetaClip2VisionModelWithProjection"}
)
# Models that look at what the encoder's own pooling by attention makes, and at no token.
_BY_POOLING = frozenset({"SiglipModel", "Siglip2Model", "Aimv2Model", "VisionTextDualEncoderModel"})
_WINDOWS, _HIERARCHY = "its windows need the full grid", "its hierarchy of grids needs every patch in its place"
_REASONS = dict.fromkeys(("swin", "swinv2", "donut-swin", "maskformer-swin", "sam", "sam_vision_model"), _WINDOWS)
_REASONS |= dict.fromkeys(("hiera", "pvt", "pvt_v2", "segformer", "cvt", "levit"), _HIERARCHY)
_REASONS |= {"vit_mae": "it leaves patches out itself, at random, before its layers"}


def _at(module: nn.Module, path: str) -> Any:
    """Return what a dotted path of attributes leads to."""
    found: Any = module
    for name in path.split(".") if path else ():
        found = found._modules[name]
    return found


class EncoderHost(Host):
    """``PreTrainedModel``, wherever there is one known encoder in it."""

    container = None

    def inside(self, model: Any) -> Any:
        """Return the model of transformers, which decides what is behind the layers."""
        return model

    def _kind(self, model: Any) -> str:
        """Return the name of the model's class, of a subclass that changes no forward that of the library's."""
        return library_class(type(self.inside(model))).__name__

    def _tower(self, model: Any) -> tuple[Any, Tower]:
        """Return the encoder, and what is known of its class."""
        path = model.__dict__.get("_path_to_tower")
        if path is None:
            _, tower, known = next(towers_in(model))
            return tower, known
        tower = _at(model, path)
        at_the_path = known_of(tower)
        assert at_the_path is not None
        return tower, at_the_path

    def check(self, model: Any) -> None:
        """Raise unless there is one encoder, and what is behind it can do with some of its tokens."""
        kind, found = self._kind(model), list(towers_in(model))
        if not found:
            raise TypeError(f"{kind} cannot be reduced: {self._obstacle(self.inside(model))}")
        if len(found) > 1:
            paths = [holder_of(model, path) for path, _, _ in found]
            inside = " and ".join(f"the {type(_at(model, path)).__name__} .{path}" for path in paths)
            raise TypeError(f"{kind} cannot be reduced: it has {inside}; give one of them")
        path, tower, known = found[0]
        owner_of(model, path, known)
        forget_forwards(tower)
        if kind.endswith(("ForMaskedImageModeling", "ForPreTraining")):
            raise TypeError(f"{kind} cannot be reduced: it reconstructs images, which needs every patch in its place")
        if kind == "VideoMAEForVideoClassification" and not self.inside(model).config.use_mean_pooling:
            raise TypeError(f"{kind} cannot be reduced: with use_mean_pooling=False it looks at the first patch alone")
        layers = _at(tower, layers_at(tower, known))
        if type(layers) is not nn.ModuleList:
            where = ".".join(filter(None, (path, layers_at(tower, known))))
            raise TypeError(
                f"{kind} cannot be reduced: its layers, .{where}, are a "
                f"{type(layers).__name__} where an nn.ModuleList is wanted"
            )

    def _obstacle(self, model: Any) -> str:
        """Say why there is no encoder to be reduced."""
        for path, inside in hosted(model):
            if not isinstance(find_host(inside), EncoderHost):
                return f"give the {type(inside).__name__} of {library_of(type(inside))} inside of it, .{path}"
        kind = getattr(getattr(model, "config", None), "model_type", "")
        return _REASONS.get(kind, "the reducers know none of the encoders of images, videos or sounds in it")

    def blocks(self, model: Any) -> Any:
        """Return the encoder's layers."""
        tower, known = self._tower(model)
        return _at(tower, layers_at(tower, known))

    def shape(self, model: Any) -> ModelShape:
        """Return depth, grid, prefix and width."""
        tower, known = self._tower(model)
        config = tower.config
        return ModelShape(
            depth=len(_at(tower, layers_at(tower, known))),
            grid=known.axes(config),
            prefix=self.prefix(model),
            has_class_token=known.leading > 0,
            channels=config.hidden_size,
        )

    def prefix(self, model: Any) -> int:
        """Return class and distillation tokens, and registers."""
        tower, known = self._tower(model)
        return known.leading + (getattr(tower.config, "num_register_tokens", 0) or 0)

    def has_class_token(self, model: Any) -> bool:
        """Return whether there is a class token."""
        return self._tower(model)[1].leading > 0

    def positions(self, model: Any) -> bool:
        """Return whether queries and keys are rotated."""
        return self._tower(model)[1].rotary

    def grid(self, model: Any, patches: int) -> tuple[int, int]:
        """Return the configuration's grid, if the pass at hand has as many patches."""
        tower, _ = self._tower(model)
        if known_name(type(tower)) == "Siglip2VisionModel":
            raise ValueError("every image brings its own grid to SigLIP 2, of which the layers do not know")
        return super().grid(model, patches)

    def looks(self, model: Any) -> Looks:
        """Return what the head looks at, or the pooling of the encoder itself."""
        kind = self._kind(model)
        if kind in _BY_CLASS:
            return "class"
        if kind in _MEANS or kind == "VJEPA2ForVideoClassification":
            return "patches"
        return "patches" if self._pools(model) else "tokens"

    def _pools(self, model: Any) -> bool:
        """Return whether the encoder itself pools by attention."""
        return getattr(self._tower(model)[0], "head", None) is not None

    def _is_within(self, model: Any) -> bool:
        """Return whether an encoder that pools is inside of a model that may look at its tokens all the same."""
        known = {*_MEANS, *_BY_POOLING, known_name(type(self._tower(model)[0]))}
        return self._pools(model) and known_name(type(self.inside(model))) not in known

    def weighs(self, model: Any) -> str | None:
        """Say why a pooling cannot leave rows out: only a mean can, that no norm comes before."""
        if self.looks(model) != "patches" or _MEANS.get(self._kind(model)) is False:
            return None
        return f"the pooling of {self._kind(model)}, by attention or behind a norm, cannot respect"

    def pooled_prefix(self, model: Any) -> int:
        """Return the class token, which means leave out."""
        return self._tower(model)[1].leading

    def _is_full(self, model: Any) -> bool:
        """Return whether what is behind the layers gets every patch: no head is known that could do with less."""
        tower, kind = self._tower(model)[0], self._kind(model)
        if known_name(type(tower)) == "VJEPA2Model":  # its predictor counts patches
            return kind != "VJEPA2ForVideoClassification"
        if kind == "Siglip2ForImageClassification":  # its mean is by the mask of the input's patches
            return True
        if known_name(type(tower)) == "IJepaModel" and getattr(tower, "pooler", None) is not None:  # of the first patch
            return True
        return model.reducers.hidden_states == "full" and (self.looks(model) == "tokens" or self._is_within(model))

    def asks_for_inputs(self, model: Any) -> bool:
        """Return whether dropped patches will be shown as they were."""
        return (model.reducers.fill == "last" and PASS.wanted) or (self._is_full(model) and self._fill(model) == "last")

    def _fill(self, model: Any) -> str:
        """Return what a dropped patch is where the model's own code gets every patch: not zero where that is a mean."""
        return "last" if self._kind(model) == "Siglip2ForImageClassification" else model.reducers.fill

    def finish(self, model: Any, tokens: Tokens) -> Tensor:
        """Return what the model's own code behind the layers gets."""
        if tokens.packing is not None:
            tokens = tokens.unpacked()
        if PASS.wanted:
            PASS.tokens = tokens
        full, merged = self._is_full(model), any(plan.merges for plan in tokens.plans)
        if full and self._is_within(model):
            if tokens.policy is not None:
                self.check_pooling(model, model.reducers.name)
            if not merged and len(tokens.plans) > 0:
                PASS.kept, PASS.valid = compose_kept(tokens.plans, tokens.batch), tokens.valid
        elif tokens.valid is not None and not full and masked_pooling(self._tower(model)[0]) is not None:
            if merged:
                return tokens.dense()  # every patch counts once, by the mask of the input
            PASS.valid = tokens.valid
            return tokens.x
        return tokens.dense(self._fill(model)) if full else super().finish(model, tokens)

    def is_checkpointing(self, model: Any) -> bool:
        """Return whether some layer runs again in the backward pass, which it does in training alone."""
        return any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in self.blocks(model))

    def check_checkpointing(self, model: Any) -> None:
        """Raise for reentrant checkpoints."""
        for layer in self.blocks(model):
            function = getattr(layer, "_gradient_checkpointing_func", None)
            if function is None or not getattr(layer, "gradient_checkpointing", False):
                continue
            if not isinstance(function, functools.partial) or function.keywords.get("use_reentrant", True):
                raise ValueError(
                    "reentrant gradient checkpointing would lose the gradients of a reduced model: enable it with "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}"
                )

    def install(self, model: Any) -> None:
        """Keep the way to the encoder, and let hidden states show the full grid."""
        path, tower, known = next(towers_in(model))
        object.__setattr__(model, "_path_to_tower", path)
        watch_masks(tower)
        watch_passes(_at(model, owner_of(model, path, known)), model)

    def remove(self, model: Any) -> None:
        """Undo :meth:`install`."""
        tower, known = self._tower(model)
        forget_masks(tower)
        forget_passes(_at(model, owner_of(model, model.__dict__["_path_to_tower"], known)))
        object.__delattr__(model, "_path_to_tower")


register_host("transformers.PreTrainedModel", EncoderHost())
for _name in ("CLIPVisionTransformer", "MetaClip2VisionTransformer"):  # no models of their own up to transformers 5.1
    register_host(f"transformers.{_name}", EncoderHost())
