"""The passes in plain JAX, on any platform, one tile of votes at a time.

There are M tiles of m examples and N tiles of n children; the votes of a tile are `[n, J, D, m]`.
Examples are the last axis, because a CPU vectorises along it. Along D, columns of a matrix pose
vary slowest and rows fastest, so that one matrix product computes a tile. If the caller gives the
votes, or all parents share them, the passes are those of `reference`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from capsjax.kernels.dtypes import accumulation_dtype
from capsjax.kernels.vote_passes import masks, reference
from capsjax.kernels.vote_passes.config import XlaConfig, xla_config_for
from capsjax.kernels.vote_passes.passes import (
    Device,
    Inputs,
    Kept,
    MaybeArray,
    Moments,
    Spec,
    State,
    Term,
    case_of,
    is_uniform,
    nothing_kept,
    votes_depth,
)


class Tile(NamedTuple):
    """The inputs of a tile, some of them, or their gradients."""

    poses: MaybeArray = None  # [n, P, R·m]
    weights: MaybeArray = None  # [n, P, J·E], or [P, J·E] if all children share them
    gates: MaybeArray = None  # [n, 1, m], or [n, 1, 1] if all examples share them
    prior: MaybeArray = None  # [n, J, m], or [n, J, 1] if all examples share it
    coordinates: MaybeArray = None  # [n, 1, D, 1]


class Tiles(NamedTuple):
    """All inputs, by the axes along which they are tiled; the last tiles are zero-padded."""

    both: Tile  # tiled by examples and children, [M, N, …]
    children: Tile  # tiled by children, [N, …]
    untiled: Tile
    examples: Any  # m, an int or a symbolic dimension


class Factors(NamedTuple):
    """Couplings of one iteration, and gradients of gates and logits; None if not requested."""

    couplings: Array  # [n, J, m]
    d_gates: MaybeArray  # [n, 1, m]
    d_logits: MaybeArray  # [n, J, m]


def config_for(spec: Spec, inputs: Inputs, *others: object, device: Device) -> XlaConfig:
    """Return the tile sizes for a pass."""
    del others
    return xla_config_for(case_of(spec, inputs), devices=device.num_devices)


def moments(spec: Spec, inputs: Inputs, state: State, *, config: XlaConfig) -> Moments:
    """Compute the moments: sums over children of couplings times votes."""
    if inputs.weights is None:
        return reference.moments(spec, inputs, state)
    central = spec.moments == "central"
    needs_mass = spec.mass or central
    if is_uniform(inputs, state) and not needs_mass and inputs.coordinates is None:
        return Moments(None, uniform_sums(spec, inputs))

    def step(carry: Moments, tile: Tile, state: State) -> tuple[Moments, None]:
        votes = _votes(spec, inputs, tile)
        weights = _gated(tile, _couplings(spec, tile, votes, state))
        mass = _sum_halves(weights, 0) if needs_mass else None
        first = _sum_halves(weights[:, :, None] * votes, 0)
        if mass is None or not central:
            return jax.tree.map(jnp.add, carry, Moments(mass, first)), None
        mean = _divide(first, mass)
        differences = votes - mean[None]
        second = _sum_halves(weights[:, :, None] * differences * differences, 0)
        return reference.merge(carry, Moments(mass, mean, second), axis=1), None

    tiles = _split(config, spec, inputs)
    zeros = partial(_zeros, inputs)
    sums = zeros(spec.num_parents, votes_depth(inputs), tiles.examples)
    mass = zeros(spec.num_parents, tiles.examples) if needs_mass else None
    start = Moments(mass, sums, sums if central else None)
    parents = _split_parents(tiles, inputs, masks.masked(inputs, state))
    found, _ = _scan_tiles(tiles, parents, step, start)
    return _join_parents(inputs, found)


def chain(spec: Spec, inputs: Inputs, term: Term, *, config: XlaConfig) -> tuple[State, Kept]:
    """Compute the cotangent of the state from that of the moments; keep nothing."""
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
            k = _sum_halves(d_logits, 0)
        if wanted.b is not None:
            cosine = spec.logits == "cosine"
            factors = d_logits * _inverse_lengths(votes) if cosine else d_logits
            b = _sum_halves(factors[:, :, None] * votes, 0)
        if wanted.q is not None:
            differences = votes - term.state.z[None]
            z = _sum_halves(d_logits[:, :, None] * differences, 0)
            q = -0.5 * _sum_halves(d_logits[:, :, None] * differences * differences, 0)
        return jax.tree.map(jnp.add, carry, State(k, b, z, q)), None

    tiles = _split(config, spec, inputs)
    start = jax.tree.map(lambda x: _zeros(inputs, *x.shape[1:], tiles.examples), wanted)
    parents = _split_parents(tiles, inputs, _prepared(spec, inputs, term))
    found = _join_parents(inputs, _scan_tiles(tiles, parents, step, start)[0])
    found = found if wanted.q is None else found._replace(z=wanted.q * found.z)
    return found, nothing_kept(spec, inputs)


def input_gradients(
    spec: Spec,
    inputs: Inputs,
    terms: Sequence[Term],
    *,
    constant_couplings: bool,
    config: XlaConfig,
) -> Inputs:
    """Compute the gradients of the inputs, summed over `terms`."""
    if inputs.weights is None:
        return reference.input_gradients(spec, inputs, terms, constant_couplings=constant_couplings)
    tiles = _split(config, spec, inputs)
    split = [_split_parents(tiles, inputs, x) for x in _prepared(spec, inputs, tuple(terms))]
    # Uniform couplings do not depend on the votes, so they are constants.
    uniform = [x for x, term in zip(split, terms, strict=True) if is_uniform(inputs, term.state)]
    others = [x for x, term in zip(split, terms, strict=True) if not is_uniform(inputs, term.state)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x, 1), *_aligned(others)) if others else None

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
            # A loop, because it writes its results to memory: without one XLA:CPU recomputes them
            # for each of D components.
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

    def one_child_tile(untiled: Tile, xs: Any) -> tuple[Tile, tuple[Tile, Tile]]:
        both, children = xs

        def one_example_tile(carry: tuple[Tile, Tile], xs: Any) -> tuple[tuple[Tile, Tile], Tile]:
            both, *parents = xs
            found = one_tile(_combined(both, children, tiles.untiled), *parents)
            summed = found._replace(
                prior=None if children.prior is None else jnp.sum(found.prior, -1, keepdims=True),
                coordinates=None
                if children.coordinates is None
                else jnp.sum(found.coordinates, -1, keepdims=True),
            )
            carry = jax.tree.map(jnp.add, carry, tuple(_selected(summed, x) for x in carry))
            return carry, _selected(found, both._replace(gates=inputs.gates))

        start = like(children._replace(gates=None)), untiled
        (children, untiled), both = lax.scan(one_example_tile, start, (both, uniform, stacked))
        return untiled, (both, children)

    by_children = jax.tree.map(lambda x: x.swapaxes(0, 1), tiles.both)
    untiled, found = lax.scan(one_child_tile, like(tiles.untiled), (by_children, tiles.children))
    return _join_inputs(inputs, _combined(*found, untiled))


def couplings(spec: Spec, inputs: Inputs, state: State, *, config: XlaConfig) -> Array:
    """Compute the couplings `[B, I, J]`, without gates."""
    if inputs.weights is None or is_uniform(inputs, state):
        return reference.couplings(spec, inputs, state)

    def step(carry: None, tile: Tile, state: State) -> tuple[None, Array]:
        return None, _gated(tile, _couplings(spec, tile, _votes(spec, inputs, tile), state))

    inputs = inputs._replace(gates=None)
    tiles = _split(config, spec, inputs)
    parents = _split_parents(tiles, inputs, masks.masked(inputs, state))
    _, found = _scan_tiles(tiles, parents, step, None)  # [M, N, n, J, m]
    found = found.transpose(0, 4, 1, 2, 3)
    batch, children = inputs.poses.shape[:2]
    return found.reshape(-1, found.shape[2] * found.shape[3], spec.num_parents)[:batch, :children]


# Functions of one tile: votes are [n, J, D, m], mass and k [J, m], other moments and states
# [J, D, m].


def _votes(spec: Spec, inputs: Inputs, tile: Tile) -> Array:
    """Compute the votes of a tile."""
    letters = "npx,npy->nxy" if tile.weights.ndim == 3 else "px,npy->nxy"
    dtype = accumulation_dtype(tile.poses.dtype)
    votes = jnp.einsum(letters, tile.weights, tile.poses, preferred_element_type=dtype)
    # The barriers in this file keep XLA:CPU from fusing votes and couplings into every sum that
    # reads them, which recomputes them.
    depth = votes_depth(inputs)
    votes = lax.optimization_barrier(votes).reshape(len(votes), spec.num_parents, depth, -1)
    return votes if tile.coordinates is None else votes + tile.coordinates


def _through_product(tile: Tile, d_votes: Array) -> tuple[Array, Array]:
    """Compute the gradients of a tile's poses and weights from those of its votes."""
    d_votes = d_votes.reshape(len(d_votes), tile.weights.shape[-1], -1)
    own = "n" if tile.weights.ndim == 3 else ""
    weights, poses = (x.astype(d_votes.dtype) for x in (tile.weights, tile.poses))
    d_poses = jnp.einsum(f"{own}px,nxy->npy", weights, d_votes)
    return d_poses, jnp.einsum(f"npy,nxy->{own}px", poses, d_votes)


def _couplings(spec: Spec, tile: Tile, votes: Array, state: State) -> Array:
    """Compute the couplings `[n, J, m]`, without gates."""
    shape = votes.shape[0], votes.shape[1], votes.shape[3]
    if tile.prior is None and state.is_empty:
        return jnp.full(shape, 1 / (spec.num_parents + spec.leaky), votes.dtype)
    logits = jnp.zeros(shape, votes.dtype)
    if tile.prior is not None:
        logits += tile.prior
    if state.k is not None:
        logits += state.k[None]
    if state.b is not None:
        agreement = _sum_halves(votes * state.b[None], 2)
        logits += agreement * _inverse_lengths(votes) if spec.logits == "cosine" else agreement
    if state.q is not None:
        differences = votes - state.z[None]
        logits -= 0.5 * _sum_halves(differences * differences * state.q[None], 2)
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
    """Compute couplings, and gradients of gates and logits, from a result of `_prepared`."""
    if couplings is None:
        couplings = _couplings(spec, tile, votes, term.state)
    if constant_couplings and not gates:
        return Factors(couplings, None, None)
    mass, first, second = term.cotangent
    if spec.moments == "sums":
        d_weights = _sum_halves(votes * first[None], 2)
    else:
        differences = votes - term.moments.first[None]
        d_weights = _sum_halves(differences * (first[None] + differences * second[None]), 2)
    if mass is not None:
        d_weights += mass[None]
    d_gates = jnp.sum(couplings * d_weights, 1, keepdims=True) if gates else None
    if constant_couplings:
        return Factors(couplings, d_gates, None)
    d_couplings = _gated(tile, d_weights)
    mean = jnp.sum(couplings * d_couplings, axis=1, keepdims=True)
    return Factors(couplings, d_gates, lax.optimization_barrier(couplings * (d_couplings - mean)))


def _through_moments(spec: Spec, tile: Tile, votes: Array, term: Term, couplings: Array) -> Array:
    """Compute the gradient of the votes through the moments, at constant couplings."""
    weights = _gated(tile, couplings)[:, :, None]
    if spec.moments == "sums":
        return weights * term.cotangent.first[None]
    differences = votes - term.moments.first[None]
    return weights * (term.cotangent.first[None] + 2 * differences * term.cotangent.second[None])


def _through_logits(spec: Spec, votes: Array, state: State, d_logits: Array) -> Array:
    """Compute the gradient of the votes through the logits."""
    d_votes = jnp.zeros_like(votes)
    if state.b is not None and spec.logits == "cosine":
        inverse = _inverse_lengths(votes)
        cosine = _sum_halves(votes * state.b[None], 2) * inverse
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
    """Compute 1/|v|, `[n, J, m]`, with 0 for zero votes."""
    squares = _sum_halves(votes * votes, 2)
    return jnp.where(squares > 0, lax.rsqrt(jnp.where(squares > 0, squares, 1)), 0)


def _divide(sums: Array, mass: Array) -> Array:
    """Divide sums `[J, D, m]` by a mass `[J, m]`; return 0 where the mass is 0."""
    inverse = jnp.where(mass > 0, 1 / jnp.where(mass > 0, mass, 1), 0)
    return sums * inverse[:, None]


def _sum_halves(x: Array, axis: int) -> Array:
    """Sum over an axis; XLA:CPU is twice as fast with halves added first, up to four times."""
    for _ in range(4):
        half, odd = divmod(x.shape[axis], 2)
        if odd:
            break
        x = lax.slice_in_dim(x, 0, half, axis=axis) + lax.slice_in_dim(x, half, None, axis=axis)
    return jnp.sum(x, axis)


# Splitting arrays into tiles, and joining tiles.


def _scan_tiles(
    tiles: Tiles, parents: Any, step: Callable[..., tuple[Any, Any]], start: Any
) -> tuple[Any, Any]:
    """Scan `step(carry, tile, parents)` over the tiles of children, for each tile of examples."""

    def all_children(xs: Any) -> Any:
        both, parents = xs

        def one_tile(carry: Any, xs: Any) -> tuple[Any, Any]:
            return step(carry, _combined(*xs, tiles.untiled), parents)

        return lax.scan(one_tile, start, (both, tiles.children))

    return lax.map(all_children, (tiles.both, parents))


def _combined(*parts: Tile) -> Tile:
    """Combine parts of a tile that have different fields."""
    return Tile(
        *(next((x for x in same if x is not None), None) for same in zip(*parts, strict=True))
    )


def _selected(tile: Tile, fields: Tile) -> Tile:
    """Return the fields of a tile that are not None in `fields`."""
    return Tile(*(None if f is None else x for x, f in zip(tile, fields, strict=True)))


def _zeros(inputs: Inputs, *shape: Any) -> Array:
    """Return zeros in the accumulation dtype, which vary over the mesh axes of the poses."""
    return jnp.zeros_like(inputs.poses, accumulation_dtype(inputs.poses.dtype), shape)


def _split(config: XlaConfig, spec: Spec, inputs: Inputs) -> Tiles:
    children = inputs.poses.shape[1]
    dtype = accumulation_dtype(inputs.poses.dtype)
    depth, columns = votes_depth(inputs), inputs.weights.shape[-1]
    count = -(-children // config.children)
    gates = masks.gates(inputs)
    is_padded = count * config.children != children
    if is_padded and gates is None and (spec.mass or spec.moments == "central"):
        gates = jnp.ones(children, dtype)  # the padding gets gate 0

    def by_children(x: Array, axis: int = 0) -> Array:
        missing = count * config.children - children
        x = jnp.pad(x, [(0, missing if k == axis else 0) for k in range(x.ndim)])
        return x.reshape(*x.shape[:axis], count, config.children, *x.shape[axis + 1 :])

    def by_both(x: Array) -> Array:  # [B, I, …] to [M, N, n, …, m]
        return _split_examples(config.examples, by_children(x, 1))

    length, rows = inputs.poses.shape[3], inputs.poses.shape[2]
    poses = by_both(inputs.poses.swapaxes(2, 3).reshape(-1, children, length * rows))
    prior = inputs.prior
    if prior is not None:
        prior = masks.finite(prior.astype(dtype))
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
        untiled=Tile(weights=weights if is_shared else None),
        examples=config.examples,
    )


def _split_examples(size: Any, x: Array) -> Array:
    """Split `[B, …]` into tiles of examples, `[M, …, m]`."""
    count = -(-x.shape[0] // size)
    x = jnp.pad(x, ((0, count * size - x.shape[0]), *[(0, 0)] * (x.ndim - 1)))
    return jnp.moveaxis(x.reshape(count, size, *x.shape[1:]), 1, -1)


def _join_inputs(inputs: Inputs, found: Tile) -> Inputs:
    """Join gradients: those tiled by both are [N, M, …, m], by children [N, …]."""
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
        gates = masks.gates_gradient(inputs, of_both(found.gates)[..., 0])
    gradients = Inputs(
        of_both(poses).swapaxes(2, 3),
        weights.reshape(inputs.weights.shape),
        gates,
        prior,
        coordinates,
    )
    like = inputs._replace(parent_mask=None)
    return jax.tree.map(lambda x, y: x.astype(y.dtype), gradients, like)


def _split_parents(tiles: Tiles, inputs: Inputs, tree: Any) -> Any:
    """Split arrays `[B, J]` or `[B, J, D]` into tiles, `[M, J, m]` or `[M, J, D, m]`."""
    split = partial(_split_examples, tiles.examples)
    return jax.tree.map(lambda x: split(_columns_first(inputs, x) if x.ndim == 3 else x), tree)


def _join_parents(inputs: Inputs, tree: Any) -> Any:
    """Join tiles `[M, J, m]` or `[M, J, D, m]` to arrays `[B, J]` or `[B, J, D]`."""

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, -1, 1)
        x = x.reshape(-1, *x.shape[2:])[: inputs.poses.shape[0]]
        return _rows_first(inputs, x) if x.ndim == 3 else x

    return jax.tree.map(join, tree)


def _columns_first(inputs: Inputs, x: Array) -> Array:
    """Transpose the matrices [R, E] along the last axis, D, to [E, R]."""
    return _transpose(x, inputs.poses.shape[2])


def _rows_first(inputs: Inputs, x: Array) -> Array:
    """Invert `_columns_first`."""
    return _transpose(x, x.shape[-1] // inputs.poses.shape[2])


def _transpose(x: Array, rows: int) -> Array:
    return x.reshape(*x.shape[:-1], rows, -1).swapaxes(-2, -1).reshape(x.shape)


def uniform_sums(spec: Spec, inputs: Inputs) -> Array:
    """Compute the sums `[B, J, D]` with uniform couplings, by one matrix product."""
    dtype = accumulation_dtype(inputs.poses.dtype)
    poses = inputs.poses
    if inputs.gates is not None:
        poses = poses.astype(dtype) * inputs.gates.astype(dtype)[..., None, None]
    batch, children, rows, length = poses.shape
    poses = poses.swapaxes(1, 2).reshape(batch * rows, children, length)
    letters = "bip,ipje->bje" if inputs.weights.ndim == 4 else "bip,pje->bje"
    sums = jnp.einsum(letters, poses, inputs.weights, preferred_element_type=dtype)
    sums = sums.reshape(batch, rows, *sums.shape[1:]).swapaxes(1, 2)
    return sums.reshape(*sums.shape[:2], -1) / (spec.num_parents + spec.leaky)


def _prepared(spec: Spec, inputs: Inputs, terms: Any) -> Any:
    """Mask the states of one term or several, and divide cotangents of means by the mass."""
    if not isinstance(terms, Term):
        return tuple(_prepared(spec, inputs, term) for term in terms)
    state = masks.masked(inputs, terms.state)
    if spec.moments == "sums":
        return Term(state, None, terms.cotangent)
    first = reference.divide(terms.cotangent.first, terms.moments.mass)
    return Term(state, terms.moments, terms.cotangent._replace(first=first))


def _aligned(terms: Sequence[Term]) -> list[Term]:
    """Give all terms the same states, with zeros for absent ones, so that they can be stacked."""
    fields = []
    for same in zip(*(term.state for term in terms), strict=True):
        like = next((x for x in same if x is not None), None)
        absent = None if like is None else jnp.zeros_like(like)
        fields.append([absent if x is None else x for x in same])
    states = map(State, *fields)
    return [term._replace(state=state) for term, state in zip(terms, states, strict=True)]
