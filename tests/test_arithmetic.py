"""Operations, and blocks of kernels, against counts by hand."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl

from capsjax.kernels import dynamic_routing
from capsjax.kernels.dynamic_routing.cases import CASES
from experiments import arithmetic
from experiments.arithmetic import Operations
from experiments.compiling import Program, routing


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (jnp.matmul, [shape(3, 4), shape(4, 5)], Operations(matrix=2 * 3 * 4 * 5)),
        (lambda x: jnp.exp(x) + x, [shape(7)], Operations(vector=14)),
        (lambda x: x.sum(0), [shape(7, 3)], Operations(vector=21)),
        (lambda x: x.T.reshape(-1)[2:], [shape(7, 3)], Operations()),
        (lambda x: x + 1, [shape(7, dtype="int32")], Operations()),
        (lambda x: lax.map(jnp.exp, x), [shape(5, 3)], Operations(vector=15)),
        (lambda x: lax.cond(x[0] > 0, jnp.exp, lambda x: x, x), [shape(4)], Operations(vector=5)),
        (jax.jit(jax.grad(lambda x: jnp.sum(x * x))), [shape(4)], Operations(vector=4 + 4 + 12)),
    ],
)
def test_operations(function, shapes, expected):
    assert arithmetic.operations(function, *shapes) == expected


def test_a_loop_of_unknown_length_is_an_error():
    def halve(x):
        return lax.while_loop(lambda x: x > 1, lambda x: x / 2, x)

    with pytest.raises(ValueError, match="how often does this loop run"):
        arithmetic.operations(halve, shape())


def product(x, y, *, block, rows=None, cost_estimate=None):
    """A matrix product whose grid is rows x columns x depth."""
    (m, k), n = x.shape, y.shape[1]

    def kernel(x_ref, y_ref, z_ref):
        @pl.when(pl.program_id(2) == 0)
        def _():
            z_ref[...] = jnp.zeros_like(z_ref)

        z_ref[...] += x_ref[...] @ y_ref[...]

    return pl.pallas_call(
        kernel,
        grid=(rows or m // block, n // block, k // block),
        in_specs=[
            pl.BlockSpec((block, block), lambda i, j, k: (i, k)),
            pl.BlockSpec((block, block), lambda i, j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec((block, block), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        cost_estimate=cost_estimate,
        name="product",
    )(x, y)


def test_a_kernel_is_counted_along_its_grid():
    estimate = pl.CostEstimate(flops=1, bytes_accessed=2, transcendentals=3)

    def program(x, y):
        return lax.map(lambda x: product(x, y, block=8, cost_estimate=estimate), x)

    shapes = shape(10, 16, 32), shape(32, 24)
    (kernel,) = arithmetic.kernels(program, *shapes)
    assert (kernel.name, kernel.grid, kernel.calls) == ("product", (2, 3, 4), 10)
    assert kernel.declared == 2
    x, y, z = kernel.operands
    assert (x.shape, y.shape, z.shape) == ((16, 32), (32, 24), (16, 24))
    assert (x.blocks, y.blocks, z.blocks) == ({(8, 8): 24}, {(8, 8): 24}, {(8, 8): 6})
    # What a body asks for: each step reads x, y and z and writes z, and may write zeros to z.
    assert (x.requested, y.requested, z.requested) == (24 * 256, 24 * 256, 24 * 3 * 256)
    assert arithmetic.operations(program, *shapes).matrix == 10 * 2 * 16 * 32 * 24


def test_a_block_that_stays_is_moved_once_and_one_at_the_end_is_cut():
    (kernel,) = arithmetic.kernels(
        lambda x, y: product(x, y, block=8, rows=3), shape(20, 8), shape(8, 8)
    )
    x, y, z = kernel.operands
    assert x.blocks == z.blocks == {(8, 8): 2, (4, 8): 1}
    assert y.blocks == {(8, 8): 1}


def test_requests_are_followed_into_loops():
    def kernel(x_ref, y_ref):
        def add(k, total):
            return total + x_ref[k]

        y_ref[...] = lax.fori_loop(0, 6, add, jnp.zeros(16))

    def program(x):
        return pl.pallas_call(kernel, grid=(2,), out_shape=shape(16))(x)

    (found,) = arithmetic.kernels(program, shape(6, 16))
    assert [operand.requested for operand in found.operands] == [2 * 6 * 64, 2 * 64]


TPU = [name for name, platform in dynamic_routing.PLATFORMS.items() if platform == "tpu"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", TPU)
def test_tpu_kernels_declare_the_bytes_that_their_blocks_move(implementation, case):
    program = Program("tpu_v5e", implementation, CASES[case], gradients=True)
    function, shapes = routing(program)
    kernels = arithmetic.kernels(function, *shapes)
    assert kernels
    for kernel in kernels:
        moved = sum(
            times * math.prod(block) * operand.itemsize
            for operand in kernel.operands
            for block, times in operand.blocks.items()
        )
        assert kernel.declared == moved, kernel
