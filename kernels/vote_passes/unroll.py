"""The routing loop and its VJP, on top of the passes over votes.

An algorithm is a `Spec`, a start and a step in plain JAX on arrays `[B, J, …]`. Here T iterations,
each a pass and a step, are unrolled with one custom VJP, which works under `shard_map` and
`jax.export`. The residuals are the states and moments of each iteration; the backward passes
recompute the votes.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

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
from capsjax.kernels.vote_passes import linear, passes, reference, windows
from capsjax.kernels.vote_passes.config import mosaic_tpu_fuses
from capsjax.kernels.vote_passes.passes import (
    Implementation,
    Inputs,
    Moments,
    Spec,
    State,
    Term,
    case_of,
    has_examples,
)
from capsjax.kernels.vote_passes.windows import Windows

# (t, carry, moments, params) -> (carry, State of the next pass, outputs), t = 1 … T.
Step = Callable[[int, Any, Moments, Any], tuple[Any, State, Any]]


@dataclasses.dataclass(frozen=True)
class Routing:
    """Static settings of a routing algorithm."""

    spec: Spec
    step: Step  # a key of JAX's caches: the same function each time, no new closure
    num_iterations: int  # T
    gradient: str = "full"  # or "last", which holds the couplings of the last pass constant
    implementation: Implementation | None = None  # None: selected at lowering
    axis_name: AxisName | None = None  # of a shard_map, over which the children are sharded
    windows: Windows | None = None  # of a convolution; None if all children reach all parents


class Residuals(NamedTuple):
    """Residuals of one iteration, for the VJP."""

    carry: Any  # input of the step
    state: State  # input of the pass
    moments: Moments  # output of the pass, merged over all devices


@partial(jax.jit, static_argnums=0)
def unroll(
    routing: Routing, inputs: Inputs, params: Any = (), start: tuple[Any, State] = (None, State())
) -> Any:
    """Run all iterations, and return the outputs of the last step.

    Args:
      routing: Static settings.
      inputs: Arrays `[B, I, …]`; weights may also be `[P, E]`, shared by all capsules. Those of a
        convolution are described in `windows`.
      params: A tree of arrays for every step, replicated over `axis_name`.
      start: The carry and the state of the first pass, `[B, J, …]`.
    """
    if is_explicit(inputs.poses):
        return _over_explicit_axes(unroll, routing, inputs, params, start)
    if inputs.poses.shape[0] == 0:  # empty batch: no kernel runs, no votes to store
        routing = dataclasses.replace(routing, implementation=Implementation("reference"))
    if _is_reference(routing):
        softmax = None
        if routing.windows is not None:
            inputs, softmax = windows.patches(routing.windows, inputs)
        return _forward(routing, reference.store_votes(inputs), params, start, softmax)[0]
    routing, *arrays = _vary_alike(*_project(routing, inputs, params, start))
    return _unroll(routing, *jax.tree.map(_reverse_only.bind, arrays))


@partial(jax.jit, static_argnums=0)
def unroll_couplings(
    routing: Routing, inputs: Inputs, params: Any = (), start: tuple[Any, State] = (None, State())
) -> list[Array]:
    """Compute the couplings of each pass, without gates: a list of T arrays `[B, I, J]`."""
    if is_explicit(inputs.poses):
        return _over_explicit_axes(unroll_couplings, routing, inputs, params, start)
    if inputs.poses.shape[0] == 0:  # empty batch: nothing to compute, and no size for tiles
        dtype = accumulation_dtype(inputs.poses.dtype)
        shape = 0, inputs.poses.shape[1], routing.spec.num_parents
        return [jnp.zeros(shape, dtype)] * routing.num_iterations
    routing, inputs, params, (carry, state) = _project(routing, inputs, params, start)
    found = []
    for t in range(1, routing.num_iterations + 1):
        state = vary_over(varying_axes(inputs), state)
        found.append(passes.couplings(routing.spec, inputs, state))
        moments = _over_devices(routing, passes.moments(routing.spec, inputs, state))
        carry, state, _ = routing.step(t, carry, moments, params)
    return found


def _refuse_forward_mode(*_: Any) -> Any:
    raise TypeError(
        "routing: forward mode (jax.jvp, jax.jacfwd) needs implementation='reference', since "
        "implementations that store no votes have derivatives in reverse mode only"
    )


# The identity on tangents. Reverse mode transposes it, and so never runs it. Forward mode runs it,
# or maps it: it raises an error that says what to do, before `jax.custom_vjp` raises one that does
# not.
_tangent = Primitive("tangent_in_reverse_mode_only")
_tangent.def_abstract_eval(lambda dx: dx)
_tangent.def_impl(_refuse_forward_mode)
ad.deflinear2(_tangent, lambda cotangent, _: [cotangent])
batching.primitive_batchers[_tangent] = _refuse_forward_mode
mlir.register_lowering(_tangent, _refuse_forward_mode)

# The identity, with the one above as its derivative.
_reverse_only = Primitive("reverse_mode_only")
_reverse_only.def_abstract_eval(lambda x: x)
_reverse_only.def_impl(lambda x: x)
# Reverse mode leaves nothing of it, so gradients may be differentiated in forward mode.
ad.primitive_jvps[_reverse_only] = lambda primals, tangents: (
    primals[0],
    tangents[0] if isinstance(tangents[0], ad.Zero) else _tangent.bind(*tangents),
)
batching.defvectorized(_reverse_only)
mlir.register_lowering(_reverse_only, lambda _, x: [x])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unroll(routing: Routing, inputs: Inputs, params: Any, start: tuple[Any, State]) -> Any:
    return _forward(routing, inputs, params, start)[0]


def _forward(
    routing: Routing,
    inputs: Inputs,
    params: Any,
    start: tuple[Any, State],
    softmax: reference.Softmax | None = None,
) -> tuple[Any, tuple[Inputs, Any, list[Residuals]]]:
    carry, state = start
    iterations, outputs = [], None
    for t in range(1, routing.num_iterations + 1):
        varying = vary_over(varying_axes(inputs), state)
        if _is_reference(routing):
            last = routing.gradient == "last"
            moments = reference.moments(
                routing.spec, inputs, varying, constant_couplings=last, softmax=softmax
            )
        else:
            moments = _pass(routing, "moments", inputs, varying)
        moments = _over_devices(routing, moments)
        iterations.append(Residuals(carry, state, moments))
        carry, state, outputs = routing.step(t, carry, moments, params)
    return outputs, (inputs, params, iterations)


def _backward(
    routing: Routing, residuals: tuple[Inputs, Any, list[Residuals]], d_outputs: Any
) -> tuple[Inputs, Any, Any]:
    inputs, named = residuals[0], routing.implementation
    fused = (
        routing.gradient == "full"
        and routing.windows is None
        and linear.accepts(routing.spec, inputs)
        and mosaic_tpu_fuses(case_of(routing.spec, inputs, routing.num_iterations))
    )
    apart = partial(_backward_passes, routing, fused=False)
    if not fused or (named is not None and named.name != "mosaic_tpu"):
        return apart(residuals, d_outputs)
    together = partial(_backward_passes, routing, fused=True)
    if named is not None:
        return together(residuals, d_outputs)
    return lax.platform_dependent(residuals, d_outputs, tpu=together, default=apart)


def _backward_passes(
    routing: Routing,
    residuals: tuple[Inputs, Any, list[Residuals]],
    d_outputs: Any,
    *,
    fused: bool,
) -> tuple[Inputs, Any, Any]:
    """Run the VJP; if `fused`, each iteration adds its input gradients at once, else one pass."""
    inputs, params, iterations = residuals
    axis_name, last = routing.axis_name, routing.gradient == "last"
    vary = partial(vary_over, varying_axes(inputs))
    # The moments are replicated over the axis. With check_vma=True JAX knows that, and their
    # cotangent is the whole one on every device; with check_vma=False it is a partial sum.
    is_whole = bool(varying_axes(inputs) & names_of(axis_name))
    start = iterations[0]
    d_params = _zeros(params)
    d_carry, d_state = _zeros((start.carry, start.state))
    terms: list[Term] = []
    d_inputs: Any = None
    for t in range(routing.num_iterations, 0, -1):
        carry, state, moments = iterations[t - 1]
        results, step_vjp = jax.vjp(partial(routing.step, t), carry, moments, params)
        if t == routing.num_iterations:
            d_results = *_zeros(results[:2]), d_outputs
        else:
            d_results = d_carry, d_state, _zeros(results[2])
        d_carry, d_moments, d_more_params = step_vjp(d_results)
        d_params = jax.tree.map(jnp.add, d_params, d_more_params)
        d_moments = vary(d_moments) if is_whole else sum_over(axis_name, d_moments)
        central = vary(moments) if routing.spec.moments == "central" else None
        term = Term(vary(state), central, d_moments)
        if last:  # earlier iterations only affect the couplings, here constants
            terms.append(term)
            d_carry, d_state = _zeros((start.carry, start.state))
            break
        if fused:
            d_state, d_inputs = _pass(routing, "chain_and_input_gradients", inputs, term, d_inputs)
        elif state.is_empty:
            d_state = state
        else:
            d_state, kept = _pass(routing, "chain", inputs, term)
            term = term._replace(kept=kept)
        terms.append(term)
        d_state = sum_over(axis_name, d_state) if is_whole else d_state
    if fused:
        d_inputs = jax.tree.map(
            lambda d, x: d.astype(x.dtype), d_inputs, inputs._replace(parent_mask=None)
        )
    else:
        d_inputs = _pass(routing, "input_gradients", inputs, terms[::-1], constant_couplings=last)
    return d_inputs, d_params, (d_carry, d_state)


_unroll.defvjp(_forward, _backward)


def _pass(routing: Routing, name: str, *trees: Any, **static: Any) -> Any:
    """Call a pass of `passes`, or of `windows` for a convolution."""
    static["implementation"] = routing.implementation
    if routing.windows is None:
        return getattr(passes, name)(routing.spec, *trees, **static)
    return getattr(windows, name)(routing.windows, routing.spec, *trees, **static)


def _is_reference(routing: Routing) -> bool:
    return routing.implementation is not None and routing.implementation.name == "reference"


def _over_devices(routing: Routing, moments: Moments) -> Moments:
    """Merge the moments of each device's children into those of all children."""
    axis_name = routing.axis_name
    if axis_name is None or routing.spec.moments == "sums":
        return sum_over(axis_name, moments)
    mass, sums = sum_over(axis_name, (moments.mass, moments.mass[..., None] * moments.first))
    mean = reference.divide(sums, mass)
    shift = moments.first - mean
    second = moments.second + moments.mass[..., None] * shift * shift
    return Moments(mass, mean, sum_over(axis_name, second))


def _vary_alike(
    routing: Routing, inputs: Inputs, params: Any, start: Any
) -> tuple[Routing, Inputs, Any, Any]:
    """Make arrays vary over the mesh axes over which their gradients will.

    The transpose of this cast sums the gradients of replicated arrays over the devices.
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
    """Call `unroll` or `unroll_couplings` on each device of an Explicit mesh, for its examples."""
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


# Weights that all children share are moved from the passes into the step.


@dataclasses.dataclass(frozen=True)
class _Projected:
    """A step for passes over poses instead of votes, for weights that all children share.

    `Σ_i w_ij v_ij = (Σ_i w_ij u_i) W_j` and `v_ij · b_j = u_i · (W_j b_j)`: moments and states are
    multiplied by the weights, and no vote is computed, not even in a tile.
    """

    step: Step
    rows: int  # R

    def __call__(
        self, t: int, carry: Any, moments: Moments, params: tuple[Array, Any]
    ) -> tuple[Any, State, Any]:
        """Run the step on moments of votes, and return a state for passes over poses."""
        weights, params = params
        first = _multiply(weights, moments.first, self.rows, "bjrp,pje->bjre")
        carry, state, outputs = self.step(t, carry, moments._replace(first=first), params)
        return carry, project_state(weights, state, self.rows), outputs


def project_state(weights: Array, state: State, rows: int) -> State:
    """Multiply b by the weights: its agreement with poses is then that of `state` with votes."""
    if state.b is None:
        return state
    return state._replace(b=_multiply(weights, state.b, rows, "bjre,pje->bjrp"))


def _multiply(weights: Array, x: Array, rows: int, letters: str) -> Array:
    if weights.ndim == 2:  # shared by all parents too
        letters = letters.replace("pje", "pe")
    x = x.reshape(*x.shape[:2], rows, -1)
    product = jnp.einsum(letters, x, weights.astype(x.dtype))
    return product.reshape(*product.shape[:2], -1)


def _project(
    routing: Routing, inputs: Inputs, params: Any, start: tuple[Any, State]
) -> tuple[Routing, Inputs, Any, tuple[Any, State]]:
    """Remove weights that all children share from the inputs, where that is exact."""
    weights, spec = inputs.weights, routing.spec
    if weights is None or weights.ndim >= 4:
        return routing, inputs, params, start
    batch, children, rows, length = inputs.poses.shape
    linear = (spec.logits, spec.moments) == ("linear", "sums") and inputs.coordinates is None
    if not linear and weights.ndim == 3:
        return routing, inputs, params, start
    if not linear:
        votes = jnp.einsum(
            "birp,pe->bire",
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
