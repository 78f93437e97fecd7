"""The passes of the TPU backend with gaussian logits and central moments.

The last axis of the kernels' arrays are the examples, or the parents of weights, padded to whole
registers. XLA fuses the transpositions, paddings and casts below; those of the inputs run once for
all passes of a program.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from capsjax.kernels.dispatch import Unsupported
from capsjax.kernels.vote_passes import masks, reference
from capsjax.kernels.vote_passes.config import (
    TPU_LANES,
    TPU_SUBLANES,
    MosaicTpuGaussianConfig,
    TpuGroups,
    mosaic_tpu_gaussian_config_for,
)
from capsjax.kernels.vote_passes.mosaic_tpu import gaussian_gradients, gaussian_sums
from capsjax.kernels.vote_passes.mosaic_tpu.gaussian_sums import Sums
from capsjax.kernels.vote_passes.mosaic_tpu.gaussian_tiles import (
    Children,
    Parents,
    Sizes,
    is_uniform,
)
from capsjax.kernels.vote_passes.passes import (
    Device,
    Inputs,
    Kept,
    Moments,
    Spec,
    State,
    Term,
    case_of,
    nothing_kept,
)

NO_SUMS = Sums(zeroth=False, first=False, second=False)
# Largest poses and votes, whose numbers lie in registers.
# R, P and E of matrices; P and E of vectors.
MOST_COLUMNS = {True: 4, False: 16}


def config_for(spec: Spec, inputs: Inputs, *others: Any, device: Device) -> MosaicTpuGaussianConfig:
    """Return the configuration for a pass.

    Raises:
      Unsupported: The kernels do not support the arguments, or no tile fits into the vector memory
        of the device.
    """
    for rule, holds in _rules(spec, inputs, others, device).items():
        if not holds:
            raise Unsupported(f"routing: inputs of this kernel {rule}")
    is_list = isinstance(others[0], tuple) and not isinstance(others[0], State | Term)
    config = mosaic_tpu_gaussian_config_for(
        case_of(spec, inputs, len(others[0]) if is_list else 1),
        device.kind,
        prior_of_examples=getattr(inputs.prior, "ndim", 2) == 3,
    )
    if config is None:
        raise Unsupported(
            f"routing: states and votes of J = {spec.num_parents} parents exceed the TPU's vector "
            "memory"
        )
    return config


def _rules(spec: Spec, inputs: Inputs, others: Any, device: Device) -> dict[str, bool]:
    """Return what the arguments must be, and whether they are."""
    poses, weights = inputs.poses, inputs.weights
    rows, length = poses.shape[2:]
    states = [x for x in jax.tree.leaves(others, is_leaf=_is_state) if _is_state(x)]
    rules = {
        f"must be float32 or bfloat16, got {poses.dtype}": poses.dtype
        in (jnp.float32, jnp.bfloat16),
        "must have gaussian logits and central moments": (spec.logits, spec.moments)
        == ("gaussian", "central"),
        "must not be leaky": not spec.leaky,
        "must have weights [I, P, J, E]": weights is not None and weights.ndim == 4,
        "must have a batch of known size": isinstance(poses.shape[0], int),
        "must have no state b": all(x.b is None for x in states),
        "must lie on one device (jax.shard_map, or Explicit axes)": device.num_devices == 1,
    }
    if weights is not None and weights.ndim == 4:
        most, found = MOST_COLUMNS[rows > 1], (rows, length, weights.shape[-1])
        rules[f"must have R, P and E of at most {most}, got {', '.join(map(str, found))}"] = (
            max(found) <= most
        )
    return rules


def _is_state(x: Any) -> bool:
    return isinstance(x, State)


def moments(
    spec: Spec, inputs: Inputs, state: State, *, config: MosaicTpuGaussianConfig, interpret: Any
) -> Moments:
    """Compute the moments: sums over children of couplings times votes."""
    sizes = _sizes(spec, inputs, config.sums, config.cores)
    kernel = gaussian_sums.Kernel(
        sizes,
        wanted=Sums(zeroth=True, first=True, second=True),
        is_chain=False,
        keeps=False,
        memory=config.sums.memory,
        interpret=interpret,
    )
    parents = _state(inputs, state)
    found, _ = gaussian_sums.sums(kernel, _children(sizes, inputs), _padded_parents(sizes, parents))
    return _merged(Moments(*_of_examples(inputs, found)))


def chain(
    spec: Spec, inputs: Inputs, term: Term, *, config: MosaicTpuGaussianConfig, interpret: Any
) -> tuple[State, Kept]:
    """Compute the cotangent of the state from that of the moments."""
    sizes = _sizes(spec, inputs, config.sums, config.cores)
    has_numbers = term.state.z is not None
    wanted = Sums(zeroth=term.state.k is not None, first=has_numbers, second=has_numbers)
    parents, children = _parents(inputs, term), _children(sizes, inputs)
    found, kept = _chain(sizes, children, parents, wanted, config, interpret)
    added = jax.tree.map(lambda x: x.sum(0), _of_examples(inputs, found))
    state = State(k=added.zeroth)
    if has_numbers:
        state = state._replace(z=term.state.q * added.first, q=-0.5 * added.second)
    of_children = _of_children(inputs, kept).swapaxes(0, 1)
    return state, nothing_kept(spec, inputs)._replace(of_children=of_children)


def input_gradients(
    spec: Spec,
    inputs: Inputs,
    terms: Sequence[Term],
    *,
    constant_couplings: bool,
    config: MosaicTpuGaussianConfig,
    interpret: Any,
) -> Inputs:
    """Compute the gradients of the inputs, summed over `terms`."""
    sizes = _sizes(spec, inputs, config.gradients, config.cores)
    children = _children(sizes, inputs)
    of_terms = []
    for term in terms:
        parents = _parents(inputs, term)
        kept = None if term.kept is None else term.kept.of_children.swapaxes(0, 1)
        if kept is None and not is_uniform(children, parents):
            only_softmax = constant_couplings and inputs.gates is None
            of_softmax = parents._replace(mean=None) if only_softmax else parents
            of_sums = _sizes(spec, inputs, config.sums, config.cores)
            of_chain = of_sums, _children(of_sums, inputs), of_softmax
            kept = _of_children(inputs, _chain(*of_chain, NO_SUMS, config, interpret)[1])
        of_terms.append((parents, kept))
    uniform = any(is_uniform(children, parents) for parents, _ in of_terms)
    through_logits = not constant_couplings
    wanted = Children(
        poses=True,
        weights=True,
        prior=children.prior is not None and through_logits,
        own_prior=children.own_prior is not None and through_logits,
        gates=inputs.gates is not None and uniform,
        coordinates=inputs.coordinates is not None,
    )
    kernel = gaussian_gradients.Kernel(
        sizes, wanted, constant_couplings, config.gradients.memory, interpret
    )
    padded = [
        _padded_parents(sizes, parents)._replace(
            kept=None if kept is None else _of_both(sizes, kept.swapaxes(1, 2))
        )
        for parents, kept in of_terms
    ]
    found = gaussian_gradients.gradients(kernel, children, padded)
    kept_of_gates = [kept[1] for _, kept in of_terms if kept is not None]
    return _inputs(spec, inputs, found, kept_of_gates)


def _chain(
    sizes: Sizes,
    children: Children,
    parents: Parents,
    wanted: Sums,
    config: MosaicTpuGaussianConfig,
    interpret: Any,
) -> tuple[Sums, Array]:
    kernel = gaussian_sums.Kernel(
        sizes,
        wanted,
        is_chain=True,
        keeps=True,
        memory=config.sums.memory,
        interpret=interpret,
    )
    found, kept = gaussian_sums.sums(kernel, children, _padded_parents(sizes, parents))
    assert kept is not None  # because the kernel keeps it
    return found, kept


# Conversion of the inputs, [B, I, …], to arrays of the kernels.


def _sizes(spec: Spec, inputs: Inputs, tile: TpuGroups, cores: int) -> Sizes:
    batch, children, rows, length = inputs.poses.shape
    blocks = -(-children // (tile.groups * TPU_SUBLANES))
    halves = min(cores, blocks)
    return Sizes(
        I=children,
        J=spec.num_parents,
        R=rows,
        P=length,
        E=inputs.weights.shape[-1],
        example_tiles=-(-batch // TPU_LANES),
        halves=halves,
        steps=-(-blocks // halves),
        groups=tile.groups,
        together=tile.together,
    )


def _padded(x: Array, *shape: int) -> Array:
    """Pad the last axes to a shape, with zeros."""
    shape = (*x.shape[: x.ndim - len(shape)], *shape)
    return jnp.pad(x, [(0, a - b) for a, b in zip(shape, x.shape, strict=True)])


def _of_both(sizes: Sizes, x: Array) -> Array:
    """Pad `[…, I, B]`."""
    padded = sizes.halves * sizes.steps * sizes.n
    return _padded(x.astype(jnp.float32), padded, sizes.example_tiles * TPU_LANES)


def _of_lanes(sizes: Sizes, x: Array) -> Array:
    """Pad `[…, I, J]`, and split the parents into tiles: `[tiles, …, I', 128]`."""
    padded = sizes.halves * sizes.steps * sizes.n
    x = _padded(x.astype(jnp.float32), padded, sizes.parent_tiles * TPU_LANES)
    return jnp.moveaxis(x.reshape(*x.shape[:-1], -1, TPU_LANES), -2, 0)


def _children(sizes: Sizes, inputs: Inputs) -> Children:
    batch, children, rows, length = inputs.poses.shape
    poses = inputs.poses.transpose(2, 3, 1, 0).reshape(rows * length, children, batch)
    weights = inputs.weights.transpose(1, 3, 0, 2)
    weights = weights.reshape(length * sizes.E, children, sizes.J)
    prior = own_prior = coordinates = None
    if inputs.prior is not None:
        found = masks.finite(inputs.prior.astype(jnp.float32))
        if found.ndim == 2:
            prior = _of_lanes(sizes, found)
        else:
            own_prior = _of_both(sizes, found.transpose(2, 1, 0))
    gates = masks.gates(inputs)
    if gates is not None:
        gates = _of_both(sizes, jnp.broadcast_to(gates, (batch, children)).T)
    if inputs.coordinates is not None:
        coordinates = inputs.coordinates.astype(jnp.float32)
        coordinates = _padded(coordinates, sizes.halves * sizes.steps * sizes.n, TPU_LANES)
    return Children(
        _of_both(sizes, poses), _of_lanes(sizes, weights), prior, own_prior, gates, coordinates
    )


def _state(inputs: Inputs, state: State) -> Parents:
    """Return the state, with the parent mask in it, `[B, J, …]`."""
    masked = masks.masked(inputs, state)
    return Parents(masked.k, masked.z, None if masked.q is None else 0.5 * masked.q)


def _parents(inputs: Inputs, term: Term) -> Parents:
    """Return the state, moments and cotangents of an iteration, `[B, J, …]`."""
    cotangent = term.cotangent
    return _state(inputs, term.state)._replace(
        mean=term.moments.first,
        d_mass=cotangent.mass,
        d_first=reference.divide(cotangent.first, term.moments.mass),
        d_second=cotangent.second,
    )


def _padded_parents(sizes: Sizes, parents: Parents) -> Parents:
    """Move the examples of arrays `[B, J, …]` to the last axis."""
    examples = sizes.example_tiles * TPU_LANES
    return jax.tree.map(
        lambda x: _padded(jnp.moveaxis(x.astype(jnp.float32), 0, -1), examples), parents
    )


# Conversion of results.


def _of_examples(inputs: Inputs, found: Sums) -> Sums:
    """Return the sums of each half, `[halves, B, J, …]`."""
    batch = inputs.poses.shape[0]
    return jax.tree.map(lambda x: jnp.moveaxis(x, -1, 1)[:, :batch], found)


def _of_children(inputs: Inputs, x: Array) -> Array:
    """Return `[…, B, I]` for `[…, I', B']`."""
    batch, children = inputs.poses.shape[:2]
    return x[..., :children, :batch].swapaxes(-1, -2)


def _merged(halves: Moments) -> Moments:
    """Merge the moments of the halves (Chan, Golub and LeVeque 1979)."""
    if len(halves.mass) == 1:
        return jax.tree.map(lambda x: x[0], halves)
    mass = halves.mass.sum(0)
    fraction = (halves.mass[1] / jnp.where(mass > 0, mass, 1))[..., None]
    step = halves.first[1] - halves.first[0]
    second = halves.second.sum(0) + step * step * fraction * halves.mass[0][..., None]
    return Moments(mass, halves.first[0] + fraction * step, second)


def _inputs(spec: Spec, inputs: Inputs, found: Children, kept: Sequence[Array]) -> Inputs:
    """Convert the gradients of `_children` to those of the inputs.

    Args:
      spec: Description of the pass.
      inputs: The inputs.
      found: Gradients.
      kept: For each term without equal couplings, its gradient of the gates `[B, I]`.
    """
    batch, children, rows, length = inputs.poses.shape
    parents, columns = spec.num_parents, inputs.weights.shape[-1]

    def of_lanes(x: Array) -> Array:  # [tiles, …, I', 128] to [I, …, J]
        x = jnp.moveaxis(x, 0, -2)
        x = x.reshape(*x.shape[:-2], -1)[..., :children, :parents]
        return jnp.moveaxis(x, -2, 0)

    poses = _of_children(inputs, found.poses)
    poses = poses.reshape(rows, length, batch, children).transpose(2, 3, 0, 1)
    weights = of_lanes(found.weights).reshape(children, length, columns, parents)
    prior = gates = coordinates = None
    if found.prior is not None:
        prior = of_lanes(found.prior)
    elif found.own_prior is not None:
        prior = _of_children(inputs, found.own_prior).transpose(1, 2, 0)
    elif inputs.prior is not None:  # constant couplings
        prior = jnp.zeros_like(inputs.prior)
    if inputs.gates is not None:
        parts = [*kept, *([] if found.gates is None else [_of_children(inputs, found.gates)])]
        gates = masks.gates_gradient(inputs, sum(parts[1:], parts[0]))
    if inputs.coordinates is not None:
        coordinates = found.coordinates[:children, : rows * columns]
    gradients = Inputs(poses, weights.swapaxes(2, 3), gates, prior, coordinates)
    like = inputs._replace(parent_mask=None)
    return jax.tree.map(lambda d, x: d.astype(x.dtype), gradients, like)
