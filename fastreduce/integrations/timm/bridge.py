"""Bridge to timm: importing this module registers all of timm's models and blocks that are known."""

import importlib.util

from . import cait, eva, hosts, pairs, parallel, parts

__all__ = ["cait", "eva", "hosts", "pairs", "parallel", "parts"]

if importlib.util.find_spec("timm.models.naflexvit") is not None:  # timm 1.0.16 and newer
    from . import naflex

    __all__ += ["naflex"]

if importlib.util.find_spec("timm.models.gemma4_vit") is not None:  # timm 1.0.31 and newer
    from . import gemma4

    __all__ += ["gemma4"]
