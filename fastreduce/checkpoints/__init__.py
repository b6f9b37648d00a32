"""Weights in files and out of them: read without running anything that a file holds, loaded whole or not at all."""

from .choosing import Checkpoint, read_checkpoint
from .loading import load_official
from .reading import read_weights, write_weights

__all__ = ["Checkpoint", "load_official", "read_checkpoint", "read_weights", "write_weights"]
