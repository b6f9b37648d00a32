"""Proof of the kernels without a GPU."""
