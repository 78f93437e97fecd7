"""Passes of a convolution: the parents of each position route the children of one window.

The children lie on a grid H x W of A types, and the parents on the grid h x w of windows, K high
and L wide. Inputs here are poses [B, H, W, A, R, P], weights [K, L, A, P, J, E] that all positions
share, gates [B, H, W, A], a prior [K, L, A, J] or [B, h, w, K, L, A, J], and a parent mask
[B·h·w, J]. States and moments have one row for each position, [B·h·w, J, …].

No patches are cut out: the children at one offset of all windows are a strided slice, and a pass is
a loop over the K·L offsets. If children compete within a window only ("types"), each step is a pass
of `passes`, on any backend. If a child distributes itself over all windows that contain it
("positions"), each step stores the votes of one offset, for as many examples as fit.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from capsjax.kernels.dtypes import accumulation_dtype
from capsjax.kernels.vote_passes import passes, reference
from capsjax.kernels.vote_passes.passes import (
    Implementation,
    Inputs,
    Kept,
    Moments,
    Spec,
    State,
    Term,
)

COMPETITIONS = ("types", "positions")
# Numbers in the votes of one offset, 4 MB in float32: about eight such arrays are live at once.
OFFSET_VOTES = 2**20


@dataclasses.dataclass(frozen=True)
class Windows:
    """Static description of a convolution."""

    stride: int  # positions from one window to the next, along both axes
    competition: str  # among the parents of a window, or of all windows that contain a child
    # Whether uniform couplings are 1/J, although the parents of several windows compete.
    starts_at_types: bool = False

    def count(self, size: int, kernel_size: int) -> int:
        """Return the number of windows along an axis."""
        return (size - kernel_size) // self.stride + 1


def grid(windows: Windows, inputs: Inputs) -> tuple[int, int]:
    """Return h and w, the number of windows along both axes."""
    sizes = zip(inputs.poses.shape[1:3], inputs.weights.shape[:2], strict=True)
    height, width = (windows.count(*both) for both in sizes)
    return height, width


def moments(
    windows: Windows,
    spec: Spec,
    inputs: Inputs,
    state: State,
    *,
    implementation: Implementation | None,
) -> Moments:
    """Compute the moments: sums over the children of each window of couplings times votes."""
    if windows.competition == "types":

        def add(total: Moments, index: Array) -> tuple[Moments, None]:
            tile = _tile(windows, inputs, index)
            return _merge(
                spec, total, passes.moments(spec, tile, state, implementation=implementation)
            ), None

        return _scan(inputs, add, _no_moments(windows, spec, inputs))[0]

    def some_examples(inputs: Inputs, state: State) -> tuple[Moments, None]:
        normaliser = _normaliser(windows, spec, inputs, state)

        def add(total: Moments, index: Array) -> tuple[Moments, None]:
            tile = _tile(windows, inputs, index)
            votes = reference.votes_of(tile)
            couplings = _couplings(windows, spec, inputs, tile, state, votes, normaliser, index)
            found = reference.weighted_moments(spec, tile, votes, couplings)
            return _merge(spec, total, found), None

        return _scan(inputs, add, _no_moments(windows, spec, inputs))[0], None

    return _over_examples(windows, spec, some_examples, inputs, state)[0]


def chain(
    windows: Windows,
    spec: Spec,
    inputs: Inputs,
    term: Term,
    *,
    implementation: Implementation | None,
) -> tuple[State, Any]:
    """Compute the cotangent of the state, and what `input_gradients` needs of each offset."""
    if windows.competition == "types":

        def add(total: State, index: Array) -> tuple[State, Kept]:
            tile = _tile(windows, inputs, index)
            found, kept = passes.chain(spec, tile, term, implementation=implementation)
            return jax.tree.map(jnp.add, total, found), kept

        return _scan(inputs, add, jax.tree.map(jnp.zeros_like, term.state))

    def some_examples(inputs: Inputs, term: Term) -> tuple[Any, None]:
        term = term._replace(kept=_kept(windows, spec, inputs, term))
        zeros = jax.tree.map(jnp.zeros_like, term.state)

        def add(total: State, index: Array) -> tuple[State, None]:
            tile = _tile(windows, inputs, index)
            votes = reference.votes_of(tile)
            *_, d_logits = _factors(windows, spec, inputs, tile, term, votes, index)
            found = reference.state_gradient(spec, votes, term.state, d_logits)
            return jax.tree.map(jnp.add, total, found), None

        return (_scan(inputs, add, zeros)[0], term.kept), None

    return _over_examples(windows, spec, some_examples, inputs, term)[0]


def input_gradients(
    windows: Windows,
    spec: Spec,
    inputs: Inputs,
    terms: Sequence[Term],
    *,
    constant_couplings: bool = False,
    implementation: Implementation | None,
) -> Inputs:
    """Compute the input gradients summed over `terms`, at constant couplings or through them."""
    dtype = accumulation_dtype(inputs.poses.dtype)

    def accumulated(inputs: Inputs, gradients: Callable[..., Inputs], kept: Any) -> Inputs:
        """Sum what `gradients(tile, index, kept)` returns for each offset into whole arrays."""

        def add(total: tuple[Any, Any], xs: Any) -> tuple[tuple[Any, Any], Any]:
            index, kept = xs
            found = gradients(_tile(windows, inputs, index), index, kept)
            sums = (found.poses, found.gates)
            put = partial(_add_window, windows, inputs, index)
            total = jax.tree.map(put, total, sums)
            return total, (found.weights, found.prior)

        zeros = partial(jnp.zeros_like, dtype=dtype)
        start = jax.tree.map(zeros, (inputs.poses, inputs.gates))
        (poses, gates), (weights, prior) = lax.scan(add, start, (offsets(inputs), kept))
        weights = weights.reshape(inputs.weights.shape)
        if inputs.prior is not None and inputs.prior.ndim == 4:
            prior = prior.reshape(inputs.prior.shape)
        elif inputs.prior is not None:  # [K·L, B·h·w, A, J]
            prior = jnp.moveaxis(prior, 0, 1).reshape(inputs.prior.shape)
        return Inputs(poses, weights, gates, prior)

    if windows.competition == "types":

        def gradients(tile: Inputs, index: Array, kept: Any) -> Inputs:
            del index
            own = [term._replace(kept=k) for term, k in zip(terms, kept, strict=True)]
            return passes.input_gradients(
                spec,
                tile,
                own,
                constant_couplings=constant_couplings,
                implementation=implementation,
            )

        found = accumulated(inputs, gradients, [term.kept for term in terms])
    else:

        def some_examples(inputs: Inputs, terms: Sequence[Term]) -> tuple[Any, Any]:
            terms = [
                term
                if term.kept is not None
                else term._replace(kept=_kept(windows, spec, inputs, term))
                for term in terms
            ]

            def gradients(tile: Inputs, index: Array, kept: Any) -> Inputs:
                del kept
                votes = reference.votes_of(tile)
                d_votes = jnp.zeros_like(votes)
                d_gates = jnp.zeros_like(votes[:, :, 0, 0])
                d_prior = jnp.zeros_like(votes[..., 0])
                for term in terms:
                    couplings, d_weights, d_logits = _factors(
                        windows, spec, inputs, tile, term, votes, index
                    )
                    d_gates += jnp.sum(couplings * d_weights, -1)
                    d_votes += reference.through_moments(spec, tile, votes, term, couplings)
                    if not constant_couplings and not passes.is_uniform(inputs, term.state):
                        d_votes += reference.through_logits(spec, votes, term.state, d_logits)
                        d_prior += d_logits
                found = reference.through_votes(tile, d_votes)
                if tile.prior is not None and tile.prior.ndim == 2:
                    d_prior = d_prior.sum(0)
                return found._replace(
                    gates=None if tile.gates is None else d_gates,
                    prior=None if tile.prior is None else d_prior,
                )

            found = accumulated(inputs, gradients, None)
            if inputs.prior is None or inputs.prior.ndim == 7:
                return found._replace(weights=None), Inputs(None, found.weights)
            sums = Inputs(None, found.weights, prior=found.prior)
            return found._replace(weights=None, prior=None), sums

        examples, sums = _over_examples(windows, spec, some_examples, inputs, list(terms))
        found = Inputs(*(y if x is None else x for x, y in zip(examples, sums, strict=True)))
    like = inputs._replace(parent_mask=None)
    return jax.tree.map(lambda x, y: x.astype(y.dtype), found, like)


def patches(windows: Windows, inputs: Inputs) -> tuple[Inputs, reference.Softmax]:
    """Cut the windows out: inputs [B·h·w, K·L·A, …], and the softmax over their logits.

    This is the definition for the implementation "reference", which stores patches and votes.
    """
    indices = offsets(inputs)
    tiles = [_tile(windows, inputs, index) for index in range(len(indices))]
    weights = inputs.weights.reshape(-1, *inputs.weights.shape[3:])
    prior = inputs.prior
    if prior is not None:
        shape = weights.shape[0], prior.shape[-1]
        prior = prior.reshape(shape if prior.ndim == 4 else (-1, *shape))
    cut = Inputs(
        jnp.concatenate([tile.poses for tile in tiles], 1),
        weights,
        None if inputs.gates is None else jnp.concatenate([tile.gates for tile in tiles], 1),
        prior,
        parent_mask=inputs.parent_mask,
    )

    def among_types(spec: Spec, logits: Array, is_uniform: bool) -> Array:
        del is_uniform
        return reference.softmax(logits, leaky=spec.leaky, axis=2)

    if windows.competition == "types":
        return cut, among_types
    batch, *sizes = inputs.poses.shape[:4]
    children = jnp.arange(sizes[0] * sizes[1] * sizes[2], dtype=jnp.int32)
    numbers = inputs._replace(poses=children.reshape(1, *sizes, 1, 1), gates=None, prior=None)
    index = jnp.concatenate(
        [_tile(windows, numbers, at).poses[..., 0, 0] for at in range(len(indices))], 1
    )  # [h·w, K·L·A], the child of each edge

    def among_positions(spec: Spec, logits: Array, is_uniform: bool) -> Array:
        if windows.starts_at_types and is_uniform:
            return among_types(spec, logits, is_uniform)
        logits = logits.reshape(batch, *index.shape, spec.num_parents)
        lowest = jnp.full((batch, children.size), 0.0 if spec.leaky else -jnp.inf, logits.dtype)
        largest = lowest.at[:, index].max(lax.stop_gradient(logits).max(-1))
        largest = jnp.where(largest > -jnp.inf, largest, 0)
        shifted = logits - largest[:, index][..., None]
        found = jnp.where(logits > -jnp.inf, jnp.exp(shifted), 0)
        total = jnp.zeros_like(largest).at[:, index].add(found.sum(-1))
        total += jnp.exp(-largest) if spec.leaky else 0
        total = jnp.where(total > 0, total, 1)
        return (found / total[:, index][..., None]).reshape(-1, *logits.shape[2:])

    return cut, among_positions


# Children of one offset.


def offsets(inputs: Inputs) -> Array:
    """Return the numbers of the K·L offsets."""
    height, width = inputs.weights.shape[:2]
    return jnp.arange(height * width)


def _scan(inputs: Inputs, step: Callable[..., Any], start: Any) -> Any:
    return lax.scan(step, start, offsets(inputs))


def window(windows: Windows, inputs: Inputs, index: Any, x: Array) -> Array:
    """Return what all windows contain at one offset of a map [B, H, W, …]: rows [B·h·w, …]."""
    found = lax.dynamic_slice(x, *_slice(windows, inputs, index, x))
    found = found[:, :: windows.stride, :: windows.stride]
    return found.reshape(-1, *x.shape[3:])


def _add_window(windows: Windows, inputs: Inputs, index: Any, total: Array, rows: Array) -> Array:
    """Add rows to a map, where `window` takes them from."""
    return _put_window(windows, inputs, index, total, window(windows, inputs, index, total) + rows)


def _put_window(windows: Windows, inputs: Inputs, index: Any, total: Array, rows: Array) -> Array:
    """Replace rows of a map, where `window` takes them from."""
    start, size = _slice(windows, inputs, index, total)
    part = lax.dynamic_slice(total, start, size)
    at = part.at[:, :: windows.stride, :: windows.stride]
    rows = rows.reshape(total.shape[0], *grid(windows, inputs), *total.shape[3:])
    return lax.dynamic_update_slice(total, at.set(rows.astype(total.dtype)), start)


def _slice(windows: Windows, inputs: Inputs, index: Any, x: Array) -> tuple[Any, Any]:
    row, column = _row_and_column(inputs, index)
    height, width = (windows.stride * (size - 1) + 1 for size in grid(windows, inputs))
    zero = 0 * row  # of the dtype of the others
    start = zero, row, column, *(zero,) * (x.ndim - 3)
    return start, (x.shape[0], height, width, *x.shape[3:])


def _row_and_column(inputs: Inputs, index: Any) -> tuple[Any, Any]:
    width = inputs.weights.shape[1]
    return index // width, index % width


def _tile(windows: Windows, inputs: Inputs, index: Any) -> Inputs:
    """Return the inputs of a dense pass over the children of one offset."""
    at_offset = partial(window, windows, inputs, index)
    place = _row_and_column(inputs, index)
    prior = inputs.prior
    if prior is not None and prior.ndim == 4:
        prior = prior[place]
    elif prior is not None:
        prior = prior[(slice(None), slice(None), slice(None), *place)]
        prior = prior.reshape(-1, *prior.shape[3:])
    return Inputs(
        at_offset(inputs.poses),
        inputs.weights[place],
        None if inputs.gates is None else at_offset(inputs.gates),
        prior,
        parent_mask=inputs.parent_mask,
    )


def _no_moments(windows: Windows, spec: Spec, inputs: Inputs) -> Moments:
    height, width = grid(windows, inputs)
    rows = inputs.poses.shape[0] * height * width
    shape = rows, spec.num_parents, passes.votes_depth(inputs)
    sums = jnp.zeros_like(inputs.poses, accumulation_dtype(inputs.poses.dtype), shape)
    central = spec.moments == "central"
    mass = sums[..., 0] if spec.mass or central else None
    return Moments(mass, sums, sums if central else None)


def _merge(spec: Spec, a: Moments, b: Moments) -> Moments:
    """Merge moments of disjoint sets of children."""
    if spec.moments == "sums":
        return jax.tree.map(jnp.add, a, b)
    return reference.merge(a, b)


# Competition over positions too: each child has one normaliser, the log of the sum over all windows
# that contain it of the exponentials of its logits.


def _normaliser(windows: Windows, spec: Spec, inputs: Inputs, state: State) -> Array:
    """Compute the normalisers [B, H, W, A], -infinity for a child without a reachable parent."""
    dtype = accumulation_dtype(inputs.poses.dtype)
    map_of = inputs.poses[..., 0, 0]
    if passes.is_uniform(inputs, state):
        # Without a loop over logits of 0, which XLA would constant-fold for seconds.
        parents = spec.num_parents * _memberships(windows, inputs) + spec.leaky
        return jnp.broadcast_to(jnp.log(jnp.asarray(parents, dtype))[..., None], map_of.shape)

    def add(total: Array, index: Array) -> tuple[Array, None]:
        tile = _tile(windows, inputs, index)
        logits = reference.logits(spec, tile, state, reference.votes_of(tile))
        before = window(windows, inputs, index, total)
        both = jnp.logaddexp(before, jax.nn.logsumexp(logits, -1))
        return _put_window(windows, inputs, index, total, both), None

    start = jnp.full_like(map_of, 0.0 if spec.leaky else -jnp.inf, dtype)
    return _scan(inputs, add, start)[0]


def _memberships(windows: Windows, inputs: Inputs) -> np.ndarray:
    """Return how many windows contain each position, `[1, H, W]`; 1 if `starts_at_types`."""
    along = []
    for size, kernel, count in zip(
        inputs.poses.shape[1:3], inputs.weights.shape[:2], grid(windows, inputs), strict=True
    ):
        starts = windows.stride * np.arange(count)[:, None]
        inside = (np.arange(size) >= starts) & (np.arange(size) < starts + kernel)
        along.append(inside.sum(0))
    counts = along[0][:, None] * along[1]
    # A position outside of all windows has no parents, and any normaliser.
    return np.where(windows.starts_at_types | (counts == 0), 1, counts)[None]


def _couplings(
    windows: Windows,
    spec: Spec,
    inputs: Inputs,
    tile: Inputs,
    state: State,
    votes: Array,
    normaliser: Array,
    index: Array,
) -> Array:
    """Compute the couplings of one offset, [B·h·w, A, J]."""
    if passes.is_uniform(inputs, state):
        own = jnp.exp(-window(windows, inputs, index, normaliser))[..., None]
        return jnp.broadcast_to(own, votes.shape[:3])
    logits = reference.logits(spec, tile, state, votes)
    own = window(windows, inputs, index, normaliser)[..., None]
    own = jnp.where(own > -jnp.inf, own, 0)
    return jnp.where(logits > -jnp.inf, jnp.exp(logits - own), 0)


def _kept(windows: Windows, spec: Spec, inputs: Inputs, term: Term) -> tuple[Array, Array]:
    """Compute normalisers, and Σ c dw of each child, which are the gradients of the gates."""
    normaliser = _normaliser(windows, spec, inputs, term.state)

    def add(total: Array, index: Array) -> tuple[Array, None]:
        tile = _tile(windows, inputs, index)
        votes = reference.votes_of(tile)
        couplings = _couplings(windows, spec, inputs, tile, term.state, votes, normaliser, index)
        d_weights = reference.coupling_gradient(spec, votes, term)
        rows = jnp.sum(couplings * d_weights, -1)
        return _add_window(windows, inputs, index, total, rows), None

    return normaliser, _scan(inputs, add, jnp.zeros_like(normaliser))[0]


def _factors(
    windows: Windows,
    spec: Spec,
    inputs: Inputs,
    tile: Inputs,
    term: Term,
    votes: Array,
    index: Array,
) -> tuple[Array, Array, Array]:
    """Compute couplings c, dw for w = gate · c, and the gradient of the logits, of one offset."""
    normaliser, shares = term.kept
    couplings = _couplings(windows, spec, inputs, tile, term.state, votes, normaliser, index)
    d_weights = reference.coupling_gradient(spec, votes, term)
    d_logits = couplings * (d_weights - window(windows, inputs, index, shares)[..., None])
    if tile.gates is not None:
        d_logits *= tile.gates.astype(d_logits.dtype)[..., None]
    return couplings, d_weights, d_logits


def _over_examples(
    windows: Windows, spec: Spec, function: Callable[..., Any], inputs: Inputs, rows: Any
) -> Any:
    """Call `function(inputs, rows)` for some examples at a time.

    It returns a tree of arrays with examples or rows first, and a tree of arrays to be summed.
    """
    batch = inputs.poses.shape[0]
    height, width = grid(windows, inputs)
    parts = 1
    if isinstance(batch, int) and batch > 0:
        votes = height * width * inputs.poses.shape[3] * spec.num_parents
        votes *= passes.votes_depth(inputs)
        fitting = max(1, OFFSET_VOTES // votes)
        parts = next(n for n in range(1, batch + 1) if batch % n == 0 and batch // n <= fitting)
    if parts == 1:
        return function(inputs, rows)
    flags = (True, False, True, inputs.prior is not None and inputs.prior.ndim == 7, False, True)
    examples = Inputs(*(x if flag else None for x, flag in zip(inputs, flags, strict=True)))
    others = Inputs(*(None if flag else x for x, flag in zip(inputs, flags, strict=True)))

    def split(x: Array) -> Array:
        # Every `parts`-th example: the batch may be sharded over devices in contiguous parts.
        x = x.reshape(batch // parts, parts, x.shape[0] // batch, *x.shape[1:])
        x = jnp.moveaxis(x, 1, 0)
        return x.reshape(parts, -1, *x.shape[3:])

    def join(x: Array) -> Array:
        each = x.shape[1] * parts // batch
        x = jnp.moveaxis(x.reshape(parts, batch // parts, each, *x.shape[2:]), 0, 1)
        return x.reshape(batch * each, *x.shape[3:])

    def run(xs: Any) -> Any:
        examples, rows = xs
        own = Inputs(*(y if x is None else x for x, y in zip(examples, others, strict=True)))
        return function(own, rows)

    xs = jax.tree.map(split, (examples, rows))
    _, sums = jax.eval_shape(run, jax.tree.map(lambda x: x[0], xs))

    def step(total: Any, xs: Any) -> tuple[Any, Any]:
        found, sums = run(xs)
        return jax.tree.map(jnp.add, total, sums), found

    start = jax.tree.map(lambda x: jnp.zeros_like(inputs.poses, x.dtype, x.shape), sums)
    total, found = lax.scan(step, start, xs)
    return jax.tree.map(join, found), total
