"""What a dimension means is found again when it is known, because a decoder was made by hand."""

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
    """Two classes of bars: the capsule of the second is longer where the first pixel is bright."""

    @jax.numpy_rank_promotion("allow")
    def __call__(self, images):
        bright = images[..., 0, 0, 0]
        first = jnp.broadcast_to(jnp.array([0.0, 0.0, 0.5]), (*bright.shape, 3))
        second = bright[..., None] * jnp.array([0.0, 0.0, 0.9])
        return jnp.stack([first, second], axis=-2)

    @jax.numpy_rank_promotion("allow")
    def reconstruct(self, capsules, labels):
        """The first class leans and grows with its dimensions; the second leans the other way."""
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


def test_a_dimension_that_leans_and_one_that_grows_are_told_apart(found):
    assert found.predicted.tolist() == [0, 0, 0, 1, 1]
    changes = found.changes[0]
    lean = np.degrees(np.arctan(0.25) - np.arctan(-0.25))
    np.testing.assert_allclose(changes[SLANT, index("slant")], lean, rtol=0.05)
    np.testing.assert_allclose(changes[HEIGHT, index("height")], 14 * 0.5, rtol=0.05)
    np.testing.assert_allclose(changes[HEIGHT, index("slant")], 0, atol=1e-3)
    np.testing.assert_allclose(changes[:, index("width")], 0, atol=0.1)
    np.testing.assert_allclose(changes[NOTHING], 0, atol=1e-4)


def test_a_dimension_may_mean_another_thing_in_another_class(found):
    by_class = effects.mean_by_class(found, 3)
    np.testing.assert_allclose(
        by_class[0, SLANT, index("slant")], -by_class[1, SLANT, index("slant")], rtol=1e-3
    )
    assert np.isnan(by_class[2]).all()  # it never won
    rows = effects.class_rows(found, 3)
    assert [(row["class"], row["images"], row["dimension"]) for row in rows] == [
        *((0, 3, d) for d in (1, 2, 3)),
        *((1, 2, d) for d in (1, 2, 3)),
    ]
    # Over both classes its size counts, so that opposite signs do not cancel.
    table = effects.dimension_rows(found)
    assert [row["dimension"] for row in table] == [1, 2, 3]
    np.testing.assert_allclose(table[SLANT]["slant_degrees"], 28.07, rtol=0.05)


def test_a_change_is_that_of_the_best_line():
    values = np.array([-0.25, 0.0, 0.25])
    np.testing.assert_allclose(effects.fit_changes(3 * values + 7, values), 1.5)
    np.testing.assert_allclose(
        effects.fit_changes(np.array([[1.0, 5, 1], [0, 1, 1]]), values), [0, 1]
    )


def test_deviations_are_from_the_mean_of_a_class():
    measures = np.array([[1.0, 0.0], [3.0, 0.0], [10.0, 0.0], [12.0, 0.0]])
    found = effects.within_class_std(measures, np.array([4, 4, 7, 7]))
    np.testing.assert_allclose(found, [1, 0])
    np.testing.assert_allclose(effects.standardize(found, np.array([2.0, 2.0])), [2, 2])


def test_images_that_are_drawn_without_ink_are_left_out(monkeypatch):
    blank = Bars()
    drawn = blank.reconstruct
    monkeypatch.setattr(
        blank, "reconstruct", lambda c, k: drawn(c, k) * (k == 0)[..., None, None, None]
    )
    pictures = np.zeros((3, 28, 28, 1), np.float32)
    pictures[1] = 1
    assert measured(blank, pictures).predicted.tolist() == [0, 0]


def test_effects_over_more_images_than_pass_at_a_time(monkeypatch, found):
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


@pytest.mark.parametrize(("D", "C"), [(16, 1), (3, 3)])
def test_an_animation_goes_to_and_fro_and_is_small(D, C):
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
