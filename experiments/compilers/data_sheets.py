"""Data sheets of accelerators that programs are compiled for."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

_GPU_PACKAGES = (
    *("jax-cuda13-plugin", "jax-cuda13-pjrt"),
    *("nvidia-cuda-nvcc", "nvidia-cuda-nvdisasm"),
)
_TPU_PACKAGES = ("libtpu",)


class Multiprocessor(NamedTuple):
    """A streaming multiprocessor of a compute capability."""

    lanes: int  # float32 units
    shared_memory: int  # bytes, of which a block gets 1 KiB less
    warps: int  # most that it holds
    blocks: int  # most that it holds


# NVIDIA, "CUDA C++ programming guide", technical specifications per compute capability,
# https://docs.nvidia.com/cuda/cuda-c-programming-guide/
_MULTIPROCESSORS = {
    (8, 0): Multiprocessor(64, 164 * 1024, 64, 32),
    (8, 6): Multiprocessor(128, 100 * 1024, 48, 16),
    (8, 9): Multiprocessor(128, 100 * 1024, 48, 24),
    (9, 0): Multiprocessor(128, 228 * 1024, 64, 32),
    (10, 0): Multiprocessor(128, 228 * 1024, 64, 32),
    (12, 0): Multiprocessor(128, 100 * 1024, 48, 24),
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Properties of an NVIDIA GPU."""

    capability: tuple[int, int]
    multiprocessors: int
    l2_cache: int  # bytes
    products: Mapping[str, float]  # peak of dense matrix products, operations/s by operand type

    @property
    def multiprocessor(self) -> Multiprocessor:
        """One of its multiprocessors."""
        return _MULTIPROCESSORS[self.capability]


@dataclasses.dataclass(frozen=True)
class Target:
    """A device of JAX, as described by its data sheet."""

    device: str  # as JAX names it
    topology: str  # as JAX names it, without the number of chips
    source: str  # data sheet
    memory: int  # bytes
    bandwidth: float  # of the memory, bytes/s
    clock: float | None  # GHz, of multiprocessors or TensorCores; None if it is not published
    gpu: Gpu | None = None  # None for a TPU
    devices: int = 1  # that a chip of a TPU has
    # Bundles after a branch of a TPU that are executed before its target, as in compiled code.
    branch_delay: int = 4
    megacore: bool = False  # the TensorCores of a chip are one device, which must be asked for

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages that contain the compiler."""
        return _GPU_PACKAGES if self.gpu else _TPU_PACKAGES


def _products(tf32: float, half: float) -> dict[str, float]:
    return {"TF32": tf32 * 1e12, "BF16": half * 1e12, "F16": half * 1e12}


_HOPPER = Gpu((9, 0), 132, 50 * 2**20, _products(494.7, 989.4))

# Clocks of TPUs: peak operations/s over 2 x matrix units x 128², both from the data sheet. That of
# v4 is also in Jouppi et al., "TPU v4", 2023, https://arxiv.org/abs/2304.01433. The data sheets of
# v6e and v7x do not allow it: with 256² multiply-adds a matrix unit, the clocks would be 3.5 and
# 4.4 GHz.
TARGETS = {
    "h100": Target(
        device="NVIDIA H100 80GB HBM3",
        topology="h100",
        source="https://www.nvidia.com/en-us/data-center/h100/ (SXM)",
        memory=80 * 10**9,
        bandwidth=3.35e12,
        clock=1.98,
        gpu=_HOPPER,
    ),
    "h200": Target(
        device="NVIDIA H200",
        topology="h200",
        source="https://www.nvidia.com/en-us/data-center/h200/ (SXM)",
        memory=141 * 10**9,
        bandwidth=4.8e12,
        clock=1.98,
        gpu=_HOPPER,
    ),
    "a100": Target(
        device="NVIDIA A100-SXM4-80GB",
        topology="a100",
        source="https://www.nvidia.com/en-us/data-center/a100/ (80GB SXM)",
        memory=80 * 10**9,
        bandwidth=2.039e12,
        clock=1.41,
        gpu=Gpu((8, 0), 108, 40 * 2**20, _products(156, 312)),
    ),
    "a10": Target(
        device="NVIDIA A10",
        topology="a10",
        source="https://www.nvidia.com/en-us/data-center/products/a10-gpu/",
        memory=24 * 10**9,
        bandwidth=600e9,
        clock=1.695,
        gpu=Gpu((8, 6), 72, 6 * 2**20, _products(62.5, 125)),
    ),
    "l40s": Target(
        device="NVIDIA L40S",
        topology="l40s",
        source="https://www.nvidia.com/en-us/data-center/l40s/",
        memory=48 * 10**9,
        bandwidth=864e9,
        clock=2.52,
        gpu=Gpu((8, 9), 142, 96 * 2**20, _products(183, 362.05)),
    ),
    "b200": Target(
        device="NVIDIA B200",
        topology="b200",
        source="https://www.nvidia.com/en-us/data-center/hgx/ (HGX B200, an eighth)",
        memory=180 * 10**9,
        bandwidth=8e12,
        clock=1.98,
        gpu=Gpu((10, 0), 148, 126 * 2**20, _products(1125, 2250)),
    ),
    "rtx_5090": Target(
        device="NVIDIA GeForce RTX 5090",
        topology="rtx_5090",
        source="NVIDIA RTX Blackwell GPU architecture (white paper), "
        "https://www.nvidia.com/en-us/geforce/graphics-cards/50-series/rtx-5090/",
        memory=32 * 10**9,
        bandwidth=1792e9,
        clock=2.407,
        gpu=Gpu((12, 0), 170, 96 * 2**20, _products(104.8, 209.5)),
    ),
    "tpu_v4": Target(
        device="TPU v4",
        topology="v4",
        source="https://cloud.google.com/tpu/docs/v4",
        memory=32 * 10**9,
        bandwidth=1228e9,
        clock=1.05,
        branch_delay=1,
        megacore=True,
    ),
    "tpu_v5e": Target(
        device="TPU v5 lite",
        topology="v5e",
        source="https://cloud.google.com/tpu/docs/v5e",
        memory=16 * 10**9,
        bandwidth=819e9,
        clock=1.5,
    ),
    "tpu_v5p": Target(
        device="TPU v5",
        topology="v5p",
        source="https://cloud.google.com/tpu/docs/v5p",
        memory=95 * 10**9,
        bandwidth=2765e9,
        clock=1.75,
    ),
    "tpu_v6e": Target(
        device="TPU v6 lite",
        topology="v6e",
        source="https://cloud.google.com/tpu/docs/v6e",
        memory=32 * 10**9,
        bandwidth=1640e9,
        clock=None,
    ),
    "tpu_v7x": Target(
        device="TPU7x",
        topology="tpu7x",
        source="https://cloud.google.com/tpu/docs/tpu7x (a device is half of a chip)",
        memory=96 * 10**9,
        bandwidth=3690e9,
        clock=None,
        devices=2,
        branch_delay=6,
    ),
}
