"""Other algorithms on the engine: gradients, kernels and export.

`test_sharding.py` runs them over several devices.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances

from capsjax.kernels.vote_passes.config import XlaConfig
from capsjax.kernels.vote_passes.passes import (
    PLATFORMS,
    Implementation,
    Inputs,
    Moments,
    Spec,
    State,
)
from capsjax.kernels.vote_passes.unroll import Routing, unroll

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, I, P, J, D, T = 4, 8, 3, 5, 6, 3  # noqa: E741
SMALL_TILES = Implementation("xla", XlaConfig(children=3, examples=3))


def unit(x):
    return x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6)


# The toy: k-means with dot products. Logits are replaced, not added up, and scaled by a parameter.


def toy_step(t, carry, moments: Moments, temperature):
    return carry, State(b=temperature * unit(moments.first)), moments.first


def toy(poses, weights, temperature, **settings):
    routing = Routing(Spec(J), toy_step, T, **settings)
    return unroll(routing, Inputs(poses[:, :, None], weights), temperature)


def definition(poses, weights, temperature, *, gradient="full"):
    """The toy with stored votes, apart from the engine."""
    votes = jnp.einsum("bip,ipjd->bijd", poses, weights)
    sums = jnp.zeros((B, J, D), votes.dtype)
    for _ in range(T):
        agreement = jnp.einsum("bijd,bjd->bij", votes, unit(sums))
        couplings = jax.nn.softmax(temperature * agreement, axis=2)
        if gradient == "last":
            couplings = jax.lax.stop_gradient(couplings)
        sums = jnp.einsum("bij,bijd->bjd", couplings, votes)
    return sums


# The second toy: a mixture of Gaussians, whose moments are central and whose children have gates.


def mixture_step(t, carry, moments: Moments, temperature):
    variance = moments.second / moments.mass[..., None] + temperature**2
    state = State(k=-jnp.log(variance).sum(-1) / 2, z=moments.first, q=1 / variance)
    return None, state, (moments.first, moments.mass)


def gates_of(poses):
    return jax.nn.sigmoid(poses.sum(-1))


def coordinates_of(weights):
    return 0.1 * weights[:, 0, 0]


def mixture(poses, weights, temperature, **settings):
    spec = Spec(J, logits="gaussian", moments="central", leaky=True)
    inputs = Inputs(
        poses[:, :, None], weights, gates_of(poses), coordinates=coordinates_of(weights)
    )
    return unroll(Routing(spec, mixture_step, T, **settings), inputs, temperature)[0]


def mixture_definition(poses, weights, temperature):
    """The mixture with stored votes, apart from the engine."""
    votes = jnp.einsum("bip,ipjd->bijd", poses, weights)
    votes += coordinates_of(weights)[None, :, None]
    logits = jnp.zeros(votes.shape[:3], votes.dtype)
    for _ in range(T):
        odds = jnp.exp(logits)
        couplings = odds / (1 + odds.sum(2, keepdims=True)) * gates_of(poses)[..., None]
        mass = couplings.sum(1)[..., None]
        mean = jnp.einsum("bij,bijd->bjd", couplings, votes) / mass
        squares = (votes - mean[:, None]) ** 2
        variance = jnp.einsum("bij,bijd->bjd", couplings, squares) / mass + temperature**2
        logits = -(squares / variance[:, None]).sum(-1) / 2 - jnp.log(variance).sum(-1)[:, None] / 2
    return mean


ALGORITHMS = {"toy": (toy, definition), "mixture": (mixture, mixture_definition)}


def arguments(dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = (B, I, P), (I, P, J, D), (), (B, J, D)
    return [jnp.asarray(rng.normal(size=shape) * 0.7, dtype) for shape in shapes]


def values_and_gradients(function):
    def run(*arguments):
        *arrays, cotangent = arguments
        outputs, vjp = jax.vjp(function, *arrays)
        return outputs, vjp(cotangent)

    return jax.jit(run)


@cache
def exact(definition=definition, **settings):
    with jax.enable_x64(True):
        run = values_and_gradients(lambda *a: definition(*a, **settings))
        return jax.tree.map(np.asarray, run(*(x.astype("float64") for x in arguments())))


@cache
def plain(gradient):
    """Values and gradients of the toy's definition, in float32."""
    return values_and_gradients(lambda *a: definition(*a, gradient=gradient))(*arguments())


@pytest.mark.parametrize(
    ("implementation", "gradient"),
    [
        (Implementation("reference"), "full"),
        (Implementation("reference"), "last"),
        (SMALL_TILES, "full"),
        (SMALL_TILES, "last"),
        (Implementation("mosaic_tpu", interpret=True), "full"),
        (Implementation("triton", interpret=True), "full"),
        (Implementation("triton", interpret=True), "last"),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_a_toy_algorithm_has_kernels_and_gradients(implementation, gradient):
    settings = {"implementation": implementation, "gradient": gradient}
    with jax.default_matmul_precision("highest"):
        actual = values_and_gradients(lambda *a: toy(*a, **settings))(*arguments())
    if implementation.name in PLATFORMS:
        tolerances.assert_within_units(actual, exact(gradient=gradient), units=20)
    else:
        tolerances.assert_as_exact(actual, plain(gradient), exact(gradient=gradient))


def test_a_toy_algorithm_exports_with_a_symbolic_batch_for_all_platforms():
    poses, weights, temperature, _ = arguments()
    (batch,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((batch, I, P), "float32")
    run = jax.jit(lambda u: toy(u, weights, temperature))
    exported = jax.export.export(run, platforms=("cpu", "cuda", "tpu"))(shape)
    for size in (1, 129):
        more = jnp.concatenate([poses] * 40)[:size]
        np.testing.assert_allclose(exported.call(more), run(more), atol=1e-5)


@pytest.mark.parametrize(
    "implementation",
    [Implementation("reference"), SMALL_TILES],
    ids=lambda x: x.name,
)
def test_a_mixture_has_values_and_gradients(implementation):
    with jax.enable_x64(True):
        run = values_and_gradients(lambda *a: mixture(*a, implementation=implementation))
        actual = run(*(x.astype("float64") for x in arguments()))
    for a, w in zip(*map(jax.tree.leaves, (actual, exact(mixture_definition))), strict=True):
        np.testing.assert_allclose(a, w, rtol=1e-10, atol=1e-12)


def test_a_state_before_the_first_pass_has_a_gradient():
    poses, weights, temperature, cotangent = arguments()
    start = 0.3 * cotangent[..., ::-1]

    @partial(jax.jit, static_argnums=1)
    @jax.grad
    def gradient(start, implementation):
        routing = Routing(Spec(J), toy_step, 2, implementation=Implementation(implementation))
        inputs = Inputs(poses[:, :, None], weights)
        outputs = unroll(routing, inputs, temperature, (None, State(b=start)))
        return jnp.sum(outputs * cotangent)

    found, wanted = (gradient(start, name) for name in ("xla", "reference"))
    assert np.abs(wanted).max() > 1e-3
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_shared_weights_move_into_the_step_of_any_algorithm():
    poses, weights, temperature, cotangent = arguments()
    shared = weights[0]
    own = jnp.broadcast_to(shared, weights.shape)
    run = values_and_gradients(toy)
    outputs, (d_poses, d_weights, d_temperature) = run(poses, shared, temperature, cotangent)
    wanted, (d_poses_own, d_own, d_own_temperature) = run(poses, own, temperature, cotangent)
    for a, w in [
        (outputs, wanted),
        (d_poses, d_poses_own),
        (d_weights, d_own.sum(0)),
        (d_temperature, d_own_temperature),
    ]:
        np.testing.assert_allclose(a, w, atol=3e-5)
