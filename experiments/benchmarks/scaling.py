"""Compiles, and on a CPU runs, one program over several devices, in a process of its own.

How many devices a CPU pretends to be is read once a process.
"""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, P
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import capsjax
from capsjax.kernels.vote_passes.cases import Case
from experiments.compilers import hlo, targets
from experiments.data import datasets
from experiments.training import mnist, parallel

HOST = "cpu"
MB = 1e6
Placed = tuple[jax.ShapeDtypeStruct, PartitionSpec]


@dataclasses.dataclass(frozen=True)
class Program:
    """Routing with its gradients, or a training step, over a mesh."""

    work: str  # "routing", or "training" of a small network that routes `case`, on a CPU
    target: str  # `HOST` or one of `targets.TARGETS`
    data: int  # devices along the axis "data"
    capsules: int  # devices along the axis "capsules"
    case: Case


def measure(program: Program, repeats: int) -> dict[str, Any]:
    """Compiles a program for its devices, and runs it so often; not at all if that is 0.

    Returns:
      Of one device, argument_mb, result_mb (beside the arguments' memory) and temporary_mb;
      sent_mb, what it hands over to others by the kind (`hlo.sent`); and seconds, the times of
      its runs.
    """
    request = json.dumps(dataclasses.asdict(program))
    with tempfile.TemporaryDirectory() as folder:
        if program.target == HOST:
            count = program.data * program.capsules
            flags = f"--xla_force_host_platform_device_count={count}"
            environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        else:
            environment = targets.environment(program.target, pathlib.Path(folder))
        done = subprocess.run(
            [sys.executable, "-m", "experiments.benchmarks.scaling", request, str(repeats)],
            capture_output=True,
            text=True,
            env=environment,
            cwd=pathlib.Path(__file__).parents[2],
        )
    if done.returncode:
        raise RuntimeError(f"compiling {program} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def routing(case: Case) -> tuple[Callable[..., Any], tuple[Placed, ...]]:
    """Routing with all its gradients over axes "data" and "capsules", and its arguments."""
    examples, capsules, both = P("data"), P("capsules"), P("data", "capsules")

    # Its mesh is that of the context.
    @jax.shard_map(in_specs=(both, capsules), out_specs=examples)
    def route(poses: Array, weights: Array) -> Array:
        return capsjax.dynamic_routing(
            poses, weights, num_iterations=case.num_iterations, axis_name="capsules"
        )

    def values_and_gradients(poses: Array, weights: Array, cotangent: Array) -> Any:
        outputs, vjp = jax.vjp(route, poses, weights)
        return outputs, vjp(cotangent)

    placed = (
        ((case.batch, case.capsules, case.length), both),
        ((case.capsules, case.length, case.parents, case.depth), capsules),
        ((case.batch, case.parents, case.depth), examples),
    )
    structs = tuple((jax.ShapeDtypeStruct(shape, case.dtype), spec) for shape, spec in placed)
    return values_and_gradients, structs


def _measure_here(program: Program, repeats: int) -> dict[str, Any]:
    """Does what `measure` says, in a process with the target's environment."""
    compiled: Any
    if program.work == "training":
        compiled, run = _training(program)
    elif program.target == HOST:
        compiled, run = _host_routing(program)
    else:
        function, placed = routing(program.case)
        axes = {"data": program.data, "capsules": program.capsules}
        compiled = targets.compile_over(program.target, axes, function, *placed)
    memory = compiled.memory_analysis()
    return {
        "argument_mb": memory.argument_size_in_bytes / MB,
        "result_mb": (memory.output_size_in_bytes - memory.alias_size_in_bytes) / MB,
        "temporary_mb": memory.temp_size_in_bytes / MB,
        "sent_mb": {kind: size / MB for kind, size in hlo.sent(compiled.as_text()).items()},
        "seconds": _times(run, repeats) if repeats else [],
    }


def _host_routing(program: Program) -> tuple[Any, Callable[[], Any]]:
    """The compiled program, and a function that runs it."""
    function, placed = routing(program.case)
    mesh = jax.make_mesh(
        (program.data, program.capsules), ("data", "capsules"), axis_types=(AxisType.Auto,) * 2
    )
    rng = np.random.default_rng(0)
    arrays = [
        # Weights of deviation 0.1: votes of a length that routing is meant for.
        jax.device_put(
            jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype), NamedSharding(mesh, spec)
        )
        for x, spec in placed
    ]
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*arrays).compile()
    return compiled, lambda: compiled(*arrays)


def _training(program: Program) -> tuple[Any, Callable[[], Any]]:
    """A step of the quickstart's network, compiled, and a function that takes the next step."""
    config = mnist.Config(
        dataset="mnist_small",
        conv_channels=64,
        primary_types=program.case.capsules // 36,  # 6 x 6 positions
        batch_size=program.case.batch,
        data_parallel=program.data,
        capsule_parallel=program.capsules,
    )
    dataset = datasets.load(config.dataset)
    trainer = mnist.build(config, dataset)
    trainer = parallel.spread(trainer, config, batch_size=config.batch_size)
    state = trainer.initial_state(0)
    batch = trainer.batch(dataset.train, np.arange(config.batch_size))
    compiled = trainer.step.lower(state, *batch).compile()

    def run() -> Any:
        nonlocal state
        state = compiled(state, *batch)
        return state

    return compiled, run


def _times(run: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each run, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return times[1:]


def votes_mb(case: Case) -> float:
    """The votes, which nobody stores or sends."""
    sizes = case.batch, case.capsules, case.parents, case.depth
    return math.prod(sizes) * jnp.dtype(case.dtype).itemsize / MB


def main(request: str, repeats: str) -> None:
    """Prints the measurements of the program that a JSON text asks for, as a line of JSON."""
    fields = json.loads(request)
    program = Program(**{**fields, "case": Case(*fields["case"])})
    print(json.dumps(_measure_here(program, int(repeats))))


if __name__ == "__main__":
    main(*sys.argv[1:])
