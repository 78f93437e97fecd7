"""Ahead-of-time compilation of every implementation and case with XLA's GPU and TPU compilers.

Each program is compiled once for all tests of a process.
"""

import json
import math
import os
import subprocess
import sys
from functools import cache

import gaussian_programs
import pytest
import sharded_programs

from capsjax.kernels.vote_passes.cases import CASES, Case
from capsjax.kernels.vote_passes.passes import PLATFORMS, device_named
from experiments import compile_report
from experiments.compilers import arithmetic, floors, targets
from experiments.compilers.compiling import CompileRequest, compile_costs, platform_of, routing
from experiments.compilers.data_sheets import TARGETS
from experiments.errors import InputError

pytestmark = pytest.mark.aot

costs = cache(compile_costs)
REGISTERS = 255  # the most that a thread can have
# Share of instructions in loops that may access spilled registers: where the gradients' programs
# take several tiles of examples in turn, and on generations that are not reported by default.
SPILLED = 0.06
REPORTED = ("h100", "a100", "tpu_v5e")  # by default
OTHERS = tuple(name for name in TARGETS if name not in REPORTED)
# No tile divides any of these sizes.
RAGGED = Case(batch=37, capsules=101, length=5, parents=7, depth=12)


def implementations(*, kernels_only=False, only=REPORTED):
    """List targets with their implementations, but for the one that stores the votes."""
    found = []
    for target in only:
        try:
            targets.check_installed(target)
            marks = []
        except InputError as missing:
            marks = [pytest.mark.skip(reason=str(missing))]
        for implementation in compile_report.implementations(target):
            wanted = implementation in PLATFORMS or not kernels_only
            if wanted and implementation != compile_report.STORED_VOTES:
                found.append(pytest.param(target, implementation, marks=marks))
    return found


def row(target, implementation, case, gradients=True, **options):
    """Return the costs of a program, which must compile."""
    case = CASES[case] if isinstance(case, str) else case
    found = costs(CompileRequest(target, implementation, case, gradients, **options))
    assert "reason" not in found, found["reason"]
    return found


def check_resources(target, kernels, spilled=0):
    """Check that kernels fit into registers and shared memory, or have code.

    `spilled` is the share of instructions in loops that may access spilled registers of a GPU.
    """
    assert kernels
    gpu = TARGETS[target].gpu
    for kernel in kernels:
        if gpu:
            in_loops = sum(loop["instructions"] for loop in kernel["loops"])
            assert kernel["loop_local"] <= spilled * in_loops, kernel
            assert kernel["registers"] <= REGISTERS, kernel
            assert kernel["shared_memory"] <= gpu.multiprocessor.shared_memory - 1024, kernel
            assert kernel["resident_blocks"] >= 1, kernel
        else:
            assert kernel["executed"] >= kernel["bundles"] > 0, kernel


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("target", "implementation"), implementations(kernels_only=True))
def test_kernels_fit_into_registers_and_shared_memory(target, implementation, case):
    found = row(target, implementation, case)["kernels"]
    spilled = SPILLED if case in ("many_parents", "conv_capsules") else 0
    check_resources(target, [kernel for kernel in found if kernel["pallas"]], spilled)


@pytest.mark.parametrize(
    ("target", "implementation"), implementations(kernels_only=True, only=OTHERS)
)
def test_kernels_compile_for_other_generations(target, implementation):
    found = row(target, implementation, "capsnet_mnist")["kernels"]
    check_resources(target, [kernel for kernel in found if kernel["pallas"]], SPILLED)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prior": True, "bias": True, "mask": True},
        {"gradient": "last"},
        {"precision": "highest"},
    ],
    ids=["plain", "prior-bias-mask", "last", "highest"],
)
@pytest.mark.parametrize(
    ("target", "implementation"), implementations(kernels_only=True, only=("h100", "tpu_v5e"))
)
def test_options_compile_at_sizes_that_no_tile_divides(target, implementation, options):
    found = row(target, implementation, RAGGED, **options)["kernels"]
    assert any(kernel["pallas"] for kernel in found)


# Each option alone needs code that others do not have, and so do vectors.
GAUSSIAN = {
    "classes": (gaussian_programs.CLASSES, ("gates",)),
    "windows": (gaussian_programs.WINDOWS, ("gates", "coordinates")),
    "vectors, every option": (gaussian_programs.VECTORS, gaussian_programs.EVERY),
}


@pytest.mark.parametrize("name", GAUSSIAN)
@pytest.mark.parametrize(
    ("target", "implementation"),
    implementations(kernels_only=True, only=("tpu_v5e", "tpu_v4")),
)
def test_kernels_for_gaussian_logits_compile(target, implementation, name, tmp_path):
    """The second target is the one with the least vector memory."""
    assert implementation == "mosaic_tpu"
    found = gaussian_programs.compiled_kernels(target, *GAUSSIAN[name], tmp_path)
    assert found == sorted(gaussian_programs.KERNELS)


def compiled_products(kernel):
    """Return the operations of a GPU kernel's matrix products in its machine code."""
    warps = math.prod(kernel["grid"]) * kernel["threads"] // 32
    per_warp = sum(n * floors.product_operations(x) for x, n in kernel["products"].items())
    return kernel["calls"] * warps * per_warp


@pytest.mark.parametrize(
    ("target", "implementation"), implementations(kernels_only=True, only=("h100",))
)
def test_machine_code_executes_the_products_of_the_kernels(target, implementation):
    """The products in the source, times its loops, tell whether iterations are counted rightly."""
    found = row(target, implementation, "capsnet_mnist")["kernels"]
    request = CompileRequest(target, implementation, CASES["capsnet_mnist"], True)
    known = targets.described(TARGETS[target])
    device = {
        "platform": platform_of(TARGETS[target]),
        "device": device_named(known.device_kind, known.num_cores),
    }
    function, shapes = routing(request)
    source = sum(
        calls * arithmetic.equation_operations(equation).matrix
        for equation, calls in arithmetic.equations(function, *shapes, **device)
        if equation.primitive.name == "pallas_call"
    )
    compiled = sum(compiled_products(kernel) for kernel in found if kernel["pallas"])
    assert compiled == pytest.approx(source, rel=0.25)


# Copies 17 rows of 256 numbers in each of 200 blocks of 2 warps, with a barrier after each row.
COPY = """
import json, pathlib, sys
import jax, jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from experiments.compilers import floors, targets
from experiments.compilers.data_sheets import TARGETS

def kernel(x_ref, y_ref):
    def copy(k, _):
        y_ref[k] = x_ref[k]
        triton.debug_barrier()
    lax.fori_loop(0, 17, copy, None)

shape = jax.ShapeDtypeStruct((200, 17, 256), "float32")
blocks = pl.BlockSpec((None, 17, 256), lambda i: (i, 0, 0))
program = pl.pallas_call(
    kernel, grid=(200,), in_specs=[blocks], out_specs=blocks, out_shape=shape, name="copy",
    compiler_params=triton.CompilerParams(num_warps=2),
)
compiled = targets.compile_for("h100", program, shape)
from experiments.compilers import arithmetic
own = arithmetic.kernels(program, shape)
print(json.dumps(floors.program(TARGETS["h100"], pathlib.Path(sys.argv[1]), compiled.as_text(), own)))
"""  # noqa: E501


@pytest.mark.parametrize("target", [p.values[0] for p in implementations(only=("h100",))][:1])
def test_floors_of_a_kernel_written_by_hand(target, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", COPY, str(tmp_path)],
        env=targets.environment(target, tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (kernel,) = found["kernels"]
    size = 200 * 17 * 256 * 4
    assert (found["launches"], found["moved_mb"]) == (1, 2 * size / 1e6)
    assert kernel["requested_mb"] == 2 * size / 1e6
    assert kernel["barriers"] == 17
    # 200 blocks on 132 processors: the busiest one executes 2 blocks of 2 warps.
    assert kernel["waves"] == 2
    assert kernel["issue_us"] == pytest.approx(kernel["instructions"] * 2 * 2 / 4 / 1980, rel=1e-3)
    assert found["memory_us"] == pytest.approx(2 * size / 3.35e12 * 1e6)
    assert found["floor_us"] == max(found["memory_us"], kernel["issue_us"])


# Expectation maximisation, and attention, at the class layer of matrix capsules: 1152 children of
# 128 examples.
MATRICES = """
import json, pathlib, sys
import jax, jax.numpy as jnp
from capsjax.kernels.vote_passes.passes import Implementation, Inputs, Spec, State, device_named
from capsjax.kernels.vote_passes.unroll import Routing, unroll
from experiments.compilers import arithmetic, floors, targets
from experiments.compilers.data_sheets import TARGETS

target, folder, logits = sys.argv[1:]

def attention_step(t, carry, moments, params):
    return carry, State(b=moments.first / 4), moments.first

def mixture_step(t, carry, moments, params):
    variance = moments.second / moments.mass[..., None] + 0.1
    state = State(k=-jnp.log(variance).sum(-1) / 2, z=moments.first, q=1 / variance)
    return carry, state, (moments.first, moments.mass)

if logits == "linear":
    spec, step = Spec(10), attention_step
else:
    spec, step = Spec(10, logits="gaussian", moments="central"), mixture_step
routing = Routing(spec, step, 3, implementation=Implementation("triton"))

def value_and_gradients(*inputs):
    outputs, vjp = jax.vjp(lambda *inputs: unroll(routing, Inputs(*inputs)), *inputs)
    return outputs, vjp(outputs)

sizes = (128, 1152, 4, 4), (1152, 4, 10, 4), (128, 1152)
shapes = [jax.ShapeDtypeStruct(size, "float32") for size in sizes]
compiled = targets.compile_for(target, value_and_gradients, *shapes)
known = targets.described(TARGETS[target])
device = device_named(known.device_kind, known.num_cores)
own = arithmetic.kernels(value_and_gradients, *shapes, platform="cuda", device=device)
found = floors.program(TARGETS[target], pathlib.Path(folder), compiled.as_text(), own)
temporary = compiled.memory_analysis().temp_size_in_bytes / 1e6
print(json.dumps({**found, "temporary_mb": temporary}))
"""


# The most microseconds of issue, those of sums of parts of the children apart.
@pytest.mark.parametrize(("logits", "most"), [("gaussian", 96), ("linear", 80)])
@pytest.mark.parametrize("target", [p.values[0] for p in implementations(only=("h100",))][:1])
def test_kernels_with_votes_in_registers_need_those_alone(target, logits, most, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MATRICES, target, str(tmp_path), logits],
        env=targets.environment(target, tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    own = [kernel for kernel in found["kernels"] if kernel["pallas"]]
    # Sums of parts of the children are merged over the warps of a program.
    merging = [kernel for kernel in own if "_merge" in kernel["name"]]
    assert sum(kernel["floor_us"] for kernel in merging) <= 10
    kernels = [kernel for kernel in own if kernel not in merging]
    # Statistics, moments of equal couplings and others, chain, gradients.
    assert len(kernels) >= 5
    for kernel in kernels:
        assert kernel["registers"] <= REGISTERS, kernel
        # Linear input gradients spill one address outside of their loop.
        assert (kernel["loop_local"], kernel["shared_memory"]) == (0, 0), kernel
        assert kernel["barriers"] == 0, kernel
        assert kernel["spills"] <= 8, kernel
    assert sum(kernel["calls"] * kernel["issue_us"] for kernel in kernels) <= most
    # Logits and cotangents of the couplings of two iterations take 24 MB, the votes would take 94.
    assert found["temporary_mb"] <= 45


@pytest.mark.parametrize(("target", "implementation"), implementations())
def test_votes_are_not_stored(target, implementation):
    case = CASES["capsnet_mnist"]
    votes = 4 * case.batch * case.capsules * case.parents * case.depth
    # On a GPU, the partial sums of 144 ranges of children, and two numbers of each child.
    most = 16 if TARGETS[target].gpu else 12
    assert row(target, implementation, "capsnet_mnist")["temporary_mb"] <= most < votes / 1e6


@pytest.mark.parametrize(("target", "implementation"), implementations(kernels_only=True))
def test_longest_case_needs_little_memory(target, implementation):
    assert row(target, implementation, "long")["temporary_mb"] < 400


@pytest.mark.parametrize(("target", "implementation"), implementations(kernels_only=True))
def test_temporaries_grow_by_what_is_kept_of_each_capsule(target, implementation):
    cases = compile_report.scaling_cases()
    sizes = 2**14, 2**20
    few, many = (row(target, implementation, cases[size])["temporary_mb"] for size in sizes)
    # On a GPU by two numbers for each example and iteration with a softmax, on a TPU by the poses'
    # gradients, which are copied into their layout at the end; and by less than one float32.
    case = cases[sizes[0]]
    of_gpu, of_tpu = 2 * (case.num_iterations - 1), 1.05 * case.length
    kept = case.batch * (of_gpu if TARGETS[target].gpu else of_tpu)
    assert many - few < 4 * (kept + 1) * (sizes[1] - sizes[0]) / 1e6


@pytest.mark.parametrize(("gradients", "megabytes"), [(False, 60), (True, 160)])
@pytest.mark.parametrize(("target", "implementation"), implementations(only=("tpu_v5e",)))
def test_traffic_on_a_tpu_is_small(target, implementation, gradients, megabytes):
    found = row(target, implementation, "capsnet_mnist", gradients)
    assert found["moved_mb"] <= megabytes


# Floors of the kernels alone at `capsnet_mnist`, in microseconds, and how many times as large the
# floor of the whole program with stored votes is, forward and with gradients.
KERNELS_ALONE = {"h100": (12, 48), "a100": (17, 72), "tpu_v5e": (50, 176)}
GAIN = {"h100": (6, 5), "a100": (5.5, 4.5), "tpu_v5e": (4, 3)}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    ("target", "implementation"), implementations(kernels_only=True, only=tuple(GAIN))
)
def test_floors_of_kernels_and_of_stored_votes(target, implementation, gradients):
    own, stored = (
        row(target, name, "capsnet_mnist", gradients)
        for name in (implementation, compile_report.STORED_VOTES)
    )
    kernels = [kernel for kernel in own["kernels"] if kernel["pallas"]]
    alone = sum(kernel["calls"] * kernel["issue_us"] for kernel in kernels)
    assert alone <= KERNELS_ALONE[target][gradients]
    assert own["floor_us"] * GAIN[target][gradients] <= stored["floor_us"]


@pytest.mark.parametrize(
    ("target", "implementation"), implementations(kernels_only=True, only=("tpu_v5e",))
)
def test_stored_votes_exhaust_memory_where_kernels_do_not(target, implementation):
    case = CASES["long"]
    stored = costs(CompileRequest(target, compile_report.STORED_VOTES, case, True))
    assert "RESOURCE_EXHAUSTED" in stored["reason"]
    assert "reason" not in costs(CompileRequest(target, implementation, case, True))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("target", "implementation"), implementations(kernels_only=True))
def test_floors_are_sums_over_launches(target, implementation, gradients):
    for name in (implementation, compile_report.STORED_VOTES):
        found = row(target, name, "capsnet_mnist", gradients)
        kernels = found["kernels"]
        issued = sum(kernel["calls"] * kernel["issue_us"] for kernel in kernels)
        assert found["issue_us"] == pytest.approx(issued)
        assert max(issued, found["memory_us"]) <= found["floor_us"] * (1 + 1e-9)
        assert found["launches"] >= sum(kernel["calls"] for kernel in kernels)
        assert any(kernel["pallas"] for kernel in kernels) == (name == implementation)


@pytest.mark.parametrize(
    ("target", "implementation"), implementations(kernels_only=True, only=("h100", "tpu_v5e"))
)
def test_eight_devices_run_kernels_and_send_partial_sums_only(target, implementation, tmp_path):
    environment = targets.environment(target, tmp_path)
    found = sharded_programs.run("for_absent_devices", target, environment=environment)
    weights, part, state = "1152,8,10,16", "288,8,10,16", "512,10,16"
    # XLA cannot partition a kernel over an Auto axis, so "xla" runs there: it sums the gradients of
    # weights over the devices, perhaps tile by tile; in the order of a TPU once an iteration.
    on_auto_axis = found.pop("batch over an Auto axis")
    assert on_auto_axis["kernels"] == 0
    assert len(on_auto_axis["sent"]) == (1 if TARGETS[target].gpu else 3)
    for name, sums in {"batch": [weights], "capsules": [part, *[state] * 5]}.items():
        assert found[name]["kernels"] >= 5, implementation
        assert sorted(shape for shape, _ in found[name]["sent"]) == sorted(sums)
    for case in (on_auto_axis, *found.values()):
        assert all(kind.startswith("all-reduce") for _, kind in case["sent"])


@pytest.mark.parametrize(("target", "implementation"), implementations(only=("h100",)))
def test_compile_report_needs_no_environment_variables(target, implementation, tmp_path):
    output = tmp_path / "rows.jsonl"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.compile_report", f"--target={target}"),
            *(f"--implementation={implementation}", "--case=capsnet_mnist", f"--output={output}"),
        ],
        env={name: value for name, value in os.environ.items() if not name.startswith("JAX_")},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [r["gradients"] for r in written] == [False, True]
    assert all(r["moved_mb"] > 0 for r in written)
    lines = [line for line in done.stdout.splitlines() if line.startswith("h100")]
    assert len(lines) == 2
