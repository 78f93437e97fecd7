"""Arrays over the devices of a mesh: the axes they vary over, and Explicit batches.

Inside `jax.shard_map` JAX knows over which axes of the mesh each array varies; along the others
all devices hold the same numbers.
"""

from collections.abc import Callable
from typing import Any

import jax
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


def over_explicit_examples(
    function: Callable[..., Any], examples: Any, others: Any, *, like: Array
) -> Any:
    """Calls `function(examples, others)`, each device on its own examples under Explicit axes.

    Explicit axes are part of an array's type, so it is known how `like` is sharded along its
    first axis: the function runs in a `shard_map` over these axes. Everywhere else, including
    Auto axes, whose sharding only XLA's partitioner knows, this is a plain call.

    Args:
      function: Returns a tree of arrays with examples along their first axes.
      examples: A tree of arrays with examples along their first axes.
      others: A tree of arrays without examples.
      like: The array whose first axis says how examples are sharded.
    """
    mesh = jax.typeof(like).sharding.mesh
    if mesh.empty or set(mesh.axis_types) != {AxisType.Explicit}:
        return function(examples, others)
    split, whole = PartitionSpec(jax.typeof(like).sharding.spec[0]), PartitionSpec()
    place = lambda spec: lambda x: jax.reshard(x, NamedSharding(mesh, spec))  # noqa: E731
    examples, others = jax.tree.map(place(split), examples), jax.tree.map(place(whole), others)
    spread = jax.shard_map(function, mesh=mesh, in_specs=(split, whole), out_specs=split)
    return spread(examples, others)
