"""Arrays over several devices: what varies over a mesh, and batches that `jit` has sharded.

Inside `jax.shard_map` JAX knows of each array over which axes of the mesh it varies, the others
being those over which all devices have the same numbers.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

AxisName = str | tuple[str, ...]


def names_of(axis_name: AxisName | None) -> frozenset[str]:
    """The axes of a name that may stand for several, or for none."""
    return frozenset((axis_name,) if isinstance(axis_name, str) else axis_name or ())


def add_up(x: Array, axis_name: AxisName | None) -> Array:
    """The sum over the devices along these axes."""
    return x if axis_name is None else lax.psum(x, axis_name)


def varying_axes(*arrays: Array | None) -> frozenset[str]:
    """The axes over which any of the arrays varies; none outside `shard_map(check_vma=True)`."""
    present = [jax.typeof(x).manual_axis_type.varying for x in arrays if x is not None]
    return frozenset[str]().union(*present)


def vary_over(axes: frozenset[str], x: Array) -> Array:
    """The same numbers as an array that varies over these axes too; transposed, this is a sum."""
    missing = tuple(sorted(axes - varying_axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def share_examples(
    function: Callable[..., Array],
    first: Array,
    *others: Array | None,
    has_examples: tuple[bool, ...],
) -> Array:
    """Calls a function of examples, each device doing its share if the examples lie on a mesh.

    XLA cuts loops over tiles of examples, and kernels, by gathering what they read. Here each
    device runs the function on examples of its own. Over which axes of a mesh examples are
    sharded only XLA knows if the axes are automatic: they are shared out over all axes that
    divide them, in the mesh's order; nothing is sent for an axis over which they were not
    sharded. On one device, and inside `shard_map`, whose axes are manual, this is just a call.

    Args:
      function: of all the arrays, to one array that has examples along its first axis. The same
        function must be the same object: it is compiled once an object.
      first: Examples along its first axis.
      *others: None for an absent one.
      has_examples: For each of the others whether examples lie along its first axis.
    """
    arrays = first, *others
    context = jax.sharding.get_abstract_mesh()
    meshes = [context, *(jax.typeof(x).sharding.mesh for x in arrays if x is not None)]
    mesh = next((mesh for mesh in meshes if not mesh.empty), context)
    types = set(mesh.axis_types)
    if types == {AxisType.Auto} and mesh.size > 1:
        axes = _dividing_axes(mesh, first.shape[0])
    elif types == {AxisType.Explicit}:
        axes = jax.typeof(first).sharding.spec[0]
    else:
        return function(*arrays)
    examples, whole = PartitionSpec(axes), PartitionSpec()
    specs = examples, *(examples if has else whole for has in has_examples)
    if types == {AxisType.Explicit}:
        arrays = jax.reshard(arrays, tuple(NamedSharding(mesh, spec) for spec in specs))
    return _shared(function, mesh, specs, examples)(*arrays)


def _dividing_axes(mesh: AbstractMesh, examples: int) -> tuple[str, ...]:
    axes: list[str] = []
    for axis, size in mesh.shape.items():
        if examples % size == 0:
            axes.append(axis)
            examples //= size
    return tuple(axes)


@cache  # JAX compiles anew for each new function, which matters outside of `jit`
def _shared(
    function: Callable[..., Array], mesh: AbstractMesh, in_specs: Any, out_specs: Any
) -> Callable[..., Array]:
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs))
