"""The passes for GPUs that return sums over children, votes in registers.

A small matrix product makes one capsule's votes of a tile of examples; agreements, softmax and
weighted sums follow in the same registers. A program walks over a range of capsules, and the
ranges' sums are added afterwards, in order, so two runs give the same bits.

Where the parents of a capsule fill several tiles ("chunks"), their softmax takes two walks: one
for its statistics, one that uses them.
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
    span,
    states_block,
    statistics_of,
    store_statistics,
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
    """The sum over I of couplings, or with `d_sums` of the logits' gradients, times votes."""
    tiling = tiling_of(poses, weights, config.sums)
    parents, depth = weights.shape[2:]
    # As many ranges of capsules as keep the processors busy, however large I.
    ranges = max(1, tiling.cut.programs // tiling.example_tiles)
    capsules = pl.cdiv(tiling.capsules, ranges)
    group = capsules if tiling.chunks == 1 else min(tiling.cut.capsules, capsules)
    groups = pl.cdiv(capsules, group)
    ranges = pl.cdiv(tiling.capsules, groups * group)
    programs = tiling.example_tiles * ranges
    sums, _ = pl.pallas_call(
        partial(_kernel, tiling, group, groups, interpret),
        # Programs that differ in examples only run side by side and share the weights in L2.
        grid=(tiling.example_tiles, ranges),
        out_shape=(
            ShapedArray((ranges, tiling.batch, parents * depth), jnp.float32),
            None
            if tiling.chunks == 1
            else ShapedArray((programs * group, 3, tiling.cut.examples), jnp.float32),
        ),
        interpret=interpret,
        compiler_params=pltriton.CompilerParams(num_warps=tiling.cut.num_warps, num_stages=1),
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
    """The sums over `groups * group` capsules.

    Several chunks of parents are taken one after the other, each for all capsules of a group; a
    chunk's sums wait in memory for the next group.
    """
    example_tile, portion = pl.program_id(0), pl.program_id(1)
    examples = span(example_tile, tiling.cut.examples)
    first_slot = (portion * tiling.example_tiles + example_tile) * group

    def over_group(index: Array, chunk: Array, step: Callable[..., Any], carry: Any) -> Any:
        load = partial(load_states, tiling, examples=examples, chunk=chunk)
        total = None if total_ref is None else load(total_ref)
        d_sums = None if d_sums_ref is None else load(d_sums_ref)

        def one_capsule(k: Array, carry: Any) -> Any:
            capsule = (portion * groups + index) * group + k
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

        place = states_block(tiling, examples, chunk).under(portion)
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
