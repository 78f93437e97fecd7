"""Pallas-Triton kernels for NVIDIA GPUs (sm_80 and newer), of the passes with linear logits."""

from collections.abc import Sequence

from capsjax.kernels.dispatch import Unsupported
from capsjax.kernels.vote_passes import linear, xla
from capsjax.kernels.vote_passes.config import TritonConfig, triton_config_for
from capsjax.kernels.vote_passes.passes import (
    Device,
    Inputs,
    Moments,
    Spec,
    State,
    Term,
    case_of,
    is_uniform,
)
from capsjax.kernels.vote_passes.triton.gradients import gradients
from capsjax.kernels.vote_passes.triton.sums import weighted_sums

# Matrix products over P are unrolled, 16 components each.
MAX_LENGTH = 128
# A tile holds all components of at least one parent.
MAX_DEPTH = 256


def config_for(spec: Spec, inputs: Inputs, others: object, *, device: Device) -> TritonConfig:
    """Return the configuration for a pass.

    Raises:
      Unsupported: `linear.check` refuses the pass, or P or D is too large.
    """
    linear.check(spec, inputs, others, device)
    case = case_of(spec, inputs)
    if case.length > MAX_LENGTH or case.depth > MAX_DEPTH:
        raise Unsupported(
            f"routing: P must be at most {MAX_LENGTH} and D at most {MAX_DEPTH}, "
            f"got {case.length} and {case.depth}"
        )
    return triton_config_for(case)


def moments(
    spec: Spec, inputs: Inputs, state: State, *, config: TritonConfig, interpret: bool
) -> Moments:
    """Compute the moments: sums over children of couplings times votes."""
    if is_uniform(inputs, state):  # one matrix product
        return Moments(None, xla.uniform_sums(spec, inputs))
    return Moments(None, weighted_sums(config, interpret, *linear.arrays(inputs), state.b, None))


def chain(
    spec: Spec, inputs: Inputs, term: Term, *, config: TritonConfig, interpret: bool
) -> State:
    """Compute the cotangent of the state from that of the moments."""
    del spec
    states = term.state.b, term.cotangent.first
    return State(b=weighted_sums(config, interpret, *linear.arrays(inputs), *states))


def input_gradients(
    spec: Spec,
    inputs: Inputs,
    terms: Sequence[Term],
    *,
    constant_couplings: bool,
    config: TritonConfig,
    interpret: bool,
) -> Inputs:
    """Compute the gradients of the inputs, summed over `terms`."""
    del spec
    full, arrays = not constant_couplings, linear.arrays(inputs)
    found = gradients(config, interpret, *arrays, linear.states(terms), full)
    return linear.gradients(inputs, *found)
