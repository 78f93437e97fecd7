"""The last backward pass on a GPU: gradients of poses, weights and prior, votes in registers.

A program owns a few capsules and walks over the examples, so the gradient of its weights has one
place where it grows, in a fixed order. That place is a float32 array of the program's own, which
stays in the L2 cache: a program has fewer registers than weights to keep.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from capsjax.kernels.vote_passes.config import TritonConfig
from capsjax.kernels.vote_passes.triton.tiles import (
    Block,
    Tiling,
    agreements,
    barrier,
    couplings_and_gradients,
    flat,
    growing_poses_block,
    load_states,
    load_statistics,
    loop,
    make_logits,
    make_votes,
    poses_block,
    prior_block,
    span,
    statistics_of,
    store_statistics,
    tiling_of,
    weights_block,
)


class Walk(NamedTuple):
    """Which capsules and examples the programs of a launch take."""

    programs: int  # that share out the capsules
    groups: int  # of capsules a program takes, one after the other
    capsules: int  # of a group, which takes the examples together
    splits: int  # programs that share out the examples, each with gradients of its own
    examples: int  # tiles of examples a program takes


def walk_of(tiling: Tiling) -> Walk:
    """Shares out the capsules, and the examples where there are too few capsules to go round."""
    programs = tiling.cut.programs
    groups = pl.cdiv(tiling.capsules, programs * tiling.cut.capsules)
    capsules = pl.cdiv(tiling.capsules, programs * groups)
    needed = pl.cdiv(tiling.capsules, capsules * groups)
    splits = min(tiling.example_tiles, max(1, programs // needed))
    examples = pl.cdiv(tiling.example_tiles, splits)
    return Walk(needed, groups, capsules, pl.cdiv(tiling.example_tiles, examples), examples)


class Route(NamedTuple):
    """What one iteration contributes to the gradients."""

    total: Any  # V before the iteration, [B, J * D]; None for zero
    d_sums: Any  # gradient of the weighted sums, [B, J * D]


def gradients(
    config: TritonConfig,
    interpret: bool,
    poses: Array,
    weights: Array,
    prior: Array | None,
    routes: Sequence[tuple[Array | None, Array]],
    full: bool,
) -> tuple[Array, Array, Array | None]:
    """Returns the gradients of poses, weights and prior; couplings are constants unless `full`."""
    tiling = tiling_of(poses, weights, config.gradients)
    walk = walk_of(tiling)
    slots = walk.splits * walk.programs * walk.capsules
    examples = tiling.cut.examples
    capsules, length, parents, depth = weights.shape

    def float32(*shape: int) -> ShapedArray:
        return ShapedArray(shape, jnp.float32)

    d_weights_dtype = weights.dtype if walk.splits == 1 else jnp.float32
    several_chunks = tiling.chunks > 1
    d_poses, d_weights, d_prior, _ = pl.pallas_call(
        partial(_kernel, tiling, walk, full, interpret),
        grid=(walk.programs, walk.splits),
        out_shape=(
            ShapedArray(poses.shape, poses.dtype),
            ShapedArray((walk.splits, capsules, length, parents * depth), d_weights_dtype),
            None if prior is None else float32(walk.splits, *prior.shape),
            Unfinished(
                float32(slots, examples, length) if several_chunks else None,
                float32(slots, length, parents * depth) if walk.examples > 1 else None,
                float32(slots * len(routes), 3, examples) if several_chunks else None,
            ),
        ),
        interpret=interpret,
        compiler_params=pltriton.CompilerParams(num_warps=tiling.cut.num_warps, num_stages=1),
        name="routing_input_gradients",
    )(poses, flat(weights), prior, [Route(*jax.tree.map(flat, route)) for route in routes])
    return (
        d_poses,
        jnp.sum(d_weights, 0, dtype=jnp.float32).astype(weights.dtype).reshape(weights.shape)
        if walk.splits > 1
        else d_weights.reshape(weights.shape),
        None if prior is None else jnp.sum(d_prior, 0).astype(prior.dtype),
    )


class Unfinished(NamedTuple):
    """What a program keeps in memory for itself, in float32; one slot a capsule of a group."""

    d_poses: Any  # between chunks of parents, [slots, b, P]
    d_weights: Any  # between tiles of examples, [slots, P, J * D]
    statistics: Any  # of each route, [slots * routes, 3, b]


def _kernel(
    tiling: Tiling,
    walk: Walk,
    full: bool,
    interpret: bool,
    poses_ref: Any,
    weights_ref: Any,
    prior_ref: Any,
    routes: Sequence[Route],
    d_poses_ref: Any,
    d_weights_ref: Any,
    d_prior_ref: Any,
    unfinished: Unfinished,
) -> None:
    program, split = pl.program_id(0), pl.program_id(1)
    first_slot = (split * walk.programs + program) * walk.capsules

    def one_group(group: Array, carry: tuple[()]) -> tuple[()]:
        return loop(walk.examples, partial(one_tile, group), carry)

    def one_tile(group: Array, step: Array, carry: tuple[()]) -> tuple[()]:
        examples = span(split * walk.examples + step, tiling.cut.examples)
        first = (program * walk.groups + group) * walk.capsules

        def over_group(do: Callable[..., None], chunk: Array, carry: tuple[()]) -> tuple[()]:
            def one_capsule(k: Array, carry: tuple[()]) -> tuple[()]:
                do(step, examples, first + k, chunk, first_slot + k)
                return carry

            loop(walk.capsules, one_capsule, carry)
            barrier(interpret)
            return carry

        if tiling.chunks > 1:
            loop(tiling.chunks, partial(over_group, gather), carry)
        return loop(tiling.chunks, partial(over_group, add), carry)

    def gather(step: Array, examples: Array, capsule: Array, chunk: Array, slot: Array) -> None:
        """Adds a chunk of parents to the statistics of all routes."""
        del step
        votes = make_votes(tiling, poses_ref, weights_ref, examples, capsule, chunk)
        for t, route in enumerate(routes):
            if route.total is None and prior_ref is None:
                continue  # uniform couplings
            logits, d_couplings, *_ = routed(route, votes, examples, capsule, chunk)
            place = unfinished.statistics, slot * len(routes) + t
            before = load_statistics(tiling, *place, when=chunk > 0)
            store_statistics(tiling, *place, statistics_of(logits, d_couplings, before))

    def routed(route: Route, votes: Array, examples: Array, capsule: Array, chunk: Array) -> Any:
        """One iteration's logits, gradients of its couplings unless constant, and states."""
        load = partial(load_states, tiling, examples=examples, chunk=chunk)
        total = None if route.total is None else load(route.total)
        d_sums = load(route.d_sums)
        logits = make_logits(tiling, votes, prior_ref, total, capsule, chunk)
        return logits, agreements(votes, d_sums) if full else None, total, d_sums

    def add(step: Array, examples: Array, capsule: Array, chunk: Array, slot: Array) -> None:
        """Adds to the gradients of poses a chunk of parents, to those of weights some examples."""
        d_votes = gradients_of_votes(step, examples, capsule, chunk, slot)
        d_votes = d_votes.reshape(tiling.cut.examples, -1).astype(poses_ref.dtype)
        for product in range(tiling.products):
            poses = poses_block(tiling, examples, capsule, product)
            weights = weights_block(tiling, capsule, product, chunk)
            d_poses = pltriton.dot(d_votes, weights.load(weights_ref), trans_b=True)
            grow(
                unfinished.d_poses,
                growing_poses_block(tiling, slot, product),
                d_poses_ref,
                poses,
                d_poses,
                chunk,
                tiling.chunks,
            )
            d_weights = pltriton.dot(poses.load(poses_ref), d_votes, trans_a=True)
            grow(
                unfinished.d_weights,
                weights._replace(at=(slot, *weights.at[1:])),
                d_weights_ref,
                weights.under(split),
                d_weights,
                step,
                walk.examples,
            )

    def gradients_of_votes(
        step: Array, examples: Array, capsule: Array, chunk: Array, slot: Array
    ) -> Array:
        """`[b, j, d]`, over all routes; adds to the gradient of the prior on the way."""
        votes = make_votes(tiling, poses_ref, weights_ref, examples, capsule, chunk)
        d_votes = jnp.zeros(tiling.tile, jnp.float32)
        d_prior = jnp.zeros(tiling.tile[1:2], jnp.float32)
        for t, route in enumerate(routes):
            if route.total is None and prior_ref is None:  # uniform couplings
                d_votes += load_states(tiling, route.d_sums, examples, chunk) / tiling.parents
                continue
            logits, d_couplings, total, d_sums = routed(route, votes, examples, capsule, chunk)
            statistics = None
            if tiling.chunks > 1:
                place = unfinished.statistics, slot * len(routes) + t
                statistics = load_statistics(tiling, *place)
            couplings, d_logits = couplings_and_gradients(logits, d_couplings, statistics)
            d_votes += couplings[:, :, None] * d_sums
            if d_logits is not None:
                d_prior += jnp.sum(d_logits, 0)
                if total is not None:
                    d_votes += d_logits[:, :, None] * total
        if d_prior_ref is not None:
            place = prior_block(tiling, capsule, chunk).under(split)
            place.store(d_prior_ref, d_prior + place.load(d_prior_ref, when=step > 0))
        return d_votes

    loop(walk.groups, one_group, ())


def grow(
    growing_ref: Any,
    growing: Block,
    finished_ref: Any,
    finished: Block,
    term: Array,
    step: Array,
    steps: int,
) -> None:
    """Adds one of `steps` terms to a sum that is kept in one place and ends in another."""
    if steps == 1:
        finished.store(finished_ref, term)
        return
    term += growing.load(growing_ref, when=step > 0)
    growing.store(growing_ref, term, when=step < steps - 1)
    finished.store(finished_ref, term, when=step == steps - 1)
