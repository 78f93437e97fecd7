"""The routing iterations: T times a pass and a step, and their gradient.

An algorithm is a `Spec`, a start, and a step in plain JAX on arrays `[B, J, …]`; it inherits
values, gradients, shards and export from here. What is saved for the gradient is small: the
states and moments of each iteration; the votes are rebuilt by the passes.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from capsjax.kernels.dtypes import accumulation_dtype
from capsjax.kernels.sharding import (
    AxisName,
    is_explicit,
    names_of,
    shard_examples,
    sum_over,
    vary_over,
    varying_axes,
)
from capsjax.kernels.vote_passes import passes, reference
from capsjax.kernels.vote_passes.passes import (
    Implementation,
    Inputs,
    Moments,
    Spec,
    State,
    Term,
    has_examples,
)

# (t, carry, moments, params) -> (carry, State of the next pass, outputs), t = 1 … T.
Step = Callable[[int, Any, Moments, Any], tuple[Any, State, Any]]


@dataclasses.dataclass(frozen=True)
class Routing:
    """What is static of a routing procedure."""

    spec: Spec
    step: Step  # the same function each time, as a key of JAX's caches
    num_iterations: int  # T
    gradient: str = "full"  # or "last": the couplings of the last pass are constants
    implementation: Implementation | None = None  # None: chosen when the program is lowered
    axis_name: AxisName | None = None  # of a shard_map, over which the children are split


class Saved(NamedTuple):
    """What one iteration leaves for the gradient."""

    carry: Any  # before the step
    state: State  # of the pass
    moments: Moments  # of all devices


@partial(jax.jit, static_argnums=0)
def unroll(
    routing: Routing, inputs: Inputs, params: Any = (), start: tuple[Any, State] = (None, State())
) -> Any:
    """Returns the outputs of the last step.

    Args:
      routing: The procedure.
      inputs: `[B, I, …]`; weights may also be `[P, C]`, shared by children and parents.
      params: A tree of arrays that each step gets, the same on all devices of `axis_name`.
      start: The carry and the state before the first pass, `[B, J, …]`.
    """
    if is_explicit(inputs.poses):
        return _over_explicit_axes(unroll, routing, inputs, params, start)
    if inputs.poses.shape[0] == 0:  # empty batch: there are no votes to store
        routing = dataclasses.replace(routing, implementation=Implementation("reference"))
    if _is_reference(routing):
        return _forward(routing, reference.store_votes(inputs), params, start)[0]
    return _unroll(*_varying_alike(*_project(routing, inputs, params, start)))


@partial(jax.jit, static_argnums=0)
def unroll_couplings(
    routing: Routing, inputs: Inputs, params: Any = (), start: tuple[Any, State] = (None, State())
) -> list[Array]:
    """Returns the couplings of each pass, before gates, T times `[B, I, J]`."""
    if is_explicit(inputs.poses):
        return _over_explicit_axes(unroll_couplings, routing, inputs, params, start)
    if inputs.poses.shape[0] == 0:
        inputs = reference.store_votes(inputs)
    routing, inputs, params, (carry, state) = _project(routing, inputs, params, start)
    found = []
    for t in range(1, routing.num_iterations + 1):
        state = vary_over(varying_axes(inputs), state)
        found.append(passes.couplings(routing.spec, inputs, state))
        moments = _over_devices(routing, passes.moments(routing.spec, inputs, state))
        carry, state, _ = routing.step(t, carry, moments, params)
    return found


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unroll(routing: Routing, inputs: Inputs, params: Any, start: tuple[Any, State]) -> Any:
    return _forward(routing, inputs, params, start)[0]


def _forward(
    routing: Routing, inputs: Inputs, params: Any, start: tuple[Any, State]
) -> tuple[Any, tuple[Inputs, Any, list[Saved]]]:
    carry, state = start
    saved, outputs = [], None
    for t in range(1, routing.num_iterations + 1):
        own = vary_over(varying_axes(inputs), state)
        if _is_reference(routing):
            last = routing.gradient == "last"
            moments = reference.moments(routing.spec, inputs, own, constant_couplings=last)
        else:
            implementation = routing.implementation
            moments = passes.moments(routing.spec, inputs, own, implementation=implementation)
        moments = _over_devices(routing, moments)
        saved.append(Saved(carry, state, moments))
        carry, state, outputs = routing.step(t, carry, moments, params)
    return outputs, (inputs, params, saved)


def _backward(
    routing: Routing, residuals: tuple[Inputs, Any, list[Saved]], d_outputs: Any
) -> tuple[Inputs, Any, Any]:
    inputs, params, saved = residuals
    axis_name, last = routing.axis_name, routing.gradient == "last"
    own = partial(vary_over, varying_axes(inputs))
    # Of moments, which all devices of the axis have, a device has the whole gradient where JAX
    # knows that they have it, and a partial sum where it does not: in shard_map(check_vma=False).
    is_whole = bool(varying_axes(inputs) & names_of(axis_name))
    start = saved[0]
    d_params = _zeros(params)
    d_carry, d_state = _zeros((start.carry, start.state))
    terms: list[Term] = []
    for t in range(routing.num_iterations, 0, -1):
        carry, state, moments = saved[t - 1]
        results, step_vjp = jax.vjp(partial(routing.step, t), carry, moments, params)
        if t == routing.num_iterations:
            d_results = *_zeros(results[:2]), d_outputs
        else:
            d_results = d_carry, d_state, _zeros(results[2])
        d_carry, d_moments, d_more_params = step_vjp(d_results)
        d_params = jax.tree.map(jnp.add, d_params, d_more_params)
        d_moments = own(d_moments) if is_whole else sum_over(axis_name, d_moments)
        central = own(moments) if routing.spec.moments == "central" else None
        terms.append(Term(own(state), central, d_moments))
        if last:  # earlier iterations matter through the couplings only
            d_carry, d_state = _zeros((start.carry, start.state))
            break
        if state.is_empty:
            d_state = state
        else:
            d_state = passes.chain(
                routing.spec, inputs, terms[-1], implementation=routing.implementation
            )
            d_state = sum_over(axis_name, d_state) if is_whole else d_state
    d_inputs = passes.input_gradients(
        routing.spec,
        inputs,
        terms[::-1],
        constant_couplings=last,
        implementation=routing.implementation,
    )
    return d_inputs, d_params, (d_carry, d_state)


_unroll.defvjp(_forward, _backward)


def _is_reference(routing: Routing) -> bool:
    return routing.implementation is not None and routing.implementation.name == "reference"


def _over_devices(routing: Routing, moments: Moments) -> Moments:
    """Merges the moments of the children of each device."""
    axis_name = routing.axis_name
    if axis_name is None or routing.spec.moments == "sums":
        return sum_over(axis_name, moments)
    mass, sums = sum_over(axis_name, (moments.mass, moments.mass[..., None] * moments.first))
    mean = reference.divide(sums, mass)
    shift = moments.first - mean
    second = moments.second + moments.mass[..., None] * shift * shift
    return Moments(mass, mean, sum_over(axis_name, second))


def _varying_alike(
    routing: Routing, inputs: Inputs, params: Any, start: Any
) -> tuple[Routing, Inputs, Any, Any]:
    """Makes arrays vary over a mesh as their gradients will.

    How JAX transposes that sums the gradients of what is the same on several devices.
    """
    names = names_of(routing.axis_name)
    axes = varying_axes(inputs, params, start)
    if axes & names:
        axes |= names
    params, start = vary_over(axes - names, (params, start))
    return routing, vary_over(axes, inputs), params, start


def _over_explicit_axes(
    function: Callable[..., Any], routing: Routing, inputs: Inputs, params: Any, start: Any
) -> Any:
    """Calls a function of examples on each device of an Explicit mesh for its own examples."""
    flags = has_examples(inputs)
    examples = Inputs(*(x if flag else None for x, flag in zip(inputs, flags, strict=True)))
    others = Inputs(*(None if flag else x for x, flag in zip(inputs, flags, strict=True)))

    def on_one_device(examples: tuple[Inputs, Any], others: tuple[Inputs, Any]) -> Any:
        pairs = zip(examples[0], others[0], strict=True)
        inputs = Inputs(*(y if x is None else x for x, y in pairs))
        return function(routing, inputs, others[1], examples[1])

    return shard_examples(on_one_device, (examples, start), (others, params), like=inputs.poses)


def _zeros(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)


# Weights that children share move from the passes into the step.


@dataclasses.dataclass(frozen=True)
class _Projected:
    """A step whose pass routes the poses themselves: moments and states go through the weights.

    `v_ij · b_j = u_i · (W_j b_j)` and `Σ_i w_ij v_ij = (Σ_i w_ij u_i) W_j`: no vote exists, not
    even in a tile.
    """

    step: Step
    rows: int  # R

    def __call__(
        self, t: int, carry: Any, moments: Moments, params: tuple[Array, Any]
    ) -> tuple[Any, State, Any]:
        """Takes moments and returns a state of the poses."""
        weights, params = params
        first = _through(weights, moments.first, self.rows, "bjrp,pjc->bjrc")
        carry, state, outputs = self.step(t, carry, moments._replace(first=first), params)
        return carry, project_state(weights, state, self.rows), outputs


def project_state(weights: Array, state: State, rows: int) -> State:
    """Returns the state that poses agree with as their votes do with this one."""
    if state.b is None:
        return state
    return state._replace(b=_through(weights, state.b, rows, "bjrc,pjc->bjrp"))


def _through(weights: Array, x: Array, rows: int, letters: str) -> Array:
    if weights.ndim == 2:  # all parents share them, too
        letters = letters.replace("pjc", "pc")
    x = x.reshape(*x.shape[:2], rows, -1)
    product = jnp.einsum(letters, x, weights.astype(x.dtype))
    return product.reshape(*product.shape[:2], -1)


def _project(
    routing: Routing, inputs: Inputs, params: Any, start: tuple[Any, State]
) -> tuple[Routing, Inputs, Any, tuple[Any, State]]:
    """Removes weights that children share from the inputs, where that is exact."""
    weights, spec = inputs.weights, routing.spec
    if weights is None or weights.ndim == 4:
        return routing, inputs, params, start
    batch, children, rows, length = inputs.poses.shape
    linear = (spec.logits, spec.moments) == ("linear", "sums") and inputs.coordinates is None
    if not linear and weights.ndim == 3:
        return routing, inputs, params, start
    if not linear:
        votes = jnp.einsum(
            "birp,pc->birc",
            inputs.poses,
            weights,
            preferred_element_type=accumulation_dtype(inputs.poses.dtype),
        )
        inputs = inputs._replace(poses=votes.reshape(batch, children, 1, -1), weights=None)
        return routing, inputs, params, start
    routing = dataclasses.replace(routing, step=_Projected(routing.step, rows))
    poses = inputs.poses.reshape(batch, children, 1, rows * length)
    carry, state = start
    start = carry, project_state(weights, state, rows)
    return routing, inputs._replace(poses=poses, weights=None), (weights, params), start
