"""The Triton kernel for the gradients of poses, weights and prior, with votes in registers.

A program owns a few input capsules and loops over the examples, so the gradients of its weights are
summed in a fixed order, without atomics. The float32 accumulators are arrays in memory that stay
in the L2 cache, because a program's weights exceed its registers.
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
    accumulator_block,
    agreements,
    barrier,
    couplings_and_gradients,
    flat,
    load_states,
    load_statistics,
    loop,
    make_logits,
    make_votes,
    poses_block,
    prior_block,
    statistics_of,
    store_statistics,
    tile_indices,
    tiling_of,
    weights_block,
)


class Schedule(NamedTuple):
    """Distribution of input capsules and tiles of examples over a grid (programs, splits)."""

    programs: int  # along the input capsules
    groups: int  # of input capsules, one after the other in a program
    capsules: int  # in a group, which loops over the examples once
    splits: int  # along the examples; each has its own partial sums of the weights' gradients
    examples: int  # tiles of examples of a program


def schedule_for(tiling: Tiling) -> Schedule:
    """Split input capsules over programs, and examples too if that leaves programs idle."""
    programs = tiling.config.programs
    groups = pl.cdiv(tiling.capsules, programs * tiling.config.capsules)
    capsules = pl.cdiv(tiling.capsules, programs * groups)
    needed = pl.cdiv(tiling.capsules, capsules * groups)
    splits = min(tiling.example_tiles, max(1, programs // needed))
    examples = pl.cdiv(tiling.example_tiles, splits)
    return Schedule(needed, groups, capsules, pl.cdiv(tiling.example_tiles, examples), examples)


class Iteration(NamedTuple):
    """State and cotangent of one iteration's pass."""

    total: Any  # the state V of the logits, [B, J·D]; None for zeros
    d_sums: Any  # cotangent of the weighted sums, [B, J·D]


def gradients(
    config: TritonConfig,
    interpret: bool,
    poses: Array,
    weights: Array,
    prior: Array | None,
    iterations: Sequence[tuple[Array | None, Array]],
    full: bool,
) -> tuple[Array, Array, Array | None]:
    """Compute the gradients of poses, weights and prior; couplings are constant unless `full`."""
    tiling = tiling_of(poses, weights, config.gradients)
    schedule = schedule_for(tiling)
    slots = schedule.splits * schedule.programs * schedule.capsules
    examples = tiling.config.examples
    capsules, length, parents, depth = weights.shape

    def float32(*shape: int) -> ShapedArray:
        return ShapedArray(shape, jnp.float32)

    d_weights_dtype = weights.dtype if schedule.splits == 1 else jnp.float32
    several_chunks = tiling.chunks > 1
    d_poses, d_weights, d_prior, _ = pl.pallas_call(
        partial(_kernel, tiling, schedule, full, interpret),
        grid=(schedule.programs, schedule.splits),
        out_shape=(
            ShapedArray(poses.shape, poses.dtype),
            ShapedArray((schedule.splits, capsules, length, parents * depth), d_weights_dtype),
            None if prior is None else float32(schedule.splits, *prior.shape),
            Accumulators(
                float32(slots, examples, length) if several_chunks else None,
                float32(slots, length, parents * depth) if schedule.examples > 1 else None,
                float32(slots * len(iterations), 3, examples) if several_chunks else None,
            ),
        ),
        interpret=interpret,
        compiler_params=pltriton.CompilerParams(num_warps=tiling.config.num_warps, num_stages=1),
        name="routing_input_gradients",
    )(poses, flat(weights), prior, [Iteration(*jax.tree.map(flat, x)) for x in iterations])
    return (
        d_poses,
        jnp.sum(d_weights, 0, dtype=jnp.float32).astype(weights.dtype).reshape(weights.shape)
        if schedule.splits > 1
        else d_weights.reshape(weights.shape),
        None if prior is None else jnp.sum(d_prior, 0).astype(prior.dtype),
    )


class Accumulators(NamedTuple):
    """Float32 accumulators of all programs; each has a slot for each capsule of a group."""

    d_poses: Any  # [slots, b, P], summed over chunks of parents; None if there is one
    d_weights: Any  # [slots, P, J·D], summed over tiles of examples; None if there is one
    statistics: Any  # [slots·iterations, 3, b], of softmaxes; None for one chunk of parents


def _kernel(
    tiling: Tiling,
    schedule: Schedule,
    full: bool,
    interpret: bool,
    poses_ref: Any,
    weights_ref: Any,
    prior_ref: Any,
    iterations: Sequence[Iteration],
    d_poses_ref: Any,
    d_weights_ref: Any,
    d_prior_ref: Any,
    accumulators: Accumulators,
) -> None:
    program, split = pl.program_id(0), pl.program_id(1)
    first_slot = (split * schedule.programs + program) * schedule.capsules

    def one_group(group: Array, carry: tuple[()]) -> tuple[()]:
        return loop(schedule.examples, partial(one_tile, group), carry)

    def one_tile(group: Array, step: Array, carry: tuple[()]) -> tuple[()]:
        examples = tile_indices(split * schedule.examples + step, tiling.config.examples)
        first = (program * schedule.groups + group) * schedule.capsules

        def over_group(do: Callable[..., None], chunk: Array, carry: tuple[()]) -> tuple[()]:
            def one_capsule(k: Array, carry: tuple[()]) -> tuple[()]:
                do(step, examples, first + k, chunk, first_slot + k)
                return carry

            loop(schedule.capsules, one_capsule, carry)
            barrier(interpret)
            return carry

        if tiling.chunks > 1:
            loop(tiling.chunks, partial(over_group, gather), carry)
        return loop(tiling.chunks, partial(over_group, add), carry)

    def gather(step: Array, examples: Array, capsule: Array, chunk: Array, slot: Array) -> None:
        """Add a chunk of parents to the softmax statistics of all iterations."""
        del step
        votes = make_votes(tiling, poses_ref, weights_ref, examples, capsule, chunk)
        for t, iteration in enumerate(iterations):
            if iteration.total is None and prior_ref is None:
                continue  # uniform couplings
            logits, d_couplings, *_ = couple(iteration, votes, examples, capsule, chunk)
            place = accumulators.statistics, slot * len(iterations) + t
            before = load_statistics(tiling, *place, when=chunk > 0)
            store_statistics(tiling, *place, statistics_of(logits, d_couplings, before))

    def couple(
        iteration: Iteration, votes: Array, examples: Array, capsule: Array, chunk: Array
    ) -> Any:
        """Compute logits and, if `full`, gradients of couplings; return them and the states."""
        load = partial(load_states, tiling, examples=examples, chunk=chunk)
        total = None if iteration.total is None else load(iteration.total)
        d_sums = load(iteration.d_sums)
        logits = make_logits(tiling, votes, prior_ref, total, capsule, chunk)
        return logits, agreements(votes, d_sums) if full else None, total, d_sums

    def add(step: Array, examples: Array, capsule: Array, chunk: Array, slot: Array) -> None:
        """Accumulate the gradients of one chunk of parents and one tile of examples."""
        d_votes = gradients_of_votes(step, examples, capsule, chunk, slot)
        d_votes = d_votes.reshape(tiling.config.examples, -1).astype(poses_ref.dtype)
        for product in range(tiling.products):
            poses = poses_block(tiling, examples, capsule, product)
            weights = weights_block(tiling, capsule, product, chunk)
            d_poses = pltriton.dot(d_votes, weights.load(weights_ref), trans_b=True)
            accumulate(
                accumulators.d_poses,
                accumulator_block(tiling, slot, product),
                d_poses_ref,
                poses,
                d_poses,
                chunk,
                tiling.chunks,
            )
            d_weights = pltriton.dot(poses.load(poses_ref), d_votes, trans_a=True)
            accumulate(
                accumulators.d_weights,
                weights._replace(at=(slot, *weights.at[1:])),
                d_weights_ref,
                weights.with_leading(split),
                d_weights,
                step,
                schedule.examples,
            )

    def gradients_of_votes(
        step: Array, examples: Array, capsule: Array, chunk: Array, slot: Array
    ) -> Array:
        """Sum the votes' gradients `[b, j, d]` over iterations; accumulate those of the prior."""
        votes = make_votes(tiling, poses_ref, weights_ref, examples, capsule, chunk)
        d_votes = jnp.zeros(tiling.tile, jnp.float32)
        d_prior = jnp.zeros(tiling.tile[1:2], jnp.float32)
        for t, iteration in enumerate(iterations):
            if iteration.total is None and prior_ref is None:  # uniform couplings
                d_votes += load_states(tiling, iteration.d_sums, examples, chunk) / tiling.parents
                continue
            logits, d_couplings, total, d_sums = couple(iteration, votes, examples, capsule, chunk)
            statistics = None
            if tiling.chunks > 1:
                place = accumulators.statistics, slot * len(iterations) + t
                statistics = load_statistics(tiling, *place)
            couplings, d_logits = couplings_and_gradients(logits, d_couplings, statistics)
            d_votes += couplings[:, :, None] * d_sums
            if d_logits is not None:
                d_prior += jnp.sum(d_logits, 0)
                if total is not None:
                    d_votes += d_logits[:, :, None] * total
        if d_prior_ref is not None:
            place = prior_block(tiling, capsule, chunk).with_leading(split)
            place.store(d_prior_ref, d_prior + place.load(d_prior_ref, when=step > 0))
        return d_votes

    loop(schedule.groups, one_group, ())


def accumulate(
    accumulator_ref: Any,
    accumulator: Block,
    result_ref: Any,
    result: Block,
    term: Array,
    step: Array,
    steps: int,
) -> None:
    """Add one of `steps` terms to an accumulator; the last step stores the sum as the result."""
    if steps == 1:
        result.store(result_ref, term)
        return
    term += accumulator.load(accumulator_ref, when=step > 0)
    accumulator.store(accumulator_ref, term, when=step < steps - 1)
    result.store(result_ref, term, when=step == steps - 1)
