"""Patch a model, and undo it: the same for every library, through the model's host."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from ..backends import check_backend
from ..config import read_config
from ..recording import is_patched, patched_model, reducer_of
from ..reducers import ModelShape, Reducer, make_reducer
from ..reducers.schedule import Keep, KeepRate
from ..tokens import check_fill
from .block import ReducedBlock, Site, check_block, reduced_block, reduced_class
from .registry import Host, find_host, host_of, hosted

__all__ = ["config_of", "patch", "reduced_counts", "set_keep_rate", "unpatch"]

# What the windows, hierarchies and couplings of well-known models are, of which no host can be made.
_REASONS = {
    "SwinTransformer": "its windows need the full grid",
    "SwinTransformerV2": "its windows need the full grid",
    "VisionTransformerSAM": "its windows need the full grid",
    "Hiera": "its hierarchy of grids needs every patch in its place",
    "Xcit": "its attention is over channels, and its convolutions need the full grid",
    "ConVit": "its attention weighs the grid's relative positions as it does contents, which needs the full grid",
}


def _strange_model(model: nn.Module) -> str:
    """Say what about a model without a host is in the way, and what could be given instead."""
    kind = type(model)
    if kind.__name__ in _REASONS and kind.__module__.partition(".")[0] in ("timm", "transformers"):
        return _REASONS[kind.__name__]
    inside = list(hosted(model))
    if inside:
        path, found = next((one for one in inside if _passes(one[1])), inside[0])
        return f"give the {type(found).__name__} inside of it, .{path}"
    return f"it is a {kind.__name__} of {kind.__module__}, of which the reducers do not know where its blocks are"


def _passes(model: nn.Module) -> bool:
    """Return whether a model that a host knows is as the host wants it."""
    try:
        host_of(model).check(model)
    except (TypeError, ValueError):
        return False
    return True


def _check_model(model: Any) -> Host:
    """Return the model's host; raise, with the reason, unless every part that a reducer relies on is as known."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model (torch.nn.Module) is wanted, got {model!r}")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise ValueError("the model is compiled already: call fastreduce.patch first and torch.compile after it")
    if is_patched(model):
        name = reducer_of(model).name
        raise ValueError(f"the model is already patched with {name!r}; call fastreduce.unpatch(model) first")
    host, kind = find_host(model), type(model)
    if host is None:
        raise TypeError(f"{kind.__name__} cannot be reduced: {_strange_model(model)}")
    if hasattr(model, "reducers"):
        raise ValueError(
            f"{kind.__name__} cannot be reduced: it has an attribute 'reducers' already "
            f"({type(model.reducers).__name__}), where the layers of the method would stand"
        )
    host.check(model)
    return host


def _place_layers(reducer: Reducer, blocks: Sequence[nn.Module]) -> None:
    """Move the layers of every stage to the device and the dtype of the block that it stands in."""
    for layers in reducer.children():
        assert isinstance(layers, nn.ModuleList)  # one entry a stage
        for layer, index in zip(layers, reducer.blocks, strict=True):
            weight = next((p for p in blocks[index].parameters() if p.is_floating_point()), None)
            if weight is not None:
                layer.to(_device_of(weight, blocks[index]), weight.dtype)


def _device_of(weight: torch.Tensor, block: nn.Module) -> torch.device:
    """Return where a block runs: accelerate keeps offloaded weights elsewhere, and leaves empty ones in the block."""
    if weight.device.type != "meta":
        return weight.device
    for module in block.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in (hook, *getattr(hook, "hooks", ())):
            if (device := getattr(one, "execution_device", None)) is not None:
                return torch.device(device)
    return weight.device


Model = TypeVar("Model", bound=nn.Module)


def patch(
    model: Model,
    method: str | None = None,
    *,
    keep_rate: KeepRate = None,
    keep: Keep = None,
    at: int | Sequence[int] | None = None,
    backend: str = "auto",
    positions: Literal["place", "mean"] = "place",
    fill: Literal["last", "zero"] = "last",
    hidden_states: Literal["full", "reduced"] = "full",
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    **options: Any,
) -> Model:
    """Reduce the tokens of a Vision Transformer, in place.

    Weights, checkpoint keys and the calling interface stay as they are; :func:`unpatch` undoes it.

    Args:
        model: a Vision Transformer of timm (DeiT, AugReg, DINOv2, DINOv3, EVA-02, CLIP, SigLIP, BEiT, ...), one of
            Hugging Face (alone, with a head, or inside a model of images and text), or one of open_clip.
        method: ``"topk"``, ``"evit"``, ``"dynamicvit"``, ``"ats"``, ``"tome"``, ``"kmedoids"``, ``"dpcknn"``,
            ``"sit"``, ``"patchmerger"``, ``"sinkhorn"`` or ``"radial"``. DynamicViT, DPC-KNN, SiT, PatchMerger and
            Sinkhorn add parameters, under ``model.reducers``, which have to be trained (or loaded:
            :func:`fastreduce.load_official`).
        keep_rate: a rate r: stage i keeps ``int(patches * r ** (i + 1))`` tokens; or a sequence of absolute fractions,
            one for each stage. In (0, 1]. The default is 0.7 (none for radial, whose default schedule is contiguous).
        keep: instead, the numbers of patch tokens kept, one for each stage.
        at: blocks at which the stages stand, from 0; the default is a quarter, half and three quarters of the depth.
        backend: ``"auto"`` (Triton on CUDA, the PyTorch reference elsewhere), ``"triton"`` or ``"reference"``.
        positions: of models that rotate queries and keys by position, how a merged token is rotated: as the patch at
            whose ``"place"`` it is (of a cluster the centre's), or by the ``"mean"`` of its patches' angles.
        fill: what a dropped patch shows in dense features (``forward_intermediates``, hidden states): its ``"last"``
            value, as it entered the block that dropped it, or ``"zero"``.
        hidden_states: what Hugging Face's ``hidden_states``, and ``last_hidden_state`` of a model without a head, show:
            the ``"full"`` grid of patches, or the ``"reduced"`` tokens.
        config: in place of method and schedule, a JSON file of ``fastreduce tune`` or :func:`save_config`, or what
            :func:`config_of` returned.
        **options: the method's own. ``evit``: ``normalize``. ``dynamicvit``: ``generator``. ``ats``: ``trim``,
            ``packed`` (no padding between images), ``points``. ``tome``: ``r``, ``rounds``, ``prop_attn``, ``metric``.
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
        arguments = {"method": method, "keep_rate": keep_rate, "keep": keep, "at": at, **options}
        if doubled := [name for name, value in arguments.items() if value is not None]:
            raise ValueError(f"config holds the arguments: give either config or {', '.join(doubled)}")
        settings = read_config(config)
        chosen = {"backend": (backend, "auto"), "positions": (positions, "place"), "fill": (fill, "last")}
        chosen["hidden_states"] = (hidden_states, "full")
        return patch(model, **(settings | {name: value for name, (value, usual) in chosen.items() if value != usual}))
    if method is None:
        raise TypeError("give a method, or a config")
    check_backend(backend)
    if positions not in ("place", "mean"):
        raise ValueError(f"positions must be 'place' or 'mean', got {positions!r}")
    check_fill(fill)
    if hidden_states not in ("full", "reduced"):
        raise ValueError(f"hidden_states must be 'full' or 'reduced', got {hidden_states!r}")
    host = _check_model(model)
    shape = host.shape(model)
    reducer = make_reducer(method, shape, at=at, keep_rate=keep_rate, keep=keep, backend=backend, **options)
    reducer.positions, reducer.fill, reducer.hidden_states = positions, fill, hidden_states
    _check_method(host, model, reducer)
    _check_blocks(host.blocks(model), reducer, type(model).__name__)
    given: dict[str, Any] = {"method": reducer.name, "keep_rate": keep_rate, "keep": keep, "at": at, "backend": backend}
    given |= {} if positions == "place" else {"positions": positions}
    given |= {} if fill == "last" else {"fill": fill}
    given |= {} if hidden_states == "full" else {"hidden_states": hidden_states}
    reducer.config = _own({**given, **options})
    _place_layers(reducer, host.blocks(model))
    reducer.warn(shape)
    patched: Any = model
    patched.reducers = reducer.train(model.training)
    _reduce_blocks(host, patched)
    host.install(model)
    model.register_forward_pre_hook(_Replicas())
    return model


def _own(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same settings, of which no list or array is one that a caller may go on to change."""
    return {name: copy.deepcopy(value) if hasattr(value, "__setitem__") else value for name, value in config.items()}


def _check_method(host: Host, model: nn.Module, reducer: Reducer) -> None:
    """Raise where a method needs something that the model does not have."""
    method = reducer.name
    if reducer.grid is not None and not host.keeps_every_patch(model):
        raise ValueError(f"{method} patterns need every patch in its place, but the model has a patch_drop_rate")
    if reducer.ragged:
        host.check_pooling(model, method)
    if reducer.packed and host.positions(model):
        raise ValueError(
            f"{type(model).__name__} looks at the positions of its tokens in every block, which packed tokens do not "
            f"carry: patch it with packed=False"
        )


def _check_blocks(blocks: Sequence[nn.Module], reducer: Reducer, model: str) -> None:
    """Raise unless every block from the reducer's first on can be reduced."""
    for index in range(reducer.first, len(blocks)):
        check_block(blocks[index], index, model, opened=reducer.opens(index))


def _reduce_blocks(host: Host, model: Any) -> None:
    """Put reduced blocks in the place of the others, from the reducer's first on."""
    reducer: Reducer = model.reducers
    blocks = host.blocks(model)
    facts = host.prefix(model), host.has_class_token(model), host.positions(model)
    for index in range(reducer.first, len(blocks)):
        stage = reducer.blocks.index(index) if index in reducer.blocks else None
        block: Any = blocks[index]
        kind: Any = type(block)
        blocks[index] = reduced_class(kind)(block, Site(index, stage, model, block, host, *facts))


class _Replicas:
    """Forward pre-hook on the model: the blocks of a replica that ``nn.DataParallel`` made belong to that replica."""

    def __call__(self, module: Any, inputs: Any) -> None:
        if module.__dict__.get("_is_replica"):
            for block in host_of(module).blocks(module):
                if (reduced := reduced_block(block)) is not None:
                    reduced.move_to(module)


def _unwrapped(block: nn.Module, index: int) -> nn.Module:
    """Put the original block back into whatever stands around the reduced one now; raise if that cannot be done."""
    if isinstance(block, ReducedBlock):
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
        if sharded or (isinstance(module, ReducedBlock) and type(module) is not reduced_class(module.kind)):
            raise ValueError(
                f"block {index} has become a {type(module).__name__}, which cannot be undone: unpatch a "
                "model before it is sharded"
            )
        if isinstance(module, ReducedBlock):
            return


def _restore_blocks(blocks: Any) -> None:
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
    patched = patched_model(model)
    host = host_of(patched)
    _restore_blocks(host.blocks(patched))
    host.remove(patched)
    hooks = patched._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Replicas)]:
        del hooks[key]
    del patched.reducers
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
    patched = patched_model(model)
    host = host_of(patched)
    reducer, shape = patched.reducers, host.shape(patched)
    if at is None:
        reducer.reschedule(shape, keep_rate=keep_rate, keep=keep)
    else:
        _move_stages(host, patched, shape, keep_rate, keep, at)
    reducer.config.update(_own({"keep_rate": keep_rate, "keep": keep}))
    if reducer.config.pop("r", None) is not None and reducer.config["at"] is None:
        reducer.config["at"] = list(reducer.blocks)  # r acts in every block by default, a rate in three of them
    reducer.warn(shape)
    return model


def _move_stages(
    host: Host, model: Any, shape: ModelShape, keep_rate: KeepRate, keep: Keep, at: int | Sequence[int]
) -> None:
    """Give a patched model's reducer another schedule at other blocks."""
    reducer: Reducer = model.reducers
    blocks = host.blocks(model)
    if wrapped := [
        index
        for index, block in enumerate(blocks)
        if reduced_block(block) is not None and not isinstance(block, ReducedBlock)
    ]:
        raise ValueError(f"stages cannot move while blocks {wrapped} are in wrappers: take these off first")
    before = dict(reducer.__dict__)
    reducer.reschedule(shape, keep_rate=keep_rate, keep=keep, at=at)
    originals: Any = [block._site.original if isinstance(block, ReducedBlock) else block for block in blocks]
    try:
        _check_blocks(originals, reducer, type(model).__name__)
        _restore_blocks(blocks)
    except (TypeError, ValueError):
        reducer.__dict__.update(before)
        raise
    _place_layers(reducer, blocks)
    _reduce_blocks(host, model)
    reducer.config["at"] = _own({"at": at})["at"]


def config_of(model: nn.Module) -> dict[str, Any]:
    """Return what :func:`patch` was called with: ``patch(model, **config)`` does the same to another model.

    Raises:
        ValueError: if the model is not patched.
    """
    return _own(reducer_of(model).config)


def reduced_counts(model: nn.Module) -> list[int]:
    """Return the patch tokens after each stage of a patched model, at its own image size."""
    patched = patched_model(model)
    return patched.reducers.counts(host_of(patched).shape(patched))
