"""Helpers for sharded arrays: varying mesh axes, sums over devices, Explicit batches.

Inside `jax.shard_map(check_vma=True)` an array's type has the mesh axes over which it varies; along
all other axes it is replicated.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AxisName = str | tuple[str, ...]


def names_of(axis_name: AxisName | None) -> frozenset[str]:
    """Return the set of mesh axes in an `axis_name`."""
    return frozenset((axis_name,) if isinstance(axis_name, str) else axis_name or ())


def sum_over(axis_name: AxisName | None, x: Any) -> Any:
    """Sum a tree of arrays over the devices along `axis_name`; None returns it unchanged."""
    return x if axis_name is None else lax.psum(x, axis_name)


def varying_axes(*trees: Any) -> frozenset[str]:
    """Return the mesh axes over which any array varies, inside `shard_map(check_vma=True)`."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(trees)]
    return frozenset[str]().union(*varying)


def vary_over(axes: frozenset[str], tree: Any) -> Any:
    """Mark arrays as varying over `axes` too; the transpose sums cotangents over them."""

    def mark(x: Array) -> Array:
        missing = tuple(sorted(axes - varying_axes(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)


def is_explicit(x: Array) -> bool:
    """Return whether an array is on a mesh whose axes are all Explicit."""
    mesh = jax.typeof(x).sharding.mesh
    return not mesh.empty and set(mesh.axis_types) == {AxisType.Explicit}


def reshape_examples(x: Array, shape: tuple[int, ...], *, has_examples: bool = True) -> Array:
    """Reshape an array; over Explicit axes, keep the sharding of its first axis, of examples."""
    if not is_explicit(x):
        return x.reshape(shape)
    sharding = jax.typeof(x).sharding
    sharded = PartitionSpec(sharding.spec[0] if has_examples else None)
    place = NamedSharding(sharding.mesh, sharded)
    return jnp.reshape(jax.reshard(x, place), shape, out_sharding=place)


def shard_examples(function: Callable[..., Any], examples: Any, others: Any, *, like: Array) -> Any:
    """Call `function(examples, others)` under `shard_map` over the Explicit axes of a batch.

    Args:
      function: Returns a tree of arrays whose first axis is the batch.
      examples: A tree of arrays whose first axis is the batch.
      others: A tree of arrays without batch axis, replicated on all devices.
      like: An array whose first axis is sharded as the batch is.
    """
    mesh = jax.typeof(like).sharding.mesh
    sharded, replicated = PartitionSpec(jax.typeof(like).sharding.spec[0]), PartitionSpec()
    examples = jax.tree.map(lambda x: jax.reshard(x, NamedSharding(mesh, sharded)), examples)
    others = jax.tree.map(lambda x: jax.reshard(x, NamedSharding(mesh, replicated)), others)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=(sharded, replicated), out_specs=sharded)
    return mapped(examples, others)
