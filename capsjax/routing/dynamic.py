"""Dynamic routing by agreement (Sabour, Frosst, Hinton 2017)."""

import math
from collections.abc import Callable
from functools import cache

import jax.numpy as jnp
from jax import Array

from capsjax import shapes
from capsjax.kernels import dynamic_routing as op
from capsjax.kernels.devices import AxisName, names_of, share_examples, varying_axes
from capsjax.kernels.dispatch import dispatch
from capsjax.kernels.dynamic_routing.reference import route_votes
from capsjax.kernels.squash import accumulation_dtype

GRADIENTS = ("full", "last")


def dynamic_routing(
    poses: Array,
    weights: Array,
    *,
    num_iterations: int = 3,
    prior: Array | None = None,
    bias: Array | None = None,
    mask: Array | None = None,
    gradient: str = "full",
    implementation: str | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    """Routes input capsules to output capsules by agreement, with votes and routing fused.

    Child i votes `poses[i] @ weights[i, :, j]` for the pose of parent j. Couplings, a softmax
    over the parents of one child, start from `prior`; each iteration squashes the votes' weighted
    sums into outputs, and raises a child's logit for a parent by the agreement (dot product) of
    its vote with that output.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", section 2 and
    procedure 1, https://arxiv.org/abs/1710.09829.

    Args:
      poses: `[..., I, P]`, floating. Sums are kept in float32 at least; matrix products follow
        `jax.default_matmul_precision`, as `jax.numpy.matmul` does.
      weights: `[I, P, J, D]`, in the dtype of `poses`.
      num_iterations: T, at least 1.
      prior: Logits before the first iteration, `[I, J]`; None for zeros.
      bias: `[J, D]`, added to the weighted sum in every iteration, before the squash.
      mask: Booleans, `[I]` or `[..., I]`: False for padding, which sends nothing.
      gradient: `"full"` goes through every iteration, as in the paper's own code; `"last"`
        takes the last couplings as constants, which is cheaper and misses 2 % to 44 % of the
        full gradient (T = 3, weights of deviation 0.02 to 0.1). Derivatives of that gradient take
        them as constants with `"reference"` alone.
      implementation: None chooses when the program is lowered. `"pallas_mosaic_tpu"` on a TPU and
        `"pallas_triton"` on an NVIDIA GPU (sm_80 and newer) are fused kernels, `"xla"` runs
        anywhere; these never store votes, forward or backward, and have no forward-mode
        derivative. `"reference"` is the paper's procedure with stored votes, differentiable in
        every mode. Kernels take float32 and bfloat16; for a TPU the weights of 128 capsules must
        fit into vector memory (P·J·D up to about 80,000), for a GPU P is at most 128 and D
        256. For anything else None takes `"xla"`; it does not look at a GPU's age: name `"xla"`
        on one before sm_80.
      axis_name: Inside `jax.shard_map`, the axis of the mesh (or a tuple of axes) over which the
        input capsules are split, with their `weights`, `prior` and `mask`; `bias` and the result
        are the same all along it. Each iteration adds up `[..., J, D]` over the devices, forward
        and backward, and nothing else is sent. Examples need no axis: split by `shard_map`
        they are routed where they are, and under `jit` each device takes a share of a sharded
        batch, if the batch is in leading axes and not mapped over by `vmap`.

    Returns:
      Outputs `[..., J, D]`, in the dtype of `poses`; each has a length below 1, which rounding to
      half precision may bring to 1.

    Raises:
      ValueError: A shape or setting is wrong, or the implementation that is named runs on another
        platform than the program is for.
      TypeError: A dtype is wrong.
      Unsupported: The implementation that is named does not take these arguments.

    Example:
      >>> poses, weights = jnp.ones((2, 6, 4)), jnp.full((6, 4, 3, 5), 0.1)
      >>> outputs = dynamic_routing(poses, weights, num_iterations=3)
      >>> outputs.shape, bool(jnp.all(lengths(outputs) < 1))
      ((2, 3, 5), True)

      Two input capsules of six a device, on a machine that has three, or all six on one:

      >>> mesh = jax.make_mesh((1,), ("capsules",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> @jax.jit
      ... @jax.shard_map(
      ...     mesh=mesh, in_specs=(jax.P(None, "capsules"), jax.P("capsules")), out_specs=jax.P()
      ... )
      ... def routed(poses, weights):
      ...     return dynamic_routing(poses, weights, axis_name="capsules")
      >>> bool(jnp.allclose(routed(poses, weights), outputs))
      True
    """
    name = "dynamic_routing"
    num_iterations = _check_settings(name, num_iterations, gradient, axis_name)
    poses, weights, prior, bias, mask = _check_arrays(name, poses, weights, prior, bias, mask)
    leading = poses.shape[:-2]
    if 0 in leading:  # no example: no implementation need bother
        return jnp.zeros((*leading, *weights.shape[2:]), poses.dtype)
    _check_bias(name, bias, axis_name)
    route = _dispatched(implementation, num_iterations, gradient, axis_name)
    arrays = poses, mask, weights, prior, bias
    if not leading:
        return route(*arrays)
    has_examples = mask is not None and mask.ndim > 1, False, False, False
    return share_examples(route, *arrays, has_examples=has_examples)


@cache  # the same settings are the same function, as `share_examples` asks
def _dispatched(
    implementation: str | None, num_iterations: int, gradient: str, axis_name: AxisName | None
) -> Callable[..., Array]:
    def route(
        poses: Array, mask: Array | None, weights: Array, prior: Array | None, bias: Array | None
    ) -> Array:
        *leading, capsules, length = poses.shape
        outputs = dispatch(
            "dynamic_routing",
            op.IMPLEMENTATIONS,
            op.PREFERENCE,
            op.PLATFORMS,
            implementation,
            _masked(poses, mask, trailing=1).reshape(math.prod(leading), capsules, length),
            weights,
            prior,
            bias,
            num_iterations=num_iterations,
            gradient=gradient,
            axis_name=axis_name,
        )
        return outputs.reshape(*leading, *weights.shape[2:])

    return route


def dynamic_routing_from_votes(
    votes: Array,
    *,
    num_iterations: int = 3,
    prior: Array | None = None,
    bias: Array | None = None,
    mask: Array | None = None,
    gradient: str = "full",
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    """Routes votes that the caller has made, by the paper's procedure.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", procedure 1,
    https://arxiv.org/abs/1710.09829.

    Args:
      votes: `[..., I, J, D]`, floating; float32 at least inside.
      num_iterations: As in `dynamic_routing`, like all that follow.
      prior: `[I, J]`.
      bias: `[J, D]`.
      mask: `[I]` or `[..., I]`.
      gradient: `"full"` or `"last"`.
      axis_name: The axis over which the votes, `prior` and `mask` are split by input capsules.

    Returns:
      Outputs `[..., J, D]`, in the dtype of `votes`.

    Raises:
      ValueError: A shape or setting is wrong.
      TypeError: A dtype is wrong.

    Example:
      >>> votes = jnp.full((2, 6, 3, 5), 0.1)
      >>> dynamic_routing_from_votes(votes).shape
      (2, 3, 5)
    """
    name = "dynamic_routing_from_votes"
    num_iterations = _check_settings(name, num_iterations, gradient, axis_name)
    votes = jnp.asarray(votes)
    shapes.check_floating(name, votes=votes)
    leading = votes.shape[:-3]
    shapes.check_shape(name, "votes", votes, "[..., I, J, D]", (*leading, None, None, None))
    capsules, parents, depth = votes.shape[-3:]
    prior = _check_parameter(name, "prior", prior, "[I, J]", (capsules, parents), votes)
    bias = _check_parameter(name, "bias", bias, "[J, D]", (parents, depth), votes)
    _check_bias(name, bias, axis_name)
    votes = _masked(votes, _check_mask(name, votes.shape[:-2], mask), trailing=2)
    outputs, _ = route_votes(
        votes.reshape(math.prod(leading), capsules, parents, depth).astype(
            accumulation_dtype(votes.dtype)
        ),
        prior,
        bias,
        num_iterations=num_iterations,
        gradient=gradient,
        axis_name=axis_name,
    )
    return outputs.reshape(*leading, parents, depth).astype(votes.dtype)


def routing_couplings(
    poses: Array,
    weights: Array,
    *,
    num_iterations: int = 3,
    prior: Array | None = None,
    bias: Array | None = None,
    mask: Array | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    """The couplings of every iteration of `dynamic_routing`, for a look inside; stores the votes.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", section 2, equation 3,
    https://arxiv.org/abs/1710.09829.

    Args:
      poses: `[..., I, P]`, like all arguments as in `dynamic_routing`.
      weights: `[I, P, J, D]`.
      num_iterations: T.
      prior: `[I, J]`.
      bias: `[J, D]`.
      mask: `[I]` or `[..., I]`; the couplings of masked capsules are 0.
      axis_name: The axis over which the input capsules are split, and so is the result.

    Returns:
      `[T, ..., I, J]`, float32 at least; those of one child over its parents sum to 1.

    Raises:
      ValueError: A shape or setting is wrong.
      TypeError: A dtype is wrong.

    Example:
      >>> couplings = routing_couplings(jnp.ones((6, 4)), jnp.ones((6, 4, 3, 5)))
      >>> couplings.shape, float(couplings[0, 0, 0])
      ((3, 6, 3), 0.3333333432674408)
    """
    name = "routing_couplings"
    num_iterations = _check_settings(name, num_iterations, "full", axis_name)
    poses, weights, prior, bias, mask = _check_arrays(name, poses, weights, prior, bias, mask)
    _check_bias(name, bias, axis_name)
    *leading, capsules, length = poses.shape
    votes = jnp.einsum(
        "bip,ipjd->bijd",
        _masked(poses, mask, trailing=1).reshape(math.prod(leading), capsules, length),
        weights,
        preferred_element_type=accumulation_dtype(poses.dtype),
    )
    _, couplings = route_votes(
        votes,
        prior,
        bias,
        num_iterations=num_iterations,
        gradient="full",
        axis_name=axis_name,
    )
    stacked = jnp.stack(couplings).reshape(num_iterations, *leading, *votes.shape[1:3])
    if mask is None:
        return stacked
    kept = jnp.broadcast_to(mask, poses.shape[:-1])[None, ..., None]
    return jnp.where(kept, stacked, 0)


def _check_settings(
    function: str, num_iterations: int, gradient: str, axis_name: AxisName | None
) -> int:
    shapes.check_choice(function, "gradient", gradient, GRADIENTS)
    shapes.check_axis_name(function, axis_name)
    return shapes.check_positive(function, "num_iterations", num_iterations)


def _check_arrays(
    function: str,
    poses: Array,
    weights: Array,
    prior: Array | None,
    bias: Array | None,
    mask: Array | None,
) -> tuple[Array, Array, Array | None, Array | None, Array | None]:
    """The arrays, all found to fit each other."""
    poses, weights = jnp.asarray(poses), jnp.asarray(weights)
    shapes.check_floating(function, poses=poses, weights=weights)
    leading = poses.shape[:-2]
    shapes.check_shape(function, "poses", poses, "[..., I, P]", (*leading, None, None))
    capsules, length = poses.shape[-2:]
    shapes.check_shape(function, "weights", weights, "[I, P, J, D]", (capsules, length, None, None))
    parents, depth = weights.shape[2:]
    prior = _check_parameter(function, "prior", prior, "[I, J]", (capsules, parents), poses)
    bias = _check_parameter(function, "bias", bias, "[J, D]", (parents, depth), poses)
    return poses, weights, prior, bias, _check_mask(function, poses.shape[:-1], mask)


def _check_parameter(
    function: str,
    name: str,
    array: Array | None,
    letters: str,
    shape: tuple[int, int],
    like: Array,
) -> Array | None:
    if array is None:
        return None
    array = jnp.asarray(array)
    shapes.check_shape(function, name, array, letters, shape)
    allowed = {jnp.dtype(like.dtype), jnp.dtype(accumulation_dtype(like.dtype))}
    if jnp.dtype(array.dtype) not in allowed:
        names = " or ".join(sorted(dtype.name for dtype in allowed))
        raise TypeError(f"{function}: {name} must be {names}, got {array.dtype}")
    return array


def _check_bias(function: str, bias: Array | None, axis_name: AxisName | None) -> None:
    """The sums that a bias is added to are those of all devices, so it must be one, too."""
    apart = varying_axes(bias) & names_of(axis_name)
    if apart:
        raise ValueError(
            f"{function}: bias must be the same all along axis_name, got one that varies over "
            f"{', '.join(sorted(apart))}"
        )


def _check_mask(function: str, full: tuple[int, ...], mask: Array | None) -> Array | None:
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"{function}: mask must be bool, got {mask.dtype}")
    if mask.shape not in {full, full[-1:]}:
        raise ValueError(
            f"{function}: mask must have shape [I] or [..., I] = {full}, got {mask.shape}"
        )
    return mask


def _masked(array: Array, mask: Array | None, *, trailing: int) -> Array:
    """Zeroes what masked capsules have to say: a vote of 0 adds nothing and agrees with nothing."""
    if mask is None:
        return array
    kept = jnp.broadcast_to(mask, array.shape[: array.ndim - trailing])
    return jnp.where(jnp.expand_dims(kept, tuple(range(-trailing, 0))), array, 0)
