"""Every operation x implementation x case x dtype x transform against the float64 oracle."""

import math
from functools import cache, partial
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tolerances
from jax.experimental.pallas import tpu as pltpu

import capsjax
from capsjax.kernels import dynamic_routing, strided_conv
from capsjax.kernels.dynamic_routing import pallas_mosaic_tpu, pallas_triton
from capsjax.kernels.dynamic_routing.cases import CASES
from capsjax.kernels.dynamic_routing.config import MosaicTpuConfig, TritonConfig


class Routing(NamedTuple):
    """A small routing problem; no size is a multiple of a tile."""

    batch: int = 3
    capsules: int = 7
    length: int = 4
    parents: int = 5
    depth: int = 6
    num_iterations: int = 3
    prior: bool = False
    bias: bool = False
    mask: bool = False
    gradient: str = "full"


ROUTING = {
    **{f"T={t}": Routing(num_iterations=t) for t in range(1, 6)},
    **{f"last T={t}": Routing(num_iterations=t, gradient="last") for t in (1, 2, 3)},
    "prior": Routing(prior=True),
    "prior T=1": Routing(prior=True, num_iterations=1),
    "prior last": Routing(prior=True, gradient="last"),
    "bias": Routing(bias=True),
    "mask": Routing(mask=True),
    "all T=5": Routing(num_iterations=5, prior=True, bias=True, mask=True),
    "all T=2": Routing(num_iterations=2, prior=True, bias=True, mask=True),
    "all last": Routing(prior=True, bias=True, mask=True, gradient="last"),
    "one of each": Routing(1, 1, 1, 1, 1),
    "I=1": Routing(capsules=1, prior=True),
    "J=1": Routing(parents=1, prior=True),
    "P=1 D=1": Routing(length=1, depth=1),
    "batch past a tile": Routing(batch=131, capsules=5, parents=3, depth=2, prior=True),
    "capsules past a tile": Routing(batch=2, capsules=301, parents=37, depth=16, bias=True),
}
# Kernels are interpreted here: as they are, and cut so small that there are several tiles and
# panels of examples, chunks of parents and groups of capsules, the last ones past the end.
MEMORY_MODELLED = "pallas_mosaic_tpu, its memory modelled"
TRITON_IN_SMALL_TILES = "pallas_triton, small tiles"
SMALL_TRITON = TritonConfig(
    sums_examples=16,
    sums_parents=4,
    sums_capsules=3,
    sums_warps=4,
    sums_programs=3,
    gradients_examples=16,
    gradients_parents=2,
    gradients_capsules=2,
    gradients_warps=4,
    gradients_programs=3,
)
KERNELS = {
    MEMORY_MODELLED: partial(
        pallas_mosaic_tpu.dynamic_routing, interpret=pltpu.InterpretParams(detect_races=True)
    ),
    "pallas_mosaic_tpu": partial(pallas_mosaic_tpu.dynamic_routing, interpret=True),
    "pallas_mosaic_tpu, small tiles": partial(
        pallas_mosaic_tpu.dynamic_routing,
        interpret=True,
        config=MosaicTpuConfig(examples=8, panel=1, weight_buffers=1, memory=2**24),
    ),
    "pallas_triton": partial(pallas_triton.dynamic_routing, interpret=True),
    TRITON_IN_SMALL_TILES: partial(
        pallas_triton.dynamic_routing, interpret=True, config=SMALL_TRITON
    ),
}
ANYWHERE = [name for name in dynamic_routing.IMPLEMENTATIONS if name not in KERNELS]
IN_SOME_CASES = (MEMORY_MODELLED, TRITON_IN_SMALL_TILES)
IN_ALL_CASES = [name for name in (*ANYWHERE, *KERNELS) if name not in IN_SOME_CASES]
HALF = ("T=1", "T=3", "last T=2", "all T=5", "all last", "one of each", "capsules past a tile")
CONVOLUTIONS = {  # batch, image, kernel, outputs, stride
    "capsnet": (2, (20, 20, 3), (9, 9), 4, (2, 2)),
    "odd": (3, (11, 14, 2), (4, 5), 3, (3, 2)),
    "stride past the kernel": (1, (9, 9, 2), (2, 2), 2, (4, 4)),
    "one pixel": (2, (5, 5, 1), (5, 5), 2, (1, 1)),
    "one channel": (2, (12, 12, 1), (3, 3), 1, (1, 1)),
}
TRANSFORMS = ("eager", "vmap")  # all else is under jit


def routing_arguments(case, dtype, seed=0):
    """Poses, weights, prior, bias, mask and the outputs' cotangent."""
    rng = np.random.default_rng(seed)

    def normal(scale, *shape):
        return jnp.asarray(rng.normal(size=shape) * scale, dtype)

    return (
        normal(0.5, case.batch, case.capsules, case.length),
        normal(0.5, case.capsules, case.length, case.parents, case.depth),
        normal(1.0, case.capsules, case.parents) if case.prior else None,
        normal(0.1, case.parents, case.depth) if case.bias else None,
        jnp.asarray(rng.random((case.batch, case.capsules)) < 0.7) if case.mask else None,
        normal(1.0, case.batch, case.parents, case.depth),
    )


@cache
@mock.patch.dict(dynamic_routing.IMPLEMENTATIONS, KERNELS)
@mock.patch.dict(dynamic_routing.PLATFORMS, clear=True)
def route(implementation, case, dtype, transform="jit"):
    """Outputs and gradients of one implementation."""
    *arguments, cotangent = routing_arguments(case, dtype)

    def function(poses, weights, prior, bias, mask):
        return capsjax.dynamic_routing(
            poses,
            weights,
            prior=prior,
            bias=bias,
            mask=mask,
            num_iterations=case.num_iterations,
            gradient=case.gradient,
            implementation=implementation,
        )

    if transform == "vmap":
        function = jax.vmap(function, (0, None, None, None, 0 if case.mask else None))

    def values_and_gradients(*arguments):
        outputs, vjp = jax.vjp(lambda *a: function(*a, arguments[-1]), *arguments[:-1])
        return outputs, vjp(cotangent)

    passes_are_jitted = str(implementation).startswith("pallas_triton")  # and compiled once
    if transform == "jit" and not passes_are_jitted:
        values_and_gradients = jax.jit(values_and_gradients)
    return values_and_gradients(*arguments)


def exact_routing(case, dtype):
    """The oracle's outputs and gradients for the same arguments; a masked pose is 0."""
    poses, weights, prior, bias, mask, cotangent = routing_arguments(case, dtype)
    kept = 1 if mask is None else np.asarray(mask, np.float64)[..., None]
    outputs, _, gradients = oracles.dynamic_routing(
        np.asarray(poses, np.float64) * kept,
        weights,
        prior,
        bias,
        cotangent,
        num_iterations=case.num_iterations,
        gradient=case.gradient,
    )
    return outputs, (gradients[0] * kept, *gradients[1:])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in ROUTING), *((name, "bfloat16") for name in HALF)],
)
@pytest.mark.parametrize("implementation", IN_ALL_CASES)
def test_dynamic_routing_matches_the_oracle(implementation, name, dtype):
    case = ROUTING[name]
    plain = route("reference", case, dtype)
    exact = exact_routing(case, dtype)
    tolerances.assert_as_exact(route(implementation, case, dtype), plain, exact)
    # The rule compares with the plain implementation; that one is held to a bound of its own.
    unit = float(jnp.finfo(dtype).eps)
    for value, wanted in zip(*map(jax.tree.leaves, (plain, exact)), strict=True):
        scale = max(np.abs(wanted).max(), 1e-3)
        np.testing.assert_allclose(
            np.asarray(value, np.float64) / scale, wanted / scale, atol=20 * unit
        )


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["all T=2", "one of each"])
@pytest.mark.parametrize("implementation", [*IN_ALL_CASES, None])
def test_dynamic_routing_under_transforms(implementation, name, transform):
    case = ROUTING[name]
    actual = route(implementation, case, "float32", transform)
    plain = route("reference", case, "float32", transform)
    tolerances.assert_as_exact(actual, plain, exact_routing(case, "float32"))


@pytest.mark.parametrize("name", ["all T=2", "prior last"])
def test_tpu_kernels_read_nothing_unwritten_and_do_not_race(name, capfd):
    # This mode fills memory with NaN and prints what accesses the same place without an order.
    test_dynamic_routing_matches_the_oracle(MEMORY_MODELLED, name, "float32")
    assert "RACE" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("implementation", ANYWHERE)
def test_dynamic_routing_in_float64(implementation):
    case = ROUTING["all T=5"]
    with jax.enable_x64(True):
        results = route(implementation, case, "float64"), exact_routing(case, "float64")
    for value, wanted in zip(*map(jax.tree.leaves, results), strict=True):
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in (*HALF, "batch past a tile")), ("all T=5", "bfloat16")],
)
def test_triton_kernels_in_small_tiles_match_the_oracle(name, dtype):
    test_dynamic_routing_matches_the_oracle(TRITON_IN_SMALL_TILES, name, dtype)


def test_triton_kernels_give_the_same_bits_twice():
    case = ROUTING["batch past a tile"]
    twice = [route.__wrapped__(TRITON_IN_SMALL_TILES, case, "float32") for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, *twice)


def test_dynamic_routing_never_stores_the_votes():
    case = CASES["capsnet_mnist"]

    def peak_megabytes(implementation):
        arguments = (
            jax.ShapeDtypeStruct((case.batch, case.capsules, case.length), case.dtype),
            jax.ShapeDtypeStruct(
                (case.capsules, case.length, case.parents, case.depth), case.dtype
            ),
        )

        def loss(poses, weights):
            return capsjax.dynamic_routing(poses, weights, implementation=implementation).sum()

        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 1e6

    assert peak_megabytes("reference") > 250  # the measure sees the votes where there are any
    assert peak_megabytes("xla") < 60


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("implementation", strided_conv.IMPLEMENTATIONS)
def test_strided_conv_matches_the_oracle(implementation, name, dtype, monkeypatch):
    # Whether the spectral form pays is not in question here, and its own answer would be no.
    monkeypatch.setattr(strided_conv.spectral, "_worthwhile", lambda *arguments: True)
    batch, image, kernel_size, outputs, stride = CONVOLUTIONS[name]
    depth = 2 * math.prod(stride)  # of two channels: several chunks, one not full
    monkeypatch.setattr(strided_conv.spectral, "DEPTH", depth)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.random((batch, *image)), dtype)
    kernel = jnp.asarray(rng.normal(size=(*kernel_size, image[-1], outputs)), dtype)
    shape = jax.eval_shape(partial(strided_conv.xla.strided_conv, stride=stride), images, kernel)
    cotangent = jnp.asarray(rng.normal(size=shape.shape), dtype)

    def values_and_gradients(name):
        function = partial(strided_conv.IMPLEMENTATIONS[name], stride=stride)

        @jax.jit
        def run(images, kernel):
            outputs, vjp = jax.vjp(function, images, kernel)
            return outputs, vjp(cotangent)

        return run(images, kernel)

    exact = oracles.strided_conv(images, kernel, cotangent, stride=stride)
    plain = values_and_gradients("xla")
    actual = values_and_gradients(implementation)
    if implementation == "spectral" and dtype == "float32":
        # A transform adds rounding of its own where a direct sum has a few terms only.
        for value, wanted in zip(*map(jax.tree.leaves, (actual, exact)), strict=True):
            np.testing.assert_allclose(value, wanted, atol=2e-6 * np.abs(wanted).max())
    else:
        tolerances.assert_as_exact(actual, plain, exact)
