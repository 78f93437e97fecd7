"""Compile ahead of time for accelerators that this machine does not have.

The compilers are XLA's own, installed by `pip install 'capsjax[aot]'`. They read environment
variables once, when they are loaded: use `environment` for a child process.
"""

import importlib.metadata
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

from experiments.compilers.data_sheets import TARGETS, Gpu, Target
from experiments.errors import InputError

# Topologies of TPU slices, in JAX's notation, by the number of chips: of generations whose chips
# form a plane, and of those that form a cube.
_TPU_PLANES = {4: "2x2", 8: "2x4", 16: "4x4", 64: "8x8"}
_TPU_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 64: "4x4x4"}
_PLANAR = ("v5e", "v6e")


def check_installed(name: str) -> None:
    """Check that the compiler of a target is installed.

    Raises:
      InputError: The target is unknown, or a package is missing.
    """
    if name not in TARGETS:
        raise InputError(f"--target must name any of {', '.join(TARGETS)}, got {name!r}")
    for package in TARGETS[name].packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise InputError(
                f"target {name} needs {package}, which is not installed: pip install 'capsjax[aot]'"
            ) from None


def environment(name: str, dumps: pathlib.Path) -> dict[str, str]:
    """Return the environment of a child process that compiles for a target and writes dumps."""
    common = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    if TARGETS[name].gpu:
        # Since jax 0.11, XLA dumps PTX only for the emitters that match the pattern.
        return {
            **common,
            "XLA_FLAGS": f"--xla_dump_to={dumps} --xla_dump_emitter_re=.*",
            # Else Triton spends most of its time on symbols of stack traces.
            "LLVM_DISABLE_SYMBOLIZATION": "1",
        }
    flags = {
        "xla_jf_dump_to": dumps,
        "xla_jf_dump_llo_text": "true",
        "xla_jf_dump_llo_pass_label_regex": "original|final_bundles",
    }
    return {
        **common,
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a lock file admits one process
        "LIBTPU_INIT_ARGS": " ".join(f"--{flag}={value}" for flag, value in flags.items()),
    }


def compile_for(name: str, function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct) -> Any:
    """Compile a function for one device of a target.

    Args:
      name: Of the target. The environment of this process must be `environment(name, …)`.
      function: A function of arrays.
      *shapes: Shapes of its arguments.

    Returns:
      A `jax.stages.Compiled`, which cannot be called.

    Example:
      >>> product = jax.ShapeDtypeStruct((512, 512), "float32")
      >>> compile_for("h100", jax.numpy.dot, product, product).memory_analysis()  # doctest: +SKIP
    """
    sharding = SingleDeviceSharding(_devices(name, 1)[0])
    return _compile(name, function, [(x, sharding) for x in shapes])


def compile_over(
    name: str,
    axes: Mapping[str, int],
    function: Callable[..., Any],
    *placed: tuple[jax.ShapeDtypeStruct, PartitionSpec],
) -> Any:
    """Compile a function for a mesh of a target's devices.

    Args:
      name: Of the target. The environment of this process must be `environment(name, …)`.
      axes: Sizes of the mesh axes by name; for a TPU, at most 4 devices or exactly 8, 16 or 64.
      function: A function of arrays. A `jax.shard_map` in it takes its mesh from the context.
      *placed: Shapes of its arguments with their shardings.

    Returns:
      A `jax.stages.Compiled`, which cannot be called.
    """
    devices = np.array(_devices(name, math.prod(axes.values())))
    mesh = Mesh(devices.reshape(tuple(axes.values())), tuple(axes))
    shardings = [(x, NamedSharding(mesh, spec)) for x, spec in placed]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return _compile(name, function, shardings)


def _devices(name: str, count: int) -> Sequence[Any]:
    """Return descriptions of `count` devices of a target."""
    target = TARGETS[name]
    if target.gpu is None:
        slices = _TPU_PLANES if target.topology in _PLANAR else _TPU_CUBES
        topology = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{target.topology}:{slices[max(count // target.devices, 4)]}",
            **({"chip_config_name": "megacore"} if target.megacore else {}),
        )
        return topology.devices[:count]
    # JAX registers the CUDA plug-in when it starts its backends. No public function does that
    # without a device.
    from jax._src import xla_bridge

    xla_bridge.backends()
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=target.topology,
        topology=f"1x1x{count}",
        target_config=_gpu_target_config(target, target.gpu),
    ).devices


def described(target: Target) -> AbstractDevice:
    """Return the device as JAX describes it where there is none."""
    cores, platform = (target.gpu.multiprocessors, "gpu") if target.gpu else (1, "tpu")
    return AbstractDevice(device_kind=target.device, num_cores=cores, platform=platform)


def _compile(name: str, function: Callable[..., Any], placed: Sequence[tuple[Any, Any]]) -> Any:
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in placed]
    target = TARGETS[name]
    # Kernels query the device while they are lowered: capsjax for the size of its vector memory,
    # Pallas-Triton since jax 0.11. Without a mesh, JAX would answer with a device of this machine.
    device = described(target)
    here = jax.sharding.get_abstract_mesh()
    mesh = AbstractMesh(here.axis_sizes, here.axis_names, here.axis_types, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(function).lower(*structs)
    return lowered.compile()


def _gpu_target_config(target: Target, gpu: Gpu) -> str:
    """Return XLA's GpuTargetConfigProto in text format."""
    processor = gpu.multiprocessor
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_core": processor.shared_memory,
        "shared_memory_per_block_optin": processor.shared_memory - 1024,
        "threads_per_core_limit": 32 * processor.warps,
        "core_count": gpu.multiprocessors,
        "fpus_per_core": processor.lanes,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "memory_bandwidth": int(target.bandwidth),
        "l2_cache_size": gpu.l2_cache,
        "clock_rate_ghz": target.clock,
        "device_memory_size": target.memory,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
    }
    major, minor = gpu.capability
    return (
        f"gpu_device_info {{ cuda_compute_capability {{ major: {major} minor: {minor} }} "
        f"{' '.join(f'{name}: {value}' for name, value in info.items())} }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} '
        f'device_description_str: "{target.device}"'
    )
