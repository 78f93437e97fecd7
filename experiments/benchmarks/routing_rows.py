"""The rows of a routing benchmark: one case, every way to route it, timed in the same rounds."""

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from jax import Array

import capsjax
from capsjax.kernels.dispatch import Unsupported
from capsjax.kernels.vote_passes.cases import Case
from capsjax.kernels.vote_passes.config import CONFIGS
from capsjax.kernels.vote_passes.passes import PLATFORMS, Implementation
from experiments.benchmarks import roofline, timing, torch_routing
from experiments.benchmarks.timing import Program

MODES = ("forward", "gradients")
TORCH = "torch"


class Way(NamedTuple):
    """One way to route a case."""

    implementation: str
    mode: str
    dtype: str
    config: Any = None  # None: the implementation's own choice

    def __str__(self) -> str:
        sizes = {} if self.config is None else dataclasses.asdict(self.config)
        return " ".join([self.implementation, *(f"{k}={v}" for k, v in sizes.items())])


class NotMeasured(Exception):
    """Why a row has no times: this device lacks what it needs."""


class Inputs(NamedTuple):
    """The arrays of a case."""

    poses: Array  # [B, I, P]
    weights: Array  # [I, P, J, D]
    cotangent: Array  # [B, J, D]


def measure(name: str, case: Case, ways: Sequence[Way], *, repeats: int) -> list[dict[str, Any]]:
    """Times all ways to route a case, beside the device's peaks.

    Returns:
      A row for each way. One that could not be measured has a `reason`. The others have times in
      seconds, memory in bytes, and their `difference` from the first one of the same mode and
      dtype, the `baseline`: the largest of any entry, as a part of the largest entry.
    """
    probes = {"triad": roofline.triad()}
    probes |= {dtype: roofline.product(dtype) for dtype in dict.fromkeys(w.dtype for w in ways)}
    programs: dict[Any, Program] = {key: program for key, (program, _) in probes.items()}
    rows: dict[Way, dict[str, Any]] = {}
    for dtype in dict.fromkeys(way.dtype for way in ways):
        inputs: Inputs | NotMeasured = inputs_of(case._replace(dtype=dtype))
        baselines: dict[str, tuple[Way, Any]] = {}
        for way in (way for way in ways if way.dtype == dtype):
            logging.info("%s: %s, %s, %s", name, way, way.mode, way.dtype)
            rows[way] = {"case": name, "op": "dynamic_routing", **_described(way, case)}
            try:
                if isinstance(inputs, NotMeasured):
                    raise inputs
                programs[way], result, facts = prepare(way, inputs, case.num_iterations)
            except NotMeasured as reason:
                rows[way] |= {"reason": str(reason)}
                continue
            baseline, expected = baselines.setdefault(way.mode, (way, result))
            rows[way] |= {**facts, "baseline": baseline, "difference": difference(result, expected)}
        del baselines
    times = timing.time_programs(programs, repeats=repeats)
    rates = {key: amount / times[key].min for key, (_, amount) in probes.items()}
    for way, row in rows.items():
        if "reason" not in row:
            work = roofline.least_work(
                case._replace(dtype=way.dtype), gradients=way.mode == "gradients"
            )
            peak = roofline.Peak(rates["triad"], rates[way.dtype])
            median = times[way].median
            row |= {
                **times[way]._asdict(),
                "rounds": repeats,
                "least_bytes": work.bytes,
                "least_flops": work.flops,
                "flops_per_second": work.flops / median,
                "peak_bytes_per_second": peak.bytes,
                "peak_flops_per_second": peak.flops,
                "roofline_percent": 100 * work.seconds(peak) / median,
                "speedup": times[row["baseline"]].median / median,
                "baseline": str(row["baseline"]),
            }
    return [row | timing.environment() for row in rows.values()]


def prepare(way: Way, inputs: Inputs, num_iterations: int) -> tuple[Program, Any, dict[str, Any]]:
    """Compiles a way and runs it once: the program, what it returned, and what that cost.

    Raises:
      NotMeasured: It does not run on this device, or there is too little memory.
    """
    if way.implementation == TORCH:
        votes = inputs.cotangent.nbytes * inputs.weights.shape[0]
        _check_memory("stored votes need", torch_routing.COPIES[way.mode] * votes)
        program = torch_routing.routing_program(
            *inputs, num_iterations=num_iterations, mode=way.mode
        )
        costs: dict[str, Any] = {"compile_seconds": None, "temporary_bytes": None}
    else:
        program, costs = _compiled(way, inputs, num_iterations)
    before = jax.devices()[0].memory_stats()
    with _reasons():
        result = program.wait(program.run())
    after = jax.devices()[0].memory_stats()
    # The device keeps the highest mark of the process: it speaks of this program if it rose.
    rose = before and after and after["peak_bytes_in_use"] > before["peak_bytes_in_use"]
    peak = after["peak_bytes_in_use"] - before["bytes_in_use"] if rose else None
    if way.implementation == TORCH:
        result = torch_routing.arrays(result)
    return program, result, {**costs, "peak_bytes": peak}


def function_of(way: Way, num_iterations: int) -> Callable[[Array, Array, Array], Any]:
    """Returns what a way computes, as a function of `Inputs`."""
    route = partial(
        capsjax.dynamic_routing,
        num_iterations=num_iterations,
        implementation=Implementation(way.implementation, way.config),
    )

    def run(poses: Array, weights: Array, cotangent: Array) -> Any:
        if way.mode == "forward":
            return route(poses, weights)
        outputs, vjp = jax.vjp(route, poses, weights)
        return outputs, vjp(cotangent)

    return run


def inputs_of(case: Case) -> Inputs | NotMeasured:
    """Random inputs in the dtype of the case, or why there are none."""
    shapes: tuple[tuple[int, ...], ...] = (
        (case.batch, case.capsules, case.length),
        (case.capsules, case.length, case.parents, case.depth),
        (case.batch, case.parents, case.depth),
    )
    # Threefry, the default, takes minutes on a CPU for the largest case.
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 3)

    @partial(jax.jit, static_argnums=(1, 2))
    def normal(key: Array, shape: tuple[int, ...], scale: float) -> Array:
        return scale * jax.random.normal(key, shape, case.dtype)

    try:
        # With as much again for the random bits that they are made of.
        needed = 2 * sum(map(math.prod, shapes)) * jnp.dtype(case.dtype).itemsize
        _check_memory("its inputs need", needed)
        with _reasons():
            return Inputs(*map(normal, keys, shapes, (0.5, 0.1, 1.0)))
    except NotMeasured as reason:
        return reason


def difference(result: Any, expected: Any) -> float:
    """The largest difference of any entry, as a part of its array's largest entry."""

    @jax.jit
    def relative(a: Array, b: Array) -> Array:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(b)), 1e-30)

    return max(float(d) for d in jax.tree.leaves(jax.tree.map(relative, result, expected)))


def check_torch(case: Case) -> None:
    """Raises RuntimeError unless PyTorch's form computes what stored votes in JAX do, to 1e-4."""
    inputs = inputs_of(case._replace(batch=2, capsules=min(case.capsules, 64), dtype="float32"))
    if isinstance(inputs, NotMeasured):
        raise inputs
    for mode in MODES:
        with jax.default_matmul_precision("highest"):
            results = [
                prepare(Way(name, mode, "float32"), inputs, case.num_iterations)[1]
                for name in (TORCH, "reference")
            ]
        if not (error := difference(*results)) <= 1e-4:
            raise RuntimeError(f"PyTorch's {mode} differs by {error:.1e} from ours")


def variants(implementation: str, case: Case) -> list[Any]:
    """The implementation's own config for a case, then those with one size halved or doubled."""
    config_for: Any = CONFIGS[implementation]
    # Tiles for TPUs depend on their generation.
    kind = (jax.devices()[0].device_kind,) if PLATFORMS.get(implementation) == "tpu" else ()
    config = config_for(case, *kind)
    if config is None:
        return [None]
    sizes = dataclasses.asdict(config)
    changes = [
        {name: changed}
        for name, size in sizes.items()
        for changed in (size // 2, 2 * size)
        if changed
    ]
    return [type(config)(**(sizes | change)) for change in [{}, *changes]]


def _described(way: Way, case: Case) -> dict[str, Any]:
    config = None if way.config is None else dataclasses.asdict(way.config)
    return {**case._asdict(), **way._asdict(), "config": config}


def _compiled(way: Way, inputs: Inputs, num_iterations: int) -> tuple[Program, dict[str, Any]]:
    device = jax.devices()[0]
    # JAX calls both "gpu"; implementations are for "cuda" or "rocm".
    names = {device.platform, *device.client.platform_version.split()[:1]}
    platform = PLATFORMS.get(way.implementation)
    if platform is not None and platform not in names:
        raise NotMeasured(f"runs on {platform} only, and this is a {device.device_kind}")
    started = time.perf_counter()
    with _reasons():
        compiled = jax.jit(function_of(way, num_iterations)).lower(*inputs).compile()
    seconds = time.perf_counter() - started
    memory: Any = compiled.memory_analysis()
    _check_memory(
        "results and temporaries need", memory.temp_size_in_bytes + memory.output_size_in_bytes
    )
    costs = {"compile_seconds": seconds, "temporary_bytes": memory.temp_size_in_bytes}
    return Program(lambda: compiled(*inputs)), costs


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    """Turns what says that this device cannot do it into NotMeasured."""
    try:
        yield
    except (Unsupported, MemoryError) as error:
        raise NotMeasured(str(error)) from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise NotMeasured(str(error).splitlines()[0]) from error


def _check_memory(what: str, needed: int) -> None:
    """Raises NotMeasured if there is less memory: on a CPU the system would kill the process."""
    stats = jax.devices()[0].memory_stats()
    meminfo = pathlib.Path("/proc/meminfo")
    if stats:
        free = stats["bytes_limit"] - stats["bytes_in_use"]
    elif meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    else:  # unknown
        return
    if needed > free:
        raise NotMeasured(f"{what} {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
