"""Routing by inverted dot-product attention (Tsai, Srivastava, Goh, Salakhutdinov 2020)."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from capsjax.kernels.dtypes import accumulation_dtype
from capsjax.kernels.sharding import AxisName, reshape_examples
from capsjax.kernels.vote_passes.passes import Implementation, Moments, Spec, State
from capsjax.kernels.vote_passes.unroll import Routing, unroll
from capsjax.kernels.vote_passes.windows import grid
from capsjax.routing import _arguments

# Added to the variance: the value of the authors' code and of torch.nn.LayerNorm.
EPSILON = 1e-5


class _Affine(NamedTuple):
    """Parameters of the LayerNorm, `[D]`; None for 1 and 0."""

    scale: Array | None
    offset: Array | None


def inverted_attention_routing(
    poses: Array,
    weights: Array,
    *,
    scale: Array | None = None,
    offset: Array | None = None,
    num_iterations: int = 2,
    matrix: bool = False,
    prior: Array | None = None,
    mask: Array | None = None,
    parent_mask: Array | None = None,
    stride: int | None = None,
    gradient: str = "full",
    implementation: str | Implementation | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    """Route input capsules by attention whose softmax is over the parents, with LayerNorm.

    Child i votes `poses[i] @ weights[i, :, j]` for the pose of parent j. In each iteration the
    logits are the dot products of votes with the poses of the parents, divided by sqrt(D); the new
    poses are the LayerNorm, over D, of the sums of the votes weighted by the couplings. Logits do
    not accumulate, and the first couplings are uniform. There are no activations: the authors
    compute a class score from each pose by one linear layer that the classes share.

    Implementations, precision and sharding are those of `dynamic_routing`.

    Source: Tsai, Srivastava, Goh and Salakhutdinov, "Capsules with Inverted Dot-Product Attention
    Routing", section 3 and procedure 1, https://arxiv.org/abs/2002.04764. The division by sqrt(D)
    and the affine LayerNorm are those of the authors' code.

    Args:
      poses: `[..., I, P]`, or `[..., I, R, P]` if `matrix`, floating.
      weights: `[I, P, J, E]`, in the dtype of `poses`; or `[P, J, E]`, shared by the input
        capsules; or `[P, E]`, shared by all capsules, whose outputs then differ by `prior` alone.
      scale: `[D]`, or `[R, E]` if `matrix`, factors after the LayerNorm, which all parents share.
        None for 1. Poses with D = 1 are not normalised, and have neither scale nor offset.
      offset: In the shape of `scale`, added after the LayerNorm; None for 0.
      num_iterations: T, at least 1, of passes over the votes, of which the first has uniform
        couplings.
      matrix: Whether poses are matrices.
      prior: Logits to add in each iteration, `[I, J]` or `[..., I, J]`. A logit of -infinity makes
        the coupling 0.
      mask: Booleans `[I]` or `[..., I]`; input capsules at False, such as padding, are ignored.
      parent_mask: Booleans `[J]` or `[..., J]`; output capsules at False have couplings and
        outputs 0.
      stride: None if all input capsules reach all output capsules. Otherwise the routing is a
        convolution with this stride along both axes: axes H, W precede I in `poses` and `mask`;
        K, L precede I in `weights` and `prior`; h, w precede J in the result and in `parent_mask`,
        and K in a prior of each example. Input capsules route within each window separately.
      gradient: `"full"`, as the authors' code; or `"last"`, with the last couplings constant.
      implementation: As in `dynamic_routing`.
      axis_name: Axis, or tuple of axes, of the enclosing `jax.shard_map` over which input capsules
        are sharded, with `weights`, `prior` and `mask`.

    Returns:
      Poses `[..., J, D]`, or `[..., J, R, E]` if `matrix`, in the dtype of `poses`. That of a
      parent without children is `offset`.

    Raises:
      ValueError: A shape or setting is wrong; at lowering, the named implementation runs on
        another platform.
      TypeError: A dtype is wrong.
      Unsupported: At lowering, the named implementation does not accept the arguments.

    Example:
      >>> poses, weights = jnp.ones((2, 6, 4)), jnp.arange(360.0).reshape(6, 4, 3, 5) / 100
      >>> outputs = inverted_attention_routing(poses, weights, num_iterations=2)
      >>> outputs.shape, bool(jnp.allclose(outputs.mean(-1), 0, atol=1e-4))
      ((2, 3, 5), True)
    """
    name = "inverted_attention_routing"
    num_iterations = _arguments.check_settings(name, num_iterations, gradient, axis_name)
    checked = _arguments.check_inputs(
        name,
        poses,
        weights,
        prior=prior,
        mask=mask,
        parent_mask=parent_mask,
        is_matrix=matrix,
        windows=_arguments.check_windows(name, stride, "types"),
    )
    affine = _checked_affine(name, scale, offset, checked, axis_name)
    routing = _routing(name, checked, num_iterations, gradient, implementation, axis_name)
    return checked.placed(unroll(routing, checked.inputs, affine))


def inverted_attention_step(
    poses: Array,
    weights: Array,
    parents: Array,
    *,
    scale: Array | None = None,
    offset: Array | None = None,
    matrix: bool = False,
    prior: Array | None = None,
    mask: Array | None = None,
    parent_mask: Array | None = None,
    stride: int | None = None,
    gradient: str = "full",
    implementation: str | Implementation | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    """Run one iteration of `inverted_attention_routing` from given poses of the parents.

    With it all layers of a network can route concurrently: each iteration updates every layer from
    the poses of the layer below and of the layer itself, both of the previous iteration. The first
    poses of a layer are `inverted_attention_routing(..., num_iterations=1)` of the layer below.

    Source: Tsai, Srivastava, Goh and Salakhutdinov, "Capsules with Inverted Dot-Product Attention
    Routing", procedures 1 and 2, https://arxiv.org/abs/2002.04764.

    Args:
      poses: `[..., I, P]`, or `[..., I, R, P]`. It and the arguments below except `parents` are
        those of `inverted_attention_routing`.
      weights: `[I, P, J, E]`, `[P, J, E]` or `[P, E]`.
      parents: Poses of the output capsules in the iteration before, in the shape of the result. The
        result is differentiable in them, as in all arrays.
      scale: `[D]` or `[R, E]`.
      offset: `[D]` or `[R, E]`.
      matrix: Whether poses are matrices.
      prior: `[I, J]` or `[..., I, J]`.
      mask: `[I]` or `[..., I]`.
      parent_mask: `[J]` or `[..., J]`.
      stride: Of a convolution, or None.
      gradient: `"full"`; or `"last"`, with constant couplings and so no gradient of `parents`.
      implementation: As in `dynamic_routing`.
      axis_name: Axis over which input capsules are sharded; `parents` are not.

    Returns:
      Poses `[..., J, D]`, or `[..., J, R, E]` if `matrix`, in the dtype of `poses`.

    Raises:
      ValueError: A shape or setting is wrong; at lowering, the named implementation runs on
        another platform.
      TypeError: A dtype is wrong.
      Unsupported: At lowering, the named implementation does not accept the arguments.

    Example:
      >>> poses, weights = jnp.ones((2, 6, 4)), jnp.arange(360.0).reshape(6, 4, 3, 5) / 100
      >>> first = inverted_attention_routing(poses, weights, num_iterations=1)
      >>> second = inverted_attention_step(poses, weights, first)
      >>> bool(jnp.allclose(second, inverted_attention_routing(poses, weights, num_iterations=2)))
      True
    """
    name = "inverted_attention_step"
    _arguments.check_settings(name, 1, gradient, axis_name)
    checked = _arguments.check_inputs(
        name,
        poses,
        weights,
        prior=prior,
        mask=mask,
        parent_mask=parent_mask,
        is_matrix=matrix,
        windows=_arguments.check_windows(name, stride, "types"),
    )
    affine = _checked_affine(name, scale, offset, checked, axis_name)
    routing = _routing(name, checked, 1, gradient, implementation, axis_name)
    parents = _checked_parents(name, parents, checked, axis_name)
    return checked.placed(unroll(routing, checked.inputs, affine, (None, _state_of(parents))))


def _routing(
    function: str,
    checked: _arguments.Checked,
    num_iterations: int,
    gradient: str,
    implementation: str | Implementation | None,
    axis_name: AxisName | None,
) -> Routing:
    return Routing(
        Spec(checked.num_parents),
        _step,
        num_iterations,
        gradient,
        _arguments.check_implementation(function, implementation),
        axis_name,
        checked.windows,
    )


def _step(t: int, carry: Any, moments: Moments, affine: _Affine) -> tuple[Any, State, Array]:
    """Normalise the weighted sums; the next logits are agreements with the result."""
    del t
    outputs = moments.first
    if outputs.shape[-1] > 1:
        outputs -= jnp.mean(outputs, -1, keepdims=True)
        variance = jnp.mean(outputs * outputs, -1, keepdims=True)
        outputs *= lax.rsqrt(variance + EPSILON)
    if affine.scale is not None:
        outputs *= affine.scale.astype(outputs.dtype)[None, None]
    if affine.offset is not None:
        outputs += affine.offset.astype(outputs.dtype)[None, None]
    return carry, _state_of(outputs), outputs


def _state_of(parents: Array) -> State:
    """Return the state whose logits are dot products with poses `[B, J, D]`, over sqrt(D)."""
    return State(b=parents / math.sqrt(parents.shape[-1]))


def _pose_shape(checked: _arguments.Checked) -> tuple[str, tuple[int, ...]]:
    """Return the letters and sizes of a parent's pose."""
    if not checked.is_matrix:
        return "D", (checked.depth,)
    rows = checked.inputs.poses.shape[-2]
    return "R, E", (rows, checked.depth // rows)


def _checked_affine(
    function: str,
    scale: Array | None,
    offset: Array | None,
    checked: _arguments.Checked,
    axis_name: AxisName | None,
) -> _Affine:
    """Check scale and offset, and that nothing that all devices apply alike varies over them."""
    letters, shape = _pose_shape(checked)
    found = []
    for name, array in (("scale", scale), ("offset", offset)):
        if array is not None and checked.depth == 1:
            raise ValueError(
                f"{function}: {name} must be None for poses of length 1, which are not normalised, "
                f"got an array"
            )
        array = _arguments.check_parameter(
            function, name, array, f"[{letters}]", shape, checked.inputs.poses
        )
        _arguments.check_same_along(function, name, array, axis_name)
        found.append(None if array is None else array.reshape(-1))
    _arguments.check_same_along(function, "parent_mask", checked.inputs.parent_mask, axis_name)
    return _Affine(*found)


def _checked_parents(
    function: str, parents: Array, checked: _arguments.Checked, axis_name: AxisName | None
) -> Array:
    """Check poses of the parents, and return them as `[B, J, D]` in the accumulation dtype."""
    inputs, leading = checked.inputs, checked.leading
    letters, shape = _pose_shape(checked)
    places = () if checked.windows is None else grid(checked.windows, inputs)
    letters = f"{'h, w, ' if places else ''}J, {letters}"
    full = *leading, *places, checked.num_parents, *shape
    found = _arguments.check_parameter(
        function, "parents", parents, f"[..., {letters}]", full, inputs.poses
    )
    if found is None:
        raise TypeError(f"{function}: parents must be an array, got None")
    _arguments.check_same_along(function, "parents", found, axis_name)
    merged = math.prod((*leading, *places)), checked.num_parents, checked.depth
    found = reshape_examples(found, merged, has_examples=bool(leading))
    found = found.astype(accumulation_dtype(inputs.poses.dtype))
    if inputs.parent_mask is not None:  # their logits are ignored, but NaN would spread from them
        found = jnp.where(inputs.parent_mask[..., None], found, 0)
    return found
