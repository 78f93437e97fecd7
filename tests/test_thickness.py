"""Strokes get as much wider as is asked for."""

import numpy as np
import pytest
from scipy import ndimage

from experiments.measure_equivariance import change_stroke_width

CHANGES = (-1.5, -0.6, 0.0, 0.3, 1.0, 2.2)


def test_a_bar_gets_wider_by_the_change():
    images = np.zeros((2, 28, 28, 1), np.float32)
    images[0, :, 11:15] = 0.8
    images[1, 9:14, :] = 0.8
    result = change_stroke_width(images, CHANGES)
    assert result.shape == (6, 2, 28, 28, 1)
    for change, (upright, flat) in zip(CHANGES, result[..., 0], strict=True):
        # Away from the image's border, which cuts the bars.
        np.testing.assert_allclose(upright[14].sum() / 0.8, 4 + change, atol=0.01)
        np.testing.assert_allclose(flat[:, 14].sum() / 0.8, 5 + change, atol=0.01)


@pytest.mark.parametrize("change", [-1.5, 1.5])
def test_it_is_a_dilation_or_an_erosion_by_a_disc(change):
    image = np.zeros((28, 28), np.float32)
    image[8:20, 9:13] = image[8:12, 9:20] = 1
    fine = np.kron(image, np.ones((8, 8))) > 0.5
    radius = abs(change) / 2 * 8
    steps = np.arange(-8, 9)
    disc = np.hypot(*np.meshgrid(steps, steps)) <= radius
    operation = ndimage.binary_dilation if change > 0 else ndimage.binary_erosion
    wanted = operation(fine, disc).reshape(28, 8, 28, 8).mean((1, 3))
    found = change_stroke_width(image[None, ..., None], [change])[0, 0, ..., 0]
    assert np.abs(found - wanted).max() < 0.2  # of one pixel: discs of another grid
    np.testing.assert_allclose(found.sum(), wanted.sum(), rtol=0.03)


def test_what_is_thicker_contains_what_is_thinner_and_blank_stays_blank():
    images = np.random.default_rng(0).random((3, 14, 14, 3), np.float32) ** 4
    images[1] = 0
    result = change_stroke_width(images, CHANGES)
    assert result.min() >= 0
    assert (result.max((1, 2, 3, 4)) <= images.max() + 1e-6).all()
    assert (np.diff(result, axis=0) >= -1e-6).all()
    assert not result[:, 1].any()
    assert result[-1, 0].mean() > 2 * result[0, 0].mean()
