"""Roofline model of routing: lower bounds on its work, and the measured peaks of the device.

Source: Williams, Waterman and Patterson, "Roofline: an insightful visual
performance model for multicore architectures", 2009, https://doi.org/10.1145/1498765.1498785.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from capsjax.kernels.vote_passes.cases import Case
from experiments.benchmarks.timing import AsyncCall, time_calls

# Float32 elements of each array of the triad: 256 MiB, more than any cache holds.
TRIAD_SIZE = 2**26
# Candidate sides of the matrix product. The first that takes PRODUCT_SECONDS is used: 2048 on a
# few CPU cores, 8192 on an accelerator.
PRODUCT_SIDES = (1024, 2048, 4096, 8192)
PRODUCT_SECONDS = 0.02


class Work(NamedTuple):
    """Bytes that one call moves to and from memory, and its floating-point operations."""

    bytes: int
    flops: int

    def seconds(self, peak: "Peak") -> float:
        """Return the lower bound on the time: the longer of memory traffic and arithmetic."""
        return max(self.bytes / peak.bytes, self.flops / peak.flops)


class Peak(NamedTuple):
    """Bytes and floating-point operations that the device achieves in a second."""

    bytes: float
    flops: float


def least_work(case: Case, *, gradients: bool) -> Work:
    """Return the bytes and operations of routing that never stores the votes.

    Shape letters are those of `capsjax.shapes`, and T is the number of iterations.

    Bytes: a pass reads poses and weights, B·I·P + I·P·J·D elements. Forward there are T passes,
    and B·J·D outputs are written. Backward there are T passes, B·J·D cotangents are read, and the
    gradients of poses and weights are written. State of B·J·D elements between passes is not
    counted: it stays in caches.

    Operations, where `votes` = 2·B·I·P·J·D is the product that makes all votes, and `dots` =
    2·B·I·J·D a dot product with each vote or a weighted sum of all. Softmax and squash are not
    counted.

    - Forward, T·votes + (T - 1)·2·dots: the first iteration has constant couplings and is one
      product. Each later one makes the votes, their agreements, and their weighted sum.
    - Backward, the T - 1 passes for the gradients of the logits, each votes + 3·dots: two dot
      products and a weighted sum.
    - Backward, the last pass: the votes, unless T = 1; for each of T - 1 iterations 4·dots, two
      dot products and two terms of the gradient of the votes; and 2·votes for the gradients of
      poses and weights.
    """
    B, I, P, J, D, T, dtype, _ = case  # noqa: E741
    arrays, state = B * I * P + I * P * J * D, B * J * D
    votes, dots = 2 * B * I * P * J * D, 2 * B * I * J * D
    elements = T * arrays + state
    flops = T * votes + (T - 1) * 2 * dots
    if gradients:
        elements += T * arrays + state + arrays
        flops += (T - 1) * (votes + 3 * dots)
        flops += (votes if T > 1 else 0) + (T - 1) * 4 * dots + 2 * votes
    return Work(elements * jnp.dtype(dtype).itemsize, flops)


def triad() -> tuple[AsyncCall, int]:
    """Return a call of `a = a / 2 + b` over arrays larger than any cache, and its bytes."""
    add = jax.jit(lambda a, b: 0.5 * a + b, donate_argnums=0)
    b = jnp.ones(TRIAD_SIZE)
    a = add(jnp.zeros(TRIAD_SIZE), b)

    def start() -> jax.Array:
        # In place: the system would have to clear the pages of a new array first.
        nonlocal a
        a = add(a, b)
        return a

    return AsyncCall(start), 3 * b.nbytes


def matrix_product(dtype: str) -> tuple[AsyncCall, int]:
    """Return a call of a matrix product that is large enough for the device, and its operations."""
    multiply = jax.jit(jnp.matmul)
    for side in PRODUCT_SIDES:
        matrix = jax.random.normal(jax.random.key(0), (side, side), dtype)
        # A default argument binds the matrix of this iteration.
        call = AsyncCall(lambda matrix=matrix: multiply(matrix, matrix))  # type: ignore[misc]
        call.wait(call.start())
        if time_calls({0: call}, repeats=1)[0].median > PRODUCT_SECONDS:
            break
    return call, 2 * side**3
