"""What the Pallas-Triton kernels do with one tile: load it, make its votes, take their softmax.

A tile is one capsule's votes of some examples for some parents, `[b, j, d]`: b and j powers of two
chosen by the configuration, d the power of two that holds D. What a tile has beyond the arrays is
loaded as zero, and parents beyond J have logits of -infinity. Arrays are whole, in the GPU's
memory, and J and D one axis: poses `[B, I, P]`, weights `[I, P, J * D]`, states `[B, J * D]`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from capsjax.kernels.vote_passes.config import TritonTile, power_of_two

# A product over the components of poses takes this many at once, as matrix instructions do.
LENGTH = 16


class Tiling(NamedTuple):
    """The sizes of a problem, and how it is cut."""

    batch: int  # B
    capsules: int  # I
    length: int  # P
    parents: int  # J
    depth: int  # D
    cut: TritonTile

    @property
    def tile(self) -> tuple[int, int, int]:
        """Examples, parents and depth of a tile of votes."""
        return self.cut.examples, self.cut.parents, power_of_two(self.depth)

    @property
    def example_tiles(self) -> int:
        """How many tiles hold B."""
        return pl.cdiv(self.batch, self.cut.examples)

    @property
    def chunks(self) -> int:
        """How many tiles hold J."""
        return pl.cdiv(self.parents, self.cut.parents)

    @property
    def products(self) -> int:
        """How many products hold P."""
        return pl.cdiv(self.length, LENGTH)


def tiling_of(poses: Array, weights: Array, cut: TritonTile) -> Tiling:
    """Poses `[B, I, P]` and weights `[I, P, J, D]`, cut into such tiles."""
    batch, capsules, length = poses.shape
    return Tiling(batch, capsules, length, weights.shape[2], weights.shape[3], cut)


def flat(x: Array) -> Array:
    """`[..., J, D]` as `[..., J * D]`."""
    return x.reshape(*x.shape[:-2], -1)


def loop(count: int, step: Callable[[Array, Any], Any], carry: Any) -> Any:
    """`lax.fori_loop` from 0, whose index is an int32 also where JAX counts in 64 bits."""
    if count == 1:
        return step(jnp.int32(0), carry)
    return lax.fori_loop(0, count, lambda k, carry: step(k.astype(jnp.int32), carry), carry)


def barrier(interpret: bool) -> None:
    """Between a program's writing to memory and the reading of it by its other threads."""
    if not interpret:
        pltriton.debug_barrier()


def span(tile: Array, size: int) -> Array:
    """Indices of the tile of that number, `[size]`."""
    return tile * size + jnp.arange(size, dtype=jnp.int32)


class Block(NamedTuple):
    """Rows by columns of an array, some of them beyond its end."""

    at: tuple[Array, ...]  # an index an axis; together they have the shape of `inside`
    inside: Array  # whether the array has that element

    def under(self, *leading: Array) -> "Block":
        """The same block of one of several such arrays."""
        return Block((*leading, *self.at), self.inside)

    def load(self, ref: Any, when: Array | None = None, other: float = 0) -> Array:
        """The block, `other` outside of the array, or everywhere unless `when`."""
        mask = self.inside if when is None else self.inside & when
        return pltriton.load(ref.at[self.at], mask=mask, other=other)

    def store(self, ref: Any, value: Array, when: Array | None = None) -> None:
        """Writes what lies inside of the array, or nothing unless `when`."""
        mask = self.inside if when is None else self.inside & when
        pltriton.store(ref.at[self.at], value.astype(ref.dtype), mask=mask)


def columns(tiling: Tiling, chunk: Array) -> tuple[Array, Array]:
    """Indices of a chunk's parents and depth in the flat axis, `[j * d]`, and which exist."""
    _, parents, depth = tiling.tile
    column = jnp.arange(parents * depth, dtype=jnp.int32)
    parent = chunk * parents + lax.div(column, jnp.int32(depth))
    if depth == tiling.depth:  # the same numbers, seen to be contiguous
        return chunk * (parents * depth) + column, parent < tiling.parents
    component = lax.rem(column, jnp.int32(depth))
    inside = (parent < tiling.parents) & (component < tiling.depth)
    return parent * tiling.depth + component, inside


def poses_block(tiling: Tiling, examples: Array, capsule: Array, product: int) -> Block:
    """Of poses `[B, I, P]`: `[b, 16]`."""
    component = product * LENGTH + jnp.arange(LENGTH, dtype=jnp.int32)
    inside = (examples < tiling.batch) & (capsule < tiling.capsules)
    return Block(
        (examples[:, None], capsule, component[None, :]),
        inside[:, None] & (component < tiling.length)[None, :],
    )


def weights_block(tiling: Tiling, capsule: Array, product: int, chunk: Array) -> Block:
    """Of weights `[I, P, J * D]`: `[16, j * d]`."""
    component = product * LENGTH + jnp.arange(LENGTH, dtype=jnp.int32)
    column, inside = columns(tiling, chunk)
    rows = (component < tiling.length) & (capsule < tiling.capsules)
    return Block((capsule, component[:, None], column[None, :]), rows[:, None] & inside[None, :])


def states_block(tiling: Tiling, examples: Array, chunk: Array) -> Block:
    """Of states `[B, J * D]`: `[b, j * d]`."""
    column, inside = columns(tiling, chunk)
    return Block(
        (examples[:, None], column[None, :]),
        (examples < tiling.batch)[:, None] & inside[None, :],
    )


def prior_block(tiling: Tiling, capsule: Array, chunk: Array) -> Block:
    """Of prior logits `[I, J]`: `[j]`."""
    parent = span(chunk, tiling.cut.parents)
    return Block((capsule, parent), (parent < tiling.parents) & (capsule < tiling.capsules))


def growing_poses_block(tiling: Tiling, slot: Array, product: int) -> Block:
    """Of float32 sums `[n, b, P]`: `[b, 16]`."""
    row = jnp.arange(tiling.cut.examples, dtype=jnp.int32)
    component = product * LENGTH + jnp.arange(LENGTH, dtype=jnp.int32)
    inside = (row >= 0)[:, None] & (component < tiling.length)[None, :]
    return Block((slot, row[:, None], component[None, :]), inside)


def load_states(tiling: Tiling, ref: Any, examples: Array, chunk: Array) -> Array:
    """A tile of states, `[b, j, d]`."""
    return states_block(tiling, examples, chunk).load(ref).reshape(tiling.tile)


def make_votes(
    tiling: Tiling, poses_ref: Any, weights_ref: Any, examples: Array, capsule: Array, chunk: Array
) -> Array:
    """A tile of votes `[b, j, d]`, float32."""
    examples_in_tile, parents, depth = tiling.tile
    votes = jnp.zeros((examples_in_tile, parents * depth), jnp.float32)
    for product in range(tiling.products):
        poses = poses_block(tiling, examples, capsule, product).load(poses_ref)
        weights = weights_block(tiling, capsule, product, chunk).load(weights_ref)
        votes += pltriton.dot(poses, weights)
    return votes.reshape(tiling.tile)


def agreements(votes: Array, states: Array) -> Array:
    """Dot products over the depth, `[b, j]`."""
    return jnp.sum(votes * states, 2)


def make_logits(
    tiling: Tiling, votes: Array, prior_ref: Any, total: Array | None, capsule: Array, chunk: Array
) -> Array:
    """Logits `[b, j]` of prior and agreements, -infinity for parents beyond J."""
    examples, parents, _ = tiling.tile
    logits = jnp.zeros((examples, parents), jnp.float32)
    if prior_ref is not None:
        prior = prior_block(tiling, capsule, chunk).load(prior_ref)
        logits += prior.astype(jnp.float32)[None, :]
    if total is not None:
        logits += agreements(votes, total)
    exists = span(chunk, parents) < tiling.parents
    return jnp.where(exists[None, :], logits, -jnp.inf)


class Statistics(NamedTuple):
    """What a softmax over J and its gradient must know of all parents, `[b]` each."""

    largest: Array  # the largest logit
    total: Array  # the sum over J of e = exp(logit - largest)
    weighted: Array  # the sum over J of e times the coupling's gradient


# Statistics of no parents. A logit may be -infinity, which the largest may not be.
NO_STATISTICS = (float(jnp.finfo(jnp.float32).min), 0.0, 0.0)


def statistics_of(
    logits: Array, d_couplings: Array | None, before: Statistics | None = None
) -> Statistics:
    """The statistics of a chunk of parents, and of those before."""
    if before is None:
        shape = logits.shape[:1]
        before = Statistics(*(jnp.full(shape, value, jnp.float32) for value in NO_STATISTICS))
    largest = jnp.maximum(jnp.max(logits, 1), before.largest)
    shrink = jnp.exp(before.largest - largest)
    exponentials = jnp.exp(logits - largest[:, None])
    total = before.total * shrink + jnp.sum(exponentials, 1)
    if d_couplings is None:
        return Statistics(largest, total, before.weighted)
    weighted = before.weighted * shrink + jnp.sum(exponentials * d_couplings, 1)
    return Statistics(largest, total, weighted)


def load_statistics(tiling: Tiling, ref: Any, slot: Array, when: Array | None = None) -> Statistics:
    """Of an array `[n, 3, b]`; those of no parents unless `when`."""
    blocks = statistics_blocks(tiling, slot)
    values = (
        block.load(ref, when, other) for block, other in zip(blocks, NO_STATISTICS, strict=True)
    )
    return Statistics(*values)


def store_statistics(tiling: Tiling, ref: Any, slot: Array, statistics: Statistics) -> None:
    """Into an array `[n, 3, b]`."""
    for block, value in zip(statistics_blocks(tiling, slot), statistics, strict=True):
        block.store(ref, value)


def statistics_blocks(tiling: Tiling, slot: Array) -> list[Block]:
    """Where an array `[n, 3, b]` has the largest logit, the total and the weighted sum."""
    row = jnp.arange(tiling.cut.examples, dtype=jnp.int32)
    return [Block((slot, jnp.int32(kind), row), row >= 0) for kind in range(3)]


def couplings_and_gradients(
    logits: Array, d_couplings: Array | None, statistics: Statistics | None
) -> tuple[Array, Array | None]:
    """Couplings `[b, j]`, and the gradients of the logits if those of the couplings are given.

    Statistics of None means that the logits are those of all parents.
    """
    if statistics is None:
        statistics = statistics_of(logits, d_couplings)
    couplings = jnp.exp(logits - statistics.largest[:, None]) / statistics.total[:, None]
    if d_couplings is None:
        return couplings, None
    mean = statistics.weighted / statistics.total
    return couplings, couplings * (d_couplings - mean[:, None])
