"""FlopCounterMode says the same of a model whichever backend reduces it; nothing is computed for it."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fastreduce

METHODS = {
    "topk": {},
    "evit": {},
    "dynamicvit": {},
    "ats": {"trim": False},
    "tome": {},
    "kmedoids": {},
    "dpcknn": {},
    "sit": {},
    "patchmerger": {},
    "sinkhorn": {"eps": 0.1},
    "radial": {"norm": "l2"},
}
BATCH, WIDTH, PATCHES = 2, 16, 16
KEPT = 9


def _counted(method, backend, options):
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=WIDTH, depth=3, num_heads=2, num_classes=3).eval()
    fastreduce.patch(model, method, keep=[KEPT], at=1, backend=backend, **options)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(BATCH, 3, 16, 16))
    return counter.get_total_flops()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_backends_count_alike(method):
    options = dict(METHODS[method])
    ours, reference = (_counted(method, backend, options) for backend in ("triton", "reference"))
    if method in ("topk", "ats"):  # PyTorch projects queries of the kept tokens alone, but the class token's twice
        assert ours - reference == 2 * BATCH * (PATCHES - KEPT - 1) * WIDTH * WIDTH
    else:
        assert ours == reference > 0
