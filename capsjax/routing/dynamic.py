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
    stride: int | None = None,
    gradient: str = "full",
    implementation: str | Implementation | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    """Route input capsules to output capsules by agreement, with votes and routing fused.

    Child i votes `poses[i] @ weights[i, :, j]` for the pose of parent j. Its couplings, a softmax
    over all parents, start from `prior`. Each iteration squashes the weighted sums of the votes
    into outputs, and adds to a child's logit for a parent the agreement (dot product) of its vote
    with that parent's output.

    Implementations: `"reference"` stores the votes, and is differentiable in every mode. `"xla"`
    (plain JAX, any platform), `"triton"` (NVIDIA GPUs, sm_80 and newer) and `"mosaic_tpu"` (TPUs)
    store no votes, forward or backward, and have no forward-mode derivative. None selects the
    platform's kernel if it accepts the arguments, else `"xla"`. The kernels accept float32 and
    bfloat16 with weights `[I, P, J, D]`, and refuse batches of symbolic size. `"triton"` needs P up
    to 16 and D up to 64; `"mosaic_tpu"` needs the weights of 128 capsules in vector memory (P·J·D
    up to about 80,000 on a v5e or v6e).

    Precision: kernels multiply float32 as sums of bfloat16 parts, by `jax.default_matmul_precision`
    1 (error about 5e-3), 2 ("high", 3e-5) or 3 ("highest", 1e-6); by default 2 on a GPU and 1 on a
    TPU.

    Sharding: a batch sharded by `jax.shard_map`, or over Explicit axes, stays on its devices
    without any setting. Over Auto axes, whose sharding only XLA's partitioner knows, only `"xla"`
    does so. To shard the input capsules, give `axis_name`: each iteration then sums `[..., J, D]`
    over the devices, forward and backward, and communicates nothing else.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", section 2 and
    procedure 1, https://arxiv.org/abs/1710.09829.

    Controls (Paik, Kwak and Kim, https://arxiv.org/abs/1907.13327): one iteration has uniform
    couplings, and random ones with `prior=scale * jax.random.normal(key, (I, J))`.

    Args:
      poses: `[..., I, P]`, floating. Sums are accumulated in float32 at least; matrix products
        follow `jax.default_matmul_precision`.
      weights: `[I, P, J, D]`, in the dtype of `poses`; or `[P, J, D]`, shared by the input
        capsules; or `[P, D]`, shared by all capsules, whose outputs then differ by `prior` alone.
      num_iterations: T, at least 1.
      prior: Logits before the first iteration, `[I, J]` or `[..., I, J]`; None for zeros. A logit
        of -infinity makes the coupling 0.
      bias: `[J, D]`, added to the weighted sums in every iteration, before the squash.
      mask: Booleans `[I]` or `[..., I]`; input capsules at False, such as padding, are ignored.
      parent_mask: Booleans `[J]` or `[..., J]`; output capsules at False have couplings and
        outputs 0.
      leaky: Whether each softmax has one more logit, fixed at 0, which stands for no parent.
      stride: Makes the layer a convolution without padding, in which children compete within a
        window: axes H, W come before I in `poses` and `mask`, h, w before J in the result and
        `parent_mask`; weights are `[K, L, I, P, J, D]`, `prior` `[K, L, I, J]` or
        `[..., h, w, K, L, I, J]`.
      gradient: `"full"`, as the authors' code; or `"last"`, with the last couplings constant (in
        second derivatives with `"reference"` only): cheaper, but 2 % to 44 % of the full gradient
        is missing (T = 3, weights of standard deviation 0.02 to 0.1).
      implementation: A name above, an `Implementation` of `capsjax.kernels.vote_passes.passes`
        (name and tile sizes), or None to select when the program is lowered.
      axis_name: Axis, or tuple of axes, of the enclosing `jax.shard_map` over which input capsules
        are sharded, with `weights`, `prior` and `mask`. `bias`, `parent_mask` and the result do
        not vary over it.

    Returns:
      Outputs `[..., J, D]`, in the dtype of `poses`, of length below 1 (in half precision, rounding
      may make it 1).

    Raises:
      ValueError: A shape or setting is wrong; at lowering, the named implementation runs on
        another platform.
      TypeError: A dtype is wrong.
      Unsupported: At lowering, the named implementation does not accept the arguments.

    Example:
      >>> poses, weights = jnp.ones((2, 6, 4)), jnp.full((6, 4, 3, 5), 0.1)
      >>> outputs = dynamic_routing(poses, weights, num_iterations=3)
      >>> outputs.shape, bool(jnp.all(lengths(outputs) < 1))
      ((2, 3, 5), True)

      The same with input capsules sharded over a mesh, here of one device:

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
    windows = _arguments.check_windows(name, stride)
    checked = _arguments.check_inputs(
        name,
        poses,
        weights,
        prior=prior,
        mask=mask,
        parent_mask=parent_mask,
        windows=windows,
    )
    routing = Routing(
        Spec(checked.num_parents, leaky=leaky),
        _step,
        num_iterations,
        gradient,
        _arguments.check_implementation(name, implementation),
        axis_name,
        windows,
    )
    bias = _checked_bias(name, bias, checked, axis_name)
    return checked.placed(unroll(routing, checked.inputs, bias))


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
    """Route stored votes to output capsules by agreement; differentiable in every mode.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", procedure 1,
    https://arxiv.org/abs/1710.09829.

    Args:
      votes: `[..., I, J, D]`, floating; routed in float32 at least.
      num_iterations: T. It and the arguments below are those of `dynamic_routing`.
      prior: `[I, J]` or `[..., I, J]`.
      bias: `[J, D]`.
      mask: `[I]` or `[..., I]`.
      parent_mask: `[J]` or `[..., J]`.
      leaky: Whether each softmax has one more logit, fixed at 0.
      gradient: `"full"` or `"last"`.
      axis_name: Axis over which `votes`, `prior` and `mask` are sharded by input capsule.

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
    return checked.placed(unroll(routing, checked.inputs, bias))


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
    """Compute the couplings of every iteration of `dynamic_routing`.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", section 2, equation 3,
    https://arxiv.org/abs/1710.09829.

    Args:
      poses: `[..., I, P]`. It and the arguments below are those of `dynamic_routing`.
      weights: `[I, P, J, D]`, `[P, J, D]` or `[P, D]`.
      num_iterations: T.
      prior: `[I, J]` or `[..., I, J]`.
      bias: `[J, D]`.
      mask: `[I]` or `[..., I]`; the couplings of masked input capsules are 0.
      parent_mask: `[J]` or `[..., J]`; the couplings to masked output capsules are 0.
      leaky: Whether each softmax has one more logit, fixed at 0.
      axis_name: Axis over which the input capsules are sharded; the result is sharded alike.

    Returns:
      `[T, ..., I, J]`, float32 at least. Over J they sum to 1; to less if `leaky`; to 0 for an
      input capsule that is masked or has no output capsule.

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
    inputs, leading, parents, *_ = checked
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
    """Squash the weighted sums; the next logits are agreements with the sum of outputs so far."""
    del t
    sums = moments.first
    outputs = squash(sums if bias is None else sums + bias.astype(sums.dtype)[None])
    total = outputs if total is None else total + outputs
    return total, State(b=total), outputs


def _checked_bias(
    function: str, bias: Array | None, checked: _arguments.Checked, axis_name: AxisName | None
) -> Array | None:
    """Check the bias, and that neither it nor the parent mask varies over `axis_name`.

    Every device applies both to the same sums over all input capsules.
    """
    inputs, shape = checked.inputs, (checked.num_parents, checked.depth)
    bias = _arguments.check_parameter(function, "bias", bias, "[J, D]", shape, inputs.poses)
    _arguments.check_same_along(function, "bias", bias, axis_name)
    bias = None if bias is None else checked.without_masked(bias, "JD")
    _arguments.check_same_along(function, "parent_mask", inputs.parent_mask, axis_name)
    return bias
