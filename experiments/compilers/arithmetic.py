"""Count the floating-point operations of a traced function, and the blocks its kernels fetch.

Both are read from the jaxpr, before any compiler. A multiply-add counts as two operations, any
other elementwise operation as one; a loop counts its body times its length, and a kernel its body
times its grid. A pass of the routing engine is one primitive in a jaxpr, and is counted as the
function that it is lowered to on a platform.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from capsjax.kernels.vote_passes import passes
from capsjax.kernels.vote_passes.passes import Device

# Names of primitives that count as one operation an element.
_ELEMENTWISE = {
    *("add", "sub", "mul", "div", "neg", "abs", "sign", "max", "min", "rem", "pow", "integer_pow"),
    *(
        "exp",
        "exp2",
        "log",
        "log1p",
        "expm1",
        "tanh",
        "logistic",
        "sqrt",
        "rsqrt",
        "cbrt",
        "square",
    ),
    *("sin", "cos", "erf", "add_any", "select_n", "clamp", "eq", "ne", "lt", "le", "gt", "ge"),
}
_REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin"}
# Loads and stores in the body of a kernel. A store returns the old value, which has its size.
_MEMORY = {"get", "swap", "addupdate", "masked_load", "masked_swap"}
# Primitives of the routing engine.
_PASSES = {
    *("moments", "chain", "input_gradients", "chain_and_input_gradients", "couplings"),
}
UNKNOWN_DEVICE = Device()


@dataclasses.dataclass(frozen=True)
class Operations:
    """Floating-point operations, by the unit that executes them."""

    matrix: int = 0  # of matrix products
    vector: int = 0  # of everything else

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(self.matrix + other.matrix, self.vector + other.vector)

    def __mul__(self, times: int) -> "Operations":
        return Operations(times * self.matrix, times * self.vector)


@dataclasses.dataclass(frozen=True)
class Operand:
    """An operand or result of a kernel, and the blocks in which its pipeline fetches it."""

    shape: tuple[int, ...]
    itemsize: int  # bytes
    # Number of fetches by the shape of the block; blocks at the end of the array are clipped. A
    # block is fetched when its index changes from one step of the grid to the next.
    blocks: dict[tuple[int, ...], int]
    # Bytes of all loads and stores in the body, times the grid. What one load or store accesses
    # several times, for several warps, counts once.
    requested: int

    @property
    def size(self) -> int:
        """Size of the whole array in bytes."""
        return math.prod(self.shape) * self.itemsize


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One `pallas_call` of a program."""

    name: str
    grid: tuple[int, ...]
    operands: tuple[Operand, ...]  # followed by the results
    declared: int | None  # bytes accessed by its own `cost_estimate`
    calls: int  # by the program, loops included


class _Lowering(NamedTuple):
    """The platform and device that passes are lowered for."""

    platform: str | None  # "cuda" or "tpu"; None for a platform without kernels
    device: Device


def operations(
    function: Callable[..., Any],
    *shapes: jax.ShapeDtypeStruct,
    platform: str | None = None,
    device: Device = UNKNOWN_DEVICE,
) -> Operations:
    """Count the floating-point operations of a function.

    Args:
      function: A function of arrays.
      *shapes: Shapes of its arguments.
      platform: Platform that routing is lowered for: "cuda", "tpu", or None for one without
        kernels.
      device: Device that routing is lowered for.

    Raises:
      ValueError: The length of a loop is unknown, or the routing implementation requested by
        `function` runs on another platform.
      Unsupported: The requested routing implementation does not support its arguments.

    Example:
      >>> vector = jax.ShapeDtypeStruct((8,), "float32")
      >>> operations(lambda x: jnp.exp(x) @ x, vector)
      Operations(matrix=16, vector=8)
    """
    return _operations(jax.make_jaxpr(function)(*shapes).jaxpr, _Lowering(platform, device))


def kernels(
    function: Callable[..., Any],
    *shapes: jax.ShapeDtypeStruct,
    platform: str | None = None,
    device: Device = UNKNOWN_DEVICE,
) -> list[Kernel]:
    """List the kernels that a function calls, in program order.

    Arguments and errors are those of `operations`.
    """
    found = equations(function, *shapes, platform=platform, device=device)
    return [_kernel(e, calls) for e, calls in found if e.primitive.name == "pallas_call"]


def equations(
    function: Callable[..., Any],
    *shapes: jax.ShapeDtypeStruct,
    platform: str | None = None,
    device: Device = UNKNOWN_DEVICE,
) -> Iterator[tuple[core.JaxprEqn, int]]:
    """Yield each equation of a function with its number of executions, in program order.

    An equation precedes those nested in it. The equations in the body of a kernel are omitted.
    Arguments and errors are those of `operations`.
    """
    yield from _equations(jax.make_jaxpr(function)(*shapes).jaxpr, 1, _Lowering(platform, device))


def equation_operations(equation: core.JaxprEqn) -> Operations:
    """Count the floating-point operations of one execution of an equation that is no pass."""
    return _equation(equation, _Lowering(None, UNKNOWN_DEVICE))


def _operations(jaxpr: core.Jaxpr, lowering: _Lowering) -> Operations:
    return sum((_equation(equation, lowering) for equation in jaxpr.eqns), Operations())


def _equation(equation: Any, lowering: _Lowering) -> Operations:
    name = equation.primitive.name
    inner = [_operations(sub, lowering) for sub in _jaxprs(equation, lowering)]
    if name == "cond":
        return max(inner, key=lambda branch: branch.matrix + branch.vector)
    if inner:
        return sum(inner, Operations()) * _times(equation)
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        depth = math.prod(shape[axis] for axis in contracted)
        return Operations(matrix=2 * depth * _size(equation.outvars[0]))
    if not jnp.issubdtype(equation.invars[0].aval.dtype if equation.invars else bool, np.inexact):
        return Operations()
    if name in _ELEMENTWISE:
        return Operations(vector=_size(equation.outvars[0]))
    if name in _REDUCTIONS or name.startswith("cum"):
        return Operations(vector=_size(equation.invars[0]))
    return Operations()


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)


def _jaxprs(equation: core.JaxprEqn, lowering: _Lowering) -> Iterator[core.Jaxpr]:
    """Yield the jaxprs nested in an equation; for a pass, that of its implementation."""
    if equation.primitive.name in _PASSES:
        yield _trace_pass(equation, lowering).jaxpr
        return
    if equation.primitive.name == "pallas_call":
        yield equation.params["jaxpr"]
        return
    skipped = ("cond_jaxpr", "fwd_jaxpr_thunk", "jvp_jaxpr_fun", "bwd")
    for name, value in equation.params.items():
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, core.ClosedJaxpr) and name not in skipped:
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr) and name not in skipped:
                yield item


def _trace_pass(equation: Any, lowering: _Lowering) -> core.ClosedJaxpr:
    """Trace the function that a pass is lowered to."""
    shapes = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in equation.invars]
    function = passes.select(equation.primitive.name, *lowering, shapes, **equation.params)
    return jax.make_jaxpr(function)(*shapes)


def _times(equation: core.JaxprEqn) -> int:
    """Return how often one execution of an equation executes the equations nested in it."""
    if equation.primitive.name == "scan":
        return equation.params["length"]
    if equation.primitive.name == "pallas_call":
        return math.prod(equation.params["grid_mapping"].grid)
    if equation.primitive.name == "while":
        raise ValueError(f"arithmetic: how often does this loop run? {equation.source_info}")
    return 1


def _equations(
    jaxpr: core.Jaxpr, calls: int, lowering: _Lowering
) -> Iterator[tuple[core.JaxprEqn, int]]:
    for equation in jaxpr.eqns:
        yield equation, calls
        if equation.primitive.name != "pallas_call":
            for sub in _jaxprs(equation, lowering):
                yield from _equations(sub, calls * _times(equation), lowering)


def _kernel(equation: core.JaxprEqn, calls: int) -> Kernel:
    mapping = equation.params["grid_mapping"]
    if mapping.num_index_operands:
        raise ValueError(f"arithmetic: blocks of {equation.params['name']} depend on its operands")
    body = equation.params["jaxpr"]
    references = {variable: position for position, variable in enumerate(body.invars)}
    requested: collections.Counter[int] = collections.Counter()
    _count_requests(body, references, {}, math.prod(mapping.grid), requested)
    estimate = equation.params["cost_estimate"]
    return Kernel(
        name=equation.params["name"],
        grid=tuple(mapping.grid),
        operands=tuple(
            Operand(
                shape=tuple(block.array_aval.shape),
                itemsize=block.array_aval.dtype.itemsize,
                blocks=_blocks(mapping.grid, block),
                requested=requested[position],
            )
            for position, block in enumerate(mapping.block_mappings)
        ),
        declared=None if estimate is None else estimate.bytes_accessed,
        calls=calls,
    )


def _blocks(grid: tuple[int, ...], mapping: Any) -> dict[tuple[int, ...], int]:
    """Count the fetches by the shape of the block; the last axis of the grid runs fastest."""
    steps = jnp.asarray(np.indices(grid, np.int32).reshape(len(grid), -1))
    function = core.jaxpr_as_fun(mapping.index_map_jaxpr)
    indices = np.asarray(jax.vmap(lambda step: jnp.stack(function(*step)), 1)(steps))
    changes = np.any(indices[1:] != indices[:-1], axis=1)
    block = np.array([getattr(size, "block_size", 1) for size in mapping.block_shape])
    moved = indices[np.concatenate([[True], changes])]
    sizes = np.minimum(block, np.array(mapping.array_aval.shape) - moved * block)
    return dict(collections.Counter(tuple(size.tolist()) for size in sizes))


def _count_requests(
    jaxpr: core.Jaxpr,
    references: dict[Any, int],
    axes: dict[Any, set[int]],
    times: int,
    requested: collections.Counter[int],
) -> None:
    """Add the bytes that the body of a kernel loads and stores, by the position of the operand.

    Args:
      jaxpr: The body, or a part of it.
      references: Positions of the operands by variable.
      axes: Along which the values of variables vary; along all where a variable is missing.
      times: Number of executions.
      requested: The count.
    """
    for equation in jaxpr.eqns:
        _add_axes(equation, axes)
        if equation.primitive.name in _MEMORY and equation.invars[0] in references:
            value: Any = (equation.outvars or equation.invars[1:])[0].aval
            size = _distinct(equation, value.shape, axes) * value.dtype.itemsize
            requested[references[equation.invars[0]]] += times * size
        branches = []
        for sub in _jaxprs(equation, _Lowering(None, UNKNOWN_DEVICE)):
            # A cond has the index of the branch before the arguments of the branch.
            passed = equation.invars[len(equation.invars) - len(sub.invars) :]
            pairs = [
                pair
                for pair in zip(sub.invars, passed, strict=True)
                if not isinstance(pair[1], core.Literal)
            ]
            inner = {variable: references[x] for variable, x in pairs if x in references}
            # What a loop carries may vary along more axes later.
            constants = equation.params.get("num_consts", len(pairs))
            fixed = set(sub.invars[:constants])
            inner_axes = {v: _axes_of(x, axes) for v, x in pairs if v in fixed}
            branches.append(collections.Counter[int]())
            _count_requests(sub, inner, inner_axes, times * _times(equation), branches[-1])
        if equation.primitive.name == "cond":
            branches = [max(branches, key=lambda branch: branch.total())]
        for branch in branches:
            requested.update(branch)


def _distinct(equation: core.JaxprEqn, shape: tuple[int, ...], axes: dict[Any, set[int]]) -> int:
    """Count the elements of a load or store; once along axes along which no index varies."""
    others: list[Any] = list(equation.invars[1:])
    indices = [x for x in others if x.aval.dtype == np.int32 and x.aval.shape]
    if not indices or any(x.aval.shape != shape for x in indices):
        return math.prod(shape)
    varying = set().union(*(_axes_of(x, axes) for x in indices))
    return math.prod(shape[axis] for axis in varying)


def _axes_of(variable: Any, axes: dict[Any, set[int]]) -> set[int]:
    """Return the axes along which a value may vary."""
    if isinstance(variable, core.Literal):
        return set()
    every = {axis for axis, size in enumerate(getattr(variable.aval, "shape", ())) if size > 1}
    return axes.get(variable, every)


def _add_axes(equation: core.JaxprEqn, axes: dict[Any, set[int]]) -> None:
    """Add the axes along which the result of an elementwise operation or a broadcast varies."""
    name = equation.primitive.name
    if name == "broadcast_in_dim":
        to = equation.params["broadcast_dimensions"]
        found = {to[axis] for axis in _axes_of(equation.invars[0], axes)}
    elif name == "broadcast_to":  # by the indexing of a reference
        operand: Any = equation.invars[0]
        added = len(equation.params["shape"]) - operand.aval.ndim
        found = {added + axis for axis in _axes_of(operand, axes)}
    elif name == "iota":
        found = {equation.params["dimension"]}
    elif name in _ELEMENTWISE:
        operands: list[Any] = list(equation.invars)
        found = set().union(*(_axes_of(x, axes) for x in operands if x.aval.shape))
    else:
        return
    axes[equation.outvars[0]] = found
