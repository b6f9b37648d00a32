"""Export a reduced model with torch.export, load and run it: python examples/export_model.py [--pretrained]."""

import argparse

import timm
import torch

import fastreduce

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="deit_tiny_patch16_224")
parser.add_argument("--pretrained", action="store_true", help="download timm's weights")
parser.add_argument("--out", default="reduced.pt2")
options = parser.parse_args()

torch.manual_seed(0)
model = timm.create_model(options.model, pretrained=options.pretrained).eval()
fastreduce.patch(model, "topk", keep_rate=0.7)
images = torch.randn(2, *model.pretrained_cfg["input_size"])
with torch.no_grad():
    wanted = model(images)
    program = torch.export.export(model, (images,))
torch.export.save(program, options.out)

# Whoever loads the program imports fastreduce first: its operators are what the graph calls.
loaded = torch.export.load(options.out).module()
difference = (loaded(images) - wanted).abs().max().item()
print(f"written: {options.out}; largest difference of the logits {difference:.1e}")
