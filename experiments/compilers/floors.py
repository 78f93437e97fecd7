"""Lower bounds on the time of a compiled program, launch by launch.

A launch takes at least as long as the largest of its bounds: the instructions that the busiest
processor issues, its matrix products at the peak of the data sheet, and the traffic with the
device's memory. Launches do not overlap, and the time between them is not in it.
"""

import collections
import dataclasses
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from experiments.compilers import arithmetic, dumps, duplicates, hlo, issue
from experiments.compilers.data_sheets import Gpu, Target

MB = 1e6
US = 1e6
# How tensor cores read the operands of a library's product.
_LIBRARY_TYPES = {"f32": "TF32", "bf16": "BF16", "f16": "F16"}


def traffic(target: Target, call: hlo.Executed, kernels: Sequence[arithmetic.Kernel]) -> int:
    """Count the bytes that one call of an instruction moves between device memory and chip.

    That of a kernel is counted in its grid and blocks. On a TPU, a block is moved when its index
    changes from one step of the grid to the next. On a GPU, the order of the programs is unknown:
    an operand that fits into the L2 cache is moved once, and any other operand as often as the
    programs load it. What the warps of a program load together is moved once for all of them.

    Args:
      target: The device.
      call: The call in the compiled program.
      kernels: The kernels of the traced program, among them the one called.

    Raises:
      ValueError: No kernel has the operands of the call.
    """
    if call.kernel is None:
        return call.moved
    arrays = [*call.kernel.operands, *call.kernel.results]
    shapes = [array.shape for array in arrays]
    alike = [k for k in kernels if [o.shape for o in k.operands] == shapes]
    if not alike:
        raise ValueError(f"floors: no kernel has operands {shapes}")
    # A TPU's instruction has the name of its kernel. If that does not decide, the largest counts.
    named = [kernel for kernel in alike if call.name.startswith(kernel.name)]
    return max(_kernel_traffic(target, arrays, kernel) for kernel in named or alike)


def _kernel_traffic(target: Target, arrays: Sequence[hlo.Array], kernel: arithmetic.Kernel) -> int:
    moved = 0
    for array, operand in zip(arrays, kernel.operands, strict=True):
        if target.gpu:
            moved += operand.size if operand.size <= target.gpu.l2_cache else operand.requested
        elif array.in_memory:
            moved += sum(
                times * hlo.tiled_size(block, operand.itemsize)
                for block, times in operand.blocks.items()
            )
    return moved


def program(
    target: Target, folder: pathlib.Path, text: str, own: Sequence[arithmetic.Kernel]
) -> dict[str, Any]:
    """Count what the kernels of a compiled program execute, and bound its time from below.

    Args:
      target: The device.
      folder: The compiler's dumps of the program.
      text: The compiled program.
      own: The kernels of the traced program.

    Returns:
      moved_mb: Traffic with the device's memory. That of XLA's instructions is counted in the
        program text (`hlo.traffic`), that of kernels in their grid and blocks (`traffic`).
      launches: Kernels, library calls, copies and fills that one call of the program executes; on
        a TPU, operations with code of their own.
      issue_us: Sum of the issue floors of all launches. None if the clock is unknown.
      memory_us: Traffic over the bandwidth of the memory.
      floor_us: Sum of the largest bound of each launch. On a TPU, `memory_us` if that is larger,
        because asynchronous copies overlap with operations. None if the clock is unknown.
      bounds_us: The part of that sum which each kind of bound decides on.
      partial_mb: Arrays that kernels of capsjax write for a reduction or another kernel to read.
      product_us, library_us, requested_mb: See `_gpu_program`.
      kernels: See `_gpu_program` and `_tpu_program`.

    Raises:
      ValueError: Something cannot be counted.
    """
    executed = hlo.executed(text)
    moved = sum(call.calls * traffic(target, call, own) for call in executed)
    own_part = (
        _gpu_program(target, target.gpu, folder, executed, own)
        if target.gpu
        else _tpu_program(target, folder, text, executed, own)
    )
    memory = {"moved_mb": moved / MB, "memory_us": moved / target.bandwidth * US}
    if own_part["floor_us"] is not None and own_part["floor_us"] < memory["memory_us"]:
        own_part["floor_us"] = memory["memory_us"]
        own_part["bounds_us"] = {"memory": memory["memory_us"]}
    rows = own_part["kernels"]
    handed = sum(row["partial_mb"] * row["calls"] for row in rows)
    return {**memory, "partial_mb": handed, **own_part}


def _gpu_program(
    target: Target,
    gpu: Gpu,
    folder: pathlib.Path,
    executed: Sequence[hlo.Executed],
    own: Sequence[arithmetic.Kernel],
) -> dict[str, Any]:
    """Count the instructions that the kernels of a GPU program issue.

    Returns:
      launches, issue_us, floor_us, bounds_us: See `program`.
      product_us: Sum of the floors of matrix products over all launches of kernels.
      library_us: Derived, not compiled: the matrix products of cuBLAS, which XLA does not compile,
        at the peak of the data sheet.
      requested_mb: Sum of that of all calls of kernels.
      kernels: For each kernel, the fields of `dumps.GpuKernel` and `issue.Issued`, and
        pallas: True for a Pallas kernel of capsjax, False for one generated by XLA.
        calls: By the program, loops included.
        resident_blocks: Blocks that fit into a processor at once.
        waves: Blocks that the busiest processor executes.
        issue_us, product_us: Bounds of one call. Products of tensor memory (tcgen05) are missing:
          their shape is not in the machine code.
        memory_us: Bound of one call, the mean where it differs.
        floor_us: Sum of the largest bound of each call.
        partial_mb: What one call adds to `partial_mb`.
        requested_mb: Bytes that the loads and stores of all threads access in one call, as
          compiled. An access that lanes of a warp share, or that a predicate turns off, counts
          for each lane.
        loop_barriers, loop_local: Barriers and accesses of spilled registers in loops.
    """
    if (clock := target.clock) is None:
        raise ValueError(f"floors: the clock of {target.device} is unknown")
    launches = dumps.gpu_launches(folder)
    kernels = {k.name: k for k in dumps.gpu_kernels(folder, gpu.capability, launches)}
    instructions = {call.name: call for call in executed}
    rows: dict[str, dict[str, Any]] = {}
    total: collections.Counter[str] = collections.Counter()
    by_bound: collections.Counter[str] = collections.Counter()
    count = 0
    for launch in launches:
        if (call := instructions.get(launch.instruction)) is None:
            raise ValueError(f"floors: the program has no instruction {launch.instruction}")
        count += call.calls
        bounds = {"memory": traffic(target, call, own) / target.bandwidth * US}
        if launch.kernel:
            kernel = kernels[launch.kernel]
            row = rows.setdefault(kernel.name, _gpu_row(gpu, clock, kernel))
            bounds |= {"issue": row["issue_us"], "product": row["product_us"]}
            if call.kernel:
                row |= {"pallas": True, "partial_mb": call.kernel.handed / MB}
            row["calls"] += call.calls
            row["memory_us"] += call.calls * bounds["memory"]
            row["floor_us"] += call.calls * max(bounds.values())
        elif call.product:
            bounds["library"] = call.product / gpu.products[_LIBRARY_TYPES[call.dtype]] * US
        for bound, time in bounds.items():
            total[bound] += call.calls * time  # type: ignore[assignment]
        largest = max(bounds, key=lambda bound: bounds[bound])
        by_bound[largest] += call.calls * bounds[largest]  # type: ignore[assignment]
    for row in rows.values():
        row["memory_us"] /= max(1, row["calls"])
    return {
        "launches": count,
        **{f"{bound}_us": total[bound] for bound in ("issue", "product", "library")},
        "floor_us": sum(by_bound.values()),
        "bounds_us": dict(by_bound),
        "requested_mb": sum(row["calls"] * row["requested_mb"] for row in rows.values()),
        "kernels": list(rows.values()),
    }


def _tpu_program(
    target: Target,
    folder: pathlib.Path,
    text: str,
    executed: Sequence[hlo.Executed],
    own: Sequence[arithmetic.Kernel],
) -> dict[str, Any]:
    """Count the bundles that the kernels of a TPU program execute.

    Returns:
      launches, issue_us, floor_us, bounds_us: See `program`. A bundle is issued a cycle.
      kernels: For each kernel, the fields of `dumps.TpuKernel`, and `pallas`, `calls`, `issue_us`,
        `memory_us`, `floor_us` and `partial_mb` as in `_gpu_program`.
    """
    kernels = {kernel.name: kernel for kernel in dumps.tpu_kernels(folder, target.branch_delay)}
    instructions = {call.name: call for call in executed}
    code = duplicates.code_by_instruction(text)
    dumped = {code[name]: kernel for name, kernel in kernels.items() if name in code}
    known = target.clock is not None
    rows: dict[str, dict[str, Any]] = {}
    by_bound: collections.Counter[str] = collections.Counter()
    for name in dumps.tpu_calls(folder):
        call = instructions.get(name)
        kernel = kernels.get(name) or dumped.get(code.get(name, ""))
        if call is None or kernel is None:
            raise ValueError(f"floors: the dumps have no code of {name}")
        if not kernel.bundles:  # only allocates an array
            continue
        issue_us = kernel.executed / target.clock / 1e3 if target.clock else None
        memory_us = traffic(target, call, own) / target.bandwidth * US
        row = rows.setdefault(kernel.name, {**dataclasses.asdict(kernel), **_NO_CALLS})
        row["issue_us"] = issue_us
        row["calls"] += call.calls
        row["memory_us"] += call.calls * memory_us
        largest, bound = max((issue_us or 0.0, "issue"), (memory_us, "memory"))
        row["floor_us"] += call.calls * largest
        by_bound[bound] += call.calls * largest  # type: ignore[assignment]
        if call.kernel:
            row |= {"pallas": True, "partial_mb": call.kernel.handed / MB}
    for row in rows.values():
        row["memory_us"] /= max(1, row["calls"])
        row["floor_us"] = row["floor_us"] if known else None
    return {
        "launches": sum(row["calls"] for row in rows.values()),
        "issue_us": sum(x["calls"] * x["issue_us"] for x in rows.values()) if known else None,
        "floor_us": sum(by_bound.values()) if known else None,
        "bounds_us": dict(by_bound) if known else {},
        "kernels": list(rows.values()),
    }


_NO_CALLS = {"pallas": False, "calls": 0, "memory_us": 0.0, "floor_us": 0.0, "partial_mb": 0.0}


def _gpu_row(gpu: Gpu, clock: float, kernel: dumps.GpuKernel) -> dict[str, Any]:
    """Return what is known of a kernel without its calls."""
    fields = dataclasses.asdict(kernel)
    issued = kernel.issued
    warps = -(-kernel.threads // 32)
    blocks = math.prod(kernel.grid)
    waves = -(-blocks // gpu.multiprocessors)
    cycles = issue.cycles(issued, kernel.threads, kernel.grid, gpu.multiprocessors)
    in_opcodes = {x: n for x, n in issued.products.items() if not x.startswith("UTC")}
    products = sum(
        times * product_operations(opcode) / _peak(gpu, opcode)
        for opcode, times in in_opcodes.items()
    )
    return {
        **{name: value for name, value in fields.items() if name != "issued"},
        **fields["issued"],
        "pallas": False,
        "calls": 0,
        "resident_blocks": issue.resident_blocks(
            kernel.registers,
            kernel.shared_memory,
            kernel.threads,
            gpu.multiprocessor,
        ),
        "waves": waves,
        "issue_us": cycles / clock / 1e3,
        "product_us": products * warps * waves * gpu.multiprocessors * US,
        "memory_us": 0.0,
        "floor_us": 0.0,
        "partial_mb": 0.0,
        "requested_mb": issued.requested * warps * blocks / MB,
        "loop_barriers": sum(loop.barriers for loop in issued.loops),
        "loop_local": sum(loop.local for loop in issued.loops),
    }


def product_operations(opcode: str) -> int:
    """Return the operations of one warp in a matrix product of machine code.

    Raises:
      ValueError: The opcode does not name its shape.

    Example:
      >>> product_operations("HMMA.16816.F32.BF16")  # 16 x 8 x 16
      4096
    """
    if found := re.match(r"[A-Z]+\.(?:SP\.)?168(\d+)\.", opcode):
        return 2 * 16 * 8 * int(found[1])
    if found := re.match(r"[A-Z]+\.64x(\d+)x(\d+)\.", opcode):  # of four warps
        return 2 * 16 * int(found[1]) * int(found[2])
    raise ValueError(f"floors: the shape of the product {opcode} is unknown")


def _peak(gpu: Gpu, opcode: str) -> float:
    types = [name for name in gpu.products if name in opcode.split(".")]
    return gpu.products[types[0] if types else "F16"]
