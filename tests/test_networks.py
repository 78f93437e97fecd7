"""The controls: how many parameters they have, and what their convolutions see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from experiments.errors import InputError
from experiments.training import networks


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        ("cnn", 35_445_522),  # the paper says 35.4 million
        ("pooling_cnn", 317_066),
        ("capsnet", 8_215_568),  # and 8.2 million
    ],
)
def test_parameters_are_counted_as_in_the_paper(network, parameters):
    settings = networks.Settings(network=network)
    model = nnx.eval_shape(lambda: networks.build(settings, (28, 28, 1), 10, seed=0))
    leaves = jax.tree.leaves(nnx.state(model))
    assert sum(leaf.size for leaf in leaves) == parameters


@pytest.mark.parametrize("kernel_size", [4, 5])
def test_convolutions_are_those_of_xla_with_padding(kernel_size):
    model = networks.Cnn(
        *((7, 6, 2), 3), channels=(3, 4), kernel_size=kernel_size, hidden=(5,), rngs=nnx.Rngs(0)
    )
    images = jax.random.normal(jax.random.key(0), (2, 7, 6, 2))
    x = images
    for convolution in model.convolutions:
        x = lax.conv_general_dilated(
            *(x, convolution.kernel[...], (1, 1), "SAME"),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jax.nn.relu(x + convolution.bias[...].reshape(1, 1, 1, -1))
    wanted = jax.nn.relu(model.layers[0](x.reshape(2, -1)))
    np.testing.assert_allclose(model.features(images), wanted, rtol=1e-4, atol=1e-5)


def test_pooling_leaves_out_an_odd_last_row():
    model = networks.Cnn((8, 9, 1), 3, channels=(2,), pooling=True, hidden=(4,), rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (2, 8, 9, 1))
    assert model.layers[0].kernel.shape == (2 * 2 * 2, 4)
    changed = images.at[:, :, 8].set(0)  # seen by the fifth column of windows alone
    assert jnp.array_equal(model.features(images), model.features(changed))


def test_images_too_small_for_pooling_are_refused():
    with pytest.raises(InputError, match=r"^Cnn: image_shape must leave pixels .*\(10, 10, 1\)$"):
        networks.build(networks.Settings(network="pooling_cnn"), (10, 10, 1), 10, seed=0)
