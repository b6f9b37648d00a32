"""Draw which patches a reduced model keeps of a photograph: python examples/draw_what_stays.py [--pretrained]."""

import argparse

import numpy as np
import timm
import torch
from sklearn.datasets import load_sample_image

import fastreduce
from fastreduce.draw import grey_dropped, save_panels

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="deit_tiny_patch16_224")
parser.add_argument("--pretrained", action="store_true", help="download timm's weights")
parser.add_argument("--out", default="what-stays.png")
options = parser.parse_args()

torch.manual_seed(0)
model = timm.create_model(options.model, pretrained=options.pretrained).eval()
config = timm.data.resolve_model_data_config(model)
rows, columns = model.patch_embed.grid_size
side = config["input_size"][-1]
photo = np.ascontiguousarray(load_sample_image("flower.jpg")[:side, 150 : 150 + side])
mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
image = (torch.tensor(photo).permute(2, 0, 1) / 255 - mean) / std

fastreduce.patch(model, "topk", keep_rate=0.7)
with torch.inference_mode(), fastreduce.record(model) as seen:
    model(image[None])
panels = [(photo, "input", f"{rows * columns} patches")]
for stage in seen.stages:
    kept = (stage.patch_slot[0] >= 0).view(rows, columns).numpy()
    panels.append((grey_dropped(photo, kept), f"block {stage.block}", f"{stage.num_out} patches"))
save_panels(options.out, panels, "Top-K", options.model, "" if options.pretrained else "random weights")
print("written:", options.out)
