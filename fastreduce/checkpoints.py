"""Weights in files and out of them: read without running anything that a file holds, loaded whole or not at all."""

from __future__ import annotations

import _compat_pickle
import contextlib
import dataclasses
import logging
import os
import pickletools
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor, nn

from ._files import check_weights_file, one_line, printable, safetensors_header, silent, write_atomically

__all__ = ["Checkpoint", "load_official", "read_checkpoint", "read_weights", "write_weights"]

_log = logging.getLogger("fastreduce")

# Names under which a checkpoint holds weights, and their moving average; the first that is there is taken.
_RAW = ("model", "state_dict", "model_state_dict", "module")
_EMA = ("model_ema", "state_dict_ema", "ema", "ema_state_dict")
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # they stand anywhere in a key
_OUTER_WRAPPERS = ("module", "model")  # only at its start
_OWN_LAYERS = ("score_predictor.", "cluster_layers.")

Model = TypeVar("Model", bound=nn.Module)


class _Refused(ValueError):
    """A request of a file that reading weights does not need."""


class _NeverCalled(type):
    """The type of classes that stand in for a file's own: their objects may be made, but nothing is called."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise _Refused(f"it calls {cls.__module__}.{cls.__qualname__}")


def _stand_in(name: str) -> type:
    """Make a class of this name, whose objects ignore the state they get. The one of that name is not imported."""
    module, _, last = name.rpartition(".")
    parts = {
        "__module__": module,
        "__new__": lambda cls, *args, **kwargs: object.__new__(cls),
        "__setstate__": lambda self, state: None,
    }
    return _NeverCalled(last, (), parts)


def _words(value: Any) -> str:
    """Say what a value is, for messages; a stand-in is called by the name that it bears."""
    kind = value if isinstance(value, _NeverCalled) else type(value)
    name = f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, _NeverCalled) else kind.__name__
    return f"{'an' if name[:1] in ('a', 'e', 'i', 'o', 'u') else 'a'} {name}"


class _Value:
    """An object in place of one that a call of a plain, harmless class makes, such as a path or a date."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Value:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.arguments = args

    def __setstate__(self, state: Any) -> None:
        pass


class _Scalar(_Value):
    """A NumPy number; all that we ask of one is whether it is true."""

    def __bool__(self) -> bool:
        return any(self.arguments[1]) if len(self.arguments) > 1 and isinstance(self.arguments[1], bytes) else False


class _List:
    """A list in place of a deque."""

    def __new__(cls, *args: Any, **kwargs: Any) -> list[Any]:  # type: ignore[misc]
        return []


class _Mapping:
    """A dict in place of one of another class."""

    def __new__(cls, *args: Any, **kwargs: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_VALUES: dict[str, Any] = {
    **{f"{module}.scalar": _Scalar for module in _NUMPY},
    **{f"{module}._reconstruct": _Value for module in _NUMPY},
    **{f"numpy.{name}": _Value for name in ("dtype", "ndarray")},
    **{
        f"{module}.{kind}": _Value
        for module in ("pathlib", "pathlib._local")
        for kind in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    },
    **{f"datetime.{name}": _Value for name in ("date", "datetime", "time", "timedelta", "timezone")},
    **{f"builtins.{name}": _Value for name in ("frozenset", "range", "slice", "object")},
    **{name: _Value for name in ("types.SimpleNamespace", "functools.partial", "uuid.UUID")},
    "collections.deque": _List,
    **{name: _Value for name in ("copyreg._reconstructor", "decimal.Decimal", "fractions.Fraction")},
    **{
        name: _Mapping
        for name in (
            "collections.defaultdict",
            "yacs.config.CfgNode",
            "easydict.EasyDict",
            "addict.addict.Dict",
            "mmengine.config.config.ConfigDict",
            "pytorch_lightning.utilities.parsing.AttributeDict",
            "lightning_fabric.utilities.data.AttributeDict",
            "lightning.fabric.utilities.data.AttributeDict",
        )
    },
}
_SYSTEM = ("os", "posix", "nt", "sys", "subprocess")
_registry = threading.Lock()  # torch keeps what is allowed in one place for all threads


def _pickles(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """Yield the pickles of a torch.save file: one in a zip, four in a row in files of torch before 1.6."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if name.endswith("/data.pkl"):
                    with archive.open(name) as member:
                        yield member
        return
    file.seek(0)
    for _ in range(4):
        yield file


def _named_globals(file: IO[bytes]) -> set[str]:
    """List the classes and functions that the file names, under their dotted names in Python 3."""
    names = set()
    for pickle in _pickles(file):
        for operation, argument, _ in pickletools.genops(pickle):
            if operation.name == "GLOBAL":
                module, _, name = str(argument).partition(" ")
                module, name = _compat_pickle.NAME_MAPPING.get(
                    (module, name), (_compat_pickle.IMPORT_MAPPING.get(module, module), name)
                )
                names.add(f"{module}.{name}")
    return names


def _allowed_by_user() -> set[str]:
    known = torch.serialization.get_safe_globals()
    return {one[1] if isinstance(one, tuple) else f"{one.__module__}.{one.__qualname__}" for one in known}


def _read_torch(path: str) -> Any:
    with open(path, "rb") as file, _registry:
        names = _named_globals(file)
        if system := sorted(name for name in names if name.partition(".")[0] in _SYSTEM):
            raise _Refused(f"it names {system[0]}")
        # None of these is imported, and nothing of the file's own is called: a stand-in bears its name.
        allowed: list[Any] = [(_VALUES.get(name) or _stand_in(name), name) for name in names - _allowed_by_user()]
        file.seek(0)
        with silent(), torch.serialization.safe_globals(allowed):
            return torch.load(file, map_location="cpu", weights_only=True)


def _read_safetensors(path: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    with open(path, "rb") as file:
        safetensors_header(file, path)  # what the library lets pass: names that occur twice
    return load_file(path)


def read_weights(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """Read what a ``.safetensors`` or ``torch.save`` file holds; its content decides which it is, not its name.

    A ``torch.save`` file is read with ``weights_only=True``. Objects that are no weights (an ``argparse.Namespace``, a
    configuration) become empty ones: their classes are not imported, and nothing that the file names is called.

    Returns:
        What the file holds, tensors on the CPU.

    Raises:
        OSError: it cannot be opened.
        ValueError: a folder, a file of another kind or in several parts, or one that holds no dict.
    """
    path = os.fspath(path)
    kind = check_weights_file(path)
    try:
        found = _read_safetensors(path) if kind == "safetensors" else _read_torch(path)
    except _Refused as error:
        reason = printable(str(error))
        raise ValueError(
            f"{path} holds more than weights, and that is not run ({reason}): save the model's state_dict() alone"
        ) from None
    except OSError:
        raise
    except Exception as error:  # the reader's own words are about pickles, and advise to read without weights_only
        as_what = {"safetensors": "a .safetensors", "torch": "a torch.save"}[kind]
        raise ValueError(f"{path} is damaged or no file of weights: it cannot be read as {as_what} file") from error
    if not isinstance(found, Mapping):
        what = "one tensor" if isinstance(found, Tensor) else printable(_words(found))
        hint = ": save the model's state_dict()" if isinstance(type(found), _NeverCalled) else ""
        raise ValueError(f"{path} holds {what}, not a dict of weights{hint}")
    return dict(found)


def write_weights(path: str | os.PathLike[str], state: Mapping[str, Tensor]) -> Path:
    """Write tensors to a ``.safetensors`` file, whole or not at all, with the permissions of any new file.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def write(part: Path) -> None:
        try:
            save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, part)
        except SafetensorError as error:
            raise OSError(one_line(error)) from error

    return write_atomically(path, write)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The weights of a checkpoint, ready to be loaded.

    Attributes:
        state: tensors (or whatever stands in their place) by the name that the parameter has here.
        taken: the set that they are, such as ``"model_ema"``; empty where the checkpoint is one plain set.
        sets: all the sets that the checkpoint holds.
    """

    state: dict[str, Any]
    taken: str
    sets: tuple[str, ...]


def _sets(content: Mapping[Any, Any]) -> dict[str, Mapping[Any, Any]]:
    """Find the sets of weights in a checkpoint, by name; none if it is one itself."""
    found = {
        name: value
        for name, value in content.items()
        if isinstance(name, str)
        and isinstance(value, Mapping)
        and (name in _RAW or name in _EMA or any(isinstance(part, Tensor) for part in value.values()))
    }
    known = any(name in _RAW or name in _EMA for name in found)
    return found if known or not any(isinstance(value, Tensor) for value in content.values()) else {}


def _is_true(flag: Any) -> bool:
    try:
        return bool(flag) if not isinstance(flag, str) else {"true": True, "false": False}[flag.strip().lower()]
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"'ema_best' of the checkpoint must be true or false, got {flag!r}") from error


def _choose(content: Mapping[Any, Any], held: Mapping[str, Any], weights: str) -> str:
    """Return the name of the set to take."""
    raw = next((name for name in _RAW if name in held), None)
    ema = next((name for name in _EMA if name in held), None)
    if weights != "auto":
        name = {"model": raw, "ema": ema}.get(weights, weights if weights in held else None)
        if name is None:
            known = "'auto', 'model', 'ema' or a set of the checkpoint"
            raise ValueError(f"weights must be {known}, got {weights!r}: it holds {printable(', '.join(held))}")
        return name
    if "ema_best" in content and _is_true(content["ema_best"]):
        if ema is None:
            raise ValueError(
                f"the checkpoint says that its moving average is best (ema_best), but holds only {', '.join(held)}: "
                "say weights='model' for the plain weights"
            )
        return ema
    if raw is not None and ema is not None and "ema_best" not in content:
        _log.warning("the checkpoint holds %r and %r; took %r (weights='ema' takes the other)", raw, ema, raw)
    if (name := raw or ema or (next(iter(held)) if len(held) == 1 else None)) is None:
        raise ValueError(
            f"the checkpoint holds several sets of weights: say which, weights={' or '.join(map(repr, held))}"
        )
    return name


def _plain_key(key: Any) -> str:
    """Strip a key of the names of wrappers: of compiled, parallel and averaged models, in any order."""
    if not isinstance(key, str):
        raise ValueError(f"the checkpoint's keys must be strings, got {key!r}")
    parts = [part for part in key.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] in _OUTER_WRAPPERS:
        del parts[0]
    return ".".join(parts)


def _by_plain_key(state: Mapping[Any, Any], what: str) -> dict[str, Any]:
    """Rename all values by :func:`_plain_key`, and put a method's own layers under ``reducers.``."""
    named: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for key, value in state.items():
        plain = _plain_key(key)
        if plain == "n_averaged" and what == "checkpoint":  # torch's AveragedModel counts its updates there
            continue
        if plain.startswith(_OWN_LAYERS):
            plain = f"reducers.{plain}"
        if plain in named:
            raise ValueError(f"the {what} holds {printable(plain)} twice: as {origins[plain]!r} and as {key!r}")
        named[plain], origins[plain] = value, key
    return named


def read_checkpoint(checkpoint: Mapping[str, Any] | str | os.PathLike[str], weights: str = "auto") -> Checkpoint:
    """Read weights, from a file or from what was read from one, and give them the names that they have here.

    Args:
        checkpoint: a file (see :func:`read_weights`), a state dict, or a dict that holds some, as training scripts
            write it: ``model`` and ``model_ema`` (the paper's code, DeiT's), ``state_dict`` and ``state_dict_ema``
            (timm's). Prefixes of wrappers (``module.``, ``_orig_mod.``, in any order) are removed. The methods' own
            layers (``score_predictor.*``, ``cluster_layers.*``) are put under ``reducers.``.
        weights: which set to take. ``"auto"``: the one that the paper's validate.py evaluates, which is the moving
            average where the file says ``ema_best``, else the model; a warning is logged where there are both and the
            file does not say. ``"model"``, ``"ema"``, or the name of a set in the file.

    Returns:
        The weights; which set they are is logged too, at the level INFO.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it cannot be read, holds no such set, or keys that are no strings or the same without prefixes.
        TypeError: a checkpoint that is neither a path nor a dict.
    """
    if not isinstance(weights, str):
        raise TypeError(f"weights must be 'auto', 'model', 'ema' or the name of a set in the file, got {weights!r}")
    if isinstance(checkpoint, (str, os.PathLike)):
        content, source = read_weights(checkpoint), os.fspath(checkpoint)
    elif isinstance(checkpoint, Mapping):
        content, source = dict(checkpoint), "the state dict"
    else:
        raise TypeError(f"the checkpoint must be a path or a dict of tensors, got a {type(checkpoint).__name__}")
    state: Mapping[Any, Any] = content
    taken: list[str] = []
    sets: tuple[str, ...] = ()
    while held := _sets(state):
        sets = sets or tuple(held)
        taken.append(_choose(state, held, weights if not taken else "auto"))
        state = held[taken[-1]]
    if not taken and weights not in ("auto", "model"):
        raise ValueError(f"weights={weights!r}: {source} holds one plain set of weights; say 'auto'")
    if state and not taken and not any(isinstance(value, Tensor) for value in state.values()):
        entries = [f"{name} ({_words(value)})" for name, value in list(state.items())[:5]]
        raise ValueError(f"{source} holds no weights, but {printable(', '.join(entries))}")
    named = _by_plain_key(state, "checkpoint")
    if taken:
        _log.info("%s: took the weights %r", source, "/".join(taken))
    return Checkpoint(named, "/".join(taken), sets)


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _kind(dtype: torch.dtype) -> str:
    """Return the kind of number: values are copied within a kind only. Types of less than 16 bits are their own."""
    if dtype in _FLOATS:
        return "floating-point"
    if dtype.is_complex:
        return "complex"
    if dtype.is_floating_point or dtype is torch.bool or str(dtype).startswith(("torch.q", "torch.bits")):
        return str(dtype)
    return "integer"


def _unusual(value: Any) -> str | None:
    """Say why a value is no ordinary tensor, or return None."""
    if not isinstance(value, Tensor):
        return f"{_words(value)}, not a tensor"
    if type(value) not in (Tensor, nn.Parameter):
        return f"a {type(value).__name__}, not a plain tensor"
    if value.is_nested:
        return "nested"
    if value.layout != torch.strided:
        return f"sparse ({value.layout})"
    if value.is_quantized:
        return f"quantised ({value.dtype})"
    if value.is_meta:
        return "on the meta device, without values"
    return None


def _misfit(found: Any, own: Tensor) -> str | None:
    """Say why a value does not fit into a tensor of the model, or return None."""
    if (odd := _unusual(found)) is not None:
        return odd
    if found.shape != own.shape:
        return f"{tuple(found.shape)}, the model needs {tuple(own.shape)}"
    if (kind := _kind(found.dtype)) != (wanted := _kind(own.dtype)):
        return f"{kind} ({found.dtype}), the model needs {wanted} ({own.dtype})"
    if kind == "floating-point" and found.numel() and torch.finfo(found.dtype).max > torch.finfo(own.dtype).max:
        largest = torch.where(found.isfinite(), found, 0).abs().max().item()
        if largest > torch.finfo(own.dtype).max:
            return f"too large for {own.dtype}: it has {largest:g}"
    return None


def _unusual_own(own: Any) -> str | None:
    """Say why nothing can be loaded into an entry of the model's state dict, or return None."""
    if (odd := _unusual(own)) is not None:
        return odd
    if own.is_inference() and not torch.is_inference_mode_enabled():
        return "a tensor of inference mode"
    return None


def _fitting(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Sort the checkpoint's tensors by the keys of the model's own state dict; raise unless every one fits."""
    own = model.state_dict()
    keys = {_plain_key(key): key for key in own}
    problems = [f"{key} of the model is {odd}" for key, value in own.items() if (odd := _unusual_own(value))]
    problems += [f"missing {key}" for key in keys if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in keys]
    problems += [
        f"{plain} is {odd}"
        for plain, key in keys.items()
        if plain in state and not _unusual(own[key]) and (odd := _misfit(state[plain], own[key]))
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        what = printable("; ".join(problems[:5]))
        raise ValueError(f"the checkpoint does not fit {type(model).__name__}: {what}{more}")
    # Cloned if it shares memory with the model: else one copy would change what the next one reads.
    memory = {value.untyped_storage().data_ptr() for value in own.values()}
    tensors = {key: state[plain].detach() for plain, key in keys.items()}
    return {
        key: value.clone() if value.untyped_storage().data_ptr() in memory else value for key, value in tensors.items()
    }


def _check_arrived(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise unless the model holds what was loaded: of two names of one tensor the last would win."""
    for key, value in model.state_dict().items():
        wanted = tensors[key].to(value.device, value.dtype)
        same = torch.equal(value, wanted) or torch.equal(value.nan_to_num(), wanted.nan_to_num())
        if not same:
            raise ValueError(
                f"{key} of the model did not take its values; is it one tensor with another of other values?"
            )


def _load_whole(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors; where that fails midway, the model gets back what it had."""
    own = model.state_dict()
    before = {key: value.clone() for key, value in own.items()}
    try:
        model.load_state_dict(tensors)
        _check_arrived(model, tensors)
    except BaseException as error:
        with torch.no_grad():
            for key, value in own.items():
                with contextlib.suppress(RuntimeError):  # what cannot be written to has not changed
                    value.copy_(before[key])
        if isinstance(error, (RuntimeError, TypeError, AttributeError)):
            reason = one_line(error)
            raise ValueError(f"the checkpoint cannot be loaded into {type(model).__name__}: {reason}") from error
        raise


def load_official(
    model: Model, checkpoint: Mapping[str, Any] | str | os.PathLike[str], *, weights: str = "auto"
) -> Model:
    """Load weights of the paper's released code (TokenReduction, timm 0.4.12 names) into a patched or plain timm model.

    Example::

        fastreduce.patch(model, "dynamicvit", keep_rate=0.7)
        fastreduce.load_official(model, "best_checkpoint.pth")  # or weights="ema"

    Args:
        model: a timm Vision Transformer of the checkpoint's geometry; for a method with layers of its own
            (``score_predictor.*``, ``cluster_layers.*``) patched with that method.
        checkpoint: a ``.safetensors`` or ``torch.save`` file, or a dict; see :func:`read_checkpoint`. Nothing that a
            file holds is executed.
        weights: which of a checkpoint's sets: ``"auto"`` (what the paper evaluates: the moving average where the file
            says that it is best, ``ema_best``), ``"model"``, ``"ema"``, or its name in the file. Which one was taken is
            logged at the level INFO.

    Returns:
        The model itself.

    Raises:
        OSError: the file cannot be opened.
        ValueError: a file that holds no weights or not the set that is asked for; keys, shapes or kinds of numbers that
            do not fit. The message names them.
        TypeError: arguments of the wrong kind. Whatever is raised, the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, got a {type(model).__name__}")
    _load_whole(model, _fitting(model, read_checkpoint(checkpoint, weights).state))
    return model
