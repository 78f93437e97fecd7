"""Time routing on a device without the host's time, for `device_check`.

A program routes several sets of inputs in turn, which displace each other from the caches.
"""

import concurrent.futures
import json
import os
import pathlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax

from capsjax.kernels.vote_passes.cases import Case
from experiments.benchmarks import routing_rows, timing, torch_routing
from experiments.benchmarks.routing_rows import Inputs, NotMeasured, Variant
from experiments.compilers.targets import TARGETS
from experiments.errors import InputError

# Bytes of all inputs: more than the last-level cache of any GPU (an H200's has 50 MB).
INPUT_BYTES = 128 * 10**6
ROUNDS = 5


def inputs_in_turn(case: Case, *, most: int = 16) -> list[Inputs]:
    """Draw as many sets of inputs as have `INPUT_BYTES`, at most `most`.

    Raises:
      NotMeasured: They do not fit into memory.
    """
    sets: list[Inputs] = []
    while len(sets) < most and sum(x.nbytes for inputs in sets for x in inputs) < INPUT_BYTES:
        inputs = routing_rows.make_inputs(case, seed=len(sets))
        if isinstance(inputs, NotMeasured):
            raise inputs
        sets.append(inputs)
    return sets


def time_variants(
    variants: Sequence[Variant], sets: Sequence[Inputs], num_iterations: int
) -> dict[Variant, dict[str, Any]]:
    """Compile the variants in parallel, then time them in the same rounds.

    Returns:
      For each variant the fields of its row: times, or a `reason`, or an `error`.
    """
    found: dict[Variant, dict[str, Any]] = {}
    calls: dict[Variant, timing.AsyncCall] = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {
            variant: pool.submit(routing_rows.compile_variant, variant, sets, num_iterations)
            for variant in variants
        }
    for variant, future in futures.items():
        try:
            compiled, costs = future.result()
            jax.block_until_ready(compiled(*sets))
            calls[variant] = timing.AsyncCall(partial(compiled, *sets))
            found[variant] = {"compile_seconds": costs["compile_seconds"]}
        except NotMeasured as reason:
            found[variant] = {"reason": str(reason)}
        except Exception as error:
            found[variant] = {"error": one_line(error)}
    for variant, times in timing.time_calls(calls, repeats=ROUNDS).items():
        found[variant] |= _microseconds(times, len(sets))
    return found


def time_torch(
    sets: Sequence[Inputs], *, num_iterations: int, mode: str, way: str
) -> dict[str, Any]:
    """Time one way of PyTorch on the sets; return the fields of its row."""
    call = torch_routing.calls_in_turn(sets, num_iterations=num_iterations, mode=mode, way=way)
    call.wait(call.start())
    return _microseconds(timing.time_calls({way: call}, repeats=ROUNDS)[way], len(sets))


def read_floors(path: str) -> dict[tuple[Any, ...], float]:
    """Return the floors of a compile report in microseconds.

    Returns:
      By the device's kind, the case's name, the implementation, the dtype, and whether gradients
      are computed. Of rows that are alike, the last one counts.

    Raises:
      InputError: The file cannot be read, or is no compile report.
    """
    floors = {}
    try:
        for line in pathlib.Path(path).read_text().splitlines():
            row = json.loads(line)
            if row.get("floor_us") is not None:
                device, dtype = TARGETS[row["target"]].device, row["sizes"]["dtype"]
                key = device, row["case"], row["implementation"], dtype, row["gradients"]
                floors[key] = float(row["floor_us"])
    except OSError as error:
        raise InputError(f"--floors: {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--floors: {path} is no compile report: {one_line(error)}") from error
    return floors


def one_line(error: Exception) -> str:
    """Return an error as one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _microseconds(times: timing.Timing, calls: int) -> dict[str, Any]:
    """Return the fields of a row for the time of a program of so many calls."""
    each = {"us": times.median, "min_us": times.min, "max_us": times.max}
    return {name: 1e6 * seconds / calls for name, seconds in each.items()} | {"calls": calls}
