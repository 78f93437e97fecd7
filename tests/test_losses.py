"""Losses and metrics: golden values by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import capsjax


@pytest.mark.parametrize(
    ("lengths", "targets", "loss"),
    [
        ([0.9, 0.1], [1, 0], 0.0),
        ([1.0, 0.0], [1, 0], 0.0),  # past the margins costs nothing
        ([0.8, 0.3], [1, 0], 0.1**2 + 0.5 * 0.2**2),
        ([0.0, 1.0], [1, 0], 0.9**2 + 0.5 * 0.9**2),
        ([0.5, 0.5], [1, 1], 2 * 0.4**2),  # two classes present
        ([0.5, 0.5], [0, 0], 2 * 0.5 * 0.4**2),  # none present
    ],
)
def test_margin_loss_golden_values(lengths, targets, loss):
    actual = capsjax.margin_loss(jnp.array(lengths), jnp.array(targets))
    np.testing.assert_allclose(actual, loss, atol=1e-7)


def test_margin_loss_arguments_matter():
    lengths, targets = jnp.array([0.7, 0.3]), jnp.array([True, False])
    actual = capsjax.margin_loss(
        lengths, targets, positive_margin=0.8, negative_margin=0.2, negative_weight=0.25
    )
    np.testing.assert_allclose(actual, 0.1**2 + 0.25 * 0.1**2, atol=1e-7)


def test_margin_loss_is_per_example():
    lengths = jnp.asarray(np.random.default_rng(0).random((4, 3, 10)), jnp.float32)
    targets = jax.nn.one_hot(jnp.arange(12).reshape(4, 3) % 10, 10)
    batched = capsjax.margin_loss(lengths, targets)
    assert batched.shape == (4, 3)
    np.testing.assert_allclose(batched[1, 2], capsjax.margin_loss(lengths[1, 2], targets[1, 2]))


def test_reconstruction_loss_is_a_sum_of_squares():
    images = jnp.zeros((2, 28, 28, 1))
    loss = capsjax.reconstruction_loss(images + 0.5, images)
    np.testing.assert_allclose(loss, [0.0005 * 784 * 0.25] * 2, rtol=1e-6)
    # 0.0005 x sum of squares = 0.392 x mean of squares.
    np.testing.assert_allclose(loss[0], 0.392 * jnp.mean((images[0] + 0.5) ** 2), rtol=1e-6)
    heavier = capsjax.reconstruction_loss(images + 0.5, images, weight=1.0)
    np.testing.assert_allclose(heavier, [196.0] * 2, rtol=1e-6)


def test_lengths_and_their_gradient_at_zero():
    capsules = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(capsjax.lengths(capsules), [5.0, 0.0])
    gradient = jax.grad(lambda c: capsjax.lengths(c).sum())(capsules)
    np.testing.assert_allclose(gradient, [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(capsjax.lengths(capsules, axis=0), [3.0, 4.0])


def test_lengths_of_whole_numbers_are_refused():
    with pytest.raises(TypeError, match=r"^lengths: capsules must be floating, got int32$"):
        capsjax.lengths(jnp.array([1, 1]))


def test_coupling_entropy():
    couplings = jnp.array([[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.0] * 4, [0.5, 0.5, 0.0, 0.0]])
    wanted = [np.log(4), 0.0, 0.0, np.log(2)]
    np.testing.assert_allclose(capsjax.coupling_entropy(couplings), wanted, atol=1e-6)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"margin_loss: targets must have shape \[..., J\]"):
        capsjax.margin_loss(jnp.ones((2, 10)), jnp.ones((2, 9)))
    with pytest.raises(ValueError, match="reconstruction_loss: images must have shape"):
        capsjax.reconstruction_loss(jnp.ones((2, 28, 28, 1)), jnp.ones((2, 784)))
