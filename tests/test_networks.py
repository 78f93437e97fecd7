"""Tests of `training.networks`: parameter counts, padding and pooling of the CNNs."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax import lax

from experiments.errors import InputError
from experiments.training import networks

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        ("cnn", 35_445_522),  # the paper says 35.4 million
        ("pooling_cnn", 317_066),
        ("pooling_cnn_160k", 161_816),  # Efficient-CapsNet has 161,824
        ("pooling_cnn_8m", 8_205_778),  # CapsNet has 8,215,568 with its decoder
        ("capsnet", 8_215_568),  # and 8.2 million
    ],
)
def test_networks_have_as_many_parameters_as_published(network, parameters):
    settings = networks.Settings(network=network)
    model = nnx.eval_shape(lambda: networks.build(settings, (28, 28, 1), 10, seed=0))
    leaves = jax.tree.leaves(nnx.state(model))
    assert sum(leaf.size for leaf in leaves) == parameters


def random_cnn(image_shape, **settings):
    """Return the graph and random parameters of a CNN; compiles nothing."""
    rng = np.random.default_rng(1)
    graph, shapes = nnx.split(
        nnx.eval_shape(lambda: networks.Cnn(image_shape, 3, **settings, rngs=nnx.Rngs(0)))
    )
    return graph, jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(x.dtype), shapes)


@pytest.mark.parametrize("kernel_size", [4, 5])
def test_convolutions_equal_those_of_xla_with_padding(kernel_size):
    graph, state = random_cnn((7, 6, 2), channels=(3, 4), kernel_size=kernel_size, hidden=(5,))
    images = np.random.default_rng(0).normal(size=(2, 7, 6, 2)).astype("float32")

    @jax.jit
    def both(state, images):
        model, x = nnx.merge(graph, state), images
        for convolution in model.convolutions:
            x = lax.conv_general_dilated(
                *(x, convolution.kernel[...], (1, 1), "SAME"),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = jax.nn.relu(x + convolution.bias[...].reshape(1, 1, 1, -1))
        return model.features(images), jax.nn.relu(model.layers[0](x.reshape(2, -1)))

    np.testing.assert_allclose(*both(state, images), rtol=1e-4, atol=1e-5)


def test_pooling_drops_an_odd_last_column():
    graph, state = random_cnn((8, 9, 1), channels=(2,), pooling=True, hidden=(4,))
    model = nnx.merge(graph, state)
    assert model.layers[0].kernel.shape == (2 * 2 * 2, 4)
    images = np.random.default_rng(0).normal(size=(2, 8, 9, 1)).astype("float32")
    features = jax.jit(model.features)
    wanted = features(images)
    images[:, :, 8] = 0  # seen by the fifth column of windows only, which is dropped
    np.testing.assert_array_equal(features(images), wanted)
    images[:, :, 7] = 0  # seen by the fourth one too
    assert not np.array_equal(features(images), wanted)


def test_images_too_small_for_pooling_are_an_input_error():
    with pytest.raises(InputError, match=r"^Cnn: image_shape must leave pixels .*\(10, 10, 1\)$"):
        networks.build(networks.Settings(network="pooling_cnn"), (10, 10, 1), 10, seed=0)
