"""The Triton kernel for sums over input capsules, with votes in registers.

A small matrix product computes the votes of one input capsule for a tile of examples; agreements,
softmax and weighted sums use the same registers. A program loops over a range of input capsules.
The partial sums of the ranges are added afterwards, in order, so the result is deterministic.

If the parents fill several tiles ("chunks"), a program loops over them twice: first for the
statistics of the softmax, then to use them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from capsjax.kernels.vote_passes.config import TritonConfig
from capsjax.kernels.vote_passes.triton.tiles import (
    Tiling,
    agreements,
    barrier,
    couplings_and_gradients,
    flat,
    load_states,
    load_statistics,
    loop,
    make_logits,
    make_votes,
    states_block,
    statistics_of,
    store_statistics,
    tile_indices,
    tiling_of,
)


def weighted_sums(
    config: TritonConfig,
    interpret: bool,
    poses: Array,
    weights: Array,
    prior: Array | None,
    total: Array | None,
    d_sums: Array | None,
) -> Array:
    """Sum votes over I, times couplings, or if `d_sums` is given, times gradients of logits."""
    tiling = tiling_of(poses, weights, config.sums)
    parents, depth = weights.shape[2:]
    # Enough ranges of input capsules to occupy the GPU.
    ranges = max(1, tiling.config.programs // tiling.example_tiles)
    capsules = pl.cdiv(tiling.capsules, ranges)
    group = capsules if tiling.chunks == 1 else min(tiling.config.capsules, capsules)
    groups = pl.cdiv(capsules, group)
    ranges = pl.cdiv(tiling.capsules, groups * group)
    programs = tiling.example_tiles * ranges
    sums, _ = pl.pallas_call(
        partial(_kernel, tiling, group, groups, interpret),
        # Examples are the fastest axis: programs that run together share their weights in L2.
        grid=(tiling.example_tiles, ranges),
        out_shape=(
            ShapedArray((ranges, tiling.batch, parents * depth), jnp.float32),
            None
            if tiling.chunks == 1
            else ShapedArray((programs * group, 3, tiling.config.examples), jnp.float32),
        ),
        interpret=interpret,
        compiler_params=pltriton.CompilerParams(num_warps=tiling.config.num_warps, num_stages=1),
        name="routing_sums" if d_sums is None else "routing_logit_gradient_sums",
    )(poses, flat(weights), prior, *jax.tree.map(flat, (total, d_sums)))
    return jnp.sum(sums, 0).reshape(-1, parents, depth)


def _kernel(
    tiling: Tiling,
    group: int,
    groups: int,
    interpret: bool,
    poses_ref: Any,
    weights_ref: Any,
    prior_ref: Any,
    total_ref: Any,
    d_sums_ref: Any,
    sums_ref: Any,
    statistics_ref: Any,
) -> None:
    """Sum over a range of `groups * group` input capsules.

    For each group, chunks of parents are processed one after the other; the partial sums of a chunk
    are in memory between groups.
    """
    example_tile, range_index = pl.program_id(0), pl.program_id(1)
    examples = tile_indices(example_tile, tiling.config.examples)
    first_slot = (range_index * tiling.example_tiles + example_tile) * group

    def over_group(index: Array, chunk: Array, step: Callable[..., Any], carry: Any) -> Any:
        load = partial(load_states, tiling, examples=examples, chunk=chunk)
        total = None if total_ref is None else load(total_ref)
        d_sums = None if d_sums_ref is None else load(d_sums_ref)

        def one_capsule(k: Array, carry: Any) -> Any:
            capsule = (range_index * groups + index) * group + k
            votes = make_votes(tiling, poses_ref, weights_ref, examples, capsule, chunk)
            logits = make_logits(tiling, votes, prior_ref, total, capsule, chunk)
            d_couplings = None if d_sums is None else agreements(votes, d_sums)
            return step(carry, first_slot + k, votes, logits, d_couplings)

        return loop(group, one_capsule, carry)

    def one_group(index: Array, carry: tuple[()]) -> tuple[()]:
        if tiling.chunks > 1:
            loop(tiling.chunks, partial(gather, index), ())
        return loop(tiling.chunks, partial(add, index), carry)

    def gather(index: Array, chunk: Array, carry: tuple[()]) -> tuple[()]:
        def step(
            carry: tuple[()], slot: Array, votes: Array, logits: Array, d_couplings: Any
        ) -> tuple[()]:
            del votes
            before = load_statistics(tiling, statistics_ref, slot, when=chunk > 0)
            after = statistics_of(logits, d_couplings, before)
            store_statistics(tiling, statistics_ref, slot, after)
            return carry

        over_group(index, chunk, step, carry)
        barrier(interpret)
        return carry

    def add(index: Array, chunk: Array, carry: tuple[()]) -> tuple[()]:
        def step(sums: Array, slot: Array, votes: Array, logits: Array, d_couplings: Any) -> Array:
            statistics = None
            if tiling.chunks > 1:
                statistics = load_statistics(tiling, statistics_ref, slot)
            couplings, d_logits = couplings_and_gradients(logits, d_couplings, statistics)
            factors = couplings if d_logits is None else d_logits
            return sums + factors[:, :, None] * votes

        place = states_block(tiling, examples, chunk).with_leading(range_index)
        if groups == 1:
            before = jnp.zeros(tiling.tile, jnp.float32)
        else:
            before = place.load(sums_ref, when=index > 0).reshape(tiling.tile)
        sums = over_group(index, chunk, step, before)
        place.store(sums_ref, sums.reshape(place.inside.shape))
        if tiling.chunks > 1:
            barrier(interpret)
        return carry

    loop(groups, one_group, ())
