"""The passes of the TPU backend, on top of `routing_pass`.

Poses enter the kernels as `[B, P, I]` and weights as `[P, J, D, I]`, XLA's own layouts of these
arrays on a TPU, so the transpositions below copy nothing.
"""

import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from capsjax.kernels.dispatch import Unsupported
from capsjax.kernels.vote_passes import linear
from capsjax.kernels.vote_passes.config import (
    TPU_LANES,
    MosaicTpuConfig,
    TpuTile,
    mosaic_tpu_config_for,
)
from capsjax.kernels.vote_passes.linear import Operands
from capsjax.kernels.vote_passes.mosaic_tpu.problem import Arrays, Parents, Problem, Sums
from capsjax.kernels.vote_passes.mosaic_tpu.routing_pass import routing_pass
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
    one_after_the_other,
)
from capsjax.kernels.vote_passes.precision import parts

NO_SUMS = Sums(first=False, mass=False)


def config_for(spec: Spec, inputs: Inputs, *others: Any, device: Device) -> MosaicTpuConfig:
    """Return the configuration for a pass.

    Raises:
      Unsupported: `linear.check` refuses the pass, or no tile fits into the vector memory of the
        device.
    """
    linear.check(spec, inputs, device, platform="tpu")
    is_list = isinstance(others[0], tuple) and not isinstance(others[0], State | Term)
    config = mosaic_tpu_config_for(
        case_of(spec, inputs, len(others[0]) if is_list else 1),
        device.kind,
        prior_of_examples=getattr(inputs.prior, "ndim", 2) == 3,
    )
    if config.sums is None or config.gradients is None:
        raise Unsupported(
            f"routing: tiles of weights [I, P, J, D] = {inputs.weights.shape} exceed the TPU's "
            "vector memory"
        )
    return config


def moments(
    spec: Spec, inputs: Inputs, state: State, *, config: MosaicTpuConfig, interpret: Any
) -> Moments:
    """Compute the moments: sums over children of couplings times votes."""
    term = Term(state, None, Moments(None, None))
    wanted = Sums(first=True, mass=spec.mass)
    sums, _ = _run(spec, inputs, [term], config, config.sums, interpret, sums=wanted)
    return Moments(sums.mass, sums.first)


def chain(
    spec: Spec, inputs: Inputs, term: Term, *, config: MosaicTpuConfig, interpret: Any
) -> tuple[State, Kept]:
    """Compute the cotangent of the state from that of the moments."""
    wanted = Sums(first=term.state.b is not None, mass=term.state.k is not None)
    sums, _ = _run(spec, inputs, [term], config, config.sums, interpret, sums=wanted)
    return State(sums.mass, sums.first), nothing_kept(spec, inputs)


def input_gradients(
    spec: Spec,
    inputs: Inputs,
    terms: Sequence[Term],
    *,
    constant_couplings: bool,
    config: MosaicTpuConfig,
    interpret: Any,
) -> Inputs:
    """Compute the gradients of the inputs, summed over `terms`."""
    _, found = _run(
        spec,
        inputs,
        terms,
        config,
        config.gradients,
        interpret,
        gradients=True,
        constant_couplings=constant_couplings,
    )
    return jax.tree.map(lambda d, x: d.astype(x.dtype), found, inputs._replace(parent_mask=None))


def chain_and_input_gradients(
    spec: Spec,
    inputs: Inputs,
    term: Term,
    so_far: Inputs | None,
    *,
    config: MosaicTpuConfig,
    interpret: Any,
) -> tuple[State, Inputs]:
    """Compute the cotangent of the state, and add the term's input gradients to those `so_far`."""
    if config.fused is None:
        this = sys.modules[__name__]
        settings = {"config": config, "interpret": interpret}
        return one_after_the_other(this, spec, inputs, term, so_far, **settings)
    wanted = Sums(first=term.state.b is not None, mass=term.state.k is not None)
    sums, found = _run(
        spec,
        inputs,
        [term],
        config,
        config.fused,
        interpret,
        sums=wanted,
        gradients=True,
        so_far=so_far,
    )
    return State(sums.mass, sums.first), found


def _run(
    spec: Spec,
    inputs: Inputs,
    terms: Sequence[Term],
    config: MosaicTpuConfig,
    tile: TpuTile | None,
    interpret: Any,
    *,
    sums: Sums = NO_SUMS,
    gradients: bool = False,
    constant_couplings: bool = False,
    so_far: Inputs | None = None,
) -> tuple[Sums, Any]:
    """Run a pass; return the sums `[B, J, D]` and `[B, J]`, and the gradients in float32."""
    assert tile is not None  # else `config_for` raises
    operands = linear.operands(inputs)
    capsules, length, parents, depth = operands.weights.shape
    wanted = Arrays(
        poses=gradients,
        weights=gradients,
        prior=gradients and operands.prior is not None and not constant_couplings,
        gates=gradients and inputs.gates is not None,
    )
    problem = Problem(
        tile=tile,
        B=operands.poses.shape[0],
        P=length,
        J=parents,
        D=depth,
        I=capsules,
        halves=min(config.cores, -(-capsules // TPU_LANES)),
        leaky=spec.leaky,
        parts=parts("tpu"),
        interpret=interpret,
        sums=sums,
        gradients=wanted,
        constant_couplings=constant_couplings,
    )
    of_parents = [_parents(problem, inputs, term.state, term.cotangent) for term in terms]
    start = None if so_far is None else _start(so_far)
    found, d_arrays = routing_pass(problem, _arrays(operands), of_parents, start)
    return _of_examples(problem, found), _inputs(inputs, d_arrays) if gradients else None


def _arrays(operands: Operands) -> Arrays:
    """Move the capsules of the operands to the last axis."""
    prior = operands.prior
    if prior is not None:
        prior = prior.T[:, None] if prior.ndim == 2 else prior.transpose(2, 0, 1)
    return Arrays(
        operands.poses.transpose(0, 2, 1),
        operands.weights.transpose(1, 2, 3, 0),
        prior,
        operands.gates,
    )


def _start(so_far: Inputs) -> Arrays:
    """Convert gradients of the inputs to those of `_arrays`."""
    prior = so_far.prior
    if prior is not None:
        prior = prior.T[:, None] if prior.ndim == 2 else prior.transpose(2, 0, 1)
    return Arrays(
        so_far.poses[:, :, 0].transpose(2, 0, 1),
        so_far.weights.transpose(1, 2, 3, 0),
        prior,
        so_far.gates,
    )


def _parents(problem: Problem, inputs: Inputs, state: State, cotangent: Moments) -> Parents:
    """Split states and cotangents `[B, J, …]` into tiles `[tiles, J, …, m]`."""
    k, b = linear.state(inputs, state)
    m = problem.tile.examples
    padding = (0, problem.example_tiles * m - problem.B)

    def tiles(x: Array | None) -> Array | None:
        if x is None:
            return None
        x = jnp.pad(x, (padding, (0, 0), (0, 0)))
        return x.reshape(-1, m, *x.shape[1:]).transpose(0, 2, 3, 1)

    def column(x: Array | None) -> Array | None:
        return None if x is None else x[..., None]

    return Parents(
        tiles(b), tiles(column(k)), tiles(cotangent.first), tiles(column(cotangent.mass))
    )


def _of_examples(problem: Problem, sums: Sums) -> Sums:
    """Return the sums `[B, J, D]` and the mass `[B, J]`, each added over the halves."""

    def join(x: Array) -> Array:
        x = x.sum(0).transpose(0, 3, 1, 2)
        return x.reshape(-1, *x.shape[2:])[: problem.B]

    first, mass = jax.tree.map(join, sums)
    return Sums(first, None if mass is None else mass[..., 0])


def _inputs(inputs: Inputs, gradients: Arrays) -> Inputs:
    """Convert the gradients of `_arrays` to those of the inputs, in float32."""
    prior = gradients.prior
    if inputs.prior is not None:
        if prior is None:  # constant couplings
            prior = jnp.zeros(inputs.prior.shape, jnp.float32)
        else:
            prior = prior[:, 0].T if inputs.prior.ndim == 2 else prior.transpose(1, 2, 0)
    poses, weights = gradients.poses.transpose(1, 2, 0), gradients.weights.transpose(3, 0, 1, 2)
    return linear.input_gradients(_float32(inputs), poses, weights, prior, gradients.gates)


def _float32(inputs: Inputs) -> Inputs:
    """Return inputs whose prior and gates are float32, as their gradients shall be."""
    prior, gates = inputs.prior, inputs.gates
    return inputs._replace(
        prior=None if prior is None else prior.astype(jnp.float32),
        gates=None if gates is None else gates.astype(jnp.float32),
    )
