"""Dynamic routing in plain JAX, one tile of votes at a time, forward and backward.

The logits of iteration t are the agreements of the votes with `V`, the sum of the outputs so far.
So an iteration needs `V` alone: it walks over tiles of capsules and examples, rebuilds the tile's
votes from poses and weights, and adds them up by their couplings. The backward pass walks in the
same way from the sums of each iteration. Votes, couplings and logits exist for one tile only.

Inside, examples are the last axis: a CPU's vectors run along it. The shape letters are those of
`capsjax.shapes`; M tiles of m examples, N tiles of n capsules.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from capsjax.kernels.dynamic_routing.config import tile_for
from capsjax.kernels.squash import accumulation_dtype, squash


class Residuals(NamedTuple):
    """What the backward pass needs; everything else is rebuilt."""

    poses: Array  # [B, I, P]
    weights: Array  # [I, P, J, D]
    prior: Array | None  # [I, J]
    bias: Array | None  # [J, D], for its dtype
    sums: tuple[Array, ...]  # weighted sums s of iterations 1 … T, each [M, J, D, m]
    totals: tuple[Array, ...]  # sums V of the outputs before iterations 2 … T, each [M, J, D, m]


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
) -> Array:
    """Routes without stored votes; `capsjax.dynamic_routing` says what.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", procedure 1,
    https://arxiv.org/abs/1710.09829, with its logits written as agreements with sums of outputs.
    """
    return _routed(num_iterations, gradient, poses, weights, prior, bias)


def _forward(
    num_iterations: int,
    gradient: str,
    poses: Array,
    weights: Array,
    prior: Array | None,
    bias: Array | None,
) -> tuple[Array, Residuals]:
    del gradient  # matters to the backward pass only
    tiles = _cut(poses, weights, prior)
    parents = weights.shape[2]
    sums: list[Array] = []
    totals: list[Array] = []
    for iteration in range(num_iterations):
        if iteration == 0 and prior is None:
            weighted = _mean_over_parents(tiles, parents)
        else:
            weighted = _weighted_sums(tiles, _couplings, totals[-1:], parents)
        if bias is not None:
            weighted += bias.astype(weighted.dtype)[:, :, None]
        sums.append(weighted)
        outputs = squash(weighted, axis=2)
        if iteration + 1 < num_iterations:
            totals.append(outputs + totals[-1] if totals else outputs)
    residuals = Residuals(poses, weights, prior, bias, tuple(sums), tuple(totals))
    return _join_examples(outputs, poses.shape[0]).astype(poses.dtype), residuals


def _backward(
    num_iterations: int, gradient: str, residuals: Residuals, cotangent: Array
) -> tuple[Array, Array, Array | None, Array | None]:
    poses, weights, prior, bias, sums, totals = residuals
    tiles = _cut(poses, weights, prior)
    capsules, _, parents, _ = weights.shape
    # The couplings of earlier iterations depend on the last one's only if gradients flow through.
    first = num_iterations - 1 if gradient == "last" else 0
    # An iteration's output gets the loss's gradient (the last one) or that of all later logits.
    d_outputs = _cut_examples(cotangent.astype(sums[0].dtype), sums[0].shape[-1])
    d_sums: list[Array] = []  # of iterations t … T
    for iteration in reversed(range(first, num_iterations)):
        _, squash_vjp = jax.vjp(partial(squash, axis=2), sums[iteration])
        d_sums.insert(0, *squash_vjp(d_outputs))
        if iteration > first:
            states = (totals[iteration - 1], d_sums[0])
            term = _weighted_sums(tiles, _logit_gradients, states, parents)
            d_outputs = term if iteration == num_iterations - 1 else d_outputs + term
    routes = tuple(zip((None, *totals)[first:], d_sums, strict=True))
    d_poses, d_weights, d_prior = _input_gradients(tiles, routes, gradient, weights)
    return (
        _join_poses(d_poses, *poses.shape[:2]).astype(poses.dtype),
        d_weights,
        None if prior is None else d_prior.reshape(-1, parents)[:capsules].astype(prior.dtype),
        None if bias is None else jnp.sum(jnp.stack(d_sums), (0, 1, 4)).astype(bias.dtype),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _routed(
    num_iterations: int,
    gradient: str,
    poses: Array,
    weights: Array,
    prior: Array | None,
    bias: Array | None,
) -> Array:
    return _forward(num_iterations, gradient, poses, weights, prior, bias)[0]


_routed.defvjp(_forward, _backward)


# Passes over the tiles.


def _mean_over_parents(tiles: Tiles, parents: int) -> Array:
    """The weighted sums under uniform couplings, `[M, J, D, m]`: one matrix product."""
    tiles_of_examples, *_, examples = tiles.poses.shape
    products = jnp.einsum(
        "npx,Mnpm->Mxm",
        tiles.weights.reshape(-1, *tiles.weights.shape[2:]),
        tiles.poses.reshape(tiles_of_examples, -1, *tiles.poses.shape[3:]),
        preferred_element_type=accumulation_dtype(tiles.poses.dtype),
    )
    return products.reshape(tiles_of_examples, parents, -1, examples) / parents


def _weighted_sums(
    tiles: Tiles, factors: Callable[..., Array], states: Sequence[Array], parents: int
) -> Array:
    """The sum over capsules of `factors(votes, prior, *states)` times the votes, `[M, J, D, m]`."""
    accumulate = accumulation_dtype(tiles.poses.dtype)

    def one_tile(states: Sequence[Array], sums: Array, tile: Tiles) -> tuple[Array, None]:
        votes = _votes(tile, parents)
        return sums + _fold(factors(votes, tile.prior, *states)[:, :, None] * votes, 0), None

    def all_capsules(arguments: tuple[Array, Sequence[Array]]) -> Array:
        poses, states = arguments
        shape = (parents, tiles.weights.shape[-1] // parents, poses.shape[-1])
        step = partial(one_tile, states)
        return lax.scan(step, jnp.zeros(shape, accumulate), tiles._replace(poses=poses))[0]

    return lax.map(all_capsules, (tiles.poses, tuple(states)))


def _input_gradients(
    tiles: Tiles, routes: Sequence[tuple[Array | None, Array]], gradient: str, weights: Array
) -> tuple[Array, Array, Array]:
    """Gradients of poses `[N, M, n, P, m]`, weights `[I, P, J, D]` and prior `[N, n, J]`.

    Args:
      tiles: The forward arguments.
      routes: For each iteration that has gradients the total before it (None: zero) and the
        gradient of its weighted sums, each `[M, J, D, m]`.
      gradient: `"last"` leaves the couplings constant.
      weights: For shape and dtype.
    """
    accumulate = accumulation_dtype(tiles.poses.dtype)
    capsules, length, parents, _ = weights.shape

    def one_tile(
        capsule_tile: Tiles, carry: tuple[Array, Array], examples: tuple[Array, Any]
    ) -> tuple[tuple[Array, Array], Array]:
        d_weights, d_prior = carry
        poses, routes = examples
        prior = capsule_tile.prior
        votes = _votes(capsule_tile._replace(poses=poses), parents)
        d_votes = jnp.zeros_like(votes)
        for total, d_sums in routes:
            couplings = _couplings(votes, prior, *(() if total is None else (total,)))
            d_votes += couplings[:, :, None] * d_sums
            if gradient == "full" and not (total is None and prior is None):
                d_logits = _softmax_gradient(couplings, _fold(votes * d_sums, 2))
                d_prior += d_logits.sum(-1)
                if total is not None:
                    d_votes += d_logits[:, :, None] * total
        d_votes = lax.optimization_barrier(d_votes).reshape(votes.shape[0], -1, votes.shape[-1])
        wide = capsule_tile.weights.astype(accumulate), poses.astype(accumulate)
        d_poses = jnp.einsum("npx,nxm->npm", wide[0], d_votes)
        d_weights += jnp.einsum("npm,nxm->npx", wide[1], d_votes)
        return (d_weights, d_prior), d_poses

    def all_examples(capsule_tile: Tiles) -> tuple[Array, Array, Array]:
        count = capsule_tile.weights.shape[0]
        zeros = (
            jnp.zeros(capsule_tile.weights.shape, accumulate),
            jnp.zeros((count, parents), accumulate),
        )
        step = partial(one_tile, capsule_tile)
        sums, d_poses = lax.scan(step, zeros, (capsule_tile.poses, routes))
        return d_poses, sums[0].astype(weights.dtype), sums[1]

    by_capsules = tiles._replace(poses=tiles.poses.swapaxes(0, 1))
    d_poses, tiled, d_prior = lax.map(all_examples, by_capsules)
    d_weights = tiled.reshape(-1, length, *weights.shape[2:])[:capsules]
    return d_poses, d_weights, d_prior


# One tile: poses [n, P, m], weights [n, P, J * D], prior [n, J, 1]; totals and d_sums [J, D, m].


def _votes(tile: Tiles, parents: int) -> Array:
    """The tile's votes, `[n, J, D, m]`."""
    votes = jnp.einsum(
        "npx,npm->nxm",
        tile.weights,
        tile.poses,
        preferred_element_type=accumulation_dtype(tile.poses.dtype),
    )
    # Without the barrier the product is repeated in every sum that reads it.
    return lax.optimization_barrier(votes).reshape(votes.shape[0], parents, -1, votes.shape[-1])


def _couplings(votes: Array, prior: Array | None, *totals: Array) -> Array:
    """Softmax over the parents of prior plus agreement, `[n, J, m]`."""
    n, parents, _, examples = votes.shape
    logits = jnp.zeros((n, parents, examples), votes.dtype)
    if prior is not None:
        logits += prior
    for total in totals:
        logits += _fold(votes * total, 2)
    return lax.optimization_barrier(jax.nn.softmax(lax.optimization_barrier(logits), axis=1))


def _logit_gradients(votes: Array, prior: Array | None, total: Array, d_sums: Array) -> Array:
    """The gradient of the logits whose couplings gave sums with gradient `d_sums`, `[n, J, m]`."""
    return _softmax_gradient(_couplings(votes, prior, total), _fold(votes * d_sums, 2))


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


# Cutting into tiles and joining.


def _cut(poses: Array, weights: Array, prior: Array | None) -> Tiles:
    batch, capsules, length = poses.shape
    parents, depth = weights.shape[2:]
    tile = tile_for(batch, capsules, parents, depth)
    count = -(-capsules // tile.capsules)
    padding = (0, count * tile.capsules - capsules)
    poses = _cut_examples(jnp.pad(poses, ((0, 0), padding, (0, 0))), tile.examples)
    weights = jnp.pad(weights, (padding, (0, 0), (0, 0), (0, 0)))
    if prior is not None:
        prior = jnp.pad(prior, (padding, (0, 0))).reshape(count, tile.capsules, parents, 1)
        prior = prior.astype(accumulation_dtype(poses.dtype))
    return Tiles(
        poses.reshape(poses.shape[0], count, tile.capsules, length, tile.examples),
        weights.reshape(count, tile.capsules, length, parents * depth),
        prior,
    )


def _cut_examples(x: Array, examples: int) -> Array:
    """`[B, a, b]` to `[M, a, b, m]`."""
    count = -(-x.shape[0] // examples)
    x = jnp.pad(x, ((0, count * examples - x.shape[0]), (0, 0), (0, 0)))
    return x.reshape(count, examples, *x.shape[1:]).transpose(0, 2, 3, 1)


def _join_examples(x: Array, batch: int) -> Array:
    """`[M, a, b, m]` to `[B, a, b]`."""
    return x.transpose(0, 3, 1, 2).reshape(-1, *x.shape[1:3])[:batch]


def _join_poses(x: Array, batch: int, capsules: int) -> Array:
    """`[N, M, n, P, m]` to `[B, I, P]`."""
    x = x.transpose(1, 4, 0, 2, 3)
    return x.reshape(x.shape[0] * x.shape[1], -1, x.shape[-1])[:batch, :capsules]
