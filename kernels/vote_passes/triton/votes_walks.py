"""The Triton kernels with votes in registers: walks over the parents, and over the children.

In a walk over the parents a thread keeps poses of a few children: it finds the logits of each child
and the statistics of their softmax, or its gradients. In a walk over the children a thread keeps
the sums of one parent. Logits and statistics make parents independent.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from capsjax.kernels.vote_passes.config import TritonVotesConfig
from capsjax.kernels.vote_passes.triton.tiles import exp2, fma, log2, loop, reciprocal
from capsjax.kernels.vote_passes.triton.votes_tiles import (
    FOUR,
    Operands,
    Parents,
    Sizes,
    Statistics,
    Tile,
)

# Least number of normal size, so that its reciprocal is finite.
TINY = float(jnp.finfo(jnp.float32).tiny)
# Initial largest logit: finite, so that differences are, even if all logits are -infinity.
LEAST = float(jnp.finfo(jnp.float32).min)
# Where sums over ranges of children are merged: warps of a program, and ranges that a warp loads at
# once, so that their latencies overlap.
MERGE_WARPS = 4
MERGE_RANGES = 3


def call(
    kernel: Callable[..., None],
    operands: Any,
    *,
    grid: tuple[int, ...],
    results: Any,
    warps: int,
    sizes: Sizes,
    name: str,
) -> Any:
    """Run a kernel `kernel(operands, *results)` on whole arrays; its name has the logits before."""
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=results,
        interpret=sizes.interpret,
        # Nothing is pipelined: the warps of other programs hide the latency of loads.
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=1),
        name=f"routing_{sizes.logits}_{name}",
    )(operands)


def float32(*shape: int) -> ShapedArray:
    """Return the type of a float32 array."""
    return ShapedArray(shape, jnp.float32)


class Children(NamedTuple):
    """The children of a program: several of each of n warps."""

    at: list[Array]  # indices to load from, `[n]`; past the end that of the last child
    to: list[Array]  # indices to store to
    exist: list[Array]  # whether a child is not past the end


def children_of(sizes: Sizes, warps: int, count: int, group: Array) -> Children:
    """Return the children of a group, `count` for each warp."""
    warp = jnp.arange(warps, dtype=jnp.int32)
    to = [(group * count + m) * warps + warp for m in range(count)]
    last = sizes.capsules - 1
    return Children([jnp.minimum(i, last) for i in to], to, [i <= last for i in to])


def statistics(
    config: TritonVotesConfig,
    sizes: Sizes,
    operands: Operands,
    parents: Parents,
    center: Any,
    *,
    share: bool,
    d_gated: bool,
) -> Statistics:
    """Compute the logits of each child, and the statistics of their softmax.

    Args:
      config: Tile sizes.
      sizes: Sizes of the problem.
      operands: The inputs.
      parents: States; and cotangents, if `share`.
      center: That of the votes.
      share: Whether the share is wanted.
      d_gated: Whether the cotangents of gated couplings are wanted; `share` must be, too.
    """
    warps, count = config.statistics_warps, config.statistics_children

    def kernel(refs: tuple[Operands, Parents, Any], *all_results: Any) -> None:
        results = Statistics(*all_results)
        operands, parents, center_ref = refs
        tile = Tile(sizes, warps, pl.program_id(1))
        children = children_of(sizes, warps, count, pl.program_id(0))
        poses = [tile.load_pose(operands, i) for i in children.at]

        def one_parent(j: Array, carry: list[tuple[Array, ...]]) -> list[tuple[Array, ...]]:
            center = tile.load_center(center_ref, j)
            states = tile.load_states(parents, j)
            k = None if parents.k is None else tile.load(parents.k, j)
            if share:
                cotangents = tile.load_cotangents(parents, j)
            found = []
            for m, (largest, total, *weighted) in enumerate(carry):
                i, to, exists, pose = *(x[m] for x in children), poses[m]
                votes = tile.votes(operands, pose, center, i, j) if share or states else []
                logit = tile.logit(tile.start_logit(operands, k, i, j), votes, states)
                tile.store(results.logits, logit, to, j, exists=exists)
                top = jnp.maximum(largest, logit)
                shrink, e = exp2(tile, largest - top), exp2(tile, logit - top)
                new = [top, fma(tile, total, shrink, e)]
                if share:
                    of_gated, _ = tile.cotangent(votes, cotangents)
                    new.append(fma(tile, weighted[0], shrink, e * of_gated))
                    if d_gated:
                        tile.store(results.d_gated, of_gated, to, j, exists=exists)
                found.append(tuple(new))
            return found

        # The logit of the leak is 0, and its exponential 1.
        of_leak = (tile.zero, tile.zero + 1) if sizes.leaky else (tile.zero + LEAST, tile.zero)
        start = (*of_leak, *[tile.zero] * share)
        found = loop(sizes.parents, one_parent, [start] * count)
        for i, to, exists, (largest, total, *weighted) in zip(*children, found, strict=True):
            # At least TINY: the total is 0 if each logit is -infinity, and then so are couplings.
            total = jnp.maximum(total, TINY)
            normaliser = largest + log2(tile, total)
            if operands.gates is not None:
                normaliser = normaliser - log2(tile, tile.load(operands.gates, i))
            tile.store(results.normaliser, normaliser, to, exists=exists)
            if share:
                d_gate = weighted[0] * reciprocal(tile, total)
                tile.store(results.share, d_gate, to, exists=exists)

    of_children = float32(sizes.capsules, sizes.padded_batch)
    of_votes = float32(sizes.capsules, sizes.parents, sizes.padded_batch)
    return Statistics(
        *call(
            kernel,
            (operands, parents, center),
            grid=(pl.cdiv(sizes.capsules, warps * count), sizes.tiles),
            results=Statistics(
                of_children,
                of_votes,
                of_children if share else None,
                of_votes if d_gated else None,
            ),
            warps=warps,
            sizes=sizes,
            name="statistics",
        )
    )


class Sums(NamedTuple):
    """Sums over the children; None for those that are not wanted."""

    zeroth: Any = None  # [J, B]
    first: Any = None  # [B, J, R, E/4, 4]
    second: Any = None  # [B, J, R, E/4, 4]


class _Vote(NamedTuple):
    """What a walk over the children gives for one child."""

    numbers: list[Array]  # from the center on, or from the mean so far
    weight: Array  # the coupling times the gate
    d_logit: Array | None  # the gradient of the logit, in a backward pass


def moments(
    config: TritonVotesConfig,
    sizes: Sizes,
    operands: Operands,
    found: Statistics | None,
    *,
    mass: bool,
) -> Sums:
    """Compute the sums of votes, and the mass if `mass`; or mass, mean and squares around the mean.

    The mean is updated by one vote after the other (West 1979). Votes are computed from the mean
    so far on, and not from a fixed center, which may be far: their sums had its rounding.
    """
    is_central = sizes.logits == "gaussian"

    def add_to_sums(tile: Tile, vote: _Vote, sums: Sums) -> Sums:
        pairs = zip(vote.numbers, sums.first, strict=True)
        return Sums(
            sums.zeroth + vote.weight if mass else None,
            [fma(tile, vote.weight, v, total) for v, total in pairs],
        )

    def add_to_mean(tile: Tile, vote: _Vote, sums: Sums) -> Sums:
        mass = sums.zeroth + vote.weight
        rate = vote.weight * reciprocal(tile, jnp.maximum(mass, TINY))
        # Exactly 0 for the first vote, which is far from a mean of 0. `weight (1 - rate)` is not.
        factor = rate * sums.zeroth
        return Sums(
            mass,
            [fma(tile, rate, x, m) for x, m in zip(vote.numbers, sums.first, strict=True)],
            [fma(tile, factor * x, x, m) for x, m in zip(vote.numbers, sums.second, strict=True)],
        )

    return _over_children(
        config,
        sizes,
        (operands, None, found),
        add_to_mean if is_central else add_to_sums,
        Sums(mass or is_central, True, is_central),
        "moments",
        is_central=is_central,
    )


def logit_gradients(
    config: TritonVotesConfig,
    sizes: Sizes,
    operands: Operands,
    center: Any,
    found: Statistics,
    *,
    biases: bool,
    numbers: bool,
) -> Sums:
    """Compute the sums of dl, if `biases`, and if `numbers`, of dl v; or of dl x and dl x².

    x are votes from the center on, which is z.
    """
    is_gaussian = sizes.logits == "gaussian"

    def add(tile: Tile, vote: _Vote, sums: Sums) -> Sums:
        d_logit = vote.d_logit
        assert d_logit is not None  # because the statistics have cotangents
        total = sums.zeroth + d_logit if biases else None
        if sums.first is None:
            return Sums(total)
        if not is_gaussian:
            pairs = zip(vote.numbers, sums.first, strict=True)
            return Sums(total, [fma(tile, d_logit, v, x) for v, x in pairs])
        terms = [d_logit * x for x in vote.numbers]
        triples = zip(terms, vote.numbers, sums.second, strict=True)
        return Sums(
            total,
            [total + term for total, term in zip(sums.first, terms, strict=True)],
            [fma(tile, term, x, total) for term, x, total in triples],
        )

    return _over_children(
        config,
        sizes,
        (operands, center, found),
        add,
        Sums(biases, numbers, numbers and is_gaussian),
        "chain",
        is_central=False,
    )


def _over_children(
    config: TritonVotesConfig,
    sizes: Sizes,
    operands: tuple[Operands, Any, Statistics | None],
    add: Callable[..., Sums],
    wanted: Sums,
    name: str,
    *,
    is_central: bool,
) -> Sums:
    """Walk over ranges of children, with a parent's sums in a thread.

    Args:
      config: Tile sizes.
      sizes: Sizes of the problem.
      operands: Those of the kernel, and the center; without statistics all couplings are equal.
      add: `add(tile, vote, sums)` returns the sums with a child added.
      wanted: Whether each of the sums is wanted.
      name: Of the pass.
      is_central: Whether the sums are mass, mean and squares around the mean.
    """
    warps = config.sums_warps
    steps = pl.cdiv(sizes.capsules, config.sums_ranges)
    ranges = pl.cdiv(sizes.capsules, steps)

    def kernel(refs: tuple[Operands, Any, Statistics | None], *results: Any) -> None:
        operands, center_ref, found = refs
        tile = Tile(sizes, warps, pl.program_id(1))
        portion = pl.program_id(2)
        at = pl.program_id(0) * warps + tile.warp
        j, exists = jnp.minimum(at, sizes.parents - 1), at < sizes.parents
        center = tile.load_center(center_ref, j)

        def one_child(step: Array, sums: Sums) -> Sums:
            i = jnp.minimum(portion * steps + step, sizes.capsules - 1)
            inside = portion * steps + step < sizes.capsules
            votes: list[Array] = []
            if wanted.first:
                start = sums.first if is_central else center
                votes = tile.votes(operands, tile.load_pose(operands, i), start, i, j)
            if found is None:
                weight = tile.equal_weight(operands, i)
            else:
                weight = tile.load_weight(found, i, j)
            if ranges * steps != sizes.capsules:
                weight = jnp.where(inside, weight, 0.0)
            d_logit = None
            if found is not None and found.d_gated is not None:
                d_logit = tile.load_d_logit(found, weight, i, j)
            return add(tile, _Vote(votes, weight, d_logit), sums)

        nothing = Sums(tile.zero, *[[tile.zero] * sizes.depth] * 2)
        nothing = Sums(*(x if want else None for x, want in zip(nothing, wanted, strict=True)))
        sums = loop(steps, one_child, nothing)
        if ranges == 1:
            _store(tile, Sums(*results), sums, at, exists)
            return
        if wanted.zeroth:
            tile.store(results[0], sums.zeroth, portion, at, exists=exists)
        for ref, xs in zip(results[1:], sums[1:], strict=True):
            for d, x in enumerate(xs or ()):
                tile.store(ref, x, portion, at, d, exists=exists)

    zeroth = float32(ranges, sizes.parents, sizes.padded_batch)
    others = float32(ranges, sizes.parents, sizes.depth, sizes.padded_batch)
    found = call(
        kernel,
        operands,
        grid=(pl.cdiv(sizes.parents, warps), sizes.tiles, ranges),
        results=_types(wanted, *((zeroth, others) if ranges > 1 else _whole(sizes))),
        warps=warps,
        sizes=sizes,
        name=name,
    )
    if ranges > 1:
        found = _merge(sizes, found, wanted, f"{name}_merge", is_central=is_central)
    return Sums(*found)


def _types(wanted: Sums, zeroth: ShapedArray, others: ShapedArray) -> Sums:
    """Return the types of the sums that are wanted."""
    types = zip((zeroth, others, others), wanted, strict=True)
    return Sums(*(x if want else None for x, want in types))


def _whole(sizes: Sizes) -> tuple[ShapedArray, ShapedArray]:
    """Return the types of sums over all children."""
    shape = sizes.batch, sizes.parents, sizes.rows, sizes.padded_columns // FOUR, FOUR
    return float32(sizes.parents, sizes.padded_batch), float32(*shape)


def _store(tile: Tile, results: Sums, sums: Sums, at: Array, exists: Array) -> None:
    """Store sums over all children."""
    if sums.zeroth is not None:
        tile.store(results.zeroth, sums.zeroth, at, exists=exists)
    columns = tile.sizes.padded_columns
    for ref, xs in zip(results[1:], sums[1:], strict=True):
        if xs is not None:
            for row in range(tile.sizes.rows):
                tile.store_fours(ref, xs[row * columns :][:columns], at, row, exists=exists)


def _merge(sizes: Sizes, parts: Sums, wanted: Sums, name: str, *, is_central: bool) -> Any:
    """Add up sums over ranges of children: `[ranges, J, B]` or `[ranges, J, D, B]` each.

    A program has four of the numbers of a parent; each warp takes every n-th range. Mean and
    squares are merged by Chan, Golub and LeVeque 1979.
    """
    ranges = jax.tree.leaves(parts)[0].shape[0]
    fours = sizes.padded_columns // FOUR
    per_step = MERGE_WARPS * MERGE_RANGES

    def kernel(refs: Sums, *results: Any) -> None:
        tile = Tile(sizes, MERGE_WARPS, pl.program_id(1))
        j, place = pl.program_id(0), pl.program_id(2)

        def add_up(terms: Callable[[Array], list[Array]], count: int) -> list[Array]:
            """Sum the terms of each range."""

            def one_step(step: Array, totals: list[Array]) -> list[Array]:
                for k in range(MERGE_RANGES):
                    at = step * per_step + k * MERGE_WARPS + tile.warp
                    inside = tile.broadcast(at < ranges)
                    found = terms(jnp.minimum(at, ranges - 1))
                    totals = [
                        total + jnp.where(inside, x, 0.0)
                        for total, x in zip(totals, found, strict=True)
                    ]
                return totals

            totals = loop(pl.cdiv(ranges, per_step), one_step, [tile.zero] * count)
            return [jnp.sum(x, 0)[None] for x in totals]

        def load_mass(at: Array) -> Array:
            return tile.load(refs.zeroth, at, j)

        def load(ref: Any, at: Array) -> list[Array]:
            return [tile.load(ref, at, j, place * FOUR + d) for d in range(FOUR)]

        def load_all(at: Array) -> list[Array]:
            found = [load_mass(at)] if wanted.zeroth else []
            for ref in refs[1:]:
                found += [] if ref is None else load(ref, at)
            return found

        if is_central:

            def products(at: Array) -> list[Array]:
                mass = load_mass(at)
                return [mass, *(mass * x for x in load(refs.first, at))]

            (mass, *first) = add_up(products, 1 + FOUR)
            share = 1 / jnp.where(mass > 0, mass, 1.0)
            mean = [x * share for x in first]
            mean_of_all = [jnp.broadcast_to(x, tile.zero.shape) for x in mean]

            def squares(at: Array) -> list[Array]:
                mass = load_mass(at)
                shifts = [x - m for x, m in zip(load(refs.first, at), mean_of_all, strict=True)]
                return [
                    fma(tile, mass * x, x, m2)
                    for x, m2 in zip(shifts, load(refs.second, at), strict=True)
                ]

            sums = [mass, *mean, *add_up(squares, FOUR)]
        else:
            sums = add_up(load_all, wanted.zeroth + FOUR * sum(wanted[1:]))
        whole = Tile(sizes, 1, pl.program_id(1))
        exists = whole.warp == 0
        if wanted.zeroth:
            whole.store(results[0], sums.pop(0), j, exists=exists & (place == 0))
        for ref in results[1:]:
            if ref is not None:
                xs, sums = sums[:FOUR], sums[FOUR:]
                whole.store_fours(ref, xs, j, place // fours, place % fours, exists=exists)

    return call(
        kernel,
        parts,
        grid=(sizes.parents, sizes.tiles, sizes.depth // FOUR if wanted.first else 1),
        results=_types(wanted, *_whole(sizes)),
        warps=MERGE_WARPS,
        sizes=sizes,
        name=name,
    )
