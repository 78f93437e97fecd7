"""Initialisers of routing weights: lengths that they give, and whether stacked layers learn."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import capsjax
from capsjax import nn
from capsjax.models import CapsNet
from experiments.data import datasets
from experiments.training import loop
from experiments.training.objectives import CapsuleClassification
from experiments.training.transforms import Augmentation

LENGTH = 0.5
# (I, P, J, D): few and many children, few and many parents, short and long outputs.
SHAPES = [(72, 8, 16, 8), (300, 8, 64, 16), (300, 4, 10, 4), (16, 8, 10, 64), (8, 3, 2, 16)]


def poses_of(in_capsules, in_length, *, batch=16):
    """Random poses `[B, I, P]`, all of the length LENGTH."""
    directions = np.random.default_rng(0).normal(size=(batch, in_capsules, in_length))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    return jnp.asarray(LENGTH * directions, jnp.float32)


def first_layer_length(shape, weights_init):
    """Root mean square length of the weighted sums with uniform couplings, before the squash."""
    routing = nn.DynamicRouting(num_iterations=1)
    layer = nn.Capsules(*shape, routing=routing, weights_init=weights_init, rngs=nnx.Rngs(0))
    squashed = capsjax.lengths(layer(poses_of(*shape[:2])))
    return math.sqrt(jnp.mean(squashed / (1 - squashed)))


@pytest.mark.parametrize("shape", SHAPES)
def test_weighted_sums_have_the_length_of_the_poses(shape):
    found = first_layer_length(shape, nn.capsules_init)
    assert found == pytest.approx(LENGTH, rel=0.15)
    old = first_layer_length(shape, nn.votes_init)
    assert not 0.5 * LENGTH < old < 2 * LENGTH


@pytest.mark.parametrize("shape", [(8, 8, 64, 16), (16, 8, 32, 4)])
def test_votes_are_at_most_4_times_as_long_as_poses(shape):
    weights = nn.capsules_init(jax.random.key(0), shape)
    votes = jnp.einsum("bip,ipjd->bijd", poses_of(*shape[:2]), weights)
    root_mean_square = math.sqrt(jnp.mean(jnp.sum(votes**2, axis=-1)))
    assert root_mean_square == pytest.approx(4 * LENGTH, rel=0.1)


def test_the_authors_initialiser_is_near_the_rule_for_their_layer_alone():
    shape = (1152, 8, 10, 16)
    rule, authors = (
        np.std(draw(jax.random.key(0), shape)) for draw in (nn.capsules_init, nn.votes_init)
    )
    assert (rule, authors) == (pytest.approx(0.0737, rel=0.01), pytest.approx(0.0880, rel=0.01))


def test_weights_are_truncated_and_follow_key_and_dtype():
    shape, deviation = (50, 8, 10, 8), 0.5
    weights = nn.capsules_init(jax.random.key(0), shape, jnp.float32)
    assert (weights.shape, weights.dtype) == (shape, jnp.float32)
    assert float(weights.std()) == pytest.approx(deviation, rel=0.02)
    assert 2.2 * deviation < float(abs(weights).max()) < 2.28 * deviation
    assert (weights != nn.capsules_init(jax.random.key(1), shape)).all()
    half = nn.capsules_init(jax.random.key(0), shape, jnp.bfloat16)
    assert half.dtype == jnp.bfloat16


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"^capsules_init: shape must be .*, got \(8, 3, 5\)$"):
        nn.capsules_init(jax.random.key(0), (8, 3, 5))


def test_capsules_follow_the_rule_and_capsnet_the_authors_code():
    key = nnx.Rngs(0).params()
    layer = nn.Capsules(6, 4, 3, 5, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer.weights[...], nn.capsules_init(key, (6, 4, 3, 5)))
    small = CapsNet(conv_channels=2, primary_types=2, hidden=(2,), rngs=nnx.Rngs(0))
    # 0.1 truncated at 2 standard deviations; the rule would give 0.29.
    assert 0.19 < float(abs(small.capsules.weights[...]).max()) <= 0.2


class Stack(nnx.Module):
    """A convolution, primary capsules and three fully connected capsule layers."""

    def __init__(self, weights_init, *, rngs):
        self.convolution = nn.Convolution(1, 8, kernel_size=5, rngs=rngs)
        self.primary = nn.PrimaryCapsules(8, types=8, kernel_size=5, stride=2, rngs=rngs)
        sizes = [(72, 8), (16, 8), (16, 8), (10, 16)]
        self.layers = nnx.List(
            nn.Capsules(*inputs, *outputs, weights_init=weights_init, rngs=rngs)
            for inputs, outputs in itertools.pairwise(sizes)
        )

    def __call__(self, images):
        poses = self.primary(jax.nn.relu(self.convolution(images)))
        for layer in self.layers:
            poses = layer(poses)
        return poses


def test_outputs_keep_a_length_in_three_layers():
    def mean_lengths(weights_init):
        poses, found = poses_of(72, 8), []
        for layer in Stack(weights_init, rngs=nnx.Rngs(0)).layers:
            poses = layer(poses)
            found.append(float(capsjax.lengths(poses).mean()))
        return found

    new, old = mean_lengths(nn.capsules_init), mean_lengths(nn.votes_init)
    assert all(0.01 < length < 0.6 for length in new), new
    assert old[0] < 0.01
    assert old[2] < 1e-12


@pytest.fixture(scope="module")
def dataset():
    """The included digits, averaged over 2 x 2 pixels."""

    def halved(split):
        pixels = split.images.reshape(-1, 14, 2, 14, 2, 1).mean(axis=(2, 4))
        return datasets.Split(pixels.astype(np.uint8), split.labels)

    whole = datasets.load("mnist_small")
    return dataclasses.replace(whole, train=halved(whole.train), test=halved(whole.test))


@pytest.mark.parametrize(
    ("weights_init", "least", "most"),
    [(nn.capsules_init, 0, 25), (nn.votes_init, 75, 100)],
    ids=["capsules_init", "votes_init"],
)
def test_three_layers_learn_with_the_rule_only(dataset, weights_init, least, most):
    """Chance is an error of 90 %."""
    steps = 120
    trainer = loop.Trainer(
        lambda: Stack(weights_init, rngs=nnx.Rngs(0)),
        CapsuleClassification(10, Augmentation(), 0.0),
        loop.adam(0.003, final_learning_rate=0.001, num_steps=steps),
    )
    *_, last = loop.train(
        trainer,
        trainer.initial_state(0),
        dataset.train,
        dataset.test,
        batch_size=32,
        last_step=steps,
        log_every_steps=steps,
        seed=0,
        stopped=lambda: 0,
    )
    evaluated = trainer.evaluate(last.state.params, dataset.test, batch_size=250)
    assert least <= evaluated.error(dataset.test.labels) <= most
