"""Controls of routing experiments: uniform, random and leaky couplings, against the oracle."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import routing_oracles

import capsjax

pytestmark = pytest.mark.usefixtures("float64", "quick_compilation")

B, I, P, J, D = 3, 6, 4, 3, 5  # noqa: E741


def make():
    rng = np.random.default_rng(0)
    return rng.normal(size=(B, I, P)), rng.normal(size=(I, P, J, D)), rng.normal(size=(B, J, D))


def priors():
    draw = jax.random.normal(jax.random.key(1), (I, J), jnp.float64)
    # The draw of a layer, and one of each example.
    more = jax.random.normal(jax.random.key(2), (B, I, J), jnp.float64)
    return {"uniform": None, "random": 3 * draw, "random for each example": 3 * more}


@pytest.mark.parametrize("name", ["uniform", "random", "random for each example"])
@pytest.mark.parametrize("leaky", [False, True])
def test_one_iteration_has_couplings_that_no_vote_changes(name, leaky):
    poses, weights, cotangent = make()
    prior = priors()[name]

    @jax.jit
    def run(poses, weights):
        def route(poses, weights):
            return capsjax.dynamic_routing(
                poses, weights, num_iterations=1, prior=prior, leaky=leaky
            )

        outputs, vjp = jax.vjp(route, poses, weights)
        return outputs, vjp(cotangent)

    logits = np.zeros((B, I, J)) if prior is None else np.broadcast_to(prior, (B, I, J))
    couplings = oracles.softmax(logits, leaky)

    def weighted(poses, weights):
        sums = np.einsum("bij,bip,ipjd->bjd", couplings, poses, weights)
        squares = (sums * sums).sum(-1, keepdims=True)
        return (sums * np.sqrt(squares) / (1 + squares),)

    (outputs,), gradients = routing_oracles.with_gradients(weighted, (poses, weights), (cotangent,))
    for found, wanted in zip(
        jax.tree.leaves(run(poses, weights)), (outputs, *gradients), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)


def test_the_couplings_are_those_of_the_prior():
    poses, weights, _ = make()
    found = capsjax.routing_couplings(poses, weights, num_iterations=1)
    np.testing.assert_allclose(found, np.full((1, B, I, J), 1 / 3), atol=1e-12)
    leaky = capsjax.routing_couplings(poses, weights, num_iterations=1, leaky=True)
    np.testing.assert_allclose(leaky, np.full((1, B, I, J), 1 / 4), atol=1e-12)
    prior = priors()["random"]
    drawn = capsjax.routing_couplings(poses, weights, num_iterations=1, prior=prior)
    wanted = np.broadcast_to(jax.nn.softmax(prior, -1), (1, B, I, J))
    np.testing.assert_allclose(drawn, wanted, atol=1e-12)


def test_leaky_routing_of_several_iterations_matches_the_oracle():
    poses, weights, cotangent = make()
    settings = {"num_iterations": 3, "leaky": True}
    outputs, _, gradients = oracles.dynamic_routing(
        poses, weights, None, None, cotangent, gradient="full", **settings
    )
    routed = jax.jit(partial(capsjax.dynamic_routing, **settings))
    found, vjp = jax.vjp(routed, poses, weights)
    for a, w in zip((found, *vjp(cotangent)), (outputs, *gradients[:2]), strict=True):
        np.testing.assert_allclose(a, w, rtol=1e-10, atol=1e-12)
