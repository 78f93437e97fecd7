"""Kernels of one platform inside programs that are lowered for several, as by `jax.export`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from capsjax.kernels.devices import vary_over, varying_axes

_kernel = Primitive("only_on")
_kernel.multiple_results = True


def only_on(platform: str | None, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of arrays, to be lowered for `platform` alone; None for any.

    In a program for several platforms JAX lowers each branch of a `platform_dependent` for all of
    them, which a kernel's lowering refuses. There the others get zeros, in a branch that they
    never take. Results vary over the axes of a mesh over which any argument does.

    Raises:
      ValueError: While lowered, the program is not for `platform`.
    """

    def call(*arguments: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        axes = varying_axes(*leaves)
        if platform is None and not axes:
            return function(*arguments)
        leaves = [vary_over(axes, x) for x in leaves]

        def flat(*leaves: Array) -> Any:
            return function(*jax.tree.unflatten(structure, leaves))

        # Inside there is no mesh, of which kernels know nothing.
        inside = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves] if axes else leaves
        program, shapes = jax.make_jaxpr(flat, return_shape=True)(*inside)
        results = _kernel.bind(*leaves, program=program, platform=platform)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return call


@_kernel.def_impl
def _run(*arrays: Array, **settings: Any) -> Sequence[Array]:
    return jax.jit(partial(_kernel.bind, **settings))(*arrays)


@_kernel.def_abstract_eval
def _shapes(*arrays: Any, program: Any, platform: str | None) -> Sequence[Any]:
    del platform
    first = arrays[0]
    if not first.manual_axis_type.varying:
        return program.out_avals

    def varying(x: Any) -> Any:
        sharding = NamedSharding(first.sharding.mesh, PartitionSpec(*(None,) * x.ndim))
        return first.update(shape=x.shape, dtype=x.dtype, sharding=sharding)

    return [varying(x) for x in program.out_avals]


def _batch(
    arrays: Sequence[Array], axes: Sequence[Any], *, program: Any, platform: str | None
) -> Any:
    mapped = only_on(platform, jax.vmap(jaxpr_as_fun(program), tuple(axes)))
    results = mapped(*arrays)
    return results, [0] * len(results)


batching.primitive_batchers[_kernel] = _batch


def _lower(here: str | None, context: Any, *arrays: Any, program: Any, platform: str | None) -> Any:
    function: Callable[..., Any] = jaxpr_as_fun(program)
    if platform not in (None, here):
        platforms = context.module_context.platforms
        if platform not in platforms:
            raise ValueError(f"a kernel for {platform} in a program for {', '.join(platforms)}")

        def function(*arrays: Array) -> Any:
            del arrays
            return [jnp.zeros(x.shape, x.dtype) for x in program.out_avals]

    return mlir.lower_fun(function)(context.replace(avals_in=program.in_avals), *arrays)


mlir.register_lowering(_kernel, partial(_lower, None))
for _platform in ("tpu", "cuda"):
    mlir.register_lowering(_kernel, partial(_lower, _platform), platform=_platform)
