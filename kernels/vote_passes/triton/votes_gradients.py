"""The Triton kernel with votes in registers for the gradients of the inputs of passes.

A warp owns a child, whose gradients of weights then have one place, and takes tiles of examples one
after the other. It walks over the parents once for all iterations.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.experimental import pallas as pl

from capsjax.kernels.vote_passes.config import TritonVotesConfig
from capsjax.kernels.vote_passes.triton.tiles import exp2, fma, loop
from capsjax.kernels.vote_passes.triton.votes_tiles import (
    FOUR,
    Operands,
    Parents,
    Sizes,
    Statistics,
    Tile,
)
from capsjax.kernels.vote_passes.triton.votes_walks import (
    call,
    children_of,
    float32,
)

# A logit to the base e is that to the base 2 times this.
LN_2 = 0.6931471805599453


class Iteration(NamedTuple):
    """The pass of one iteration."""

    parents: Parents
    softmax: Statistics | None  # None if all couplings are equal


class Gradients(NamedTuple):
    """Gradients of the inputs, in the layouts of the kernel; None for absent ones."""

    poses: Any  # [B, I, R, P/4, 4]
    weights: Any  # [splits, I, J, P·E]
    gates: Any  # [I, B], of the iterations whose couplings are equal
    prior: Any  # [splits, I, J, 1], or [I, J, B]
    coordinates: Any  # [splits, I, D]


class _OfChild(NamedTuple):
    """Gradients of a child, which grow over the parents."""

    pose: list[list[Array]]  # [R][P]
    gate: Array
    coordinates: list[Array]  # [D], or empty if there are none


class _OfVote(NamedTuple):
    """Gradients of a vote, its logit and the child's gate, which grow over the iterations."""

    vote: list[Array]  # [D]
    logit: Array
    gate: Array


def gradients_of_inputs(
    config: TritonVotesConfig,
    sizes: Sizes,
    operands: Operands,
    iterations: Sequence[Iteration],
    center: Any,
    *,
    constant_couplings: bool,
) -> Gradients:
    """Compute the gradients of poses, weights, prior and coordinates, and of gates in part."""
    warps = config.gradients_warps
    tiles = pl.cdiv(sizes.tiles, config.gradients_splits)
    splits = pl.cdiv(sizes.tiles, tiles)
    I, J = sizes.capsules, sizes.parents  # noqa: E741

    def kernel(refs: tuple[Operands, list[Iteration], Any], *all_results: Any) -> None:
        split = pl.program_id(1)
        (i,), (to,), (exists,) = children_of(sizes, warps, 1, pl.program_id(0))

        def one_tile(step: Array, carry: tuple[()]) -> tuple[()]:
            # Past the last tile that one again, which is not stored.
            inside = split * tiles + step < sizes.tiles
            tile = Tile(sizes, warps, jnp.minimum(split * tiles + step, sizes.tiles - 1))
            results = Gradients(*all_results)
            stores = exists if splits * tiles == sizes.tiles else exists & inside
            child = _Child(tile, *refs, results, i, to, stores, split, step == 0)
            child.run(constant_couplings=constant_couplings)
            return carry

        loop(tiles, one_tile, ())

    prior = None
    if operands.prior is not None and not constant_couplings:
        is_shared = operands.prior.ndim == 2
        prior = float32(splits, I, J, 1) if is_shared else float32(I, J, sizes.padded_batch)
    of_gates = operands.gates is not None and any(x.softmax is None for x in iterations)
    poses = sizes.batch, I, sizes.rows, sizes.padded_length // FOUR, FOUR
    results = Gradients(
        poses=ShapedArray(poses, operands.poses.dtype),
        weights=float32(splits, I, J, sizes.padded_length * sizes.padded_columns),
        gates=float32(I, sizes.padded_batch) if of_gates else None,
        prior=prior,
        coordinates=None if operands.coordinates is None else float32(splits, I, sizes.depth),
    )
    found = call(
        kernel,
        (operands, list(iterations), center),
        grid=(pl.cdiv(I, warps), splits),
        results=results,
        warps=warps,
        sizes=sizes,
        name="input_gradients",
    )
    return Gradients(*found)


class _Child(NamedTuple):
    """A child of each warp, and a tile of examples."""

    tile: Tile
    operands: Operands
    iterations: Sequence[Iteration]
    center: Any
    results: Gradients
    i: Array  # indices to load from, `[n]`
    to: Array  # indices to store to
    exists: Array  # whether to store
    split: Array  # index of the program along the examples
    is_first: Array  # whether nothing was stored before that grows

    def run(self, *, constant_couplings: bool) -> None:
        """Compute and store all gradients."""
        tile, sizes, operands = self.tile, self.tile.sizes, self.operands
        pose = tile.load_pose(operands, self.i)

        def one_parent(j: Array, so_far: _OfChild) -> _OfChild:
            center = tile.load_center(self.center, j)
            votes = tile.votes(operands, pose, center, self.i, j)
            found = _OfVote([tile.zero] * sizes.depth, tile.zero, tile.zero)
            for iteration in self.iterations:
                found = self.add_iteration(iteration, j, votes, found, constant_couplings)
            return self.add_parent(j, pose, found, so_far)

        start = _OfChild(
            [[tile.zero] * sizes.padded_length] * sizes.rows,
            tile.zero,
            [] if operands.coordinates is None else [tile.zero] * sizes.depth,
        )
        self.store(loop(sizes.parents, one_parent, start))

    def add_iteration(
        self,
        iteration: Iteration,
        j: Array,
        votes: list[Array],
        so_far: _OfVote,
        constant_couplings: bool,
    ) -> _OfVote:
        """Add the gradients of one iteration to those of the vote for a parent."""
        tile, i, (parents, softmax) = self.tile, self.i, iteration
        d_vote, d_logit, d_gate = so_far
        d_gated, slopes = tile.cotangent(votes, tile.load_cotangents(parents, j))
        if softmax is None:
            weight = tile.equal_weight(self.operands, i)
            d_gate = fma(tile, d_gated, tile.zero + tile.sizes.equal_coupling, d_gate)
        else:
            # Statistics are loaded again for each parent: in registers there would be two numbers
            # for every iteration.
            states = tile.load_states(parents, j)
            k = None if parents.k is None else tile.load(parents.k, j)
            start = tile.start_logit(self.operands, k, i, j)
            logit, differences = tile.logit(start, votes, states)
            weight = exp2(tile, logit - tile.load(softmax.normaliser, i))
        d_vote = [fma(tile, weight, slope, d) for slope, d in zip(slopes, d_vote, strict=True)]
        if softmax is not None and not constant_couplings:
            term = weight * (d_gated - tile.load(softmax.share, i))
            d_logit = d_logit + term
            if states is not None and tile.sizes.logits == "linear":
                factor = term * LN_2
                d_vote = [fma(tile, factor, b, d) for b, d in zip(*states, d_vote, strict=True)]
            elif states is not None:
                # q (v - z) is the difference times 2 ln(2) s.
                factor = term * (-2 * LN_2)
                d_vote = [
                    fma(tile, factor * s, x, d)
                    for s, x, d in zip(states[0], differences, d_vote, strict=True)
                ]
        return _OfVote(d_vote, d_logit, d_gate)

    def add_parent(
        self, j: Array, pose: list[list[Array]], of_vote: _OfVote, so_far: _OfChild
    ) -> _OfChild:
        """Add a parent's gradients to those of the child; store those of weights and prior."""
        tile, sizes, results = self.tile, self.tile.sizes, self.results
        columns = sizes.padded_columns
        d_vote = [of_vote.vote[r * columns :][:columns] for r in range(sizes.rows)]
        d_pose = [list(row) for row in so_far.pose]
        d_weights = []
        for p in range(sizes.padded_length):
            weights = tile.load_weights(self.operands, self.i, j, p, again=True)
            for r in range(sizes.rows):
                for d, w in zip(d_vote[r], weights, strict=True):
                    d_pose[r][p] = fma(tile, d, w, d_pose[r][p])
            for e in range(columns):
                total = pose[0][p] * d_vote[0][e]
                for r in range(1, sizes.rows):
                    total = fma(tile, pose[r][p], d_vote[r][e], total)
                d_weights.append(total)
        at = self.split, self.to, j
        tile.grow(results.weights, at, d_weights, self.is_first, self.exists)
        if results.prior is not None and self.operands.prior.ndim == 2:
            tile.grow(results.prior, at, [of_vote.logit], self.is_first, self.exists)
        elif results.prior is not None:
            tile.store(results.prior, of_vote.logit, self.to, j, exists=self.exists)
        coordinates = so_far.coordinates
        if coordinates:
            coordinates = [x + d for x, d in zip(coordinates, of_vote.vote, strict=True)]
        return _OfChild(d_pose, so_far.gate + of_vote.gate, coordinates)

    def store(self, found: _OfChild) -> None:
        """Store the gradients of the child."""
        tile, results = self.tile, self.results
        for r, row in enumerate(found.pose):
            tile.store_fours(results.poses, row, self.to, r, exists=self.exists)
        if results.gates is not None:
            tile.store(results.gates, found.gate, self.to, exists=self.exists)
        if results.coordinates is not None:
            at = self.split, self.to
            tile.grow(results.coordinates, at, found.coordinates, self.is_first, self.exists)
