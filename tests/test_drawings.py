"""Drawings found on photographs."""

import io

import numpy as np
import photographs
import pytest
from PIL import Image

from experiments.data import datasets, drawings, image_files


@pytest.fixture(scope="module")
def digits():
    return datasets.load("mnist_small").test.images[:, :, :, 0]


@pytest.mark.parametrize("kind", photographs.KINDS)
def test_a_digit_is_found_on_a_photograph(tmp_path, digits, kind):
    overlaps = []
    for seed in range(9000, 9006):
        digit = digits[seed % 1000]
        (tmp_path / "photo").write_bytes(photographs.make(digit, kind, seed))
        found = image_files.read_pictures([str(tmp_path / "photo")], shape=(28, 28, 1))[0].pixels
        overlaps.append(np.corrcoef(found.ravel(), digit.ravel())[0, 1])
    assert np.median(overlaps) > 0.75, overlaps


def sheet(*boxes, size=(200, 300), level=0.9):
    pixels = np.full(size, level, np.float32)
    for top, left, bottom, right in boxes:
        pixels[top:bottom, left:right] = 0.1
    return pixels


def test_two_drawings_are_said_and_one_is_taken():
    drawing = drawings.find(sheet((50, 60, 150, 80), (50, 160, 148, 180)))
    assert drawing.doubt == "2 separate drawings; the largest is taken"
    assert not drawing.ink[:, 100:].any()
    assert drawing.ink[60:140, 62:78].all()


def test_parts_of_one_drawing_stay_together():
    drawing = drawings.find(sheet((50, 60, 150, 80), (40, 90, 60, 130)))
    assert drawing.doubt == ""
    assert drawing.ink[42:58, 92:128].all()


@pytest.mark.parametrize("paper", [0.9, 0.3])
def test_light_and_dark_ink_are_told_by_the_paper(paper):
    pixels = sheet((50, 60, 150, 80), level=0.9)
    drawing = drawings.find(pixels if paper == 0.9 else 1 - pixels)
    assert drawing.ink[60:140, 62:78].all()


def test_a_speck_and_a_stroke_at_the_edge_are_left_out():
    drawing = drawings.find(sheet((50, 60, 150, 80), (20, 250, 24, 254), (0, 0, 200, 6)))
    assert drawing.doubt == ""
    assert not drawing.ink[:, 100:].any()
    assert not drawing.ink[:, :40].any()


def test_paper_without_a_drawing_has_none():
    assert drawings.find(np.full((50, 60), 0.5, np.float32)) is None


def test_sixteen_bit_pictures_equal_those_of_eight(tmp_path, digits):
    grey = Image.open(io.BytesIO(photographs.make(digits[3], "shadow", 3)))
    wide = Image.fromarray(np.asarray(grey, np.uint16) * 257)
    paths = [str(tmp_path / "grey.png"), str(tmp_path / "wide.png"), str(tmp_path / "wide.tif")]
    for path, image in zip(paths, (grey, wide, wide), strict=True):
        image.save(path)
    first, *others = image_files.read_images(paths, shape=(28, 28, 1))
    for other in others:
        np.testing.assert_array_equal(other, first)
