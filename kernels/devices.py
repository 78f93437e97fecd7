"""Arrays over several devices: what varies over a mesh, and batches that `jit` has sharded.

Inside `jax.shard_map` JAX knows of each array over which axes of the mesh it varies, the others
being those over which all devices have the same numbers.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import AxisType, PartitionSpec

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


def share_examples(function: Callable[..., Array], batched: Array, *others: Array | None) -> Array:
    """Calls a function of one batch, sharing out the examples if the batch lies on a mesh.

    XLA cuts loops over tiles of examples, and kernels, by gathering what they read. Here each
    device runs the function on examples of its own, whatever axes of the mesh the batch is
    sharded over: an axis that it is not sharded over takes its share of each device's examples.
    Nothing is done where axes are not automatic, as inside `shard_map`.

    Args:
      function: of `batched` and `others`; its result has the examples first, as `batched` has.
      batched: `[B, ...]`.
      *others: Arrays that all examples need, None for an absent one.
    """
    arrays = [x for x in (batched, *others) if x is not None]
    mesh = next((m for m in (jax.typeof(x).sharding.mesh for x in arrays) if not m.empty), None)
    if mesh is None or set(mesh.axis_types) != {AxisType.Auto}:
        return function(batched, *others)
    axes, shares = [], 1
    for axis, size in mesh.shape.items():
        if size > 1 and batched.shape[0] % (shares * size) == 0:
            axes.append(axis)
            shares *= size
    if not axes:
        return function(batched, *others)
    examples, whole = PartitionSpec(tuple(axes)), PartitionSpec()
    in_specs = (examples, *(whole for _ in others))
    shared: Callable[..., Any] = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=examples
    )
    return shared(batched, *others)
