"""A second algorithm in ten lines gets kernels, gradients, shards and export from the engine."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances

from capsjax.kernels.vote_passes.config import XlaConfig
from capsjax.kernels.vote_passes.passes import Implementation, Inputs, Moments, Spec, State
from capsjax.kernels.vote_passes.unroll import Routing, unroll

B, I, P, J, D, T = 4, 8, 3, 5, 6, 3  # noqa: E741
ROOT = pathlib.Path(__file__).parents[1]


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


def exact(definition=definition, **settings):
    with jax.enable_x64(True):
        run = values_and_gradients(lambda *a: definition(*a, **settings))
        return jax.tree.map(np.asarray, run(*(x.astype("float64") for x in arguments())))


@pytest.mark.parametrize("gradient", ["full", "last"])
@pytest.mark.parametrize("name", ["reference", "xla", "mosaic_tpu", "triton"])
def test_a_toy_algorithm_has_kernels_and_gradients(name, gradient):
    settings = {"implementation": Implementation(name, interpret=name not in ("reference", "xla"))}
    settings["gradient"] = gradient
    actual = values_and_gradients(lambda *a: toy(*a, **settings))(*arguments())
    plain = values_and_gradients(lambda *a: definition(*a, gradient=gradient))(*arguments())
    tolerances.assert_as_exact(actual, plain, exact(gradient=gradient))


def test_a_toy_algorithm_exports_with_a_symbolic_batch_for_all_platforms():
    poses, weights, temperature, _ = arguments()
    (batch,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((batch, I, P), "float32")
    export = jax.export.export(
        jax.jit(lambda u: toy(u, weights, temperature)), platforms=("cpu", "cuda", "tpu")
    )
    exported = export(shape)
    for size in (1, 3, 129):
        more = jnp.concatenate([poses] * 40)[:size]
        wanted = toy(more, weights, temperature)
        np.testing.assert_allclose(exported.call(more), wanted, atol=1e-5)


SHARDS = """
import itertools
import jax, numpy as np, test_unroll as t
from jax import P
from jax.sharding import AxisType
arrays = [x.astype("float64") for x in t.arguments()]
mesh = jax.make_mesh((2, 2), ("data", "capsules"), axis_types=(AxisType.Auto,) * 2)
for algorithm, name, checked in itertools.product(
    t.ALGORITHMS, ("reference", "xla"), (True, False)
):
    function, definition = t.ALGORITHMS[algorithm]
    wanted = t.exact(definition)
    small = t.XlaConfig(children=2, examples=1) if name == "xla" else None
    settings = dict(implementation=t.Implementation(name, small), axis_name="capsules")
    split = jax.shard_map(
        lambda *a: function(*a, **settings),
        mesh=mesh,
        in_specs=(P("data", "capsules"), P("capsules"), P()),
        out_specs=P("data"),
        check_vma=checked,
    )
    found = t.values_and_gradients(split)(*arrays)
    for a, w in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(a, w, atol=1e-12, err_msg=f"{algorithm} {name} {checked}")
"""


def test_algorithms_run_on_shards_of_their_children():
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    command = [sys.executable, "-W", "error", "-c", SHARDS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["reference", "xla"])
def test_a_mixture_has_values_and_gradients(name):
    config = XlaConfig(children=3, examples=2) if name == "xla" else None
    with jax.enable_x64(True):
        run = values_and_gradients(
            lambda *a: mixture(*a, implementation=Implementation(name, config))
        )
        actual = run(*(x.astype("float64") for x in arguments()))
    for a, w in zip(*map(jax.tree.leaves, (actual, exact(mixture_definition))), strict=True):
        np.testing.assert_allclose(a, w, rtol=1e-10, atol=1e-12)


def test_a_state_before_the_first_pass_has_a_gradient():
    poses, weights, temperature, cotangent = arguments()
    start = 0.3 * cotangent[..., ::-1]

    def loss(start, implementation):
        routing = Routing(Spec(J), toy_step, 2, implementation=Implementation(implementation))
        inputs = Inputs(poses[:, :, None], weights)
        outputs = unroll(routing, inputs, temperature, (None, State(b=start)))
        return jnp.sum(outputs * cotangent)

    found, wanted = (jax.grad(loss)(start, name) for name in ("xla", "reference"))
    assert np.abs(wanted).max() > 1e-3
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_shared_weights_move_into_the_step_of_any_algorithm():
    poses, weights, temperature, cotangent = arguments()
    shared = weights[0]
    own = jnp.broadcast_to(shared, weights.shape)
    run = values_and_gradients(lambda u, w, s: toy(u, w, s))
    outputs, (d_poses, d_weights, d_temperature) = run(poses, shared, temperature, cotangent)
    wanted, (d_poses_own, d_own, d_own_temperature) = run(poses, own, temperature, cotangent)
    for a, w in [
        (outputs, wanted),
        (d_poses, d_poses_own),
        (d_weights, d_own.sum(0)),
        (d_temperature, d_own_temperature),
    ]:
        np.testing.assert_allclose(a, w, atol=3e-5)
