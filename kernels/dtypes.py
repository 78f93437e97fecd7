"""The dtype in which sums are kept."""

import jax.numpy as jnp


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype for sums over values of `dtype`: float32 at least."""
    return jnp.promote_types(dtype, jnp.float32)
