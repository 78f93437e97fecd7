"""Capsule layers with each routing: shapes, equality with the functions, and errors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import capsjax
from capsjax import nn

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROUTINGS = {
    "dynamic": nn.DynamicRouting(2, bias=0.1),
    "em": nn.EMRouting(2, cost_scale=None),
    "variational_bayes": nn.VariationalBayesRouting(2),
    "self": nn.SelfRouting(),
    "self_attention": nn.SelfAttentionRouting(),
    "inverted_attention": nn.InvertedAttentionRouting(),
    "k_means": nn.KMeansRouting(2),
}


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def inputs_of(routing, *leading, rows=None):
    """Poses, and activations if the routing has any."""
    pose = (4,) if rows is None else (rows, 4)
    poses = normal(*leading, *pose)
    return (
        (poses, jax.nn.sigmoid(normal(*leading, seed=1))) if routing.has_activations else (poses,)
    )


def shapes_of(outputs):
    return [x.shape for x in jax.tree.leaves(outputs)]


@pytest.mark.parametrize("name", ROUTINGS)
def test_a_layer_takes_any_routing(name):
    routing = ROUTINGS[name]
    rows = 2 if routing.takes_matrices else None
    layer = nn.Capsules(6, 4, 3, 5, rows=rows, routing=routing, rngs=nnx.Rngs(0))
    outputs = layer(*inputs_of(routing, 2, 6, rows=rows))
    wanted = [(2, 3, 5) if rows is None else (2, 3, 2, 5)]
    assert shapes_of(outputs) == wanted + [(2, 3)] * routing.has_activations
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(outputs))
    assert set(layer.parameter_names) == set(routing.parameters(layer.sizes))


@pytest.mark.parametrize("name", [n for n, r in ROUTINGS.items() if r.takes_windows])
def test_a_convolution_with_windows_of_the_whole_map_is_a_dense_layer(name):
    routing = ROUTINGS[name]
    if routing.has_activations and name != "self":
        routing = type(routing)(2, competition="types")
    layer = nn.ConvCapsules(2, 4, 3, 5, kernel_size=3, routing=routing, rngs=nnx.Rngs(0))
    given = inputs_of(routing, 2, 3, 3, 2)
    outputs = layer(*given)
    dense = nn.Capsules(18, 4, 3, 5, routing=routing, rngs=nnx.Rngs(1))
    dense.weights[...] = layer.weights[...].reshape(18, 4, 3, 5)
    flat = [x.reshape(2, 18, *x.shape[4:]) for x in given]
    for found, wanted in zip(jax.tree.leaves(outputs), jax.tree.leaves(dense(*flat)), strict=True):
        np.testing.assert_allclose(found[:, 0, 0], wanted, atol=2e-5)


def test_padding_adds_nothing_but_positions():
    layer = nn.ConvCapsules(
        2, 4, 3, 4, kernel_size=3, padding=1, rows=4, routing=nn.EMRouting(1), rngs=nnx.Rngs(0)
    )
    poses, activations = inputs_of(layer.routing, 1, 3, 3, 2, rows=4)
    found = layer(poses, activations)
    assert shapes_of(found) == [(1, 3, 3, 3, 4, 4), (1, 3, 3, 3)]
    padded = [
        jnp.pad(x, [(0, 0), (1, 1), (1, 1)] + [(0, 0)] * (x.ndim - 3)) for x in (poses, activations)
    ]
    layer.padding = 0
    for a, b in zip(found, layer(*padded), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_class_capsules_add_the_coordinates_of_each_position_to_the_votes():
    layer = nn.ClassCapsules(2, 4, 3, 4, rows=4, rngs=nnx.Rngs(0))
    poses, activations = inputs_of(layer.routing, 2, 2, 3, 2, rows=4)
    coordinates = np.zeros((2, 3, 2, 4, 4), np.float32)
    for row, column in np.ndindex(2, 3):
        coordinates[row, column, :, 0, 3] = (row + 0.5) / 2
        coordinates[row, column, :, 1, 3] = (column + 0.5) / 3
    wanted = capsjax.em_routing(
        poses.reshape(2, 12, 4, 4),
        activations.reshape(2, 12),
        jnp.tile(layer.weights[...], (6, 1, 1, 1)),
        beta_u=jnp.zeros(3),
        beta_a=jnp.zeros(3),
        coordinates=coordinates.reshape(12, 4, 4),
    )
    for a, b in zip(layer(poses, activations), wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    without = nn.ClassCapsules(2, 4, 3, 4, rows=4, coordinate_addition=False, rngs=nnx.Rngs(0))
    assert np.abs(without(poses, activations)[0] - wanted[0]).max() > 0.1


@pytest.mark.parametrize("layer", ["dense", "windows", "classes"])
def test_the_scale_of_the_cost_counts_all_children_of_a_parent(layer, monkeypatch):
    scales = []

    def record(poses, activations, weights, **settings):
        scales.append(settings["cost_scale"])
        return capsjax.em_routing(poses, activations, weights, **settings)

    monkeypatch.setattr("capsjax.nn.routings.em_routing", record)
    settings = {"rows": 4, "routing": nn.EMRouting(1, cost_scale=None), "rngs": nnx.Rngs(0)}
    build, leading, children = {
        "dense": (lambda: nn.Capsules(6, 4, 3, 4, **settings), (6,), 6),
        "windows": (
            lambda: nn.ConvCapsules(2, 4, 3, 4, kernel_size=3, **settings),
            (4, 4, 2),
            18,
        ),
        "classes": (lambda: nn.ClassCapsules(2, 4, 3, 4, **settings), (4, 5, 2), 40),
    }[layer]
    build()(*inputs_of(settings["routing"], 1, *leading, rows=4))
    assert scales == [100 * 3 / children]


ERRORS = {
    "no activations": (
        lambda: nn.Capsules(6, 4, 3, 4, routing=nn.EMRouting(), rngs=nnx.Rngs(0))(normal(2, 6, 4)),
        "Capsules: activations must be given to EMRouting, got None",
    ),
    "activations": (
        lambda: nn.Capsules(6, 4, 3, 4, rngs=nnx.Rngs(0))(normal(2, 6, 4), normal(2, 6)),
        "Capsules: activations must be None for DynamicRouting, which has none",
    ),
    "matrices": (
        lambda: nn.Capsules(6, 4, 3, 4, rows=4, rngs=nnx.Rngs(0)),
        "Capsules: rows must be None for DynamicRouting, which routes vectors, got 4",
    ),
    "no convolution": (
        lambda: nn.ConvCapsules(
            6, 4, 3, 4, kernel_size=3, routing=nn.KMeansRouting(), rngs=nnx.Rngs(0)
        ),
        "ConvCapsules: routing must have a convolutional form, got KMeansRouting",
    ),
    "coordinates": (
        lambda: nn.ClassCapsules(6, 4, 3, 4, routing=nn.SelfRouting(), rngs=nnx.Rngs(0)),
        "ClassCapsules: coordinate_addition must be False for SelfRouting",
    ),
    "rows for coordinates": (
        lambda: nn.ClassCapsules(6, 4, 3, 4, rows=1, rngs=nnx.Rngs(0)),
        "ClassCapsules: votes must have two rows or components for coordinates, got rows = 1",
    ),
    "channels": (
        lambda: nn.Convolution(1, 4, kernel_size=3, rngs=nnx.Rngs(0))(normal(2, 1, 8, 8)),
        "Convolution: images must have shape [..., H, W, C] = [2, any, any, 1], got (2, 1, 8, 8)",
    ),
    "couplings": (
        lambda: nn.Capsules(6, 4, 3, 4, routing=nn.EMRouting(), rngs=nnx.Rngs(0)).couplings(
            normal(2, 6, 4)
        ),
        "Capsules.couplings: routing must be a DynamicRouting, got EMRouting",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_layers_are_refused_in_one_sentence(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        call()
    assert "\n" not in str(error.value)
