"""Export a reduced model to ONNX, run it there, and hold it against eager mode: python examples/export.py."""

import argparse

import timm
import torch

import fastreduce
from fastreduce import deploy

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="deit_tiny_patch16_224")
parser.add_argument("--pretrained", action="store_true", help="download timm's weights")
parser.add_argument("--to", default="onnx", choices=sorted(deploy.FORMATS))
parser.add_argument("--out", default="reduced.onnx", help="ends in .onnx, .xml (OpenVINO) or .pt2 (AOTInductor)")
options = parser.parse_args()

torch.manual_seed(0)
model = timm.create_model(options.model, pretrained=options.pretrained).eval()
fastreduce.patch(model, "topk", keep_rate=0.7)
example = torch.randn(2, *model.pretrained_cfg["input_size"])
deploy.export(model, example, options.out, options.to)

# From here on nothing of fastreduce is needed but this: `onnxruntime.InferenceSession(options.out)` does as well.
runtime = deploy.load(options.out)
images = torch.randn(5, *model.pretrained_cfg["input_size"])  # any number of images
with torch.no_grad():
    difference = (runtime(images)[0] - model(images)).abs().max().item()
print(f"written: {options.out}; {runtime.name} differs from eager mode by {difference:.1e}")
