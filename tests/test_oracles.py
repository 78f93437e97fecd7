"""The oracles' hand-written gradients are those of their values."""

import numpy as np
import oracles
import pytest


def _numeric(function, x, step=1e-6):
    gradient = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        for sign in (1, -1):
            moved = x.copy()
            moved[index] += sign * step
            gradient[index] += sign * function(moved) / (2 * step)
    return gradient


@pytest.mark.parametrize("num_iterations", [1, 2, 4])
def test_dynamic_routing_gradients_match_finite_differences(num_iterations):
    rng = np.random.default_rng(num_iterations)
    shapes = (2, 3, 2), (3, 2, 4, 3), (3, 4), (4, 3)
    arguments = [rng.normal(size=shape) for shape in shapes]
    cotangent = rng.normal(size=(2, 4, 3))

    def run(arguments):
        return oracles.dynamic_routing(
            *arguments, cotangent, num_iterations=num_iterations, gradient="full"
        )

    gradients = run(arguments)[2]
    for place, gradient in enumerate(gradients):

        def loss(x, place=place):
            outputs = run([*arguments[:place], x, *arguments[place + 1 :]])[0]
            return np.sum(outputs * cotangent)

        np.testing.assert_allclose(gradient, _numeric(loss, arguments[place]), atol=1e-8)


def test_strided_conv_gradients_match_finite_differences():
    rng = np.random.default_rng(0)
    images, kernel = rng.normal(size=(1, 5, 6, 2)), rng.normal(size=(3, 2, 2, 2))
    cotangent = rng.normal(size=(1, 2, 3, 2))

    def loss(images, kernel):
        return np.sum(cotangent * oracles.strided_conv(images, kernel, cotangent, stride=(2, 2))[0])

    d_images, d_kernel = oracles.strided_conv(images, kernel, cotangent, stride=(2, 2))[1]
    numeric = _numeric(lambda x: loss(x, kernel), images)
    np.testing.assert_allclose(d_images, numeric, atol=1e-8)
    np.testing.assert_allclose(d_kernel, _numeric(lambda x: loss(images, x), kernel), atol=1e-8)
