"""The one reader of pictures: of every sort that Pillow reads, with its true brightness. No torch is imported here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ._files import one_line, silent

__all__ = ["SAMPLES", "cut", "open_photo", "open_picture", "read_picture", "sample_photos"]

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
    # The range of 8 or of 16 bits, where a value is in its upper half; else the largest value.
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

    16-bit pictures are scaled by their full range, and floats from 0 to 1 by 255. Other floats, and integers of 32
    bits, are scaled by the range of 8 or 16 bits that holds them, or by their own if none does. Transparency is left
    out.

    Raises:
        ValueError: no such file, a folder, or a file that cannot be read as an image; the message gives the path.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        raise ValueError(f"{name!r} is a folder; give a file")
    if not os.path.isfile(name):
        raise ValueError(f"there is no image {name!r}")
    try:
        # Given a name, Pillow maps uncompressed files into memory, and TIFF files that lie on their side wrongly.
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


def cut(
    photo: Image.Image,
    config: Mapping[str, Any],
    size: tuple[int, int],
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
) -> Image.Image:
    """Cut ``box`` (left, top, right, bottom: fractions of what the model sees) out of a photo, at ``size`` (h, w).

    Args:
        photo: RGB.
        config: of the model: ``crop_mode`` (``"squash"`` or another) and ``crop_pct``.
        size: height and width of the result, in pixels.
        box: a part of what the model sees.
    """
    height, width = size
    if config["crop_mode"] == "squash":
        wide, high = config["crop_pct"] * photo.width, config["crop_pct"] * photo.height
    else:
        scale = config["crop_pct"] * min(photo.width / width, photo.height / height)
        wide, high = scale * width, scale * height
    left, top = (photo.width - wide) / 2, (photo.height - high) / 2
    edges = (left + box[0] * wide, top + box[1] * high, left + box[2] * wide, top + box[3] * high)
    return photo.resize((width, height), Image.Resampling.BICUBIC, box=edges)


_OF_SCIKIT_IMAGE = ("astronaut", "camera", "chelsea", "coffee", "rocket", "stereo_motorcycle")


def sample_photos() -> dict[str, Callable[[], Image.Image]]:
    """Return what opens each photograph of scikit-learn, and of scikit-image where it is installed, by name."""

    def of_scikit_image(name: str) -> Callable[[], Image.Image]:
        def opened() -> Image.Image:
            from skimage import data

            pixels = getattr(data, name)()
            return Image.fromarray(pixels[0] if isinstance(pixels, tuple) else pixels).convert("RGB")

        return opened

    photos: dict[str, Callable[[], Image.Image]] = {
        name.partition(".")[0]: lambda name=name: open_photo(name)  # type: ignore[misc]
        for name in SAMPLES
    }
    if find_spec("skimage") is not None:
        photos |= {name: of_scikit_image(name) for name in _OF_SCIKIT_IMAGE}
    return photos
