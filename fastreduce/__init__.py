"""Token reduction for Vision Transformers that is actually faster."""

from pathlib import Path as _Path

__version__ = "0.1.0"

if not (_Path(__file__).parent / "kernels").is_dir():
    raise ImportError(
        "fastreduce/kernels is not a directory: git checked the symlink out as a text file; "
        "clone again with `git clone -c core.symlinks=true`, or install the wheel."
    )

from . import ops
from .backends import backend
from .integrations.timm import Record, Stage, load_official, patch, record, reduced_counts, unpatch
from .reducers import REDUCERS
from .tokens import Plan, Tokens

__all__ = [
    "REDUCERS",
    "Plan",
    "Record",
    "Stage",
    "Tokens",
    "backend",
    "load_official",
    "ops",
    "patch",
    "record",
    "reduced_counts",
    "unpatch",
]
