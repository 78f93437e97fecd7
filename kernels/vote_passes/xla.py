"""The passes in plain JAX, on any platform: one tile of votes at a time.

Inside, examples are the last axis, because a CPU's vectors run along it. M tiles of m examples,
N tiles of n children; the votes of a tile are `[n, J, D, m]`, where D counts the columns of a
matrix pose, then its rows, so that one matrix product makes them. Where the caller gives the votes,
or all parents share them, nothing is rebuilt, and the passes are those of `reference`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from capsjax.kernels.dtypes import accumulation_dtype
from capsjax.kernels.vote_passes import reference
from capsjax.kernels.vote_passes.config import XlaConfig, xla_config_for
from capsjax.kernels.vote_passes.linear import OFF, reachable
from capsjax.kernels.vote_passes.passes import (
    Device,
    Inputs,
    MaybeArray,
    Moments,
    Spec,
    State,
    Term,
    case_of,
    is_uniform,
    votes_depth,
)


class Tile(NamedTuple):
    """The inputs of one tile; or what of them is cut alike; or their gradients."""

    poses: MaybeArray = None  # [n, P, R·m]
    weights: MaybeArray = None  # [n, P, J·C], or [P, J·C] if the children share them
    gates: MaybeArray = None  # [n, 1, m], or [n, 1, 1] if examples have the same
    prior: MaybeArray = None  # [n, J, 1], or [n, J, m] if examples have their own
    coordinates: MaybeArray = None  # [n, 1, D, 1]


class Tiles(NamedTuple):
    """All tiles; the last ones are filled up with zeros."""

    both: Tile  # cut by examples and children, [M, N, …]
    children: Tile  # cut by children, [N, …]
    whole: Tile  # not cut
    examples: Any  # m, an int or a symbolic dimension


class Factors(NamedTuple):
    """What one iteration multiplies votes and states by; None where nobody asks for it."""

    couplings: Array  # [n, J, m]
    d_gates: MaybeArray  # [n, 1, m]
    d_logits: MaybeArray  # [n, J, m]


def config_for(spec: Spec, inputs: Inputs, others: object, *, device: Device) -> XlaConfig:
    """Returns the tile sizes for the shapes."""
    del others
    return xla_config_for(case_of(spec, inputs), devices=device.num_devices)


def moments(spec: Spec, inputs: Inputs, state: State, *, config: XlaConfig) -> Moments:
    """Sums couplings times votes over the children."""
    if inputs.weights is None:
        return reference.moments(spec, inputs, state)
    central = spec.moments == "central"
    needs_mass = spec.mass or central
    if is_uniform(inputs, state) and not needs_mass and inputs.coordinates is None:
        return Moments(None, uniform_sums(spec, inputs))

    def step(carry: Moments, tile: Tile, state: State) -> tuple[Moments, None]:
        votes = _votes(spec, inputs, tile)
        weights = _gated(tile, _couplings(spec, tile, votes, state))
        mass = _fold(weights, 0) if needs_mass else None
        first = _fold(weights[:, :, None] * votes, 0)
        if mass is None or not central:
            return jax.tree.map(jnp.add, carry, Moments(mass, first)), None
        mean = _divide(first, mass)
        deviations = votes - mean[None]
        second = _fold(weights[:, :, None] * deviations * deviations, 0)
        return _merge(carry, Moments(mass, mean, second)), None

    tiles = _cut(config, spec, inputs)
    zeros = partial(_zeros, inputs)
    sums = zeros(spec.num_parents, votes_depth(inputs), tiles.examples)
    mass = zeros(spec.num_parents, tiles.examples) if needs_mass else None
    start = Moments(mass, sums, sums if central else None)
    parents = _cut_parents(tiles, inputs, _masked(inputs, state))
    found, _ = _walk(tiles, parents, step, start)
    return _join_parents(inputs, found)


def chain(spec: Spec, inputs: Inputs, term: Term, *, config: XlaConfig) -> State:
    """Returns the gradient of the state from that of the moments."""
    if inputs.weights is None:
        return reference.chain(spec, inputs, term)
    wanted = term.state

    def step(carry: State, tile: Tile, term: Term) -> tuple[State, None]:
        votes = _votes(spec, inputs, tile)
        d_logits = _factors(spec, tile, votes, term).d_logits
        k: MaybeArray = None
        b: MaybeArray = None
        z: MaybeArray = None
        q: MaybeArray = None
        if wanted.k is not None:
            k = _fold(d_logits, 0)
        if wanted.b is not None:
            cosine = spec.logits == "cosine"
            factors = d_logits * _inverse_lengths(votes) if cosine else d_logits
            b = _fold(factors[:, :, None] * votes, 0)
        if wanted.q is not None:
            deviations = votes - term.state.z[None]
            z = _fold(d_logits[:, :, None] * deviations, 0)
            q = -0.5 * _fold(d_logits[:, :, None] * deviations * deviations, 0)
        return jax.tree.map(jnp.add, carry, State(k, b, z, q)), None

    tiles = _cut(config, spec, inputs)
    start = jax.tree.map(lambda x: _zeros(inputs, *x.shape[1:], tiles.examples), wanted)
    parents = _cut_parents(tiles, inputs, _prepared(spec, inputs, term))
    found = _join_parents(inputs, _walk(tiles, parents, step, start)[0])
    return found if wanted.q is None else found._replace(z=wanted.q * found.z)


def input_gradients(
    spec: Spec,
    inputs: Inputs,
    terms: Sequence[Term],
    *,
    constant_couplings: bool,
    config: XlaConfig,
) -> Inputs:
    """Returns the gradients of the inputs, summed over iterations."""
    if inputs.weights is None:
        return reference.input_gradients(spec, inputs, terms, constant_couplings=constant_couplings)
    tiles = _cut(config, spec, inputs)
    cut = [_cut_parents(tiles, inputs, x) for x in _prepared(spec, inputs, tuple(terms))]
    # The couplings of a uniform pass are constants, whatever the votes.
    uniform = [x for x, term in zip(cut, terms, strict=True) if is_uniform(inputs, term.state)]
    others = [x for x, term in zip(cut, terms, strict=True) if not is_uniform(inputs, term.state)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x, 1), *_alike(others)) if others else None

    def one_tile(tile: Tile, uniform: Sequence[Term], stacked: Term | None) -> Tile:
        votes = _votes(spec, inputs, tile)
        factors = partial(_factors, spec, tile, votes, gates=inputs.gates is not None)
        d_votes = jnp.zeros_like(votes)
        d_gates = jnp.zeros_like(votes[:, :1, 0])
        d_logits = jnp.zeros_like(votes[:, :, 0])
        equal = jnp.full((1, 1, 1), 1 / (spec.num_parents + spec.leaky), votes.dtype)
        for term in uniform:
            found = factors(term, couplings=equal, constant_couplings=True)
            d_votes += _through_moments(spec, tile, votes, term, found.couplings)
            d_gates = d_gates if found.d_gates is None else d_gates + found.d_gates
        if stacked is not None:
            # What a loop returns is in memory; else XLA:CPU computes it anew for each of D numbers.
            step = partial(factors, constant_couplings=constant_couplings)
            all_found = lax.map(step, stacked)
            for t in range(len(others)):
                term, found = jax.tree.map(lambda x: x[t], (stacked, all_found))  # noqa: B023
                d_votes += _through_moments(spec, tile, votes, term, found.couplings)
                d_gates = d_gates if found.d_gates is None else d_gates + found.d_gates
                if found.d_logits is not None:
                    d_votes += _through_logits(spec, votes, term.state, found.d_logits)
                    d_logits += found.d_logits
        d_votes = lax.optimization_barrier(d_votes)
        d_poses, d_weights = _through_product(tile, d_votes)
        return Tile(
            d_poses.astype(inputs.poses.dtype),
            d_weights,
            None if inputs.gates is None else d_gates,
            None if tile.prior is None else d_logits,
            None if tile.coordinates is None else jnp.sum(d_votes, 1, keepdims=True),
        )

    def like(tile: Tile) -> Tile:
        return jax.tree.map(lambda x: _zeros(inputs, *x.shape), tile)

    def one_tile_of_children(whole: Tile, xs: Any) -> tuple[Tile, tuple[Tile, Tile]]:
        both, children = xs

        def one_tile_of_both(carry: tuple[Tile, Tile], xs: Any) -> tuple[tuple[Tile, Tile], Tile]:
            both, *parents = xs
            found = one_tile(_joined(both, children, tiles.whole), *parents)
            summed = found._replace(
                prior=None if children.prior is None else jnp.sum(found.prior, -1, keepdims=True),
                coordinates=None
                if children.coordinates is None
                else jnp.sum(found.coordinates, -1, keepdims=True),
            )
            carry = jax.tree.map(jnp.add, carry, tuple(_kept(summed, x) for x in carry))
            return carry, _kept(found, both._replace(gates=inputs.gates))

        start = like(children._replace(gates=None)), whole
        (children, whole), both = lax.scan(one_tile_of_both, start, (both, uniform, stacked))
        return whole, (both, children)

    by_children = jax.tree.map(lambda x: x.swapaxes(0, 1), tiles.both)
    whole, found = lax.scan(one_tile_of_children, like(tiles.whole), (by_children, tiles.children))
    return _join_inputs(inputs, _joined(*found, whole))


def couplings(spec: Spec, inputs: Inputs, state: State, *, config: XlaConfig) -> Array:
    """Returns the couplings `[B, I, J]`, before gates."""
    if inputs.weights is None or is_uniform(inputs, state):
        return reference.couplings(spec, inputs, state)

    def step(carry: None, tile: Tile, state: State) -> tuple[None, Array]:
        return None, _gated(tile, _couplings(spec, tile, _votes(spec, inputs, tile), state))

    inputs = inputs._replace(gates=None)
    tiles = _cut(config, spec, inputs)
    parents = _cut_parents(tiles, inputs, _masked(inputs, state))
    _, found = _walk(tiles, parents, step, None)  # [M, N, n, J, m]
    found = found.transpose(0, 4, 1, 2, 3)
    batch, children = inputs.poses.shape[:2]
    return found.reshape(-1, found.shape[2] * found.shape[3], spec.num_parents)[:batch, :children]


# One tile: votes [n, J, D, m]; mass and k [J, m]; moments and other states [J, D, m].


def _votes(spec: Spec, inputs: Inputs, tile: Tile) -> Array:
    """Rebuilds the tile's votes."""
    letters = "npx,npy->nxy" if tile.weights.ndim == 3 else "px,npy->nxy"
    dtype = accumulation_dtype(tile.poses.dtype)
    votes = jnp.einsum(letters, tile.weights, tile.poses, preferred_element_type=dtype)
    # Without the barriers in this file XLA:CPU computes votes and couplings anew in every sum
    # that reads them.
    depth = votes_depth(inputs)
    votes = lax.optimization_barrier(votes).reshape(len(votes), spec.num_parents, depth, -1)
    return votes if tile.coordinates is None else votes + tile.coordinates


def _through_product(tile: Tile, d_votes: Array) -> tuple[Array, Array]:
    """Returns the gradients of the tile's poses and weights."""
    d_votes = d_votes.reshape(len(d_votes), tile.weights.shape[-1], -1)
    own = "n" if tile.weights.ndim == 3 else ""
    weights, poses = (x.astype(d_votes.dtype) for x in (tile.weights, tile.poses))
    d_poses = jnp.einsum(f"{own}px,nxy->npy", weights, d_votes)
    return d_poses, jnp.einsum(f"npy,nxy->{own}px", poses, d_votes)


def _couplings(spec: Spec, tile: Tile, votes: Array, state: State) -> Array:
    """Returns the couplings `[n, J, m]`, before gates."""
    shape = votes.shape[0], votes.shape[1], votes.shape[3]
    if tile.prior is None and state.is_empty:
        return jnp.full(shape, 1 / (spec.num_parents + spec.leaky), votes.dtype)
    logits = jnp.zeros(shape, votes.dtype)
    if tile.prior is not None:
        logits += tile.prior
    if state.k is not None:
        logits += state.k[None]
    if state.b is not None:
        agreement = _fold(votes * state.b[None], 2)
        logits += agreement * _inverse_lengths(votes) if spec.logits == "cosine" else agreement
    if state.q is not None:
        deviations = votes - state.z[None]
        logits -= 0.5 * _fold(deviations * deviations * state.q[None], 2)
    logits = lax.optimization_barrier(logits)
    if spec.leaky:
        return lax.optimization_barrier(reference.softmax(logits, leaky=True, axis=1))
    return lax.optimization_barrier(jax.nn.softmax(logits, axis=1))


def _factors(
    spec: Spec,
    tile: Tile,
    votes: Array,
    term: Term,
    *,
    couplings: Array | None = None,
    gates: bool = False,
    constant_couplings: bool = False,
) -> Factors:
    """Returns couplings and gradients of one iteration, from a prepared term."""
    if couplings is None:
        couplings = _couplings(spec, tile, votes, term.state)
    if constant_couplings and not gates:
        return Factors(couplings, None, None)
    mass, first, second = term.cotangent
    if spec.moments == "sums":
        d_weights = _fold(votes * first[None], 2)
    else:
        deviations = votes - term.moments.first[None]
        d_weights = _fold(deviations * (first[None] + deviations * second[None]), 2)
    if mass is not None:
        d_weights += mass[None]
    d_gates = jnp.sum(couplings * d_weights, 1, keepdims=True) if gates else None
    if constant_couplings:
        return Factors(couplings, d_gates, None)
    d_couplings = _gated(tile, d_weights)
    mean = jnp.sum(couplings * d_couplings, axis=1, keepdims=True)
    return Factors(couplings, d_gates, lax.optimization_barrier(couplings * (d_couplings - mean)))


def _through_moments(spec: Spec, tile: Tile, votes: Array, term: Term, couplings: Array) -> Array:
    """Returns the gradient of the votes as what is summed."""
    weights = _gated(tile, couplings)[:, :, None]
    if spec.moments == "sums":
        return weights * term.cotangent.first[None]
    deviations = votes - term.moments.first[None]
    return weights * (term.cotangent.first[None] + 2 * deviations * term.cotangent.second[None])


def _through_logits(spec: Spec, votes: Array, state: State, d_logits: Array) -> Array:
    """Returns the gradient of the votes as what the logits depend on."""
    d_votes = jnp.zeros_like(votes)
    if state.b is not None and spec.logits == "cosine":
        inverse = _inverse_lengths(votes)
        cosine = _fold(votes * state.b[None], 2) * inverse
        unit = votes * inverse[:, :, None]
        d_votes = (d_logits * inverse)[:, :, None] * (state.b[None] - cosine[:, :, None] * unit)
    elif state.b is not None:
        d_votes = d_logits[:, :, None] * state.b[None]
    if state.q is not None:
        d_votes -= d_logits[:, :, None] * state.q[None] * (votes - state.z[None])
    return d_votes


def _gated(tile: Tile, couplings: Array) -> Array:
    return couplings if tile.gates is None else couplings * tile.gates


def _inverse_lengths(votes: Array) -> Array:
    """Returns 1/|v|, `[n, J, m]`; 0 for the zero vote."""
    squares = _fold(votes * votes, 2)
    return jnp.where(squares > 0, lax.rsqrt(jnp.where(squares > 0, squares, 1)), 0)


def _divide(sums: Array, mass: Array) -> Array:
    """Returns `[J, D, m]` divided by a mass `[J, m]`, 0 for a parent without children."""
    inverse = jnp.where(mass > 0, 1 / jnp.where(mass > 0, mass, 1), 0)
    return sums * inverse[:, None]


def _merge(a: Moments, b: Moments) -> Moments:
    """Merges central moments of disjoint sets of children (Chan, Golub and LeVeque 1979)."""
    mass = a.mass + b.mass
    share = (b.mass / jnp.where(mass > 0, mass, 1))[:, None]
    step = b.first - a.first
    second = a.second + b.second + step * step * share * a.mass[:, None]
    return Moments(mass, a.first + share * step, second)


def _fold(x: Array, axis: int) -> Array:
    """Sums over an axis, by halves while it is even: XLA:CPU runs this twice as fast."""
    for _ in range(4):
        half, odd = divmod(x.shape[axis], 2)
        if odd:
            break
        x = lax.slice_in_dim(x, 0, half, axis=axis) + lax.slice_in_dim(x, half, None, axis=axis)
    return jnp.sum(x, axis)


# Cutting into tiles, and putting together again.


def _walk(
    tiles: Tiles, parents: Any, step: Callable[..., tuple[Any, Any]], start: Any
) -> tuple[Any, Any]:
    """Walks over the children of each tile of examples: `step(carry, tile, parents)`."""

    def all_children(xs: Any) -> Any:
        both, parents = xs

        def one_tile(carry: Any, xs: Any) -> tuple[Any, Any]:
            return step(carry, _joined(*xs, tiles.whole), parents)

        return lax.scan(one_tile, start, (both, tiles.children))

    return lax.map(all_children, (tiles.both, parents))


def _joined(*parts: Tile) -> Tile:
    """Joins tiles that have different fields."""
    return Tile(
        *(next((x for x in same if x is not None), None) for same in zip(*parts, strict=True))
    )


def _kept(tile: Tile, fields: Tile) -> Tile:
    """Returns the fields of a tile that another one has."""
    return Tile(*(None if f is None else x for x, f in zip(tile, fields, strict=True)))


def _zeros(inputs: Inputs, *shape: Any) -> Array:
    """Returns zeros that vary over a mesh as the poses do."""
    return jnp.zeros_like(inputs.poses, accumulation_dtype(inputs.poses.dtype), shape)


def _cut(config: XlaConfig, spec: Spec, inputs: Inputs) -> Tiles:
    children = inputs.poses.shape[1]
    dtype = accumulation_dtype(inputs.poses.dtype)
    depth, columns = votes_depth(inputs), inputs.weights.shape[-1]
    count = -(-children // config.children)
    gates = _gates(inputs)
    filled_up = count * config.children != children
    if filled_up and gates is None and (spec.mass or spec.moments == "central"):
        gates = jnp.ones(children, dtype)  # children that fill up are not there

    def by_children(x: Array, axis: int = 0) -> Array:
        missing = count * config.children - children
        x = jnp.pad(x, [(0, missing if k == axis else 0) for k in range(x.ndim)])
        return x.reshape(*x.shape[:axis], count, config.children, *x.shape[axis + 1 :])

    def by_both(x: Array) -> Array:  # [B, I, …] to [M, N, n, …, m]
        return _cut_examples(config.examples, by_children(x, 1))

    length, rows = inputs.poses.shape[3], inputs.poses.shape[2]
    poses = by_both(inputs.poses.swapaxes(2, 3).reshape(-1, children, length * rows))
    prior = inputs.prior
    if prior is not None:
        prior = jnp.maximum(prior.astype(dtype), OFF)
    is_shared = inputs.weights.ndim == 3
    weights = inputs.weights.reshape(*inputs.weights.shape[:-2], spec.num_parents * columns)
    coordinates = inputs.coordinates
    if coordinates is not None:
        coordinates = _columns_first(inputs, coordinates.astype(dtype))
        coordinates = by_children(coordinates.reshape(children, 1, depth, 1))
    return Tiles(
        both=Tile(
            poses.reshape(*poses.shape[:3], length, -1),
            gates=by_both(gates[..., None]) if gates is not None and gates.ndim == 2 else None,
            prior=by_both(prior) if prior is not None and prior.ndim == 3 else None,
        ),
        children=Tile(
            weights=None if is_shared else by_children(weights),
            gates=by_children(gates[:, None, None])
            if gates is not None and gates.ndim == 1
            else None,
            prior=by_children(prior[..., None]) if prior is not None and prior.ndim == 2 else None,
            coordinates=coordinates,
        ),
        whole=Tile(weights=weights if is_shared else None),
        examples=config.examples,
    )


def _cut_examples(size: Any, x: Array) -> Array:
    """`[B, …]` to `[M, …, m]`."""
    count = -(-x.shape[0] // size)
    x = jnp.pad(x, ((0, count * size - x.shape[0]), *[(0, 0)] * (x.ndim - 1)))
    return jnp.moveaxis(x.reshape(count, size, *x.shape[1:]), 1, -1)


def _join_inputs(inputs: Inputs, found: Tile) -> Inputs:
    """Puts gradients together: `both` are [N, M, …, m], others [N, …] or whole."""
    batch, children = inputs.poses.shape[:2]

    def of_both(x: Array) -> Array:  # [N, M, n, …, m] to [B, I, …]
        x = jnp.moveaxis(x, (1, -1), (0, 1))
        x = x.reshape(x.shape[0] * x.shape[1], x.shape[2] * x.shape[3], *x.shape[4:])
        return x[:batch, :children]

    def of_children(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])[:children]

    poses = found.poses.reshape(*found.poses.shape[:4], inputs.poses.shape[2], -1)
    weights, prior, coordinates = found.weights, found.prior, found.coordinates
    if inputs.weights.ndim == 4:
        weights = of_children(weights)
    if inputs.prior is not None and prior is not None:
        prior = of_children(prior)[..., 0] if inputs.prior.ndim == 2 else of_both(prior)
    if coordinates is not None:
        coordinates = _rows_first(inputs, of_children(coordinates).reshape(children, -1))
    gates = None
    if inputs.gates is not None:
        gates = of_both(found.gates)[..., 0]
        reachable = _reachable(inputs)
        if reachable is not None:
            gates = jnp.where(jnp.broadcast_to(reachable, gates.shape), gates, 0)
    gradients = Inputs(
        of_both(poses).swapaxes(2, 3),
        weights.reshape(inputs.weights.shape),
        gates,
        prior,
        coordinates,
    )
    like = inputs._replace(parent_mask=None)
    return jax.tree.map(lambda x, y: x.astype(y.dtype), gradients, like)


def _cut_parents(tiles: Tiles, inputs: Inputs, tree: Any) -> Any:
    """`[B, J]` to `[M, J, m]`, `[B, J, D]` to `[M, J, D, m]`."""
    cut = partial(_cut_examples, tiles.examples)
    return jax.tree.map(lambda x: cut(_columns_first(inputs, x) if x.ndim == 3 else x), tree)


def _join_parents(inputs: Inputs, tree: Any) -> Any:
    """`[M, J, m]` to `[B, J]`, `[M, J, D, m]` to `[B, J, D]`."""

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, -1, 1)
        x = x.reshape(-1, *x.shape[2:])[: inputs.poses.shape[0]]
        return _rows_first(inputs, x) if x.ndim == 3 else x

    return jax.tree.map(join, tree)


def _columns_first(inputs: Inputs, x: Array) -> Array:
    """Reorders a last axis D, by rows then columns of a matrix pose, to columns then rows."""
    return _transposed(x, inputs.poses.shape[2])


def _rows_first(inputs: Inputs, x: Array) -> Array:
    """The inverse of `_columns_first`."""
    return _transposed(x, x.shape[-1] // inputs.poses.shape[2])


def _transposed(x: Array, rows: int) -> Array:
    return x.reshape(*x.shape[:-1], rows, -1).swapaxes(-2, -1).reshape(x.shape)


def uniform_sums(spec: Spec, inputs: Inputs) -> Array:
    """Returns the sums with equal couplings, one matrix product, `[B, J, D]`."""
    dtype = accumulation_dtype(inputs.poses.dtype)
    poses = inputs.poses
    if inputs.gates is not None:
        poses = poses.astype(dtype) * inputs.gates.astype(dtype)[..., None, None]
    batch, children, rows, length = poses.shape
    poses = poses.swapaxes(1, 2).reshape(batch * rows, children, length)
    letters = "bip,ipjc->bjc" if inputs.weights.ndim == 4 else "bip,pjc->bjc"
    sums = jnp.einsum(letters, poses, inputs.weights, preferred_element_type=dtype)
    sums = sums.reshape(batch, rows, *sums.shape[1:]).swapaxes(1, 2)
    return sums.reshape(*sums.shape[:2], -1) / (spec.num_parents + spec.leaky)


def _gates(inputs: Inputs) -> Array | None:
    """Returns the gates `[I]` or `[B, I]`, 0 for a child that has no parent left."""
    dtype = accumulation_dtype(inputs.poses.dtype)
    reachable = _reachable(inputs)
    if reachable is None or inputs.gates is None:
        gates = reachable if inputs.gates is None else inputs.gates
        return None if gates is None else gates.astype(dtype)
    reachable = jnp.broadcast_to(reachable, inputs.gates.shape)
    return jnp.where(reachable, inputs.gates.astype(dtype), 0)


def _reachable(inputs: Inputs) -> Array | None:
    """Returns whether a child has a parent with a logit above -infinity; None: all have.

    Logits in a tile are finite, which keeps its softmax a plain one.
    """
    batch, children = inputs.poses.shape[:2]
    if inputs.parent_mask is None:
        return None if inputs.prior is None else reachable(inputs.prior)
    if inputs.prior is None:
        return jnp.broadcast_to(jnp.any(inputs.parent_mask, 1, keepdims=True), (batch, children))
    letters = "bj,ij->bi" if inputs.prior.ndim == 2 else "bj,bij->bi"
    both = (inputs.parent_mask, inputs.prior > -jnp.inf)
    return jnp.einsum(letters, *(x.astype(jnp.float32) for x in both)) > 0


def _masked(inputs: Inputs, state: State) -> State:
    """Puts the mask of the parents into their logits."""
    if inputs.parent_mask is None:
        return state
    dtype = accumulation_dtype(inputs.poses.dtype)
    k = jnp.zeros(inputs.parent_mask.shape, dtype) if state.k is None else state.k
    return state._replace(k=jnp.where(inputs.parent_mask, k, OFF))


def _prepared(spec: Spec, inputs: Inputs, terms: Any) -> Any:
    """Masks the states of a term, or of several; the gradient of a mean is divided by its mass."""
    if not isinstance(terms, Term):
        return tuple(_prepared(spec, inputs, term) for term in terms)
    state = _masked(inputs, terms.state)
    if spec.moments == "sums":
        return Term(state, None, terms.cotangent)
    first = reference.divide(terms.cotangent.first, terms.moments.mass)
    return Term(state, terms.moments, terms.cotangent._replace(first=first))


def _alike(terms: Sequence[Term]) -> list[Term]:
    """Gives all terms the same states: zeros for those that an iteration does not have."""
    fields = []
    for same in zip(*(term.state for term in terms), strict=True):
        like = next((x for x in same if x is not None), None)
        absent = None if like is None else jnp.zeros_like(like)
        fields.append([absent if x is None else x for x in same])
    states = map(State, *fields)
    return [term._replace(state=state) for term, state in zip(terms, states, strict=True)]
