"""Functions of one tile in the Triton kernels: loads, stores, votes and softmax.

A tile is the votes of one input capsule, `[b, j, d]`: b examples and j parents as in the
configuration, and the smallest power of two d that is at least D. Elements beyond the arrays are
loaded as 0; parents beyond J have logits of -infinity. Arrays are in the GPU's memory, with J and D
merged: poses `[B, I, P]`, weights `[I, P, J·D]`, states `[B, J·D]`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from capsjax.kernels.vote_passes.config import TritonTile, power_of_two

# Components of poses contracted by one matrix product: those of a matrix instruction.
LENGTH = 16


class Tiling(NamedTuple):
    """Sizes of a routing problem, and of its tiles."""

    batch: int  # B
    capsules: int  # I
    length: int  # P
    parents: int  # J
    depth: int  # D
    config: TritonTile

    @property
    def tile(self) -> tuple[int, int, int]:
        """Shape of a tile of votes, [b, j, d]."""
        return self.config.examples, self.config.parents, power_of_two(self.depth)

    @property
    def example_tiles(self) -> int:
        """Number of tiles of examples."""
        return pl.cdiv(self.batch, self.config.examples)

    @property
    def chunks(self) -> int:
        """Number of tiles of parents."""
        return pl.cdiv(self.parents, self.config.parents)

    @property
    def products(self) -> int:
        """Number of matrix products over P."""
        return pl.cdiv(self.length, LENGTH)


def tiling_of(poses: Array, weights: Array, config: TritonTile) -> Tiling:
    """Return the tiling of poses `[B, I, P]` and weights `[I, P, J, D]`."""
    batch, capsules, length = poses.shape
    return Tiling(batch, capsules, length, weights.shape[2], weights.shape[3], config)


def flat(x: Array) -> Array:
    """Reshape `[..., J, D]` to `[..., J·D]`."""
    return x.reshape(*x.shape[:-2], -1)


def loop(count: int, step: Callable[[Array, Any], Any], carry: Any) -> Any:
    """Run `lax.fori_loop` from 0 with an int32 index, also if JAX's default is int64."""
    if count == 1:
        return step(jnp.int32(0), carry)
    return lax.fori_loop(0, count, lambda k, carry: step(k.astype(jnp.int32), carry), carry)


def barrier(interpret: bool) -> None:
    """Synchronise a program's threads, so that each can load what the others stored."""
    if not interpret:
        pltriton.debug_barrier()


def tile_indices(tile: Array, size: int) -> Array:
    """Return the indices of elements in a tile, `[size]`."""
    return tile * size + jnp.arange(size, dtype=jnp.int32)


class Block(NamedTuple):
    """Elements of an array to load or store, some of which may be beyond its end."""

    at: tuple[Array, ...]  # indices for each axis, broadcastable to the shape of `inside`
    inside: Array  # booleans, False beyond the end

    def with_leading(self, *leading: Array) -> "Block":
        """Prepend indices of leading axes."""
        return Block((*leading, *self.at), self.inside)

    def load(self, ref: Any, when: Array | None = None, other: float = 0) -> Array:
        """Load the elements, `other` beyond the end; if `when` is False, `other` everywhere."""
        mask = self.inside if when is None else self.inside & when
        return pltriton.load(ref.at[self.at], mask=mask, other=other)

    def store(self, ref: Any, value: Array, when: Array | None = None) -> None:
        """Store the elements that are not beyond the end; if `when` is False, nothing."""
        mask = self.inside if when is None else self.inside & when
        pltriton.store(ref.at[self.at], value.astype(ref.dtype), mask=mask)


def columns(tiling: Tiling, chunk: Array) -> tuple[Array, Array]:
    """Return a chunk's indices along the axis J·D, `[j·d]`, and which are inside of the array."""
    _, parents, depth = tiling.tile
    column = jnp.arange(parents * depth, dtype=jnp.int32)
    parent = chunk * parents + lax.div(column, jnp.int32(depth))
    if depth == tiling.depth:  # equal to the below, but visibly contiguous to the compiler
        return chunk * (parents * depth) + column, parent < tiling.parents
    component = lax.rem(column, jnp.int32(depth))
    inside = (parent < tiling.parents) & (component < tiling.depth)
    return parent * tiling.depth + component, inside


def poses_block(tiling: Tiling, examples: Array, capsule: Array, product: int) -> Block:
    """Return the block `[b, 16]` of poses `[B, I, P]` for one matrix product."""
    component = product * LENGTH + jnp.arange(LENGTH, dtype=jnp.int32)
    inside = (examples < tiling.batch) & (capsule < tiling.capsules)
    return Block(
        (examples[:, None], capsule, component[None, :]),
        inside[:, None] & (component < tiling.length)[None, :],
    )


def weights_block(tiling: Tiling, capsule: Array, product: int, chunk: Array) -> Block:
    """Return the block `[16, j·d]` of weights `[I, P, J·D]` for one matrix product."""
    component = product * LENGTH + jnp.arange(LENGTH, dtype=jnp.int32)
    column, inside = columns(tiling, chunk)
    rows = (component < tiling.length) & (capsule < tiling.capsules)
    return Block((capsule, component[:, None], column[None, :]), rows[:, None] & inside[None, :])


def states_block(tiling: Tiling, examples: Array, chunk: Array) -> Block:
    """Return the block `[b, j·d]` of states `[B, J·D]`."""
    column, inside = columns(tiling, chunk)
    return Block(
        (examples[:, None], column[None, :]),
        (examples < tiling.batch)[:, None] & inside[None, :],
    )


def prior_block(tiling: Tiling, capsule: Array, chunk: Array) -> Block:
    """Return the block `[j]` of prior logits `[I, J]`."""
    parent = tile_indices(chunk, tiling.config.parents)
    return Block((capsule, parent), (parent < tiling.parents) & (capsule < tiling.capsules))


def accumulator_block(tiling: Tiling, slot: Array, product: int) -> Block:
    """Return the block `[b, 16]` of accumulators `[slots, b, P]` of the poses' gradients."""
    row = jnp.arange(tiling.config.examples, dtype=jnp.int32)
    component = product * LENGTH + jnp.arange(LENGTH, dtype=jnp.int32)
    inside = (row >= 0)[:, None] & (component < tiling.length)[None, :]
    return Block((slot, row[:, None], component[None, :]), inside)


def load_states(tiling: Tiling, ref: Any, examples: Array, chunk: Array) -> Array:
    """Load a tile of states, `[b, j, d]`."""
    return states_block(tiling, examples, chunk).load(ref).reshape(tiling.tile)


def make_votes(
    tiling: Tiling, poses_ref: Any, weights_ref: Any, examples: Array, capsule: Array, chunk: Array
) -> Array:
    """Compute a tile of votes, `[b, j, d]`, in float32."""
    examples_in_tile, parents, depth = tiling.tile
    votes = jnp.zeros((examples_in_tile, parents * depth), jnp.float32)
    for product in range(tiling.products):
        poses = poses_block(tiling, examples, capsule, product).load(poses_ref)
        weights = weights_block(tiling, capsule, product, chunk).load(weights_ref)
        votes += pltriton.dot(poses, weights)
    return votes.reshape(tiling.tile)


def agreements(votes: Array, states: Array) -> Array:
    """Compute the dot products of votes and states over the depth, `[b, j]`."""
    return jnp.sum(votes * states, 2)


def make_logits(
    tiling: Tiling, votes: Array, prior_ref: Any, total: Array | None, capsule: Array, chunk: Array
) -> Array:
    """Compute logits `[b, j]`: prior plus agreements; -infinity for parents beyond J."""
    examples, parents, _ = tiling.tile
    logits = jnp.zeros((examples, parents), jnp.float32)
    if prior_ref is not None:
        prior = prior_block(tiling, capsule, chunk).load(prior_ref)
        logits += prior.astype(jnp.float32)[None, :]
    if total is not None:
        logits += agreements(votes, total)
    exists = tile_indices(chunk, parents) < tiling.parents
    return jnp.where(exists[None, :], logits, -jnp.inf)


class Statistics(NamedTuple):
    """Sums over parents for a softmax over J and its gradient, `[b]` each."""

    largest: Array  # the largest logit
    total: Array  # Σ_j exp(logit - largest)
    weighted: Array  # Σ_j exp(logit - largest) · gradient of the coupling


# Initial values of the accumulators: the largest logit stays finite even if all are -infinity.
INITIAL_STATISTICS = (float(jnp.finfo(jnp.float32).min), 0.0, 0.0)


def statistics_of(
    logits: Array, d_couplings: Array | None, before: Statistics | None = None
) -> Statistics:
    """Compute the statistics of a chunk of parents, merged with those of chunks before."""
    if before is None:
        shape = logits.shape[:1]
        before = Statistics(*(jnp.full(shape, value, jnp.float32) for value in INITIAL_STATISTICS))
    largest = jnp.maximum(jnp.max(logits, 1), before.largest)
    shrink = jnp.exp(before.largest - largest)
    exponentials = jnp.exp(logits - largest[:, None])
    total = before.total * shrink + jnp.sum(exponentials, 1)
    if d_couplings is None:
        return Statistics(largest, total, before.weighted)
    weighted = before.weighted * shrink + jnp.sum(exponentials * d_couplings, 1)
    return Statistics(largest, total, weighted)


def load_statistics(tiling: Tiling, ref: Any, slot: Array, when: Array | None = None) -> Statistics:
    """Load statistics from an array `[slots, 3, b]`; initial ones if `when` is False."""
    blocks = statistics_blocks(tiling, slot)
    values = (
        block.load(ref, when, other)
        for block, other in zip(blocks, INITIAL_STATISTICS, strict=True)
    )
    return Statistics(*values)


def store_statistics(tiling: Tiling, ref: Any, slot: Array, statistics: Statistics) -> None:
    """Store statistics into an array `[slots, 3, b]`."""
    for block, value in zip(statistics_blocks(tiling, slot), statistics, strict=True):
        block.store(ref, value)


def statistics_blocks(tiling: Tiling, slot: Array) -> list[Block]:
    """Return the blocks of largest, total and weighted in an array `[slots, 3, b]`."""
    row = jnp.arange(tiling.config.examples, dtype=jnp.int32)
    return [Block((slot, jnp.int32(kind), row), row >= 0) for kind in range(3)]


def couplings_and_gradients(
    logits: Array, d_couplings: Array | None, statistics: Statistics | None
) -> tuple[Array, Array | None]:
    """Compute couplings `[b, j]`, and from gradients of couplings those of the logits.

    If statistics is None, the logits are those of all parents.
    """
    if statistics is None:
        statistics = statistics_of(logits, d_couplings)
    couplings = jnp.exp(logits - statistics.largest[:, None]) / statistics.total[:, None]
    if d_couplings is None:
        return couplings, None
    mean = statistics.weighted / statistics.total
    return couplings, couplings * (d_couplings - mean[:, None])
