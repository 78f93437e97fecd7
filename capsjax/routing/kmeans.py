"""K-means routing: logits that each iteration replaces (CapsuleLayer, EasyRec, TorchEasyRec)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from capsjax import shapes
from capsjax.kernels.dtypes import accumulation_dtype
from capsjax.kernels.sharding import reshape_examples
from capsjax.kernels.squash import squash
from capsjax.kernels.vote_passes.passes import Implementation, Inputs, Moments, Spec, State
from capsjax.kernels.vote_passes.unroll import Routing, unroll, unroll_couplings
from capsjax.routing import _arguments

SIMILARITIES = ("dot", "cosine")
LOGITS = {"dot": "linear", "cosine": "cosine"}
# Squared length below which the factor of a squash to another power than 1 is constant, so that its
# derivative is finite: the value of TorchEasyRec.
SMALLEST_SQUARE = 1e-14


def kmeans_routing(
    poses: Array,
    weights: Array,
    *,
    num_iterations: int = 3,
    similarity: str = "dot",
    temperature: float | Array = 1.0,
    initial_logits: Array | None = None,
    unit_means: bool = True,
    carry_couplings: bool = False,
    squash_power: float | None = 1.0,
    prior: Array | None = None,
    mask: Array | None = None,
    parent_mask: Array | None = None,
    gradient: str = "full",
    implementation: str | Implementation | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    """Route input capsules by soft k-means: votes are assigned to the sums of the votes before.

    Child i votes `poses[i] @ weights[i, :, j]` for parent j. An iteration computes couplings, a
    softmax over all parents, and the sums of the votes weighted by them; these sums, at length 1,
    are the means of the parents. In the next iteration, `temperature` times the similarity of vote
    and mean replaces a logit: logits do not accumulate, unlike those of `dynamic_routing`, and sums
    are squashed after the last iteration only.

    Implementations, precision and sharding are those of `dynamic_routing`; no kernel computes
    cosines, so that `"cosine"` takes `"xla"` everywhere.

    Sources, which are programs: CapsuleLayer's `k_means_routing`
    (https://github.com/leftthomas/CapsuleLayer), with one more iteration here than there, because
    its first sums, of uniform couplings, are not counted there; EasyRec's capsule layer
    (https://github.com/alibaba/EasyRec), `"cosine"` with noise as `initial_logits`; and
    TorchEasyRec's (https://github.com/alibaba/TorchEasyRec), with `carry_couplings` and without
    `unit_means`. The last two differentiate as `gradient="last"`.

    Args:
      poses: `[..., I, P]`, floating.
      weights: `[I, P, J, D]`, in the dtype of `poses`; or `[P, J, D]`, shared by the input
        capsules; or `[P, D]`, shared by all capsules, whose outputs then differ by
        `initial_logits` or `prior` alone.
      num_iterations: T, at least 1, of passes over the votes. The first has the couplings of
        `initial_logits` and `prior`, uniform without both; T - 1 assign votes to means.
      similarity: `"dot"`, vote · mean; or `"cosine"`, which divides it by the length of the vote.
      temperature: A number, by which similarities are multiplied.
      initial_logits: Logits of the first iteration only, `[I, J]` or `[..., I, J]`.
      unit_means: Whether the sums of the votes are divided by their length before they are compared
        with votes.
      carry_couplings: Whether `temperature` times the couplings of the iteration before is added to
        the logits, which needs `gradient="last"`, and stores them, `[..., I, J]`.
      squash_power: Outputs are s/|s| · (|s|²/(1 + |s|²))^power for the last sums s. None for s.
      prior: Logits to add in each iteration, `[I, J]` or `[..., I, J]`. A logit of -infinity makes
        the coupling 0.
      mask: Booleans `[I]` or `[..., I]`; input capsules at False, such as padding, are ignored.
      parent_mask: Booleans `[J]` or `[..., J]`; output capsules at False have couplings and
        outputs 0.
      gradient: `"full"`, as CapsuleLayer; or `"last"`, with the last couplings constant.
      implementation: As in `dynamic_routing`.
      axis_name: Axis, or tuple of axes, of the enclosing `jax.shard_map` over which input capsules
        are sharded, with `weights`, `initial_logits`, `prior` and `mask`.

    Returns:
      Outputs `[..., J, D]`, in the dtype of `poses`; 0 for a parent whose votes sum to 0.

    Raises:
      ValueError: A shape or setting is wrong; at lowering, the named implementation runs on
        another platform.
      TypeError: A dtype is wrong.
      Unsupported: At lowering, the named implementation does not accept the arguments.

    Example:
      >>> poses, weights = jnp.ones((2, 6, 4)), jnp.arange(360.0).reshape(6, 4, 3, 5) / 100
      >>> outputs = kmeans_routing(poses, weights, similarity="cosine", temperature=20.0)
      >>> outputs.shape, bool(jnp.all(lengths(outputs) < 1))
      ((2, 3, 5), True)
    """
    name = "kmeans_routing"
    num_iterations = _arguments.check_settings(name, num_iterations, gradient, axis_name)
    shapes.check_choice(name, "similarity", similarity, SIMILARITIES)
    if carry_couplings and gradient != "last":
        raise ValueError(
            f"{name}: carry_couplings must be False unless gradient is 'last', because no gradient "
            f"flows through couplings that are carried, got gradient {gradient!r}"
        )
    if squash_power is not None:
        shapes.check_positive_number(name, "squash_power", squash_power)
    poses = shapes.as_array(name, "poses", poses)
    if initial_logits is not None:
        initial_logits = shapes.as_array(name, "initial_logits", initial_logits)
        if prior is None and jnp.ndim(weights) == 2 and min(poses.ndim, initial_logits.ndim) > 1:
            # Parents that share weights are distinguished by the initial logits.
            prior = jnp.zeros((poses.shape[-2], initial_logits.shape[-1]), poses.dtype)
    checked = _arguments.check_inputs(
        name, poses, weights, prior=prior, mask=mask, parent_mask=parent_mask
    )
    inputs = checked.inputs
    _arguments.check_same_along(name, "parent_mask", inputs.parent_mask, axis_name)
    temperature = _checked_temperature(temperature, inputs)
    _arguments.check_same_along(name, "temperature", temperature, axis_name)
    routing = Routing(
        Spec(checked.num_parents, logits=LOGITS[similarity]),
        _Step(unit_means, squash_power),
        num_iterations,
        gradient,
        _arguments.check_implementation(name, implementation),
        axis_name,
    )
    first = _with_initial_logits(name, initial_logits, checked)
    if carry_couplings:
        return checked.placed(_unroll_carrying(routing, inputs, first, temperature))
    if first is inputs:
        return checked.placed(unroll(routing, inputs, temperature)[0])
    # Initial logits are no part of later iterations: two unrolls.
    once = dataclasses.replace(routing, num_iterations=1)
    if num_iterations == 1:
        return checked.placed(unroll(once, first, temperature)[0])
    factor = temperature
    if gradient == "last":  # spares the backward passes of zeros
        first, factor = lax.stop_gradient((first, temperature))
    _, state = unroll(once, first, factor)
    others = dataclasses.replace(routing, num_iterations=num_iterations - 1)
    return checked.placed(unroll(others, inputs, temperature, (None, state))[0])


@dataclasses.dataclass(frozen=True)
class _Step:
    """The step between two passes: the outputs, and the state that compares votes with means."""

    unit_means: bool
    squash_power: float | None

    def __call__(
        self, t: int, carry: Any, moments: Moments, temperature: Array
    ) -> tuple[Any, State, tuple[Array, State]]:
        """Return the carry, the next state, and the outputs with that state."""
        del t
        sums = moments.first
        means = _unit(sums) if self.unit_means else sums
        state = State(b=temperature * means)
        return carry, state, (_squash(sums, self.squash_power), state)


def _unroll_carrying(routing: Routing, inputs: Inputs, first: Inputs, temperature: Array) -> Array:
    """Run all iterations, with couplings in the prior; only the last one is differentiated."""
    once, state = dataclasses.replace(routing, num_iterations=1), State()
    now, factor = first, lax.stop_gradient(temperature)
    for _ in range(routing.num_iterations - 1):
        now = lax.stop_gradient(now)
        (couplings,) = unroll_couplings(once, now, factor, (None, state))
        _, state = unroll(once, now, factor, (None, state))
        now = inputs._replace(prior=_added(factor * couplings, inputs.prior))
    return unroll(once, now, temperature, (None, state))[0]


def _added(logits: Array, prior: Array | None) -> Array:
    """Add two priors `[I, J]` or `[B, I, J]`, of which the second may be None."""
    if prior is None:
        return logits
    if logits.ndim < prior.ndim:
        logits = logits[None]
    elif prior.ndim < logits.ndim:
        prior = prior[None]
    return logits + prior.astype(logits.dtype)


def _with_initial_logits(
    function: str, logits: Array | None, checked: _arguments.Checked
) -> Inputs:
    """Return the inputs of the first iteration, whose prior has the initial logits in it."""
    inputs = checked.inputs
    if logits is None:
        return inputs
    children = inputs.poses.shape[1]
    own = children, checked.num_parents
    is_shared = logits.ndim == 2
    shape = own if is_shared else (*checked.leading, *own)
    _arguments.check_parameter(
        function, "initial_logits", logits, "[I, J] or [..., I, J]", shape, inputs.poses
    )
    if is_shared:
        logits = checked.without_masked(logits, "IJ")
    else:
        merged = inputs.poses.shape[0], *own
        logits = reshape_examples(logits, merged, has_examples=bool(checked.leading))
        logits = checked.without_masked(logits, "BIJ")
    return inputs._replace(prior=_added(logits.astype(_wide(inputs)), inputs.prior))


def _checked_temperature(temperature: float | Array, inputs: Inputs) -> Array:
    """Return the temperature in the accumulation dtype; raise an error unless it is a number."""
    found = shapes.as_array("kmeans_routing", "temperature", temperature)
    shapes.check_number_dtype("kmeans_routing", "temperature", found)
    if found.ndim > 0:
        raise ValueError(
            f"kmeans_routing: temperature must be a number, got an array of shape {found.shape}"
        )
    return found.astype(_wide(inputs))


def _wide(inputs: Inputs) -> Any:
    return accumulation_dtype(inputs.poses.dtype)


def _unit(x: Array) -> Array:
    """Divide vectors by their length; a zero vector stays zero, with derivative 0."""
    squares = jnp.sum(x * x, -1, keepdims=True)
    nonzero = squares > 0
    return jnp.where(nonzero, x * lax.rsqrt(jnp.where(nonzero, squares, 1)), 0)


def _squash(x: Array, power: float | None) -> Array:
    """Scale vectors to a length of (|x|²/(1 + |x|²))^power; None leaves them."""
    if power is None:
        return x
    if power == 1:
        return squash(x)
    squares = jnp.maximum(jnp.sum(x * x, -1, keepdims=True), SMALLEST_SQUARE)
    # |x|²/(1 + |x|²) = 1/(1 + 1/|x|²), whose logarithm does not overflow.
    return x * jnp.exp(-power * jnp.log1p(1 / squares)) * lax.rsqrt(squares)
