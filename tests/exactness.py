"""Comparison with an oracle in float64: values, and gradients by reverse mode."""

import jax
import jax.numpy as jnp
import numpy as np


def values_and_gradients(function, arrays, cotangents):
    """What a function returns, and the gradients of its arguments for these cotangents."""

    @jax.jit
    def run(*arrays):
        outputs, vjp = jax.vjp(function, *arrays)
        return outputs, vjp(cotangents)

    return run(*arrays)


def assert_exact(actual, wanted, *, rtol=1e-10, atol=1e-12):
    """Assert that all leaves are float64, and near those wanted."""
    for a, w in zip(*map(jax.tree.leaves, (actual, wanted)), strict=True):
        assert a.dtype == jnp.float64
        np.testing.assert_allclose(a, w, rtol=rtol, atol=atol)
