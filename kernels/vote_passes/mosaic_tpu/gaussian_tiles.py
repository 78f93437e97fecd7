"""Votes and logits of 8 children for 128 examples, in vector registers.

A number of such a group is one register: children along the sublanes, examples along the lanes. A
number of a parent is a row [1, 128], which a load copies to all sublanes. A weight is one number of
each child: parents lie along the lanes of a register of weights, and a permutation copies the lane
of one parent to all lanes. The pattern of the permutation is then the same for all weights of the
parent, and the unit sets it once; with weights along the lanes it would set it for each of them.

The matrix unit has no part in this: products with poses of length 4 leave most of it idle, and one
product of bfloat16 numbers is too inexact for votes whose mean is large beside their variance.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from capsjax.kernels.vote_passes.config import TPU_LANES, TPU_SUBLANES
from capsjax.kernels.vote_passes.mosaic_tpu.problem import divisor

GROUP = TPU_SUBLANES, TPU_LANES


class Sizes(NamedTuple):
    """Sizes of a pass and of its blocks. I' and B' are I and B with padding to whole blocks."""

    I: int  # noqa: E741
    J: int
    R: int
    P: int
    E: int
    example_tiles: int  # B' / 128
    halves: int  # 2: each core of the chip takes half of the children
    steps: int  # blocks of children of a half
    groups: int  # of 8 children in a block
    together: int  # parents whose steps are written side by side, at most

    @property
    def D(self) -> int:  # noqa: N802
        """Length of a vote."""
        return self.R * self.E

    @property
    def n(self) -> int:
        """Number of children in a block."""
        return self.groups * TPU_SUBLANES

    @property
    def parent_tiles(self) -> int:
        """Number of registers that the parents fill along the lanes."""
        return pl.cdiv(self.J, TPU_LANES)


class Children(NamedTuple):
    """Inputs of a pass, or their gradients, in float32; None for an absent one."""

    poses: Any = None  # [R·P, I', B']
    weights: Any = None  # [parent_tiles, P·E, I', 128]
    prior: Any = None  # finite [parent_tiles, I', 128], one for all examples
    own_prior: Any = None  # finite [J, I', B'], one for each example
    gates: Any = None  # [I', B']; 0 also for children without a reachable parent
    coordinates: Any = None  # [I', 128], of which D lanes are used


class Parents(NamedTuple):
    """State, moments and cotangents of one iteration, in float32; None for an absent one."""

    k: Any = None  # [J, B'], with the parent mask
    z: Any = None  # [J, D, B']
    q: Any = None  # [J, D, B'], half of the precision
    mean: Any = None  # [J, D, B']
    d_mass: Any = None  # [J, B'], cotangent of the mass
    d_first: Any = None  # [J, D, B'], cotangent of the mean, over the mass
    d_second: Any = None  # [J, D, B'], cotangent of the second moment
    kept: Any = None  # [2, I', B'], log of the softmax's sum, and Σ_j c dw


def is_uniform(children: Children, parents: Parents) -> bool:
    """Return whether all couplings are equal."""
    has_prior = children.prior is not None or children.own_prior is not None
    return not has_prior and parents.k is None and parents.z is None


class Slopes(NamedTuple):
    """Gradient of the couplings through the moments, and factors of that of the votes."""

    of_coupling: Array
    of_votes: list[Array]  # D numbers, to be multiplied by the coupling and the gate


class Group(NamedTuple):
    """A group of 8 children: functions that load their numbers, and compute with them."""

    sizes: Sizes
    children: Children  # references to blocks
    block: Any  # index of the block
    g: Any  # index of the group in the block

    @property
    def rows(self) -> Any:
        """The children's rows in the block."""
        return pl.ds(pl.multiple_of(self.g * TPU_SUBLANES, TPU_SUBLANES), TPU_SUBLANES)

    def poses(self) -> list[Array]:
        """Load the poses: R·P numbers."""
        return [self.children.poses[k, self.rows] for k in range(self.sizes.R * self.sizes.P)]

    def gates(self) -> Array:
        """Load the gates, with 0 for the padding."""
        first = (self.block * self.sizes.groups + self.g) * TPU_SUBLANES
        exists = first + lax.broadcasted_iota(jnp.int32, GROUP, 0) < self.sizes.I
        gates = self.children.gates
        return jnp.where(exists, 1.0 if gates is None else gates[self.rows], 0.0)

    def coordinates(self) -> list[Array] | None:
        """Load the coordinates: D numbers."""
        if self.children.coordinates is None:
            return None
        row = self.children.coordinates[self.rows]
        return [jnp.broadcast_to(row[:, d : d + 1], GROUP) for d in range(self.sizes.D)]

    def weights(self, j: Any) -> list[Array]:
        """Load the weights for parent j: P·E numbers."""
        count = self.sizes.P * self.sizes.E
        return [self._of_parent(self.children.weights, j, k) for k in range(count)]

    def votes(
        self, poses: Sequence[Array], weights: Sequence[Array], coordinates: Sequence[Array] | None
    ) -> list[Array]:
        """Compute the votes for a parent: D numbers."""
        sizes, votes = self.sizes, {}
        for e in range(sizes.E):  # column by column, so that few weights are live
            for r in range(sizes.R):
                products = [
                    poses[r * sizes.P + p] * weights[p * sizes.E + e] for p in range(sizes.P)
                ]
                d = r * sizes.E + e
                votes[d] = added(products)
                if coordinates is not None:
                    votes[d] += coordinates[d]
        return [votes[d] for d in range(sizes.D)]

    def logits(
        self, parents: Parents, j: Any, votes: Sequence[Array]
    ) -> tuple[Array, list[Array], list[Array]]:
        """Compute the logits for parent j.

        Returns:
          The logits, differences v - z, and these times half of the precision; both lists are
          empty if the logits do not depend on the votes.
        """
        logits = jnp.zeros(GROUP, jnp.float32)
        if self.children.prior is not None:
            logits += self._of_parent(self.children.prior, j)
        if self.children.own_prior is not None:
            logits += self.children.own_prior[j, self.rows]
        if parents.k is not None:
            logits += row(parents.k, j)
        if parents.z is None:
            return logits, [], []
        differences = [vote - row(parents.z, j, d) for d, vote in enumerate(votes)]
        weighted = [x * row(parents.q, j, d) for d, x in enumerate(differences)]
        squares = [x * y for x, y in zip(differences, weighted, strict=True)]
        return logits - added(squares), differences, weighted

    def slopes(self, parents: Parents, j: Any, votes: Sequence[Array]) -> Slopes:
        """Compute the gradients of couplings and votes for parent j through the moments."""
        terms, of_votes = [], []
        for d, vote in enumerate(votes):
            difference = vote - row(parents.mean, j, d)
            half = difference * row(parents.d_second, j, d)
            both = row(parents.d_first, j, d) + half
            terms.append(difference * both)
            of_votes.append(both + half)
        return Slopes(added(terms) + row(parents.d_mass, j), of_votes)

    def _of_parent(self, ref: Any, j: Any, *at: Any) -> Array:
        """Copy the numbers for parent j, one a child, to all lanes."""
        tile = j // TPU_LANES if self.sizes.parent_tiles > 1 else 0
        lanes = jnp.full(GROUP, lane(self.sizes, j), jnp.int32)
        x = ref[(tile, *at, self.rows)]
        return jnp.take_along_axis(x, lanes, axis=1, mode="promise_in_bounds")


def row(ref: Any, j: Any, *at: int) -> Array:
    """Load a number of parent j, [1, 128]."""
    *others, last = j, *at
    return ref[(*others, pl.ds(last, 1))]


def lane(sizes: Sizes, j: Any) -> Any:
    """Return the lane of parent j."""
    return j % TPU_LANES if sizes.parent_tiles > 1 else j


def added(terms: Sequence[Array]) -> Array:
    """Add terms as a tree, whose rounding errors are smaller than those of one after the other."""
    if len(terms) == 1:
        return terms[0]
    half = (len(terms) + 1) // 2
    return added(terms[:half]) + added(terms[half:])


def loop(count: int, together: int, body: Callable[[Any, Any], Any], init: Any) -> Any:
    """Run `lax.fori_loop` from 0 to `count`, with up to `together` steps side by side."""
    together = divisor(count, together)

    def steps(block: Any, carry: Any) -> Any:
        for k in range(together):
            carry = body(together * block + k, carry)
        return carry

    return lax.fori_loop(0, count // together, steps, init)


# Blocks of the arrays, for grids with indices (h, s, i) of the half, the tile of examples and the
# block of children.


def child_blocks(sizes: Sizes, arrays: Children) -> Children:
    """Return the blocks of inputs, or of their gradients: shapes and index maps."""
    n, K = sizes.n, sizes.P * sizes.E
    both = (n, TPU_LANES), lambda s, i: (i, s)
    blocks = Children(
        poses=((sizes.R * sizes.P, *both[0]), lambda s, i: (0, i, s)),
        weights=((sizes.parent_tiles, K, n, TPU_LANES), lambda s, i: (0, 0, i, 0)),
        prior=((sizes.parent_tiles, n, TPU_LANES), lambda s, i: (0, i, 0)),
        own_prior=((sizes.J, *both[0]), lambda s, i: (0, i, s)),
        gates=both,
        coordinates=((n, TPU_LANES), lambda s, i: (i, 0)),
    )
    return Children(*(None if x is None else y for x, y in zip(arrays, blocks, strict=True)))


def parent_blocks(sizes: Sizes, arrays: Parents) -> Parents:
    """Return the blocks of a tile of examples."""
    number = (sizes.J, TPU_LANES), lambda s, i: (0, s)
    numbers = (sizes.J, sizes.D, TPU_LANES), lambda s, i: (0, 0, s)
    kept = (2, sizes.n, TPU_LANES), lambda s, i: (0, i, s)
    blocks = Parents(number, numbers, numbers, numbers, number, numbers, numbers, kept)
    return Parents(*(None if x is None else y for x, y in zip(arrays, blocks, strict=True)))
