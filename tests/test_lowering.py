"""Programs reach the compilers of platforms that are not here, by the implementation meant."""

import contextlib
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import capsjax
from capsjax.kernels.dispatch import Unsupported
from capsjax.kernels.dynamic_routing import pallas_mosaic_tpu
from capsjax.kernels.dynamic_routing.cases import CASES, Case
from capsjax.kernels.dynamic_routing.config import TPU_MEMORY, mosaic_tpu_config_for

# How a kernel's call is named in a lowered program.
KERNEL = {"tpu": "tpu_custom_call", "cuda": "routing_input_gradients"}


@contextlib.contextmanager
def for_h100():
    """What Pallas-Triton asks and says from JAX 0.11 on: for which GPU, and that it will end."""
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with warnings.catch_warnings(), use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        message = "The Pallas Triton backend is deprecated"
        warnings.filterwarnings("ignore", message, DeprecationWarning)
        yield


def lowered(platform, case, implementation=None, mapped=False, **settings):
    """The text of the program for value and gradients, of two problems at once if `mapped`."""

    def function(poses, weights):
        route = lambda u, w: capsjax.dynamic_routing(  # noqa: E731
            u, w, num_iterations=case.num_iterations, implementation=implementation, **settings
        )
        outputs, vjp = jax.vjp(route, poses, weights)
        return outputs, vjp(outputs)

    with for_h100() if platform == "cuda" else contextlib.nullcontext():
        traced = jax.jit(jax.vmap(function, (0, None)) if mapped else function).trace(
            jax.ShapeDtypeStruct(
                (*(2,) * mapped, case.batch, case.capsules, case.length), case.dtype
            ),
            jax.ShapeDtypeStruct(
                (case.capsules, case.length, case.parents, case.depth), case.dtype
            ),
        )
        return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("gradient", ["full", "last"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("platform", KERNEL)
def test_each_case_is_lowered_to_kernels(platform, name, gradient):
    assert KERNEL[platform] in lowered(platform, CASES[name], gradient=gradient)


def test_other_platforms_get_the_plain_form():
    text = lowered("cpu", CASES["capsnet_mnist"])
    assert not any(name in text for name in KERNEL.values())


@pytest.mark.parametrize(
    ("name", "platform"), [("pallas_mosaic_tpu", "tpu"), ("pallas_triton", "cuda")]
)
def test_a_kernel_named_elsewhere_is_refused(name, platform):
    message = f"dynamic_routing: implementation '{name}' runs on {platform}, got a program for cpu"
    with pytest.raises(ValueError, match=message):
        lowered("cpu", CASES["capsnet_mnist"], name)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_what_a_tpu_cannot_multiply_is_left_to_the_plain_form(dtype):
    with jax.enable_x64(True):
        case = CASES["capsnet_mnist"]._replace(dtype=dtype)
        assert KERNEL["tpu"] not in lowered("tpu", case)
        with pytest.raises(Unsupported, match=f"float32 and bfloat16, got {dtype}"):
            lowered("tpu", case, "pallas_mosaic_tpu")


def test_weights_too_large_for_vector_memory_are_left_to_the_plain_form():
    case = CASES["capsnet_mnist"]._replace(length=64, parents=64, depth=64)
    assert KERNEL["tpu"] not in lowered("tpu", case)
    with pytest.raises(Unsupported, match=r"weights \[I, P, J, D\] = \(1152, 64, 64, 64\) exceed"):
        lowered("tpu", case, "pallas_mosaic_tpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 3, 128, 1000, 4608])
def test_a_tpu_tile_of_80_000_weights_a_capsule_fits(batch, dtype):
    case = Case(batch, 1152, length=50, parents=25, depth=64, dtype=dtype)
    assert mosaic_tpu_config_for(case).memory < TPU_MEMORY + 2**24


PLATFORMS = ("cpu", "cuda", "tpu")


def test_one_program_for_all_platforms():
    poses, weights = jnp.ones((2, 6, 4)), jnp.ones((6, 4, 3, 5))
    with for_h100():
        # JAX promises nothing about the future of Pallas-Triton's call.
        triton = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
        function = jax.jit(capsjax.dynamic_routing)
        export = jax.export.export(function, platforms=PLATFORMS, disabled_checks=[triton])
        exported = export(poses, weights)
    outputs = exported.call(poses, weights)
    assert jnp.allclose(outputs, capsjax.dynamic_routing(poses, weights))


def test_a_kernel_that_is_run_elsewhere_is_an_error():
    poses, weights = jnp.ones((2, 6, 4)), jnp.ones((6, 4, 3, 5))
    run = partial(pallas_mosaic_tpu.dynamic_routing, num_iterations=2, gradient="full")
    with pytest.raises(ValueError, match="a kernel for tpu in a program for cpu"):
        jax.jit(lambda u, w: run(u, w, None, None))(poses, weights)


# One of each, what no tile divides, and the ends of what is supported.
TRITON = {
    "one of each": Case(batch=1, capsules=1, length=1, parents=1, depth=1),
    "odd": Case(batch=5000, capsules=7, length=5, parents=37, depth=3),
    "long poses": Case(batch=4, capsules=9, length=128, parents=3, depth=256, dtype="bfloat16"),
}


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("name", TRITON)
def test_odd_sizes_are_lowered_for_a_gpu_under_vmap_too(name, mapped):
    text = lowered("cuda", TRITON[name], "pallas_triton", mapped)
    kernels = ("routing_sums", "routing_logit_gradient_sums", "routing_input_gradients")
    assert all(kernel in text for kernel in kernels)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"length": 129}, "P must be at most 128 and D at most 256, got 129 and 16"),
        ({"depth": 257}, "P must be at most 128 and D at most 256, got 8 and 257"),
        ({"dtype": "float64"}, "poses must be float32 or bfloat16, got float64"),
        ({"dtype": "float16"}, "poses must be float32 or bfloat16, got float16"),
    ],
)
def test_what_triton_kernels_do_not_take_is_left_to_the_plain_form(changes, reason):
    with jax.enable_x64(True):
        case = CASES["capsnet_mnist"]._replace(**changes)
        assert KERNEL["cuda"] not in lowered("cuda", case)
        with pytest.raises(Unsupported, match=reason):
            lowered("cuda", case, "pallas_triton")


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_mapped_kernels_stay_kernels(axes):
    shapes = [(2, 6, 4), (6, 4, 3, 5)]
    arrays = [
        jnp.ones(s if axis is None else (7, *s)) for s, axis in zip(shapes, axes, strict=True)
    ]

    @jax.jit
    def gradients(poses, weights):
        outputs, vjp = jax.vjp(jax.vmap(capsjax.dynamic_routing, axes), poses, weights)
        return vjp(outputs)

    assert KERNEL["tpu"] in gradients.trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
