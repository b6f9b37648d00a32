"""Patch a timm Vision Transformer, and undo it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from timm.models import vision_transformer as vit
from torch import nn

from ...backends import check_backend
from ...config import read_config
from ...recording import is_patched, patched_model, reducer_of
from ...reducers import Reducer, make_reducer
from ...reducers.schedule import Keep, KeepRate
from .block import ReducedBlock, Site, check_block, check_pooling, reduced_block, shape_of
from .features import ForwardIntermediates
from .grid import forget_grid, watch_grid

__all__ = ["config_of", "patch", "reduced_counts", "set_keep_rate", "unpatch"]

_REASONS = {
    "Eva": "its attention uses rotary positions, which would be attached to the wrong tokens",
    "VisionTransformerRelPos": "its attention uses relative positions, which need the full grid",
    "Beit": "its attention uses relative positions, which need the full grid",
    "SwinTransformer": "its windows need the full grid",
    "SwinTransformerV2": "its windows need the full grid",
}


def _strange_model(model: nn.Module) -> str:
    """Say why a model that is not timm's VisionTransformer cannot be reduced, and what could be given instead."""
    kind = type(model)
    if kind.__name__ in _REASONS and kind.__module__.startswith("timm."):
        return _REASONS[kind.__name__]
    inside = [name for name, module in model.named_modules() if isinstance(module, vit.VisionTransformer)]
    if inside:
        return f"give the timm VisionTransformer inside of it, .{inside[0]}"
    return f"it is a {kind.__name__} of {kind.__module__}, not a VisionTransformer of timm.models.vision_transformer"


def _check_model(model: Any) -> None:
    """Raise, with the reason, unless every part of a model that a reducer relies on is the one it knows."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"a timm VisionTransformer is wanted, got {model!r}")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise ValueError("the model is compiled already: call fastreduce.patch first and torch.compile after it")
    if is_patched(model):
        name = reducer_of(model).name
        raise ValueError(f"the model is already patched with {name!r}; call fastreduce.unpatch(model) first")
    kind, base = type(model), vit.VisionTransformer
    if not isinstance(model, base):
        raise TypeError(f"{kind.__name__} cannot be reduced: {_strange_model(model)}")
    for method in ("forward_features", "forward_intermediates"):
        if getattr(kind, method) is not getattr(base, method) or method in vars(model):
            raise TypeError(f"{kind.__name__} cannot be reduced: it has a {method} of its own")
    if hasattr(model, "reducers"):
        raise ValueError(
            f"{kind.__name__} cannot be reduced: it has an attribute 'reducers' already "
            f"({type(model.reducers).__name__}), where the layers of the method would stand"
        )
    blocks = model.blocks
    if type(blocks).forward is not nn.Sequential.forward or "forward" in vars(blocks):
        raise TypeError(
            f"{kind.__name__} cannot be reduced: its {type(blocks).__name__} of blocks has a forward of its own"
        )


def _place_layers(reducer: Reducer, blocks: Sequence[nn.Module]) -> None:
    """Move the layers of every stage to the device and the dtype of the block that it stands in."""
    for layers in reducer.children():
        assert isinstance(layers, nn.ModuleList)  # one entry a stage
        for layer, index in zip(layers, reducer.blocks, strict=True):
            weight = next((p for p in blocks[index].parameters() if p.is_floating_point()), None)
            if weight is not None:
                layer.to(weight.device, weight.dtype)


Model = TypeVar("Model", bound=nn.Module)


def patch(
    model: Model,
    method: str | None = None,
    *,
    keep_rate: KeepRate = None,
    keep: Keep = None,
    at: int | Sequence[int] | None = None,
    backend: str = "auto",
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    **options: Any,
) -> Model:
    """Reduce the tokens of a timm Vision Transformer, in place.

    Weights, checkpoint keys and the calling interface stay as they are; :func:`unpatch` undoes it.

    Args:
        model: a timm ``VisionTransformer`` (DeiT, AugReg, DeiT-III, DINOv2, CLIP, SigLIP, ...).
        method: ``"topk"``, ``"evit"``, ``"dynamicvit"``, ``"ats"``, ``"tome"``, ``"kmedoids"``, ``"dpcknn"``,
            ``"sit"``, ``"patchmerger"``, ``"sinkhorn"`` or ``"radial"``. DynamicViT, DPC-KNN, SiT, PatchMerger and
            Sinkhorn add parameters, under ``model.reducers``, which have to be trained (or loaded:
            :func:`fastreduce.load_official`).
        keep_rate: a rate r: stage i keeps ``int(patches * r ** (i + 1))`` tokens; or a sequence of absolute fractions,
            one for each stage. In (0, 1]. The default is 0.7 (none for radial, whose default schedule is contiguous).
        keep: instead, the numbers of patch tokens kept, one for each stage.
        at: blocks at which the stages stand, from 0; the default is a quarter, half and three quarters of the depth.
        backend: ``"auto"`` (Triton on CUDA, the PyTorch reference elsewhere), ``"triton"`` or ``"reference"``.
        config: in place of all these, a JSON file that ``fastreduce tune`` wrote, or what :func:`config_of` returned.
        **options: the method's own. ``evit``: ``normalize``. ``dynamicvit``: ``generator``. ``ats``: ``trim``,
            ``packed`` (no padding between images), ``points``. ``tome``: ``r``, ``rounds``, ``prop_attn``.
            ``kmedoids``: ``iters``, ``cost``, ``equal_weight``, ``first``. ``dpcknn``: ``k_neighbors``,
            ``equal_weight``, ``noise``. ``patchmerger``: ``scaled``. ``sinkhorn``: ``eps``, ``iters``, ``gradient``.
            ``radial``: ``norm``, ``schedule``, ``min_radius``. See the classes in :mod:`fastreduce.reducers`.

    Returns:
        The model itself.

    Raises:
        ValueError: unknown method, values out of range, a model that is patched or compiled already, or in which
            somebody changed what a reduced block would not call (a forward of its own; hooks on an attention in which
            tokens are reduced).
        TypeError: a model that cannot be reduced (the message says why), unknown options, values of the wrong kind.
            Whatever is raised, the model is as it was.

    Notes:
        Models without a class token (SigLIP) are scored by the attention that a token receives, averaged over heads and
        queries, where the others use the attention of the class token. Scores are those before attention dropout.

        Hooks: what stands in the blocks is called wherever the block itself would call it, on all tokens if it is not
        one of timm's own layers. Forward hooks on a block get :class:`Tokens`, whose ``.x`` is the tensor.
    """
    if config is not None:
        given = {"method": method, "keep_rate": keep_rate, "keep": keep, "at": at, **options}
        if doubled := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"config holds the arguments: give either config or {', '.join(doubled)}")
        return patch(model, **{"backend": backend, **read_config(config)})
    if method is None:
        raise TypeError("give a method, or a config")
    check_backend(backend)
    _check_model(model)
    shape = shape_of(model)
    reducer = make_reducer(method, shape, at=at, keep_rate=keep_rate, keep=keep, backend=backend, **options)
    method = reducer.name
    host: Any = model
    if reducer.grid is not None and not isinstance(host.patch_drop, nn.Identity):
        raise ValueError(f"{method} patterns need every patch in its place, but the model has a patch_drop_rate")
    if reducer.ragged and host.global_pool not in ("", "token"):
        check_pooling(host, method)
    _check_blocks(host.blocks, reducer, type(model).__name__)
    reducer.config = {"method": method, "keep_rate": keep_rate, "keep": keep, "at": at, "backend": backend, **options}
    _place_layers(reducer, host.blocks)
    reducer.warn(shape)
    host.reducers = reducer.train(model.training)
    _reduce_blocks(host)
    if reducer.grid is not None:
        watch_grid(host)
    object.__setattr__(host, "forward_intermediates", ForwardIntermediates(host))
    host.register_forward_pre_hook(_Replicas())
    return model


def _check_blocks(blocks: Sequence[nn.Module], reducer: Reducer, model: str) -> None:
    """Raise unless every block from the reducer's first on can be reduced."""
    for index in range(reducer.first, len(blocks)):
        check_block(blocks[index], index, model, opened=reducer.opens(index))


def _reduce_blocks(host: Any) -> None:
    """Put reduced blocks in the place of the others, from the reducer's first on."""
    reducer, blocks = host.reducers, host.blocks
    for index in range(reducer.first, len(blocks)):
        stage = reducer.blocks.index(index) if index in reducer.blocks else None
        blocks[index] = ReducedBlock(blocks[index], Site(index, stage, host, blocks[index]))


class _Replicas:
    """Forward pre-hook on the model: the blocks of a replica that ``nn.DataParallel`` made belong to that replica."""

    def __call__(self, module: Any, inputs: Any) -> None:
        if module.__dict__.get("_is_replica"):
            for block in module.blocks:
                if (reduced := reduced_block(block)) is not None:
                    reduced.move_to(module)


def _unwrapped(block: nn.Module, index: int) -> nn.Module:
    """Put the original block back into whatever stands around the reduced one now; raise if that cannot be done."""
    if type(block) is ReducedBlock:
        return block.restored()
    inner = next(name for name, child in block.named_children() if reduced_block(child) is not None)
    original = _unwrapped(block.get_submodule(inner), index)
    if isinstance(block, torch._dynamo.OptimizedModule):
        return torch._dynamo.OptimizedModule(original, block.dynamo_ctx)
    block._modules[inner] = original
    return block


def _check_wrappers(block: nn.Module, index: int) -> None:
    """Raise where something around a reduced block, or its class, keeps more of it than a child."""
    for module in block.modules():
        sharded = type(module).__name__ == "FullyShardedDataParallel"
        if sharded or (isinstance(module, ReducedBlock) and type(module) is not ReducedBlock):
            raise ValueError(
                f"block {index} has become a {type(module).__name__}, which cannot be undone: unpatch a "
                "model before it is sharded"
            )
        if isinstance(module, ReducedBlock):
            return


def _restore_blocks(blocks: nn.Sequential) -> None:
    """Put the original blocks back, all or none."""
    standing = {key: block for key, block in blocks._modules.items() if reduced_block(block) is not None}
    for key, block in standing.items():
        _check_wrappers(block, int(key))
    for key, block in standing.items():
        blocks._modules[key] = _unwrapped(block, int(key))


def unpatch(model: Model) -> Model:
    """Undo :func:`patch`: the model gets its very own blocks back, with what was set on them since.

    Wrappers around blocks (compiled one by one, checkpoint wrappers) stay where they are, and so do blocks that were
    added meanwhile.

    Returns:
        The model.

    Raises:
        ValueError: if the model is not patched, or its blocks are sharded (FSDP); the model is as it was.
    """
    host = patched_model(model)
    _restore_blocks(host.blocks)
    forget_grid(host)
    hooks = host._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Replicas)]:
        del hooks[key]
    object.__delattr__(host, "forward_intermediates")
    del host.reducers
    return model


def set_keep_rate(
    model: Model, keep_rate: KeepRate = None, *, keep: Keep = None, at: int | Sequence[int] | None = None
) -> Model:
    """Give a patched model another keep rate, or another schedule; everything else stays, trained layers above all.

    Args:
        model: patched.
        keep_rate: as in :func:`patch`.
        keep: instead, the numbers of patch tokens kept, one for each stage.
        at: other blocks for the stages; None leaves them where they are.

    Returns:
        The model itself. One that is compiled is compiled again.

    Raises:
        ValueError: if the model is not patched; values out of range; a method whose layers are made for fixed counts
            (SiT, PatchMerger, Sinkhorn); with ``at``, blocks in wrappers.
        TypeError: values of the wrong kind. Whatever is raised, the model is as it was.
    """
    host = patched_model(model)
    reducer, shape = host.reducers, shape_of(host)
    if at is None:
        reducer.reschedule(shape, keep_rate=keep_rate, keep=keep)
    else:
        if wrapped := [
            index
            for index, block in enumerate(host.blocks)
            if reduced_block(block) is not None and type(block) is not ReducedBlock
        ]:
            raise ValueError(f"stages cannot move while blocks {wrapped} are in wrappers: take these off first")
        before = dict(reducer.__dict__)
        reducer.reschedule(shape, keep_rate=keep_rate, keep=keep, at=at)
        originals = [block._site.original if isinstance(block, ReducedBlock) else block for block in host.blocks]
        try:
            _check_blocks(originals, reducer, type(host).__name__)
        except (TypeError, ValueError):
            reducer.__dict__.update(before)
            raise
        _restore_blocks(host.blocks)
        _place_layers(reducer, host.blocks)
        _reduce_blocks(host)
        reducer.config["at"] = at
    reducer.config.update(keep_rate=keep_rate, keep=keep)
    reducer.config.pop("r", None)
    reducer.warn(shape)
    return model


def config_of(model: nn.Module) -> dict[str, Any]:
    """Return what :func:`patch` was called with: ``patch(model, **config)`` does the same to another model.

    Raises:
        ValueError: if the model is not patched.
    """
    return dict(reducer_of(model).config)


def reduced_counts(model: nn.Module) -> list[int]:
    """Return the patch tokens after each stage of a patched model, at its own image size."""
    return reducer_of(model).counts(shape_of(patched_model(model)))
