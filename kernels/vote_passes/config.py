"""Tile sizes of the implementations that store no votes."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp

from capsjax.kernels.vote_passes.cases import Case


@dataclasses.dataclass(frozen=True)
class XlaConfig:
    """Tile size of the plain JAX passes."""

    children: int
    examples: Any  # an int, or a symbolic batch size, which is not tiled


# Numbers in a tile of votes: 1.3 MB in float32, which fit into a core's caches. Twice and half of
# that are slower at 1152 x 8 -> 10 x 16 (docs/results/cpu.md, "Routing on a CPU").
TILE_VOTES = 16 * 10 * 16 * 128
# Examples are the innermost axis: 128 float32 fill 8 vector registers of 16 lanes. Padding to full
# registers of 8 lanes is faster, except for the smallest batches.
MAX_EXAMPLES = 128
VECTOR = 8


def xla_config_for(case: Case, *, devices: int = 1) -> XlaConfig:
    """Return the tile size for a case, whose sizes need not be multiples of it.

    The batch stays in one tile if its size is symbolic, or if XLA's partitioner may shard it over
    several devices: it does so without communication only if no loop runs over examples.
    """
    batch: Any = case.batch
    is_tiled = isinstance(batch, int) and devices == 1
    examples = -(-batch // devices) if isinstance(batch, int) else MAX_EXAMPLES
    if is_tiled and examples >= VECTOR // 2:
        examples = min(-(-examples // VECTOR) * VECTOR, MAX_EXAMPLES)
    fitting = max(1, TILE_VOTES // (case.parents * case.depth * examples))
    # A power of two, because sums over children repeatedly add one half to the other.
    fitting = 2 ** (fitting.bit_length() - 1)
    return XlaConfig(children=min(case.capsules, fitting), examples=examples if is_tiled else batch)


class TpuTile(NamedTuple):
    """Tile size and vector memory of a Pallas-Mosaic kernel."""

    examples: int  # rows of its logits, a multiple of 8
    buffers: int  # 2: weights of the next tile are copied during the work on this one
    keeps_products: bool  # of states and weights, from the logits to the gradients
    unrolled: bool  # whether steps of loops are written side by side, to hide latencies
    memory: int  # bytes, the kernel's limit of vector memory


@dataclasses.dataclass(frozen=True)
class MosaicTpuConfig:
    """Tiles of the Pallas-Mosaic kernels for TPUs; None where no tile fits."""

    sums: TpuTile | None  # the passes that return sums over capsules
    gradients: TpuTile | None  # the input gradients of all iterations
    fused: TpuTile | None  # sums and input gradients of one iteration
    cores: int  # that a device has; each takes half of the input capsules


# Lanes of a vector register.
TPU_LANES = 128
# Candidate rows of a tile: those of a matrix unit, or fewer to fit into vector memory.
TPU_EXAMPLES = (128, 64, 32, 16, 8)
# MiB of vector memory of a core by JAX's `device_kind`; any other kind counts as LEAST_TPU_MEMORY.
TPU_MEMORY = {
    **dict.fromkeys(("TPU v5 lite", "TPU v5e", "TPU v6 lite", "TPU v6e"), 128),
    **dict.fromkeys(("TPU v5", "TPU v5p", "TPU7x"), 64),
}
LEAST_TPU_MEMORY = 16
# Kinds whose two cores are one device, which splits the parallel axes of a kernel's grid.
TWO_CORES = ("TPU v4", "TPU v5", "TPU v5p")
# Fraction of vector memory for a kernel's arrays; XLA uses the rest.
TPU_MEMORY_FRACTION = 0.75
# MiB of the generations whose kernels fuse sums and gradients: the choice is one of the case, so
# that a program is the same for all of them.
FUSED_TPU_MEMORY = 64
# Bytes of vector memory that the compiler adds to a kernel's arrays, at most.
TPU_SPILLS = 8 * 2**20


def mosaic_tpu_config_for(
    case: Case, device_kind: str | None = None, *, prior_of_examples: bool = False
) -> MosaicTpuConfig:
    """Return the tiles for a case, whose prior may be one for each example."""
    mebibytes = TPU_MEMORY.get(device_kind or "", LEAST_TPU_MEMORY)
    sums, gradients, fused = (
        _tpu_tile(case, kind, mebibytes, prior_of_examples)
        for kind in ("sums", "gradients", "fused")
    )
    return MosaicTpuConfig(sums, gradients, fused, cores=2 if device_kind in TWO_CORES else 1)


def mosaic_tpu_fuses(case: Case) -> bool:
    """Return whether TPUs compute `chain` and the input gradients of an iteration at once."""
    return _tpu_tile(case, "fused", FUSED_TPU_MEMORY, prior_of_examples=False) is not None


def _tpu_tile(case: Case, kind: str, mebibytes: int, prior_of_examples: bool) -> TpuTile | None:
    """Return the tile of a kernel: most examples first, then kept products, then two buffers."""
    if kind == "fused" and case.dtype != "float32":
        return None  # it adds to float32 gradients, which would need more memory than the inputs
    memory = int(TPU_MEMORY_FRACTION * 2**20 * mebibytes)
    keeps = (False,) if kind == "sums" else (True, False)
    for examples, kept, buffers in itertools.product(TPU_EXAMPLES, keeps, (2, 1)):
        if examples > TPU_EXAMPLES[-1] and examples >= 2 * case.batch:
            continue  # more than half of the tile would be padding
        tile = TpuTile(examples, buffers, keeps_products=kept, unrolled=True, memory=0)
        needed = _tpu_memory(case, kind, tile)
        if prior_of_examples:  # and its gradient, and in the fused kernel the earlier gradient
            needed += 3 * 2 * case.parents * _round_up(examples, 8) * TPU_LANES * 4
        if needed <= memory:
            return tile._replace(memory=needed + TPU_SPILLS)
    return None


def _tpu_memory(case: Case, kind: str, tile: TpuTile) -> int:
    """Return the bytes of a kernel's blocks and scratch.

    The TPU pads the last two axes of an array to multiples of 8 sublanes (16 in half precision) and
    128 lanes. Every pass is taken to have gates and a prior for all examples.
    """
    size = jnp.dtype(case.dtype).itemsize
    rows, sublanes, lanes = _round_up(tile.examples, 8), 32 // size, TPU_LANES * 4
    weights = case.length * case.parents * _round_up(case.depth, 8) * lanes
    poses, couplings = case.length * rows * lanes, case.parents * rows * lanes
    shared = case.parents * 8 * lanes + rows * lanes  # prior and gates
    state = case.parents * _round_up(case.depth, 8) * 4 * _round_up(tile.examples, TPU_LANES)
    # The first iteration has no state, only a cotangent.
    states = max(2, 2 * case.num_iterations - 1) if kind == "gradients" else 2
    blocks = tile.buffers * case.length * case.parents * _round_up(case.depth, sublanes) * lanes
    blocks = blocks * size // 4 + 2 * rows * _round_up(case.length, sublanes) * lanes * size // 4
    blocks += 2 * states * state + 2 * shared
    # Parts of the states: in the longest form, six terms of a product or three parts.
    lefts = case.parents * _round_up(rows, 16) * lanes * -(-6 * case.depth // TPU_LANES)
    scratch = poses + lefts + 2 * couplings
    if kind != "gradients":
        tiles = -(-case.batch // tile.examples) if kind == "fused" else 1
        blocks += 2 * tiles * state
    if kind != "sums":
        copies = 2 if kind == "fused" else 1  # earlier gradients, and their sums
        blocks += copies * (tile.buffers * weights * size // 4 + 2 * poses + 2 * shared)
        scratch += poses + weights if size < 4 else 0
        scratch += 2 * case.length * couplings if tile.keeps_products else 0
    return blocks + scratch


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class TpuGroups(NamedTuple):
    """A block of a kernel for gaussian logits."""

    groups: int  # of 8 children
    together: int  # parents whose steps are written side by side, at most
    memory: int  # bytes, the kernel's limit of vector memory


@dataclasses.dataclass(frozen=True)
class MosaicTpuGaussianConfig:
    """Blocks of the Pallas-Mosaic kernels for gaussian logits, of 128 examples."""

    sums: TpuGroups  # the passes that return sums over children
    gradients: TpuGroups  # the input gradients of all iterations
    cores: int  # that a device has; each takes half of the children


# Sublanes of a vector register of float32.
TPU_SUBLANES = 8
# Most groups in a block. A parent's sums are loaded and stored once a block, which 16 groups hide;
# the gradients have no sums, and 4 groups hide the copies of a block.
TPU_GROUPS = {"sums": 16, "gradients": 4}
# Numbers of votes whose steps are written side by side, at most: those of 10 parents hide the
# latency of the permutations that copy weights; the gradients of one vote fill the registers.
TPU_NUMBERS = {"sums": 160, "gradients": 32}


def mosaic_tpu_gaussian_config_for(
    case: Case, device_kind: str | None = None, *, prior_of_examples: bool = False
) -> MosaicTpuGaussianConfig | None:
    """Return the blocks for a case, or None if none fit into vector memory.

    Args:
      case: Sizes and dtype.
      device_kind: As JAX names it; None if unknown.
      prior_of_examples: Whether each example has a prior of its own.
    """
    mebibytes = TPU_MEMORY.get(device_kind or "", LEAST_TPU_MEMORY)
    cores = 2 if device_kind in TWO_CORES else 1
    sums, gradients = (
        _tpu_groups(case, kind, mebibytes, cores, prior_of_examples)
        for kind in ("sums", "gradients")
    )
    if sums is None or gradients is None:
        return None
    return MosaicTpuGaussianConfig(sums, gradients, cores)


def _tpu_groups(
    case: Case, kind: str, mebibytes: int, cores: int, prior_of_examples: bool
) -> TpuGroups | None:
    """Return the block of a kernel: least padding of the children first, then most groups."""
    memory = int(TPU_MEMORY_FRACTION * 2**20 * mebibytes)
    count = -(-case.capsules // TPU_SUBLANES)
    found = []
    for groups in range(1, TPU_GROUPS[kind] + 1):
        needed = _tpu_groups_memory(case, kind, groups, prior_of_examples)
        if needed <= memory:
            blocks = -(-count // groups)
            found.append((_round_up(blocks, min(cores, blocks)) * groups, -groups, needed))
    if not found:
        return None
    _, groups, needed = min(found)
    together = max(1, TPU_NUMBERS[kind] // (case.length * case.depth // case.rows))
    return TpuGroups(-groups, together, needed + TPU_SPILLS)


def _tpu_groups_memory(case: Case, kind: str, groups: int, prior_of_examples: bool) -> int:
    """Return the bytes of a kernel's blocks and scratch, with every option of a pass."""
    register = TPU_SUBLANES * TPU_LANES * 4
    parents, depth = case.parents, case.depth
    parent_tiles = -(-parents // TPU_LANES)
    numbers = parents * _round_up(depth, TPU_SUBLANES) // TPU_SUBLANES
    number = -(-parents // TPU_SUBLANES)
    weights = case.length * depth // case.rows
    # Poses, weights, gates, coordinates and the prior; two buffers of each block.
    children = case.rows * case.length + (weights + 1) * parent_tiles + 2
    children += parents if prior_of_examples else 0
    if kind == "sums":
        blocks = groups * (children + 2) + 5 * numbers + 2 * number
        scratch = groups * (parents * (depth + 2) + 2) + parents * (2 * depth + 1)
        results = 2 * numbers + number
        return register * (2 * (blocks + results) + scratch)
    terms = case.num_iterations * (5 * numbers + 2 * number + 2 * groups)
    return register * (2 * (2 * groups * children + terms) + depth)


@dataclasses.dataclass(frozen=True)
class TritonConfig:
    """Tile sizes of the Pallas-Triton kernels. A group is `triton.tiles.Tiling.n` children."""

    # The kernel of sums over children.
    sums_examples: int  # of a tile: 64, the rows of a matrix instruction of 4 warps, or fewer
    sums_ranges: int  # programs along the children; each has partial sums in memory
    sums_warps: int  # of 32 threads, for each program
    sums_stages: int  # of the compiler's software pipelines
    # The kernel of the gradients of poses and weights.
    gradients_examples: int
    gradients_splits: int  # programs along the examples; each has partial sums in memory
    gradients_warps: int
    gradients_stages: int
    # Whether bfloat16 parts of float32 weights are written to memory, once a call; else each
    # kernel makes them, in place where the matrix unit reads weights from shared memory (sm_90).
    weights_in_parts: bool


# Columns n·P of a group, of which each of 4 threads has a quarter.
TRITON_COLUMNS = 64
TRITON_LANES = 4  # threads that share the 8 columns of a matrix instruction's result
# Sizes of tiles of examples, the largest first; a warp has 16 of them.
TRITON_EXAMPLES = (64, 32, 16)
TRITON_ROWS = 16
# Multiprocessors, if the device is unknown: those of an H100.
TRITON_PROCESSORS = 132
# Warps that hide most of each other's waiting, 2 for each scheduler of a multiprocessor.
TRITON_ENOUGH_WARPS = 8
# Programs of 4 warps whose registers fit into a multiprocessor.
TRITON_BLOCKS = 2
# Programs for each multiprocessor, at most, if the work can be divided further.
TRITON_WAVES = 16
# Most parents whose logits, and gradients of couplings, stay in registers in a program of one step,
# and how much longer a step takes that computes them twice.
TRITON_UNROLLED = 10
TRITON_TWICE = 1.35
# How much longer the gradients of a tile take in a program of several, which lacks registers.
TRITON_CROWDED = 1.05
# Bytes of partial sums of a pass, at most.
TRITON_PARTIAL_SUMS = 64 * 2**20


def triton_children(length: int) -> int:
    """Return the number n of children in a group, for poses of a length."""
    return max(TRITON_LANES, TRITON_COLUMNS // max(2, power_of_two(length)))


def triton_config_for(
    case: Case, *, processors: int | None = None, capability: tuple[int, int] | None = None
) -> TritonConfig:
    """Return the configuration for a case: that whose busiest multiprocessor has least to do.

    Args:
      case: Sizes and dtype.
      processors: Multiprocessors of the device; None if unknown.
      capability: Compute capability of the device; None if unknown.
    """
    groups = -(-case.capsules // triton_children(case.length))
    largest = min(TRITON_EXAMPLES[0], max(TRITON_ROWS, power_of_two(case.batch)))
    sums, gradients = [], []
    for examples in TRITON_EXAMPLES:
        if examples <= largest:
            tiles = -(-case.batch // examples)
            size = 4 * case.parents * power_of_two(max(16, case.depth)) * tiles * examples
            twice = TRITON_TWICE if case.parents <= TRITON_UNROLLED else 1.0
            sums.append(_triton_split(groups, tiles, examples, size, processors, twice))
            size = 4 * case.capsules * case.length * case.parents * case.depth
            gradients.append(
                _triton_split(tiles, groups, examples, size, processors, TRITON_CROWDED)
            )
    # The first of equals, which has the largest tiles.
    _, sums_examples, ranges = min(sums, key=lambda x: x[0])
    _, gradients_examples, splits = min(gradients, key=lambda x: x[0])
    return TritonConfig(
        sums_examples=sums_examples,
        sums_ranges=ranges,
        sums_warps=sums_examples // TRITON_ROWS,
        sums_stages=1,
        gradients_examples=gradients_examples,
        gradients_splits=splits,
        gradients_warps=gradients_examples // TRITON_ROWS,
        gradients_stages=1,
        weights_in_parts=capability != (9, 0) and size <= TRITON_PARTIAL_SUMS,
    )


def _triton_split(
    count: int,
    others: int,
    examples: int,
    size: int,
    processors: int | None,
    slower_in_steps: float = 1.0,
) -> tuple[float, int, int]:
    """Return the best split of `count` units of work, which `others` programs have each.

    Args:
      count: Units in sequence: groups of children, or tiles of examples.
      others: Programs along the other axis of the grid.
      examples: Of a tile.
      size: Bytes of the partial sums of one part.
      processors: Multiprocessors of the device.
      slower_in_steps: Factor on the time of a unit in a program of several.

    Returns:
      The time of the busiest multiprocessor, `examples`, and the number of parts.
    """
    processors = processors or TRITON_PROCESSORS
    most = max(1, min(count, TRITON_WAVES * processors // others, TRITON_PARTIAL_SUMS // size))
    warps = examples // TRITON_ROWS
    found = []
    for parts in range(1, most + 1):
        steps = -(-count // parts)
        programs = -(-count // steps) * others
        busiest = -(-programs // processors)
        resident = min(busiest * warps, TRITON_BLOCKS * 4)
        time = busiest * steps * warps / min(1, resident / TRITON_ENOUGH_WARPS)
        time *= 1 + TRITON_ROWS / examples  # each tile of examples loads all weights
        time *= slower_in_steps if steps > 1 else 1
        found.append((time, examples, -(-count // steps)))
    return min(found)


@dataclasses.dataclass(frozen=True)
class TritonVotesConfig:
    """Tile sizes of the Pallas-Triton kernels with votes in registers.

    Each warp has 32 examples.
    """

    # The walks over the children, with the sums of one parent for each warp.
    sums_warps: int  # parents of a program, which share the poses in the cache
    sums_ranges: int  # programs along the children; each has partial sums in memory
    # The walks over the parents for the statistics of each child's softmax.
    statistics_warps: int  # they share states in the cache
    statistics_children: int  # of a warp, for which a state is loaded once
    # The walk over the parents for the gradients of the inputs, with one child for each warp.
    gradients_warps: int
    gradients_splits: int  # programs along the examples; each has partial sums in memory


# Examples of a tile: the lanes of a warp.
TRITON_VOTES_EXAMPLES = 32
# Candidate warps of a program; 8 with 200 registers each fill a multiprocessor at once. The walks
# over the children have half as many registers, and more warps load fewer poses.
TRITON_VOTES_WARPS = (4, 2, 1)
TRITON_VOTES_SUMS_WARPS = (8, *TRITON_VOTES_WARPS)
# How much longer a step of one warp takes that shares no loads with others; and of a walk over
# children whose poses exceed the L2 cache, so that each program loads them from memory.
TRITON_VOTES_UNSHARED = 0.25
TRITON_VOTES_UNCACHED = 2.0
# Bytes of the L2 cache; 40 MiB of an A100, 50 of an H100.
TRITON_VOTES_CACHE = 40 * 2**20
# Bytes of sums that are stored and loaded again while a warp makes a step of a walk over children:
# 165 instructions of one of four schedulers, at 1700 bytes a cycle.
TRITON_VOTES_STEP = 35_000
# Most children of a warp whose poses fit into registers beside the states of parents. The gradients
# of a second child's pose and vote do not.
TRITON_VOTES_CHILDREN = 3
# Loading a parent's states takes as long as this part of one child's arithmetic.
TRITON_VOTES_LOADS = 0.2


def triton_votes_config_for(case: Case, *, processors: int | None = None) -> TritonVotesConfig:
    """Return the configuration for a case: that whose busiest multiprocessor has least to do.

    Args:
      case: Sizes and dtype.
      processors: Multiprocessors of the device; None if unknown.
    """
    processors = processors or TRITON_PROCESSORS
    tiles = -(-case.batch // TRITON_VOTES_EXAMPLES)
    columns = case.depth // case.rows
    columns, length = _round_up(columns, 4), _round_up(case.length, 4)

    def busiest(programs: int, warps: int, unshared: float = TRITON_VOTES_UNSHARED) -> float:
        """Return the time that the busiest multiprocessor takes for a step of all its programs."""
        blocks = -(-programs // processors)
        resident = min(blocks * warps, TRITON_ENOUGH_WARPS)
        sharing = 1 + unshared / warps
        return blocks * warps * sharing * TRITON_ENOUGH_WARPS / resident

    def parts(count: int, size: int, others: int) -> Iterator[tuple[int, int]]:
        """Yield numbers of programs for units in sequence, and the units of each."""
        most = max(1, TRITON_PARTIAL_SUMS // size)
        waves = max(1, TRITON_WAVES * processors // others)
        for number in range(1, min(count, most, waves) + 1):
            steps = -(-count // number)
            yield -(-count // steps), steps

    sums = []
    poses = case.batch * case.capsules * case.rows * length * jnp.dtype(case.dtype).itemsize
    uncached = poses > TRITON_VOTES_CACHE
    unshared = TRITON_VOTES_UNCACHED if uncached else TRITON_VOTES_UNSHARED
    # Two sums of D numbers for each parent; with linear logits there is one.
    size = 4 * case.parents * 2 * case.rows * columns * tiles * TRITON_VOTES_EXAMPLES
    for warps in TRITON_VOTES_SUMS_WARPS:
        others = -(-case.parents // warps) * tiles
        for ranges, steps in parts(case.capsules, size, others):
            # A program stores its sums, and another kernel loads them, if there are several ranges.
            merging = size / TRITON_VOTES_STEP if ranges > 1 else 0
            time = steps * busiest(others * ranges, warps, unshared) + ranges * merging
            sums.append((time, warps, ranges))
    statistics, gradients = [], []
    size = 4 * case.capsules * case.parents * length * columns
    for warps in TRITON_VOTES_WARPS:
        for children in range(1, TRITON_VOTES_CHILDREN + 1):
            programs = -(-case.capsules // (warps * children)) * tiles
            time = (children + TRITON_VOTES_LOADS) * busiest(programs, warps)
            statistics.append((time, warps, children))
        groups = -(-case.capsules // warps)
        for splits, steps in parts(tiles, size, groups):
            gradients.append((steps * busiest(groups * splits, warps), warps, splits))
    # The first of equals, which has the fewest parts.
    _, sums_warps, ranges = min(sums, key=lambda x: x[0])
    _, statistics_warps, statistics_children = min(statistics, key=lambda x: x[0])
    _, gradients_warps, splits = min(gradients, key=lambda x: x[0])
    return TritonVotesConfig(
        sums_warps=sums_warps,
        sums_ranges=ranges,
        statistics_warps=statistics_warps,
        statistics_children=statistics_children,
        gradients_warps=gradients_warps,
        gradients_splits=splits,
    )


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()


# For each implementation with a config, the function that selects it for a case.
CONFIGS = {
    "xla": xla_config_for,
    "mosaic_tpu": mosaic_tpu_config_for,
    "triton": triton_config_for,
}
