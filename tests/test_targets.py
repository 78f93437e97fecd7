"""Targets: what is missing is said in one line, and each process gets its compiler's settings."""

import importlib.metadata
import pathlib

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from experiments.compilers import targets
from experiments.errors import InputError


@pytest.mark.parametrize("name", targets.TARGETS)
def test_a_missing_compiler_is_named_with_its_remedy(name, monkeypatch):
    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    package = targets.TARGETS[name].packages[0]
    expected = f"^target {name} needs {package}, .* pip install 'capsjax\\[aot\\]'$"
    with pytest.raises(InputError, match=expected):
        targets.check_installed(name)


def test_an_unknown_target_is_named():
    with pytest.raises(InputError, match=r"^--target must name any of h100, .*, got 'h200'$"):
        targets.check_installed("h200")


def test_dumps_go_where_they_are_wanted():
    folder = pathlib.Path("/dumps")
    gpu, tpu = (targets.environment(name, folder) for name in ("a100", "tpu_v5e"))
    assert "--xla_dump_to=/dumps" in gpu["XLA_FLAGS"].split()
    assert "--xla_jf_dump_to=/dumps" in tpu["LIBTPU_INIT_ARGS"].split()
    assert gpu["JAX_PLATFORMS"] == tpu["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize("name", targets.TARGETS)
def test_a_program_is_told_which_device_it_is_for(name):
    """Kernels choose their tiles by it; JAX knows one of this machine only."""
    seen = []

    def function(x):
        seen.append(jax.sharding.get_abstract_mesh().abstract_device.device_kind)
        return x

    here = SingleDeviceSharding(jax.devices()[0])
    targets._compile(name, function, [(jax.ShapeDtypeStruct((2,), "float32"), here)])
    assert seen == [targets.TARGETS[name].device]


@pytest.mark.parametrize("target", targets.TARGETS.values(), ids=targets.TARGETS)
def test_memory_and_bandwidth_are_those_of_one_device(target):
    assert target.source.startswith("https://")
    assert 1e11 < target.bandwidth < 1e13
    assert target.memory > 1e10
