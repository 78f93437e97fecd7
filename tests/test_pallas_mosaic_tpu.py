"""The TPU kernels: values interpreted on the CPU, lowering, and compilation by the TPU compiler."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from capsjax.kernels.dynamic_routing import pallas_mosaic_tpu as tpu
from capsjax.kernels.dynamic_routing import reference
from capsjax.kernels.dynamic_routing.config_tpu import config_for
from capsjax.kernels.dynamic_routing.procedure import route

# B, I, P, J, D, and what to change in the chosen tiles, so that small shapes have several.
ONE = ((1, 1, 1, 1, 1), {})
ODD = ((3, 7, 3, 2, 5), {})
# Two tiles of capsules, the last with 2 of 128 lanes; 2 runs of 2 tiles of 4 examples, the last
# with 1 of 4; 2 steps of 2 parents.
CUT = ((13, 130, 2, 4, 8), {"capsules": 128, "examples": 4, "group": 2, "tiles": 2, "parents": 2})


def _arguments(shape, dtype=jnp.float32, seed=0):
    batch, capsules, length, parents, depth = shape
    rng = np.random.default_rng(seed)
    poses = jnp.asarray(rng.normal(size=(batch, capsules, length)), dtype)
    weights = jnp.asarray(rng.normal(size=(capsules, length, parents, depth)) / length, dtype)
    prior = jnp.asarray(rng.normal(size=(capsules, parents)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=(parents, depth)) / 10, jnp.float32)
    cotangent = jnp.asarray(rng.normal(size=(batch, parents, depth)), dtype)
    return poses, weights, prior, bias, cotangent


def _routed(shape, dtype, changes, *, interpret=True, num_iterations=3, gradient="full"):
    config = dataclasses.replace(config_for(shape, dtype), **changes)
    passes = tpu.passes_for(config, interpret=interpret)
    return partial(route, passes, num_iterations, gradient)


def _value_and_gradients(function, *arguments):
    *primals, cotangent = arguments
    value, vjp = jax.vjp(function, *primals)
    return value, *vjp(cotangent)


def _assert_equal(actual, expected, tolerance):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert x.shape == y.shape
        error = jnp.max(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)))
        assert error <= tolerance * jnp.max(jnp.abs(y)), (error, jnp.max(jnp.abs(y)))


@pytest.mark.parametrize(
    ("case", "dtype", "num_iterations", "gradient", "with_prior"),
    [
        (ONE, jnp.float32, 2, "full", False),
        (ODD, jnp.float32, 1, "full", False),
        (ODD, jnp.float32, 1, "full", True),
        (ODD, jnp.float32, 3, "full", False),
        (ODD, jnp.float32, 2, "last", True),
        (ODD, jnp.bfloat16, 2, "full", True),
        (CUT, jnp.float32, 2, "full", True),
    ],
)
def test_values_and_gradients_are_those_of_the_paper(
    case, dtype, num_iterations, gradient, with_prior
):
    shape, changes = case
    poses, weights, prior, bias, cotangent = _arguments(shape, dtype)
    arguments = (poses, weights, prior if with_prior else None, bias, cotangent)
    routed = _routed(shape, dtype, changes, num_iterations=num_iterations, gradient=gradient)
    actual = jax.jit(partial(_value_and_gradients, routed))(*arguments)
    expected = _value_and_gradients(
        partial(reference.dynamic_routing, num_iterations=num_iterations, gradient=gradient),
        *jax.tree.map(lambda x: x.astype(jnp.float32), arguments),
    )
    assert [x.dtype for x in jax.tree.leaves(actual)] == [
        x.dtype for x in jax.tree.leaves((poses, *arguments[:4]))
    ]
    # Bfloat16 results are rounded once, by at most 2**-9 of the largest.
    _assert_equal(actual, expected, 2e-6 if dtype == jnp.float32 else 2**-8)


def test_vmap_over_poses_and_weights_equals_a_loop():
    shape = (2, 3, 2, 2, 3)
    routed = _routed(shape, jnp.float32, {}, num_iterations=2)
    arguments = [_arguments(shape, seed=seed) for seed in range(2)]
    stacked = [jnp.stack(x) for x in zip(*arguments, strict=True)]
    run = partial(_value_and_gradients, routed)
    actual = jax.jit(jax.vmap(run))(*stacked)
    for row, each in enumerate(arguments):
        expected = jax.jit(run)(*each)
        _assert_equal(jax.tree.map(lambda x, row=row: x[row], actual), expected, 1e-6)


def test_memory_is_read_only_after_it_is_written_and_without_races():
    shape, changes = CUT
    poses, weights, prior, _, _ = _arguments(shape)
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    run = _routed(shape, jnp.float32, changes, interpret=interpret, num_iterations=1)
    expected = _routed(shape, jnp.float32, changes, num_iterations=1)
    actual = run(poses, weights, prior, None)
    _assert_equal(actual, expected(poses, weights, prior, None), 1e-6)
    assert not pltpu.races_found()
