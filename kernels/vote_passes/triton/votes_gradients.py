"""The Triton kernel with votes in registers for the gradients of the inputs of passes.

A warp owns a child, whose gradients of weights then have one place, and takes tiles of examples one
after the other. It walks over the parents once for all iterations. With logits and cotangents of
couplings stored, the gradients of a vote v are slope (v - center) + offset, two sums over the
iterations.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.experimental import pallas as pl

from capsjax.kernels.vote_passes.config import TritonVotesConfig
from capsjax.kernels.vote_passes.triton.tiles import fma, loop
from capsjax.kernels.vote_passes.triton.votes_tiles import (
    FOUR,
    Operands,
    Parents,
    Sizes,
    Slopes,
    Statistics,
    Tile,
)
from capsjax.kernels.vote_passes.triton.votes_walks import (
    call,
    children_of,
    float32,
)


class Iteration(NamedTuple):
    """The pass of one iteration."""

    parents: Parents | None  # with cotangents, if all couplings are equal
    slopes: Slopes | None  # if they are not
    softmax: Statistics | None  # if they are not


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

    slopes: list[Array]  # [D] each; the gradient of the vote is slope (v - center) + offset
    offsets: list[Array]
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
            child.run()
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

    def run(self) -> None:
        """Compute and store all gradients."""
        tile, sizes, operands = self.tile, self.tile.sizes, self.operands
        pose = tile.load_pose(operands, self.i)
        is_gaussian = sizes.logits == "gaussian"

        def one_parent(j: Array, so_far: _OfChild) -> _OfChild:
            votes: list[Array] = []
            if is_gaussian or self.results.gates is not None:
                center = tile.load_center(self.center, j)
                votes = tile.votes(operands, pose, center, self.i, j)
            zeros = [tile.zero] * sizes.depth
            found = _OfVote(zeros, zeros, tile.zero, tile.zero)
            for iteration in self.iterations:
                if iteration.softmax is None:
                    found = self.add_equal(iteration.parents, j, votes, found)
                else:
                    found = self.add_iteration(iteration, j, found)
            d_vote = found.offsets
            if is_gaussian:
                triples = zip(found.slopes, votes, d_vote, strict=True)
                d_vote = [fma(tile, slope, v, x) for slope, v, x in triples]
            return self.add_parent(j, pose, d_vote, found, so_far)

        start = _OfChild(
            [[tile.zero] * sizes.padded_length] * sizes.rows,
            tile.zero,
            [] if operands.coordinates is None else [tile.zero] * sizes.depth,
        )
        self.store(loop(sizes.parents, one_parent, start))

    def add_equal(self, parents: Any, j: Array, votes: list[Array], so_far: _OfVote) -> _OfVote:
        """Add the gradients of the iteration whose couplings are equal."""
        tile = self.tile
        cotangents, gate = tile.load_cotangents(parents, j), so_far.gate
        slopes = cotangents.others[0]
        if votes:
            d_gated, slopes = tile.cotangent(votes, cotangents)
            gate = fma(tile, d_gated, tile.zero + tile.sizes.equal_coupling, gate)
        weight = tile.equal_weight(self.operands, self.i)
        pairs = zip(slopes, so_far.offsets, strict=True)
        offsets = [fma(tile, weight, slope, x) for slope, x in pairs]
        return so_far._replace(offsets=offsets, gate=gate)

    def add_iteration(self, iteration: Iteration, j: Array, so_far: _OfVote) -> _OfVote:
        """Add the gradients of an iteration."""
        tile, (_, slopes, softmax) = self.tile, iteration
        assert slopes is not None
        assert softmax is not None
        # Statistics are loaded again for each parent: in registers there would be two numbers for
        # every iteration.
        weight = tile.load_weight(softmax, self.i, j)
        found = self.add_slopes(slopes.of_weights, weight, j, so_far)
        if softmax.d_gated is None:
            return found
        d_logit = tile.load_d_logit(softmax, weight, self.i, j)
        found = found._replace(logit=found.logit + d_logit)
        if slopes.of_logits is None:
            return found
        return self.add_slopes(slopes.of_logits, d_logit, j, found)

    def add_slopes(self, ref: Any, factor: Array, j: Array, so_far: _OfVote) -> _OfVote:
        """Add slopes and offsets times a factor."""
        tile, found = self.tile, [so_far.slopes, so_far.offsets]
        for index in range(ref.shape[1]):
            # The last one are offsets.
            place = index + 2 - ref.shape[1]
            pairs = zip(tile.load_fours(ref, j, index), found[place], strict=True)
            found[place] = [fma(tile, factor, x, total) for x, total in pairs]
        return so_far._replace(slopes=found[0], offsets=found[1])

    def add_parent(
        self,
        j: Array,
        pose: list[list[Array]],
        d_vote: list[Array],
        of_vote: _OfVote,
        so_far: _OfChild,
    ) -> _OfChild:
        """Add a parent's gradients to those of the child; store those of weights and prior."""
        tile, sizes, results = self.tile, self.tile.sizes, self.results
        columns = sizes.padded_columns
        d_rows = [d_vote[r * columns :][:columns] for r in range(sizes.rows)]
        d_pose = [list(row) for row in so_far.pose]
        d_weights = []
        for p in range(sizes.padded_length):
            weights = tile.load_weights(self.operands, self.i, j, p, again=True)
            for r in range(sizes.rows):
                for d, w in zip(d_rows[r], weights, strict=True):
                    d_pose[r][p] = fma(tile, d, w, d_pose[r][p])
            for e in range(columns):
                total = pose[0][p] * d_rows[0][e]
                for r in range(1, sizes.rows):
                    total = fma(tile, pose[r][p], d_rows[r][e], total)
                d_weights.append(total)
        at = self.split, self.to, j
        tile.grow(results.weights, at, d_weights, self.is_first, self.exists)
        if results.prior is not None and self.operands.prior.ndim == 2:
            tile.grow(results.prior, at, [of_vote.logit], self.is_first, self.exists)
        elif results.prior is not None:
            tile.store(results.prior, of_vote.logit, self.to, j, exists=self.exists)
        coordinates = so_far.coordinates
        if coordinates:
            coordinates = [x + d for x, d in zip(coordinates, d_vote, strict=True)]
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
