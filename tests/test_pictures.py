"""Pictures of every sort become what a viewer shows, without a word; what is no picture is named."""

import io
import os
import random
import struct
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastreduce.pictures import open_photo, open_picture

from .helpers.inputs import rewrite

RAMP = np.linspace(0, 65535, 64 * 48).reshape(48, 64)  # from black to white
GREY = np.round(RAMP / 257).astype(np.uint8)


def read(path, image=None, **options):
    """Return what is read, as an array; the warnings of Pillow must not reach anybody."""
    if image is not None:
        image.save(path, **options)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = open_picture(path)
    assert found.mode == "RGB"
    assert not [str(one.message) for one in seen]
    return np.asarray(found).astype(int)


def is_grey(found, wanted):
    return found.shape[:2] == wanted.shape and np.abs(found - wanted.astype(int)[..., None]).max() <= 1


def write_tiff(path, data, bits, order):
    """Write a grey TIFF of 64 times 48 pixels, uncompressed.

    Macs and microscopes write them with the high byte first.
    """
    tags = [(256, 3, 64), (257, 3, 48), (258, 3, bits), (259, 3, 1), (262, 3, 1), (273, 4, 122), (277, 3, 1)]
    tags += [(278, 3, 48), (279, 4, len(data))]
    entries = b"".join(
        struct.pack(f"{order}HHIHxx" if kind == 3 else f"{order}HHII", tag, kind, 1, value) for tag, kind, value in tags
    )
    start = (b"MM" if order == ">" else b"II") + struct.pack(f"{order}HIH", 42, 8, len(tags))
    path.write_bytes(start + entries + bytes(4) + data)


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("a.png", lambda: Image.fromarray(RAMP.astype(np.uint16))),
        ("a.tif", lambda: Image.fromarray(RAMP.astype(np.uint16))),
        ("a.jp2", lambda: Image.fromarray(RAMP.astype(np.uint16))),
        ("a.pgm", lambda: Image.fromarray(RAMP.astype(np.uint16))),
        ("b.tif", lambda: Image.fromarray(RAMP.astype(np.int32))),
        ("c.tif", lambda: Image.fromarray((RAMP * 1000).astype(np.int32))),
        ("d.tif", lambda: Image.fromarray(GREY.astype(np.int32))),
        ("e.tif", lambda: Image.fromarray((RAMP / 65535).astype(np.float32))),
        ("f.tif", lambda: Image.fromarray((RAMP / 257).astype(np.float32))),
        ("g.tif", lambda: Image.fromarray(RAMP.astype(np.float32))),
        ("h.tif", lambda: Image.fromarray((RAMP / 6553.5).astype(np.float32))),  # a depth, in metres
        ("i.tif", lambda: Image.fromarray((RAMP / 65535 - 0.5).astype(np.float32) * 1e30)),
        ("j.pfm", lambda: Image.fromarray((RAMP / 65535).astype(np.float32))),
        ("k.png", lambda: Image.fromarray(GREY)),
        ("l.png", lambda: Image.fromarray(np.stack([GREY, np.full_like(GREY, 100)], -1), "LA")),
        ("m.png", lambda: Image.fromarray(GREY).convert("P")),
        ("n.tif", lambda: Image.fromarray(np.stack([0 * GREY] * 3 + [255 - GREY], -1), "CMYK")),
        ("o.jpg", lambda: Image.fromarray(np.stack([0 * GREY] * 3 + [255 - GREY], -1), "CMYK")),
        ("p.png", lambda: Image.fromarray(np.stack([GREY] * 3 + [255 - GREY], -1), "RGBA")),
    ],
)
@pytest.mark.filterwarnings("ignore:'mode' parameter:DeprecationWarning")
def test_brightness_is_kept(tmp_path, name, image):
    options = {"quality": 100, "subsampling": 0} if name.endswith("jpg") else {}
    found = read(tmp_path / name, image(), **options)
    if name.endswith(("jpg", "jp2")):
        assert np.abs(found - GREY[..., None].astype(int)).mean() < 2
    else:
        assert is_grey(found, GREY)


def test_dark_pictures_stay_dark(tmp_path):
    """A range of 16 bits is that of the file, not of the picture."""
    assert is_grey(read(tmp_path / "a.png", Image.fromarray((RAMP / 10).astype(np.uint16))), GREY / 10)
    assert is_grey(read(tmp_path / "a.pgm", Image.fromarray((RAMP / 1000).astype(np.uint16))), GREY / 1000)
    assert is_grey(read(tmp_path / "a.tif", Image.fromarray((RAMP / 655350).astype(np.float32))), GREY / 10)
    assert is_grey(read(tmp_path / "b.tif", Image.fromarray(np.full((4, 5), 128, np.float32))), np.full((4, 5), 128))
    for value in (0.0, 0.5, 1.0, -3.0, 7e9, np.nan, np.inf):
        read(tmp_path / "c.tif", Image.fromarray(np.full((4, 5), value, np.float32)))


def test_sixteen_bits_from_the_other_end_and_holes(tmp_path):
    write_tiff(tmp_path / "a.tif", RAMP.astype(">u2").tobytes(), 16, ">")
    assert is_grey(read(tmp_path / "a.tif"), GREY)
    holes = (RAMP / 65535).astype(np.float32)
    holes[0, :3] = np.nan, np.inf, -np.inf
    found = read(tmp_path / "b.tif", Image.fromarray(holes))
    assert found[0, :3, 0].tolist() == [0, 255, 0]
    assert is_grey(found[1:], GREY[1:])


def test_twelve_bits_are_the_files(tmp_path):
    """Cameras and scanners write twelve bits as two values in three bytes."""
    first, second = np.round(RAMP.reshape(-1, 2) / 65535 * 4095).astype(int).T
    data = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8)
    write_tiff(tmp_path / "a.tif", data.tobytes(), 12, "<")
    assert is_grey(read(tmp_path / "a.tif"), GREY)


def test_colours_of_sixteen_bits(tmp_path):
    """A PPM of 16 bits a channel; Pillow has 8 for it."""
    colours = np.stack([RAMP, RAMP[::-1], np.full_like(RAMP, 32768)], -1).astype(">u2")
    (tmp_path / "a.ppm").write_bytes(b"P6 64 48 65535\n" + colours.tobytes())
    assert np.abs(read(tmp_path / "a.ppm") - colours.astype(int) / 257).max() <= 1


def test_one_bit_and_transparent_palettes(tmp_path):
    bits = GREY > 100
    assert is_grey(read(tmp_path / "a.png", Image.fromarray(bits)), bits * np.uint8(255))
    palette = Image.fromarray(np.stack([GREY] * 3, -1)).quantize(16)
    wanted = np.asarray(palette.convert("RGB")).astype(int)
    palette.info["transparency"] = bytes(range(16))
    assert np.array_equal(read(tmp_path / "b.png", palette, transparency=bytes(range(16))), wanted)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "b.png", "a.tif", "packed.tif"])
def test_pictures_stand_upright(tmp_path, orientation, name):
    """A white corner that a camera held at any angle must leave at the top left."""
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the inverse of what EXIF asks for
    upright = np.zeros((32, 48), np.uint8)
    upright[:16, :16] = 255
    image = Image.fromarray(upright)
    if orientation > 1:
        image = image.transpose(Image.Transpose(turn[orientation]))
    if name == "b.png":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = orientation
    packed = {"compression": "tiff_lzw"} if name == "packed.tif" else {}
    found = read(tmp_path / name, image, exif=exif, **packed)
    assert found.shape == (32, 48, 3)
    assert np.abs(found - upright[..., None].astype(int)).max() < 30


def test_damaged_exif_data_leave_the_picture(tmp_path):
    """The orientation counts where it can be read, whatever is wrong beside it."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    whole, chance = exif.tobytes(), random.Random(0)
    image = Image.fromarray(GREY)
    assert read(tmp_path / "a.jpg", image, exif=whole).shape == (64, 48, 3)
    maker = b"\x01\x0f\x00\x02\x00\x00\x00\x06"
    assert whole.count(maker) == 1
    damaged = whole.replace(maker, b"\x01\x0f\x00\x0a\x00\x00\x00\x01")  # its name is a fraction
    assert read(tmp_path / "a.jpg", image, exif=damaged).shape == (64, 48, 3)
    for _ in range(100):
        content = bytearray(whole)
        content[chance.randrange(6, len(content))] = chance.choice([0, 1, 2, 5, 9, 255])
        assert read(tmp_path / "a.jpg", image, exif=bytes(content)).shape[2] == 3


def test_of_a_film_the_first_frame(tmp_path):
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "blue", "green")]
    for name in ("a.gif", "a.png", "a.tif"):
        found = read(tmp_path / name, frames[0], save_all=True, append_images=frames[1:])
        assert found[3, 3].tolist() == [255, 0, 0]


def test_many_pixels_are_no_reason_to_speak(tmp_path):
    """132 megapixels, of one bit each."""
    image = Image.new("1", (12000, 11000), 1)
    image.save(tmp_path / "a.png")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = open_picture(tmp_path / "a.png")
    assert (found.size, found.getpixel((7, 8))) == ((12000, 11000), (255, 255, 255))
    assert not seen


def test_warnings_come_back(tmp_path):
    """Pictures open also where several threads read."""
    Image.fromarray(GREY).save(tmp_path / "a.png")
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [open_picture(tmp_path / "a.png") for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


def picture(form):
    file = io.BytesIO()
    Image.fromarray(np.stack([GREY, GREY[::-1], GREY[:, ::-1]], -1)).save(file, form)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no format that Pillow knows"),
        (b"hello, this is text", "no format that Pillow knows"),
        (b"\xff\xd8 no image", "cannot be read as an image"),
        (picture("png")[:200], "cannot be read as an image"),
        (picture("jpeg")[:300], "cannot be read as an image"),
        (picture("bmp")[:300], "truncated"),
        (picture("tiff")[:-9], "cannot be read as an image"),
    ],
)
def test_what_is_no_picture_is_named(tmp_path, content, words):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.jpg cannot be read as an image: .") as raised:
        read(path)
    assert words in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_files_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"there is no image '.*none\.jpg'"):
        open_picture(tmp_path / "none.jpg")
    with pytest.raises(ValueError, match="is a folder; give a file"):
        open_picture(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.fromarray(GREY).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image: .*3072 pixels"):
        open_picture(tmp_path / "a.png")


def test_compare_reads_the_same_and_samples_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_photo("flower.jpg").size == (640, 427)
    Image.fromarray(RAMP.astype(np.uint16)).save(tmp_path / "flower.jpg", "png")  # one's own comes first
    assert is_grey(np.asarray(open_photo("flower.jpg")).astype(int), GREY)


@given(st.sampled_from(["png", "jpeg", "gif", "tiff", "bmp", "webp", "ppm"]), st.integers(0, 2**32))
@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_damaged_picture_is_read_or_named(tmp_path, form, seed):
    content, chance = bytearray(picture(form)), random.Random(seed)
    for _ in range(chance.randrange(1, 6)):
        content[chance.randrange(min(len(content), 400))] = chance.randrange(256)
    del content[chance.choice([len(content), chance.randrange(len(content))]) :]
    path = rewrite(tmp_path / "a", content)
    try:
        read(path)
    except ValueError as error:
        assert str(error).startswith(str(path))  # noqa: PT017


def test_the_reader_needs_no_torch(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    script = (
        "import sys\nfrom fastreduce.pictures import open_picture\n"
        f"print(open_picture({os.fspath(tmp_path / 'a.png')!r}).size, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "(64, 48) False\n", done.stderr
