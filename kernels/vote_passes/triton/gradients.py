"""The Triton kernel for the gradients of poses, weights and prior.

A program owns a group of children, whose gradients of weights then have one place, and takes tiles
of examples one after the other. The statistics of the softmax are those that the sums kernel kept,
so parents are independent, and one loop over them is enough.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from capsjax.kernels.vote_passes.config import TritonConfig
from capsjax.kernels.vote_passes.linear import Operands
from capsjax.kernels.vote_passes.triton.sums import Parents
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
    loop,
    prepare_prior,
    prepare_rows,
    prepare_states,
    prepare_weights,
    scaled_parts,
    split,
    spread,
    tiling_of,
)

# Most terms of a gradient of weights that are added in half precision.
MAX_ROUNDINGS = 4


class Iteration(NamedTuple):
    """The pass of one iteration."""

    parents: Parents
    kept: Any  # [B, 2, I], of the sums kernel; None if all couplings are equal


class _Inputs(NamedTuple):
    poses: Any  # [B, I·P]
    weights: Any  # prepared
    states: Any  # prepared: all b and d_sums
    rows: Any  # prepared: all k and d_mass
    prior: Any
    kept: Any  # of each iteration


class _Results(NamedTuple):
    d_poses: Any  # [B, I·P]
    d_weights: Any  # [splits, I·P, J·D]
    d_prior: Any  # [splits, J, I], or [J, B, I]


class _Shape(NamedTuple):
    """Distribution of tiles of examples over programs."""

    splits: int  # programs along the examples
    tiles: int  # one after the other in a program


def _loops(kept: Sequence[Any], parts: int) -> list[list[int]]:
    """Return the iterations of each loop over the parents.

    The registers suffice for the softmax of one iteration. The first, if it has none, joins the
    second, unless operands have three parts.
    """
    indices = list(range(len(kept)))
    joined = 2 if kept[0] is None and parts < 3 else 1
    return [indices[:joined], *([t] for t in indices[joined:])]


class _Arrays:
    """Arrays of all iterations, and the places of each iteration's own among them."""

    def __init__(self) -> None:
        self.states: list[Array] = []
        self.rows: list[Array] = []

    def add(self, iteration: Iteration, scale: float) -> Parents:
        """Append the arrays of an iteration, and return their places; None for absent ones."""
        k, b, d_mass, d_sums = iteration.parents
        return Parents(
            k=_append(self.rows, None if k is None else k * LOG2_E),
            b=_append(self.states, b),
            d_mass=_append(self.rows, d_mass),
            d_sums=_append(self.states, d_sums if iteration.kept is not None else d_sums * scale),
        )


def _append(arrays: list[Array], x: Array | None) -> int | None:
    if x is None:
        return None
    arrays.append(x)
    return len(arrays) - 1


def gradients_of_inputs(
    config: TritonConfig,
    operands: Operands,
    iterations: Sequence[Iteration],
    *,
    constant_couplings: bool,
    leaky: bool,
    interpret: bool,
) -> tuple[Array, Array, Array | None]:
    """Compute the gradients of poses, weights and prior."""
    tiling = tiling_of(operands, examples=config.gradients_examples, interpret=interpret)
    tiles = pl.cdiv(tiling.tiles, config.gradients_splits)
    shape = _Shape(pl.cdiv(tiling.tiles, tiles), tiles)
    arrays = _Arrays()
    equal = 1 / (tiling.parents + leaky)
    places = [arrays.add(iteration, equal) for iteration in iterations]
    flat_weights = tiling.capsules * tiling.length, tiling.parents * tiling.depth
    prior, d_prior = operands.prior, None
    if prior is not None and not constant_couplings:
        before = (shape.splits,) if prior.ndim == 2 else ()
        after = () if prior.ndim == 2 else (tiling.batch,)
        d_prior = ShapedArray((*before, tiling.parents, *after, tiling.capsules), jnp.float32)
    # Gradients in half precision grow in memory only if few roundings add up.
    roundings = shape.tiles * len(
        _loops([iteration.kept for iteration in iterations], tiling.parts)
    )
    exact = shape.splits > 1 or roundings > MAX_ROUNDINGS
    dtype = jnp.float32 if exact else operands.weights.dtype
    d_poses, d_weights, *all_d_prior = pl.pallas_call(
        partial(_kernel, tiling, shape, places, constant_couplings),
        grid=(tiling.groups, shape.splits),
        out_shape=_Results(
            ShapedArray((tiling.batch, tiling.capsules * tiling.length), operands.poses.dtype),
            ShapedArray((shape.splits, *flat_weights), dtype),
            d_prior,
        ),
        interpret=interpret,
        compiler_params=pltriton.CompilerParams(
            num_warps=config.gradients_warps, num_stages=config.gradients_stages
        ),
        name="routing_input_gradients",
    )(
        _Inputs(
            operands.poses.reshape(tiling.batch, -1),
            prepare_weights(tiling, operands.weights, in_parts=config.weights_in_parts),
            prepare_states(tiling, arrays.states, shape.splits * shape.tiles),
            prepare_rows(tiling, arrays.rows, shape.splits * shape.tiles),
            prepare_prior(prior),
            [iteration.kept for iteration in iterations],
        )
    )
    return (
        d_poses.reshape(operands.poses.shape),
        _finish_weights(d_weights, operands.weights),
        _finish_prior(prior, *all_d_prior),
    )


def _finish_weights(d_weights: Array, weights: Array) -> Array:
    total = d_weights[0] if len(d_weights) == 1 else jnp.sum(d_weights, 0)
    return total.reshape(weights.shape).astype(weights.dtype)


def _finish_prior(prior: Array | None, d_prior: Array | None = None) -> Array | None:
    if prior is None or d_prior is None:
        return None if prior is None else jnp.zeros_like(prior)
    return jnp.sum(d_prior, 0).T if prior.ndim == 2 else jnp.moveaxis(d_prior, 0, -1)


def _kernel(
    tiling: Tiling,
    shape: _Shape,
    places: Sequence[Parents],  # of the arrays of each iteration in `refs`
    constant_couplings: bool,
    refs: _Inputs,
    *all_results: Any,
) -> None:
    results = _Results(*all_results)
    group_index, split_index = pl.program_id(0), pl.program_id(1)

    def one_tile(step: Array, carry: tuple[()]) -> tuple[()]:
        group = Group(tiling, group_index, split_index * shape.tiles + step)
        poses = group.load_poses_like_products(refs.poses, refs.weights, refs.states)
        parts = split(tiling, poses)
        d_poses = jnp.zeros((tiling.examples, tiling.k), jnp.float32)
        for k, iterations in enumerate(_loops(refs.kept, tiling.parts)):
            grows = True if k else shape.tiles > 1 and step > 0
            one_parent = partial(add_parent, iterations, group, grows, poses, parts)
            kept = [load_kept(group, t) for t in iterations]
            d_poses = loop(tiling.parents, partial(one_parent, kept), d_poses)
            barrier(tiling)
        group.store_poses(results.d_poses, d_poses)
        return carry

    def load_kept(group: Group, t: int) -> tuple[Array, Array] | None:
        ref = refs.kept[t]
        if ref is None:
            return None
        return group.load_pairs(ref, 0, other=float("inf")), group.load_pairs(ref, 1)

    def add_parent(
        iterations: Sequence[int],
        group: Group,
        grows: Any,  # whether to add to the gradients of weights and prior stored before
        poses: Array,
        parts: list[Array],
        kept: Sequence[tuple[Array, Array] | None],
        j: Array,
        d_poses: Array,
    ) -> Array:
        """Return the poses' gradients with those of a parent added; store those of its weights."""
        weights = group.load_weights(refs.weights, j)
        d_weights: Any = None
        for t, statistics in zip(iterations, kept, strict=True):
            place = places[t]
            d_sums = group.load_state(refs.states, place.d_sums, j)
            if statistics is None:
                d_poses = dot(tiling, d_sums, weights, d_poses, trans_b=True)
                d_weights = dot(tiling, parts, d_sums, d_weights, trans_a=True)
                continue
            normaliser, mean = statistics
            logit = -normaliser
            if refs.prior is not None:
                logit = logit + group.load_prior(refs.prior, j)
            if place.k is not None:
                logit = logit + group.load_row(refs.rows, place.k, j)
            if place.b is not None:
                b = group.load_state(refs.states, place.b, j)
                y_b = dot(tiling, b, weights, trans_b=True)
                agreement = agreements(tiling, poses, y_b)
                logit = fma(tiling, agreement, jnp.full_like(agreement, LOG2_E), logit)
            coupling = exp2(tiling, logit)
            y_sums = dot(tiling, d_sums, weights, trans_b=True)
            d_poses = fma(tiling, spread(tiling, coupling), y_sums, d_poses)
            if not constant_couplings:
                d_coupling = agreements(tiling, poses, y_sums)
                if place.d_mass is not None:
                    d_coupling = d_coupling + group.load_row(refs.rows, place.d_mass, j)
                d_logit = coupling * (d_coupling - mean)
                store_prior(group, grows, j, d_logit)
                if place.b is not None:
                    d_poses = fma(tiling, spread(tiling, d_logit), y_b, d_poses)
            factor = scaled_parts(tiling, poses, parts, coupling)
            d_weights = dot(tiling, factor, d_sums, d_weights, trans_a=True)
            if place.b is not None and not constant_couplings:
                factor = scaled_parts(tiling, poses, parts, d_logit)
                d_weights = dot(tiling, factor, b, d_weights, trans_a=True)
        at, inside = group.weights_block(j)
        grow(results.d_weights.at[(split_index, *at)], d_weights, grows, inside)
        return d_poses

    def store_prior(group: Group, grows: Any, j: Array, d_logit: Array) -> None:
        if refs.prior is None:
            return
        if refs.prior.ndim == 3:  # each tile of examples has its own
            at = results.d_prior.at[j, group.rows[:, None], group.children]
            grow(at, d_logit, grows is True, inside=group.pairs)
        else:
            children = group.index * tiling.n + jnp.arange(tiling.n, dtype=jnp.int32)
            at = results.d_prior.at[split_index, j, children]
            grow(at, jnp.sum(d_logit, 0), grows, inside=children < tiling.capsules)

    loop(shape.tiles, one_tile, ())
