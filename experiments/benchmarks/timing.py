"""Programs timed beside each other: in rounds, each in turn, long enough to hide the dispatch."""

import datetime
import math
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

Name = TypeVar("Name")

# A call that is only dispatched returns after some 0.1 ms: 0.2 % of a round.
ROUND_SECONDS = 0.05


class Program(NamedTuple):
    """Something to time."""

    run: Callable[[], Any]  # starts one call
    wait: Callable[[Any], Any] = jax.block_until_ready  # ends when that call has ended


class Timing(NamedTuple):
    """Seconds of one call."""

    median: float
    min: float
    max: float
    calls: int  # in each round


def time_programs(programs: Mapping[Name, Program], *, repeats: int) -> dict[Name, Timing]:
    """Times programs that have run once already.

    In each of `repeats` rounds every program is called in turn, as often as it takes to fill
    `ROUND_SECONDS`: what disturbs the machine for a while disturbs all of them.
    """
    calls = {name: _calls_of_a_round(program) for name, program in programs.items()}
    seconds: dict[Name, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            seconds[name].append(_seconds(program, calls[name]) / calls[name])
    return {
        name: Timing(float(np.median(values)), min(values), max(values), calls[name])
        for name, values in seconds.items()
    }


def environment() -> dict[str, str]:
    """What a time depends on beside the program: the device, the versions and the day."""
    return {
        "device": jax.devices()[0].device_kind,
        "machine": platform.processor() or platform.machine(),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _calls_of_a_round(program: Program) -> int:
    """Calls that fill a round; found in steps, since a lone call pays for its dispatch."""
    calls = 1
    while (seconds := _seconds(program, calls)) < ROUND_SECONDS:
        calls = max(calls + 1, min(10 * calls, math.ceil(calls * ROUND_SECONDS / seconds)))
    return calls


def _seconds(program: Program, calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        result = program.run()
    program.wait(result)
    return time.perf_counter() - started
