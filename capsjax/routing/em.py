"""EM routing of matrix capsules (Hinton, Sabour, Frosst 2018)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from capsjax import shapes
from capsjax.kernels.dtypes import accumulation_dtype
from capsjax.kernels.vote_passes.passes import Implementation, Moments, Spec, State
from capsjax.kernels.vote_passes.reference import divide
from capsjax.kernels.vote_passes.unroll import Routing, unroll
from capsjax.routing import _arguments

# Of the paper's inverse temperatures: lambda_t = inverse_temperature · (1 − DECAY^t).
DECAY = 0.95


class Params(NamedTuple):
    """Arrays of every step, in the accumulation dtype."""

    beta_u: Array  # [J]
    beta_a: Array  # [J]
    inverse_temperature: Array  # [T]
    cost_scale: Array  # [T]
    min_variance: Array  # scalar


def em_routing(
    poses: Array,
    activations: Array,
    weights: Array,
    *,
    beta_u: Array,
    beta_a: Array,
    num_iterations: int = 3,
    inverse_temperature: float | Array = 0.01,
    cost_scale: float | Array = 1.0,
    min_variance: float = 1e-4,
    coordinates: Array | None = None,
    prior: Array | None = None,
    mask: Array | None = None,
    parent_mask: Array | None = None,
    stride: int | None = None,
    competition: str = "positions",
    gradient: str = "full",
    implementation: str | Implementation | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[Array, Array]:
    """Route capsules to output capsules by EM, with votes and routing fused.

    Each output capsule is a Gaussian with a diagonal covariance over the votes `M_i W_ij`. An M
    step computes its mean, variances and activation from the votes, weighted by couplings times
    `activations`. An E step computes the couplings: a child's posterior over its parents. The votes
    are never stored: T passes forward, T - 1 passes and one pass for the gradients backward. A
    pass merges means and variances of parts (Chan's rule), so float32 is enough for votes whose
    mean is a thousand times their standard deviation.

    Source: Hinton, Sabour and Frosst, "Matrix capsules with EM routing", procedure 1,
    https://openreview.net/forum?id=HJWLfGWRb. `cost_scale` is the remedy of Gritzman, "Avoiding
    Implementation Pitfalls of Matrix Capsules with EM Routing", https://arxiv.org/abs/1907.00652.

    Args:
      poses: `[..., I, R, P]` (matrices) or `[..., I, P]` (vectors), floating; accumulated in
        float32 at least.
      activations: `[..., I]` in [0, 1], in the dtype of `poses` or its accumulation dtype.
      weights: `[I, P, J, E]`, in the dtype of `poses`; `[P, J, E]`, shared by the input capsules;
        or `[P, E]`, shared by all, whose outputs then differ by `prior` alone.
      beta_u: `[J]`, cost of describing a capsule, for each component of a pose.
      beta_a: `[J]`, cost of not activating a capsule.
      num_iterations: T, at least 1.
      inverse_temperature: λ, at least 0: the final value of the paper's schedule
        λ (1 − 0.95^t), t = 1 … T; or the values of all iterations, `[T]`. May be traced.
      cost_scale: Factor on the cost, or one for each iteration, `[T]`; 1 in the paper,
        `100 * J / I` after Gritzman, so that one λ fits layers with many and with few children.
      min_variance: Added to the variances, above 0.
      coordinates: `[I, R, E]` or, for vectors, `[I, D]`: added to the votes of each child
        (coordinate addition of the class capsules).
      prior: Logits added to those of every E step, `[I, J]` or `[..., I, J]`; -infinity makes a
        coupling 0.
      mask: Booleans `[I]` or `[..., I]`; input capsules at False are ignored.
      parent_mask: Booleans `[J]` or `[..., J]`; output capsules at False have couplings, poses and
        activations 0.
      stride: Makes the layer a convolution without padding: `poses` and `activations` have axes
        H, W before I, the results h, w before J, weights are `[K, L, I, P, J, E]`, `prior`
        `[K, L, I, J]` or `[..., h, w, K, L, I, J]`, `mask` `[H, W, I]`, `parent_mask`
        `[h, w, J]` or `[J]`.
      competition: In a convolution: `"positions"`, as in the paper, if a child distributes itself
        over the output capsules of all windows that contain it; or `"types"`, of each window by
        itself.
      gradient: `"full"`; or `"last"`, with the last couplings constant.
      implementation: As in `dynamic_routing`; the votes of one offset of a convolution with
        `"positions"` are stored, for some examples at a time.
      axis_name: As in `dynamic_routing`: input capsules are sharded, with `weights`, `activations`,
        `coordinates`, `prior` and `mask`.

    Returns:
      Poses `[..., J, R, E]` or `[..., J, D]`, and activations `[..., J]`, in the dtype of `poses`.

    Raises:
      ValueError: A shape, setting or, unless it is traced, a value is wrong.
      TypeError: A dtype is wrong.
      Unsupported: At lowering, the named implementation does not accept the arguments.

    Example:
      >>> poses, activations = jnp.ones((2, 6, 4, 4)), jnp.full((2, 6), 0.5)
      >>> weights = jax.random.normal(jax.random.key(0), (6, 4, 3, 4))
      >>> poses, activations = em_routing(
      ...     poses, activations, weights, beta_u=jnp.zeros(3), beta_a=jnp.zeros(3)
      ... )
      >>> poses.shape, activations.shape
      ((2, 3, 4, 4), (2, 3))
    """
    name = "em_routing"
    num_iterations = _arguments.check_settings(name, num_iterations, gradient, axis_name)
    windows = _arguments.check_windows(name, stride, competition)
    checked = _arguments.check_inputs(
        name,
        poses,
        weights,
        prior=prior,
        mask=mask,
        parent_mask=parent_mask,
        activations=activations,
        coordinates=coordinates,
        windows=windows,
    )
    _arguments.check_merges(name, checked, axis_name)
    like, parents = checked.inputs.poses, (checked.num_parents,)
    dtype = accumulation_dtype(like.dtype)
    beta_u = _arguments.check_required(name, "beta_u", beta_u, "[J]", parents, like)
    beta_a = _arguments.check_required(name, "beta_a", beta_a, "[J]", parents, like)
    beta_u, beta_a = (checked.without_masked(x, "J") for x in (beta_u, beta_a))
    temperatures = _arguments.check_factors(
        name, "inverse_temperature", inverse_temperature, num_iterations, dtype
    )
    if temperatures.ndim == 0:
        temperatures *= 1 - DECAY ** jnp.arange(1, num_iterations + 1, dtype=dtype)
    scales = _arguments.check_factors(name, "cost_scale", cost_scale, num_iterations, dtype)
    least = shapes.check_positive_number(name, "min_variance", min_variance)
    params = Params(
        beta_u.astype(dtype),
        beta_a.astype(dtype),
        temperatures,
        jnp.broadcast_to(scales, (num_iterations,)),
        jnp.asarray(least, dtype),
    )
    for key, value in params._asdict().items():
        _arguments.check_same_along(name, key, value, axis_name)
    routing = Routing(
        Spec(checked.num_parents, "gaussian", "central"),
        _step,
        num_iterations,
        gradient,
        _arguments.check_implementation(name, implementation),
        axis_name,
        windows,
    )
    means, activations = unroll(routing, checked.inputs, params)
    return checked.placed(means), checked.placed(activations)


def _step(
    t: int, carry: None, moments: Moments, params: Params
) -> tuple[None, State, tuple[Array, Array]]:
    """Run an M step, and return the Gaussians of the next E step; mass 0 gives mean 0."""
    variances = divide(moments.second, moments.mass) + params.min_variance
    logs = jnp.log(variances)
    cost = jnp.sum(params.beta_u[None, :, None] + 0.5 * logs, -1) * moments.mass
    evidence = params.beta_a[None] - params.cost_scale[t - 1] * cost
    evidence = params.inverse_temperature[t - 1] * evidence
    bias = jax.nn.log_sigmoid(evidence) - 0.5 * jnp.sum(logs, -1)
    # The constant of the normal density is the same for all parents.
    state = State(k=bias, z=moments.first, q=1 / variances)
    return carry, state, (moments.first, jax.nn.sigmoid(evidence))
