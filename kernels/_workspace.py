"""Numbers of images that a launch takes where each needs a matrix: memory stays bounded whatever the batch."""

from __future__ import annotations

WORKSPACE = 256 << 20  # bytes of the matrices that are in memory at a time, or one image's if that is larger


def workspace_parts(images: int, bytes_each: int) -> list[range]:
    """Cut all images into as few launches as the workspace allows."""
    size = max(1, min(images, WORKSPACE // max(1, bytes_each)))
    return [range(start, min(start + size, images)) for start in range(0, images, size)]
