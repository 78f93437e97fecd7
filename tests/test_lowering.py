"""Programs reach the compilers of platforms that are not here, by the implementation meant."""

import contextlib
import re
import subprocess
import sys
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, use_abstract_mesh

import capsjax
from capsjax import Unsupported
from capsjax.kernels.vote_passes.cases import CASES, Case
from capsjax.kernels.vote_passes.config import (
    TPU_MEMORY,
    mosaic_tpu_config_for,
    mosaic_tpu_fuses,
)
from capsjax.kernels.vote_passes.passes import PLATFORMS, Implementation

# How a kernel's call is named in a lowered program.
KERNEL = {"tpu": "tpu_custom_call", "cuda": "routing_input_gradients"}
# The loop over tiles of the plain form.
LOOP = "stablehlo.while"
DEVICES = {"cuda": "NVIDIA H100 80GB HBM3", "tpu": "TPU v5 lite"}
# In whose 16 MiB of vector memory the states and weights of two cases do not fit.
SMALL_TPU, TOO_LARGE = "TPU v4", ("many_parents", "long")


@contextlib.contextmanager
def lowering_for(platform, device_kind=None, axes=None, axis_type=AxisType.Auto):
    """Says for which device a program is lowered, if any is known, and the axes of its mesh."""
    kind, axes = device_kind or DEVICES.get(platform), axes or {}
    if kind is None:
        yield None
        return
    if platform == "cuda":
        device = AbstractDevice(kind, num_cores=132, platform="gpu")
    else:
        device = AbstractDevice(kind, num_cores=1, platform="tpu")
    types = (axis_type,) * len(axes)
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), types, abstract_device=device)
    with warnings.catch_warnings(), use_abstract_mesh(mesh):
        # What Pallas-Triton says from JAX 0.11 on.
        message = "The Pallas Triton backend is deprecated"
        warnings.filterwarnings("ignore", message, DeprecationWarning)
        yield mesh


def shapes_of(case):
    """Poses and weights of a case."""
    return (
        jax.ShapeDtypeStruct((case.batch, case.capsules, case.length), case.dtype),
        jax.ShapeDtypeStruct((case.capsules, case.length, case.parents, case.depth), case.dtype),
    )


def traced(case, implementation=None, mapped=False, **settings):
    """The program for value and gradients, of two problems at once if `mapped`."""
    settings = {"num_iterations": case.num_iterations} | settings

    def function(poses, weights):
        route = lambda u, w: capsjax.dynamic_routing(  # noqa: E731
            u, w, implementation=implementation, **settings
        )
        outputs, vjp = jax.vjp(route, poses, weights)
        return outputs, vjp(outputs)

    poses, weights = shapes_of(case)
    if mapped:
        poses = jax.ShapeDtypeStruct((2, *poses.shape), poses.dtype)
    return jax.jit(jax.vmap(function, (0, None)) if mapped else function).trace(poses, weights)


def lowered(platform, case, implementation=None, *, device_kind=None, **settings):
    """The text of the program that `traced` returns, lowered for a platform."""
    with lowering_for(platform, device_kind):
        program = traced(case, implementation, **settings)
        return program.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in CASES),
        ("capsnet_mnist", {"gradient": "last"}),
        ("capsnet_mnist", {"num_iterations": 1}),
    ],
    ids=lambda x: x if isinstance(x, str) else ", ".join(map(str, x.values())) or "full",
)
@pytest.mark.parametrize("platform", KERNEL)
def test_each_case_is_lowered_to_kernels(platform, name, settings):
    text = lowered(platform, CASES[name], **settings)
    assert KERNEL[platform] in text
    assert LOOP not in text


# Each kind of TPU, with the cases that get tiles of their own there.
OTHER_TPUS = [
    (SMALL_TPU, "capsnet_mnist"),
    (SMALL_TPU, "conv_capsules"),
    ("TPU v5p", "many_parents"),
    ("TPU v5p", "conv_capsules"),
    ("TPU v6 lite", "capsnet_mnist"),
    ("TPU7x", "many_parents"),
]


@pytest.mark.parametrize(("device_kind", "name"), OTHER_TPUS)
def test_cases_are_lowered_for_other_tpus(device_kind, name):
    assert KERNEL["tpu"] in lowered("tpu", CASES[name], device_kind=device_kind)


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_exceeds_the_memory_of_a_tpu_is_left_to_the_plain_form(name):
    text = lowered("tpu", CASES[name], device_kind=SMALL_TPU)
    assert KERNEL["tpu"] not in text
    assert LOOP in text
    with pytest.raises(Unsupported, match=r"weights \[I, P, J, D\] = .* exceed the TPU's"):
        lowered("tpu", CASES[name], "mosaic_tpu", device_kind=SMALL_TPU)


@pytest.mark.parametrize("device_kind", [SMALL_TPU, *TPU_MEMORY])
def test_every_tpu_has_tiles_for_each_case(device_kind):
    for name, case in CASES.items():
        config = mosaic_tpu_config_for(case._replace(num_iterations=1), device_kind)
        fits = device_kind != SMALL_TPU or name not in TOO_LARGE
        assert (config.sums is not None and config.gradients is not None) == fits, name
        memory = 2**20 * (0.75 * TPU_MEMORY.get(device_kind, 16) + 8)
        tiles = [x for x in (config.sums, config.gradients, config.fused) if x is not None]
        assert all(tile.memory <= memory for tile in tiles), name
        if mosaic_tpu_fuses(case) and device_kind != SMALL_TPU:
            assert config.fused is not None, name


def test_the_least_memory_is_assumed_of_an_unknown_tpu():
    programs = [traced(CASES[name]) for name in ("capsnet_mnist", *TOO_LARGE)]
    texts = [program.lower(lowering_platforms=("tpu",)).as_text() for program in programs]
    assert [KERNEL["tpu"] in text for text in texts] == [True, False, False]


@pytest.mark.parametrize("platform", ["cpu", "rocm"])
def test_other_platforms_get_the_plain_form(platform):
    program = traced(CASES["capsnet_mnist"])
    text = program.lower(lowering_platforms=(platform,)).as_text()
    assert LOOP in text
    assert not re.search("triton|tpu|mosaic|cuda|pallas|custom_call", text, re.IGNORECASE)
    # The jaxpr has a branch for TPUs, in which passes follow in another order, but no kernels.
    assert not re.search("triton|mosaic|cuda|pallas|custom_call", str(program.jaxpr), re.IGNORECASE)


IN_A_FRESH_PROCESS = """
import sys
import jax, jax.numpy as jnp
import capsjax
poses, weights = jnp.ones((2, 6, 4)), jnp.ones((6, 4, 3, 5))
loss = lambda u, w: capsjax.dynamic_routing(u, w).sum()
jax.block_until_ready(jax.jit(jax.value_and_grad(loss, (0, 1)))(poses, weights))
jax.block_until_ready(jax.grad(loss)(poses, weights))
ours = [f"capsjax.kernels.vote_passes.{name}" for name in ("xla", "triton", "mosaic_tpu")]
pallas = [f"jax.experimental.pallas{name}" for name in ("", ".triton", ".tpu")]
print(*(name for name in (*ours, *pallas) if name in sys.modules))
"""


def test_a_program_for_a_cpu_imports_nothing_of_other_platforms():
    command = [sys.executable, "-W", "error", "-c", IN_A_FRESH_PROCESS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["capsjax.kernels.vote_passes.xla"]


@pytest.mark.parametrize(("name", "platform"), PLATFORMS.items())
def test_a_backend_that_jax_lacks_is_left_to_the_plain_form(name, platform, monkeypatch):
    monkeypatch.setitem(sys.modules, f"capsjax.kernels.vote_passes.{name}", None)
    case = CASES["capsnet_mnist"]
    text = lowered(platform, case)
    assert KERNEL[platform] not in text
    assert LOOP in text
    message = (
        rf"routing: this version of JAX lacks what implementation '{name}' needs \(.*\); "
        "name 'xla', or install another version"
    )
    with pytest.raises(Unsupported, match=message):
        lowered(platform, case, name)


@pytest.mark.parametrize(("name", "platform"), PLATFORMS.items())
def test_a_kernel_named_elsewhere_is_refused_however_it_is_run(name, platform):
    message = (
        "^routing: implementation must run on the platform of the program, "
        f"got '{name}', which runs on {platform} only"
    )
    poses, weights = jnp.ones((2, 6, 4)), jnp.ones((6, 4, 3, 5))

    def function(poses, weights=weights):
        return capsjax.dynamic_routing(poses, weights, implementation=name).sum()

    with lowering_for(platform):
        program = jax.jit(jax.vmap(jax.grad(function))).trace(poses)  # tracing asks nothing yet
        own = program.lower(lowering_platforms=(platform,)).as_text()
        assert KERNEL[platform] in own
    for run in (function, jax.jit(function), jax.grad(function), jax.vmap(function)):
        with pytest.raises(ValueError, match=message):
            run(poses)
    for others in ("cpu",), ("cpu", platform), *[(other,) for other in KERNEL if other != platform]:
        with pytest.raises(ValueError, match=message), lowering_for(platform):
            program.lower(lowering_platforms=others)
    with pytest.raises(ValueError, match=message):
        lowered("cpu", CASES["capsnet_mnist"], Implementation(name, interpret=False))
    interpreted = lowered("cpu", CASES["capsnet_mnist"], Implementation(name, interpret=True))
    assert KERNEL[platform] not in interpreted


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_what_a_tpu_cannot_multiply_is_left_to_the_plain_form(dtype):
    with jax.enable_x64(True):
        case = CASES["capsnet_mnist"]._replace(dtype=dtype)
        assert KERNEL["tpu"] not in lowered("tpu", case)
        with pytest.raises(Unsupported, match=f"float32 or bfloat16, got {dtype}"):
            lowered("tpu", case, "mosaic_tpu")


def test_weights_too_large_for_vector_memory_are_left_to_the_plain_form():
    case = CASES["capsnet_mnist"]._replace(length=64, parents=64, depth=64)
    assert KERNEL["tpu"] not in lowered("tpu", case)
    with pytest.raises(Unsupported, match=r"weights \[I, P, J, D\] = \(1152, 64, 64, 64\) exceed"):
        lowered("tpu", case, "mosaic_tpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 3, 128, 1000, 4608])
@pytest.mark.parametrize("device_kind", ["TPU v5 lite", "TPU v6 lite"])
def test_a_tpu_tile_of_80_000_weights_a_capsule_fits(device_kind, batch, dtype):
    case = Case(batch, 1152, length=50, parents=25, depth=64, dtype=dtype)
    config = mosaic_tpu_config_for(case, device_kind)
    for tile in (config.sums, config.gradients):
        assert tile.memory < 2**20 * (0.75 * TPU_MEMORY[device_kind] + 16)


SMALL = jnp.ones((2, 6, 4)), jnp.ones((6, 4, 3, 5))
ALL_PLATFORMS = ("cpu", "cuda", "tpu")
# JAX promises nothing about the future of Pallas-Triton's call.
TRITON_CALL = "__gpu$xla.gpu.triton"
SPLIT = P(None, "capsules"), P("capsules")


def gradients_of(function):
    """A function that returns another's outputs and gradients."""

    def run(*arrays):
        outputs, vjp = jax.vjp(function, *arrays)
        return outputs, vjp(outputs)

    return run


def over_capsules(function, gradients=(), *, mesh=None, check_vma):
    """The function in a shard_map that splits the input capsules."""
    out_specs = (P(), gradients) if gradients else P()
    return jax.shard_map(
        function, mesh=mesh, in_specs=SPLIT, out_specs=out_specs, check_vma=check_vma
    )


def route_over_capsules(poses, weights):
    return capsjax.dynamic_routing(poses, weights, axis_name="capsules")


def assert_close(found, wanted):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, wanted)


MANY_WEIGHTS = jnp.stack([SMALL[1], -SMALL[1] / 2, SMALL[1] / 3])
IN_ONE_ARTEFACT = {
    "gradients": (gradients_of(capsjax.dynamic_routing), SMALL),
    "mapped over weights": (
        gradients_of(jax.vmap(capsjax.dynamic_routing, (None, 0))),
        (SMALL[0], MANY_WEIGHTS),
    ),
    "gradients of each example": (
        jax.vmap(gradients_of(capsjax.dynamic_routing), (0, None)),
        SMALL,
    ),
}


@pytest.mark.parametrize("name", IN_ONE_ARTEFACT)
def test_one_program_for_all_platforms(name):
    function, arguments = IN_ONE_ARTEFACT[name]
    # No GPU is here, and none is described.
    check = jax.export.DisabledSafetyCheck.custom_call(TRITON_CALL)
    export = jax.export.export(jax.jit(function), platforms=ALL_PLATFORMS, disabled_checks=[check])
    exported = export(*arguments)
    text = exported.mlir_module()
    assert all(kernel in text for kernel in (KERNEL["tpu"], TRITON_CALL, LOOP))
    assert_close(exported.call(*arguments), function(*arguments))


def test_without_a_disabled_check_the_export_names_the_call_to_disable():
    function = jax.jit(capsjax.dynamic_routing)
    with pytest.raises(ValueError, match=re.escape(f"@{TRITON_CALL}")):
        jax.export.export(function, platforms=("cuda",))(*SMALL)


def test_however_it_is_run_the_choice_is_the_same():
    """One after the other in one process: nothing that one way leaves in a cache misleads another.

    The plain form of one device, of shards and of exports, and both kernels.
    """
    wanted = gradients_of(lambda u, w: capsjax.dynamic_routing(u, w, implementation="reference"))(
        *SMALL
    )
    gradients = gradients_of(capsjax.dynamic_routing)
    mesh = jax.make_mesh((1,), ("capsules",), axis_types=(AxisType.Auto,))

    def run_everywhere():
        assert_close(gradients(*SMALL), wanted)  # eager
        assert_close(jax.jit(gradients)(*SMALL), wanted)
        mapped = jax.vmap(gradients, (0, None))(*SMALL)
        assert_close(mapped[0], wanted[0])
        assert_close((mapped[1][0], mapped[1][1].sum(0)), wanted[1])
        exported = jax.export.export(jax.jit(gradients), platforms=("cpu", "tpu"))(*SMALL)
        assert_close(exported.call(*SMALL), wanted)
        for check_vma in (True, False):
            outer = gradients_of(over_capsules(route_over_capsules, mesh=mesh, check_vma=check_vma))
            inner = over_capsules(
                gradients_of(route_over_capsules), SPLIT, mesh=mesh, check_vma=check_vma
            )
            for function in (outer, jax.jit(inner)):
                assert_close(function(*SMALL), wanted)

    def lower_everywhere():
        for platform in KERNEL:
            with lowering_for(platform):
                program = jax.jit(gradients).trace(*SMALL)
                text = program.lower(lowering_platforms=(platform,)).as_text()
            assert KERNEL[platform] in text
            assert LOOP not in text

    for check in (run_everywhere, lower_everywhere) * 2:
        check()


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("platform", KERNEL)
def test_shards_are_lowered_to_kernels(platform, check_vma):
    with lowering_for(platform, axes={"capsules": 2}):
        outer = gradients_of(over_capsules(route_over_capsules, check_vma=check_vma))
        inner = over_capsules(gradients_of(route_over_capsules), SPLIT, check_vma=check_vma)
        mapped = gradients_of(
            over_capsules(jax.vmap(route_over_capsules, (0, None)), check_vma=check_vma)
        )
        for function in (outer, inner, mapped):
            program = jax.jit(function).trace(*SMALL)
            text = program.lower(lowering_platforms=(platform,)).as_text()
            assert KERNEL[platform] in text
            assert LOOP not in text


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(("name", "platform"), PLATFORMS.items())
def test_over_auto_axes_kernels_are_left_to_the_plain_form(name, platform, axis_type):
    with lowering_for(platform, axes={"data": 2}, axis_type=axis_type) as mesh:

        def lower(implementation):
            def function(poses, weights):
                return capsjax.dynamic_routing(poses, weights, implementation=implementation)

            sharding = NamedSharding(mesh, P("data"))
            poses = jax.ShapeDtypeStruct(SMALL[0].shape, SMALL[0].dtype, sharding=sharding)
            program = jax.jit(gradients_of(function)).trace(poses, SMALL[1])
            return program.lower(lowering_platforms=(platform,)).as_text()

        if axis_type == AxisType.Explicit:
            assert KERNEL[platform] in lower(None)
            assert KERNEL[platform] in lower(name)
            return
        text = lower(None)
        assert KERNEL[platform] not in text
        with pytest.raises(
            Unsupported, match=r"must lie on one device \(jax.shard_map, or Explicit"
        ):
            lower(name)


@pytest.mark.parametrize("platforms", [("tpu",), ("cuda",), ALL_PLATFORMS])
def test_a_batch_of_symbolic_size_is_left_to_the_plain_form(platforms):
    batch = jax.export.symbolic_shape("batch")[0]
    poses = jax.ShapeDtypeStruct((batch, 6, 4), "float32")
    function = jax.jit(gradients_of(capsjax.dynamic_routing))
    exported = jax.export.export(function, platforms=platforms)(poses, SMALL[1])
    text = exported.mlir_module()
    assert LOOP in text
    assert not any(kernel in text for kernel in KERNEL.values())
    if "cpu" in platforms:
        arrays = jnp.stack([SMALL[0][0] * k for k in range(1, 6)]), SMALL[1]
        assert_close(exported.call(*arrays), function(*arrays))


def test_a_named_kernel_refuses_a_batch_of_symbolic_size():
    batch = jax.export.symbolic_shape("batch")[0]
    poses = jax.ShapeDtypeStruct((batch, 6, 4), "float32")
    for name, platform in PLATFORMS.items():
        function = jax.jit(partial(capsjax.dynamic_routing, implementation=name))
        with pytest.raises(Unsupported, match="must have a batch of known size"):
            jax.export.export(function, platforms=(platform,))(poses, SMALL[1])


@pytest.mark.parametrize(("name", "platform"), PLATFORMS.items())
def test_options_are_lowered_to_kernels_and_shared_weights_to_the_plain_form(name, platform):
    def lower(implementation, weights, **settings):
        function = partial(capsjax.dynamic_routing, implementation=implementation, **settings)
        with lowering_for(platform):
            program = jax.jit(gradients_of(function)).trace(SMALL[0], weights)
            return program.lower(lowering_platforms=(platform,)).as_text()

    assert KERNEL[platform] in lower(None, SMALL[1], leaky=True, parent_mask=jnp.ones((2, 3), bool))
    assert KERNEL[platform] not in lower(None, SMALL[1][0])
    with pytest.raises(Unsupported, match="routing: inputs of this kernel must have"):
        lower(name, SMALL[1][0])


# One of each, what no tile divides, and the ends of what is supported.
TRITON = {
    "one of each": Case(batch=1, capsules=1, length=1, parents=1, depth=1),
    "odd": Case(batch=5000, capsules=7, length=5, parents=37, depth=3),
    "long poses": Case(batch=4, capsules=9, length=16, parents=3, depth=64, dtype="bfloat16"),
}


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("name", TRITON)
def test_odd_sizes_are_lowered_for_a_gpu_under_vmap_too(name, mapped):
    text = lowered("cuda", TRITON[name], "triton", mapped=mapped)
    kernels = ("routing_sums", "routing_logit_gradient_sums", "routing_input_gradients")
    assert all(kernel in text for kernel in kernels)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"length": 17}, "P must be at most 16 and D at most 64, got 17 and 16"),
        ({"depth": 65}, "P must be at most 16 and D at most 64, got 8 and 65"),
        ({"dtype": "float64"}, "inputs of this kernel must be float32 or bfloat16, got float64"),
        ({"dtype": "float16"}, "inputs of this kernel must be float32 or bfloat16, got float16"),
    ],
)
def test_what_triton_kernels_do_not_take_is_left_to_the_plain_form(changes, reason):
    with jax.enable_x64(True):
        case = CASES["capsnet_mnist"]._replace(**changes)
        assert KERNEL["cuda"] not in lowered("cuda", case)
        with pytest.raises(Unsupported, match=reason):
            lowered("cuda", case, "triton")


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
@pytest.mark.parametrize("platform", KERNEL)
def test_mapped_kernels_stay_kernels(platform, axes):
    arrays = [
        x if axis is None else jnp.stack([x] * 7) for x, axis in zip(SMALL, axes, strict=True)
    ]
    function = gradients_of(jax.vmap(capsjax.dynamic_routing, axes))
    with lowering_for(platform):
        program = jax.jit(function).trace(*arrays)
        text = program.lower(lowering_platforms=(platform,)).as_text()
    assert KERNEL[platform] in text


@pytest.mark.parametrize("platform", KERNEL)
def test_couplings_come_from_the_plain_form_beside_kernels(platform):
    poses, weights = shapes_of(CASES["capsnet_mnist"])
    with lowering_for(platform):
        program = jax.jit(capsjax.routing_couplings).trace(poses, weights)
        text = program.lower(lowering_platforms=(platform,)).as_text()
    assert {"tpu": "tpu_custom_call", "cuda": "routing_sums"}[platform] in text
    assert LOOP in text


@pytest.mark.parametrize("settings", [{}, {"weights": SMALL[1][0]}])
def test_only_what_tpu_kernels_take_has_a_branch_for_them(settings):
    function = gradients_of(capsjax.dynamic_routing)
    weights = settings.get("weights", SMALL[1])
    text = str(jax.make_jaxpr(function)(SMALL[0], weights))
    assert ("chain_and_input_gradients" in text) == (not settings)
