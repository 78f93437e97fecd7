"""One pass over the tiles: sums for the parents, gradients of the inputs, or both.

With a state V, agreements are `Σ_p u[b,p,i] T[p,j][b,i]` with the products `T[p,j] = V_j W[p,j]`,
and weighted sums are `Σ_{p,i} (c u)[b,p,i] W[p,j,:,i]`. No vote is computed, not even in a tile.
Input capsules lie along the lanes and examples along the sublanes, so that a component of the poses
is whole registers. A tile has n input capsules and m examples. For each tile:

    agree   T[p, j] of V and of the cotangent of the sums; logits and gradients of the couplings;
    soften  exponentials, their sum, and the mean gradient over parents;
    use     sums_j += W[p,j] (f u_p)ᵀ;   d_poses_p += w T'[p,j] + dl T[p,j];
            d_weights[p,j] += d_sums_jᵀ (w u_p) + V_jᵀ (dl u_p),

where T' has the cotangent in place of V, w = gates · c, dl is the gradient of the logits, and f is
w for moments and dl for their gradient.

The matrix unit is bound by its outputs, B·I·J·P numbers a state. With gradients, the products stay
in vector memory between `agree` and `use` if they fit; else `use` computes them again.

Grid indices: h of the half of the input capsules (each core of a chip takes one), i of the tile of
capsules within it, s of the tile of examples.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import ShapedArray
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from capsjax.kernels.vote_passes.config import TPU_LANES, TpuTile
from capsjax.kernels.vote_passes.mosaic_tpu import products

# Loops of up to this many steps are unrolled.
MAX_UNROLLED = 16


class Arrays(NamedTuple):
    """The inputs of a pass, or their gradients; None for an absent one."""

    poses: Any  # [B, P, I]; gradients: [P, B, I]
    weights: Any  # [P, J, D, I]
    prior: Any = None  # float32 [J, 1, I] or [J, B, I], finite
    gates: Any = None  # float32 [B, I]


class Parents(NamedTuple):
    """State and cotangents of one iteration, for tiles of m examples; None for an absent one."""

    b: Any = None  # float32 [tiles, J, D, m], the state V
    k: Any = None  # float32 [tiles, J, 1, m], bias of the logits
    d_first: Any = None  # float32 [tiles, J, D, m], cotangent of the sums
    d_mass: Any = None  # float32 [tiles, J, 1, m], cotangent of the mass


class Sums(NamedTuple):
    """Sums over the input capsules of each half; None if not requested."""

    first: Any = None  # float32 [halves, tiles, J, D, m]
    mass: Any = None  # float32 [halves, tiles, J, 1, m], of the couplings or of dl


class Problem(NamedTuple):
    """Static description of a pass."""

    tile: TpuTile
    B: int
    P: int
    J: int
    D: int
    I: int  # noqa: E741
    halves: int  # 2: each core of the chip takes half of the input capsules
    leaky: bool  # one more logit 0, whose coupling is dropped
    parts: int  # bfloat16 parts of an operand
    sums: Sums  # booleans: which sums to compute
    gradients: Arrays  # booleans: which gradients; either none, or those of poses and weights
    constant_couplings: bool = False  # of the gradients

    @property
    def n(self) -> int:
        """Number of input capsules in a tile."""
        return min(self.I, TPU_LANES)

    @property
    def example_tiles(self) -> int:
        """Number of tiles of examples."""
        return pl.cdiv(self.B, self.tile.examples)

    @property
    def capsule_tiles(self) -> int:
        """Number of tiles of input capsules."""
        return pl.cdiv(self.I, self.n)

    @property
    def capsule_steps(self) -> int:
        """Number of tiles of input capsules in a half."""
        return pl.cdiv(self.capsule_tiles, self.halves)


class Scratch(NamedTuple):
    """Arrays in vector memory that only the kernel uses."""

    poses: Any  # [P, m, n]
    lefts: Any  # bfloat16 [states, groups, J, m, depth], parts of the states
    logits: Any  # [J, m, n]; later exponentials
    d_couplings: Any  # [J, m, n]
    products: Any  # [states, P, J, m, n]
    d_poses: Any  # [P, m, n]
    d_weights: Any  # [P, J, D, n], if the result is not float32


def routing_pass(
    problem: Problem,
    arrays: Arrays,
    terms: Sequence[Parents],
    start: Arrays | None = None,
    *,
    interpret: Any = False,
) -> tuple[Sums, Arrays]:
    """Run a pass.

    Args:
      problem: The sizes of the arrays, and the results to compute.
      arrays: The inputs.
      terms: The iterations whose gradients are added; one if sums are requested.
      start: Float32 gradients to add to, in place.
      interpret: As of `pallas_call`.

    Returns:
      The sums, of the gradients of the logits if the term has a cotangent, else of the couplings;
      and the gradients.
    """
    m, tiles, wanted = problem.tile.examples, problem.example_tiles, problem.gradients
    B, P, J, D = problem[1:5]

    def result(shape: tuple[int, ...], dtype: Any = jnp.float32) -> ShapedArray:
        return ShapedArray(shape, dtype)

    out_sums = Sums(
        result((problem.halves, tiles, J, D, m)) if problem.sums.first else None,
        result((problem.halves, tiles, J, 1, m)) if problem.sums.mass else None,
    )
    out_arrays = Arrays(
        result((P, B, problem.I), arrays.poses.dtype) if wanted.poses else None,
        result(arrays.weights.shape, arrays.weights.dtype) if wanted.weights else None,
        result(arrays.prior.shape) if wanted.prior else None,
        result(arrays.gates.shape) if wanted.gates else None,
    )
    operands, results = (arrays, tuple(terms), start), (out_sums, out_arrays)
    in_leaves, in_tree = jax.tree.flatten(operands)
    out_leaves, out_tree = jax.tree.flatten(results)
    scratch = _scratch(problem, arrays, terms)
    scratch_leaves, scratch_tree = jax.tree.flatten(scratch)

    specs = _specs(problem, arrays, terms, start, out_sums)
    num_start = len(jax.tree.leaves(start))
    first_start, first_gradient = len(in_leaves) - num_start, len(out_leaves) - num_start
    grid = (
        (problem.halves, problem.capsule_steps, tiles)
        if wanted.poses
        else (problem.halves, tiles, problem.capsule_steps)
    )

    def kernel(*refs: Any) -> None:
        a, b = len(in_leaves), len(in_leaves) + len(out_leaves)
        inputs = jax.tree.unflatten(in_tree, refs[:a])
        outputs = jax.tree.unflatten(out_tree, refs[a:b])
        scratch = jax.tree.unflatten(scratch_tree, refs[b:])
        i, s = (pl.program_id(axis) for axis in ((1, 2) if wanted.poses else (2, 1)))
        tile = pl.program_id(0) * problem.capsule_steps + i
        run = partial(_run, problem, *inputs, *outputs, scratch, i=i, s=s, tile=tile)
        if problem.halves * problem.capsule_steps == problem.capsule_tiles:
            run()
        else:  # one step too many of the last half: its blocks are those of the step before
            pl.when(tile < problem.capsule_tiles)(run)

    found = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=specs[0],
        out_specs=specs[1],
        out_shape=out_leaves,
        scratch_shapes=scratch_leaves,
        input_output_aliases={first_start + k: first_gradient + k for k in range(num_start)},
        cost_estimate=_cost(problem, arrays, terms, in_leaves, out_leaves),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=problem.tile.memory,
        ),
        name="dynamic_routing_gradients" if wanted.poses else "dynamic_routing_sums",
        interpret=interpret,
    )(*in_leaves)
    return jax.tree.unflatten(out_tree, found)


def _specs(
    problem: Problem,
    arrays: Arrays,
    terms: Sequence[Parents],
    start: Arrays | None,
    out_sums: Sums,
) -> tuple[list[Any], list[Any]]:
    """Return the blocks of the operands and of the results.

    Gradients of weights are summed over tiles of examples, which are then the innermost axis of the
    grid; else sums over capsules are, and the states of a tile of examples stay in vector memory.
    """
    m, n, B, P, J, D = problem.tile.examples, problem.n, *problem[1:5]
    wanted = problem.gradients

    def spec(block: Sequence[int], at: Callable[..., Any], buffers: int = 2) -> pl.BlockSpec:
        def index(h: Any, x: Any, y: Any) -> Any:
            i, s = (x, y) if wanted.poses else (y, x)
            i = h * problem.capsule_steps + i
            if problem.halves > 1:
                i = jnp.minimum(i, problem.capsule_tiles - 1)
            return at(h, i, s)

        mode = None if buffers == 2 else pl.Buffered(buffers)
        return pl.BlockSpec(tuple(block), index, pipeline_mode=mode)

    prior = gates = None
    if arrays.prior is not None:
        if arrays.prior.shape[1] == 1:  # one for all examples
            prior = spec((J, 1, n), lambda h, i, s: (0, 0, i))
        else:
            prior = spec((J, m, n), lambda h, i, s: (0, s, i))
    if arrays.gates is not None:
        gates = spec((m, n), lambda h, i, s: (s, i))
    of_inputs = Arrays(
        spec((m, P, n), lambda h, i, s: (s, 0, i)),
        spec((P, J, D, n), lambda h, i, s: (0, 0, 0, i), problem.tile.buffers),
        prior,
        gates,
    )
    of_gradients = Arrays(
        spec((P, m, n), lambda h, i, s: (0, s, i)) if wanted.poses else None,
        of_inputs.weights if wanted.weights else None,
        prior if wanted.prior else None,
        gates if wanted.gates else None,
    )
    of_terms = [
        jax.tree.map(lambda x: spec((1, *x.shape[1:]), lambda h, i, s: (s, 0, 0, 0)), term)
        for term in terms
    ]

    def of_sums(x: Any) -> pl.BlockSpec:
        if wanted.poses:  # sums of all examples stay in vector memory
            return spec((1, *x.shape[1:]), lambda h, i, s: (h, 0, 0, 0, 0))
        return spec((1, 1, *x.shape[2:]), lambda h, i, s: (h, s, 0, 0, 0))

    operands = of_inputs, of_terms, of_gradients if start is not None else None
    results = jax.tree.map(of_sums, out_sums), of_gradients
    flat = partial(jax.tree.leaves, is_leaf=lambda x: isinstance(x, pl.BlockSpec))
    return flat(operands), flat(results)


def _scratch(problem: Problem, arrays: Arrays, terms: Sequence[Parents]) -> Scratch:
    """Return the shapes of the arrays that only the kernel uses."""
    m, n, P, J, D = problem.tile.examples, problem.n, *problem[2:5]
    most = max(len(_states(term)) for term in terms)
    groups, depth = problem.parts, D
    if products.stacks(D):
        groups, depth = 1, D * len(_pairs(problem, arrays))
    has_gradients = problem.gradients.poses
    keeps = has_gradients and problem.tile.keeps_products and most
    casts = has_gradients and arrays.weights.dtype != jnp.float32
    needed = any(_needs_agreements(problem, term) for term in terms)
    return Scratch(
        poses=pltpu.VMEM((P, m, n), jnp.float32),
        lefts=pltpu.VMEM((most, groups, J, m, depth), jnp.bfloat16) if most else None,
        logits=pltpu.VMEM((J, m, n), jnp.float32),
        d_couplings=pltpu.VMEM((J, m, n), jnp.float32) if needed else None,
        products=pltpu.VMEM((most, P, J, m, n), jnp.float32) if keeps else None,
        d_poses=pltpu.VMEM((P, m, n), jnp.float32) if has_gradients else None,
        d_weights=pltpu.VMEM((P, J, D, n), jnp.float32) if casts else None,
    )


def _pairs(problem: Problem, arrays: Arrays) -> list[tuple[int, int]]:
    """List the terms of a product of a state and weights."""
    parts = problem.parts
    return products.terms(parts, 1 if arrays.weights.dtype == jnp.bfloat16 else parts, parts)


def _needs_agreements(problem: Problem, term: Parents) -> bool:
    """Return whether a pass uses the agreements with the cotangent of the sums."""
    return term.d_first is not None and (not problem.constant_couplings or problem.gradients.gates)


def _states(term: Parents) -> list[str]:
    """Return the names of the states of a term that have depth."""
    return [name for name in ("b", "d_first") if getattr(term, name) is not None]


def _cost(
    problem: Problem,
    arrays: Arrays,
    terms: Sequence[Parents],
    operands: Sequence[Any],
    results: Sequence[Any],
) -> pl.CostEstimate:
    """Estimate the cost of a pass, for XLA's scheduler."""
    states = sum(len(_states(term)) for term in terms)
    used = states * problem.gradients.poses + (problem.sums.first is True)
    couplings = problem.B * problem.I * problem.J
    # Without gradients, the weights are read again for each tile of examples.
    again = 0 if problem.gradients.poses else problem.example_tiles - 1
    read = sum(x.size * x.dtype.itemsize for x in (*operands, *results))
    return pl.CostEstimate(
        flops=2 * couplings * problem.P * problem.D * (states + used),
        transcendentals=couplings * len(terms),
        bytes_accessed=read + again * arrays.weights.size * arrays.weights.dtype.itemsize,
    )


def _run(
    problem: Problem,
    arrays: Arrays,
    terms: Sequence[Parents],
    start: Arrays | None,
    sums: Sums,
    gradients: Arrays,
    scratch: Scratch,
    *,
    i: Array,
    s: Array,
    tile: Array,
) -> None:
    """Compute one step of the grid, on references."""
    inputs = _Tile(problem, arrays, i=i, s=s, tile=tile)
    inputs.write_poses(scratch.poses)
    has_gradients = problem.gradients.poses
    row = s if has_gradients else 0
    totals = jax.tree.map(lambda ref: ref.at[0, row], sums)

    @pl.when(i == 0)
    def _() -> None:
        for ref in jax.tree.leaves(totals):
            ref[...] = jnp.zeros(ref.shape, ref.dtype)

    for number, term in enumerate(terms):
        parents = jax.tree.map(lambda ref: ref.at[0], term)
        # States that stay in vector memory for all tiles of capsules are split in the first one.
        stays = len(terms) == 1 and (not has_gradients or problem.example_tiles == 1)
        is_first = i == 0 if stays else None
        states = [getattr(parents, name) for name in _states(term)]
        if states:
            _write_lefts(problem, arrays, states, scratch.lefts, when=is_first)
        _TermPass(inputs, parents, start, totals, gradients, scratch, number).run()
    if not has_gradients:
        return
    gradients.poses[...] = scratch.d_poses[...].astype(gradients.poses.dtype)
    if scratch.d_weights is not None:

        @pl.when(s == problem.example_tiles - 1)
        def _() -> None:
            gradients.weights[...] = scratch.d_weights[...].astype(gradients.weights.dtype)


def _write_lefts(
    problem: Problem, arrays: Arrays, states: Sequence[Any], lefts: Any, *, when: Array | None
) -> None:
    """Write the parts of states [J, D, m] as the left operands of `agree`, [m, depth]."""

    def write() -> None:
        def write_parent(j: Array, _: None) -> None:
            for number, state in enumerate(states):
                parts = [x.astype(jnp.float32) for x in products.split(state[j], problem.parts)]
                if products.stacks(problem.D):
                    pairs = _pairs(problem, arrays)
                    rows = [jnp.concatenate([parts[a] for a, _ in pairs])]
                else:
                    rows = parts
                for group, x in enumerate(rows):
                    lefts[number, group, j] = x.T.astype(jnp.bfloat16)

        lax.fori_loop(0, problem.J, write_parent, None)

    if when is None:
        write()
    else:
        pl.when(when)(write)


class _Tile(NamedTuple):
    """References to the inputs of a tile; elements past the end of an array are read as 0."""

    problem: Problem
    arrays: Arrays
    i: Array
    s: Array
    tile: Array  # of the input capsules

    def write_poses(self, ref: Any) -> None:
        """Write the poses as [P, m, n], so that each component is a contiguous matrix."""
        m, P, n = self.arrays.poses.shape
        if self.arrays.poses.dtype == jnp.float32 and P % 8 == 0 and n == TPU_LANES:
            rows = self.arrays.poses.reshape(m * P, n)
            for p in range(P):
                ref[p] = self.existing(rows[pl.ds(p, m, stride=P), :])
            return
        poses = jnp.swapaxes(self.arrays.poses[...].astype(jnp.float32), 0, 1)
        for p in range(P):
            ref[p] = self.existing(poses[p])

    def weights(self, p: Any, j: Any) -> Array:
        """Return the weights of component p for parent j, [D, n]."""
        return self.existing(self.arrays.weights[p, j], examples=False)

    def weight_parts(self, p: Any, j: Any) -> list[Array]:
        """Return the parts of the weights of component p for parent j."""
        return products.split(self.weights(p, j), self.problem.parts)

    def existing(self, x: Array, examples: bool = True) -> Array:
        """Replace what lies past the end of an array by 0."""
        problem = self.problem
        m, n = problem.tile.examples, problem.n
        exists = None
        if problem.I % n:
            lane = lax.broadcasted_iota(jnp.int32, (1, n), 1)
            exists = lane < problem.I - self.tile * n
        if examples and problem.B % m:
            row = lax.broadcasted_iota(jnp.int32, (m, 1), 0) < problem.B - self.s * m
            exists = row if exists is None else row & exists
        return x if exists is None else jnp.where(exists, x, jnp.zeros((), x.dtype))

    def prior(self, j: Any) -> Array:
        """Return the prior for parent j, [1, n] or [m, n]."""
        return self.existing(self.arrays.prior[j], examples=self.arrays.prior.shape[1] > 1)


class _TermPass(NamedTuple):
    """The work of one term on one tile."""

    inputs: _Tile
    parents: Parents
    start: Arrays | None
    sums: Sums
    gradients: Arrays
    scratch: Scratch
    number: int  # of the term

    def run(self) -> None:
        """Run the three steps of the module's description."""
        problem = self.inputs.problem
        largest = self._agree()
        inverse, mean = self._soften(largest)
        if problem.gradients.poses:
            self._start_gradients(mean)
        J, together = problem.J, 1 if problem.gradients.poses else 2

        def use(block: Array, _: None) -> None:
            self._use([together * block + k for k in range(together)], inverse, mean)

        lax.fori_loop(0, J // together, use, None)
        for j in range(J - J % together, J):
            self._use([j], inverse, mean)

    @property
    def _zeros(self) -> Array:
        return jnp.zeros(self.scratch.poses.shape[1:], jnp.float32)

    @property
    def _has_gradients_of_couplings(self) -> bool:
        return _needs_agreements(self.inputs.problem, self.parents)

    @property
    def _has_gradients_of_logits(self) -> bool:
        return self.parents.d_first is not None and not self.inputs.problem.constant_couplings

    @property
    def _agreeing(self) -> list[int]:
        """The states whose agreements with the votes are used."""
        has_logits = self.parents.b is not None
        return [*[0] * has_logits, *[int(has_logits)] * self._has_gradients_of_couplings]

    def _column(self, row: Array) -> Array:
        """Return a row [1, m] as the columns of [m, n]."""
        return jnp.broadcast_to(row, self._zeros.shape[::-1]).T

    def _product(self, state: int, p: Any, j: Any, weights: list[Array]) -> Array:
        """Return a state's product T[p, j], [m, n]."""
        problem, lefts = self.inputs.problem, self.scratch.lefts
        pairs = _pairs(problem, self.inputs.arrays)
        if products.stacks(problem.D):
            right = jnp.concatenate([weights[b] for _, b in pairs])
            return products.dot(lefts[state, 0, j], right, 1, 0)
        found = [products.dot(lefts[state, a, j], weights[b], 1, 0) for a, b in pairs]
        return sum(found[1:], found[0])

    def _agree(self) -> Array:
        """Write logits and gradients of the couplings; return the largest logit, [m, n]."""
        inputs, scratch, parents = self.inputs, self.scratch, self.parents
        problem = inputs.problem
        wanted = self._agreeing

        def agree(j: Array, largest: Array) -> Array:
            def add(p: Any, agreements: list[Array]) -> list[Array]:
                weights, u = inputs.weight_parts(p, j), scratch.poses[p]
                found = []
                for state, agreement in zip(wanted, agreements, strict=True):
                    product = self._product(state, p, j, weights)
                    if scratch.products is not None:
                        scratch.products[state, p, j] = product
                    found.append(agreement + u * product)
                return found

            agreements = loop(problem.P, add, [self._zeros] * len(wanted))
            if self._has_gradients_of_couplings:
                a = agreements.pop()
                if parents.d_mass is not None:
                    a += self._column(parents.d_mass[j])
                scratch.d_couplings[j] = a
            logits = agreements.pop() if agreements else self._zeros
            if inputs.arrays.prior is not None:
                logits += inputs.prior(j)
            if parents.k is not None:
                logits += self._column(parents.k[j])
            scratch.logits[j] = logits
            return jnp.maximum(largest, logits)

        lowest = 0.0 if problem.leaky else -jnp.inf
        return lax.fori_loop(0, problem.J, agree, jnp.full_like(self._zeros, lowest))

    def _soften(self, largest: Array) -> tuple[Array, Array | None]:
        """Write exponentials; return 1 / their sum, and the mean gradient of the couplings."""
        problem, scratch = self.inputs.problem, self.scratch
        has_mean = self._has_gradients_of_couplings

        def exponentiate(j: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            exponential = jnp.exp(scratch.logits[j] - largest)
            scratch.logits[j] = exponential
            total = sums[0] + exponential
            return (total, sums[1] + exponential * scratch.d_couplings[j]) if has_mean else (total,)

        first = jnp.exp(-largest) if problem.leaky else self._zeros
        total, *mean = loop(problem.J, exponentiate, (first, self._zeros)[: 1 + has_mean])
        inverse = 1 / total
        return inverse, mean[0] * inverse if has_mean else None

    def _start_gradients(self, mean: Array | None) -> None:
        """Set the gradients to those of earlier terms, where they are not added parent by parent."""
        gradients, start = self.gradients, self.start
        if self.number == 0:
            for p in range(self.inputs.problem.P):
                self.scratch.d_poses[p] = self._zeros if start is None else start.poses[p]
        if gradients.gates is not None:
            assert mean is not None
            if self.number:
                mean += gradients.gates[...]
            elif start is not None:
                mean += start.gates[...]
            gradients.gates[...] = mean

    def _so_far(self, name: str, at: Any, each_tile: bool) -> Array | None:
        """Return what earlier terms, calls and tiles of examples have added to a gradient."""
        ref = getattr(self.gradients, name)
        if name == "weights" and self.scratch.d_weights is not None:
            ref = self.scratch.d_weights
        if self.number:
            return ref[at]
        start = None if self.start is None else getattr(self.start, name)[at]
        if each_tile or self.inputs.problem.example_tiles == 1:
            return start
        return jnp.where(self.inputs.s == 0, 0.0 if start is None else start, ref[at])

    def _use(self, js: Sequence[Any], inverse: Array, mean: Array | None) -> None:
        """Add to the sums and gradients for some parents."""
        inputs, scratch, parents = self.inputs, self.scratch, self.parents
        problem, parts = inputs.problem, inputs.problem.parts
        gates = None if inputs.arrays.gates is None else inputs.existing(inputs.arrays.gates[...])
        scale = inverse if gates is None else inverse * gates
        factors = []  # couplings times gates, gradients of logits
        for j in js:
            w = scratch.logits[j] * scale
            dl = None
            if self._has_gradients_of_logits:
                dl = w * (scratch.d_couplings[j] - mean)
            factors.append((w, dl))
        summed = [w if parents.d_first is None else dl for w, dl in factors]

        def add(p: Any, sums: list[Array]) -> list[Array]:
            u, found = scratch.poses[p], []
            for k, j in enumerate(js):
                weights = inputs.weight_parts(p, j)
                if self.sums.first is not None:
                    x = products.split(summed[k] * u, parts)
                    product = products.multiply_rows(weights, x, 1, parts)
                    found.append(sums[k] + product)
                if problem.gradients.poses:
                    self._add_gradients(p, j, u, weights, *factors[k], rows[k])
            return found

        rows = []
        if problem.gradients.poses:
            for j in js:
                states = [parents.d_first, parents.b if self._has_gradients_of_logits else None]
                rows.append([None if x is None else products.split(x[j], parts) for x in states])
        zeros = jnp.zeros((problem.D, problem.tile.examples), jnp.float32)
        sums = loop(problem.P, add, [zeros] * (len(js) if self.sums.first is not None else 0))
        for j, total in zip(js, sums, strict=False):
            self.sums.first[j] += total
        for j, (w, dl), x in zip(js, factors, summed, strict=True):
            if self.sums.mass is not None:
                x = inputs.existing(x)
                self.sums.mass[j] += jnp.sum(x.T, axis=0, keepdims=True)
            if self.gradients.prior is not None and dl is not None:
                self._add_prior(j, inputs.existing(dl))

    def _add_gradients(
        self, p: Any, j: Any, u: Array, weights: list[Array], w: Array, dl: Array | None, rows: Any
    ) -> None:
        problem, scratch = self.inputs.problem, self.scratch
        gradients, parts = self.gradients, problem.parts
        offset = int(self.parents.b is not None)

        def product(state: int) -> Array:
            if scratch.products is not None and state in self._agreeing:
                return scratch.products[state, p, j]
            return self._product(state, p, j, weights)

        d_poses = w * product(offset)
        d_weights = products.multiply_rows(rows[0], products.split(w * u, parts), 0, parts)
        if dl is not None and rows[1] is not None:
            d_poses += dl * product(0)
            x = products.split(dl * u, parts)
            d_weights += products.multiply_rows(rows[1], x, 0, parts)
        scratch.d_poses[p] += d_poses
        so_far = self._so_far("weights", (p, j), False)
        total = d_weights if so_far is None else so_far + d_weights
        ref = gradients.weights if scratch.d_weights is None else scratch.d_weights
        ref[p, j] = total

    def _add_prior(self, j: Any, dl: Array) -> None:
        gradients = self.gradients
        for_each = gradients.prior.shape[1] > 1
        if not for_each:
            dl = jnp.sum(dl, axis=0, keepdims=True)
        so_far = self._so_far("prior", (j,), for_each)
        gradients.prior[j] = dl if so_far is None else so_far + dl


def loop(count: int, body: Callable[[Any, Any], Any], init: Any) -> Any:
    """Run `lax.fori_loop` from 0 to `count`, unrolled if short."""
    return lax.fori_loop(0, count, body, init, unroll=count <= MAX_UNROLLED)
