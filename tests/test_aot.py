"""Ahead-of-time compilation of every implementation and case with XLA's GPU and TPU compilers.

Each program is compiled once for all tests of a process.
"""

import json
import os
import subprocess
import sys
from functools import cache

import pytest
import sharded_programs

from capsjax.kernels.vote_passes.cases import CASES
from capsjax.kernels.vote_passes.passes import PLATFORMS
from experiments import compile_report
from experiments.compilers import targets
from experiments.compilers.compiling import CompileRequest, compile_costs
from experiments.errors import InputError

pytestmark = pytest.mark.aot

costs = cache(compile_costs)
REGISTERS = 255  # the most that a thread can have


def implementations(*, kernels_only=False, only=tuple(targets.TARGETS)):
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


def row(target, implementation, case, gradients=True):
    """Return the costs of a program, which must compile."""
    case = CASES[case] if isinstance(case, str) else case
    found = costs(CompileRequest(target, implementation, case, gradients))
    assert "reason" not in found, found["reason"]
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("target", "implementation"), implementations(kernels_only=True))
def test_kernels_fit_into_registers_and_shared_memory(target, implementation, case):
    kernels = [k for k in row(target, implementation, case)["kernels"] if k["pallas"]]
    assert kernels
    gpu = targets.TARGETS[target].gpu
    for kernel in kernels:
        if gpu:
            assert kernel["spills"] == 0, kernel
            assert kernel["registers"] <= REGISTERS, kernel
            assert kernel["shared_memory"] <= gpu.shared_memory - 1024, kernel
        else:
            assert kernel["bundles"] > 0, kernel


@pytest.mark.parametrize(("target", "implementation"), implementations())
def test_votes_are_not_stored(target, implementation):
    case = CASES["capsnet_mnist"]
    votes = 4 * case.batch * case.capsules * case.parents * case.depth
    assert row(target, implementation, "capsnet_mnist")["temporary_mb"] <= 12 < votes / 1e6


@pytest.mark.parametrize(("target", "implementation"), implementations(kernels_only=True))
def test_longest_case_needs_little_memory(target, implementation):
    assert row(target, implementation, "long")["temporary_mb"] < 400


@pytest.mark.parametrize(("target", "implementation"), implementations(kernels_only=True))
def test_temporaries_do_not_grow_with_the_number_of_capsules(target, implementation):
    cases = compile_report.scaling_cases()
    sizes = 2**14, 2**20
    few, many = (row(target, implementation, cases[size])["temporary_mb"] for size in sizes)
    # By less than one float32 a capsule.
    assert many - few < 4 * (sizes[1] - sizes[0]) / 1e6


@pytest.mark.parametrize(("gradients", "megabytes"), [(False, 60), (True, 160)])
@pytest.mark.parametrize(("target", "implementation"), implementations(only=("tpu_v5e",)))
def test_traffic_on_a_tpu_is_small(target, implementation, gradients, megabytes):
    found = row(target, implementation, "capsnet_mnist", gradients)
    assert found["moved_mb"] <= megabytes


# Lower bounds on the traffic of stored votes relative to that of kernels. A TPU v5e keeps most of
# the stored votes in its vector memory, so that its bounds are smaller.
LESS_TRAFFIC = {"h100": {False: 13, True: 13}, "tpu_v5e": {False: 1.6, True: 6.4}}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    ("target", "implementation"), implementations(kernels_only=True, only=tuple(LESS_TRAFFIC))
)
def test_kernels_have_less_traffic_than_stored_votes(target, implementation, gradients):
    own, stored = (
        row(target, name, "capsnet_mnist", gradients)["moved_mb"]
        for name in (implementation, compile_report.STORED_VOTES)
    )
    assert own * LESS_TRAFFIC[target][gradients] <= stored


@pytest.mark.parametrize(
    ("target", "implementation"), implementations(kernels_only=True, only=("tpu_v5e",))
)
def test_stored_votes_exhaust_memory_where_kernels_do_not(target, implementation):
    case = CASES["long"]
    stored = costs(CompileRequest(target, compile_report.STORED_VOTES, case, True))
    assert "RESOURCE_EXHAUSTED" in stored["reason"]
    assert "reason" not in costs(CompileRequest(target, implementation, case, True))


@pytest.mark.parametrize(
    ("target", "implementation"), implementations(kernels_only=True, only=("h100", "tpu_v5e"))
)
def test_eight_devices_run_kernels_and_send_partial_sums_only(target, implementation, tmp_path):
    environment = targets.environment(target, tmp_path)
    found = sharded_programs.run("for_absent_devices", target, environment=environment)
    weights, part, state = "1152,8,10,16", "288,8,10,16", "512,10,16"
    # XLA cannot partition a kernel over an Auto axis, so "xla" runs there: it sums the gradients of
    # weights over the devices, perhaps tile by tile.
    on_auto_axis = found.pop("batch over an Auto axis")
    assert on_auto_axis["kernels"] == 0
    assert len(on_auto_axis["sent"]) == 1
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
    assert len(done.stdout.splitlines()) == 3
