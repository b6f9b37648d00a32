"""One thread: the tests' tensors are tiny, and two busy threads that wait for each other took ten times as long."""

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # commands would look for pretrained weights first

torch.set_num_threads(1)
