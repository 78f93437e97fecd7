"""Gradients of the inputs, summed over iterations, in one walk over the parents.

What the chain kept of each child makes the parents independent of each other, so that no votes are
stored: a parent's votes are computed once for all iterations. With w = gates · c, the softmax's
sums of `Parents.kept`, and F = d_first, M = d_second, y = v - mean and x = v - z:

    c = exp(l - kept[0]);   dw = d_mass + Σ_d y (F + M y);   dl = w (dw - kept[1])
    d_votes = Σ_t w (F + 2 M y) - dl q x
    d_poses += d_votes Wᵀ;   d_weights = Σ_b uᵀ d_votes

Grid indices: h of the half of the children, i of the block of children within the half, s of the
tile of examples, over which gradients that the examples share are added up.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import ShapedArray
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from capsjax.kernels.vote_passes.config import TPU_LANES
from capsjax.kernels.vote_passes.mosaic_tpu.gaussian_tiles import (
    GROUP,
    Children,
    Group,
    Parents,
    Sizes,
    added,
    child_blocks,
    is_uniform,
    lane,
    loop,
    parent_blocks,
)
from capsjax.kernels.vote_passes.mosaic_tpu.routing_pass import in_hbm


class Kernel(NamedTuple):
    """Static description of the kernel."""

    sizes: Sizes
    wanted: Children  # booleans
    constant_couplings: bool
    memory: int  # bytes of vector memory
    interpret: Any  # as of `pallas_call`


def gradients(kernel: Kernel, children: Children, terms: Sequence[Parents]) -> Children:
    """Run the kernel.

    The gradient of the gates is that of terms with equal couplings; of others it is `kept[1]`.
    """
    sizes, terms = kernel.sizes, tuple(terms)
    padded, examples = sizes.halves * sizes.steps * sizes.n, sizes.example_tiles * TPU_LANES
    shapes = Children(
        poses=(sizes.R * sizes.P, padded, examples),
        weights=(sizes.parent_tiles, sizes.P * sizes.E, padded, TPU_LANES),
        prior=(sizes.parent_tiles, padded, TPU_LANES),
        own_prior=(sizes.J, padded, examples),
        gates=(padded, examples),
        coordinates=(padded, TPU_LANES),
    )
    results = Children(
        *(
            ShapedArray(shape, jnp.float32) if wanted else None
            for shape, wanted in zip(shapes, kernel.wanted, strict=True)
        )
    )
    blocks = [*child_blocks(sizes, children)]
    for term in terms:
        blocks += parent_blocks(sizes, term)
    if not kernel.interpret:
        children = jax.tree.map(in_hbm, children)
    leaves, tree = jax.tree.flatten((children, terms))
    out_leaves, out_tree = jax.tree.flatten(results)
    coordinates = pltpu.VMEM((sizes.D, *GROUP), jnp.float32)

    def spec(shape: tuple[int, ...], at: Any) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda h, i, s: at(s, h * sizes.steps + i))

    def body(*refs: Any) -> None:
        a, b = len(leaves), len(leaves) + len(out_leaves)
        inputs: Any = jax.tree.unflatten(tree, refs[:a])
        outputs: Any = jax.tree.unflatten(out_tree, refs[a:b])
        block = pl.program_id(0) * sizes.steps + pl.program_id(1)
        own = refs[b] if kernel.wanted.coordinates else None
        _Step(kernel, inputs[0], inputs[1], outputs, own, block).run(pl.program_id(2))

    found = pl.pallas_call(
        body,
        grid=(sizes.halves, sizes.steps, sizes.example_tiles),
        in_specs=[spec(*block) for block in blocks if block is not None],
        out_specs=[spec(*block) for block in child_blocks(sizes, results) if block is not None],
        out_shape=out_leaves,
        scratch_shapes=[coordinates] if kernel.wanted.coordinates else [],
        cost_estimate=_cost(kernel, terms, leaves, out_leaves),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=kernel.memory,
        ),
        name="gaussian_routing_input_gradients",
        interpret=kernel.interpret,
    )(*leaves)
    return jax.tree.unflatten(out_tree, found)


def _cost(
    kernel: Kernel, terms: Sequence[Parents], operands: list[Any], results: list[Any]
) -> pl.CostEstimate:
    """Estimate the cost of the kernel, for XLA's scheduler."""
    sizes = kernel.sizes
    couplings = sizes.example_tiles * TPU_LANES * sizes.I * sizes.J
    again = sizes.halves * sizes.steps - 1 if sizes.example_tiles > 1 else 0
    read = again * sum(4 * x.size for x in jax.tree.leaves([x._replace(kept=None) for x in terms]))
    return pl.CostEstimate(
        flops=couplings * sizes.D * (6 * sizes.P + 14 * len(terms)),
        transcendentals=couplings * len(terms),
        bytes_accessed=read + sum(4 * x.size for x in (*operands, *results)),
    )


class _Step(NamedTuple):
    """A step of the grid: references to its blocks."""

    kernel: Kernel
    children: Children
    terms: tuple[Parents, ...]
    results: Children
    d_coordinates: Any  # [D, 8, 128]
    block: Any

    def run(self, s: Any) -> None:
        """Compute the gradients of a block of children; s is the index of the tile of examples."""

        @pl.when(s == 0)
        def _() -> None:
            for name in ("weights", "prior", "coordinates"):
                ref = getattr(self.results, name)
                if ref is not None:
                    ref[...] = jnp.zeros(ref.shape, ref.dtype)

        loop(self.sizes.groups, 1, lambda g, _: self._run_group(g), None)

    @property
    def sizes(self) -> Sizes:
        """The sizes of the pass."""
        return self.kernel.sizes

    def _run_group(self, g: Any) -> None:
        """Compute the gradients of 8 children."""
        sizes, results = self.sizes, self.results
        group = Group(sizes, self.children, self.block, g)
        poses, coordinates, gates = group.poses(), group.coordinates(), group.gates()
        zeros = jnp.zeros(GROUP, jnp.float32)
        for k in range(len(poses)):
            results.poses[k, group.rows] = zeros
        if self.d_coordinates is not None:
            self.d_coordinates[...] = jnp.zeros(self.d_coordinates.shape, jnp.float32)

        def add(j: Any, d_gates: Array) -> Array:
            weights = group.weights(j)
            votes = group.votes(poses, weights, coordinates)
            d_votes = [zeros] * sizes.D
            d_logits = zeros
            for term in self.terms:
                slopes, d_votes, d_logits = self._add_term(
                    group, term, j, gates, votes, d_votes, d_logits
                )
                if results.gates is not None and is_uniform(self.children, term):
                    d_gates += slopes
            self._add_products(group, j, poses, weights, d_votes)
            self._add_prior(group, j, d_logits)
            if self.d_coordinates is not None:
                for d, x in enumerate(d_votes):
                    self.d_coordinates[d] += x
            return d_gates

        d_gates = loop(sizes.J, sizes.together, add, zeros)
        if results.gates is not None:
            results.gates[group.rows] = d_gates * (1 / sizes.J)
        if self.d_coordinates is not None:
            for d in range(sizes.D):
                total = jnp.sum(self.d_coordinates[d], 1, keepdims=True)
                _add_to_lane(results.coordinates.at[group.rows], d, total)

    def _add_term(
        self,
        group: Group,
        term: Parents,
        j: Any,
        gates: Array,
        votes: list[Array],
        d_votes: list[Array],
        d_logits: Array,
    ) -> tuple[Array, list[Array], Array]:
        """Add the gradients of votes and logits for parent j through one iteration.

        Returns:
          The gradient of the couplings, and the two sums.
        """
        slopes = group.slopes(term, j, votes)
        if is_uniform(self.children, term):
            weight = gates * (1 / self.sizes.J)
            of_votes = zip(d_votes, slopes.of_votes, strict=True)
            return slopes.of_coupling, [x + weight * y for x, y in of_votes], d_logits
        logits, _, weighted = group.logits(term, j, votes)
        weight = gates * jnp.exp(logits - term.kept[0, group.rows])
        d_votes = [x + weight * y for x, y in zip(d_votes, slopes.of_votes, strict=True)]
        if self.kernel.constant_couplings:
            return slopes.of_coupling, d_votes, d_logits
        own = weight * (slopes.of_coupling - term.kept[1, group.rows])
        if weighted:  # by half of the precision
            twice = 2 * own
            d_votes = [x - twice * y for x, y in zip(d_votes, weighted, strict=True)]
        return slopes.of_coupling, d_votes, d_logits + own

    def _add_products(
        self,
        group: Group,
        j: Any,
        poses: list[Array],
        weights: list[Array],
        d_votes: list[Array],
    ) -> None:
        """Add to the gradients of poses, and of the weights for parent j."""
        R, P, E = self.sizes.R, self.sizes.P, self.sizes.E
        tile = j // TPU_LANES if self.sizes.parent_tiles > 1 else 0
        for p in range(P):
            for r in range(R):
                terms = [d_votes[r * E + e] * weights[p * E + e] for e in range(E)]
                self.results.poses[r * P + p, group.rows] += added(terms)
        for p in range(P):
            for e in range(E):
                terms = [d_votes[r * E + e] * poses[r * P + p] for r in range(R)]
                total = jnp.sum(added(terms), 1, keepdims=True)
                ref = self.results.weights.at[tile, p * E + e, group.rows]
                _add_to_lane(ref, lane(self.sizes, j), total)

    def _add_prior(self, group: Group, j: Any, d_logits: Array) -> None:
        """Add to the gradient of the prior for parent j, of each example or of all."""
        if self.results.own_prior is not None:
            self.results.own_prior[j, group.rows] = d_logits
        if self.results.prior is not None:
            tile = j // TPU_LANES if self.sizes.parent_tiles > 1 else 0
            total = jnp.sum(d_logits, 1, keepdims=True)
            _add_to_lane(self.results.prior.at[tile, group.rows], lane(self.sizes, j), total)


def _add_to_lane(ref: Any, at: Any, x: Array) -> None:
    """Add a column [8, 1] to a lane of a register in memory."""
    lanes = lax.broadcasted_iota(jnp.int32, GROUP, 1)
    ref[...] += jnp.where(lanes == at, x, 0.0)
