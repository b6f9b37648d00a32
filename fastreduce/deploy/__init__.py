"""Reduced models outside of Python: ONNX Runtime, OpenVINO, and what torch compiles ahead of time."""

from .decisions import Decided, differing, settled
from .export import FORMATS, export, float_nodes
from .runtimes import Runtime, load

__all__ = ["FORMATS", "Decided", "Runtime", "differing", "export", "float_nodes", "load", "settled"]
