"""Arguments and results of the kernels for linear logits of vectors, with sums of votes."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from capsjax.kernels.dispatch import Unsupported
from capsjax.kernels.vote_passes import masks
from capsjax.kernels.vote_passes.passes import Device, Inputs, Spec, State
from capsjax.kernels.vote_passes.precision import parts


def check(spec: Spec, inputs: Inputs, device: Device, *, platform: str) -> None:
    """Raise Unsupported unless the kernels support a pass with these inputs.

    The answer is the same for all passes of a routing, because one kernel reads what another kept.
    """
    rules = _rules(spec, inputs)
    rules["must lie on one device (jax.shard_map, or Explicit axes)"] = device.num_devices == 1
    for rule, holds in rules.items():
        if not holds:
            raise Unsupported(f"routing: inputs of this kernel {rule}")
    parts(platform)


def accepts(spec: Spec, inputs: Inputs) -> bool:
    """Return whether kernels support a pass, as far as it does not depend on the device."""
    return all(_rules(spec, inputs).values())


def _rules(spec: Spec, inputs: Inputs) -> dict[str, bool]:
    """Return what inputs must be, and whether they are."""
    dtype = inputs.poses.dtype
    return {
        f"must be float32 or bfloat16, got {dtype}": dtype in (jnp.float32, jnp.bfloat16),
        "must have linear logits and sums": (spec.logits, spec.moments) == ("linear", "sums"),
        "must have vectors as poses": inputs.poses.shape[2] == 1,
        "must have weights [I, P, J, D]": inputs.weights is not None and inputs.weights.ndim == 4,
        "must have no coordinates": inputs.coordinates is None,
        "must have a batch of known size": isinstance(inputs.poses.shape[0], int),
    }


class Operands(NamedTuple):
    """The inputs of a pass as the kernels read them."""

    poses: Array  # [B, I, P]
    weights: Array  # [I, P, J, D]
    prior: Array | None  # finite float32 logits [I, J] or [B, I, J]
    gates: Array | None  # float32 [B, I]; 0 also for children without a reachable parent


def operands(inputs: Inputs) -> Operands:
    """Return the operands of a pass."""
    prior = None if inputs.prior is None else masks.finite(inputs.prior.astype(jnp.float32))
    gates = masks.gates(inputs)
    if gates is not None:
        gates = jnp.broadcast_to(gates, inputs.poses.shape[:2])
    return Operands(inputs.poses[:, :, 0], inputs.weights, prior, gates)


def state(inputs: Inputs, state: State) -> tuple[Any, Any]:
    """Return k `[B, J]`, with the parent mask in it, and b `[B, J, D]`; None for zeros."""
    masked = masks.masked(inputs, state)
    return masked.k, masked.b


def input_gradients(
    inputs: Inputs, d_poses: Array, d_weights: Array, d_prior: Any, d_gates: Any
) -> Inputs:
    """Convert the gradients of the results of `operands` to those of the inputs."""
    if inputs.prior is not None:
        d_prior = d_prior.astype(inputs.prior.dtype)
    if inputs.gates is None:
        d_gates = None
    else:
        d_gates = masks.gates_gradient(inputs, d_gates).astype(inputs.gates.dtype)
    return Inputs(d_poses[:, :, None], d_weights, d_gates, d_prior)
