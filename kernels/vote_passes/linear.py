"""Helpers of the kernels, which support linear logits with sums of votes."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from capsjax.kernels.dispatch import Unsupported
from capsjax.kernels.vote_passes.passes import Device, Inputs, Spec, State, Term

# A finite logit in place of -infinity: beside any unmasked logit its coupling is 0, and the sum of
# two does not overflow.
MASKED_LOGIT = float(jnp.finfo(jnp.float32).min) / 4


def check(spec: Spec, inputs: Inputs, others: Any, device: Device) -> None:
    """Raise Unsupported unless the kernels support a pass with these inputs."""
    dtype = inputs.poses.dtype
    extras = inputs.gates, inputs.coordinates, inputs.parent_mask
    k = others.k if isinstance(others, State) else None
    rules = {
        f"must be float32 or bfloat16, got {dtype}": dtype in (jnp.float32, jnp.bfloat16),
        "must have linear logits and sums, no leak and no mass": spec == Spec(spec.num_parents),
        "must have vectors as poses": inputs.poses.shape[2] == 1,
        "must have weights [I, P, J, D]": inputs.weights is not None and inputs.weights.ndim == 4,
        "must have one prior [I, J] for all examples": getattr(inputs.prior, "ndim", 2) == 2,
        "must have no gates, coordinates or parent_mask": all(x is None for x in (*extras, k)),
        "must have a batch of known size": isinstance(inputs.poses.shape[0], int),
        "must lie on one device (jax.shard_map, or Explicit axes)": device.num_devices == 1,
    }
    for rule, holds in rules.items():
        if not holds:
            raise Unsupported(f"routing: inputs of this kernel {rule}")


def arrays(inputs: Inputs) -> tuple[Array, Array, Array | None]:
    """Return poses `[B, I, P]`, weights, and a finite prior.

    Children without a reachable parent get a zero pose, so that they add nothing to the sums.
    """
    poses, prior = inputs.poses[:, :, 0], inputs.prior
    if prior is None:
        return poses, inputs.weights, None
    poses = jnp.where(reachable(prior)[:, None], poses, 0)
    return poses, inputs.weights, jnp.maximum(prior.astype(jnp.float32), MASKED_LOGIT)


def reachable(prior: Array) -> Array:
    """Return, for each child, whether its prior allows any parent (is above -infinity)."""
    return jnp.any(prior > -jnp.inf, -1)


def states(terms: Sequence[Term]) -> list[tuple[Array | None, Array]]:
    """Return the states b and the cotangents of the sums of each iteration."""
    return [(term.state.b, term.cotangent.first) for term in terms]


def gradients(inputs: Inputs, d_poses: Array, d_weights: Array, d_prior: Array | None) -> Inputs:
    """Convert the gradients of the results of `arrays` to those of the inputs."""
    if inputs.prior is not None and d_prior is not None:
        d_poses = jnp.where(reachable(inputs.prior)[:, None], d_poses, 0)
        d_prior = d_prior.astype(inputs.prior.dtype)
    return Inputs(d_poses[:, :, None], d_weights, prior=d_prior)
