"""The one reader of pictures: of every sort that Pillow reads, with its true brightness. No torch is imported here."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ._files import one_line, silent

__all__ = ["SAMPLES", "open_photo", "open_picture", "read_picture"]

SAMPLES = ("flower.jpg", "china.jpg")
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
_BITS_PER_SAMPLE, _ORIENTATION = 258, 274  # TIFF and EXIF tags
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _scaled(values: NDArray[Any], low: float, high: float) -> Image.Image:
    """Make a grey picture of 8 bits, low to high becoming 0 to 255, and NaN low."""
    values = np.nan_to_num(np.clip(values, low, high), nan=low)
    factor = 255 / (high - low) if high > low else 0.0
    return Image.fromarray(((values - low) * factor + 0.5).astype(np.uint8))


def _from_floats(values: NDArray[Any]) -> Image.Image:
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low >= 0 and high <= 1:
        return _scaled(values, 0.0, 1.0)
    # 8 or 16 bits as floats, where the picture has values in the upper half; else whatever the largest is.
    top = next((limit for limit in (255.0, 65535.0) if limit / 2 < high <= limit), high)
    return _scaled(values, min(low, 0.0), top)


def _from_integers(values: NDArray[Any], sixteen_bits: bool) -> Image.Image:
    low, high = int(values.min()), int(values.max())
    if not sixteen_bits and low >= 0 and high <= 255:
        return _scaled(values, 0, 255)
    return _scaled(values, min(low, 0), 65535 if high <= 65535 else high)


def _to_eight_bits(photo: Image.Image, source: Image.Image) -> Image.Image:
    """Bring a picture to 8 bits a channel, where Pillow itself would cut off what is above 255."""
    if photo.mode.startswith("I;16"):
        bits = getattr(source, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
        table = np.minimum(np.arange(1 << 16) * 255.0 / ((1 << bits) - 1) + 0.5, 255).astype(np.uint8)
        return Image.fromarray(table[np.asarray(photo)])
    if photo.mode == "I":  # PGM and PNG files have no more than 16 bits
        return _from_integers(np.asarray(photo), source.format in ("PPM", "PNG"))
    if photo.mode == "F":
        return _from_floats(np.asarray(photo))
    return photo.convert(_PREMULTIPLIED[photo.mode]) if photo.mode in _PREMULTIPLIED else photo


def _upright(photo: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF data asks; Pillow's own function rewrites all of these, and fails on damaged ones."""
    if photo.format == "TIFF":  # turned by Pillow on loading, whether or not the tag is still there
        return photo
    turn = None
    with suppress(Exception):  # data that cannot be read do not say which side is up
        turn = _TURNS.get(int(photo.getexif().get(_ORIENTATION, 1)))
    return photo if turn is None else photo.transpose(turn)


def open_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture, upright, as RGB of 8 bits; of several frames the first.

    16-bit pictures are scaled by their full range. Floats from 0 to 1 are scaled by 255; other floats, and integers of
    32 bits, by the range of 8 or 16 bits that holds them, else by their own. Transparency is left out.

    Raises:
        ValueError: no such file, a folder, or a file that cannot be read as an image; the message gives the path.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        raise ValueError(f"{name!r} is a folder; give a file")
    if not os.path.isfile(name):
        raise ValueError(f"there is no image {name!r}")
    try:
        # Given a name, Pillow maps uncompressed files into memory, and those of TIFF that lie on their side wrongly.
        with open(name, "rb") as file:
            return read_picture(file, name)
    except OSError as error:
        raise ValueError(f"{name} cannot be read as an image: {one_line(error)}") from error


def read_picture(file: IO[bytes], name: str) -> Image.Image:
    """Read a picture from an open file, as :func:`open_picture` does.

    Raises:
        ValueError: it cannot be read as an image; the message begins with ``name``.
    """
    try:
        # Pillow warns of many pixels, damaged EXIF data, transparent palettes: none changes what is read.
        with silent(), Image.open(file) as photo:
            photo.load()
            return _to_eight_bits(_upright(photo), photo).convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} cannot be read as an image: it has no format that Pillow knows") from error
    except Exception as error:  # Pillow's plugins raise whatever a damaged file makes them stumble over
        raise ValueError(f"{name} cannot be read as an image: {one_line(error)}") from error


def open_photo(name: str) -> Image.Image:
    """Read a picture (see :func:`open_picture`), or scikit-learn's of that name where there is no such file."""
    if name in SAMPLES and not os.path.exists(name):
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image(name))
    return open_picture(name)
