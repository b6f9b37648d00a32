"""One thread: the tests' tensors are tiny, and two busy threads that wait for each other took ten times as long."""

import torch

torch.set_num_threads(1)
