import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")
from fastreduce import draw

CELL = 16


def picture(rows=3, columns=4, brightness=60, seed=0):
    """Draw dark or light noise, every patch with a colour of its own."""
    random = np.random.default_rng(seed)
    base = np.kron(random.integers(0, 60, (rows, columns, 3)), np.ones((CELL, CELL, 1), int))
    noise = random.integers(0, 20, base.shape)
    return (base + noise + brightness).clip(0, 255).astype(np.uint8)


def inside(image, row, column):
    """Return a patch without the pixels where a line may be."""
    return image[row * CELL + 1 : (row + 1) * CELL - 1, column * CELL + 1 : (column + 1) * CELL - 1].astype(int)


@pytest.mark.parametrize("brightness", [40, 180])
def test_dropped_patches_turn_grey_and_kept_ones_stay(brightness):
    image = picture(brightness=brightness)
    before = image.copy()
    kept = np.array([[1, 1, 0, 1], [0, 1, 1, 0], [1, 0, 0, 1]], bool)
    out = draw.grey_dropped(image, kept)
    assert out.shape == image.shape
    assert out.dtype == np.uint8
    assert (image == before).all()
    for row, column in np.ndindex(kept.shape):
        new, old = inside(out, row, column), inside(image, row, column)
        if kept[row, column]:
            assert (new == old).all()
        else:
            assert (new.max(-1) - new.min(-1)).max() == 0, "a dropped patch has a colour"
            assert abs(new.mean() - old.mean()) > 60, "a dropped patch does not stand apart"
            assert new.std() < 0.3 * old.std()


def test_a_line_runs_where_kept_meets_dropped_and_nowhere_else():
    image = picture(1, 3, brightness=180)
    out = draw.grey_dropped(image, np.array([[1, 1, 0]], bool))
    assert (out[:, 2 * CELL - 1 : 2 * CELL + 1] == 255).all()
    assert (out[:, CELL - 1 : CELL + 1] == image[:, CELL - 1 : CELL + 1]).all()


def test_all_kept_is_the_photo():
    image = picture()
    assert (draw.grey_dropped(image, np.ones((3, 4), bool)) == image).all()


def test_merged_regions_have_one_colour_their_mean():
    image = picture()
    slot = np.array([[0, 0, 1, 2], [0, 3, 1, 4], [5, 6, 7, 0]])  # slot 0 has a patch far from the others
    out = draw.fill_merged(image, slot)
    for value in (0, 1):
        where = np.argwhere(slot == value)
        means = [image[r * CELL : (r + 1) * CELL, c * CELL : (c + 1) * CELL].mean((0, 1)) for r, c in where]
        for row, column in where:
            pixels = inside(out, row, column)
            assert (pixels == pixels[0, 0]).all()
            assert np.abs(pixels[0, 0] - np.mean(means, 0)).max() <= 0.51
    for row, column in np.argwhere(slot > 1):
        assert (inside(out, row, column) == inside(image, row, column)).all()


def test_merged_regions_are_outlined():
    image = picture(2, 2, brightness=40)
    out = draw.fill_merged(image, np.array([[0, 0], [1, 2]]))
    assert (out[CELL - 1 : CELL + 1] == 255).all(), "no line around the region"
    inner = out[1 : CELL - 1, CELL - 1 : CELL + 1]
    assert (inner == inner[0, 0]).all(), "a line inside the region"
    below = out[CELL + 1 :, CELL - 1 : CELL + 1]
    assert (below == image[CELL + 1 :, CELL - 1 : CELL + 1]).all(), "a line between patches that nothing happened to"


def test_nothing_merged_is_the_photo():
    image = picture()
    assert (draw.fill_merged(image, np.arange(12).reshape(3, 4)) == image).all()


def test_dropped_patches_of_a_merge_turn_grey():
    image = picture(1, 3)
    out = draw.fill_merged(image, np.array([[-1, 0, 0]]))
    pixels = inside(out, 0, 0)
    assert (pixels.max(-1) == pixels.min(-1)).all()
    assert (inside(out, 0, 1) == inside(out, 0, 2)[0, 0]).all()


def test_pictures_that_do_not_fit_the_grid_are_refused():
    with pytest.raises(ValueError, match="48 x 64 pixels cannot be cut into a grid of 5 x 4"):
        draw.grey_dropped(picture(), np.ones((5, 4), bool))


@pytest.mark.parametrize("draw_on", [draw.grey_dropped, draw.fill_merged])
@pytest.mark.parametrize(
    ("photo", "words"),
    [
        (np.zeros((48, 64, 3), np.float32), r"\(48, 64, 3\) float32"),
        (np.zeros((48, 64), np.uint8), r"\(48, 64\) uint8"),
        (np.zeros((3, 48, 64), np.uint8), r"\(3, 48, 64\) uint8"),
    ],
)
def test_what_is_no_picture_of_eight_bits_is_refused(draw_on, photo, words):
    """Floats from 0 to 1 became a black picture."""
    with pytest.raises(ValueError, match=words):
        draw_on(photo, np.ones((3, 4), bool if draw_on is draw.grey_dropped else int))


def test_no_panels_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one picture"):
        draw.save_panels(tmp_path / "x.png", [], "title")


def test_panels_keep_every_pixel(tmp_path):
    first, second = picture(seed=1), picture(brightness=180, seed=2)
    file = tmp_path / "panels.png"
    draw.save_panels(file, [(first, "input", "12 patches"), (second, "block 3", "6")], "Top-K", "keep rate 0.5", "note")
    with Image.open(file) as opened:
        assert opened.info["dpi"][0] == pytest.approx(200, abs=0.1)
        pixels = np.array(opened.convert("RGB"))
    assert pixels.shape[1] > 2 * first.shape[1]
    for panel in (first, second):
        windows = np.lib.stride_tricks.sliding_window_view(pixels[..., 0], panel.shape[:2])
        corner = np.argwhere((windows[:, :, 0] == panel[0, :, 0]).all(-1))
        found = [
            tuple(at) for at in corner if (pixels[at[0] :, at[1] :][: len(panel), : panel.shape[1]] == panel).all()
        ]
        assert len(found) == 1, "the picture was resampled"
