"""Tile sizes of the votes-free passes."""

import dataclasses
import itertools
from typing import NamedTuple


class Tile(NamedTuple):
    """How many input capsules and how many examples share one tile of votes."""

    capsules: int
    examples: int


# 1.3 MB of float32 votes: with their agreements they stay in a core's caches. Twice and half
# of it are slower at 1152 x 8 -> 10 x 16 (BUILD_NOTES.md, "Routing on a CPU").
TILE_VOTES = 16 * 10 * 16 * 128
# Examples are the innermost axis: 128 float32 fill 8 vector registers of 16 lanes.
MAX_EXAMPLES = 128


def tile_for(batch: int, capsules: int, parents: int, depth: int) -> Tile:
    """The tile for `[batch, capsules, parents, depth]` votes; it need not divide them."""
    examples = min(batch, MAX_EXAMPLES)
    fitting = TILE_VOTES // (parents * depth * examples)
    return Tile(capsules=max(1, min(capsules, fitting)), examples=examples)


@dataclasses.dataclass(frozen=True)
class MosaicTpuConfig:
    """How the kernels for TPUs cut a problem."""

    capsules: int  # of a tile: along the lanes, 128 unless there are fewer
    examples: int  # of a tile: rows of its logits, a multiple of 8
    panel: int  # tiles of examples whose states stay in vector memory while capsules pass by
    weight_buffers: int  # 2: the next tile's weights arrive while this tile's are used
    memory: int  # bytes of vector memory that a kernel may take


# The lanes of a vector register.
TPU_LANES = 128
# Rows of a tile: those of a matrix unit, or fewer where vector memory is short.
TPU_EXAMPLES = (128, 64, 32, 16, 8)
# Of the 128 MiB of vector memory in a v5e or v6e, some of which XLA keeps.
TPU_MEMORY = 96 * 2**20
# What the compiler adds to a kernel's own arrays.
TPU_SPILLS = 8 * 2**20


def mosaic_tpu_config_for(
    batch: int, capsules: int, length: int, parents: int, depth: int, num_iterations: int, size: int
) -> MosaicTpuConfig | None:
    """The configuration for poses `[batch, capsules, length]` of `size` bytes a number.

    None if tiles of even 8 examples do not fit into vector memory.
    """
    for examples, buffers in itertools.product(TPU_EXAMPLES, (2, 1)):
        if examples > TPU_EXAMPLES[-1] and examples >= 2 * batch:
            continue  # more than half of it would be padding
        need = tpu_memory(examples, buffers, length, parents, depth, num_iterations, size)
        if need.tiles + need.states > TPU_MEMORY:
            continue
        tiles = -(-batch // examples)
        panels = [n for n in range(1, tiles + 1) if tiles % n == 0]
        fitting = [n for n in panels if need.tiles + n * need.states <= TPU_MEMORY]
        return MosaicTpuConfig(
            capsules=min(capsules, TPU_LANES),
            examples=examples,
            panel=fitting[-1],
            weight_buffers=buffers,
            memory=need.tiles + fitting[-1] * need.states + TPU_SPILLS,
        )
    return None


class TpuMemory(NamedTuple):
    """Bytes of vector memory in the pass that takes most, the gradients of poses and weights."""

    tiles: int
    states: int  # of one tile of examples


def tpu_memory(
    rows: int,
    weight_buffers: int,
    length: int,
    parents: int,
    depth: int,
    num_iterations: int,
    size: int,
) -> TpuMemory:
    """What arrays take in tiles of 8 sublanes (16 in half precision) and 128 lanes."""
    sublanes = 32 // size
    lanes = TPU_LANES * 4
    weights = length * parents * lanes
    weights_tile = weights * _up(depth, sublanes) * size // 4
    weights_sums = weights * _up(depth, 8) if size < 4 else 0
    poses_tile = rows * _up(length, sublanes) * lanes * size // 4
    spread_poses = rows * length * lanes
    factors = 2 * num_iterations * parents * rows * lanes
    buffered = 2 * (weight_buffers * weights_tile + 2 * poses_tile)
    return TpuMemory(
        tiles=buffered + weights_sums + 2 * spread_poses + factors,
        states=2 * 2 * num_iterations * parents * _up(depth, 8) * _up(rows, TPU_LANES) * 4,
    )


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
