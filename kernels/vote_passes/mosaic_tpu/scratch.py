"""Vector memory that only the kernel uses."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from capsjax.kernels.vote_passes.config import TPU_LANES
from capsjax.kernels.vote_passes.mosaic_tpu.problem import (
    Arrays,
    Parents,
    Problem,
    is_uniform,
    needs_agreements,
    states,
    uniform_parents,
)
from capsjax.kernels.vote_passes.mosaic_tpu.products import stacks

# Sublanes of a register of float32.
SUBLANES = 8


class Scratch(NamedTuple):
    """Arrays in vector memory that only the kernel uses; None for an absent one."""

    poses: Any  # [P, m, n], unless a pass loads each component once
    lefts: Any  # bfloat16 [states, groups, J, m, depth], parts of the states
    uniform_lefts: Any  # bfloat16 [parts, J / k, m, k D], of the cotangent, k parents together
    logits: Any  # [J, m, n]; later their exponentials
    d_couplings: Any  # [J, m, n], gradients of the couplings
    products: Any  # [states, P, J, m, n]
    d_poses: Any  # [P, m, n], if the result is not float32
    d_weights: Any  # [P, J, D, n], if the result is not float32


def scratch_shapes(problem: Problem, arrays: Arrays, terms: Sequence[Parents]) -> Scratch:
    """Return the shapes of the arrays that only the kernel uses."""
    m, n, P, J, D = problem.tile.examples, problem.n, problem.P, problem.J, problem.D
    uniform = [term for term in terms if is_uniform(arrays, term)]
    others = [term for term in terms if not is_uniform(arrays, term)]
    most = max((len(states(term)) for term in others), default=0)
    groups, depth = problem.products.parts, D
    if stacks(D):
        groups, depth = 1, D * len(problem.products.terms(arrays.weights.dtype))
    has_gradients, together = problem.gradients.poses, uniform_parents(problem)
    casts = has_gradients and arrays.weights.dtype != jnp.float32
    keeps = has_gradients and problem.tile.keeps_products and most
    softened = any(needs_agreements(problem, term) for term in others)

    def memory(*shape: int, dtype: Any = jnp.float32, when: Any = True) -> Any:
        return pltpu.VMEM(shape, dtype) if when else None

    bfloat16 = partial(memory, dtype=jnp.bfloat16)
    left = problem.products.parts, J // together, m, together * D
    return Scratch(
        poses=memory(P, m, n, when=others or not has_strided_poses(problem, arrays)),
        lefts=bfloat16(most, groups, J, m, depth, when=most),
        uniform_lefts=bfloat16(*left, when=has_gradients and uniform),
        logits=memory(J, m, n, when=others),
        d_couplings=memory(J, m, n, when=softened),
        products=memory(most, P, J, m, n, when=keeps),
        d_poses=memory(P, m, n, when=casts),
        d_weights=memory(P, J, D, n, when=casts),
    )


def has_strided_poses(problem: Problem, arrays: Arrays) -> bool:
    """Return whether a component of the poses can be loaded with a stride."""
    fits = problem.P % SUBLANES == 0 and problem.n == TPU_LANES
    return fits and arrays.poses.dtype == jnp.float32
