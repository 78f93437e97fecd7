"""Pallas-Triton kernels for NVIDIA GPUs (sm_80 and newer).

They are of two kinds. Those for linear logits of vectors, with sums, compute no votes. The others
have votes in registers, for linear logits of matrices, and gaussian logits with central moments.
"""

from collections.abc import Sequence
from typing import Any

import jax

from capsjax.kernels.dispatch import Unsupported
from capsjax.kernels.vote_passes import linear
from capsjax.kernels.vote_passes.config import (
    TritonConfig,
    TritonVotesConfig,
    triton_config_for,
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
)
from capsjax.kernels.vote_passes.triton import votes
from capsjax.kernels.vote_passes.triton.gradients import Iteration, gradients_of_inputs
from capsjax.kernels.vote_passes.triton.sums import Parents, Wanted, weighted_sums

# Longer poses, of which a thread has all components, or deeper votes exceed the registers.
MAX_LENGTH = 16
MAX_DEPTH = 64
# The first compute capability with matrix instructions on bfloat16.
OLDEST = 8, 0


def config_for(
    spec: Spec, inputs: Inputs, *others: object, device: Device
) -> TritonConfig | TritonVotesConfig:
    """Return the configuration for a pass.

    Raises:
      Unsupported: The kernels do not accept the pass, or an array is too large for them.
    """
    del others
    if device.capability is not None and device.capability < OLDEST:
        raise Unsupported(f"routing: {device.kind} is older than sm_80, which this kernel needs")
    if _holds_votes(spec, inputs):
        return votes.config_for(spec, inputs, device=device)
    linear.check(spec, inputs, device, platform="cuda")
    case = case_of(spec, inputs)
    if case.length > MAX_LENGTH or case.depth > MAX_DEPTH:
        raise Unsupported(
            f"routing: P must be at most {MAX_LENGTH} and D at most {MAX_DEPTH}, "
            f"got {case.length} and {case.depth}"
        )
    if max(x.size for x in jax.tree.leaves(inputs)) >= 2**31:
        raise Unsupported("routing: arrays of this kernel must have fewer than 2**31 elements")
    return triton_config_for(case, processors=device.processors, capability=device.capability)


def moments(spec: Spec, inputs: Inputs, state: State, *, config: Any, interpret: bool) -> Moments:
    """Compute the moments: sums over children of couplings times votes."""
    if _holds_votes(spec, inputs):
        return votes.moments(spec, inputs, state, config=config, interpret=interpret)
    parents = Parents(*linear.state(inputs, state))
    wanted = Wanted(mass=spec.mass)
    found = weighted_sums(
        config, linear.operands(inputs), parents, wanted, leaky=spec.leaky, interpret=interpret
    )
    return Moments(found.mass, found.sums)


def chain(
    spec: Spec, inputs: Inputs, term: Term, *, config: Any, interpret: bool
) -> tuple[State, Kept]:
    """Compute the cotangent of the state, and keep the statistics of the softmax."""
    if _holds_votes(spec, inputs):
        return votes.chain(spec, inputs, term, config=config, interpret=interpret)
    wanted = Wanted(sums=term.state.b is not None, mass=term.state.k is not None, kept=True)
    found = weighted_sums(
        config,
        linear.operands(inputs),
        _parents(inputs, term),
        wanted,
        leaky=spec.leaky,
        interpret=interpret,
    )
    return State(k=found.mass, b=found.sums), Kept(found.kept)


def input_gradients(
    spec: Spec,
    inputs: Inputs,
    terms: Sequence[Term],
    *,
    constant_couplings: bool,
    config: Any,
    interpret: bool,
) -> Inputs:
    """Compute the gradients of the inputs, summed over `terms`."""
    if _holds_votes(spec, inputs):
        return votes.input_gradients(
            spec,
            inputs,
            terms,
            constant_couplings=constant_couplings,
            config=config,
            interpret=interpret,
        )
    operands = linear.operands(inputs)
    settings = {"leaky": spec.leaky, "interpret": interpret}
    iterations = []
    for term in terms:
        parents = _parents(inputs, term)
        kept = None if term.kept is None else term.kept.of_children
        any_logits = operands.prior is not None or parents.k is not None or parents.b is not None
        if kept is None and (any_logits or operands.gates is not None):
            found = weighted_sums(
                config, operands, parents, Wanted(sums=False, kept=True), **settings
            )
            kept = found.kept
        iterations.append(Iteration(parents, kept))
    d_poses, d_weights, d_prior = gradients_of_inputs(
        config, operands, iterations, constant_couplings=constant_couplings, **settings
    )
    d_gates = None
    if inputs.gates is not None:
        d_gates = sum(iteration.kept[:, 1] for iteration in iterations)
    return linear.input_gradients(inputs, d_poses, d_weights, d_prior, d_gates)


def _holds_votes(spec: Spec, inputs: Inputs) -> bool:
    is_linear = (spec.logits, spec.moments) == ("linear", "sums")
    return spec.logits == "gaussian" or (is_linear and inputs.poses.shape[2] > 1)


def _parents(inputs: Inputs, term: Term) -> Parents:
    k, b = linear.state(inputs, term.state)
    return Parents(k, b, term.cotangent.mass, term.cotangent.first)
