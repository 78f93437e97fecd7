"""Self-routing (Hahn, Pyeon, Kim 2019)."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from capsjax import shapes
from capsjax.kernels.dtypes import accumulation_dtype
from capsjax.kernels.vote_passes.passes import Implementation, Moments, Spec, State
from capsjax.kernels.vote_passes.reference import divide
from capsjax.kernels.vote_passes.unroll import Routing, unroll
from capsjax.kernels.vote_passes.windows import Windows, grid, offsets, window
from capsjax.routing import _arguments


def self_routing(
    poses: Array,
    activations: Array,
    weights: Array,
    routing_weights: Array,
    *,
    routing_bias: Array | None = None,
    prior: Array | None = None,
    mask: Array | None = None,
    parent_mask: Array | None = None,
    stride: int | None = None,
    implementation: str | Implementation | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[Array, Array]:
    """Route input capsules by a subordinate routing network of each capsule, without agreement.

    Child i computes its couplings from its own pose, by a softmax over the parents of
    `poses[i] @ routing_weights[i] + routing_bias[i]`. The activation of a parent is the mean of
    these couplings, weighted by the activations of the children; its pose is the mean of the votes
    `poses[i] @ weights[i, :, j]`, weighted by activation times coupling. There is one pass over the
    votes and no iteration.

    Implementations, precision and sharding are those of `dynamic_routing`. No votes are stored,
    forward or backward; the logits are, `[..., I, J]` (`[..., h, w, K, L, I, J]` of a convolution).

    Source: Hahn, Pyeon and Kim, "Self-Routing Capsule Networks", section 3, NeurIPS 2019. Its
    equations have no bias; the authors' code has one.

    Args:
      poses: `[..., I, P]`, or matrices `[..., I, R, P]`, floating.
      activations: `[..., I]`, in [0, 1]; they tell by their number of axes whether poses are
        matrices.
      weights: `[I, P, J, E]`, in the dtype of `poses`; or `[P, J, E]`, shared by the input
        capsules; or `[P, E]`, shared by all capsules.
      routing_weights: `[I, P, J]`, or `[I, R, P, J]` for matrices. The authors start from zeros,
        which are uniform couplings.
      routing_bias: `[I, J]`, added to the logits.
      prior: Logits to add, `[I, J]` or `[..., I, J]`. A logit of -infinity makes the coupling 0.
      mask: Booleans `[I]` or `[..., I]`; input capsules at False, such as padding, are ignored.
      parent_mask: Booleans `[J]` or `[..., J]`; output capsules at False have couplings,
        activations and poses 0.
      stride: None if all input capsules reach all output capsules. Otherwise the routing is a
        convolution with this stride along both axes: axes H, W precede I in `poses`, `activations`
        and `mask`; K, L precede I in `weights`, `routing_weights`, `routing_bias` and `prior`; h, w
        precede J in the results and in `parent_mask`, and K in a prior of each example. Input
        capsules route within each window separately.
      implementation: As in `dynamic_routing`.
      axis_name: Axis, or tuple of axes, of the enclosing `jax.shard_map` over which input capsules
        are sharded, with `weights`, `routing_weights`, `routing_bias`, `prior` and `mask`.

    Returns:
      Poses `[..., J, D]`, or `[..., J, R, E]` for matrices, and activations `[..., J]`, in the
      dtype of `poses`. The activations sum to 1 over the parents, because the mean is over the
      children with a reachable parent only. Both are 0, with derivative 0, where all activations
      are 0.

    Raises:
      ValueError: A shape or setting is wrong; at lowering, the named implementation runs on
        another platform.
      TypeError: A dtype is wrong.
      Unsupported: At lowering, the named implementation does not accept the arguments.

    Example:
      >>> poses, activations = jnp.ones((2, 6, 4)), jnp.full((2, 6), 0.5)
      >>> weights, routing_weights = jnp.full((6, 4, 3, 5), 0.1), jnp.zeros((6, 4, 3))
      >>> outputs, probabilities = self_routing(poses, activations, weights, routing_weights)
      >>> outputs.shape, [round(float(x), 4) for x in probabilities[0]]
      ((2, 3, 5), [0.3333, 0.3333, 0.3333])
    """
    name = "self_routing"
    shapes.check_axis_name(name, axis_name)
    windows = _arguments.check_windows(name, stride, "types")
    poses = shapes.as_array(name, "poses", poses)
    activations = shapes.as_array(name, "activations", activations)
    routing_weights = shapes.as_array(name, "routing_weights", routing_weights)
    if prior is None and jnp.ndim(weights) == 2 and min(activations.ndim, routing_weights.ndim) > 0:
        # Parents that share weights are distinguished by the routing weights.
        prior = jnp.zeros((activations.shape[-1], routing_weights.shape[-1]), poses.dtype)
    checked = _arguments.check_inputs(
        name,
        poses,
        weights,
        prior=prior,
        mask=mask,
        parent_mask=parent_mask,
        activations=activations,
        windows=windows,
    )
    _arguments.check_same_along(name, "parent_mask", checked.inputs.parent_mask, axis_name)
    inputs = checked.inputs._replace(
        prior=_logits(name, checked, routing_weights, routing_bias, windows)
    )
    routing = Routing(
        Spec(checked.num_parents, mass=True),
        _step,
        1,
        implementation=_arguments.check_implementation(name, implementation),
        axis_name=axis_name,
        windows=windows,
    )
    poses, activations = unroll(routing, inputs)
    return checked.placed(poses), checked.placed(activations)


def _step(t: int, carry: Any, moments: Moments, params: Any) -> tuple[Any, State, Any]:
    """Divide the sums by the mass; the mass of all parents is that of the children."""
    del t, params
    mass = moments.mass
    total = jnp.sum(mass, 1, keepdims=True)
    nonzero = total > 0
    activations = jnp.where(nonzero, mass / jnp.where(nonzero, total, 1), 0)
    return carry, State(), (divide(moments.first, mass), activations)


def _logits(
    function: str,
    checked: _arguments.Checked,
    routing_weights: Array,
    routing_bias: Array | None,
    windows: Windows | None,
) -> Array:
    """Compute the logits `[B, I, J]`, or `[B, h, w, K, L, I, J]`, from each child's own pose."""
    poses, prior = checked.inputs.poses, checked.inputs.prior
    *_, children, rows, length = poses.shape
    kernel = () if windows is None else checked.inputs.weights.shape[:2]
    letters = "K, L, I" if windows is not None else "I"
    own = *kernel, children
    pose = (rows, length) if checked.is_matrix else (length,)
    _arguments.check_required(
        function,
        "routing_weights",
        routing_weights,
        f"[{letters}, {'R, P' if checked.is_matrix else 'P'}, J]",
        (*own, *pose, checked.num_parents),
        poses,
    )
    shape = *own, checked.num_parents
    bias = _arguments.check_parameter(
        function, "routing_bias", routing_bias, f"[{letters}, J]", shape, poses
    )
    axes = "IJ" if windows is None else "KLIJ"
    bias = None if bias is None else checked.without_masked(bias, axes)
    routing_weights = checked.without_masked(
        routing_weights, axes.replace("J", "RPJ" if checked.is_matrix else "PJ")
    )
    routing_weights = routing_weights.reshape(*own, rows, length, -1)
    dtype = accumulation_dtype(poses.dtype)
    if windows is None:
        logits = jnp.einsum("birp,irpj->bij", poses, routing_weights, preferred_element_type=dtype)
    else:
        logits = _logits_of_windows(windows, checked, routing_weights, dtype)
    for added in (bias, prior):
        if added is not None:
            shared = (1,) * (logits.ndim - added.ndim)
            logits += added.astype(dtype).reshape(*shared, *added.shape)
    return logits


def _logits_of_windows(
    windows: Windows, checked: _arguments.Checked, routing_weights: Array, dtype: DTypeLike
) -> Array:
    """Compute logits `[B, h, w, K, L, I, J]`, one offset at a time instead of from patches."""
    inputs = checked.inputs
    kernel_shape = routing_weights.shape[:2]
    each = routing_weights.reshape(-1, *routing_weights.shape[2:])

    def one_offset(index: Array) -> Array:
        poses = window(windows, inputs, index, inputs.poses)
        return jnp.einsum("birp,irpj->bij", poses, each[index], preferred_element_type=dtype)

    logits = jnp.moveaxis(lax.map(one_offset, offsets(inputs)), 0, 1)  # [B·h·w, K·L, I, J]
    shape = inputs.poses.shape[0], *grid(windows, inputs), *kernel_shape, *logits.shape[2:]
    return logits.reshape(shape)
