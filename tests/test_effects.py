"""Effects of dimensions of a hand-made decoder, and shape measures of known shapes."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_figures import assert_legible, images

from experiments import tweak_dimensions
from experiments.analysis import effects, inspection

SLANT, HEIGHT, NOTHING = 0, 1, 2  # dimensions of a capsule
MEASURES = effects.MEASURES


class Bars:
    """A model of two classes of bars; the second is predicted if the first pixel is bright."""

    @jax.numpy_rank_promotion("allow")
    def __call__(self, images):
        bright = images[..., 0, 0, 0]
        first = jnp.broadcast_to(jnp.array([0.0, 0.0, 0.5]), (*bright.shape, 3))
        second = bright[..., None] * jnp.array([0.0, 0.0, 0.9])
        return jnp.stack([first, second], axis=-2)

    @jax.numpy_rank_promotion("allow")
    def reconstruct(self, capsules, labels):
        """Draw a bar with slant and height from the capsule; the second class slants in reverse."""
        chosen = jnp.take_along_axis(capsules, labels[..., None, None], axis=-2)[..., 0, :]
        y, x = jnp.meshgrid(jnp.arange(13.5, -14, -1), jnp.arange(-13.5, 14), indexing="ij")
        lean = chosen[..., SLANT, None, None] * jnp.where(labels == 1, -1, 1)[..., None, None]
        tall = 14 * (1 + chosen[..., HEIGHT, None, None])
        inside = jnp.minimum(2 - abs(x - lean * y), tall / 2 - abs(y))
        return jnp.clip(inside + 0.5, 0, 1)[..., None]


def measured(model, pictures):
    return effects.measure_effects(
        jax.jit(functools.partial(effects.reconstruct_tweaked, model)), pictures
    )


def index(name):
    return MEASURES.index(name)


@pytest.fixture(scope="module")
def found():
    pictures = np.zeros((5, 28, 28, 1), np.float32)
    pictures[3:] = 1
    return measured(Bars(), pictures)


def test_slant_and_height_dimensions_are_identified(found):
    assert found.predicted.tolist() == [0, 0, 0, 1, 1]
    changes = found.changes[0]
    lean = np.degrees(np.arctan(0.25) - np.arctan(-0.25))
    np.testing.assert_allclose(changes[SLANT, index("slant")], lean, rtol=0.05)
    np.testing.assert_allclose(changes[HEIGHT, index("height")], 14 * 0.5, rtol=0.05)
    np.testing.assert_allclose(changes[HEIGHT, index("slant")], 0, atol=1e-3)
    np.testing.assert_allclose(changes[:, index("width")], 0, atol=0.1)
    np.testing.assert_allclose(changes[NOTHING], 0, atol=1e-4)


def test_effects_are_separated_by_class(found):
    by_class = effects.mean_by_class(found, 3)
    np.testing.assert_allclose(
        by_class[0, SLANT, index("slant")], -by_class[1, SLANT, index("slant")], rtol=1e-3
    )
    assert np.isnan(by_class[2]).all()  # never predicted
    rows = effects.class_rows(found, 3)
    assert [(row["class"], row["images"], row["dimension"]) for row in rows] == [
        *((0, 3, d) for d in (1, 2, 3)),
        *((1, 2, d) for d in (1, 2, 3)),
    ]
    # Absolute changes are averaged, so that opposite signs of the classes do not cancel.
    table = effects.dimension_rows(found)
    assert [row["dimension"] for row in table] == [1, 2, 3]
    np.testing.assert_allclose(table[SLANT]["slant_degrees"], 28.07, rtol=0.05)


def test_changes_are_those_of_the_least_squares_line():
    values = np.array([-0.25, 0.0, 0.25])
    np.testing.assert_allclose(effects.fit_changes(3 * values + 7, values), 1.5)
    np.testing.assert_allclose(
        effects.fit_changes(np.array([[1.0, 5, 1], [0, 1, 1]]), values), [0, 1]
    )


def test_standard_deviations_are_about_class_means():
    measures = np.array([[1.0, 0.0], [3.0, 0.0], [10.0, 0.0], [12.0, 0.0]])
    found = effects.within_class_std(measures, np.array([4, 4, 7, 7]))
    np.testing.assert_allclose(found, [1, 0])
    np.testing.assert_allclose(effects.standardize(found, np.array([2.0, 2.0])), [2, 2])


def test_images_without_ink_in_a_reconstruction_are_skipped(monkeypatch):
    blank = Bars()
    reconstruct = blank.reconstruct
    monkeypatch.setattr(
        blank, "reconstruct", lambda c, k: reconstruct(c, k) * (k == 0)[..., None, None, None]
    )
    pictures = np.zeros((3, 28, 28, 1), np.float32)
    pictures[1] = 1
    assert measured(blank, pictures).predicted.tolist() == [0, 0]


def test_effects_do_not_depend_on_the_batch_size(monkeypatch, found):
    monkeypatch.setattr(effects, "_BATCH_SIZE", 2)
    pictures = np.zeros((5, 28, 28, 1), np.float32)
    pictures[3:] = 1
    for a, b in zip(measured(Bars(), pictures), found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(("D", "M"), [(16, 4), (3, 4), (40, 2)])
def test_heat_maps_are_legible(D, M):
    sizes = abs(np.random.default_rng(0).normal(size=(D, M)))
    assert_legible(
        tweak_dimensions.draw_effect_sizes(sizes, measures=MEASURES[:M], title="Of\nwhat")
    )


@pytest.mark.parametrize(("K", "D"), [(10, 16), (2, 3), (26, 16)])
def test_heat_maps_by_class_are_legible(K, D):
    changes = np.random.default_rng(0).normal(size=(K, D, 4))
    changes[0] = np.nan
    assert_legible(
        tweak_dimensions.draw_class_effects(changes, measures=MEASURES, title="Of\nwhat")
    )


@pytest.mark.parametrize(("D", "C"), [(4, 1), (2, 3)])
def test_animation_runs_through_the_values_and_back(D, C):
    values = inspection.TWEAKS
    grid = images(D, len(values), 28, 28, C)
    animation = Image.open(io.BytesIO(tweak_dimensions.animate(grid, values=values)))
    assert animation.n_frames == 20
    frames = []
    for frame in range(20):
        animation.seek(frame)
        frames.append(np.asarray(animation.convert("L"), int))
    assert abs(frames[1] - frames[19]).mean() < abs(frames[1] - frames[2]).mean() / 4
    assert len({frame.tobytes() for frame in frames}) >= len(values)


FINE = 8  # samples per pixel along each axis


def rasterise(inside, *, side=28):
    """Rasterise a predicate of x (right) and y (up) from the centre, as coverage of each pixel."""
    places = (np.arange(side * FINE) + 0.5) / FINE - side / 2
    x, y = np.meshgrid(places, -places)
    return inside(x, y).reshape(side, FINE, side, FINE).mean(axis=(1, 3))


def bar(across, tall, *, shear=0.0, turn=0.0, at=(0.0, 0.0)):
    """Draw a bar, sheared to the right (tangent) or rotated anticlockwise (degrees)."""

    def inside(x, y):
        x, y = x - at[0], y - at[1]
        cosine, sine = np.cos(np.radians(turn)), np.sin(np.radians(turn))
        x, y = cosine * x + sine * y, cosine * y - sine * x
        return (abs(x - shear * y) < across / 2) & (abs(y) < tall / 2)

    return rasterise(inside)


def ellipse(across, tall, *, hole=0.0):
    """Draw an ellipse, or a ring whose hole has the given fraction of its axes."""

    def inside(x, y):
        radius = np.hypot(2 * x / across, 2 * y / tall)
        return (radius < 1) & (radius >= hole)

    return rasterise(inside)


@pytest.mark.parametrize(("across", "tall"), [(4, 20), (3, 9), (20, 4), (2.5, 16.5)])
@pytest.mark.parametrize("at", [(0, 0), (3, -2), (0.25, 0.5)])
def test_bars_have_their_size_at_any_position(across, tall, at):
    found = effects.measure_shape(bar(across, tall, at=at))
    # Partly covered pixels widen the edges.
    np.testing.assert_allclose((found.width, found.height), (across, tall), atol=0.5)
    np.testing.assert_allclose(found.slant, 0, atol=1e-6)


@pytest.mark.parametrize(("across", "tall"), [(4, 18), (18, 4), (2, 2)])
def test_bars_of_whole_pixels_are_exact(across, tall):
    found = effects.measure_shape(bar(across, tall))
    np.testing.assert_allclose((found.width, found.height), (across, tall), rtol=1e-12)


@pytest.mark.parametrize(("across", "tall"), [(10, 18), (16, 12)])
def test_ellipses_have_the_second_moments_of_their_axes(across, tall):
    found = effects.measure_shape(ellipse(across, tall))
    # The variance along an axis of length a is a² / 16.
    expected = np.sqrt(12) / 4 * np.array([across, tall])
    np.testing.assert_allclose((found.width, found.height), expected, rtol=0.02)
    np.testing.assert_allclose(found.slant, 0, atol=1e-6)


@pytest.mark.parametrize("degrees", [-35, -10, 5, 20, 40])
def test_shear_changes_only_the_slant(degrees):
    found = effects.measure_shape(bar(4, 16, shear=np.tan(np.radians(degrees))))
    np.testing.assert_allclose(found.slant, degrees, atol=0.5)
    np.testing.assert_allclose(found.width, 4, atol=0.4)
    np.testing.assert_allclose(found.height, 16, atol=0.1)


@pytest.mark.parametrize(
    ("across", "tall", "turn"),
    [(3, 20, 0), (2, 20, 0), (5, 20, 0), (20, 4, 0), (3, 20, 45), (3, 20, -20), (4, 16, 70)],
)
def test_stroke_width_of_bars(across, tall, turn):
    found = effects.measure_shape(bar(across, tall, turn=turn))
    np.testing.assert_allclose(found.stroke_width, across * tall / (across + tall), rtol=0.06)


@pytest.mark.parametrize("width", [2, 3, 4])
def test_stroke_width_of_rings(width):
    found = effects.measure_shape(ellipse(18, 18, hole=1 - 2 * width / 18))
    np.testing.assert_allclose(found.stroke_width, width, rtol=0.04)


@pytest.mark.parametrize(("across", "tall"), [(18, 18), (10, 20)])
def test_perimeter_of_ellipses(across, tall):
    a, b = across / 2, tall / 2
    expected = np.pi * (3 * (a + b) - np.sqrt((3 * a + b) * (a + 3 * b)))  # Ramanujan's first
    np.testing.assert_allclose(effects.perimeter(ellipse(across, tall)), expected, rtol=0.02)


def test_thicker_rings_have_a_larger_stroke_width_and_equal_slant():
    thin, thick = (effects.measure_shape(ellipse(18, 18, hole=hole)) for hole in (0.8, 0.6))
    assert thick.stroke_width > thin.stroke_width + 1.5
    np.testing.assert_allclose((thick.slant, thin.slant), 0, atol=1e-6)


def test_blur_below_a_tenth_is_ignored():
    image = bar(4, 18)
    blurred = np.where(image == 0, 0.09, image)
    np.testing.assert_array_equal(effects.measure_shape(blurred), effects.measure_shape(image))


def test_measures_are_vectorised():
    images = np.stack([bar(4, 18), ellipse(9, 17), bar(3, 9, turn=30), ellipse(12, 12, hole=0.5)])
    found = effects.measure_shape(images.reshape(2, 2, 28, 28))
    alone = np.array([effects.measure_shape(image) for image in images]).T.reshape(4, 2, 2)
    np.testing.assert_allclose(found, alone, atol=1e-9)


def test_measures_of_blank_images_are_nan():
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
def test_invalid_images_have_no_shape(images, message):
    with pytest.raises(ValueError, match=rf"^measure_shape: {message}$"):
        effects.measure_shape(images)
