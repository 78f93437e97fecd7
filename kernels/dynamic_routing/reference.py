"""The paper's procedure with stored votes: slow and large, differentiable in every mode."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from capsjax.kernels.devices import AxisName, add_up
from capsjax.kernels.squash import accumulation_dtype, squash


def dynamic_routing(
    poses: Array,
    weights: Array,
    prior: Array | None,
    bias: Array | None,
    *,
    num_iterations: int,
    gradient: str,
    axis_name: AxisName | None = None,
) -> Array:
    """Forms all votes, then routes them."""
    accumulate = accumulation_dtype(poses.dtype)
    votes = jnp.einsum("bip,ipjd->bijd", poses, weights, preferred_element_type=accumulate)
    outputs, _ = route_votes(
        votes,
        prior,
        bias,
        num_iterations=num_iterations,
        gradient=gradient,
        axis_name=axis_name,
    )
    return outputs.astype(poses.dtype)


def route_votes(
    votes: Array,
    prior: Array | None,
    bias: Array | None,
    *,
    num_iterations: int,
    gradient: str,
    axis_name: AxisName | None,
) -> tuple[Array, list[Array]]:
    """Routing by agreement of given votes.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", procedure 1,
    https://arxiv.org/abs/1710.09829.

    Args:
      votes: `[B, I, J, D]` in the accumulation dtype.
      prior: Logits before the first iteration, `[I, J]`, or None for zeros.
      bias: `[J, D]`, added to every weighted sum, or None.
      num_iterations: T, at least 1.
      gradient: `"full"`, or `"last"`: the last couplings are constants.
      axis_name: The axis of a mesh over which the input capsules are split, or None.

    Returns:
      The outputs `[B, J, D]`, and the couplings of each iteration, T times `[B, I, J]`.
    """
    shape = votes.shape[:3]
    logits = None if prior is None else jnp.broadcast_to(prior.astype(votes.dtype)[None], shape)
    history = []
    for iteration in range(num_iterations):
        # A softmax over constant zeros would be folded at compile time, for seconds.
        if logits is None:
            couplings = jnp.full(shape, 1 / shape[2], votes.dtype)
        else:
            couplings = jax.nn.softmax(logits, axis=2)
        if gradient == "last":
            couplings = lax.stop_gradient(couplings)
        sums = add_up(jnp.einsum("bij,bijd->bjd", couplings, votes), axis_name)
        if bias is not None:
            sums += bias.astype(votes.dtype)[None]
        outputs = squash(sums)
        history.append(couplings)
        if iteration + 1 < num_iterations:
            agreement = jnp.einsum("bijd,bjd->bij", votes, outputs)
            logits = agreement if logits is None else logits + agreement
    return outputs, history
