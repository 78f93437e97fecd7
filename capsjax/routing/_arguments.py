"""Checks of routing arguments, and their conversion to the engine's `Inputs`."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from capsjax import shapes
from capsjax.kernels.dtypes import accumulation_dtype
from capsjax.kernels.sharding import AxisName, names_of, reshape_examples, varying_axes
from capsjax.kernels.vote_passes.passes import (
    IMPLEMENTATIONS,
    Implementation,
    Inputs,
    votes_depth,
)
from capsjax.kernels.vote_passes.windows import COMPETITIONS, Windows, grid

GRADIENTS = ("full", "last")


class Checked(NamedTuple):
    """Checked arguments, with the batch axes merged into one."""

    inputs: Inputs
    leading: tuple[int, ...]  # batch axes of the caller's arrays, for the result
    num_parents: int  # J
    is_matrix: bool = False  # whether the poses are matrices [R, P]
    windows: Windows | None = None  # of a convolution
    # Which capsules are not masked, or None. Dense: [B, I, 1] and [B, 1, J]. Of a convolution:
    # [B, h, w, K, L, I, 1] and [B, h, w, 1, 1, 1, J]. Axes that the mask lacks have size 1.
    kept_children: Array | None = None
    kept_parents: Array | None = None

    @property
    def depth(self) -> int:
        """Return D, the length of a vote."""
        return votes_depth(self.inputs)

    def without_masked(self, x: Array, letters: str) -> Array:
        """Zero the entries that belong to masked capsules, whatever they are, NaN included.

        An array without a batch axis B keeps the entries that any example uses, those of an
        enclosing `jax.vmap` included.

        Args:
          x: An array of a routing.
          letters: Its axes, such as "IPJE". Only B, h, w, K, L, I and J matter.
        """
        masks = (("I", self.kept_children), ("J", self.kept_parents))
        found = [mask for axis, mask in masks if mask is not None and axis in letters]
        if not found:
            return x
        kept = found[0] & found[-1]
        own = "BIJ" if self.windows is None else "BhwKLIJ"
        inner = tuple(k for k, axis in enumerate(own) if k > 0 and axis not in letters)
        kept = jnp.any(kept, inner)
        if "B" not in letters:
            kept = any_example(kept)
        added = tuple(k for k, axis in enumerate(letters) if axis not in own)
        return jnp.where(jnp.expand_dims(kept, added), x, 0)

    def placed(self, x: Array) -> Array:
        """Return results `[B, J, ...]` with the caller's batch axes, grid, and matrices.

        Poses `[B, J, D]` have the dtype of the caller's poses, as have numbers `[B, J]`. Both are 0
        for masked parents.
        """
        inputs = self.inputs
        if inputs.parent_mask is not None:
            mask = inputs.parent_mask if x.ndim == 2 else inputs.parent_mask[..., None]
            x = jnp.where(mask, x, 0)
        inner = x.shape[2:]
        if inner and self.is_matrix:
            rows = inputs.poses.shape[-2]
            inner = rows, inner[0] // rows
        places = () if self.windows is None else grid(self.windows, inputs)
        shape = *self.leading, *places, self.num_parents, *inner
        x = x.astype(inputs.poses.dtype)
        return reshape_examples(x, shape, has_examples=bool(self.leading))


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
    function: str,
    poses: Any,
    weights: Any,
    *,
    prior: Any,
    mask: Any,
    parent_mask: Any,
    is_matrix: bool = False,
    activations: Any = None,
    coordinates: Any = None,
    windows: Windows | None = None,
) -> Checked:
    """Check the arrays of a routing, and return the engine's inputs.

    Args:
      function: Name of the caller, for messages.
      poses: `[..., I, P]`, or `[..., I, R, P]` if `is_matrix` or if `activations` are `[..., I]`.
      weights: `[I, P, J, E]`, `[P, J, E]` or `[P, E]`; of a convolution `[K, L, I, P, J, E]`.
      prior: `[I, J]` or `[..., I, J]`.
      mask: `[I]` or `[..., I]`.
      parent_mask: `[J]` or `[..., J]`.
      is_matrix: Whether poses are matrices.
      activations: `[..., I]`, which tell whether poses are matrices.
      coordinates: `[I, D]`, or `[I, R, E]` for matrices.
      windows: Of a convolution, where axes H, W come before I, and h, w before J; K, L before
        I in the weights, and h, w, K, L in a prior of each example.
    """
    poses = shapes.as_array(function, "poses", poses)
    weights = shapes.as_array(function, "weights", weights)
    shapes.check_floating(function, poses=poses, weights=weights)
    places = 0 if windows is None else 2
    map_letters = "H, W, I" if places else "I"
    if activations is not None:
        activations = shapes.as_array(function, "activations", activations)
        _check_dtype(function, "activations", activations, poses)
        is_matrix = poses.ndim == activations.ndim + 2
        if not (is_matrix or poses.ndim == activations.ndim + 1) or activations.ndim <= places:
            raise ValueError(
                f"{function}: activations must have shape [..., {map_letters}], and poses one axis "
                f"more (vectors) or two (matrices), got {activations.shape} and {poses.shape}"
            )
    inner = 2 if is_matrix else 1
    letters = f"[..., {map_letters}, {'R, P' if is_matrix else 'P'}]"
    leading = poses.shape[: max(0, poses.ndim - inner - 1 - places)]
    shapes.check_shape(
        function, "poses", poses, letters, (*leading, *(None,) * (inner + 1 + places))
    )
    full = poses.shape[:-inner]  # [..., I] or [..., H, W, I]
    if activations is not None:
        shapes.check_shape(function, "activations", activations, f"[..., {map_letters}]", full)
    prior = _check_prior(function, prior, _prior_shape(weights, full, windows), poses)
    _check_weights(function, weights, poses, prior, windows, is_matrix)
    parents = prior.shape[-1] if weights.ndim == 2 else weights.shape[-2]
    kept = mask = check_mask(function, "mask", mask, map_letters, full, 1 + places)
    if kept is not None:
        # Zero poses add nothing to sums of votes, and unlike gates of 0 they remove NaN.
        kept = jnp.broadcast_to(kept, full)
        poses = jnp.where(kept.reshape(*full, *(1,) * inner), poses, 0)
        activations = None if activations is None else jnp.where(kept, activations, 0)
    if activations is not None:
        _check_range(function, "activations", activations)
    rows = poses.shape[-2] if is_matrix else 1
    merged = _merge_leading(poses, leading, *full[len(leading) :], rows, poses.shape[-1])
    gates = activations
    if gates is not None:
        gates = _merge_leading(gates, leading, *full[len(leading) :])
    inputs = Inputs(merged, weights, gates)
    if coordinates is not None and windows is not None:
        raise ValueError(
            f"{function}: coordinates must be None in a convolution, whose windows know no "
            f"position, got shape {jnp.shape(coordinates)}"
        )
    if coordinates is not None:
        shape: tuple[int, ...] = (rows, weights.shape[-1]) if is_matrix else weights.shape[-1:]
        wanted = "[I, R, E]" if is_matrix else "[I, D]"
        coordinates = check_required(
            function, "coordinates", coordinates, wanted, (full[-1], *shape), poses
        )
        inputs = inputs._replace(coordinates=coordinates.reshape(full[-1], -1))
    return _add_logits(
        function,
        inputs,
        leading,
        parents,
        prior,
        mask,
        parent_mask,
        is_matrix=is_matrix,
        windows=windows,
    )


def check_windows(
    function: str, stride: Any, competition: str = "types", *, starts_at_types: bool = False
) -> Windows | None:
    """Return the windows of a convolution; None, for a fully connected layer, if stride is None."""
    shapes.check_choice(function, "competition", competition, COMPETITIONS)
    if stride is None:
        return None
    stride = shapes.check_positive(function, "stride", stride)
    return Windows(stride, competition, starts_at_types)


def check_merges(function: str, checked: Checked, axis_name: AxisName | None) -> None:
    """Raise ValueError if central moments of votes that parents share are split over devices."""
    weights = checked.inputs.weights
    if axis_name is not None and weights.ndim == 2:
        raise ValueError(
            f"{function}: axis_name must be None for weights [P, E], since moments of votes that "
            f"all output capsules share are not merged over devices, got {axis_name!r}"
        )
    check_same_along(function, "parent_mask", checked.inputs.parent_mask, axis_name)


def check_factors(function: str, name: str, value: Any, num_iterations: int, dtype: Any) -> Array:
    """Check a number of at least 0, or one for each iteration, `[T]`."""
    array = shapes.as_array(function, name, value)
    shapes.check_number_dtype(function, name, array)
    if array.shape not in {(), (num_iterations,)}:
        raise ValueError(
            f"{function}: {name} must be a number or have shape [T] = ({num_iterations},), "
            f"got {array.shape}"
        )
    if not isinstance(array, jax.core.Tracer) and not np.all(np.asarray(array) >= 0):
        raise ValueError(f"{function}: {name} must be at least 0, got {value}")
    return array.astype(dtype)


def check_votes(function: str, votes: Any, *, prior: Any, mask: Any, parent_mask: Any) -> Checked:
    """Check votes `[..., I, J, D]`, prior and masks, and return the engine's inputs."""
    votes = shapes.as_array(function, "votes", votes)
    shapes.check_floating(function, votes=votes)
    leading = votes.shape[:-3]
    shapes.check_shape(function, "votes", votes, "[..., I, J, D]", (*leading, None, None, None))
    children, parents, _ = votes.shape[-3:]
    prior = _check_prior(function, prior, ((*leading, children), 1), votes)
    mask = check_mask(function, "mask", mask, "I", (*leading, children), 1)
    votes = _merge_leading(votes, leading, *votes.shape[-3:])
    return _add_logits(function, Inputs(votes, None), leading, parents, prior, mask, parent_mask)


def check_parameter(
    function: str, name: str, array: Any, letters: str, shape: tuple[int, ...], like: Array
) -> Array | None:
    """Check an optional parameter, in the dtype of `like` or in its accumulation dtype."""
    if array is None:
        return None
    return check_required(function, name, array, letters, shape, like)


def check_required(
    function: str, name: str, array: Any, letters: str, shape: tuple[int, ...], like: Array
) -> Array:
    """Check a parameter, in the dtype of `like` or in its accumulation dtype."""
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
    mask: Array | None,
    parent_mask: Any,
    *,
    is_matrix: bool = False,
    windows: Windows | None = None,
) -> Checked:
    """Add the prior and the parent mask, with merged batch axes, and zero what is masked."""
    if prior is not None:
        if prior.shape[-1] != parents:
            raise ValueError(
                f"{function}: prior must have shape [I, J] or [..., I, J] with J = {parents}, "
                f"got {prior.shape}"
            )
        shared = 2 if windows is None else 4
        if prior.ndim > shared:
            prior = _merge_leading(prior, leading, *prior.shape[len(leading) :])
    places = () if windows is None else grid(windows, inputs)
    letters = "h, w, J" if places else "J"
    full = (*leading, *places, parents)
    parent_mask = check_mask(function, "parent_mask", parent_mask, letters, full, 1)
    kept_children = None if mask is None else _kept_children(mask, leading, inputs, windows)
    kept_parents = None
    if parent_mask is not None:
        if parent_mask.ndim == len(full):
            kept_parents = _merge_leading(parent_mask, leading, *places, parents)
        else:
            kept_parents = parent_mask.reshape(1, *(1,) * len(places), parents)
        kept_parents = jnp.expand_dims(kept_parents, (3, 4, 5) if places else 1)
        parent_mask = jnp.broadcast_to(parent_mask, full)
        parent_mask = _merge_leading(parent_mask, leading, *places, parents)
        parent_mask = parent_mask.reshape(-1, parents) if places else parent_mask
    checked = Checked(
        inputs._replace(prior=prior, parent_mask=parent_mask),
        leading,
        parents,
        is_matrix,
        windows,
        kept_children,
        kept_parents,
    )
    poses, weights, _, _, coordinates, _ = inputs
    if weights is None:
        inputs = checked.inputs._replace(poses=checked.without_masked(poses, "BIJD"))
    else:
        axes = {2: "PE", 3: "PJE", 4: "IPJE", 6: "KLIPJE"}[weights.ndim]
        inputs = checked.inputs._replace(weights=checked.without_masked(weights, axes))
    if prior is not None:
        axes = {2: "IJ", 3: "BIJ", 4: "KLIJ", 7: "BhwKLIJ"}[prior.ndim]
        inputs = inputs._replace(prior=checked.without_masked(prior, axes))
    if coordinates is not None:
        inputs = inputs._replace(coordinates=checked.without_masked(coordinates, "ID"))
    return checked._replace(inputs=inputs)


def _kept_children(
    mask: Array, leading: tuple[int, ...], inputs: Inputs, windows: Windows | None
) -> Array:
    """Return a mask, `[..., I]` or `[..., H, W, I]`, as `Checked` has it."""
    own = mask.shape[-1 if windows is None else -3 :]
    if mask.ndim == len(own) + len(leading):
        mask = _merge_leading(mask, leading, *own)
    else:
        mask = mask[None]
    if windows is None:
        return mask[..., None]
    (height, width), (rows, columns) = inputs.weights.shape[:2], grid(windows, inputs)
    step = windows.stride
    ends = step * (rows - 1) + 1, step * (columns - 1) + 1
    each = [
        mask[:, row : row + ends[0] : step, column : column + ends[1] : step]
        for row in range(height)
        for column in range(width)
    ]
    cut = jnp.stack(each, 3)  # [B, h, w, K·L, I]
    return cut.reshape(*cut.shape[:3], height, width, -1, 1)


@jax.custom_batching.custom_vmap
def any_example(kept: Array) -> Array:
    """Return whether any example, of the first axis, has True; `jax.vmap` adds examples.

    So arrays that all examples share stay shared under `jax.vmap`, where they are masked.
    """
    return jnp.any(kept, 0)


@any_example.def_vmap
def _any_example_mapped(size: int, is_mapped: Any, kept: Array) -> tuple[Array, bool]:
    del size, is_mapped
    return any_example(jnp.any(kept, 1)), False


def _merge_leading(x: Array, leading: tuple[int, ...], *others: int) -> Array:
    return reshape_examples(x, (math.prod(leading), *others), has_examples=bool(leading))


def _check_weights(
    function: str,
    weights: Array,
    poses: Array,
    prior: Array | None,
    windows: Windows | None,
    is_matrix: bool,
) -> None:
    """Check weights of all children, `[I, P, J, E]` or with windows, or shared by them."""
    length, children = poses.shape[-1], poses.shape[-3 if is_matrix else -2]
    column = "E" if is_matrix else "D"
    if windows is not None:
        letters = f"[K, L, I, P, J, {column}]"
        shapes.check_shape(
            function, "weights", weights, letters, (None, None, children, length, None, None)
        )
        height, width = poses.shape[-5 if is_matrix else -4 :][:2]
        if weights.shape[0] > height or weights.shape[1] > width:
            raise ValueError(
                f"{function}: windows of the weights must fit into the map of poses, "
                f"{height} x {width}, got {weights.shape[0]} x {weights.shape[1]}"
            )
        return
    letters = f"[I, P, J, {column}]"
    if weights.ndim not in (2, 3):
        shapes.check_shape(function, "weights", weights, letters, (children, length, None, None))
        return
    if weights.shape[0] != length or 0 in weights.shape:  # shared by all children
        raise ValueError(
            f"{function}: weights must have shape {letters}, [P, J, {column}] or [P, {column}] "
            f"with I = {children} and P = {length}, got {weights.shape}"
        )
    if weights.ndim == 2 and prior is None:
        raise ValueError(
            f"{function}: prior must distinguish output capsules that share weights "
            f"[P, {column}], which are equal without it, got None"
        )


def _prior_shape(
    weights: Array, full: tuple[int, ...], windows: Windows | None
) -> tuple[tuple[int, ...], int]:
    """Return the shape of a prior of each example, without J, and how many axes all share."""
    if windows is None or weights.ndim < 2:
        return full, 1
    sizes = zip(full[-3:-1], weights.shape[:2], strict=True)
    places = tuple(windows.count(*both) for both in sizes)
    return (*full[:-3], *places, *weights.shape[:2], full[-1]), 3


def _check_prior(
    function: str, prior: Any, shape: tuple[tuple[int, ...], int], like: Array
) -> Array | None:
    """Check that a prior is `[I, J]` or `[..., I, J]`, with any J of at least 1."""
    if prior is None:
        return None
    prior = shapes.as_array(function, "prior", prior)
    full, shared = shape
    if prior.shape[:-1] not in {full, full[-shared:]} or prior.shape[-1] == 0:
        known = ", ".join(map(str, full))
        letters = "I, J" if shared == 1 else "K, L, I, J"
        every = "..., I, J" if shared == 1 else "..., h, w, K, L, I, J"
        raise ValueError(
            f"{function}: prior must have shape [{letters}] or [{every}] = [{known}, J], "
            f"got {prior.shape}"
        )
    _check_dtype(function, "prior", prior, like)
    return prior


def check_mask(
    function: str, name: str, mask: Any, letters: str, full: tuple[int, ...], shared: int
) -> Array | None:
    """Check a mask of all axes, or of the last ones, which all examples share."""
    if mask is None:
        return None
    mask = shapes.as_array(function, name, mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"{function}: {name} must be bool, got {mask.dtype}")
    if mask.shape not in {full, full[-shared:]}:
        raise ValueError(
            f"{function}: {name} must have shape [{letters}] or [..., {letters}] = {full}, "
            f"got {mask.shape}"
        )
    return mask


def _check_range(function: str, name: str, array: Array) -> None:
    """Raise ValueError if a known number is outside [0, 1]; traced arrays are not known."""
    if isinstance(array, jax.core.Tracer) or array.size == 0:
        return
    known = np.asarray(array, np.float64)  # NumPy, because under jit JAX would trace it
    low, high = known.min(), known.max()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"{function}: {name} must be in [0, 1], got {low:g} to {high:g}")


def _check_dtype(function: str, name: str, array: Array, like: Array) -> None:
    allowed = {jnp.dtype(like.dtype), jnp.dtype(accumulation_dtype(like.dtype))}
    if jnp.dtype(array.dtype) not in allowed:
        names = " or ".join(sorted(dtype.name for dtype in allowed))
        raise TypeError(f"{function}: {name} must be {names}, got {array.dtype}")
