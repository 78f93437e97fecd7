"""Matrix products of float32 operands as sums of products of their bfloat16 parts.

An operand is the sum of its parts, each part rounded to bfloat16. A product has the terms `(a, b)`
with `a + b` below the number of parts; the omitted ones are smaller than the rounding error of the
last part. A matrix unit takes as long for a contraction of 16 as for one of 128, so short
contractions have all terms stacked along it.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

# Rows of a packed bfloat16 register: only multiples of it are stacked.
PACKED_ROWS = 16


def split(x: Array, parts: int) -> list[Array]:
    """Split an array into bfloat16 parts, largest first; a bfloat16 array has one."""
    found = []
    for part in range(parts):
        if x.dtype == jnp.bfloat16:
            return [*found, x]
        if part < parts - 1:
            high = _round(x)
            found.append(high.astype(jnp.bfloat16))
            x = x - high
    return [*found, x.astype(jnp.bfloat16)]


def _round(x: Array) -> Array:
    """Round float32 to a value of bfloat16, by operations that no compiler simplifies away."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return lax.bitcast_convert_type((bits + 0x8000) & -0x10000, jnp.float32)


def terms(left_parts: int, right_parts: int, parts: int) -> list[tuple[int, int]]:
    """List the terms of a product, smallest first."""
    found = [(a, b) for a in range(left_parts) for b in range(right_parts) if a + b < parts]
    return sorted(found, key=sum, reverse=True)


def stacks(depth: int) -> bool:
    """Return whether parts of this many rows can be stacked without moving them."""
    return depth % PACKED_ROWS == 0


def dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Multiply two bfloat16 matrices with accumulation in float32."""
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def multiply_rows(rows: Sequence[Array], x: Sequence[Array], axis: int, parts: int) -> Array:
    """Multiply parts of rows `[D, k]` with parts of a matrix, contracted over `k` and `axis`.

    The contraction is as deep as the matrix unit, so the parts of the rows are further rows: each
    part of the matrix is loaded into the unit once.
    """
    depth = rows[0].shape[0]
    total: list[Array] = []
    for b, part in reversed(list(enumerate(x))):
        some = rows[: parts - b]
        if stacks(depth) and len(some) > 1:
            product = dot(jnp.concatenate(some), part, 1, axis)
            total += [product[k * depth : (k + 1) * depth] for k in reversed(range(len(some)))]
        else:
            total += [dot(row, part, 1, axis) for row in reversed(some)]
    return sum(total[1:], total[0])
