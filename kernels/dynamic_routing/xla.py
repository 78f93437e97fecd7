"""Dynamic routing in plain JAX: passes that rebuild one tile of votes at a time.

Inside, examples are the last axis, because a CPU's vectors run along it. The shape letters are
those of `capsjax.shapes`; M tiles of m examples, N tiles of n capsules.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from capsjax.kernels.devices import AxisName
from capsjax.kernels.dynamic_routing.config import Tile, tile_for
from capsjax.kernels.dynamic_routing.procedure import InputGradients, Passes, Route, route
from capsjax.kernels.squash import accumulation_dtype


class Tiles(NamedTuple):
    """The arguments of a pass, cut into tiles, the last ones filled up with zeros."""

    poses: Array  # [M, N, n, P, m]
    weights: Array  # [N, n, P, J * D]
    prior: Array | None  # [N, n, J, 1]


def dynamic_routing(
    poses: Array,
    weights: Array,
    prior: Array | None,
    bias: Array | None,
    *,
    num_iterations: int,
    gradient: str,
    axis_name: AxisName | None = None,
    config: Tile | None = None,
) -> Array:
    """Routes without stored votes, on any platform; a config of None is chosen for the shapes."""
    return route(passes(config), num_iterations, gradient, axis_name, poses, weights, prior, bias)


@cache  # the same object for the same config, since JAX compares static arguments
def passes(config: Tile | None) -> Passes:
    """The passes over tiles of that size; `PASSES` are those of None."""
    return Passes(
        sums=partial(_sums, config),
        logit_gradient_sums=partial(_logit_gradient_sums, config),
        input_gradients=partial(_input_gradients, config),
    )


def _sums(
    config: Tile | None, poses: Array, weights: Array, prior: Array | None, total: Array | None
) -> Array:
    """The sum over I of couplings times votes, `[B, J, D]`; a total of None is zero."""
    if total is None and prior is None:  # uniform couplings: one matrix product
        accumulate = accumulation_dtype(poses.dtype)
        product = jnp.einsum("bip,ipjd->bjd", poses, weights, preferred_element_type=accumulate)
        return product / weights.shape[2]
    states = () if total is None else (total,)
    return _weighted_sums(_cut(config, poses, weights, prior), _couplings, states, poses, weights)


def _logit_gradient_sums(
    config: Tile | None,
    poses: Array,
    weights: Array,
    prior: Array | None,
    total: Array,
    d_sums: Array,
) -> Array:
    """The sum over I of the logits' gradients times votes, `[B, J, D]`."""
    tiles = _cut(config, poses, weights, prior)
    return _weighted_sums(tiles, _logit_gradients, (total, d_sums), poses, weights)


def _input_gradients(
    config: Tile | None,
    poses: Array,
    weights: Array,
    prior: Array | None,
    routes: Sequence[Route],
    gradient: str,
) -> InputGradients:
    """Gradients of poses, weights and prior; couplings are constants if `gradient` is "last"."""
    accumulate = accumulation_dtype(poses.dtype)
    batch, capsules, length = poses.shape
    parents, depth = weights.shape[2:]
    tiles = _cut(config, poses, weights, prior)
    examples = tiles.poses.shape[-1]
    # Without a prior the first couplings are uniform, whatever the votes.
    is_uniform = routes[0].total is None and prior is None
    uniform = _cut_examples(routes[0].d_sums, examples=examples) if is_uniform else None
    others = [
        (jnp.zeros_like(d_sums) if total is None else total, d_sums)
        for total, d_sums in (routes[1:] if is_uniform else routes)
    ]
    cut_examples = jax.vmap(partial(_cut_examples, examples=examples), out_axes=1)
    stacked = jax.tree.map(lambda *x: cut_examples(jnp.stack(x)), *others) if others else None

    # Like an argument, not of their own: what a loop carries varies over a mesh as that does.
    zeros = partial(jnp.zeros_like, poses, accumulate)

    def one_tile(
        capsule_tile: Tiles,
        carry: tuple[Array, Array],
        example_tile: tuple[Array, Array | None, tuple[Array, Array] | None],
    ) -> tuple[tuple[Array, Array], Array]:
        d_weights, d_prior = carry
        poses, uniform, stacked = example_tile
        votes = _votes(capsule_tile._replace(poses=poses), parents)

        def factors(route: tuple[Array, Array]) -> tuple[Array, Array]:
            total, d_sums = route
            couplings = _couplings(votes, capsule_tile.prior, total)
            d_logits = _softmax_gradient(couplings, _fold(votes * d_sums[None], 2))
            return couplings, d_logits

        d_votes = jnp.zeros_like(votes)
        if uniform is not None:
            d_votes += uniform[None] / parents
        if stacked is not None:
            # What a loop returns is in memory; else XLA:CPU computes it anew for each of D numbers.
            totals, d_sums = stacked
            couplings, d_logits = lax.map(factors, stacked)
            for t in range(len(couplings)):
                d_votes += couplings[t][:, :, None] * d_sums[t][None]
                if gradient == "full":
                    d_votes += d_logits[t][:, :, None] * totals[t][None]
                    d_prior += d_logits[t].sum(-1)
        d_votes = lax.optimization_barrier(d_votes).reshape(votes.shape[0], -1, votes.shape[-1])
        d_poses = jnp.einsum("npx,nxm->npm", capsule_tile.weights.astype(accumulate), d_votes)
        d_weights += jnp.einsum("npm,nxm->npx", poses.astype(accumulate), d_votes)
        return (d_weights, d_prior), d_poses.astype(poses.dtype)

    def all_examples(capsule_tile: Tiles) -> tuple[Array, Array, Array]:
        nothing = (
            zeros(capsule_tile.weights.shape),
            zeros((capsule_tile.weights.shape[0], parents)),
        )
        step = partial(one_tile, capsule_tile)
        carry, d_poses = lax.scan(step, nothing, (capsule_tile.poses, uniform, stacked))
        return d_poses, carry[0].astype(weights.dtype), carry[1]

    by_capsules = tiles._replace(poses=tiles.poses.swapaxes(0, 1))
    d_poses, d_weights, d_prior = lax.map(all_examples, by_capsules)
    d_poses = d_poses.transpose(1, 4, 0, 2, 3)  # from [N, M, n, P, m]
    d_poses = d_poses.reshape(-1, tiles.weights.shape[0] * tiles.weights.shape[1], length)
    return InputGradients(
        poses=d_poses[:batch, :capsules],
        weights=d_weights.reshape(-1, length, parents, depth)[:capsules],
        prior=None
        if prior is None
        else d_prior.reshape(-1, parents)[:capsules].astype(prior.dtype),
    )


def _weighted_sums(
    tiles: Tiles,
    factors: Callable[..., Array],
    states: tuple[Array, ...],
    poses: Array,
    weights: Array,
) -> Array:
    """The sum over I of `factors(votes, prior, *states)` times the votes, `[B, J, D]`."""
    accumulate = accumulation_dtype(poses.dtype)
    parents, depth = weights.shape[2:]
    examples = tiles.poses.shape[-1]

    def one_tile(states: Sequence[Array], sums: Array, tile: Tiles) -> tuple[Array, None]:
        votes = _votes(tile, parents)
        return sums + _fold(factors(votes, tile.prior, *states)[:, :, None] * votes, 0), None

    def all_capsules(arguments: tuple[Array, Sequence[Array]]) -> Array:
        poses, states = arguments
        zeros = jnp.zeros_like(poses, accumulate, (parents, depth, examples))
        return lax.scan(partial(one_tile, states), zeros, tiles._replace(poses=poses))[0]

    cut_states = jax.tree.map(partial(_cut_examples, examples=examples), states)
    sums = lax.map(all_capsules, (tiles.poses, cut_states))
    return sums.transpose(0, 3, 1, 2).reshape(-1, parents, depth)[: poses.shape[0]]


# One tile: poses [n, P, m], weights [n, P, J * D], prior [n, J, 1]; totals and d_sums [J, D, m].


def _votes(tile: Tiles, parents: int) -> Array:
    """The tile's votes, `[n, J, D, m]`."""
    votes = jnp.einsum(
        "npx,npm->nxm",
        tile.weights,
        tile.poses,
        preferred_element_type=accumulation_dtype(tile.poses.dtype),
    )
    # Without the barriers in this file XLA:CPU computes votes and couplings anew in every sum
    # that reads them.
    return lax.optimization_barrier(votes).reshape(votes.shape[0], parents, -1, votes.shape[-1])


def _couplings(votes: Array, prior: Array | None, *totals: Array) -> Array:
    """Softmax over the parents of prior plus agreement, `[n, J, m]`."""
    n, parents, _, examples = votes.shape
    logits = jnp.zeros((n, parents, examples), votes.dtype)
    if prior is not None:
        logits += prior
    for total in totals:
        logits += _fold(votes * total[None], 2)
    return lax.optimization_barrier(jax.nn.softmax(lax.optimization_barrier(logits), axis=1))


def _logit_gradients(votes: Array, prior: Array | None, total: Array, d_sums: Array) -> Array:
    """The gradient of the logits whose couplings gave sums with gradient `d_sums`, `[n, J, m]`."""
    return _softmax_gradient(_couplings(votes, prior, total), _fold(votes * d_sums[None], 2))


def _softmax_gradient(couplings: Array, d_couplings: Array) -> Array:
    mean = jnp.sum(couplings * d_couplings, axis=1, keepdims=True)
    return lax.optimization_barrier(couplings * (d_couplings - mean))


def _fold(x: Array, axis: int) -> Array:
    """The sum over an axis, by halves while it is even: XLA:CPU runs this twice as fast."""
    for _ in range(4):
        half, odd = divmod(x.shape[axis], 2)
        if odd:
            break
        x = lax.slice_in_dim(x, 0, half, axis=axis) + lax.slice_in_dim(x, half, None, axis=axis)
    return jnp.sum(x, axis)


# Cutting into tiles.


def _cut(config: Tile | None, poses: Array, weights: Array, prior: Array | None) -> Tiles:
    batch, capsules, length = poses.shape
    parents, depth = weights.shape[2:]
    tile = config or tile_for(batch, capsules, parents, depth)
    count = -(-capsules // tile.capsules)
    padding = (0, count * tile.capsules - capsules)
    poses = _cut_examples(jnp.pad(poses, ((0, 0), padding, (0, 0))), examples=tile.examples)
    weights = jnp.pad(weights, (padding, (0, 0), (0, 0), (0, 0)))
    if prior is not None:
        prior = jnp.pad(prior, (padding, (0, 0))).astype(accumulation_dtype(poses.dtype))
        prior = prior.reshape(count, tile.capsules, parents, 1)
    return Tiles(
        poses.reshape(poses.shape[0], count, tile.capsules, length, tile.examples),
        weights.reshape(count, tile.capsules, length, parents * depth),
        prior,
    )


def _cut_examples(x: Array, *, examples: int) -> Array:
    """`[B, a, b]` to `[M, a, b, m]`."""
    count = -(-x.shape[0] // examples)
    x = jnp.pad(x, ((0, count * examples - x.shape[0]), (0, 0), (0, 0)))
    return x.reshape(count, examples, *x.shape[1:]).transpose(0, 2, 3, 1)


PASSES = passes(None)
