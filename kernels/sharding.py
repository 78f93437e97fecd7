"""Arrays over the devices of a mesh: the axes they vary over, and Explicit batches.

Inside `jax.shard_map` JAX knows over which axes of the mesh each array varies; along the others
all devices hold the same numbers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AxisName = str | tuple[str, ...]


def names_of(axis_name: AxisName | None) -> frozenset[str]:
    """Returns the axes that a name stands for: one, several, or none."""
    return frozenset((axis_name,) if isinstance(axis_name, str) else axis_name or ())


def sum_over(axis_name: AxisName | None, x: Any) -> Any:
    """Sums a tree of arrays over the devices along these axes."""
    return x if axis_name is None else lax.psum(x, axis_name)


def varying_axes(*trees: Any) -> frozenset[str]:
    """Returns the axes over which any array varies; none outside `shard_map(check_vma=True)`."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(trees)]
    return frozenset[str]().union(*varying)


def vary_over(axes: frozenset[str], tree: Any) -> Any:
    """Marks arrays as varying over these axes too; the transpose sums over them."""

    def mark(x: Array) -> Array:
        missing = tuple(sorted(axes - varying_axes(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)


def is_explicit(x: Array) -> bool:
    """Returns whether an array lies on a mesh whose axes are all Explicit."""
    mesh = jax.typeof(x).sharding.mesh
    return not mesh.empty and set(mesh.axis_types) == {AxisType.Explicit}


def reshape_examples(x: Array, shape: tuple[int, ...], *, has_examples: bool = True) -> Array:
    """Reshapes an array; on Explicit axes its first axis, of examples, stays sharded as it is."""
    if not is_explicit(x):
        return x.reshape(shape)
    sharding = jax.typeof(x).sharding
    split = PartitionSpec(sharding.spec[0] if has_examples else None)
    place = NamedSharding(sharding.mesh, split)
    return jnp.reshape(jax.reshard(x, place), shape, out_sharding=place)


def shard_examples(function: Callable[..., Any], examples: Any, others: Any, *, like: Array) -> Any:
    """Calls `function(examples, others)` in a `shard_map` over the Explicit axes of a batch.

    Args:
      function: Returns a tree of arrays with examples along their first axes.
      examples: A tree of arrays with examples along their first axes.
      others: A tree of arrays without examples.
      like: The array whose type says over which axes its first axis, of examples, is sharded.
    """
    mesh = jax.typeof(like).sharding.mesh
    split, whole = PartitionSpec(jax.typeof(like).sharding.spec[0]), PartitionSpec()
    examples = jax.tree.map(lambda x: jax.reshard(x, NamedSharding(mesh, split)), examples)
    others = jax.tree.map(lambda x: jax.reshard(x, NamedSharding(mesh, whole)), others)
    spread = jax.shard_map(function, mesh=mesh, in_specs=(split, whole), out_specs=split)
    return spread(examples, others)
