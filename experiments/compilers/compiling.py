"""Compiles one routing program for a target, in a process of its own, and measures it there.

Compilers read their settings once a process, and end the process when something goes very wrong.
"""

import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import tempfile
from typing import Any

import jax

import capsjax
from capsjax.kernels.vote_passes.cases import Case
from capsjax.kernels.vote_passes.passes import Device
from experiments.compilers import arithmetic, dumps, hlo
from experiments.compilers.targets import TARGETS, Target, compile_for, environment

MB = 1e6


@dataclasses.dataclass(frozen=True)
class Program:
    """What to compile."""

    target: str
    implementation: str
    case: Case
    gradients: bool  # of poses and weights too, for a cotangent that is an argument


def measure(program: Program) -> dict[str, Any]:
    """Compiles a program and measures it.

    Returns:
      Either `reason`, in one line, why there is no such program, or
      temporary_mb: memory beside arguments and results, at its peak.
      argument_mb, result_mb: memory of those.
      moved_mb: traffic with the device's memory: XLA's instructions from the program text
        (`hlo.traffic`), kernels from their grid and blocks (`kernel_traffic`).
      accessed_mb: on a TPU, what the compiler itself counts: vector memory too, loops once.
      matrix_gflop, vector_gflop: operations (`arithmetic.operations`).
      kernels: what is written by hand, and what XLA made: a list of the fields of
        `dumps.GpuKernel` or `dumps.TpuKernel`, with `pallas` true for the former.
    """
    request = json.dumps(dataclasses.asdict(program))
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "experiments.compilers.compiling", request, folder],
            capture_output=True,
            text=True,
            env=environment(program.target, pathlib.Path(folder)),
            cwd=pathlib.Path(__file__).parents[2],
        )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode < 0:
        return {"reason": f"the compiler ended by {signal.Signals(-done.returncode).name}"}
    raise RuntimeError(f"compiling {program} failed:\n{done.stderr}")


def routing(program: Program) -> tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]:
    """The function to compile, and the shapes of its arguments."""
    case = program.case

    def forward(poses: jax.Array, weights: jax.Array) -> jax.Array:
        return capsjax.dynamic_routing(
            poses,
            weights,
            num_iterations=case.num_iterations,
            implementation=program.implementation,
        )

    def forward_and_gradients(poses: jax.Array, weights: jax.Array, cotangent: jax.Array) -> Any:
        outputs, vjp = jax.vjp(forward, poses, weights)
        return outputs, vjp(cotangent)

    shapes = [
        (case.batch, case.capsules, case.length),
        (case.capsules, case.length, case.parents, case.depth),
        (case.batch, case.parents, case.depth),
    ]
    structs = tuple(jax.ShapeDtypeStruct(shape, case.dtype) for shape in shapes)
    return (forward_and_gradients, structs) if program.gradients else (forward, structs[:2])


def platform_of(target: Target) -> str:
    """Returns JAX's name of a target's platform."""
    return "cuda" if target.gpu else "tpu"


def kernel_traffic(target: Target, called: hlo.KernelCall, kernels: list[arithmetic.Kernel]) -> int:
    """Bytes that one kernel moves between the device's memory and the chip, over all its calls.

    On a TPU: each operand's blocks, as often as their index changes from one step of the grid to
    the next. On a GPU, whose programs run in no order: an operand that fits into the L2 cache
    once, another as often as the programs load it.

    Raises:
      ValueError: the call is none of `kernels`.
    """
    arrays = [*called.operands, *called.results]
    shapes = [array.shape for array in arrays]
    kernel = next((k for k in kernels if [o.shape for o in k.operands] == shapes), None)
    if kernel is None:
        raise ValueError(f"compiling: no kernel has operands {shapes}")
    moved = 0
    for array, operand in zip(arrays, kernel.operands, strict=True):
        if target.gpu:
            moved += operand.size if operand.size <= target.gpu.l2_cache else operand.requested
        elif array.in_memory:
            moved += sum(
                times * hlo.tiled_size(block, operand.itemsize)
                for block, times in operand.blocks.items()
            )
    return moved * called.calls


def _measure_here(program: Program, folder: pathlib.Path) -> dict[str, Any]:
    """Does what `measure` says, in a process with the target's environment."""
    target = TARGETS[program.target]
    function, shapes = routing(program)
    try:
        compiled = compile_for(program.target, function, *shapes)
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        return {"reason": str(error).splitlines()[0]}
    memory = compiled.memory_analysis()
    needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    if needed > target.memory:
        return {"reason": f"needs {needed / 1e9:.1f} GB of {target.memory / 1e9:.0f} GB"}
    traffic = hlo.traffic(compiled.as_text())
    platform, device = platform_of(target), Device(target.device)
    own = arithmetic.kernels(function, *shapes, platform=platform, device=device)
    moved = traffic.moved + sum(kernel_traffic(target, call, own) for call in traffic.kernels)
    operations = arithmetic.operations(function, *shapes, platform=platform, device=device)
    kernels = (
        dumps.gpu_kernels(folder, target.gpu.capability)
        if target.gpu
        else dumps.tpu_kernels(folder)
    )
    names = {kernel.name for kernel in own}
    return {
        "temporary_mb": memory.temp_size_in_bytes / MB,
        "argument_mb": memory.argument_size_in_bytes / MB,
        "result_mb": memory.output_size_in_bytes / MB,
        "moved_mb": moved / MB,
        "accessed_mb": None if target.gpu else compiled.cost_analysis()["bytes accessed"] / MB,
        "matrix_gflop": operations.matrix / 1e9,
        "vector_gflop": operations.vector / 1e9,
        "kernels": [
            {**dataclasses.asdict(kernel), "pallas": kernel.name.split(".")[0] in names}
            for kernel in kernels
        ],
    }


def main(request: str, folder: str) -> None:
    """Prints the measurements of the program that a JSON text asks for, as a line of JSON."""
    fields = json.loads(request)
    program = Program(**{**fields, "case": Case(*fields["case"])})
    print(json.dumps(_measure_here(program, pathlib.Path(folder))))


if __name__ == "__main__":
    main(*sys.argv[1:])
