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
from typing import Any

import jax
import jax.custom_batching
import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from capsjax.kernels.vote_passes.mosaic_tpu import tile_pass
from capsjax.kernels.vote_passes.mosaic_tpu.problem import (
    Arrays,
    Parents,
    Problem,
    Sums,
    is_uniform,
    states,
)
from capsjax.kernels.vote_passes.mosaic_tpu.scratch import scratch_shapes


def routing_pass(
    problem: Problem,
    arrays: Arrays,
    terms: Sequence[Parents],
    start: Arrays | None = None,
) -> tuple[Sums, Arrays]:
    """Run a pass.

    Args:
      problem: The sizes of the arrays, and the results to compute.
      arrays: The inputs.
      terms: The iterations whose gradients are added; one if sums are requested.
      start: Float32 gradients to add to, in place.

    Returns:
      The sums, of the gradients of the logits if the term has a cotangent, else of the couplings;
      and the gradients.
    """
    m, tiles, wanted = problem.tile.examples, problem.example_tiles, problem.gradients
    B, P, J, D = problem.B, problem.P, problem.J, problem.D

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
    if not problem.interpret and not all(is_uniform(arrays, term) for term in terms):
        arrays = arrays._replace(poses=in_hbm(arrays.poses), weights=in_hbm(arrays.weights))
    operands, results = (arrays, tuple(terms), start), (out_sums, out_arrays)
    in_leaves, in_tree = jax.tree.flatten(operands)
    out_leaves, out_tree = jax.tree.flatten(results)
    scratch = scratch_shapes(problem, arrays, terms)
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
        in_refs: Any = jax.tree.unflatten(in_tree, refs[:a])
        out_refs: Any = jax.tree.unflatten(out_tree, refs[a:b])
        scratch_refs = jax.tree.unflatten(scratch_tree, refs[b:])
        i, s = (pl.program_id(axis) for axis in ((1, 2) if wanted.poses else (2, 1)))
        tile = pl.program_id(0) * problem.capsule_steps + i

        def run() -> None:
            step = (*in_refs, *out_refs, scratch_refs, i, s, tile)
            tile_pass.run(tile_pass.Step(problem, *step))

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
        name="dynamic_routing_input_gradients" if wanted.poses else "dynamic_routing_sums",
        interpret=problem.interpret,
    )(*in_leaves)
    return jax.tree.unflatten(out_tree, found)


@jax.custom_batching.custom_vmap
def in_hbm(x: Array) -> Array:
    """Keep an operand in HBM, from where a block is copied during the work on another one.

    In vector memory, where XLA may put it, a block would be copied by vector instructions.
    """
    return pltpu.with_memory_space_constraint(x, pltpu.HBM)


@in_hbm.def_vmap
def _(axis_size: int, is_mapped: list[bool], x: Array) -> tuple[Array, bool]:
    del axis_size
    return in_hbm(x), is_mapped[0]


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
    m, n, P, J, D = problem.tile.examples, problem.n, problem.P, problem.J, problem.D
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


def _cost(
    problem: Problem,
    arrays: Arrays,
    terms: Sequence[Parents],
    operands: Sequence[Any],
    results: Sequence[Any],
) -> pl.CostEstimate:
    """Estimate the cost of a pass, for XLA's scheduler."""
    products = sum(len(states(term)) for term in terms)
    used = products * problem.gradients.poses + (problem.sums.first is True)
    couplings = problem.B * problem.I * problem.J
    read = sum(map(_nbytes, (*operands, *results)))
    if problem.gradients.poses and problem.example_tiles > 1:
        read += (problem.capsule_tiles - 1) * sum(map(_nbytes, jax.tree.leaves(list(terms))))
    if not problem.gradients.poses and problem.capsule_tiles > 1:
        again = [arrays.weights]
        if arrays.prior is not None and arrays.prior.shape[1] == 1:
            again.append(arrays.prior)
        read += (problem.example_tiles - 1) * sum(map(_nbytes, again))
    return pl.CostEstimate(
        flops=2 * couplings * problem.P * problem.D * (products + used),
        transcendentals=couplings * len(terms),
        bytes_accessed=read,
    )


def _nbytes(array: Any) -> int:
    return array.size * array.dtype.itemsize
