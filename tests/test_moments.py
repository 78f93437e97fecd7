"""Shapes of known size, drawn finely and averaged down as a scanner would, and measured again."""

import numpy as np
import pytest

from experiments.analysis import effects

FINE = 8  # samples a pixel, along each axis


def drawn(inside, *, side=28):
    """The share of each pixel that is inside; x to the right, y up, from the image's middle."""
    places = (np.arange(side * FINE) + 0.5) / FINE - side / 2
    x, y = np.meshgrid(places, -places)
    return inside(x, y).reshape(side, FINE, side, FINE).mean(axis=(1, 3))


def bar(across, tall, *, shear=0.0, turn=0.0, at=(0.0, 0.0)):
    """A bar, sheared to the right or turned anticlockwise by so many degrees."""

    def inside(x, y):
        x, y = x - at[0], y - at[1]
        cosine, sine = np.cos(np.radians(turn)), np.sin(np.radians(turn))
        x, y = cosine * x + sine * y, cosine * y - sine * x
        return (abs(x - shear * y) < across / 2) & (abs(y) < tall / 2)

    return drawn(inside)


def ellipse(across, tall, *, hole=0.0):
    """An ellipse; a hole is the share of its axes that is empty."""

    def inside(x, y):
        radius = np.hypot(2 * x / across, 2 * y / tall)
        return (radius < 1) & (radius >= hole)

    return drawn(inside)


@pytest.mark.parametrize(("across", "tall"), [(4, 20), (3, 9), (20, 4), (2.5, 16.5)])
@pytest.mark.parametrize("at", [(0, 0), (3, -2), (0.25, 0.5)])
def test_a_bar_has_its_width_and_height_wherever_it_is(across, tall, at):
    found = effects.measure_shape(bar(across, tall, at=at))
    # What an edge leaves of a pixel spreads over all of it.
    np.testing.assert_allclose((found.width, found.height), (across, tall), atol=0.5)
    np.testing.assert_allclose(found.slant, 0, atol=1e-6)


@pytest.mark.parametrize(("across", "tall"), [(4, 18), (18, 4), (2, 2)])
def test_a_bar_of_whole_pixels_is_exact(across, tall):
    found = effects.measure_shape(bar(across, tall))
    np.testing.assert_allclose((found.width, found.height), (across, tall), rtol=1e-12)


@pytest.mark.parametrize(("across", "tall"), [(10, 18), (16, 12)])
def test_an_ellipse_has_the_spread_of_its_axes(across, tall):
    found = effects.measure_shape(ellipse(across, tall))
    # The variance along an axis of length a is a² / 16.
    wanted = np.sqrt(12) / 4 * np.array([across, tall])
    np.testing.assert_allclose((found.width, found.height), wanted, rtol=0.02)
    np.testing.assert_allclose(found.slant, 0, atol=1e-6)


@pytest.mark.parametrize("degrees", [-35, -10, 5, 20, 40])
def test_a_shear_is_the_slant_and_leaves_width_and_height(degrees):
    found = effects.measure_shape(bar(4, 16, shear=np.tan(np.radians(degrees))))
    np.testing.assert_allclose(found.slant, degrees, atol=0.5)
    np.testing.assert_allclose(found.width, 4, atol=0.4)
    np.testing.assert_allclose(found.height, 16, atol=0.1)


@pytest.mark.parametrize(
    ("across", "tall", "turn"),
    [(3, 20, 0), (2, 20, 0), (5, 20, 0), (20, 4, 0), (3, 20, 45), (3, 20, -20), (4, 16, 70)],
)
def test_a_stroke_has_its_width(across, tall, turn):
    found = effects.measure_shape(bar(across, tall, turn=turn))
    np.testing.assert_allclose(found.stroke_width, across * tall / (across + tall), rtol=0.06)


@pytest.mark.parametrize("width", [2, 3, 4])
def test_a_ring_has_the_width_of_its_stroke(width):
    found = effects.measure_shape(ellipse(18, 18, hole=1 - 2 * width / 18))
    np.testing.assert_allclose(found.stroke_width, width, rtol=0.04)


@pytest.mark.parametrize(("across", "tall"), [(18, 18), (10, 20)])
def test_the_perimeter_of_an_ellipse(across, tall):
    a, b = across / 2, tall / 2
    wanted = np.pi * (3 * (a + b) - np.sqrt((3 * a + b) * (a + 3 * b)))  # Ramanujan's first
    np.testing.assert_allclose(effects.perimeter(ellipse(across, tall)), wanted, rtol=0.02)


def test_a_thicker_stroke_of_the_same_outline_is_thicker_and_nothing_else():
    thin, thick = (effects.measure_shape(ellipse(18, 18, hole=hole)) for hole in (0.8, 0.6))
    assert thick.stroke_width > thin.stroke_width + 1.5
    np.testing.assert_allclose((thick.slant, thin.slant), 0, atol=1e-6)


def test_blur_below_a_tenth_is_no_ink():
    image = bar(4, 18)
    blurred = np.where(image == 0, 0.09, image)
    np.testing.assert_array_equal(effects.measure_shape(blurred), effects.measure_shape(image))


def test_many_images_are_measured_as_each_alone():
    images = np.stack([bar(4, 18), ellipse(9, 17), bar(3, 9, turn=30), ellipse(12, 12, hole=0.5)])
    found = effects.measure_shape(images.reshape(2, 2, 28, 28))
    alone = np.array([effects.measure_shape(image) for image in images]).T.reshape(4, 2, 2)
    np.testing.assert_allclose(found, alone, atol=1e-9)


def test_an_image_without_ink_has_no_shape():
    found = effects.measure_shape(np.stack([np.zeros((28, 28)), bar(4, 18)]))
    np.testing.assert_array_equal(np.isnan(found), np.array([[True, False]] * 4))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros(28), r"images must have shape \[..., H, W\], got \(28,\)"),
        (np.full((2, 2), 1.5), r"images must lie in \[0, 1\], got 1.5 to 1.5"),
        (np.full((2, 2), np.nan), r"images must lie in \[0, 1\], got nan to nan"),
    ],
)
def test_what_is_no_image_is_refused(images, message):
    with pytest.raises(ValueError, match=rf"^measure_shape: {message}$"):
        effects.measure_shape(images)
