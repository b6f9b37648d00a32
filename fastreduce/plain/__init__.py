"""The published algorithms, written plainly: the work is done as the study's released code does it.

Every block builds its whole attention matrix, scores are read from it, tokens are sorted, gathered with an expanded
index and scattered into sums. Nothing of fastreduce's own operators or rewrites is used here, so that it can be

* the oracle: ``PlainModel(copy.deepcopy(model).double(), ...)`` decides and computes in float64;
* the baseline of ``fastreduce compare``, beside :class:`FreeSlice`, the ideal whose decision costs nothing;
* the documentation of what each method computes.

The methods stand in :mod:`.selection`, :mod:`.merging` and :mod:`.mixing`, and run on the attention of
:mod:`.attention`. Both models run the modules of an unpatched timm Vision Transformer and import neither timm nor the
rest of fastreduce.
"""

from __future__ import annotations

from .free_slice import FreeSlice
from .model import PlainModel

__all__ = ["FreeSlice", "PlainModel"]
