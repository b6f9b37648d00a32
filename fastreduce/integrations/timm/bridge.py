"""Bridge to timm: importing this module registers all of timm's models and blocks that are known."""

import importlib.util

from . import eva, hosts, pairs, parallel, parts

__all__ = ["eva", "hosts", "pairs", "parallel", "parts"]

if importlib.util.find_spec("timm.models.naflexvit") is not None:  # timm 1.0.16 and newer
    from . import naflex

    __all__ += ["naflex"]
