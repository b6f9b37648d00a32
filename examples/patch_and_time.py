"""Patch a model and time it against itself: python examples/patch_and_time.py [--pretrained] [--method tome]."""

import argparse
import statistics
import time

import timm
import torch

import fastreduce


def seconds(model, images):
    """Return how long one forward pass takes."""
    start = time.perf_counter()
    model(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="deit_tiny_patch16_224")
parser.add_argument("--pretrained", action="store_true", help="download timm's weights")
parser.add_argument("--method", default="topk")
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--rounds", type=int, default=10)
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
plain = timm.create_model(options.model, pretrained=options.pretrained).to(device).eval()
reduced = timm.create_model(options.model, pretrained=options.pretrained).to(device).eval()
fastreduce.patch(reduced, options.method, keep_rate=0.7)
images = torch.randn(options.batch, *plain.pretrained_cfg["input_size"], device=device)
with torch.inference_mode():
    seconds(plain, images), seconds(reduced, images)  # the first pass compiles the kernels
    ratios = [seconds(plain, images) / seconds(reduced, images) for _ in range(options.rounds)]
print("patch tokens after each stage:", fastreduce.reduced_counts(reduced))
print(f"{statistics.median(ratios):.2f} times as fast as unreduced, the median of {options.rounds} rounds")
