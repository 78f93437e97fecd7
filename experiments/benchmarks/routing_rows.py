"""Measure variants of routing on one case, all timed in the same rounds.

Shape letters are those of `capsjax.shapes`.
"""

import contextlib
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
from capsjax.kernels.vote_passes import tuned
from capsjax.kernels.vote_passes.cases import Case
from capsjax.kernels.vote_passes.passes import PLATFORMS, Implementation
from experiments.benchmarks import roofline, timing, torch_routing
from experiments.benchmarks.timing import AsyncCall

MODES = ("forward", "gradients")
TORCH = "torch"


class Variant(NamedTuple):
    """An implementation of routing with its settings: one row of the benchmark."""

    implementation: str  # one of `passes.IMPLEMENTATIONS`, or `TORCH`
    mode: str  # one of `MODES`
    dtype: str
    config: Any = None  # None: the default of the implementation for the case

    def __str__(self) -> str:
        return title(self.implementation, tuned.encode(self.config))


class NotMeasured(Exception):
    """A variant does not run on this device; the message is the row's reason."""


class Inputs(NamedTuple):
    """The arguments of routing and of its VJP."""

    poses: Array  # [B, I, P]
    weights: Array  # [I, P, J, D]
    cotangent: Array  # [B, J, D]


def measure_case(
    name: str, case: Case, variants: Sequence[Variant], *, repeats: int
) -> list[dict[str, Any]]:
    """Time all variants on a case, and the peaks of the device in the same rounds.

    The first variant of a mode and dtype is the baseline of the others.

    Args:
      name: Of the case, for the rows.
      case: Sizes of the arrays.
      variants: What to time.
      repeats: Rounds.

    Returns:
      A row a variant. It has a `reason` if it could not be measured, and otherwise times in
      seconds, memory in bytes, and its `difference` from the baseline, relative to the largest
      entry of the baseline's array.
    """
    probes = {"triad": roofline.triad()}
    dtypes = list(dict.fromkeys(variant.dtype for variant in variants))
    probes |= {dtype: roofline.matrix_product(dtype) for dtype in dtypes}
    calls: dict[Any, AsyncCall] = {key: call for key, (call, _) in probes.items()}
    rows: dict[Variant, dict[str, Any]] = {}
    for dtype in dtypes:
        inputs: Inputs | NotMeasured = make_inputs(case._replace(dtype=dtype))
        baselines: dict[str, tuple[Variant, Any]] = {}
        for variant in (v for v in variants if v.dtype == dtype):
            logging.info("%s: %s, %s, %s", name, variant, variant.mode, variant.dtype)
            row = rows[variant] = {"case": name, "op": "dynamic_routing", **_fields(variant, case)}
            try:
                if isinstance(inputs, NotMeasured):
                    raise inputs
                calls[variant], result, costs = prepare(variant, inputs, case.num_iterations)
            except NotMeasured as reason:
                row |= {"reason": str(reason)}
                continue
            except Exception as error:
                # A compiler refuses tile sizes in many ways. Those that come first, the default
                # ones of a sweep, must compile.
                if not any(v[:3] == variant[:3] and v in calls for v in rows):
                    raise
                row |= {"reason": f"{type(error).__name__}: {error}".splitlines()[0]}
                continue
            baseline, expected = baselines.setdefault(variant.mode, (variant, result))
            row |= {**costs, "baseline": baseline, "difference": difference(result, expected)}
        del baselines  # frees the results
    times = timing.time_calls(calls, repeats=repeats)
    rates = {key: amount / times[key].min for key, (_, amount) in probes.items()}
    for variant, row in rows.items():
        if "reason" not in row:
            work = roofline.least_work(
                case._replace(dtype=variant.dtype), gradients=variant.mode == "gradients"
            )
            peak = roofline.Peak(rates["triad"], rates[variant.dtype])
            median = times[variant].median
            row |= {
                **times[variant]._asdict(),
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


def prepare(
    variant: Variant, inputs: Inputs, num_iterations: int
) -> tuple[AsyncCall, Any, dict[str, Any]]:
    """Compile a variant and run it once.

    Returns:
      The compiled call, its result, and its costs: seconds of compilation, and bytes of memory.

    Raises:
      NotMeasured: It does not run on this device, or there is too little memory.
    """
    if variant.implementation == TORCH:
        votes = inputs.cotangent.nbytes * inputs.weights.shape[0]
        _check_memory("stored votes need", torch_routing.COPIES[variant.mode] * votes)
        call = torch_routing.routing_call(*inputs, num_iterations=num_iterations, mode=variant.mode)
        costs: dict[str, Any] = {"compile_seconds": None, "temporary_bytes": None}
    else:
        compiled, costs = compile_variant(variant, [inputs], num_iterations)
        call = AsyncCall(lambda: compiled(inputs))
    before = jax.devices()[0].memory_stats()
    with _not_measured():
        result = call.wait(call.start())
    after = jax.devices()[0].memory_stats()
    # The peak is that of the process so far. It belongs to this call only if the call raised it.
    rose = before and after and after["peak_bytes_in_use"] > before["peak_bytes_in_use"]
    peak = after["peak_bytes_in_use"] - before["bytes_in_use"] if rose else None
    result = torch_routing.arrays(result) if variant.implementation == TORCH else result[0]
    return call, result, {**costs, "peak_bytes": peak}


def compile_variant(
    variant: Variant, sets: Sequence[Inputs], num_iterations: int
) -> tuple[Any, dict[str, Any]]:
    """Compile a variant as one program that routes each set of inputs, one after another.

    Returns:
      The compiled program, a function of the sets, and its costs: seconds of compilation, and bytes
      of temporary memory.

    Raises:
      NotMeasured: It does not run on this device, or there is too little memory.
    """
    platform = PLATFORMS.get(variant.implementation)
    if platform is not None and platform not in platforms():
        raise NotMeasured(f"runs on {platform} only, and this is a {jax.devices()[0].device_kind}")
    function = timing.one_after_another(function_of(variant, num_iterations))
    started = time.perf_counter()
    with _not_measured():
        compiled = jax.jit(function).lower(*sets).compile()
    seconds = time.perf_counter() - started
    memory: Any = compiled.memory_analysis()
    _check_memory(
        "results and temporaries need", memory.temp_size_in_bytes + memory.output_size_in_bytes
    )
    return compiled, {"compile_seconds": seconds, "temporary_bytes": memory.temp_size_in_bytes}


def platforms() -> set[str]:
    """Return the names of the platform: JAX's "gpu" is "cuda" or "rocm" to an implementation."""
    device = jax.devices()[0]
    return {device.platform, *device.client.platform_version.split()[:1]}


def function_of(variant: Variant, num_iterations: int) -> Callable[[Array, Array, Array], Any]:
    """Return the function of `Inputs` that a variant in JAX computes."""
    route = partial(
        capsjax.dynamic_routing,
        num_iterations=num_iterations,
        implementation=Implementation(variant.implementation, variant.config),
    )

    def run(poses: Array, weights: Array, cotangent: Array) -> Any:
        if variant.mode == "forward":
            return route(poses, weights)
        outputs, vjp = jax.vjp(route, poses, weights)
        return outputs, vjp(cotangent)

    return run


def make_inputs(case: Case, seed: int = 0) -> Inputs | NotMeasured:
    """Draw random inputs in the dtype of the case, or return why they do not fit into memory."""
    shapes: tuple[tuple[int, ...], ...] = (
        (case.batch, case.capsules, case.length),
        (case.capsules, case.length, case.parents, case.depth),
        (case.batch, case.parents, case.depth),
    )
    # JAX's default generator, threefry, takes minutes on a CPU for the largest case.
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), 3)

    @partial(jax.jit, static_argnums=(1, 2))
    def normal(key: Array, shape: tuple[int, ...], scale: float) -> Array:
        return scale * jax.random.normal(key, shape, case.dtype)

    try:
        # Twice the size of the inputs, because the random bits they are made from are as large.
        needed = 2 * sum(map(math.prod, shapes)) * jnp.dtype(case.dtype).itemsize
        _check_memory("its inputs need", needed)
        with _not_measured():
            return Inputs(*map(normal, keys, shapes, (0.5, 0.1, 1.0)))
    except NotMeasured as reason:
        return reason


def difference(result: Any, expected: Any) -> float:
    """Return the maximum error of any array, relative to the largest entry of that array."""

    @jax.jit
    def relative(a: Array, b: Array) -> Array:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(b)), 1e-30)

    return max(float(d) for d in jax.tree.leaves(jax.tree.map(relative, result, expected)))


def check_torch(case: Case) -> None:
    """Raise RuntimeError unless PyTorch's results equal those of "reference" within 1e-4."""
    inputs = make_inputs(case._replace(batch=2, capsules=min(case.capsules, 64), dtype="float32"))
    if isinstance(inputs, NotMeasured):
        raise inputs
    for mode in MODES:
        with jax.default_matmul_precision("highest"):
            results = [
                prepare(Variant(name, mode, "float32"), inputs, case.num_iterations)[1]
                for name in (TORCH, "reference")
            ]
        if not (error := difference(*results)) <= 1e-4:
            raise RuntimeError(f"PyTorch's {mode} differs by {error:.1e} from ours")


def title(implementation: str, config: dict[str, Any] | None) -> str:
    """Return an implementation and the fields of its config as text: "xla children=8"."""

    def fields(config: dict[str, Any], prefix: str = "") -> list[str]:
        found = []
        for name, value in config.items():
            is_record = isinstance(value, dict)
            found += fields(value, f"{name}.") if is_record else [f"{prefix}{name}={value}"]
        return found

    return " ".join([implementation, *fields(config or {})])


def _fields(variant: Variant, case: Case) -> dict[str, Any]:
    return {**case._asdict(), **variant._asdict(), "config": tuned.encode(variant.config)}


@contextlib.contextmanager
def _not_measured() -> Iterator[None]:
    """Raise NotMeasured for errors that mean: this device cannot run it. Let others pass."""
    try:
        yield
    except (Unsupported, MemoryError) as error:
        raise NotMeasured(str(error)) from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise NotMeasured(str(error).splitlines()[0]) from error


def _check_memory(what: str, needed: int) -> None:
    """Raise NotMeasured if less is free; on a CPU, the system would kill the process instead."""
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
