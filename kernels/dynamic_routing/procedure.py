"""The routing procedure and its gradient, in passes over poses and weights.

The logits of iteration t are the agreements of the votes with `V`, the sum of the outputs so far.
So an iteration needs `V` alone, and each pass can rebuild the votes a tile at a time. This file
holds what is left once the passes are given: T of them forward, at most T backward, with states
of shape `[B, J, D]` in between. An implementation supplies the passes and inherits the rest.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap

from capsjax.kernels.devices import AxisName, add_up, names_of, vary_over, varying_axes
from capsjax.kernels.only_on import only_on
from capsjax.kernels.squash import accumulation_dtype, squash


class Route(NamedTuple):
    """What one iteration contributes to the gradients of poses, weights and prior."""

    total: Array | None  # V before the iteration, [B, J, D]; None for zero
    d_sums: Array  # gradient of the weighted sums, [B, J, D]


class InputGradients(NamedTuple):
    """Gradients of the large arguments."""

    poses: Array  # [B, I, P]
    weights: Array  # [I, P, J, D]
    prior: Array | None  # [I, J]


class Passes(NamedTuple):
    """How one implementation walks over poses and weights, which each pass reads once.

    The functions take poses `[B, I, P]`, weights `[I, P, J, D]`, prior `[I, J]` or None, and
    states `[B, J, D]` in the accumulation dtype. Couplings are the softmax over J of
    prior + votes · total, where a total of None is zero.
    """

    # (poses, weights, prior, total or None): the sum over I of couplings times votes.
    sums: Callable[[Array, Array, Array | None, Array | None], Array]
    # (poses, weights, prior, total, d_sums): the sum over I of the logits' gradients times votes.
    logit_gradient_sums: Callable[[Array, Array, Array | None, Array, Array], Array]
    # (poses, weights, prior, routes, gradient); couplings are constants if gradient is "last".
    input_gradients: Callable[[Array, Array, Array | None, Sequence[Route], str], InputGradients]


class Residuals(NamedTuple):
    """What the backward pass needs; everything else is rebuilt."""

    poses: Array  # [B, I, P]
    weights: Array  # [I, P, J, D]
    prior: Array | None  # [I, J]
    bias: Array | None  # [J, D], for its dtype
    sums: tuple[Array, ...]  # weighted sums s of iterations 1 … T, each [B, J, D]
    totals: tuple[Array, ...]  # sums V of the outputs before iterations 2 … T, each [B, J, D]


def route(
    passes: Passes,
    num_iterations: int,
    gradient: str,
    axis_name: AxisName | None,
    poses: Array,
    weights: Array,
    prior: Array | None,
    bias: Array | None,
) -> Array:
    """Routes with the passes of one implementation; `capsjax.dynamic_routing` says what.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", procedure 1,
    https://arxiv.org/abs/1710.09829, with its logits written as agreements with sums of outputs.
    """
    # Gradients are of the types of their arguments, so these are made to vary alike beforehand:
    # how JAX transposes that adds up the gradients of what is the same on several devices.
    axes = varying_axes(poses, weights, prior, bias)
    if axes & names_of(axis_name):
        axes |= names_of(axis_name)
    poses, weights, prior = jax.tree.map(partial(vary_over, axes), (poses, weights, prior))
    bias = jax.tree.map(partial(vary_over, axes - names_of(axis_name)), bias)
    return _route(passes, num_iterations, gradient, axis_name, poses, weights, prior, bias)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _route(
    passes: Passes,
    num_iterations: int,
    gradient: str,
    axis_name: AxisName | None,
    poses: Array,
    weights: Array,
    prior: Array | None,
    bias: Array | None,
) -> Array:
    arrays = poses, weights, prior, bias
    return _forward(passes, num_iterations, gradient, axis_name, *arrays)[0]


def _forward(
    passes: Passes,
    num_iterations: int,
    gradient: str,
    axis_name: AxisName | None,
    poses: Array,
    weights: Array,
    prior: Array | None,
    bias: Array | None,
) -> tuple[Array, Residuals]:
    del gradient  # matters to the backward pass only
    sums: list[Array] = []
    totals: list[Array] = []
    for iteration in range(num_iterations):
        total = vary_over(varying_axes(poses), totals[-1]) if totals else None
        weighted = add_up(passes.sums(poses, weights, prior, total), axis_name)
        sums.append(weighted if bias is None else weighted + bias.astype(weighted.dtype)[None])
        outputs = squash(sums[-1])
        if iteration + 1 < num_iterations:
            totals.append(outputs + totals[-1] if totals else outputs)
    residuals = Residuals(poses, weights, prior, bias, tuple(sums), tuple(totals))
    return outputs.astype(poses.dtype), residuals


def _backward(
    passes: Passes,
    num_iterations: int,
    gradient: str,
    axis_name: AxisName | None,
    residuals: Residuals,
    cotangent: Array,
) -> tuple[Array, Array, Array | None, Array | None]:
    poses, weights, prior, bias, sums, totals = residuals
    vary = partial(vary_over, varying_axes(poses))
    # Of what all devices have, sums and totals, a device has the whole gradient where JAX knows
    # that they have it, and a share of it where it does not: in `shard_map(check_vma=False)`.
    is_whole = bool(varying_axes(poses) & names_of(axis_name))
    # Iterations before the last matter only through the couplings, which "last" leaves constant.
    first = num_iterations - 1 if gradient == "last" else 0
    # An iteration's output gets the loss's gradient (the last one) or that of all later logits.
    d_outputs = cotangent.astype(accumulation_dtype(poses.dtype))
    d_sums: list[Array] = []  # of iterations t … T
    own_d_sums: list[Array] = []  # the same, of what this device adds to the sums
    for iteration in reversed(range(first, num_iterations)):
        _, squash_vjp = jax.vjp(squash, sums[iteration])
        d_sums.insert(0, *squash_vjp(d_outputs))
        own_d_sums.insert(0, vary(d_sums[0]) if is_whole else add_up(d_sums[0], axis_name))
        if iteration > first:
            total = vary(totals[iteration - 1])
            term = passes.logit_gradient_sums(poses, weights, prior, total, own_d_sums[0])
            term = add_up(term, axis_name) if is_whole else term
            d_outputs = term if iteration == num_iterations - 1 else d_outputs + term
    own_totals = (None, *map(vary, totals))[first:]
    routes = [Route(*pair) for pair in zip(own_totals, own_d_sums, strict=True)]
    gradients = passes.input_gradients(poses, weights, prior, routes, gradient)
    d_bias = None if bias is None else jnp.sum(jnp.stack(d_sums), (0, 1)).astype(bias.dtype)
    return *gradients, d_bias


_route.defvjp(_forward, _backward)


def kernel_passes(kernels: Passes, plain: Passes, *, platform: str | None) -> Passes:
    """Passes made of kernels, with what a kernel alone lacks.

    A kernel has no derivative: here it has that of the plain pass, so that gradients of gradients
    exist. `vmap` would give it one grid a member, which reads the weights again for each: here
    poses that are mapped over become more examples of the two passes whose results are sums over
    capsules, unless weights or prior are mapped over too.

    Args:
      kernels: Passes that can be neither differentiated nor mapped over cheaply.
      plain: The same passes in plain JAX.
      platform: The one that the kernels are for; None for any, which is what interpreted ones are.
    """

    def bound(function: Callable[..., Any]) -> Callable[..., Any]:
        return only_on(platform, function)

    def input_gradients(
        poses: Array,
        weights: Array,
        prior: Array | None,
        routes: Sequence[Route],
        gradient: str,
    ) -> InputGradients:
        differentiable = _differentiable(
            bound(lambda u, w, p, r: kernels.input_gradients(u, w, p, r, gradient)),
            lambda u, w, p, r: plain.input_gradients(u, w, p, r, gradient),
        )
        return differentiable(poses, weights, prior, routes)

    return Passes(
        sums=_differentiable(_more_examples(bound(kernels.sums)), plain.sums),
        logit_gradient_sums=_differentiable(
            _more_examples(bound(kernels.logit_gradient_sums)), plain.logit_gradient_sums
        ),
        input_gradients=input_gradients,
    )


def _differentiable(function: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    differentiable = jax.custom_vjp(function)
    differentiable.defvjp(
        lambda *arguments: (function(*arguments), arguments),
        lambda arguments, cotangent: jax.vjp(plain, *arguments)[1](cotangent),
    )
    return differentiable


def _more_examples(function: Callable[..., Array]) -> Callable[..., Array]:
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def rule(size: int, is_mapped: Any, *arguments: Any) -> tuple[Array, bool]:
        poses, weights, prior, *states = arguments
        if is_mapped[1] or is_mapped[2]:
            axes = jax.tree.map(lambda mapped: 0 if mapped else None, tuple(is_mapped))
            return jax.vmap(function, axes, axis_size=size)(*arguments), True

        def flat(x: Array, is_mapped: bool) -> Array:
            x = x if is_mapped else jnp.broadcast_to(x[None], (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        flat_states = jax.tree.map(flat, states, list(is_mapped[3:]))
        sums = mapped(flat(poses, is_mapped[0]), weights, prior, *flat_states)
        return sums.reshape(size, -1, *sums.shape[1:]), True

    return mapped
