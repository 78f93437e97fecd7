"""Functions of one tile in the Triton kernels: column order, products, loads and stores.

The kernels compute no votes. With states V, the agreement of child i with parent j is the sum over
P of `u[b,i,p] y[b,i,p]`, where `y = V_j W_ij^T`, and the weighted sums are `Σ_i (c u)_i W_ij`. Both
are matrix products with the weights of a group of n = 4h children, K = n·P columns in all.

The columns are in the order (h, q, t, e): component 2q + e of child 4h + t of the group. A matrix
instruction leaves columns 2t and 2t + 1 of every 8 with thread t of 4. So a thread has all
components of its children: sums over P stay in a thread, and couplings times poses are the left
operand of the next product where they are.

A float32 operand is the sum of its `parts`, bfloat16 numbers (`vote_passes.precision`). They are
made in the kernels, so an interpreted kernel has the error that it has on a GPU.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from capsjax.kernels.vote_passes.config import TRITON_LANES as LANES
from capsjax.kernels.vote_passes.config import power_of_two, triton_children
from capsjax.kernels.vote_passes.linear import Operands
from capsjax.kernels.vote_passes.precision import parts as parts_of

LOG2_E = 1.4426950408889634
# Depth of a matrix instruction on bfloat16 operands.
INSTRUCTION_DEPTH = 16


class Tiling(NamedTuple):
    """Sizes of a routing problem, and of the tiles of a kernel."""

    batch: int  # B
    capsules: int  # I
    length: int  # P
    parents: int  # J
    depth: int  # D
    examples: int  # b, of a tile
    parts: int  # of a float32 operand
    interpret: bool

    @property
    def padded_length(self) -> int:
        """P in a tile: a power of two, at least 2."""
        return max(2, power_of_two(self.length))

    @property
    def padded_depth(self) -> int:
        """D in a tile: a power of two, at least the depth of a matrix instruction."""
        return max(INSTRUCTION_DEPTH, power_of_two(self.depth))

    @property
    def h(self) -> int:
        """Children of a thread."""
        return self.n // LANES

    @property
    def n(self) -> int:
        """Children of a group."""
        return triton_children(self.length)

    @property
    def k(self) -> int:
        """Columns of a group."""
        return self.n * self.padded_length

    @property
    def groups(self) -> int:
        """Number of groups."""
        return pl.cdiv(self.capsules, self.n)

    @property
    def tiles(self) -> int:
        """Number of tiles of examples."""
        return pl.cdiv(self.batch, self.examples)


def tiling_of(operands: Operands, *, examples: int, interpret: bool) -> Tiling:
    """Return the tiling of a pass."""
    batch, capsules, length = operands.poses.shape
    parents, depth = operands.weights.shape[2:]
    parts = 1 if operands.poses.dtype == jnp.bfloat16 else parts_of("cuda")
    return Tiling(batch, capsules, length, parents, depth, examples, parts, interpret)


# Preparation of operands, outside of the kernels.


def prepare_weights(tiling: Tiling, weights: Array, *, in_parts: bool) -> Array:
    """Return weights `[I, P, J, D]` as `[parts, I·P, J·D]`, or as one float32 for all parts."""
    x = weights.reshape(tiling.capsules * tiling.length, -1)
    if in_parts and tiling.parts > 1:
        return _rounded_parts(tiling, x)
    return x[None]


def prepare_states(tiling: Tiling, states: Sequence[Array], tiles: int) -> Array | None:
    """Return states `[B, J, D]` as `[parts, states, J, B', d]`, with B' of whole tiles."""
    if not states:
        return None
    x = jnp.stack(states).transpose(0, 2, 1, 3)
    padding = (
        (0, 0),
        (0, 0),
        (0, tiles * tiling.examples - tiling.batch),
        (0, tiling.padded_depth - tiling.depth),
    )
    return _rounded_parts(tiling, jnp.pad(x, padding))


def prepare_rows(tiling: Tiling, rows: Sequence[Array], tiles: int) -> Array | None:
    """Return arrays `[B, J]` as `[arrays, J, B']`, with B' of whole tiles."""
    if not rows:
        return None
    padding = (0, 0), (0, 0), (0, tiles * tiling.examples - tiling.batch)
    return jnp.pad(jnp.stack(rows).transpose(0, 2, 1), padding)


def prepare_prior(prior: Array | None) -> Array | None:
    """Return prior logits `[I, J]` or `[B, I, J]` to the base 2, with J first."""
    return None if prior is None else jnp.moveaxis(prior * LOG2_E, -1, 0)


def _rounded_parts(tiling: Tiling, x: Array) -> Array:
    """Return bfloat16 parts, each the rounded remainder of those before."""
    found, x = [], x.astype(jnp.float32)
    for _ in range(tiling.parts):
        found.append(x.astype(jnp.bfloat16))
        x = x - found[-1].astype(jnp.float32)
    return jnp.stack(found)


# Instructions that JAX does not emit for a GPU: XLA keeps products and sums apart.


def _instruction(text: str, *operands: Array) -> Array:
    (found,) = pltriton.elementwise_inline_asm(
        text,
        args=operands,
        constraints=",".join(["=f"] + ["f"] * len(operands)),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(operands[0].shape, jnp.float32)],
    )
    return found


class Runs(Protocol):
    """What tells how a kernel is run."""

    @property
    def interpret(self) -> bool:
        """Whether it is interpreted, so that instructions are JAX's own operations."""


def fma(tiling: Runs, a: Array, b: Array, c: Array) -> Array:
    """Compute `a * b + c`, with one rounding."""
    return a * b + c if tiling.interpret else _instruction("fma.rn.f32 $0,$1,$2,$3;", a, b, c)


def fnma(tiling: Runs, a: Array, b: Array, c: Array) -> Array:
    """Compute `c - a * b`, with one rounding; a negation by JAX would be an instruction."""
    if tiling.interpret:
        return c - a * b
    return _instruction("{.reg .f32 t; neg.f32 t,$1; fma.rn.f32 $0,t,$2,$3;}", a, b, c)


def fms(tiling: Runs, a: Array, b: Array, c: Array) -> Array:
    """Compute `a * b - c`, with one rounding; a negation by JAX would be an instruction."""
    if tiling.interpret:
        return a * b - c
    return _instruction("{.reg .f32 t; neg.f32 t,$3; fma.rn.f32 $0,$1,$2,t;}", a, b, c)


def exp2(tiling: Runs, x: Array) -> Array:
    """Compute 2 to the power of x."""
    return jnp.exp2(x) if tiling.interpret else _instruction("ex2.approx.ftz.f32 $0,$1;", x)


def log2(tiling: Runs, x: Array) -> Array:
    """Compute the logarithm to the base 2."""
    return jnp.log2(x) if tiling.interpret else _instruction("lg2.approx.ftz.f32 $0,$1;", x)


def reciprocal(tiling: Runs, x: Array) -> Array:
    """Compute 1 / x."""
    return 1 / x if tiling.interpret else _instruction("rcp.approx.ftz.f32 $0,$1;", x)


def exchange_lanes(tiling: Runs, x: Array, bit: int) -> Array:
    """Exchange numbers of a tile `[n, 32]` between the lanes of a warp that differ in a bit."""
    if not tiling.interpret:
        return _instruction(f"shfl.sync.bfly.b32 $0,$1,{bit},0x1f,0xffffffff;", x)
    halves = x.reshape(len(x), -1, 2, bit)
    return jnp.flip(halves, 2).reshape(x.shape)


def placed_like(tiling: Tiling, x: Array, y: Array) -> Array:
    """Return x, distributed over the threads as y is: an instruction has all operands in one."""
    return x if tiling.interpret else _instruction("mov.b32 $0,$1;", x, y)


def split(tiling: Tiling, x: Array, *, rounded: bool = True) -> list[Array]:
    """Return the parts of float32 numbers.

    Without rounding, which is one instruction less, the rest of a number has its sign. A product
    loses that of both operands' last parts, so of two parts at most one operand should be so.
    """
    found = []
    for _ in range(tiling.parts - 1):
        high = _high_bits(tiling, x, 0x8000 if rounded and tiling.parts == 2 else 0)
        found.append(high.astype(jnp.bfloat16))
        x = x - high
    return [*found, x.astype(jnp.bfloat16)]


def _high_bits(tiling: Tiling, x: Array, added: int) -> Array:
    """Return x without the bits that bfloat16 lacks, so that its conversion is exact."""
    if tiling.interpret:
        bits = lax.bitcast_convert_type(x, jnp.uint32) + jnp.uint32(added)
        return lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    if not added:
        return _instruction("and.b32 $0,$1,0xffff0000;", x)
    return _instruction(f"{{.reg .b32 t; add.u32 t,$1,{added}; and.b32 $0,t,0xffff0000;}}", x)


def scaled_parts(tiling: Tiling, x: Array, parts: list[Array], factor: Array) -> list[Array]:
    """Return the parts of poses times a factor of each child, `[b, n]`.

    Args:
      tiling: Sizes.
      x: Poses, `[b, K]`.
      parts: Those of x.
      factor: `[b, n]`.
    """
    if tiling.parts > 2:
        return split(tiling, x * spread(tiling, factor))
    factors = [spread(tiling, part) for part in split(tiling, factor)]
    high = _pair_fma(tiling, factors[0], parts[0], None)
    if tiling.parts == 1:
        return [high]
    # The remainder of the rounded product is a bfloat16 number too.
    low = _pair_fma(tiling, factors[0], parts[0], high, negated=True)
    low = _pair_fma(tiling, factors[1], parts[0], low)
    return [high, _pair_fma(tiling, factors[0], parts[1], low)]


def _pair_fma(
    tiling: Tiling, a: Array, b: Array, c: Array | None, *, negated: bool = False
) -> Array:
    """Compute `a * b + c`, or `- c` if negated, on pairs of bfloat16, with one rounding."""
    if tiling.interpret:
        product = a.astype(jnp.float32) * b.astype(jnp.float32)
        more = jnp.float32(0) if c is None else c.astype(jnp.float32)
        return (product + (-more if negated else more)).astype(jnp.bfloat16)
    if c is None:
        text = "{.reg .b32 c; mov.b32 c,0x80008000; fma.rn.bf16x2 $0,$1,$2,c;}"
    elif negated:
        text = "{.reg .b32 c; neg.bf16x2 c,$3; fma.rn.bf16x2 $0,$1,$2,c;}"
    else:
        text = "fma.rn.bf16x2 $0,$1,$2,$3;"
    operands = [x for x in (a, b, c) if x is not None]
    (found,) = pltriton.elementwise_inline_asm(
        text,
        args=operands,
        constraints=",".join(["=r"] + ["r"] * len(operands)),
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(a.shape, jnp.bfloat16)],
    )
    return found


def dot(
    tiling: Tiling, a: list[Array], b: list[Array], start: Array | None = None, **transposed: bool
) -> Array:
    """Add the product of operands in parts to `start`, the smallest terms first."""
    for total in reversed(range(tiling.parts)):
        for k in range(total + 1):
            term = pltriton.dot(a[k], b[total - k], **transposed)
            start = term if start is None else start + term  # becomes the product's own start
    assert start is not None
    return start


# Functions of the columns of a group.


def agreements(tiling: Tiling, x: Array, y: Array) -> Array:
    """Compute the sums over P of poses times products, `[b, K]` to `[b, n]`."""
    x0, x1 = lax.unstack(x.reshape(_axes(tiling, x)), axis=-1)
    y0, y1 = lax.unstack(y.reshape(_axes(tiling, y)), axis=-1)
    return jnp.sum(fma(tiling, x1, y1, x0 * y0), y0.ndim - 2).reshape(-1, tiling.n)


def spread(tiling: Tiling, c: Array) -> Array:
    """Repeat the number of each child for all its components, `[b, n]` to `[b, K]`."""
    shape = _axes(tiling, c)
    if tiling.h == 1:
        return jnp.broadcast_to(c.reshape(-1, 1, LANES, 1), shape).reshape(-1, tiling.k)
    c = c.reshape(-1, tiling.h, 1, LANES, 1)
    return jnp.broadcast_to(c, shape).reshape(-1, tiling.k)


def to_columns(tiling: Tiling, x: Array) -> Array:
    """Permute `[b, n·P]` into the order of columns."""
    pairs = tiling.padded_length // 2
    if tiling.h == 1:
        return x.reshape(-1, LANES, pairs, 2).transpose(0, 2, 1, 3).reshape(-1, tiling.k)
    x = x.reshape(-1, tiling.h, LANES, pairs, 2).transpose(0, 1, 3, 2, 4)
    return x.reshape(-1, tiling.k)


def from_columns(tiling: Tiling, x: Array) -> Array:
    """Permute columns back into `[b, n·P]`."""
    axes = (0, 2, 1, 3) if tiling.h == 1 else (0, 1, 3, 2, 4)
    return x.reshape(_axes(tiling, x)).transpose(axes).reshape(-1, tiling.k)


def _axes(tiling: Tiling, x: Array) -> tuple[int, ...]:
    """Return the axes of columns: (b, h, q, t, e), without h if it is 1, which costs shuffles."""
    own = () if tiling.h == 1 else (tiling.h,)
    return (x.shape[0], *own, tiling.padded_length // 2, LANES, 2)


def _columns(tiling: Tiling, child: Array, component: Array) -> tuple[Array, Array]:
    """Return indices along an axis I·P, and which exist; all others are past its end."""
    exists = (child < tiling.capsules) & (component < tiling.length)
    end = tiling.capsules * tiling.length
    return jnp.where(exists, child * tiling.length + component, end), exists


def _place(tiling: Tiling, column: Array) -> tuple[Array, Array, Array, Array]:
    """Return the coordinates (h, q, t, e) of columns."""
    pairs = jnp.int32(tiling.padded_length // 2)
    e, rest = lax.rem(column, jnp.int32(2)), lax.div(column, jnp.int32(2))
    t, rest = lax.rem(rest, jnp.int32(LANES)), lax.div(rest, jnp.int32(LANES))
    return lax.div(rest, pairs), lax.rem(rest, pairs), t, e


def loop(count: int, step: Any, carry: Any) -> Any:
    """Run `lax.fori_loop` from 0 with an int32 index, also if JAX's default is int64."""
    if count == 1:
        return step(jnp.int32(0), carry)
    return lax.fori_loop(0, count, lambda k, carry: step(k.astype(jnp.int32), carry), carry)


def barrier(tiling: Tiling) -> None:
    """Let a program's threads load what others of them stored."""
    if not tiling.interpret:
        pltriton.debug_barrier()


def grow(at: Any, term: Array, grows: Any, inside: Array | None = None) -> None:
    """Store a term, added to what the program stored before if `grows`, a bool or an array.

    A barrier must be between the two.
    """
    if grows is not False:
        mask = jnp.broadcast_to(jnp.asarray(grows), term.shape)
        mask = mask if inside is None else mask & inside
        term = term + pltriton.load(at, mask=mask, other=0.0).astype(jnp.float32)
    pltriton.store(at, term.astype(at.dtype), mask=inside)


class Group:
    """Loads and stores of a group of children and a tile of examples.

    What is past the end of an array is loaded as 0 and not stored. `ragged` tells whether the
    group may be past the last one.
    """

    def __init__(self, tiling: Tiling, index: Array, tile: Array, *, ragged: bool = False) -> None:
        self.tiling, self.index, self.ragged = tiling, index, ragged
        self.rows = tile * tiling.examples + jnp.arange(tiling.examples, dtype=jnp.int32)
        column = jnp.arange(tiling.k, dtype=jnp.int32)
        length = jnp.int32(tiling.padded_length)
        child, component = index * tiling.n + lax.div(column, length), lax.rem(column, length)
        self.columns, exists = _columns(tiling, child, component)
        if tiling.length == tiling.padded_length:  # visibly contiguous to the compiler
            self.columns = index * tiling.k + column
        self.inside = (self.rows < tiling.batch)[:, None] & exists[None, :]
        # The rows of weights [I·P, J·D], in the order of columns.
        h, q, t, e = _place(tiling, column)
        child, component = index * tiling.n + LANES * h + t, 2 * q + e
        self.weight_rows, self.weights_exist = _columns(tiling, child, component)
        children = index * tiling.n + jnp.arange(tiling.n, dtype=jnp.int32)
        self.children = jnp.broadcast_to(children[None, :], (tiling.examples, tiling.n))
        self.pairs = (self.rows < tiling.batch)[:, None] & (self.children < tiling.capsules)

    def load_poses(self, ref: Any) -> Array:
        """Load poses `[B, I·P]` in the order of columns."""
        at = ref.at[self.rows[:, None], self.columns[None, :]]
        x = pltriton.load(at, mask=self.inside, other=0.0).astype(jnp.float32)
        return to_columns(self.tiling, x)

    def load_poses_like_products(self, ref: Any, weights_ref: Any, states_ref: Any) -> Array:
        """Load poses, distributed over the threads as products of states and weights are.

        Else every step of the loops over parents would move the poses between threads.
        """
        zero = jnp.int32(0)
        state, weights = self.load_state(states_ref, 0, zero), self.load_weights(weights_ref, zero)
        product = pltriton.dot(state[0], weights[0], trans_b=True)
        return placed_like(self.tiling, self.load_poses(ref), product)

    def store_poses(self, ref: Any, x: Array) -> None:
        """Store poses `[B, I·P]` from the order of columns."""
        at = ref.at[self.rows[:, None], self.columns[None, :]]
        x = from_columns(self.tiling, x).astype(ref.dtype)
        pltriton.store(at, x, mask=self.inside)

    def load_weights(self, ref: Any, parent: Array) -> list[Array]:
        """Load the parts of prepared weights for a parent, `[K, d]`, in the order of columns."""
        at, inside = self.weights_block(parent)

        def load(place: Any) -> Array:
            if inside is None:
                return pltriton.load(place)
            return pltriton.load(place, mask=inside, other=0.0)

        if ref.dtype == jnp.float32:
            return split(self.tiling, load(ref.at[(0, *at)]), rounded=False)
        return [load(ref.at[(part, *at)]) for part in range(self.tiling.parts)]

    def weights_block(self, parent: Array) -> tuple[tuple[Array, Array], Array | None]:
        """Return the indices of weights `[I·P, J·D]` for a parent; which exist, None if all do."""
        tiling = self.tiling
        d = jnp.arange(tiling.padded_depth, dtype=jnp.int32)
        at = self.weight_rows[:, None], (parent * tiling.depth + d)[None, :]
        whole = tiling.length == tiling.padded_length and tiling.depth == tiling.padded_depth
        if whole and tiling.capsules % tiling.n == 0 and not self.ragged:
            return at, None
        return at, self.weights_exist[:, None] & (d < tiling.depth)[None, :]

    def load_state(self, ref: Any, index: int, parent: Array) -> list[Array]:
        """Load the parts of a prepared state, `[b, d]`."""
        d = jnp.arange(self.tiling.padded_depth, dtype=jnp.int32)[None, :]
        return [
            pltriton.load(ref.at[part, index, parent, self.rows[:, None], d])
            for part in range(self.tiling.parts)
        ]

    def load_row(self, ref: Any, index: int, parent: Array) -> Array:
        """Load a number of each example from prepared rows, for all children: `[b, n]`."""
        rows = jnp.broadcast_to(self.rows[:, None], self.children.shape)
        return pltriton.load(ref.at[index, parent, rows])

    def load_prior(self, ref: Any, parent: Array) -> Array:
        """Load prepared prior logits, `[b, n]`."""
        if ref.ndim == 2:
            at, inside = ref.at[parent, self.children], self.children < self.tiling.capsules
        else:
            at, inside = ref.at[parent, self.rows[:, None], self.children], self.pairs
        return pltriton.load(at, mask=inside, other=0.0)

    def load_pairs(self, ref: Any, *index: int, other: float = 0) -> Array:
        """Load numbers `[B, …, I]` of pairs of an example and a child, `[b, n]`."""
        at = ref.at[(self.rows[:, None], *index, self.children)]
        return pltriton.load(at, mask=self.pairs, other=other)

    def store_pairs(self, ref: Any, x: Array, *index: int) -> None:
        """Store numbers of pairs, `[B, …, I]`."""
        at = ref.at[(self.rows[:, None], *index, self.children)]
        pltriton.store(at, x, mask=self.pairs)
