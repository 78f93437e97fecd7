"""Variational Bayes routing with diagonal covariances (Ribeiro, Leontidis, Kollias 2020)."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.scipy.special import digamma

from capsjax import shapes
from capsjax.kernels.dtypes import accumulation_dtype
from capsjax.kernels.vote_passes.passes import Implementation, Moments, Spec, State
from capsjax.kernels.vote_passes.unroll import Routing, unroll
from capsjax.routing import _arguments


class Params(NamedTuple):
    """Arrays of every step, in the accumulation dtype."""

    beta_u: Array  # [J]
    beta_a: Array  # [J]
    alpha0: Array  # scalar, of the Dirichlet prior of the mixing proportions
    kappa0: Array  # scalar, number of observations that the prior of a mean, 0, counts for
    psi0: Array  # scalar, inverse scale of the Wishart prior of the precisions
    nu0: Array  # scalar, degrees of freedom of the Wishart prior


def variational_bayes_routing(
    poses: Array,
    activations: Array,
    weights: Array,
    *,
    beta_u: Array,
    beta_a: Array,
    num_iterations: int = 3,
    alpha0: float = 1.0,
    kappa0: float = 1.0,
    psi0: float = 1.0,
    nu0: float | None = None,
    coordinates: Array | None = None,
    prior: Array | None = None,
    mask: Array | None = None,
    parent_mask: Array | None = None,
    stride: int | None = None,
    competition: str = "positions",
    starts_at_types: bool = False,
    gradient: str = "full",
    implementation: str | Implementation | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[Array, Array]:
    """Route capsules to output capsules by variational Bayes, with votes and routing fused.

    As in EM routing each output capsule is a Gaussian over the votes, but with a posterior over its
    mean, variances and mixing proportion, which keeps a parent with few children from collapsing
    onto them. Couplings are the expected responsibilities. In the paper a batch normalisation
    follows on poses and logits, and then the sigmoid of the logits: apply them outside.

    Source: Ribeiro, Leontidis and Kollias, "Capsule Routing via Variational Bayes", section 3 and
    algorithm 1, https://arxiv.org/abs/1905.11455, with diagonal precisions and a prior mean of 0.

    Args:
      poses: `[..., I, R, P]` (matrices) or `[..., I, P]` (vectors), floating; accumulated in
        float32 at least.
      activations: `[..., I]` in [0, 1], in the dtype of `poses` or its accumulation dtype.
      weights: `[I, P, J, E]`, `[P, J, E]` or `[P, E]`, as in `em_routing`.
      beta_u: `[J]`, added to the entropy of a capsule.
      beta_a: `[J]`, from which they are subtracted.
      num_iterations: T, at least 1.
      alpha0: Concentration of the Dirichlet prior, above 0.
      kappa0: Observations that the prior mean counts for, above 0.
      psi0: Diagonal of the inverse scale of the Wishart prior, above 0.
      nu0: Degrees of freedom of the Wishart prior, above D - 1; None for D + 1.
      coordinates: `[I, R, E]` or `[I, D]`, added to the votes of each child.
      prior: `[I, J]` or `[..., I, J]`, added to the logits of every iteration.
      mask: Booleans `[I]` or `[..., I]`; input capsules at False are ignored.
      parent_mask: Booleans `[J]` or `[..., J]`; output capsules at False have couplings, poses and
        logits 0, and no mixing proportion.
      stride: Makes the layer a convolution without padding, as in `em_routing`.
      competition: `"positions"` or `"types"`, as in `em_routing`.
      starts_at_types: Whether the first couplings of a convolution are 1/J, as in the authors'
        code, although a child belongs to several windows; else they sum to 1 over all of these.
      gradient: `"full"`; or `"last"`, with the last couplings constant.
      implementation: As in `em_routing`.
      axis_name: As in `em_routing`.

    Returns:
      Poses `[..., J, R, E]` or `[..., J, D]` and logits of the activations `[..., J]`, in the dtype
      of `poses`.

    Raises:
      ValueError: A shape, setting or, unless it is traced, a value is wrong.
      TypeError: A dtype is wrong.
      Unsupported: At lowering, the named implementation does not accept the arguments.

    Example:
      >>> poses, activations = jnp.ones((2, 6, 4, 4)), jnp.full((2, 6), 0.5)
      >>> weights = jax.random.normal(jax.random.key(0), (6, 4, 3, 4))
      >>> poses, logits = variational_bayes_routing(
      ...     poses, activations, weights, beta_u=jnp.zeros(3), beta_a=jnp.zeros(3)
      ... )
      >>> poses.shape, logits.shape
      ((2, 3, 4, 4), (2, 3))
    """
    name = "variational_bayes_routing"
    num_iterations = _arguments.check_settings(name, num_iterations, gradient, axis_name)
    windows = _arguments.check_windows(name, stride, competition, starts_at_types=starts_at_types)
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
    inputs, parents, depth = checked.inputs, (checked.num_parents,), checked.depth
    dtype = accumulation_dtype(inputs.poses.dtype)
    beta_u = _arguments.check_required(name, "beta_u", beta_u, "[J]", parents, inputs.poses)
    beta_a = _arguments.check_required(name, "beta_a", beta_a, "[J]", parents, inputs.poses)
    beta_u, beta_a = (checked.without_masked(x, "J") for x in (beta_u, beta_a))
    nu0 = depth + 1 if nu0 is None else nu0
    numbers = {"alpha0": alpha0, "kappa0": kappa0, "psi0": psi0, "nu0": nu0}
    for key, number in numbers.items():
        least = depth - 1 if key == "nu0" else 0
        shapes.check_positive_number(name, key, number, above=least)
    params = Params(*(jnp.asarray(x, dtype) for x in (beta_u, beta_a, *numbers.values())))
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
    # Which parents have a mixing proportion: the carry, because it belongs to the examples.
    allowed = None if inputs.parent_mask is None else inputs.parent_mask.astype(dtype)
    means, logits = unroll(routing, inputs, params, (allowed, State()))
    return checked.placed(means), checked.placed(logits)


def _step(
    t: int, allowed: Array | None, moments: Moments, params: Params
) -> tuple[Array | None, State, tuple[Array, Array]]:
    """Update the posteriors, and return the expected Gaussians of the next responsibilities."""
    del t
    mass, depth = moments.mass, moments.first.shape[-1]
    alpha, kappa, nu = params.alpha0 + mass, params.kappa0 + mass, params.nu0 + mass
    mean = (mass / kappa)[..., None] * moments.first
    toward_zero = (params.kappa0 * mass / kappa)[..., None] * jnp.square(moments.first)
    psi = params.psi0 + moments.second + toward_zero
    total = jnp.sum(alpha if allowed is None else alpha * allowed, -1, keepdims=True)
    total = jnp.where(total > 0, total, 1)  # 0 if all parents are masked
    log_proportions = digamma(alpha) - digamma(total)
    components = jnp.arange(depth, dtype=mass.dtype)[None, None]
    log_determinants = (
        jnp.sum(digamma(0.5 * (nu[..., None] - components)), -1)
        + depth * math.log(2)
        - jnp.sum(jnp.log(psi), -1)
    )
    entropy = 0.5 * (depth * math.log(2 * math.pi * math.e) - log_determinants)
    bias = log_proportions + 0.5 * log_determinants - 0.5 * depth / kappa
    state = State(k=bias, z=mean, q=nu[..., None] / psi)
    cost = jnp.exp(log_proportions) * entropy + params.beta_u[None]
    return allowed, state, (mean, params.beta_a[None] - cost)
