"""Tests of `compilers.targets`: missing compilers, environments, devices, data sheets."""

import importlib.metadata
import pathlib

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from experiments.compilers import targets
from experiments.compilers.data_sheets import TARGETS
from experiments.errors import InputError


@pytest.mark.parametrize("name", TARGETS)
def test_missing_compiler_is_an_input_error_with_the_command_to_install_it(name, monkeypatch):
    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    package = TARGETS[name].packages[0]
    expected = f"^target {name} needs {package}, .* pip install 'capsjax\\[aot\\]'$"
    with pytest.raises(InputError, match=expected):
        targets.check_installed(name)


def test_unknown_target_is_an_input_error():
    with pytest.raises(InputError, match=r"^--target must name any of h100, .*, got 'gtx'$"):
        targets.check_installed("gtx")


def test_environment_sets_the_folder_of_dumps():
    folder = pathlib.Path("/dumps")
    gpu, tpu = (targets.environment(name, folder) for name in ("a100", "tpu_v5e"))
    assert "--xla_dump_to=/dumps" in gpu["XLA_FLAGS"].split()
    assert "--xla_jf_dump_to=/dumps" in tpu["LIBTPU_INIT_ARGS"].split()
    assert gpu["JAX_PLATFORMS"] == tpu["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize("name", TARGETS)
def test_function_is_lowered_for_the_device_of_the_target(name):
    """Kernels choose their tiles by the device kind."""
    seen = []

    def function(x):
        seen.append(jax.sharding.get_abstract_mesh().abstract_device.device_kind)
        return x

    here = SingleDeviceSharding(jax.devices()[0])
    targets._compile(name, function, [(jax.ShapeDtypeStruct((2,), "float32"), here)])
    assert seen == [TARGETS[name].device]


# Memory in GB, bandwidth in GB/s, and float32 TFLOP/s of a GPU without tensor cores, or bfloat16
# TFLOP/s and matrix units of a TPU, from the data sheets. Of v7x, half a chip.
DATA_SHEETS = {
    "h100": (80, 3350, 67),
    "h200": (141, 4800, 67),
    "a100": (80, 2039, 19.5),
    "a10": (24, 600, 31.2),
    "l40s": (48, 864, 91.6),
    "b200": (180, 8000, 75),
    "rtx_5090": (32, 1792, 104.8),
    "tpu_v4": (32, 1228, (275, 8)),
    "tpu_v5e": (16, 819, (197, 4)),
    "tpu_v5p": (95, 2765, (459, 8)),
    "tpu_v6e": (32, 1640, None),
    "tpu_v7x": (96, 3690, None),
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets_have_the_figures_of_their_data_sheets(name):
    target = TARGETS[name]
    memory, bandwidth, peak = DATA_SHEETS[name]
    assert (target.memory / 1e9, target.bandwidth / 1e9) == (memory, bandwidth)
    if gpu := target.gpu:
        processor = gpu.multiprocessor
        # A multiply-add a cycle.
        found = 2 * gpu.multiprocessors * processor.lanes * target.clock * 1e9
        assert found == pytest.approx(peak * 1e12, rel=5e-3)
        config = targets._gpu_target_config(target, gpu)
        for entry in (
            f"core_count: {gpu.multiprocessors} ",
            f"fpus_per_core: {processor.lanes} ",
            f"clock_rate_ghz: {target.clock} ",
            f"threads_per_core_limit: {32 * processor.warps} ",
            f"device_memory_size: {memory}000000000 ",
            f"memory_bandwidth: {bandwidth}000000000 ",
        ):
            assert entry in config
    elif peak:
        teraflops, units = peak
        found = 2 * units * 128 * 128 * target.clock * 1e9
        assert found == pytest.approx(teraflops * 1e12, rel=5e-3)
    else:
        assert target.clock is None
