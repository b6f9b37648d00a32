"""Token reduction for Vision Transformers that is actually faster."""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING
from typing import Any as _Any

from ._version import __version__ as __version__

if not (_Path(__file__).parent / "kernels").is_dir():
    raise ImportError(
        "fastreduce/kernels is not a directory: git checked the symlink out as a text file; "
        "clone again with `git clone -c core.symlinks=true`, or install the wheel."
    )

if TYPE_CHECKING:
    from . import ops
    from .backends import backend
    from .checkpoints import load_official
    from .integrations.patching import config_of, patch, reduced_counts, set_keep_rate, unpatch
    from .integrations.saving import load_config, save_config
    from .quality import Fidelity, fidelity
    from .recording import Record, Stage, is_patched, record
    from .reducers import REDUCERS, register
    from .reducers.dynamicvit import dynamicvit_loss
    from .tokens import Plan, Tokens

# Torch and timm are imported with the first name that needs them, so that `fastreduce --help` does not wait for them.
_HOMES = {
    "Fidelity": "quality",
    "REDUCERS": "reducers",
    "Plan": "tokens",
    "Record": "recording",
    "Stage": "recording",
    "Tokens": "tokens",
    "backend": "backends",
    "config_of": "integrations.patching",
    "dynamicvit_loss": "reducers.dynamicvit",
    "fidelity": "quality",
    "is_patched": "recording",
    "load_config": "integrations.saving",
    "load_official": "checkpoints",
    "ops": "ops",
    "patch": "integrations.patching",
    "record": "recording",
    "reduced_counts": "integrations.patching",
    "register": "reducers",
    "save_config": "integrations.saving",
    "set_keep_rate": "integrations.patching",
    "unpatch": "integrations.patching",
}

__all__ = [
    "REDUCERS",
    "Fidelity",
    "Plan",
    "Record",
    "Stage",
    "Tokens",
    "backend",
    "config_of",
    "dynamicvit_loss",
    "fidelity",
    "is_patched",
    "load_config",
    "load_official",
    "ops",
    "patch",
    "record",
    "reduced_counts",
    "register",
    "save_config",
    "set_keep_rate",
    "unpatch",
]


def __getattr__(name: str) -> _Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _import_module(f".{_HOMES[name]}", __name__)
    value = globals()[name] = home if name == "ops" else getattr(home, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
