"""Passes with equal couplings: plain matrix products, which XLA compiles best."""

import jax.numpy as jnp
from jax import Array

from capsjax.kernels.vote_passes.linear import Operands
from capsjax.kernels.vote_passes.passes import Spec, Term


def sums(spec: Spec, operands: Operands) -> tuple[Array, Array]:
    """Compute the mass `[B, J]` and the sums `[B, J, D]`."""
    poses, gates, parents = operands.poses, operands.gates, spec.num_parents
    coupling = 1 / (parents + spec.leaky)
    gated = poses if gates is None else poses * gates[..., None]
    first = jnp.einsum("bip,ipjd->bjd", gated, operands.weights, preferred_element_type=jnp.float32)
    count = (
        jnp.full(poses.shape[:1], poses.shape[1], jnp.float32) if gates is None else gates.sum(1)
    )
    mass = jnp.broadcast_to(coupling * count[:, None], (poses.shape[0], parents))
    return mass, coupling * first


def gradients(spec: Spec, operands: Operands, term: Term) -> tuple[Array, Array, Array | None]:
    """Compute the gradients of poses, weights and gates."""
    poses, gates = operands.poses, operands.gates
    coupling = 1 / (spec.num_parents + spec.leaky)
    d_sums = coupling * term.cotangent.first
    d_poses = jnp.einsum(
        "bjd,ipjd->bip", d_sums, operands.weights, preferred_element_type=jnp.float32
    )
    d_gates, gated = None, poses
    if gates is not None:
        d_gates = jnp.sum(poses * d_poses, -1)
        if term.cotangent.mass is not None:
            d_gates += coupling * term.cotangent.mass.sum(1)[:, None]
        d_poses, gated = gates[..., None] * d_poses, gates[..., None] * poses
    d_weights = jnp.einsum("bjd,bip->ipjd", d_sums, gated, preferred_element_type=jnp.float32)
    return d_poses, d_weights, d_gates
