"""The accumulation dtype."""

import jax.numpy as jnp


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype in which values of `dtype` are summed: float32 at least."""
    return jnp.promote_types(dtype, jnp.float32)
