"""Accelerators to compile for ahead of time, without having one: data sheets and compilers.

The compilers are XLA's own, installed by `pip install 'capsjax[aot]'`. They read environment
variables once, when they are loaded: use `environment` for a child process.
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

# Topology of a TPU slice, in JAX's notation, by its number of chips.
_TPU_SLICES = {4: "2x2", 8: "2x4", 16: "4x4", 64: "8x8"}
_GPU_PACKAGES = (
    "jax-cuda13-plugin",
    "jax-cuda13-pjrt",
    "nvidia-cuda-nvcc",
    "nvidia-cuda-nvdisasm",
)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Properties of an NVIDIA GPU that XLA's compiler needs."""

    capability: tuple[int, int]
    multiprocessors: int
    lanes: int  # float32 units a multiprocessor
    clock: float  # GHz
    shared_memory: int  # bytes a multiprocessor, of which a block gets 1 KiB less
    l2_cache: int  # bytes
    warps: int  # most that a multiprocessor holds
    blocks: int  # most that a multiprocessor holds
    products: Mapping[str, float]  # peak of dense matrix products, operations/s by operand type


@dataclasses.dataclass(frozen=True)
class Target:
    """A device, as described by its data sheet."""

    device: str  # as JAX names it
    topology: str  # as JAX names it, without the number of chips
    source: str  # data sheet with memory and bandwidth
    memory: int  # bytes
    bandwidth: float  # of the memory, bytes/s
    packages: tuple[str, ...]  # that contain the compiler
    gpu: Gpu | None  # None for a TPU


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
            warps=64,
            blocks=32,
            products={"TF32": 494.7e12, "BF16": 989.4e12, "F16": 989.4e12},
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
            warps=64,
            blocks=32,
            products={"TF32": 156e12, "BF16": 312e12, "F16": 312e12},
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
        topology = f"{target.topology}:{_TPU_SLICES[max(count, 4)]}"
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:count]
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


def _compile(name: str, function: Callable[..., Any], placed: Sequence[tuple[Any, Any]]) -> Any:
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in placed]
    target = TARGETS[name]
    # Kernels query the device while they are lowered: capsjax for the size of its vector memory,
    # Pallas-Triton since jax 0.11. Without a mesh, JAX would answer with a device of this machine.
    cores, platform = (target.gpu.multiprocessors, "gpu") if target.gpu else (1, "tpu")
    device = AbstractDevice(device_kind=target.device, num_cores=cores, platform=platform)
    here = jax.sharding.get_abstract_mesh()
    mesh = AbstractMesh(here.axis_sizes, here.axis_names, here.axis_types, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(function).lower(*structs)
    return lowered.compile()


def _gpu_target_config(target: Target, gpu: Gpu) -> str:
    """Return XLA's GpuTargetConfigProto in text format."""
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
