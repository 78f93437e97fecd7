"""Self-attention routing of Efficient-CapsNet (Mazzia, Salvetti, Chiaberge 2021)."""

import jax
import jax.numpy as jnp
from jax import Array

from capsjax import shapes
from capsjax.kernels.dtypes import accumulation_dtype
from capsjax.kernels.sharding import sum_over
from capsjax.kernels.squash import unit_and_length
from capsjax.kernels.vote_passes.passes import (
    Implementation,
    Inputs,
    Moments,
    Spec,
    State,
    is_uniform,
)
from capsjax.kernels.vote_passes.unroll import Routing, unroll
from capsjax.routing import _arguments


def self_attention_routing(
    poses: Array,
    weights: Array,
    *,
    couplings_bias: Array | None = None,
    prior: Array | None = None,
    mask: Array | None = None,
    parent_mask: Array | None = None,
    implementation: str | Implementation | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    """Route input capsules to output capsules by self-attention, without iterations.

    Child i votes `v_ij = poses[i] @ weights[i, :, j]` for the pose of parent j. Its logit for
    parent j is the sum, over all children k, of the dot products `v_ij · v_kj / sqrt(D)`. Couplings
    are a softmax of the logits over the parents, plus `couplings_bias`. The sum of the votes times
    couplings, s, becomes the output `(1 - exp(-|s|)) s/|s|`.

    The sum over k equals `v_ij · S_j` with the sum S_j of all votes for parent j. So two passes
    over the votes compute the outputs, and an attention matrix `[I, I]` is never formed.

    Implementations, precision and sharding are those of `dynamic_routing`. Except with
    `"reference"`, votes are not stored, and there is no forward-mode derivative.

    Source: Mazzia, Salvetti and Chiaberge, "Efficient-CapsNet: capsule network with self-attention
    routing", section "Self-Attention Routing", https://arxiv.org/abs/2101.12491. The order of bias
    and softmax is that of the authors' code.

    Args:
      poses: `[..., I, P]`, floating. Sums are accumulated in float32 at least; matrix products
        follow `jax.default_matmul_precision`.
      weights: `[I, P, J, D]`, in the dtype of `poses`; or `[P, J, D]`, shared by the input
        capsules; or `[P, D]`, shared by all capsules, whose outputs then differ by `prior` alone.
      couplings_bias: `[I, J]`, added to the couplings after the softmax; None for zeros, with which
        training starts.
      prior: `[I, J]` or `[..., I, J]`, added to the logits; None for zeros. A logit of -infinity
        makes the softmax 0.
      mask: Booleans `[I]` or `[..., I]`; input capsules at False, such as padding, are ignored.
      parent_mask: Booleans `[J]` or `[..., J]`; output capsules at False take no part in the
        softmax, and have output 0.
      implementation: As in `dynamic_routing`: a name, an `Implementation`, or None to select when
        the program is lowered.
      axis_name: Axis, or tuple of axes, of the enclosing `jax.shard_map` over which input capsules
        are sharded, with `weights`, `couplings_bias`, `prior` and `mask`. `parent_mask` and the
        result do not vary over it.

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
      >>> outputs = self_attention_routing(poses, weights, couplings_bias=jnp.zeros((6, 3)))
      >>> outputs.shape, bool(jnp.all(lengths(outputs) < 1))
      ((2, 3, 5), True)
    """
    name = "self_attention_routing"
    shapes.check_axis_name(name, axis_name)
    checked = _arguments.check_inputs(
        name, poses, weights, prior=prior, mask=mask, parent_mask=parent_mask
    )
    implementation = _arguments.check_implementation(name, implementation)
    inputs, parents = checked.inputs, checked.num_parents
    _arguments.check_same_along(name, "parent_mask", inputs.parent_mask, axis_name)
    shape = inputs.poses.shape[1], parents
    couplings_bias = _arguments.check_parameter(
        name, "couplings_bias", couplings_bias, "[I, J]", shape, inputs.poses
    )
    if couplings_bias is not None:
        couplings_bias = checked.without_masked(couplings_bias, "IJ")
    start, num_passes = State(), 2
    if not is_uniform(inputs, start):
        # Prior and parent mask belong to the softmax alone, so no pass with them gives all votes.
        sums = sum_over(axis_name, _weighted_sums(inputs, jnp.ones(shape, inputs.poses.dtype)))
        start, num_passes = State(b=sums / sums.shape[-1] ** 0.5), 1
    routing = Routing(
        Spec(parents), _step, num_passes, implementation=implementation, axis_name=axis_name
    )
    sums = unroll(routing, inputs, start=(None, start))
    if couplings_bias is not None:
        sums += sum_over(axis_name, _weighted_sums(inputs, couplings_bias))
    return checked.placed(exponential_squash(sums))


def _step(t: int, carry: None, moments: Moments, params: object) -> tuple[None, State, Array]:
    """Take the sum of all votes, J times the sum with uniform couplings, as the next queries."""
    del t, params
    sums = moments.first
    parents, depth = sums.shape[1:]
    return carry, State(b=sums * (parents / depth**0.5)), sums


def _weighted_sums(inputs: Inputs, factors: Array) -> Array:
    """Compute the sums `[B, J, D]` of votes times factors `[I, J]`, without storing votes."""
    dtype = accumulation_dtype(inputs.poses.dtype)
    poses, weights = inputs.poses[:, :, 0].astype(dtype), inputs.weights.astype(dtype)
    factors = factors.astype(dtype)
    if weights.ndim == 4:
        return jnp.einsum("bip,ipjd->bjd", poses, weights * factors[:, None, :, None])
    sums = jnp.einsum("bip,ij->bjp", poses, factors)
    return jnp.einsum("bjp,pjd->bjd" if weights.ndim == 3 else "bjp,pd->bjd", sums, weights)


@jax.custom_jvp
def exponential_squash(x: Array) -> Array:
    """Shrink vectors `[..., D]` to a length in [0, 1): `(1 - exp(-|x|)) x/|x|`.

    As in `capsjax.squash`, values and derivatives are finite for every input but NaN, and the
    length is below 1 by at least a rounding error. The derivative at 0 is its limit, the identity.
    """
    unit, length = unit_and_length(x, -1)
    eps = jnp.finfo(length.dtype).eps
    below_one = 1 - max(4 * eps, jnp.finfo(x.dtype).eps)
    return (unit * jnp.minimum(-jnp.expm1(-length), below_one)).astype(x.dtype)


@exponential_squash.defjvp
def _exponential_squash_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    unit, length = unit_and_length(x, -1)
    dx = dx.astype(unit.dtype)
    # v = f(n) x with n = |x| and e = x/n, so dv = f dx + n f'(n) e (e·dx).
    short = length == 0
    factor = jnp.where(short, 1, -jnp.expm1(-length) / jnp.where(short, 1, length))
    slope = jnp.exp(-length) - factor
    radial = jnp.sum(unit * dx, -1, keepdims=True)
    return exponential_squash(x), (factor * dx + slope * unit * radial).astype(x.dtype)
