"""squash: golden values, extremes, and its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tolerances
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import capsjax

DTYPES = ("float32", "bfloat16", "float16")


def _filled(value, dtype):
    with np.errstate(over="ignore"):
        return jnp.asarray(np.full((2, 5), value).astype(dtype))


def _sum_of_squash(x):
    return capsjax.squash(x).astype(jnp.float32).sum()


_gradient = jax.jit(jax.grad(_sum_of_squash))
_hessian = jax.jit(jax.hessian(_sum_of_squash))


@jax.jit
def _value_and_vjp(x, cotangent):
    squashed, vjp = jax.vjp(capsjax.squash, x)
    return squashed, vjp(cotangent)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1e-20, -1e-20, 1e-3, 1.0, 1e20, -1e20])
def test_value_and_gradient_are_finite_and_the_length_is_below_one(value, dtype):
    x = _filled(value, dtype)  # 1e20 is inf in float16
    squashed = capsjax.squash(x)
    assert squashed.dtype == x.dtype
    assert np.linalg.norm(np.asarray(squashed, np.float64), axis=-1).max() < 1
    gradient = _gradient(x)
    assert np.isfinite(np.asarray(gradient, np.float64)).all()
    hessian = _hessian(x[0].astype("float32"))
    assert np.isfinite(hessian).all()


@pytest.mark.parametrize("value", [1e37, 1e38, 3e38, np.inf])
def test_the_longest_vectors_have_length_one_and_not_none(value):
    for x in (jnp.array([value, 0.0]), jnp.array([0.0, -value])):
        squashed = capsjax.squash(x)
        assert 1 - 1e-6 < jnp.abs(squashed).max() < 1
        assert np.isfinite(_gradient(x)).all()


def test_nan_stays_nan():
    assert np.isnan(capsjax.squash(jnp.array([np.nan, 1.0]))).any()


def test_direction_is_kept_at_extremes():
    for scale in (1e-15, 1e18, 1e30):
        squashed = capsjax.squash(jnp.array([3.0, 4.0]) * scale)
        np.testing.assert_allclose(squashed[0] / squashed[1], 0.75, rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_axis(axis):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 2)), "float32")
    squash = jax.jit(capsjax.squash, static_argnames="axis")
    moved = squash(np.moveaxis(x, axis, -1))
    np.testing.assert_allclose(squash(x, axis=axis), np.moveaxis(moved, -1, axis), rtol=1e-6)


@settings(deadline=None)  # the first call compiles
@given(hnp.arrays(np.float32, (3,), elements=st.floats(-1e3, 1e3, width=32)))
def test_gradient_is_the_oracles(x):
    cotangent = np.array([1.0, -2.0, 0.5], np.float32)
    squashed, gradient = _value_and_vjp(x, cotangent)
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(squashed, oracles.squash(exact), atol=1e-6)
    wanted = oracles.squash_vjp(exact, cotangent.astype(np.float64))
    np.testing.assert_allclose(gradient, wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_is_rounded_once(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(50, 8)), dtype)
    exact = oracles.squash(np.asarray(x, np.float64))
    plain = jnp.asarray(exact.astype(dtype))  # the exact result, rounded
    tolerances.assert_as_exact(capsjax.squash(x), plain, exact)


def test_forward_mode_and_hessian_agree_with_reverse_mode():
    x = jnp.array([0.3, -0.2, 0.9])
    forward, reverse = jax.jit(lambda x: [f(capsjax.squash)(x) for f in (jax.jacfwd, jax.jacrev)])(
        x
    )
    np.testing.assert_allclose(forward, reverse, rtol=1e-6)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="squash: x must be floating, got int32"):
        capsjax.squash(jnp.ones(3, jnp.int32))


@pytest.mark.parametrize("function", [capsjax.squash, capsjax.lengths])
def test_bfloat16_needs_no_implicit_promotion(function):
    x = jnp.ones((2, 3), jnp.bfloat16)

    def total(x):
        return function(x).astype(jnp.float32).sum()

    with jax.numpy_dtype_promotion("strict"):
        assert jax.grad(total)(x).dtype == jnp.bfloat16
