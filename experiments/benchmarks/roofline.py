"""What routing needs at least, and what the device gives at most: the two sides of a roofline.

Source of the picture: Williams, Waterman and Patterson, "Roofline: an insightful visual
performance model for multicore architectures", 2009, https://doi.org/10.1145/1498765.1498785.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from capsjax.kernels.vote_passes.cases import Case
from experiments.benchmarks.timing import Program, time_programs

# float32 numbers in each array of the triad: 256 MiB, past every cache.
TRIAD_SIZE = 2**26
# Sides of the matrix product, the first one that lasts PRODUCT_SECONDS: 2048 on a few CPU cores,
# 8192 on an accelerator.
PRODUCT_SIDES = (1024, 2048, 4096, 8192)
PRODUCT_SECONDS = 0.02


class Work(NamedTuple):
    """What one call moves to and from memory, and computes."""

    bytes: int
    flops: int

    def seconds(self, peak: "Peak") -> float:
        """The time that it takes at least: that of the slower of both."""
        return max(self.bytes / peak.bytes, self.flops / peak.flops)


class Peak(NamedTuple):
    """What the device does in a second."""

    bytes: float
    flops: float


def least_work(case: Case, *, gradients: bool) -> Work:
    """The bytes and operations of routing that never stores votes, in the letters of the case.

    Bytes: each pass reads poses and weights once, B·I·P + I·P·J·D numbers; there are T passes
    forward, which end with B·J·D outputs, and T backward, which start with B·J·D cotangents and
    write the gradients of poses and weights once. States of B·J·D between passes stay in caches.

    Operations, with M = 2·B·I·P·J·D for all votes and E = 2·B·I·J·D for a dot with each vote, or
    a weighted sum of them (softmax and squash are not counted):

    - forward: T·M + (T - 1)·2E. The first iteration has constant couplings and is one product;
      each other one makes the votes, their agreements and their sum.
    - backward: the T - 1 passes for the logits' gradients make the votes, two dots and a sum,
      M + 3E. The last pass makes the votes, unless T = 1; for each of T - 1 iterations two dots
      and two terms of the votes' gradient, 4E; then the gradients of poses and weights, 2M.
    """
    B, I, P, J, D, T, dtype = case  # noqa: E741
    arrays, states = B * I * P + I * P * J * D, B * J * D
    M, E = 2 * B * I * P * J * D, 2 * B * I * J * D
    numbers = T * arrays + states
    flops = T * M + (T - 1) * 2 * E
    if gradients:
        numbers += T * arrays + states + arrays
        flops += (T - 1) * (M + 3 * E) + (M if T > 1 else 0) + (T - 1) * 4 * E + 2 * M
    return Work(numbers * jnp.dtype(dtype).itemsize, flops)


def triad() -> tuple[Program, int]:
    """`a = a / 2 + b` over arrays past every cache, and the bytes that it reads and writes."""
    add = jax.jit(lambda a, b: 0.5 * a + b, donate_argnums=0)
    b = jnp.ones(TRIAD_SIZE)
    a = add(jnp.zeros(TRIAD_SIZE), b)

    def run() -> jax.Array:
        # In place: a new array each time would be new pages, which the system must clear first.
        nonlocal a
        a = add(a, b)
        return a

    return Program(run), 3 * b.nbytes


def product(dtype: str) -> tuple[Program, int]:
    """A matrix product in that dtype, as large as the device needs, and its operations."""
    multiply = jax.jit(jnp.matmul)
    for side in PRODUCT_SIDES:
        matrix = jax.random.normal(jax.random.key(0), (side, side), dtype)
        # Both are bound now, since the loop goes on.
        program = Program(lambda matrix=matrix: multiply(matrix, matrix))  # type: ignore[misc]
        program.wait(program.run())
        if time_programs({0: program}, repeats=1)[0].median > PRODUCT_SECONDS:
            break
    return program, 2 * side**3
