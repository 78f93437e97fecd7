"""Routings over several devices: four of the host's, in a process of their own."""

from functools import cache

import jax
import jax.numpy as jnp
import pytest
import sharded_family
from jax import P

import capsjax

pytestmark = pytest.mark.usefixtures("quick_compilation")


@cache
def programs():
    return sharded_family.run()


@pytest.mark.parametrize(("program", "count"), [("over_capsules", 17), ("over_examples", 7)])
def test_results_and_gradients_are_those_of_one_device(program, count):
    cases = programs()[program]
    assert "failed" not in cases, cases["failed"]
    assert len(cases) == count
    assert all(distance < 1e-12 for distance in cases.values()), cases


POSES, WEIGHTS = jnp.ones((2, 6, 4)), jnp.ones((6, 4, 3, 5))


def inverted(poses, weights, varying):
    return capsjax.inverted_attention_routing(poses, weights, scale=varying, axis_name="capsules")


def em(poses, weights, varying):
    activations, betas = jnp.full(poses.shape[:2], 0.5), jnp.zeros(3)
    return capsjax.em_routing(
        poses,
        activations,
        weights,
        beta_u=betas,
        beta_a=betas,
        inverse_temperature=varying.sum(),
        axis_name="capsules",
    )


def step(poses, weights, varying):
    return capsjax.inverted_attention_step(poses, weights, varying, axis_name="capsules")


def kmeans(poses, weights, varying):
    return capsjax.kmeans_routing(poses, weights, temperature=varying.sum(), axis_name="capsules")


def self_routing(poses, weights, varying):
    return capsjax.self_routing(
        poses,
        jnp.ones(poses.shape[:2]),
        weights,
        weights[..., 0],
        parent_mask=varying > 0,
        axis_name="capsules",
    )


@pytest.mark.parametrize(
    ("function", "shape", "name"),
    [
        (inverted, (5,), "scale"),
        (em, (3,), "inverse_temperature"),
        (step, (2, 3, 5), "parents"),
        (kmeans, (3,), "temperature"),
        (self_routing, (3,), "parent_mask"),
    ],
)
def test_what_all_devices_apply_must_be_the_same_along_the_axis(function, shape, name):
    mesh = jax.make_mesh((1,), ("capsules",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = P(None, "capsules"), P("capsules"), P("capsules")
    split = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P())
    with pytest.raises(ValueError, match=f"{name} must be the same all along axis_name"):
        split(POSES, WEIGHTS, jnp.ones(shape))


def test_votes_that_all_parents_share_are_not_merged_over_devices():
    mesh = jax.make_mesh((1,), ("capsules",), axis_types=(jax.sharding.AxisType.Auto,))
    prior = jnp.ones((6, 3)).at[0, 0].set(0)

    def route(poses, prior):
        activations, betas = jnp.full(poses.shape[:2], 0.5), jnp.zeros(3)
        settings = {"beta_u": betas, "beta_a": betas, "axis_name": "capsules"}
        return capsjax.em_routing(poses, activations, WEIGHTS[0, :, 0], prior=prior, **settings)

    specs = P(None, "capsules"), P("capsules")
    with pytest.raises(ValueError, match=r"axis_name must be None for weights \[P, E\]"):
        jax.shard_map(route, mesh=mesh, in_specs=specs, out_specs=P())(POSES, prior)
