"""Accelerators that a program can be compiled for when none is there, with their data sheets.

The compilers are the real ones, from the packages of `pip install 'capsjax[aot]'`. What they need
in the environment they read once, when they are loaded: set `environment` for a process of its own.
"""

import dataclasses
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

from experiments.errors import InputError

# Chips of a TPU, and how JAX names a slice of so many.
_TPU_SLICES = {4: "2x2", 8: "2x4", 16: "4x4", 64: "8x8"}
_GPU_PACKAGES = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA's compiler asks of an NVIDIA device."""

    capability: tuple[int, int]
    multiprocessors: int
    lanes: int  # of float32 a multiprocessor
    clock: float  # GHz
    shared_memory: int  # bytes a multiprocessor; one block gets up to 1 KiB less
    l2_cache: int  # bytes


@dataclasses.dataclass(frozen=True)
class Target:
    """A device as its data sheet has it."""

    device: str  # as JAX names it
    topology: str  # as JAX names it, without the number of devices
    source: str  # of memory and bandwidth
    memory: int  # bytes
    bandwidth: float  # of that memory, bytes/s
    packages: tuple[str, ...]
    gpu: Gpu | None  # None: a TPU


TARGETS = {
    "h100": Target(
        device="NVIDIA H100 80GB HBM3",
        topology="h100",
        source="https://www.nvidia.com/en-us/data-center/h100/ (SXM)",
        memory=80 * 10**9,
        bandwidth=3.35e12,
        packages=_GPU_PACKAGES,
        gpu=Gpu(
            capability=(9, 0),
            multiprocessors=132,
            lanes=128,
            clock=1.98,
            shared_memory=228 * 1024,
            l2_cache=50 * 2**20,
        ),
    ),
    "a100": Target(
        device="NVIDIA A100-SXM4-80GB",
        topology="a100",
        source="https://www.nvidia.com/en-us/data-center/a100/ (80GB SXM)",
        memory=80 * 10**9,
        bandwidth=2.039e12,
        packages=_GPU_PACKAGES,
        gpu=Gpu(
            capability=(8, 0),
            multiprocessors=108,
            lanes=64,
            clock=1.41,
            shared_memory=164 * 1024,
            l2_cache=40 * 2**20,
        ),
    ),
    "tpu_v5e": Target(
        device="TPU v5 lite",
        topology="v5e",
        source="https://cloud.google.com/tpu/docs/v5e",
        memory=16 * 10**9,
        bandwidth=819e9,
        packages=("libtpu",),
        gpu=None,
    ),
}


def check_installed(name: str) -> None:
    """Checks that a target's compiler is installed.

    Raises:
      InputError: there is no such target, or a package is missing.
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
    """The environment of a process that compiles for a target and leaves dumps in a folder."""
    common = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    if TARGETS[name].gpu:
        # From jax 0.11 on, PTX is dumped for the emitters that are asked for.
        return {
            **common,
            "XLA_FLAGS": f"--xla_dump_to={dumps} --xla_dump_emitter_re=.*",
            # Else Triton looks the names of its stack up, which no one reads, for most of the time.
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
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it keeps a lock file otherwise
        "LIBTPU_INIT_ARGS": " ".join(f"--{flag}={value}" for flag, value in flags.items()),
    }


def compile_for(name: str, function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct) -> Any:
    """Compiles a function for one device of a target.

    Args:
      name: of the target; `environment(name, …)` must be that of this process.
      function: of arrays.
      *shapes: of its arguments.

    Returns:
      What `jax.jit(function).lower(…).compile()` does; it cannot be called.

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
    """Compiles a function for a mesh of a target's devices.

    Args:
      name: As in `compile_for`, like what is returned.
      axes: The mesh's axes and their sizes; of a TPU v5e together 4, 8, 16 or 64.
      function: of arrays; `jax.shard_map` in it takes its mesh from the context.
      *placed: shapes of its arguments, and how they lie on the mesh.
    """
    devices = np.array(_devices(name, math.prod(axes.values())))
    mesh = Mesh(devices.reshape(tuple(axes.values())), tuple(axes))
    shardings = [(x, NamedSharding(mesh, spec)) for x, spec in placed]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return _compile(name, function, shardings)


def _devices(name: str, count: int) -> Sequence[Any]:
    """That many devices of a target, none of which is there."""
    target = TARGETS[name]
    if target.gpu is None:
        topology = f"{target.topology}:{_TPU_SLICES[max(count, 4)]}"
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:count]
    # The plug-in is found when JAX looks for its backends, which nothing public asks for without
    # a device.
    from jax._src import xla_bridge

    xla_bridge.backends()
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=target.topology,
        topology=f"1x1x{count}",
        target_config=_gpu_target_config(target, target.gpu),
    ).devices


def _compile(name: str, function: Callable[..., Any], placed: Sequence[tuple[Any, Any]]) -> Any:
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in placed]
    target = TARGETS[name]
    # Kernels ask while they are lowered which device they are for: capsjax for its vector memory,
    # and Pallas-Triton from jax 0.11 on. JAX would name one of this machine.
    cores, platform = (target.gpu.multiprocessors, "gpu") if target.gpu else (1, "tpu")
    device = AbstractDevice(device_kind=target.device, num_cores=cores, platform=platform)
    here = jax.sharding.get_abstract_mesh()
    mesh = AbstractMesh(here.axis_sizes, here.axis_names, here.axis_types, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(function).lower(*structs)
    return lowered.compile()


def _gpu_target_config(target: Target, gpu: Gpu) -> str:
    """A GpuTargetConfigProto of XLA in text form."""
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_core": gpu.shared_memory,
        "shared_memory_per_block_optin": gpu.shared_memory - 1024,
        "threads_per_core_limit": 2048,
        "core_count": gpu.multiprocessors,
        "fpus_per_core": gpu.lanes,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "memory_bandwidth": int(target.bandwidth),
        "l2_cache_size": gpu.l2_cache,
        "clock_rate_ghz": gpu.clock,
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
