"""Tests of `compilers.targets`: missing compilers, environments, devices, data sheets."""

import importlib.metadata
import pathlib

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from experiments.compilers import targets
from experiments.errors import InputError


@pytest.mark.parametrize("name", targets.TARGETS)
def test_missing_compiler_is_an_input_error_with_the_command_to_install_it(name, monkeypatch):
    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    package = targets.TARGETS[name].packages[0]
    expected = f"^target {name} needs {package}, .* pip install 'capsjax\\[aot\\]'$"
    with pytest.raises(InputError, match=expected):
        targets.check_installed(name)


def test_unknown_target_is_an_input_error():
    with pytest.raises(InputError, match=r"^--target must name any of h100, .*, got 'h200'$"):
        targets.check_installed("h200")


def test_environment_sets_the_folder_of_dumps():
    folder = pathlib.Path("/dumps")
    gpu, tpu = (targets.environment(name, folder) for name in ("a100", "tpu_v5e"))
    assert "--xla_dump_to=/dumps" in gpu["XLA_FLAGS"].split()
    assert "--xla_jf_dump_to=/dumps" in tpu["LIBTPU_INIT_ARGS"].split()
    assert gpu["JAX_PLATFORMS"] == tpu["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize("name", targets.TARGETS)
def test_function_is_lowered_for_the_device_of_the_target(name):
    """Kernels choose their tiles by the device kind."""
    seen = []

    def function(x):
        seen.append(jax.sharding.get_abstract_mesh().abstract_device.device_kind)
        return x

    here = SingleDeviceSharding(jax.devices()[0])
    targets._compile(name, function, [(jax.ShapeDtypeStruct((2,), "float32"), here)])
    assert seen == [targets.TARGETS[name].device]


# Memory in GB, bandwidth in GB/s, and float32 TFLOP/s without tensor cores, from the data sheets.
DATA_SHEETS = {"h100": (80, 3350, 67), "a100": (80, 2039, 19.5), "tpu_v5e": (16, 819, None)}


@pytest.mark.parametrize("name", targets.TARGETS)
def test_targets_have_the_figures_of_their_data_sheets(name):
    target = targets.TARGETS[name]
    memory, bandwidth, teraflops = DATA_SHEETS[name]
    assert (target.memory / 1e9, target.bandwidth / 1e9) == (memory, bandwidth)
    if gpu := target.gpu:
        peak = 2 * gpu.multiprocessors * gpu.lanes * gpu.clock * 1e9  # a multiply-add a cycle
        assert peak == pytest.approx(teraflops * 1e12, rel=5e-3)
        config = targets._gpu_target_config(target, gpu)
        for entry in (
            f"core_count: {gpu.multiprocessors} ",
            f"fpus_per_core: {gpu.lanes} ",
            f"clock_rate_ghz: {gpu.clock} ",
            f"device_memory_size: {memory}000000000 ",
            f"memory_bandwidth: {bandwidth}000000000 ",
        ):
            assert entry in config
