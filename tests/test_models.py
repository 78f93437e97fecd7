"""Modules and CapsNet: parameter counts, what a pixel touches, what masks and dtypes do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import capsjax
from capsjax import nn
from capsjax.models import CapsNet

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _count(module):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def _small(**settings):
    defaults = {"conv_channels": 4, "primary_types": 2, "hidden": (6,), "rngs": nnx.Rngs(0)}
    return CapsNet(**defaults | settings)


def test_the_papers_parameter_counts():
    model = nnx.eval_shape(lambda: CapsNet(rngs=nnx.Rngs(0)))
    assert _count(model.convolution) == 20_992
    assert _count(model.primary) == 5_308_672
    assert _count(model.capsules) == 1_474_560
    assert _count(model.decoder) == 1_411_344
    assert _count(model) == 8_215_568


def test_one_pixel_touches_only_capsules_whose_window_sees_it():
    layer = nn.PrimaryCapsules(1, types=3, length=8, kernel_size=5, stride=2, rngs=nnx.Rngs(0))
    dark = jnp.zeros((13, 13, 1))
    row, column = 6, 9
    moved = layer(dark.at[row, column, 0].set(1.0)) - layer(dark)
    touched = np.abs(moved).max(-1).reshape(5, 5, 3) > 0  # rows, columns, types
    # Window (y, x) covers pixels 2y … 2y + 4.
    seen_rows = [2 * y <= row < 2 * y + 5 for y in range(5)]
    seen_columns = [2 * x <= column < 2 * x + 5 for x in range(5)]
    wanted = np.outer(seen_rows, seen_columns)
    np.testing.assert_array_equal(touched, np.repeat(wanted[:, :, None], 3, axis=2))


def test_a_primary_capsule_is_length_channels_at_one_position():
    layer = nn.PrimaryCapsules(2, types=3, length=4, kernel_size=3, stride=2, rngs=nnx.Rngs(0))
    images = jnp.asarray(np.random.default_rng(0).random((7, 7, 2)), jnp.float32)
    maps = np.asarray(layer.convolution(images))
    # By rows, columns and types: a type has its channels next to each other.
    channels = [
        maps[row, column, 4 * kind : 4 * kind + 4] for row, column, kind in np.ndindex(3, 3, 3)
    ]
    np.testing.assert_allclose(layer(images), capsjax.squash(np.stack(channels)), rtol=1e-6)


def test_scale_and_bias_of_the_authors_code():
    paper = nn.PrimaryCapsules(1, types=2, length=4, rngs=nnx.Rngs(0))
    official = nn.PrimaryCapsules(1, types=2, length=4, scale=0.5, bias=0.1, rngs=nnx.Rngs(0))
    images = jnp.asarray(np.random.default_rng(0).random((20, 20, 1)), jnp.float32)
    np.testing.assert_allclose(
        official.convolution(images), 0.5 * paper.convolution(images) + 0.1, atol=1e-6
    )
    layer = nn.Capsules(6, 4, 3, 5, routing=nn.DynamicRouting(bias=0.1), rngs=nnx.Rngs(0))
    assert _count(layer) == 6 * 4 * 3 * 5 + 3 * 5
    zero = layer(jnp.zeros((6, 4)))
    np.testing.assert_allclose(zero, capsjax.squash(jnp.full((3, 5), 0.1)), rtol=1e-6)


@pytest.mark.parametrize(
    ("image_shape", "positions"),
    [((28, 28, 1), 6 * 6), ((36, 36, 1), 10 * 10), ((32, 32, 3), 8 * 8), ((17, 20, 2), 1 * 2)],
)
def test_any_image_size_and_channel_count(image_shape, positions):
    def shapes(images):
        model = _small(image_shape=image_shape, num_classes=7)
        outputs = model(images)
        return model.primary_poses(images), outputs, model.reconstruct(outputs)

    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    poses, outputs, drawn = jax.eval_shape(shapes, images)
    assert poses.shape == (2, positions * 2, 8)
    assert outputs.shape == (2, 7, 16)
    assert drawn.shape == images.shape


def test_images_too_small_are_refused():
    with pytest.raises(ValueError, match="image_shape must be at least 17 pixels high and wide"):
        _small(image_shape=(16, 28, 1))


def test_the_decoder_sees_one_class_only():
    model = _small()
    capsules = jnp.asarray(np.random.default_rng(0).normal(size=(4, 10, 16)), jnp.float32)
    labels = jnp.array([3, 1, 4, 1])
    drawn = model.reconstruct(capsules, labels)
    others = capsules.at[jnp.arange(4), labels].set(0)
    np.testing.assert_array_equal(model.reconstruct(capsules - others, labels), drawn)
    longest = jnp.argmax(capsjax.lengths(capsules), -1)
    np.testing.assert_array_equal(model.reconstruct(capsules), model.reconstruct(capsules, longest))
    assert 0 <= drawn.min() <= drawn.max() <= 1


def test_settings_reach_the_routing(monkeypatch):
    calls = []

    def record(poses, weights, **settings):
        calls.append(settings)
        return capsjax.dynamic_routing(poses, weights, **settings)

    monkeypatch.setattr("capsjax.nn.routings.dynamic_routing", record)
    images = jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.float32)
    settings = {"num_iterations": 2, "gradient": "last", "implementation": "reference"}
    for wanted in settings, {"num_iterations": 3, "gradient": "full", "implementation": None}:
        given = wanted if wanted is settings else {}
        jax.eval_shape(lambda images, given=given: _small(**given)(images), images)
        assert {name: calls[-1][name] for name in wanted} == wanted
    assert len(calls) == 2


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    def run(images):
        model = _small(dtype=jnp.bfloat16)
        outputs = model(images)
        return outputs, model.reconstruct(outputs), jax.tree.leaves(nnx.state(model))

    images = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    outputs, drawn, parameters = jax.eval_shape(run, images)
    assert outputs.dtype == drawn.dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in parameters} == {"float32"}


def test_no_image_gives_no_capsule_and_no_drawing():
    model = _small()
    capsules = model(jnp.zeros((0, 28, 28, 1)))
    assert capsules.shape[0] == 0
    assert model.reconstruct(capsules).shape == (0, 28, 28, 1)


def test_a_layer_with_a_bias_computes_in_float64():
    with jax.enable_x64(True):
        layer = nn.Capsules(
            6, 4, 3, 5, routing=nn.DynamicRouting(bias=0.1), dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
        assert layer(jnp.ones((2, 6, 4))).dtype == jnp.float64
        assert layer.couplings(jnp.ones((2, 6, 4))).dtype == jnp.float64


def test_couplings_need_all_weights():
    layer = nn.Capsules(6, 4, 3, 5, axis_name="capsules", rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"^Capsules\.couplings: axis_name must be None, got 'caps"
    ):
        layer.couplings(jnp.ones((2, 6, 4)))


@pytest.mark.parametrize("labels", [[0, 10], [-1, 2]])
def test_reconstruct_refuses_labels_that_are_no_class(labels):
    model, capsules = _small(), jnp.ones((2, 10, 16))
    with pytest.raises(ValueError, match=r"CapsNet\.reconstruct: labels must be 0 to 9, got"):
        model.reconstruct(capsules, jnp.array(labels))
    traced = jax.jit(lambda labels: model.reconstruct(capsules, labels))(jnp.array(labels))
    assert traced.shape == (2, 28, 28, 1)
