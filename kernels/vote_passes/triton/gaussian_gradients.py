"""The Triton kernel for the gradients of the inputs of passes with gaussian logits.

A program owns a few children, whose gradients of weights then have one place, and takes tiles of
examples one after the other. It walks over the parents once for all iterations.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.experimental import pallas as pl

from capsjax.kernels.vote_passes.config import TritonGaussianConfig
from capsjax.kernels.vote_passes.triton.gaussian_tiles import (
    Operands,
    Parents,
    Sizes,
    Statistics,
    Tile,
)
from capsjax.kernels.vote_passes.triton.gaussian_walks import (
    Children,
    call,
    children_of,
    float32,
)
from capsjax.kernels.vote_passes.triton.tiles import exp2, fma, loop

# A logit to the base e is that to the base 2 times this.
LN_2 = 0.6931471805599453


class Iteration(NamedTuple):
    """The pass of one iteration."""

    parents: Parents
    softmax: Statistics | None  # None if all couplings are equal


class Gradients(NamedTuple):
    """Gradients of the inputs, in the layouts of the kernel; None for absent ones."""

    poses: Any  # [I, R, P, B]
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
    config: TritonGaussianConfig,
    sizes: Sizes,
    operands: Operands,
    iterations: Sequence[Iteration],
    *,
    constant_couplings: bool,
) -> Gradients:
    """Compute the gradients of poses, weights, prior and coordinates, and of gates in part."""
    warps, count = config.gradients_warps, config.gradients_children
    tiles = pl.cdiv(sizes.tiles, config.gradients_splits)
    splits = pl.cdiv(sizes.tiles, tiles)
    I, J = sizes.capsules, sizes.parents  # noqa: E741

    def kernel(refs: tuple[Operands, list[Iteration]], *all_results: Any) -> None:
        split = pl.program_id(1)
        children = children_of(sizes, warps, count, pl.program_id(0))

        def one_tile(step: Array, carry: tuple[()]) -> tuple[()]:
            # Past the last tile that one again, which is not stored.
            inside = split * tiles + step < sizes.tiles
            tile = Tile(sizes, warps, jnp.minimum(split * tiles + step, sizes.tiles - 1))
            results = Gradients(*all_results)
            own = children
            if splits * tiles != sizes.tiles:
                own = children._replace(exist=[exists & inside for exists in children.exist])
            _Program(tile, *refs, results, own, split, step == 0, constant_couplings).run()
            return carry

        loop(tiles, one_tile, ())

    prior = None
    if operands.prior is not None and not constant_couplings:
        is_shared = operands.prior.ndim == 2
        prior = float32(splits, I, J, 1) if is_shared else float32(I, J, sizes.padded_batch)
    of_gates = operands.gates is not None and any(x.softmax is None for x in iterations)
    poses = I, sizes.rows, sizes.padded_length, sizes.padded_batch
    results = Gradients(
        poses=ShapedArray(poses, operands.poses.dtype),
        weights=float32(splits, I, J, sizes.padded_length * sizes.padded_columns),
        gates=float32(I, sizes.padded_batch) if of_gates else None,
        prior=prior,
        coordinates=None if operands.coordinates is None else float32(splits, I, sizes.depth),
    )
    found = call(
        kernel,
        (operands, list(iterations)),
        grid=(pl.cdiv(I, warps * count), splits),
        results=results,
        warps=warps,
        sizes=sizes,
        name="routing_gaussian_input_gradients",
    )
    return Gradients(*found)


class _Program(NamedTuple):
    """A program's work on one tile of examples."""

    tile: Tile
    operands: Operands
    iterations: Sequence[Iteration]
    results: Gradients
    children: Children
    split: Array  # index of the program along the examples
    is_first: Array  # whether nothing was stored before that grows
    constant_couplings: bool

    def run(self) -> None:
        """Compute and store all gradients."""
        tile, sizes, operands = self.tile, self.tile.sizes, self.operands
        children = self.children.at
        poses = [tile.load_pose(operands, i) for i in children]
        softmaxes = [
            [None if x is None else tile.load_statistics(x, i) for i in children]
            for _, x in self.iterations
        ]
        equal = [tile.equal_weight(operands, i) for i in children]

        def one_parent(j: Array, sums: list[_OfChild]) -> list[_OfChild]:
            votes = [
                tile.votes(operands, pose, i, j) for pose, i in zip(poses, children, strict=True)
            ]
            found = [_OfVote([tile.zero] * sizes.depth, tile.zero, tile.zero) for _ in children]
            for (parents, _), softmax in zip(self.iterations, softmaxes, strict=True):
                found = self.add_iteration(parents, j, equal, softmax, votes, found)
            return [
                self.add_parent(m, j, *of_child)
                for m, of_child in enumerate(zip(poses, found, sums, strict=True))
            ]

        start = _OfChild(
            [[tile.zero] * sizes.padded_length] * sizes.rows,
            tile.zero,
            [] if operands.coordinates is None else [tile.zero] * sizes.depth,
        )
        found = loop(sizes.parents, one_parent, [start] * len(children))
        for m, of_child in enumerate(found):
            self.store(m, of_child)

    def add_iteration(
        self,
        parents: Parents,
        j: Array,
        equal: list[Array],
        softmax: list[Any],
        votes: list[list[Array]],
        so_far: list[_OfVote],
    ) -> list[_OfVote]:
        """Add the gradients of one iteration to those of each child's vote."""
        tile = self.tile
        gaussian = tile.load_gaussian(parents, j)
        cotangents = tile.load_cotangents(parents, j)
        d_mass = tile.load(parents.d_mass, j)
        k = None if parents.k is None else tile.load(parents.k, j)
        found = []
        for m, (d_votes, d_logit, d_gate) in enumerate(so_far):
            d_gated, slopes = tile.cotangent(d_mass, votes[m], cotangents)
            if softmax[m] is None:
                weight = equal[m]
                d_gate = fma(tile, d_gated, tile.zero + 1 / tile.sizes.parents, d_gate)
            else:
                start = tile.start_logit(self.operands, k, self.children.at[m], j)
                logit, differences = tile.logit(start, votes[m], gaussian)
                weight = exp2(tile, logit - softmax[m].normaliser)
            d_votes = [
                fma(tile, weight, slope, v) for slope, v in zip(slopes, d_votes, strict=True)
            ]
            if softmax[m] is not None and not self.constant_couplings:
                term = weight * (d_gated - softmax[m].share)
                d_logit = d_logit + term
                if gaussian is not None:
                    # q (v - z) is the difference times 2 ln(2) s.
                    factor = term * (-2 * LN_2)
                    d_votes = [
                        fma(tile, factor * s, x, v)
                        for s, x, v in zip(gaussian[0], differences, d_votes, strict=True)
                    ]
            found.append(_OfVote(d_votes, d_logit, d_gate))
        return found

    def add_parent(
        self, m: int, j: Array, pose: list[list[Array]], of_vote: _OfVote, so_far: _OfChild
    ) -> _OfChild:
        """Add a parent's gradients to those of a child; store those of weights and prior."""
        tile, sizes = self.tile, self.tile.sizes
        i, to, exists = (x[m] for x in self.children)
        d_votes = [
            of_vote.vote[r * sizes.padded_columns :][: sizes.padded_columns]
            for r in range(sizes.rows)
        ]
        d_pose = [list(row) for row in so_far.pose]
        d_weights = []
        for p in range(sizes.padded_length):
            weights = tile.load_weights(self.operands, i, j, p)
            for r in range(sizes.rows):
                for d_vote, w in zip(d_votes[r], weights, strict=True):
                    d_pose[r][p] = fma(tile, d_vote, w, d_pose[r][p])
            for e in range(sizes.padded_columns):
                total = pose[0][p] * d_votes[0][e]
                for r in range(1, sizes.rows):
                    total = fma(tile, pose[r][p], d_votes[r][e], total)
                d_weights.append(total)
        tile.grow(self.results.weights, (self.split, to, j), d_weights, self.is_first, exists)
        if self.results.prior is not None and self.operands.prior.ndim == 2:
            at = self.split, to, j
            tile.grow(self.results.prior, at, [of_vote.logit], self.is_first, exists)
        elif self.results.prior is not None:
            tile.store(self.results.prior, of_vote.logit, to, j, exists=exists)
        coordinates = so_far.coordinates
        if coordinates:
            coordinates = [x + d for x, d in zip(coordinates, of_vote.vote, strict=True)]
        return _OfChild(d_pose, so_far.gate + of_vote.gate, coordinates)

    def store(self, m: int, of_child: _OfChild) -> None:
        """Store the gradients of a child."""
        tile, results = self.tile, self.results
        _, to, exists = (x[m] for x in self.children)
        for r, row in enumerate(of_child.pose):
            for p, x in enumerate(row):
                tile.store(results.poses, x.astype(results.poses.dtype), to, r, p, exists=exists)
        if results.gates is not None:
            tile.store(results.gates, of_child.gate, to, exists=exists)
        if results.coordinates is not None:
            at = self.split, to
            tile.grow(results.coordinates, at, of_child.coordinates, self.is_first, exists)
