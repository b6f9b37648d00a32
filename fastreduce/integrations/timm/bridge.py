"""All of timm's models and blocks that are known: importing this module registers them."""

import importlib.util

from . import cait, differential, eva, gemma4, hosts, pairs, parallel, parts

__all__ = ["cait", "differential", "eva", "gemma4", "hosts", "pairs", "parallel", "parts"]

if importlib.util.find_spec("timm.models.naflexvit") is not None:  # timm 1.0.16 and newer
    from . import naflex

    __all__ += ["naflex"]
