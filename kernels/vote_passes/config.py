"""Tile sizes of the votes-free passes."""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp

from capsjax.kernels.vote_passes.cases import Case


@dataclasses.dataclass(frozen=True)
class XlaConfig:
    """How many children and how many examples share one tile of votes in plain JAX."""

    children: int
    examples: Any  # an int, or a symbolic batch, which is not cut


# 1.3 MB of float32 votes: with their agreements they stay in a core's caches. Twice and half
# of it are slower at 1152 x 8 -> 10 x 16 (BUILD_NOTES.md, "Routing on a CPU").
TILE_VOTES = 16 * 10 * 16 * 128
# Examples are the innermost axis: 128 float32 fill 8 vector registers of 16 lanes. Whole registers
# of 8 lanes are worth their padding, but for the smallest batches.
MAX_EXAMPLES = 128
VECTOR = 8


def xla_config_for(case: Case, *, devices: int = 1) -> XlaConfig:
    """Returns the tile for a case, which it need not divide; the batch may be symbolic.

    Examples are not cut where XLA's partitioner may split them over several devices, which it
    does without communication only if no loop runs over them, nor where their number is symbolic.
    """
    batch: Any = case.batch
    cut = isinstance(batch, int) and devices == 1
    examples = -(-batch // devices) if isinstance(batch, int) else MAX_EXAMPLES
    if cut and examples >= VECTOR // 2:
        examples = min(-(-examples // VECTOR) * VECTOR, MAX_EXAMPLES)
    fitting = max(1, TILE_VOTES // (case.parents * case.depth * examples))
    # Sums over a power of two are made by halves.
    fitting = 2 ** (fitting.bit_length() - 1)
    return XlaConfig(children=min(case.capsules, fitting), examples=examples if cut else batch)


@dataclasses.dataclass(frozen=True)
class MosaicTpuConfig:
    """How the kernels for TPUs cut a problem."""

    examples: int  # of a tile: rows of its logits, a multiple of 8
    panel: int  # at most so many tiles' states stay in vector memory while capsules pass by
    weight_buffers: int  # 2: the next tile's weights arrive while this tile's are used
    memory: int  # bytes of vector memory that a kernel may take


# The lanes of a vector register.
TPU_LANES = 128
# Rows of a tile: those of a matrix unit, or fewer where vector memory is short.
TPU_EXAMPLES = (128, 64, 32, 16, 8)
# MiB of vector memory by generation, as JAX names them; of any other one the least there is.
TPU_MEMORY = {
    **dict.fromkeys(("TPU v5 lite", "TPU v5e", "TPU v6 lite", "TPU v6e"), 128),
    **dict.fromkeys(("TPU v5", "TPU v5p", "TPU7x"), 64),
}
LEAST_TPU_MEMORY = 16
# Of which XLA keeps some.
TPU_SHARE = 0.75
# What the compiler adds to a kernel's own arrays, at most.
TPU_SPILLS = 8 * 2**20


def mosaic_tpu_config_for(case: Case, device_kind: str | None = None) -> MosaicTpuConfig | None:
    """Returns the configuration for a case; None if tiles of even 8 examples do not fit."""
    memory = int(TPU_SHARE * 2**20 * TPU_MEMORY.get(device_kind or "", LEAST_TPU_MEMORY))
    for examples, buffers in itertools.product(TPU_EXAMPLES, (2, 1)):
        if examples > TPU_EXAMPLES[-1] and examples >= 2 * case.batch:
            continue  # more than half of it would be padding
        tiles, states = _tpu_memory(case, examples, buffers)
        panel = min(-(-case.batch // examples), (memory - tiles) // states)
        if panel > 0:
            return MosaicTpuConfig(examples, panel, buffers, tiles + panel * states + TPU_SPILLS)
    return None


def _tpu_memory(case: Case, examples: int, weight_buffers: int) -> tuple[int, int]:
    """Bytes of all tiles, and of the states of one tile of examples.

    They are those of the pass that takes most, the gradients of poses and weights. Arrays lie in
    tiles of 8 sublanes (16 in half precision) and 128 lanes.
    """
    size = jnp.dtype(case.dtype).itemsize
    sublanes, lanes = 32 // size, TPU_LANES * 4
    weights = case.length * case.parents * lanes
    weights_tile = weights * _up(case.depth, sublanes) * size // 4
    weights_sums = weights * _up(case.depth, 8) if size < 4 else 0
    poses_tile = examples * _up(case.length, sublanes) * lanes * size // 4
    spread_poses = examples * case.length * lanes
    factors = 2 * case.num_iterations * case.parents * examples * lanes
    buffered = 2 * (weight_buffers * weights_tile + 2 * poses_tile)
    tiles = buffered + weights_sums + 2 * spread_poses + factors
    state = case.parents * _up(case.depth, 8) * _up(examples, TPU_LANES) * 4
    return tiles, 2 * 2 * case.num_iterations * state


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class TritonTile(NamedTuple):
    """What a program of a Pallas-Triton kernel handles at once; powers of two but `capsules`."""

    examples: int  # at least 16, the rows of a matrix instruction
    parents: int  # with their depth at least 16 columns
    capsules: int  # that one reading of the examples' states serves, from a cache
    num_warps: int  # of 32 threads each
    programs: int  # of a launch, unless the examples alone fill more


@dataclasses.dataclass(frozen=True)
class TritonConfig:
    """How the Pallas-Triton kernels cut a problem: two tiles, as `TritonTile` says."""

    # For the passes that return sums over capsules.
    sums_examples: int
    sums_parents: int
    sums_capsules: int
    sums_warps: int
    sums_programs: int
    # For the pass that returns the gradients of poses and weights.
    gradients_examples: int
    gradients_parents: int
    gradients_capsules: int
    gradients_warps: int
    gradients_programs: int

    @property
    def sums(self) -> TritonTile:
        """The tile of the passes that return sums."""
        return TritonTile(
            self.sums_examples,
            self.sums_parents,
            self.sums_capsules,
            self.sums_warps,
            self.sums_programs,
        )

    @property
    def gradients(self) -> TritonTile:
        """The tile of the pass that returns gradients."""
        return TritonTile(
            self.gradients_examples,
            self.gradients_parents,
            self.gradients_capsules,
            self.gradients_warps,
            self.gradients_programs,
        )


# Each of an H100's 132 processors (108 in an A100) holds eight warps of so many registers.
TRITON_WARPS = 132 * 8
# Votes of a tile, in registers: 32 a thread where two to four arrays of that size are needed,
# 16 where the gradients' products need operands as well, of which a thread can have 255.
TRITON_SUMS_VOTES = 8192
TRITON_GRADIENTS_VOTES = 4096
# Poses longer than this need more operands, and a depth that is no power of two more addresses:
# then half as many votes.
TRITON_SHORT = 32
# Columns (parents x depth). Sums take all parents at once if 16 rows are left; else fewer columns,
# since more rows share what is loaded of the weights. The products of the gradients contract
# over columns, and each warp reads all of them.
TRITON_ALL_COLUMNS = 512
TRITON_SUMS_COLUMNS = 256
TRITON_GRADIENTS_COLUMNS = 64
MAX_TRITON_CAPSULES = 8


def triton_config_for(case: Case) -> TritonConfig:
    """The configuration for arrays of the sizes of `case`."""
    batch, capsules, length, parents, depth, *_ = case

    def tile(votes: int, columns: int) -> TritonTile:
        least = power_of_two(depth)
        columns = max(least, min(power_of_two(parents) * least, columns), 16)
        examples = min(64, max(16, power_of_two(batch)), max(16, votes // columns))
        num_warps = min(8, max(4, 8 * examples * columns // votes))
        programs = TRITON_WARPS // num_warps
        return TritonTile(
            examples=examples,
            parents=columns // least,
            # As many as make a reading of two states no heavier than the weights of them all.
            capsules=min(MAX_TRITON_CAPSULES, -(-capsules // programs), -(-2 * examples // length)),
            num_warps=num_warps,
            programs=programs,
        )

    simple = length <= TRITON_SHORT and depth == power_of_two(depth)
    gradients_votes = TRITON_GRADIENTS_VOTES // (1 if simple else 2)
    all_fit = power_of_two(parents) * power_of_two(depth) <= TRITON_ALL_COLUMNS
    return TritonConfig(
        *tile(TRITON_SUMS_VOTES, TRITON_ALL_COLUMNS if all_fit else TRITON_SUMS_COLUMNS),
        *tile(gradients_votes, TRITON_GRADIENTS_COLUMNS),
    )


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()


# How each implementation that has a config chooses it for a case.
CONFIGS = {
    "xla": xla_config_for,
    "mosaic_tpu": mosaic_tpu_config_for,
    "triton": triton_config_for,
}
