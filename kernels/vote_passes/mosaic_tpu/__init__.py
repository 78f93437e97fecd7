"""Pallas-Mosaic kernels for TPUs.

`kernels` has the passes with linear logits and sums, `gaussian` those with gaussian logits and
central moments.
"""

from functools import partial
from typing import Any

from capsjax.kernels.vote_passes.mosaic_tpu import gaussian, kernels
from capsjax.kernels.vote_passes.passes import Inputs, Moments, Spec, State, one_after_the_other


def _module(spec: Spec) -> Any:
    """Return the module with the passes of an algorithm."""
    return gaussian if spec.logits == "gaussian" else kernels


def config_for(spec: Spec, inputs: Inputs, *others: Any, **settings: Any) -> Any:
    """Return the configuration for a pass, or raise Unsupported."""
    return _module(spec).config_for(spec, inputs, *others, **settings)


def moments(spec: Spec, inputs: Inputs, state: State, **settings: Any) -> Moments:
    """Compute the moments: sums over children of couplings times votes."""
    return _module(spec).moments(spec, inputs, state, **settings)


def chain(spec: Spec, inputs: Inputs, term: Any, **settings: Any) -> Any:
    """Compute the cotangent of the state from that of the moments."""
    return _module(spec).chain(spec, inputs, term, **settings)


def input_gradients(spec: Spec, inputs: Inputs, terms: Any, **settings: Any) -> Inputs:
    """Compute the gradients of the inputs, summed over `terms`."""
    return _module(spec).input_gradients(spec, inputs, terms, **settings)


def chain_and_input_gradients(
    spec: Spec, inputs: Inputs, term: Any, so_far: Any, **settings: Any
) -> Any:
    """Compute the cotangent of the state, and add the term's input gradients to those `so_far`."""
    module = _module(spec)
    one_by_one = partial(one_after_the_other, module)
    function = getattr(module, "chain_and_input_gradients", one_by_one)
    return function(spec, inputs, term, so_far, **settings)
