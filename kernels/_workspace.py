"""Parts of a batch whose matrices fit into a workspace, so that memory is bounded for any batch."""

from __future__ import annotations

WORKSPACE = 256 << 20  # bytes of the matrices in memory at a time; one image may take more


def workspace_parts(images: int, bytes_each: int) -> list[range]:
    """Cut all images into as few launches as the workspace allows."""
    size = max(1, min(images, WORKSPACE // max(1, bytes_each)))
    return [range(start, min(start + size, images)) for start in range(0, images, size)]
