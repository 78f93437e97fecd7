"""The accumulation dtype."""

import jax
import jax.numpy as jnp


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype in which values of `dtype` are summed: float32 at least."""
    with jax.numpy_dtype_promotion("standard"):  # the caller's "strict" concerns its own arrays
        return jnp.promote_types(dtype, jnp.float32)
