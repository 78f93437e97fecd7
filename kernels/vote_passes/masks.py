"""Masks of parents and children in tiles, whose logits are finite.

A parent that a child cannot reach has a large negative logit. A child that can reach no parent has
a gate of 0, because the softmax of its finite logits is not 0.
"""

import jax.numpy as jnp
from jax import Array

from capsjax.kernels.dtypes import accumulation_dtype
from capsjax.kernels.vote_passes.passes import Inputs, State

# A finite logit in place of -infinity: beside any unmasked logit its coupling is 0, and the sum of
# two does not overflow.
MASKED_LOGIT = float(jnp.finfo(jnp.float32).min) / 4


def finite(prior: Array) -> Array:
    """Return prior logits with `MASKED_LOGIT` in place of -infinity."""
    return jnp.maximum(prior, MASKED_LOGIT)


def gates(inputs: Inputs) -> Array | None:
    """Return the gates, `[I]` or `[B, I]`, with 0 for children without a reachable parent."""
    dtype = accumulation_dtype(inputs.poses.dtype)
    allowed = reachable(inputs)
    if allowed is None or inputs.gates is None:
        found = allowed if inputs.gates is None else inputs.gates
        return None if found is None else found.astype(dtype)
    allowed = jnp.broadcast_to(allowed, inputs.gates.shape)
    return jnp.where(allowed, inputs.gates.astype(dtype), 0)


def gates_gradient(inputs: Inputs, d_gates: Array) -> Array:
    """Return the gradient of the gates, with 0 for children without a reachable parent."""
    allowed = reachable(inputs)
    return d_gates if allowed is None else jnp.where(allowed, d_gates, 0)


def masked(inputs: Inputs, state: State) -> State:
    """Add the parent mask to the state, as `MASKED_LOGIT` in k."""
    if inputs.parent_mask is None:
        return state
    dtype = accumulation_dtype(inputs.poses.dtype)
    k = jnp.zeros(inputs.parent_mask.shape, dtype) if state.k is None else state.k
    return state._replace(k=jnp.where(inputs.parent_mask, k, MASKED_LOGIT))


def reachable(inputs: Inputs) -> Array | None:
    """Return whether prior and parent mask allow a child any parent; None if they do for all."""
    batch, children = inputs.poses.shape[:2]
    if inputs.parent_mask is None:
        return None if inputs.prior is None else jnp.any(inputs.prior > -jnp.inf, -1)
    if inputs.prior is None:
        return jnp.broadcast_to(jnp.any(inputs.parent_mask, 1, keepdims=True), (batch, children))
    letters = "bj,ij->bi" if inputs.prior.ndim == 2 else "bj,bij->bi"
    both = (inputs.parent_mask, inputs.prior > -jnp.inf)
    return jnp.einsum(letters, *(x.astype(jnp.float32) for x in both)) > 0
