"""The passes by the Triton kernels that hold votes in registers.

Their logits are gaussian with central moments, or linear with sums, which matrices as poses need.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from capsjax.kernels.dispatch import Unsupported
from capsjax.kernels.vote_passes import masks, reference
from capsjax.kernels.vote_passes.config import TritonVotesConfig, triton_votes_config_for
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
)
from capsjax.kernels.vote_passes.triton import votes_walks
from capsjax.kernels.vote_passes.triton.tiles import LOG2_E
from capsjax.kernels.vote_passes.triton.votes_gradients import Iteration, gradients_of_inputs
from capsjax.kernels.vote_passes.triton.votes_tiles import (
    Operands,
    Parents,
    Sizes,
    Slopes,
    Statistics,
    examples_first,
    examples_last,
    prepare_coordinates,
    prepare_poses,
    prepare_states,
    prepare_weights,
    restore_coordinates,
    restore_poses,
    restore_states,
    restore_weights,
    scale_of,
)

# Numbers of a pose and of a vote, padded: a thread has both in registers, and gradients of both.
MAX_NUMBERS = 16


def config_for(spec: Spec, inputs: Inputs, *, device: Device) -> TritonVotesConfig:
    """Return the configuration for a pass.

    Raises:
      Unsupported: The kernels do not accept the inputs, or R·P or R·E is too large.
    """
    dtype, weights = inputs.poses.dtype, inputs.weights
    rules = {
        f"must be float32 or bfloat16, got {dtype}": dtype in (jnp.float32, jnp.bfloat16),
        "must have linear logits and sums, or gaussian logits and central moments": (
            (spec.logits, spec.moments) in (("linear", "sums"), ("gaussian", "central"))
        ),
        "must have weights [I, P, J, E]": weights is not None and weights.ndim == 4,
        "must have a batch of known size": isinstance(inputs.poses.shape[0], int),
        "must lie on one device (jax.shard_map, or Explicit axes)": device.num_devices == 1,
    }
    for rule, holds in rules.items():
        if not holds:
            raise Unsupported(f"routing: inputs of this kernel {rule}")
    sizes = _sizes(spec, inputs, interpret=False)
    if max(sizes.rows * sizes.padded_length, sizes.depth) > MAX_NUMBERS:
        raise Unsupported(
            f"routing: R·P and R·E, with P and E rounded up to multiples of 4, must be at most "
            f"{MAX_NUMBERS}, got R = {sizes.rows}, P = {sizes.length} and E = {sizes.columns}"
        )
    config = triton_votes_config_for(case_of(spec, inputs), processors=device.processors)
    largest = max(
        sizes.capsules * sizes.padded_batch * max(MAX_NUMBERS, sizes.parents),
        sizes.capsules * sizes.parents * sizes.padded_length * sizes.padded_columns,
        sizes.parents * sizes.padded_batch * sizes.depth * max(3, config.sums_ranges),
    )
    if largest >= 2**31:
        raise Unsupported("routing: arrays of this kernel must have fewer than 2**31 elements")
    return config


def moments(
    spec: Spec, inputs: Inputs, state: State, *, config: TritonVotesConfig, interpret: bool
) -> Moments:
    """Compute the sums of votes, or the central moments."""
    sizes = _sizes(spec, inputs, interpret)
    operands = _operands(sizes, inputs)
    softmax = None
    if not is_uniform(inputs, state):
        parents, center = _parents(sizes, inputs, state, state.z), _center(sizes, state.z)
        softmax = votes_walks.statistics(
            config, sizes, operands, parents, center, share=False, d_gated=False
        )
    found = votes_walks.moments(config, sizes, operands, softmax, mass=spec.mass)
    return Moments(
        None if found.zeroth is None else examples_first(sizes, found.zeroth),
        restore_states(sizes, found.first),
        None if found.second is None else restore_states(sizes, found.second),
    )


def chain(
    spec: Spec, inputs: Inputs, term: Term, *, config: TritonVotesConfig, interpret: bool
) -> tuple[State, Kept]:
    """Compute the cotangent of the state, and keep logits and cotangents of the couplings."""
    if term.state.is_empty:
        return State(), nothing_kept(spec, inputs)
    sizes = _sizes(spec, inputs, interpret)
    operands = _operands(sizes, inputs)
    softmax = _statistics(config, sizes, inputs, operands, term, share=True, d_gated=True)
    has_biases = term.state.k is not None
    found = votes_walks.logit_gradients(
        config,
        sizes,
        operands,
        _center(sizes, term.state.z),
        softmax,
        biases=has_biases,
        numbers=term.state.b is not None or term.state.q is not None,
    )
    d_k: MaybeArray = None
    d_b: MaybeArray = None
    d_z: MaybeArray = None
    d_q: MaybeArray = None
    if has_biases:
        d_k = examples_first(sizes, found.zeroth)
    if term.state.b is not None:
        d_b = restore_states(sizes, found.first)
    if term.state.q is not None:
        d_z = restore_states(sizes, found.first) * term.state.q
        d_q = restore_states(sizes, found.second) * -0.5
    of_children = jnp.stack([softmax.normaliser, softmax.share])
    of_votes = softmax.logits, softmax.d_gated
    kept = jax.tree.map(partial(examples_first, sizes), Kept(of_children, of_votes))
    return State(d_k, d_b, d_z, d_q), kept


def input_gradients(
    spec: Spec,
    inputs: Inputs,
    terms: Sequence[Term],
    *,
    constant_couplings: bool,
    config: TritonVotesConfig,
    interpret: bool,
) -> Inputs:
    """Compute the gradients of the inputs, summed over `terms`."""
    sizes = _sizes(spec, inputs, interpret)
    operands = _operands(sizes, inputs)
    has_gates = inputs.gates is not None
    # Of the last iteration, which is nearest to those of the others: means converge.
    mean = _mean(sizes, terms[-1])
    center = _center(sizes, mean)
    iterations = []
    for term in terms:
        if is_uniform(inputs, term.state):
            parents = _parents(sizes, inputs, term.state, mean, term)
            iterations.append(Iteration(parents, None, None))
            continue
        if term.kept is None:
            through_logits = not constant_couplings
            settings = {"share": has_gates or through_logits, "d_gated": through_logits}
            softmax = _statistics(config, sizes, inputs, operands, term, **settings)
        else:
            kept = jax.tree.map(partial(examples_last, sizes), term.kept)
            (normaliser, share), (logits, d_gated) = kept
            softmax = Statistics(normaliser, logits, share, d_gated)
        slopes = _slopes(sizes, term, mean, constant_couplings=constant_couplings)
        iterations.append(Iteration(None, slopes, softmax))
    found = gradients_of_inputs(
        config,
        sizes,
        operands,
        iterations,
        center,
        constant_couplings=constant_couplings,
    )
    d_gates = None
    if has_gates:
        of_passes = [x.softmax.share for x in iterations if x.softmax is not None]
        total = sum(of_passes if found.gates is None else [found.gates, *of_passes])
        d_gates = masks.gates_gradient(inputs, examples_first(sizes, total))
    d_prior = found.prior
    if d_prior is not None and inputs.prior.ndim == 2:
        d_prior = jnp.sum(d_prior, 0)[..., 0]
    elif d_prior is not None:
        d_prior = examples_first(sizes, d_prior)
    elif inputs.prior is not None:
        d_prior = jnp.zeros_like(inputs.prior)
    d_coordinates = None
    if inputs.coordinates is not None:
        d_coordinates = restore_coordinates(sizes, jnp.sum(found.coordinates, 0))
    gradients = Inputs(
        restore_poses(sizes, found.poses),
        restore_weights(sizes, jnp.sum(found.weights, 0)),
        d_gates,
        d_prior,
        d_coordinates,
    )
    like = inputs._replace(parent_mask=None)
    return jax.tree.map(lambda x, y: x.astype(y.dtype), gradients, like)


def _sizes(spec: Spec, inputs: Inputs, interpret: bool) -> Sizes:
    batch, capsules, rows, length = inputs.poses.shape
    columns = inputs.weights.shape[-1]
    of_spec = spec.logits, spec.leaky
    return Sizes(batch, capsules, rows, length, spec.num_parents, columns, *of_spec, interpret)


def _mean(sizes: Sizes, term: Term) -> MaybeArray:
    """Return the mean of central moments; None for sums."""
    return None if sizes.logits == "linear" else term.moments.first


def _center(sizes: Sizes, mean: MaybeArray) -> MaybeArray:
    return None if mean is None else prepare_states(sizes, mean)


def _statistics(
    config: TritonVotesConfig,
    sizes: Sizes,
    inputs: Inputs,
    operands: Operands,
    term: Term,
    **wanted: bool,
) -> Statistics:
    """Compute the statistics of a backward pass."""
    mean = _mean(sizes, term)
    parents, center = _parents(sizes, inputs, term.state, mean, term), _center(sizes, mean)
    return votes_walks.statistics(config, sizes, operands, parents, center, **wanted)


def _slopes(sizes: Sizes, term: Term, center: MaybeArray, *, constant_couplings: bool) -> Slopes:
    """Return the gradients of the votes of a pass, which are computed from the center on."""
    state, cotangent = term.state, term.cotangent
    of_logits: MaybeArray = None
    if sizes.logits == "linear":
        of_weights = prepare_states(sizes, cotangent.first)
        if state.b is not None and not constant_couplings:
            of_logits = prepare_states(sizes, state.b)
        return Slopes(of_weights, of_logits)
    mass, mean, _ = term.moments
    slope = 2 * cotangent.second
    offset = reference.divide(cotangent.first, mass) - slope * (mean - center)
    of_weights = prepare_states(sizes, slope, offset)
    if state.q is not None and not constant_couplings:
        of_logits = prepare_states(sizes, -state.q, state.q * (state.z - center))
    return Slopes(of_weights, of_logits)


def _operands(sizes: Sizes, inputs: Inputs) -> Operands:
    prior, gates, coordinates = inputs.prior, masks.gates(inputs), inputs.coordinates
    if prior is not None:
        prior = masks.finite(prior.astype(jnp.float32)) * LOG2_E
        prior = prior if prior.ndim == 2 else examples_last(sizes, prior)
    if gates is not None:
        gates = examples_last(sizes, jnp.broadcast_to(gates, (sizes.batch, sizes.capsules)))
    return Operands(
        prepare_poses(sizes, inputs.poses),
        prepare_weights(sizes, inputs.weights),
        None if coordinates is None else prepare_coordinates(sizes, coordinates),
        prior,
        gates,
    )


def _parents(
    sizes: Sizes,
    inputs: Inputs,
    state: State,
    center: MaybeArray,
    term: Term | None = None,
) -> Parents:
    """Return the arrays of a pass.

    Args:
      sizes: Sizes of the problem.
      inputs: Those of the pass.
      state: That of the pass.
      center: `[B, J, D]`, from which votes are computed on; None for 0, if there is no mean.
      term: Given if the arrays of the moments are wanted, too.
    """
    masked = masks.masked(inputs, state)
    found: dict[str, Any] = {}
    if masked.k is not None:
        found["k"] = examples_last(sizes, masked.k * LOG2_E)
    if masked.b is not None:
        found["states"] = prepare_states(sizes, masked.b * LOG2_E)
    if masked.q is not None:
        scale = scale_of(masked.q)
        offsets = [] if center is masked.z else [-scale * (masked.z - center)]
        found["states"] = prepare_states(sizes, scale, *offsets)
    if term is None:
        return Parents(**found)
    if term.cotangent.mass is not None:
        found["d_mass"] = examples_last(sizes, term.cotangent.mass)
    if sizes.logits == "linear":
        found["cotangents"] = prepare_states(sizes, term.cotangent.first)
    else:
        mass, mean, _ = term.moments
        first = reference.divide(term.cotangent.first, mass)
        offsets = [] if center is mean else [mean - center]
        found["cotangents"] = prepare_states(sizes, first, term.cotangent.second, *offsets)
    return Parents(**found)
