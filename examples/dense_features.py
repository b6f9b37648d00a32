"""Get features on the full patch grid from a reduced model: python examples/dense_features.py [--pretrained]."""

import argparse

import timm
import torch

import fastreduce

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="vit_tiny_patch16_224")
parser.add_argument("--pretrained", action="store_true", help="download timm's weights")
options = parser.parse_args()

torch.manual_seed(0)
model = timm.create_model(options.model, pretrained=options.pretrained).eval()
images = torch.randn(2, *model.pretrained_cfg["input_size"])
with torch.inference_mode():
    before = model.forward_intermediates(images, indices=1, intermediates_only=True)[0]
    fastreduce.patch(model, "tome", keep_rate=0.7)

    # timm's own call: (B, C, rows, columns); every patch shows the token that it was merged into.
    dense = model.forward_intermediates(images, indices=1, intermediates_only=True)[0]

    # By hand, after any stage: unmerge (B, tokens, C) to (B, patches, C).
    with fastreduce.record(model) as seen:
        tokens = model.forward_features(images)
    last = seen.stages[-1]
    by_hand = last.unmerge(tokens[:, model.num_prefix_tokens :])

similar = torch.nn.functional.cosine_similarity(before, dense, dim=1).mean()
print(f"{last.num_out} tokens became a grid of {tuple(dense.shape)}, by hand {tuple(by_hand.shape)}")
print(f"the last block's patches before and after: cosine similarity {similar:.3f}")
