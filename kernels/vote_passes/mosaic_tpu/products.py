"""Matrix products of float32 operands as sums of products of their bfloat16 parts.

An operand is the sum of its parts, each part rounded to bfloat16. A product has the terms `(a, b)`
with `a + b` below the number of parts; the omitted ones are smaller than the rounding error of the
last part. A matrix unit takes as long for a contraction of 16 as for one of 128, so short
contractions have all terms stacked along it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

# Rows of a packed bfloat16 register: only multiples of it are stacked.
PACKED_ROWS = 16


class Products(NamedTuple):
    """Matrix products of a precision."""

    parts: int  # of a float32 operand; a bfloat16 operand is its only part
    interpreted: bool

    def split(self, x: Array) -> list[Array]:
        """Split an array into bfloat16 parts, largest first."""
        found: list[Array] = []
        while x.dtype == jnp.float32 and len(found) < self.parts - 1:
            high = _round(x)
            found.append(high.astype(jnp.bfloat16))
            x = x - high
        return [*found, x.astype(jnp.bfloat16)]

    def terms(self, dtype: Any) -> list[tuple[int, int]]:
        """List the terms of a product of float32 with an operand of a dtype, smallest first."""
        of_right = 1 if dtype == jnp.bfloat16 else self.parts
        pairs = [(a, b) for a in range(self.parts) for b in range(of_right)]
        return sorted((pair for pair in pairs if sum(pair) < self.parts), key=sum, reverse=True)

    def dot(self, a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
        """Multiply two bfloat16 matrices with accumulation in float32."""
        if self.interpreted:  # XLA's CPU backend lacks some products of bfloat16
            a, b = (lax.reduce_precision(x.astype(jnp.float32), 8, 7) for x in (a, b))
        return lax.dot_general(
            a,
            b,
            (((a_axis,), (b_axis,)), ((), ())),
            precision=lax.Precision.DEFAULT,  # of the parts, whatever JAX's setting is
            preferred_element_type=jnp.float32,
        )

    def of_rows(self, rows: Sequence[Array], x: Sequence[Array], axis: int) -> Array:
        """Multiply parts of rows `[D, k]` with parts of a matrix, contracted over `k` and `axis`.

        The contraction is as deep as the matrix unit, so the parts of the rows are further rows:
        each part of the matrix is loaded into the unit once.
        """
        depth = rows[0].shape[0]
        found: list[Array] = []
        for b, part in reversed(list(enumerate(x))):
            some = rows[: self.parts - b]
            if stacks(depth) and len(some) > 1:
                product = self.dot(jnp.concatenate(some), part, 1, axis)
                found += [product[k * depth : (k + 1) * depth] for k in reversed(range(len(some)))]
            else:
                found += [self.dot(row, part, 1, axis) for row in reversed(some)]
        return sum(found[1:], found[0])


def stacks(depth: int) -> bool:
    """Return whether parts of this many rows can be stacked without moving them."""
    return depth % PACKED_ROWS == 0


def _round(x: Array) -> Array:
    """Round float32 to a value of bfloat16, by operations that no compiler simplifies away."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return lax.bitcast_convert_type((bits + 0x8000) & -0x10000, jnp.float32)
