"""Counts the arithmetic that a program asks for, and the blocks that its kernels fetch.

Both are read from the jaxpr, before any compiler: a multiply-add is two operations, any other
operation on an element is one, loops count by their length, kernels by their grid. A pass of the
routing engine is one primitive in a jaxpr; it is counted as what it is lowered to on a platform.
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

# Named by JAX; what they do to an element is counted as one operation.
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
# Loads and stores of a kernel's body; a store returns what was there, so its result has the size.
_MEMORY = {"get", "swap", "addupdate", "masked_load", "masked_swap"}
# The primitives of the routing engine.
_PASSES = {"moments", "chain", "input_gradients", "couplings"}
UNKNOWN_DEVICE = Device()


@dataclasses.dataclass(frozen=True)
class Operations:
    """Floating-point operations, apart for the units that do them."""

    matrix: int = 0  # of matrix products
    vector: int = 0  # of everything else

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(self.matrix + other.matrix, self.vector + other.vector)

    def __mul__(self, times: int) -> "Operations":
        return Operations(times * self.matrix, times * self.vector)


@dataclasses.dataclass(frozen=True)
class Operand:
    """An operand or result of a kernel, and the blocks in which its pipeline moves it."""

    shape: tuple[int, ...]
    itemsize: int  # bytes
    # How often a block is moved, by its size: as often as its index changes along the grid. Blocks
    # at the end of the array are cut.
    blocks: dict[tuple[int, ...], int]
    requested: int  # bytes that the programs load and store by themselves, over the grid

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return math.prod(self.shape) * self.itemsize


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One `pallas_call` of a program."""

    name: str
    grid: tuple[int, ...]
    operands: tuple[Operand, ...]  # its results too, at the end
    declared: int | None  # bytes of its own `cost_estimate`
    calls: int  # by the program


class _Lowering(NamedTuple):
    """What passes are lowered for."""

    platform: str | None  # "cuda", "tpu"; None: one without kernels
    device: Device


def operations(
    function: Callable[..., Any],
    *shapes: jax.ShapeDtypeStruct,
    platform: str | None = None,
    device: Device = UNKNOWN_DEVICE,
) -> Operations:
    """Counts the floating-point operations of a function.

    Args:
      function: Of arrays.
      *shapes: Of its arguments.
      platform: For which routing is lowered: "cuda", "tpu", or None for one without kernels.
      device: For which routing is lowered.

    Raises:
      ValueError: A loop's length is not known before it runs, or the implementation of routing
        that `function` names runs on another platform.
      Unsupported: The implementation of routing that `function` names does not take its arguments.

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
    """Lists the kernels that a function calls, in the order of its program.

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
    """Yields each equation of a function and how often it runs, in the order of its program.

    An equation comes before those inside it, but for the body of a kernel, which is left out.
    Arguments and errors are those of `operations`.
    """
    yield from _equations(jax.make_jaxpr(function)(*shapes).jaxpr, 1, _Lowering(platform, device))


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
    """The jaxprs that an equation runs; of a pass, that of its implementation on the platform."""
    if equation.primitive.name in _PASSES:
        yield _program_of(equation, lowering).jaxpr
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


def _program_of(equation: Any, lowering: _Lowering) -> core.ClosedJaxpr:
    """Traces what a pass is lowered to."""
    shapes = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in equation.invars]
    program = passes.select(equation.primitive.name, *lowering, shapes, **equation.params)
    return jax.make_jaxpr(program)(*shapes)


def _times(equation: core.JaxprEqn) -> int:
    """How often an equation runs what is inside it."""
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
    _count_requests(body, references, math.prod(mapping.grid), requested)
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
    """The sizes of the blocks that are moved along the grid, whose last axis runs fastest."""
    steps = jnp.asarray(np.indices(grid, np.int32).reshape(len(grid), -1))
    function = core.jaxpr_as_fun(mapping.index_map_jaxpr)
    indices = np.asarray(jax.vmap(lambda step: jnp.stack(function(*step)), 1)(steps))
    changes = np.any(indices[1:] != indices[:-1], axis=1)
    block = np.array([getattr(size, "block_size", 1) for size in mapping.block_shape])
    moved = indices[np.concatenate([[True], changes])]
    sizes = np.minimum(block, np.array(mapping.array_aval.shape) - moved * block)
    return dict(collections.Counter(tuple(size.tolist()) for size in sizes))


def _count_requests(
    jaxpr: core.Jaxpr, references: dict[Any, int], times: int, requested: collections.Counter[int]
) -> None:
    """Adds the bytes that a kernel's body loads and stores, by the operand that it refers to."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in _MEMORY and equation.invars[0] in references:
            value: Any = (equation.outvars or equation.invars[1:])[0].aval
            size = math.prod(value.shape) * value.dtype.itemsize
            requested[references[equation.invars[0]]] += times * size
        branches = []
        for sub in _jaxprs(equation, _Lowering(None, UNKNOWN_DEVICE)):
            # The arguments of a branch follow the number of the branch.
            passed = equation.invars[len(equation.invars) - len(sub.invars) :]
            inner = {
                variable: references[outer]
                for variable, outer in zip(sub.invars, passed, strict=True)
                if not isinstance(outer, core.Literal) and outer in references
            }
            branches.append(collections.Counter[int]())
            _count_requests(sub, inner, times * _times(equation), branches[-1])
        if equation.primitive.name == "cond":
            branches = [max(branches, key=lambda branch: branch.total())]
        for branch in branches:
            requested.update(branch)
