"""Compile routing or a training step for a mesh, in a child process, and measure it.

Each measurement has a child process, because XLA reads the number of host devices only once.
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
class ShardedCase:
    """Routing with its gradients, or a training step, on a case that is sharded over a mesh."""

    work: str  # "routing"; or "training", a step of a small network that routes `case`, on a CPU
    target: str  # `HOST` or one of `targets.TARGETS`
    data: int  # devices along the mesh axis "data"
    capsules: int  # devices along the mesh axis "capsules"
    case: Case


def measure_sharded(sharded: ShardedCase, repeats: int) -> dict[str, Any]:
    """Compile a sharded case in a child process, and run it there `repeats` times.

    Args:
      sharded: What to compile.
      repeats: Timed runs; 0 compiles only.

    Returns:
      Of one device, in MB: argument_mb, result_mb (without results that reuse the arguments'
      memory), temporary_mb, and sent_mb by the kind of collective (`hlo.sent`). Also `seconds`,
      the times of the runs.
    """
    request = json.dumps(dataclasses.asdict(sharded))
    with tempfile.TemporaryDirectory() as folder:
        if sharded.target == HOST:
            count = sharded.data * sharded.capsules
            flags = f"--xla_force_host_platform_device_count={count}"
            environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        else:
            environment = targets.environment(sharded.target, pathlib.Path(folder))
        done = subprocess.run(
            [sys.executable, "-m", "experiments.benchmarks.scaling", request, str(repeats)],
            capture_output=True,
            text=True,
            env=environment,
            cwd=pathlib.Path(__file__).parents[2],
        )
    if done.returncode:
        raise RuntimeError(f"compiling {sharded} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def routing(case: Case) -> tuple[Callable[..., Any], tuple[Placed, ...]]:
    """Return routing with its gradients, sharded over "data" and "capsules".

    Returns:
      The function, to be traced under a mesh; and the shapes and shardings of its arguments.
    """
    examples, capsules, both = P("data"), P("capsules"), P("data", "capsules")

    # The mesh is that of the context: a target's devices, or the host's.
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


def _measure_in_this_process(sharded: ShardedCase, repeats: int) -> dict[str, Any]:
    """Compute the result of `measure_sharded`; the environment must be that of the target."""
    compiled: Any
    if sharded.work == "training":
        compiled, run = _training(sharded)
    elif sharded.target == HOST:
        compiled, run = _host_routing(sharded)
    else:
        function, placed = routing(sharded.case)
        axes = {"data": sharded.data, "capsules": sharded.capsules}
        compiled = targets.compile_over(sharded.target, axes, function, *placed)
    memory = compiled.memory_analysis()
    return {
        "argument_mb": memory.argument_size_in_bytes / MB,
        "result_mb": (memory.output_size_in_bytes - memory.alias_size_in_bytes) / MB,
        "temporary_mb": memory.temp_size_in_bytes / MB,
        "sent_mb": {kind: size / MB for kind, size in hlo.sent(compiled.as_text()).items()},
        "seconds": _times(run, repeats) if repeats else [],
    }


def _host_routing(sharded: ShardedCase) -> tuple[Any, Callable[[], Any]]:
    """Compile routing for host devices; return the executable, and a function that runs it."""
    function, placed = routing(sharded.case)
    mesh = jax.make_mesh(
        (sharded.data, sharded.capsules), ("data", "capsules"), axis_types=(AxisType.Auto,) * 2
    )
    rng = np.random.default_rng(0)
    arrays = [
        # Standard deviation 0.1, because larger votes would saturate the couplings.
        jax.device_put(
            jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype), NamedSharding(mesh, spec)
        )
        for x, spec in placed
    ]
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*arrays).compile()
    return compiled, lambda: compiled(*arrays)


def _training(sharded: ShardedCase) -> tuple[Any, Callable[[], Any]]:
    """Compile a training step; return the executable, and a function that takes the next step."""
    # The network of the quickstart.
    config = mnist.Config(
        dataset="mnist_small",
        conv_channels=64,
        primary_types=sharded.case.capsules // 36,  # at 6 x 6 positions
        batch_size=sharded.case.batch,
        data_parallel=sharded.data,
        capsule_parallel=sharded.capsules,
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
    """Return the seconds of each run, after one warm-up run."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return times[1:]


def votes_mb(case: Case) -> float:
    """Return the size of all votes in MB; capsjax neither stores nor sends them."""
    sizes = case.batch, case.capsules, case.parents, case.depth
    return math.prod(sizes) * jnp.dtype(case.dtype).itemsize / MB


def main(request: str, repeats: str) -> None:
    """Measure the sharded case given as JSON, and print the result as a line of JSON."""
    fields = json.loads(request)
    sharded = ShardedCase(**{**fields, "case": Case(*fields["case"])})
    print(json.dumps(_measure_in_this_process(sharded, int(repeats))))


if __name__ == "__main__":
    main(*sys.argv[1:])
