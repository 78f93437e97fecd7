"""Checks of routing arguments, and their conversion to the engine's `Inputs`."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from capsjax import shapes
from capsjax.kernels.dtypes import accumulation_dtype
from capsjax.kernels.sharding import AxisName, names_of, reshape_examples, varying_axes
from capsjax.kernels.vote_passes.passes import IMPLEMENTATIONS, Implementation, Inputs

GRADIENTS = ("full", "last")


class Checked(NamedTuple):
    """Checked arguments, with the batch axes merged into one."""

    inputs: Inputs
    leading: tuple[int, ...]  # batch axes of the caller's arrays, for the result
    num_parents: int  # J


def check_settings(
    function: str, num_iterations: int, gradient: str, axis_name: AxisName | None
) -> int:
    """Check the static settings, and return the number of iterations as an int."""
    shapes.check_choice(function, "gradient", gradient, GRADIENTS)
    shapes.check_axis_name(function, axis_name)
    return shapes.check_positive(function, "num_iterations", num_iterations)


def check_implementation(
    function: str, implementation: str | Implementation | None
) -> Implementation | None:
    """Return the `Implementation` of a name; None, which selects one at lowering, stays None."""
    if implementation is None:
        return None
    if not isinstance(implementation, Implementation):
        implementation = Implementation(implementation)
    shapes.check_choice(
        function, "implementation", implementation.name, IMPLEMENTATIONS, optional=True
    )
    return implementation


def check_inputs(
    function: str, poses: Any, weights: Any, *, prior: Any, mask: Any, parent_mask: Any
) -> Checked:
    """Check poses `[..., I, P]`, weights, prior and masks, and return the engine's inputs."""
    poses = shapes.as_array(function, "poses", poses)
    weights = shapes.as_array(function, "weights", weights)
    shapes.check_floating(function, poses=poses, weights=weights)
    leading = poses.shape[:-2]
    shapes.check_shape(function, "poses", poses, "[..., I, P]", (*leading, None, None))
    children, length = poses.shape[-2:]
    prior = _check_prior(function, prior, (*leading, children), poses)
    if weights.ndim in (2, 3):  # shared by all children
        if weights.shape[0] != length or 0 in weights.shape:
            raise ValueError(
                f"{function}: weights must have shape [I, P, J, D], [P, J, D] or [P, D] with "
                f"I = {children} and P = {length}, got {weights.shape}"
            )
        if weights.ndim == 2 and prior is None:
            raise ValueError(
                f"{function}: prior must distinguish output capsules that share weights [P, D], "
                "which are equal without it, got None"
            )
    else:
        wanted = children, length, None, None
        shapes.check_shape(function, "weights", weights, "[I, P, J, D]", wanted)
    parents = prior.shape[-1] if weights.ndim == 2 else weights.shape[-2]
    kept = _check_mask(function, "mask", mask, "I", (*leading, children))
    if kept is not None:
        # Zero poses add nothing to sums of votes, and unlike gates of 0 they remove NaN.
        poses = jnp.where(jnp.broadcast_to(kept, poses.shape[:-1])[..., None], poses, 0)
    poses = _merge_leading(poses, leading, children, 1, length)
    return _add_logits(function, Inputs(poses, weights), leading, parents, prior, parent_mask)


def check_votes(function: str, votes: Any, *, prior: Any, mask: Any, parent_mask: Any) -> Checked:
    """Check votes `[..., I, J, D]`, prior and masks, and return the engine's inputs."""
    votes = shapes.as_array(function, "votes", votes)
    shapes.check_floating(function, votes=votes)
    leading = votes.shape[:-3]
    shapes.check_shape(function, "votes", votes, "[..., I, J, D]", (*leading, None, None, None))
    children, parents, _ = votes.shape[-3:]
    prior = _check_prior(function, prior, (*leading, children), votes)
    kept = _check_mask(function, "mask", mask, "I", (*leading, children))
    if kept is not None:
        votes = jnp.where(jnp.broadcast_to(kept, votes.shape[:-2])[..., None, None], votes, 0)
    votes = _merge_leading(votes, leading, *votes.shape[-3:])
    return _add_logits(function, Inputs(votes, None), leading, parents, prior, parent_mask)


def check_parameter(
    function: str, name: str, array: Any, letters: str, shape: tuple[int, ...], like: Array
) -> Array | None:
    """Check an optional parameter, in the dtype of `like` or in its accumulation dtype."""
    if array is None:
        return None
    array = shapes.as_array(function, name, array)
    shapes.check_shape(function, name, array, letters, shape)
    _check_dtype(function, name, array, like)
    return array


def check_same_along(function: str, name: str, array: Array | None, axis_name: Any) -> None:
    """Raise ValueError if the array varies over an axis in `axis_name`."""
    varying = varying_axes(array) & names_of(axis_name)
    if varying:
        raise ValueError(
            f"{function}: {name} must be the same all along axis_name, got one that varies over "
            f"{', '.join(sorted(varying))}"
        )


def _add_logits(
    function: str,
    inputs: Inputs,
    leading: tuple[int, ...],
    parents: int,
    prior: Array | None,
    parent_mask: Any,
) -> Checked:
    """Add the prior and the parent mask, with merged batch axes, to the inputs."""
    if prior is not None:
        if prior.shape[-1] != parents:
            raise ValueError(
                f"{function}: prior must have shape [I, J] or [..., I, J] with J = {parents}, "
                f"got {prior.shape}"
            )
        if leading and prior.ndim > 2:
            prior = _merge_leading(prior, leading, *prior.shape[-2:])
    parent_mask = _check_mask(function, "parent_mask", parent_mask, "J", (*leading, parents))
    if parent_mask is not None:
        parent_mask = jnp.broadcast_to(parent_mask, (*leading, parents))
        parent_mask = _merge_leading(parent_mask, leading, parents)
    inputs = inputs._replace(prior=prior, parent_mask=parent_mask)
    return Checked(inputs, leading, parents)


def _merge_leading(x: Array, leading: tuple[int, ...], *others: int) -> Array:
    return reshape_examples(x, (math.prod(leading), *others), has_examples=bool(leading))


def _check_prior(function: str, prior: Any, full: tuple[int, ...], like: Array) -> Array | None:
    """Check that a prior is `[I, J]` or `[..., I, J]`, with any J of at least 1."""
    if prior is None:
        return None
    prior = shapes.as_array(function, "prior", prior)
    if prior.shape[:-1] not in {full, full[-1:]} or prior.shape[-1] == 0:
        known = ", ".join(map(str, full))
        raise ValueError(
            f"{function}: prior must have shape [I, J] or [..., I, J] = [{known}, J], "
            f"got {prior.shape}"
        )
    _check_dtype(function, "prior", prior, like)
    return prior


def _check_mask(
    function: str, name: str, mask: Any, letter: str, full: tuple[int, ...]
) -> Array | None:
    if mask is None:
        return None
    mask = shapes.as_array(function, name, mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"{function}: {name} must be bool, got {mask.dtype}")
    if mask.shape not in {full, full[-1:]}:
        raise ValueError(
            f"{function}: {name} must have shape [{letter}] or [..., {letter}] = {full}, "
            f"got {mask.shape}"
        )
    return mask


def _check_dtype(function: str, name: str, array: Array, like: Array) -> None:
    allowed = {jnp.dtype(like.dtype), jnp.dtype(accumulation_dtype(like.dtype))}
    if jnp.dtype(array.dtype) not in allowed:
        names = " or ".join(sorted(dtype.name for dtype in allowed))
        raise TypeError(f"{function}: {name} must be {names}, got {array.dtype}")
