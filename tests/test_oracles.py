"""The oracles' hand-written gradients are those of their values."""

import numpy as np
import oracles
import pytest

from capsjax.kernels.vote_passes.passes import Inputs, Spec, State


def _numeric(function, x, step=1e-6):
    gradient = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        for sign in (1, -1):
            moved = x.copy()
            moved[index] += sign * step
            gradient[index] += sign * function(moved) / (2 * step)
    return gradient


@pytest.mark.parametrize("num_iterations", [1, 3])
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


@pytest.mark.parametrize(
    "spec",
    [
        Spec(3, leaky=True),
        Spec(3, logits="cosine", mass=True),
        Spec(3, logits="gaussian", moments="central"),
    ],
    ids=lambda spec: spec.logits,
)
@pytest.mark.parametrize("constant_couplings", [False, True])
def test_vote_pass_gradients_match_finite_differences(spec, constant_couplings):
    rng = np.random.default_rng(0)
    inputs = Inputs(
        poses=rng.normal(size=(2, 3, 2, 2)),
        weights=rng.normal(size=(3, 2, 3, 2)),
        gates=rng.uniform(0.1, 1, (2, 3)),
        prior=rng.normal(size=(2, 3, 3)),
        coordinates=rng.normal(size=(3, 4)),
    )
    parents = rng.normal(size=(2, 3, 4))
    if spec.logits == "gaussian":
        state = State(k=rng.normal(size=(2, 3)), z=parents, q=rng.uniform(0.5, 2, parents.shape))
    else:
        state = State(k=rng.normal(size=(2, 3)), b=parents)
    couplings, moments = oracles.vote_moments(spec, inputs, state)
    cotangent = [None if x is None else rng.normal(size=x.shape) for x in moments]
    couplings = couplings if constant_couplings else None

    def loss(inputs, state):
        found = oracles.vote_moments(spec, inputs, state, couplings=couplings)[1]
        return sum(np.sum(c * x) for c, x in zip(cotangent, found, strict=True) if x is not None)

    d_inputs, d_state = oracles.vote_gradients(
        spec, inputs, state, cotangent, constant_couplings=constant_couplings
    )
    for name, gradient in zip(Inputs._fields, d_inputs, strict=True):
        x = getattr(inputs, name)
        assert (gradient is None) == (x is None)
        if x is not None:
            numeric = _numeric(lambda x, name=name: loss(inputs._replace(**{name: x}), state), x)
            np.testing.assert_allclose(gradient, numeric, atol=1e-7, err_msg=name)
    for name, gradient in zip(State._fields, d_state, strict=True):
        x = getattr(state, name)
        assert (gradient is None) == (x is None)
        if x is not None:
            numeric = _numeric(lambda x, name=name: loss(inputs, state._replace(**{name: x})), x)
            np.testing.assert_allclose(gradient, numeric, atol=1e-7, err_msg=name)


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
