"""Dynamic routing by agreement (Sabour, Frosst, Hinton 2017)."""

import jax.numpy as jnp
from jax import Array

from capsjax.kernels.sharding import AxisName, reshape_examples
from capsjax.kernels.squash import squash
from capsjax.kernels.vote_passes.passes import (
    Implementation,
    Moments,
    Spec,
    State,
    votes_depth,
)
from capsjax.kernels.vote_passes.unroll import Routing, unroll, unroll_couplings
from capsjax.routing import _arguments


def dynamic_routing(
    poses: Array,
    weights: Array,
    *,
    num_iterations: int = 3,
    prior: Array | None = None,
    bias: Array | None = None,
    mask: Array | None = None,
    parent_mask: Array | None = None,
    leaky: bool = False,
    gradient: str = "full",
    implementation: str | Implementation | None = None,
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
      weights: `[I, P, J, D]`, in the dtype of `poses`; or `[P, J, D]`, shared by the input
        capsules, of which there may be any number; or `[P, D]`, shared by the output capsules
        too, which then differ by their `prior`.
      num_iterations: T, at least 1.
      prior: Logits before the first iteration, `[I, J]` or `[..., I, J]`; None for zeros. A
        child with logit -infinity for a parent sends it nothing.
      bias: `[J, D]`, added to the weighted sum in every iteration, before the squash.
      mask: Booleans, `[I]` or `[..., I]`: False for padding, which sends nothing.
      parent_mask: Booleans, `[J]` or `[..., J]`: the outputs where it is False are 0, and the
        children are divided over the other parents; a child that is left none sends nothing.
      leaky: Whether a child may go to no parent: its softmax has one more logit, which is 0.
      gradient: `"full"` goes through every iteration, as in the paper's own code; `"last"`
        takes the last couplings as constants, which is cheaper and misses 2 % to 44 % of the
        full gradient (T = 3, weights of deviation 0.02 to 0.1). Derivatives of that gradient take
        them as constants with `"reference"` alone.
      implementation: None chooses when the program is lowered: the kernels `"triton"` on an
        NVIDIA GPU (sm_80 and newer) and `"mosaic_tpu"` on a TPU, or `"xla"`, plain JAX for any
        platform, where they do not take the arguments (below). None of these stores votes,
        forward or backward, or has a forward-mode derivative. `"reference"` is the procedure
        with stored votes, differentiable in every mode. An `Implementation` of
        `capsjax.kernels.vote_passes.passes` gives a name and tile sizes.
      axis_name: Inside `jax.shard_map`, the axis of the mesh (or a tuple of axes) over which the
        input capsules are split, with their `weights`, `prior` and `mask`; `bias`,
        `parent_mask` and the result are the same all along it. Each iteration sums
        `[..., J, D]` over the devices, forward and backward, and nothing else is sent. Examples
        need no axis: a batch split by `shard_map` or over Explicit axes is routed where it is,
        by any implementation; over Auto axes, whose sharding only XLA's partitioner knows, it
        is `"xla"` that the partitioner leaves where it is.

    Returns:
      Outputs `[..., J, D]`, in the dtype of `poses`; each has a length below 1, which rounding to
      half precision may bring to 1.

    Kernels take float32 and bfloat16, weights `[I, P, J, D]`, a prior `[I, J]`, any bias and
    mask; neither `parent_mask` nor `leaky`. For `"mosaic_tpu"` the weights of 128 capsules must fit
    into the TPU's vector memory (P·J·D up to about 80,000 on a v5e or v6e), for `"triton"` P is at
    most 128 and D 256. A batch of symbolic size (`jax.export`) is routed by `"xla"`.

    Raises:
      ValueError: A shape or setting is wrong; while the program is lowered, the implementation
        that is named runs on another platform.
      TypeError: A dtype is wrong.
      Unsupported: While the program is lowered, the implementation that is named does not take
        these arguments.

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
    num_iterations = _arguments.check_settings(name, num_iterations, gradient, axis_name)
    checked = _arguments.check_inputs(
        name, poses, weights, prior=prior, mask=mask, parent_mask=parent_mask
    )
    routing = Routing(
        Spec(checked.num_parents, leaky=leaky),
        _step,
        num_iterations,
        gradient,
        _arguments.check_implementation(name, implementation),
        axis_name,
    )
    bias = _checked_bias(name, bias, checked, axis_name)
    return _outputs(checked, unroll(routing, checked.inputs, bias))


def dynamic_routing_from_votes(
    votes: Array,
    *,
    num_iterations: int = 3,
    prior: Array | None = None,
    bias: Array | None = None,
    mask: Array | None = None,
    parent_mask: Array | None = None,
    leaky: bool = False,
    gradient: str = "full",
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    """Routes given votes by agreement; differentiable in every mode.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", procedure 1,
    https://arxiv.org/abs/1710.09829.

    Args:
      votes: `[..., I, J, D]`, floating; float32 at least inside.
      num_iterations: As in `dynamic_routing`, like all that follow.
      prior: `[I, J]` or `[..., I, J]`.
      bias: `[J, D]`.
      mask: `[I]` or `[..., I]`.
      parent_mask: `[J]` or `[..., J]`.
      leaky: Whether a child may go to no parent.
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
    num_iterations = _arguments.check_settings(name, num_iterations, gradient, axis_name)
    checked = _arguments.check_votes(name, votes, prior=prior, mask=mask, parent_mask=parent_mask)
    spec, stored = Spec(checked.num_parents, leaky=leaky), Implementation("reference")
    routing = Routing(spec, _step, num_iterations, gradient, stored, axis_name)
    bias = _checked_bias(name, bias, checked, axis_name)
    return _outputs(checked, unroll(routing, checked.inputs, bias))


def routing_couplings(
    poses: Array,
    weights: Array,
    *,
    num_iterations: int = 3,
    prior: Array | None = None,
    bias: Array | None = None,
    mask: Array | None = None,
    parent_mask: Array | None = None,
    leaky: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    """Computes the couplings of every iteration of `dynamic_routing`, for a look inside.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", section 2, equation 3,
    https://arxiv.org/abs/1710.09829.

    Args:
      poses: `[..., I, P]`, like all arguments as in `dynamic_routing`.
      weights: `[I, P, J, D]`, `[P, J, D]` or `[P, D]`.
      num_iterations: T.
      prior: `[I, J]` or `[..., I, J]`.
      bias: `[J, D]`.
      mask: `[I]` or `[..., I]`; the couplings of masked capsules are 0.
      parent_mask: `[J]` or `[..., J]`; the couplings to masked capsules are 0.
      leaky: Whether a child may go to no parent.
      axis_name: The axis over which the input capsules are split, and so is the result.

    Returns:
      `[T, ..., I, J]`, float32 at least; those of one child over its parents sum to 1, or to
      less if `leaky`, or to 0 if it has no parent.

    Raises:
      ValueError: A shape or setting is wrong.
      TypeError: A dtype is wrong.

    Example:
      >>> couplings = routing_couplings(jnp.ones((6, 4)), jnp.ones((6, 4, 3, 5)))
      >>> couplings.shape, float(couplings[0, 0, 0])
      ((3, 6, 3), 0.3333333432674408)
    """
    name = "routing_couplings"
    num_iterations = _arguments.check_settings(name, num_iterations, "full", axis_name)
    checked = _arguments.check_inputs(
        name, poses, weights, prior=prior, mask=mask, parent_mask=parent_mask
    )
    spec = Spec(checked.num_parents, leaky=leaky)
    routing = Routing(spec, _step, num_iterations, axis_name=axis_name)
    inputs, leading, parents = checked
    bias = _checked_bias(name, bias, checked, axis_name)
    shape = *leading, inputs.poses.shape[1], parents
    couplings = jnp.stack(
        [
            reshape_examples(found, shape, has_examples=bool(leading))
            for found in unroll_couplings(routing, inputs, bias)
        ]
    )
    if mask is None:
        return couplings
    kept = jnp.broadcast_to(jnp.asarray(mask), couplings.shape[1:-1])[None, ..., None]
    return jnp.where(kept, couplings, 0)


def _step(
    t: int, total: Array | None, moments: Moments, bias: Array | None
) -> tuple[Array, State, Array]:
    """Squashes the weighted sums; logits are the agreements with the sum of all outputs so far."""
    del t
    sums = moments.first
    outputs = squash(sums if bias is None else sums + bias.astype(sums.dtype)[None])
    total = outputs if total is None else total + outputs
    return total, State(b=total), outputs


def _outputs(checked: _arguments.Checked, outputs: Array) -> Array:
    """Returns the outputs in the caller's shape and dtype, 0 for masked parents."""
    inputs, leading, parents = checked
    if inputs.parent_mask is not None:
        outputs = jnp.where(inputs.parent_mask[..., None], outputs, 0)
    shape = *leading, parents, outputs.shape[-1]
    outputs = outputs.astype(inputs.poses.dtype)
    return reshape_examples(outputs, shape, has_examples=bool(leading))


def _checked_bias(
    function: str, bias: Array | None, checked: _arguments.Checked, axis_name: AxisName | None
) -> Array | None:
    """Checks the bias; it and the parent mask belong to the sums of all devices."""
    inputs, _, parents = checked
    shape = parents, votes_depth(inputs)
    bias = _arguments.check_parameter(function, "bias", bias, "[J, D]", shape, inputs.poses)
    _arguments.check_same_along(function, "bias", bias, axis_name)
    _arguments.check_same_along(function, "parent_mask", inputs.parent_mask, axis_name)
    return bias
