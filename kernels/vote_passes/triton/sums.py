"""The Triton kernel for sums over children: of couplings, or of gradients of logits, times votes.

A program has a group of children and a tile of examples in registers. It loops over the parents
twice: for the statistics of their softmax, and to use them. So there may be any number of parents.
The logits of few parents stay in registers, so that they are computed once.
The partial sums of the programs are added afterwards, in order, so the result is deterministic.
"""

from functools import partial, reduce
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from capsjax.kernels.vote_passes.config import TRITON_UNROLLED, TritonConfig
from capsjax.kernels.vote_passes.linear import Operands
from capsjax.kernels.vote_passes.triton.tiles import (
    LOG2_E,
    Group,
    Tiling,
    agreements,
    barrier,
    dot,
    exp2,
    fma,
    grow,
    log2,
    loop,
    prepare_prior,
    prepare_rows,
    prepare_states,
    prepare_weights,
    reciprocal,
    scaled_parts,
    split,
    spread,
    tiling_of,
)

# Initial largest logit: finite, so that differences are, even if all logits are masked.
LEAST = float(jnp.finfo(jnp.float32).min)


class Parents(NamedTuple):
    """What parents contribute to a pass, each None if absent."""

    k: Any = None  # [B, J], bias of the logits
    b: Any = None  # [B, J, D], state of the logits
    d_mass: Any = None  # [B, J], cotangent of the mass
    d_sums: Any = None  # [B, J, D], cotangent of the sums; given: sum gradients of logits


class Wanted(NamedTuple):
    """Which results to compute."""

    sums: bool = True
    mass: bool = False  # the sums of the factors themselves
    kept: bool = False


class Sums(NamedTuple):
    """Results; None for those that are not wanted."""

    sums: Any  # [B, J, D]
    mass: Any  # [B, J]
    # [B, 2, I]: the number L whose difference from a logit to the base 2 is log2 of the coupling
    # times the gate; the mean gradient of the couplings.
    kept: Any


class _Inputs(NamedTuple):
    poses: Any  # [B, I·P]
    weights: Any  # prepared
    states: Any  # prepared b and d_sums, those that are given
    rows: Any  # prepared k and d_mass, those that are given
    prior: Any
    gates: Any  # [B, I]


class _Shape(NamedTuple):
    """Distribution of groups of children over programs."""

    steps: int  # groups of a program, one after the other
    ranges: int  # programs along the children


def weighted_sums(
    config: TritonConfig,
    operands: Operands,
    parents: Parents,
    wanted: Wanted,
    *,
    leaky: bool,
    interpret: bool,
) -> Sums:
    """Sum votes over I, times couplings, or if `d_sums` is given, times gradients of logits."""
    tiling = tiling_of(operands, examples=config.sums_examples, interpret=interpret)
    steps = pl.cdiv(tiling.groups, config.sums_ranges)
    shape = _Shape(steps, pl.cdiv(tiling.groups, steps))
    padded = tiling.tiles * tiling.examples
    states = [x for x in (parents.b, parents.d_sums) if x is not None]
    k = None if parents.k is None else parents.k * LOG2_E
    rows = [x for x in (k, parents.d_mass) if x is not None]

    def partial_sums(*last: int) -> ShapedArray:
        return ShapedArray((shape.ranges, tiling.parents, padded, *last), jnp.float32)

    given = Parents(*(x is not None for x in parents))
    found = pl.pallas_call(
        partial(_kernel, tiling, shape, given, leaky),
        # Examples are the fastest axis: programs that run together share their weights in L2.
        grid=(tiling.tiles, shape.ranges),
        out_shape=Sums(
            partial_sums(tiling.padded_depth) if wanted.sums else None,
            partial_sums() if wanted.mass else None,
            ShapedArray((tiling.batch, 2, tiling.capsules), jnp.float32) if wanted.kept else None,
        ),
        interpret=interpret,
        compiler_params=pltriton.CompilerParams(
            num_warps=config.sums_warps, num_stages=config.sums_stages
        ),
        name="routing_sums" if parents.d_sums is None else "routing_logit_gradient_sums",
    )(
        _Inputs(
            operands.poses.reshape(tiling.batch, -1),
            prepare_weights(tiling, operands.weights, in_parts=config.weights_in_parts),
            prepare_states(tiling, states, tiling.tiles),
            prepare_rows(tiling, rows, tiling.tiles),
            prepare_prior(operands.prior),
            operands.gates,
        )
    )
    sums, mass = found.sums, found.mass
    if wanted.sums:
        sums = jnp.sum(sums, 0)[:, : tiling.batch, : tiling.depth].transpose(1, 0, 2)
    if wanted.mass:
        mass = jnp.sum(mass, 0)[:, : tiling.batch].T
    return Sums(sums, mass, found.kept)


def _kernel(
    tiling: Tiling,
    shape: _Shape,
    given: Parents,  # booleans, whether they are given
    leaky: bool,
    refs: _Inputs,
    *all_results: Any,
) -> None:
    results = Sums(*all_results)
    tile, portion = pl.program_id(0), pl.program_id(1)
    any_logits = given.b or given.k or refs.prior is not None
    zeros = jnp.zeros((tiling.examples, tiling.n), jnp.float32)

    def one_step(step: Array, carry: tuple[()]) -> tuple[()]:
        group_index = portion * shape.steps + step
        ragged = tiling.groups != shape.ranges * shape.steps
        group = Group(tiling, group_index, tile, ragged=ragged)
        poses = load_poses(group)
        gates = load_gates(group)
        if not any_logits and results.mass is None and results.kept is None:
            factor = zeros + 1 / (tiling.parents + leaky)
            factor = factor if gates is None else factor * gates
            parts = split(tiling, poses * spread(tiling, factor))

            def add_uniform(j: Array, carry: tuple[()]) -> tuple[()]:
                store_sums(step, group, j, parts)
                return carry

            return loop(tiling.parents, add_uniform, carry)

        def logits_of(j: Array) -> tuple[Array, Array | None]:
            return couple(group, poses, j)

        by_parent: list[tuple[Array, Array | None]] = []
        if tiling.parents <= TRITON_UNROLLED and shape.steps == 1:
            by_parent = [logits_of(jnp.int32(j)) for j in range(tiling.parents)]
            found = softmax_of(by_parent)
        else:
            found = loop(tiling.parents, lambda j, carry: gather(carry, *logits_of(j)), start())
        largest, total, weighted = found
        inverse = reciprocal(tiling, total)
        scale = inverse if gates is None else inverse * gates
        mean = weighted * inverse
        if results.kept is not None:
            group.store_pairs(results.kept, largest - log2(tiling, scale), 0)
            group.store_pairs(results.kept, mean, 1)
        if results.sums is None and results.mass is None:
            return carry

        parts = split(tiling, poses)

        def add(j: Array, logit: Array, d_coupling: Array | None) -> None:
            factor = exp2(tiling, logit - largest) * scale
            if d_coupling is not None:
                factor = factor * (d_coupling - mean)
            if results.mass is not None:
                place = results.mass.at[portion, j, group.rows]
                grow(place, jnp.sum(factor, 1), shape.steps > 1 and step > 0)
            if results.sums is not None:
                store_sums(step, group, j, scaled_parts(tiling, poses, parts, factor))

        def add_one(j: Array, carry: tuple[()]) -> tuple[()]:
            add(j, *logits_of(j))
            return carry

        if not by_parent:
            return loop(tiling.parents, add_one, carry)
        for j, logits in enumerate(by_parent):
            add(jnp.int32(j), *logits)
        return carry

    def load_poses(group: Group) -> Array:
        if refs.states is None:
            return group.load_poses(refs.poses)
        return group.load_poses_like_products(refs.poses, refs.weights, refs.states)

    def load_gates(group: Group) -> Array | None:
        if refs.gates is not None:
            return group.load_pairs(refs.gates)
        if results.mass is not None:  # padding has no mass
            return group.pairs.astype(jnp.float32)
        return None

    def couple(group: Group, poses: Array, j: Array) -> tuple[Array, Array | None]:
        """Compute logits to the base 2, and gradients of couplings, `[b, n]`."""
        weights = group.load_weights(refs.weights, j)
        logit = None if refs.prior is None else group.load_prior(refs.prior, j)
        if given.k:
            k = group.load_row(refs.rows, 0, j)
            logit = k if logit is None else logit + k
        if given.b:
            b = group.load_state(refs.states, 0, j)
            agreement = agreements(tiling, poses, dot(tiling, b, weights, trans_b=True))
            base_2 = jnp.full_like(agreement, LOG2_E)
            logit = agreement * base_2 if logit is None else fma(tiling, agreement, base_2, logit)
        logit = zeros if logit is None else logit
        d_coupling = None
        if given.d_sums:
            d_sums = group.load_state(refs.states, int(given.b), j)
            d_coupling = agreements(tiling, poses, dot(tiling, d_sums, weights, trans_b=True))
        if given.d_mass:
            d_mass = group.load_row(refs.rows, int(given.k), j)
            d_coupling = d_mass if d_coupling is None else d_coupling + d_mass
        return logit, d_coupling

    # Statistics of the softmax of each pair: the largest logit, and sums of e = exp2(logit -
    # largest) and of e times the gradient of the coupling.

    def start() -> tuple[Array, Array, Array]:
        if leaky:
            return zeros, jnp.ones_like(zeros), zeros
        return jnp.full_like(zeros, LEAST), zeros, zeros

    def gather(
        before: tuple[Array, Array, Array], logit: Array, d_coupling: Array | None
    ) -> tuple[Array, Array, Array]:
        """Add a parent to the statistics."""
        largest, total, weighted = before
        top = jnp.maximum(largest, logit)
        shrink, e = exp2(tiling, largest - top), exp2(tiling, logit - top)
        if d_coupling is not None:
            weighted = fma(tiling, weighted, shrink, e * d_coupling)
        return top, fma(tiling, total, shrink, e), weighted

    def softmax_of(
        by_parent: list[tuple[Array, Array | None]],
    ) -> tuple[Array, Array, Array]:
        """Return the statistics of all parents."""
        top = reduce(jnp.maximum, [logit for logit, _ in by_parent], start()[0])
        total, weighted = exp2(tiling, start()[0] - top) if leaky else zeros, zeros
        for logit, d_coupling in by_parent:
            e = exp2(tiling, logit - top)
            total = total + e
            if d_coupling is not None:
                weighted = fma(tiling, e, d_coupling, weighted)
        return top, total, weighted

    def store_sums(step: Array, group: Group, j: Array, factors: list[Array]) -> None:
        term = dot(tiling, factors, group.load_weights(refs.weights, j))
        d = jnp.arange(tiling.padded_depth, dtype=jnp.int32)[None, :]
        place = results.sums.at[portion, j, group.rows[:, None], d]
        grow(place, term, shape.steps > 1 and step > 0)

    def step_and_barrier(step: Array, carry: tuple[()]) -> tuple[()]:
        one_step(step, carry)
        if shape.steps > 1:
            barrier(tiling)
        return carry

    loop(shape.steps, step_and_barrier, ())
