"""Count the instructions that a GPU kernel issues, from its PTX and its machine code.

The issue floor is a lower bound of a kernel's time. A processor has 4 schedulers, each of which
issues at most one instruction of one warp a cycle, so the busiest processor needs at least

    instructions a warp x warps a block x ceil(blocks / processors) / 4   cycles.

Waiting for memory, for barriers and for results of earlier instructions is not in it. Code that a
forward branch can skip is counted as executed.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence

from experiments.compilers import matching, ptx, sass
from experiments.compilers.data_sheets import Multiprocessor
from experiments.compilers.loops import Loop

SCHEDULERS = 4
_LANES = 32
# Shared memory that the system takes of each block, and the units of its allocation in bytes and of
# registers a warp: NVIDIA, "CUDA occupancy calculator".
_RESERVED, _SHARED_UNIT, _REGISTER_UNIT, _REGISTERS = 1024, 128, 256, 2**16
# Opcodes that access the device's memory, and those that access spilled registers.
_GLOBAL = {"LDG", "STG", "RED", "REDG", "ATOM", "ATOMG", "LDGSTS"}
_LOCAL = {"LDL", "STL"}


@dataclasses.dataclass(frozen=True)
class LoopCount:
    """Instructions of a loop, those of inner loops excepted."""

    depth: int  # enclosing loops
    trips: int  # iterations in one execution of the kernel, those of enclosing loops included
    instructions: int  # an iteration
    conditional: int  # of `instructions`, those that a forward branch may skip
    barriers: int  # an iteration
    local: int  # accesses of spilled registers an iteration
    opcodes: dict[str, int]  # the most frequent ones


@dataclasses.dataclass(frozen=True)
class Issued:
    """What one warp of a kernel issues."""

    instructions: int
    conditional: int  # of `instructions`, those that a forward branch may skip
    barriers: int
    requested: int  # bytes that the loads and stores of its threads access in device memory
    products: dict[str, int]  # matrix products by opcode
    loops: tuple[LoopCount, ...]


def count(intermediate: ptx.Kernel, code: sass.Kernel, grid: Sequence[int]) -> Issued:
    """Count what one warp of a kernel issues.

    Args:
      intermediate: The kernel in PTX.
      code: The same kernel in machine code.
      grid: Numbers of blocks that it is launched with.

    Raises:
      ValueError: The trip count of a loop is unknown, or the loops of PTX and machine code do not
        match.
    """
    trips = matching.iterations(intermediate, code, grid)
    counted = list(zip(code.code.loops, trips, strict=True))
    total: collections.Counter[str] = collections.Counter()
    loops = []
    regions = [(code.code.straight, 1), *((loop.own, times) for loop, times in counted)]
    for positions, times in regions:
        for opcode, number in collections.Counter(code.opcodes[p] for p in positions).items():
            total[opcode] += times * number
    for loop, times in counted:
        own = collections.Counter(code.opcodes[p].split(".")[0] for p in loop.own)
        loops.append(
            LoopCount(
                depth=_depth(code.code.loops, loop),
                trips=times,
                instructions=len(loop.own),
                conditional=len(loop.conditional),
                barriers=own["BAR"],
                local=sum(own[opcode] for opcode in _LOCAL),
                opcodes=dict(own.most_common(12)),
            )
        )
    return Issued(
        instructions=total.total(),
        conditional=len(code.code.conditional)
        + sum(loop.conditional * loop.trips for loop in loops),
        barriers=sum(n for opcode, n in total.items() if opcode.startswith("BAR.")),
        requested=sum(
            _LANES * _width(opcode) * times
            for opcode, times in total.items()
            if opcode.split(".")[0] in _GLOBAL
        ),
        products={opcode: n for opcode, n in total.items() if "MMA" in opcode.split(".")[0]},
        loops=tuple(loops),
    )


def resident_blocks(
    registers: int, shared_memory: int, threads: int, processor: Multiprocessor
) -> int:
    """Return the number of blocks that fit into a processor at once.

    Args:
      registers: Of a thread.
      shared_memory: Of a block, in bytes.
      threads: Of a block.
      processor: The processor.
    """
    warps = -(-threads // _LANES)
    by_warp = -(-registers * _LANES // _REGISTER_UNIT) * _REGISTER_UNIT
    # Each scheduler has a quarter of the registers.
    held = SCHEDULERS * (_REGISTERS // SCHEDULERS // by_warp)
    block = -(-(shared_memory + _RESERVED) // _SHARED_UNIT) * _SHARED_UNIT
    return min(
        processor.blocks,
        processor.warps // warps,
        held // warps,
        processor.shared_memory // block,
    )


def cycles(issued: Issued, threads: int, grid: Sequence[int], processors: int) -> int:
    """Return the issue floor of a kernel in cycles of the busiest processor."""
    warps = -(-threads // _LANES) * -(-math.prod(grid) // processors)
    return -(-issued.instructions * warps // SCHEDULERS)


def _depth(loops: Sequence[Loop], loop: Loop) -> int:
    return 0 if loop.parent is None else 1 + _depth(loops, loops[loop.parent])


def _width(opcode: str) -> int:
    """Return the bytes that a thread accesses by a load or store."""
    found = re.search(r"\.(?:[US]?(8|16)|(64|128|256)|F16x2|BF16_V2)\b", opcode)
    bits = int(next((x for x in found.groups() if x), 32)) if found else 32
    return bits // 8
