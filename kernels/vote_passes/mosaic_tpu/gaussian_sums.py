"""Central moments, and the chain's sums, of a tile of examples over its children.

The votes of a block of children lie in vector memory while the logits of all parents are found.
Then each parent walks over them, with its sums in registers: once for the mean, and once for the
squares around it, so that large means cost no digits. Moments of blocks are merged (Chan, Golub and
LeVeque 1979). Grid indices: h of the half of the children, s of the tile of examples, i of the
block of children within the half.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from capsjax.kernels.vote_passes.config import TPU_LANES, TPU_SUBLANES
from capsjax.kernels.vote_passes.mosaic_tpu.gaussian_tiles import (
    GROUP,
    Children,
    Group,
    Parents,
    Sizes,
    child_blocks,
    is_uniform,
    loop,
    parent_blocks,
)
from capsjax.kernels.vote_passes.mosaic_tpu.routing_pass import in_hbm

# Numbers of votes, or of weights from which they are computed, whose updates are written side by
# side, at most: 16 groups of 4 x 4 votes, whose loop would copy the sums between registers.
UNROLLED_NUMBERS = 256
# Steps of the softmax written side by side, at most.
UNROLLED_PARENTS = 16


class Sums(NamedTuple):
    """Sums over the children of each half; None if not requested.

    Of moments: the mass, the mean and the second moment. Of a chain: Σ dl, Σ dl x and Σ dl x², with
    x = v - z and the gradient dl of the logits.
    """

    zeroth: Any = None  # [halves, J, B']
    first: Any = None  # [halves, J, D, B']
    second: Any = None  # [halves, J, D, B']


class Scratch(NamedTuple):
    """Arrays in vector memory that only the kernel uses; None for an absent one."""

    # [groups, J, D, 8, 128], votes, or differences v - z of a chain; [groups, 1, D, 8, 128] if the
    # logits do not depend on the votes
    numbers: Any
    logits: Any  # [groups, J, 8, 128]; later their exponentials
    slopes: Any  # [groups, J, 8, 128], gradients of the couplings
    factors: Any  # [groups, 8, 128], gates over the sum of the exponentials
    means: Any  # [groups, 8, 128], Σ_j c dw
    # [J, 8, 128] and [J, D, 8, 128]: each sublane has the sums of its children, but the mass and
    # the mean of all
    sums: Sums


class Kernel(NamedTuple):
    """Static description of the kernel."""

    sizes: Sizes
    wanted: Sums  # booleans
    is_chain: bool  # else moments
    keeps: bool  # whether numbers of each child are a result
    memory: int  # bytes of vector memory
    interpret: Any  # as of `pallas_call`


def sums(kernel: Kernel, children: Children, parents: Parents) -> tuple[Sums, Array | None]:
    """Run the kernel for one iteration.

    Returns:
      The sums of each half, and what `Parents.kept` describes.
    """
    sizes = kernel.sizes
    examples = sizes.example_tiles * TPU_LANES
    number, numbers = (sizes.halves, sizes.J), (sizes.halves, sizes.J, sizes.D)
    shapes = number, numbers, numbers
    results = Sums(
        *(
            ShapedArray((*shape, examples), jnp.float32) if wanted else None
            for shape, wanted in zip(shapes, kernel.wanted, strict=True)
        )
    )
    kept = None
    if kernel.keeps:
        kept = ShapedArray((2, sizes.halves * sizes.steps * sizes.n, examples), jnp.float32)

    def spec(shape: tuple[int, ...], at: Any) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda h, s, i: at(s, h * sizes.steps + i))

    def spec_of_sums(x: Any) -> pl.BlockSpec:
        block, zeros = (1, *x.shape[1:-1], TPU_LANES), (0,) * (x.ndim - 2)
        return pl.BlockSpec(block, lambda h, s, i: (h, *zeros, s))

    blocks = [*child_blocks(sizes, children), *parent_blocks(sizes, parents)]
    of_kept = parent_blocks(sizes, Parents(kept=kept)).kept
    if not kernel.interpret:
        children = jax.tree.map(in_hbm, children)
    leaves, tree = jax.tree.flatten((children, parents))
    out_leaves, out_tree = jax.tree.flatten((results, kept))
    scratch, scratch_tree = jax.tree.flatten(_scratch(kernel, children, parents))

    def body(*refs: Any) -> None:
        a, b = len(leaves), len(leaves) + len(out_leaves)
        inputs: Any = jax.tree.unflatten(tree, refs[:a])
        outputs: Any = jax.tree.unflatten(out_tree, refs[a:b])
        block = pl.program_id(0) * sizes.steps + pl.program_id(2)
        own: Any = jax.tree.unflatten(scratch_tree, refs[b:])
        _Step(kernel, inputs[0], inputs[1], outputs[0], outputs[1], own, block).run(
            pl.program_id(2)
        )

    out_specs = [spec_of_sums(x) for x in results if x is not None]
    found = pl.pallas_call(
        body,
        grid=(sizes.halves, sizes.example_tiles, sizes.steps),
        in_specs=[spec(*block) for block in blocks if block is not None],
        out_specs=out_specs if of_kept is None else [*out_specs, spec(*of_kept)],
        out_shape=out_leaves,
        scratch_shapes=scratch,
        cost_estimate=_cost(kernel, leaves, out_leaves),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=kernel.memory,
        ),
        name="gaussian_routing_chain" if kernel.is_chain else "gaussian_routing_moments",
        interpret=kernel.interpret,
    )(*leaves)
    return jax.tree.unflatten(out_tree, found)


def _scratch(kernel: Kernel, children: Children, parents: Parents) -> Scratch:
    """Return the shapes of the arrays that only the kernel uses."""
    sizes = kernel.sizes

    def memory(*shape: int, when: Any = True) -> Any:
        return pltpu.VMEM((*shape, *GROUP), jnp.float32) if when else None

    of_parents = sizes.groups, sizes.J
    has_slopes = parents.mean is not None
    any_sums = any(kernel.wanted)
    slots = 1 if parents.z is None else sizes.J
    has_numbers = any_sums and (parents.z is not None or not kernel.is_chain)
    return Scratch(
        numbers=memory(sizes.groups, slots, sizes.D, when=has_numbers),
        logits=memory(*of_parents, when=not is_uniform(children, parents)),
        slopes=memory(*of_parents, when=has_slopes),
        factors=memory(sizes.groups, when=any_sums),
        means=memory(sizes.groups, when=has_slopes and any_sums),
        sums=Sums(
            memory(sizes.J, when=kernel.wanted.zeroth),
            memory(sizes.J, sizes.D, when=kernel.wanted.first),
            memory(sizes.J, sizes.D, when=kernel.wanted.second),
        ),
    )


def _cost(kernel: Kernel, operands: list[Any], results: list[Any]) -> pl.CostEstimate:
    """Estimate the cost of the kernel, for XLA's scheduler."""
    sizes = kernel.sizes
    couplings = sizes.example_tiles * TPU_LANES * sizes.I * sizes.J
    return pl.CostEstimate(
        flops=couplings * sizes.D * (2 * sizes.P + 10),
        transcendentals=couplings,
        bytes_accessed=sum(4 * x.size for x in (*operands, *results)),
    )


class _Step(NamedTuple):
    """A step of the grid: references to its blocks."""

    kernel: Kernel
    children: Children
    parents: Parents
    results: Sums
    kept: Any
    scratch: Scratch
    block: Any

    def run(self, i: Any) -> None:
        """Add the sums of a block of children; i is its index in its half."""
        sizes = self.sizes

        @pl.when(i == 0)
        def _() -> None:
            for ref in jax.tree.leaves(self.scratch.sums):
                ref[...] = jnp.zeros(ref.shape, ref.dtype)

        loop(sizes.groups, 1, lambda g, _: self._couple(g), None)
        if not any(self.kernel.wanted):
            return
        add = self._add_chain if self.kernel.is_chain else self._add_moments
        loop(sizes.J, 1, lambda j, _: add(j), None)

        @pl.when(i == sizes.steps - 1)
        def _() -> None:
            loop(sizes.J, 1, lambda j, _: self._write(j), None)

    @property
    def sizes(self) -> Sizes:
        """The sizes of the pass."""
        return self.kernel.sizes

    @property
    def _zeros(self) -> Array:
        return jnp.zeros(GROUP, jnp.float32)

    def _group(self, g: Any) -> Group:
        return Group(self.sizes, self.children, self.block, g)

    def _couple(self, g: Any) -> None:
        """Write what the sums need of group g: numbers, exponentials, gradients, factors."""
        group, parents, scratch, J = self._group(g), self.parents, self.scratch, self.sizes.J
        if scratch.logits is None:
            scratch.factors[g] = group.gates() * (1 / J)
            return
        has_slopes = scratch.slopes is not None
        has_votes = has_slopes or parents.z is not None
        poses, coordinates = (group.poses(), group.coordinates()) if has_votes else ([], None)

        def agree(j: Any, largest: Array) -> Array:
            votes = group.votes(poses, group.weights(j), coordinates) if has_votes else []
            logits, differences, _ = group.logits(parents, j, votes)
            if scratch.numbers is not None and parents.z is not None:
                for d, x in enumerate(differences if self.kernel.is_chain else votes):
                    scratch.numbers[g, j, d] = x
            if has_slopes:
                scratch.slopes[g, j] = group.slopes(parents, j, votes).of_coupling
            scratch.logits[g, j] = logits
            return jnp.maximum(largest, logits)

        together = self.sizes.together if has_votes else UNROLLED_PARENTS
        largest = loop(J, together, agree, jnp.full(GROUP, -jnp.inf, jnp.float32))

        def exponentiate(j: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            exponential = jnp.exp(scratch.logits[g, j] - largest)
            scratch.logits[g, j] = exponential
            mean = sums[1] + exponential * scratch.slopes[g, j] if has_slopes else sums[1]
            return sums[0] + exponential, mean

        total, mean = loop(J, UNROLLED_PARENTS, exponentiate, (self._zeros, self._zeros))
        inverse = 1 / total
        if scratch.factors is not None:
            scratch.factors[g] = group.gates() * inverse
        if scratch.means is not None:
            scratch.means[g] = mean * inverse
        if self.kept is not None:
            self.kept[0, group.rows] = largest + jnp.log(total)
            self.kept[1, group.rows] = mean * inverse

    def _walk(self, j: Any, add: Callable[..., Any], init: Any, of_group: int) -> Any:
        """Add the groups of the block for parent j; `of_group` numbers belong to each of them."""
        together = max(1, UNROLLED_NUMBERS // of_group)
        return loop(self.sizes.groups, together, lambda g, sums: add(g, j, *sums), init)

    def _weight(self, g: Any, j: Any) -> Array:
        """Return the coupling times the gate."""
        factors, logits = self.scratch.factors, self.scratch.logits
        return factors[g] if logits is None else factors[g] * logits[g, j]

    def _add_moments(self, j: Any) -> None:
        """Merge the moments of the block into those of parent j."""
        sizes, scratch, sums = self.sizes, self.scratch, self.scratch.sums
        stored = self.parents.z is not None
        slot = j if stored else 0
        zeros = [self._zeros] * sizes.D

        def add_votes(g: Any, j: Any, mass: Array, first: list[Array]) -> Any:
            if stored:
                votes = [scratch.numbers[g, j, d] for d in range(sizes.D)]
            else:
                group = self._group(g)
                votes = group.votes(group.poses(), group.weights(j), group.coordinates())
                for d, vote in enumerate(votes):
                    scratch.numbers[g, slot, d] = vote
            weight = self._weight(g, j)
            first = [x + weight * vote for x, vote in zip(first, votes, strict=True)]
            return mass + weight, first

        of_group = sizes.D if stored else sizes.P * sizes.E
        mass, first = self._walk(j, add_votes, (self._zeros, zeros), of_group)
        mass = _over_sublanes(mass)
        inverse = 1 / jnp.where(mass > 0, mass, 1)
        mean = [_over_sublanes(x) * inverse for x in first]

        def add_squares(g: Any, j: Any, *second: Array) -> Any:
            weight, found = self._weight(g, j), []
            for d, x in enumerate(second):
                difference = scratch.numbers[g, slot, d] - mean[d]
                found.append(x + weight * difference * difference)
            return tuple(found)

        second = self._walk(j, add_squares, tuple(zeros), sizes.D)
        before = sums.zeroth[j]
        both = before + mass
        fraction = mass / jnp.where(both > 0, both, 1)
        factor = fraction * before * (1 / TPU_SUBLANES)
        sums.zeroth[j] = both
        for d in range(sizes.D):
            step = mean[d] - sums.first[j, d]
            sums.first[j, d] += fraction * step
            sums.second[j, d] += second[d] + factor * step * step

    def _add_chain(self, j: Any) -> None:
        """Add the sums of the block to those of parent j."""
        scratch, sums = self.scratch, self.scratch.sums
        numbers = [] if sums.first is None else list(range(self.sizes.D))
        init = (
            self._zeros if sums.zeroth is None else sums.zeroth[j],
            [sums.first[j, d] for d in numbers],
            [sums.second[j, d] for d in numbers],
        )

        def add(g: Any, j: Any, zeroth: Array, first: list[Array], second: list[Array]) -> Any:
            d_logits = self._weight(g, j) * (scratch.slopes[g, j] - scratch.means[g])
            first, second = list(first), list(second)
            for d in numbers:
                difference = scratch.numbers[g, j, d]
                product = d_logits * difference
                first[d] += product
                second[d] += product * difference
            return zeroth + d_logits, first, second

        zeroth, first, second = self._walk(j, add, init, self.sizes.D)
        if sums.zeroth is not None:
            sums.zeroth[j] = zeroth
        for d in numbers:
            sums.first[j, d], sums.second[j, d] = first[d], second[d]

    def _write(self, j: Any) -> None:
        """Write the sums for parent j over the sublanes."""
        # The mass and the mean are equal in all sublanes.
        is_sum = Sums(True, True, True) if self.kernel.is_chain else Sums(False, False, True)

        def write(result: Any, at: Any, x: Array, adds: bool) -> None:
            result[at] = jnp.sum(x, 0, keepdims=True) if adds else x[:1]

        for ref, result, adds in zip(self.scratch.sums, self.results, is_sum, strict=True):
            if ref is not None and ref.ndim == 3:
                write(result, (0, pl.ds(j, 1)), ref[j], adds)
            elif ref is not None:
                for d in range(self.sizes.D):
                    write(result, (0, j, pl.ds(d, 1)), ref[j, d], adds)


def _over_sublanes(x: Array) -> Array:
    """Return the sum over the sublanes in each of them."""
    return jnp.broadcast_to(jnp.sum(x, 0, keepdims=True), GROUP)
