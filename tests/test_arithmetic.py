"""Operations, and blocks of kernels, against counts by hand."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jax.extend import core

from capsjax.kernels.dispatch import Unsupported
from capsjax.kernels.vote_passes import passes
from capsjax.kernels.vote_passes.cases import CASES, Case
from capsjax.kernels.vote_passes.passes import PLATFORMS, Device
from experiments.compilers import arithmetic, targets
from experiments.compilers.arithmetic import Operations
from experiments.compilers.compiling import CompileRequest, platform_of, routing


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


def test_what_warps_load_together_is_requested_once():
    def kernel(x_ref, y_ref):
        lanes = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32)[None], (4, 16))
        warps = jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32)[:, None], (4, 16))

        def add(k, total):
            return total + pltriton.load(x_ref.at[k, lanes])

        total = lax.fori_loop(0, 6, add, jnp.zeros((4, 16)))
        pltriton.store(y_ref.at[warps, lanes], total)

    def program(x):
        return pl.pallas_call(kernel, grid=(2,), out_shape=shape(4, 16))(x)

    (found,) = arithmetic.kernels(program, shape(6, 16))
    assert [operand.requested for operand in found.operands] == [2 * 6 * 64, 2 * 4 * 64]


# A pass is counted as what it becomes on a platform.

SMALL = Case(batch=8, capsules=16, length=4, parents=3, depth=8, num_iterations=2)


def small(implementation, *, case=SMALL, gradients=False):
    return routing(CompileRequest("h100", implementation, case, gradients))


def test_every_pass_is_known():
    primitives = {x.name for x in vars(passes).values() if isinstance(x, core.Primitive)}
    assert primitives == arithmetic._PASSES


def names_of(kernels):
    return {kernel.name for kernel in kernels}


@pytest.mark.parametrize(
    ("platform", "forward", "backward"),
    [
        (None, set(), set()),
        ("cuda", {"routing_sums"}, {"routing_logit_gradient_sums", "routing_input_gradients"}),
        ("tpu", {"dynamic_routing_sums"}, {"dynamic_routing_input_gradients"}),
    ],
)
def test_a_platform_decides_on_the_kernels(platform, forward, backward):
    device = Device("TPU v5 lite" if platform == "tpu" else None)
    for gradients, wanted in (False, forward), (True, forward | backward):
        function, shapes = small(None, gradients=gradients)
        found = arithmetic.kernels(function, *shapes, platform=platform, device=device)
        assert names_of(found) == wanted


def test_the_operations_of_a_pass_are_counted():
    # B=8 I=16 P=4 J=3 D=8: each of two iterations makes all votes, a product.
    function, shapes = small("xla")
    votes = 8 * 16 * 3 * 8
    counted = arithmetic.operations(function, *shapes)
    assert counted.matrix == 2 * (2 * 4 * votes)
    # The second one multiplies and adds for agreements and for weighted sums.
    assert counted.vector > 4 * votes
    # Backward, the logits' gradient and the last pass make them anew; it ends with two products.
    both, shapes = small("xla", gradients=True)
    assert arithmetic.operations(both, *shapes).matrix == (2 + 1 + 1 + 2) * (2 * 4 * votes)


def test_a_mapped_function_and_one_in_a_loop_are_counted():
    function, shapes = small("xla")
    once = arithmetic.operations(function, *shapes)
    poses, weights = shapes
    several = shape(5, *poses.shape), weights
    looped = arithmetic.operations(lambda x, w: lax.map(lambda x: function(x, w), x), *several)
    assert looped == once * 5
    mapped = arithmetic.operations(jax.vmap(function, (0, None)), *several)
    assert mapped.matrix == 5 * once.matrix


def test_the_device_decides_on_the_tiles():
    function, shapes = small("mosaic_tpu", case=CASES["many_parents"])
    grids = [
        [k.grid for k in arithmetic.kernels(function, *shapes, platform="tpu", device=device)]
        for device in (Device("TPU v5 lite"), Device("TPU v5p"))
    ]
    assert grids[0] != grids[1]


def test_what_cannot_be_lowered_is_an_error():
    function, shapes = small("triton")
    with pytest.raises(ValueError, match="which runs on cuda only"):
        arithmetic.operations(function, *shapes, platform="tpu")
    with pytest.raises(Unsupported, match="must lie on one device"):
        arithmetic.kernels(function, *shapes, platform="cuda", device=Device(num_devices=2))


TPU = [name for name, platform in PLATFORMS.items() if platform == "tpu"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", TPU)
def test_tpu_kernels_declare_the_bytes_that_their_blocks_move(implementation, case):
    program = CompileRequest("tpu_v5e", implementation, CASES[case], gradients=True)
    function, shapes = routing(program)
    target = targets.TARGETS[program.target]
    platform, known = platform_of(target), targets.described(target)
    device = passes.device_named(known.device_kind, known.num_cores)
    kernels = arithmetic.kernels(function, *shapes, platform=platform, device=device)
    assert kernels
    for kernel in kernels:
        moved = sum(
            times * math.prod(block) * operand.itemsize
            for operand in kernel.operands
            for block, times in operand.blocks.items()
        )
        assert kernel.declared == moved, kernel
