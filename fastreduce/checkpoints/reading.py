"""Files of weights: read without running anything that a file holds, and written whole or not at all."""

from __future__ import annotations

import _compat_pickle
import os
import pickletools
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from .._files import check_weights_file, one_line, printable, safetensors_header, silent, write_atomically

__all__ = ["read_weights", "words_of", "write_weights"]


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


def words_of(value: Any) -> str:
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
        safetensors_header(file, path)  # refuses names that occur twice, which the library lets pass
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
    except Exception as error:  # the reader's own message speaks of pickles, and advises to read without weights_only
        as_what = {"safetensors": "a .safetensors", "torch": "a torch.save"}[kind]
        raise ValueError(f"{path} is damaged or no file of weights: it cannot be read as {as_what} file") from error
    if not isinstance(found, Mapping):
        what = "one tensor" if isinstance(found, Tensor) else printable(words_of(found))
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
