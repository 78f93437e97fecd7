"""Time asynchronous calls in interleaved rounds.

Interleaving spreads a disturbance of the machine over all calls, and rounds are long enough for
the dispatch of a call not to matter.
"""

import datetime
import math
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax import lax

Name = TypeVar("Name")

# Dispatching a call takes about 0.1 ms, which is 0.2 % of a round.
ROUND_SECONDS = 0.05


class AsyncCall(NamedTuple):
    """A call to time; accelerators run it asynchronously."""

    start: Callable[[], Any]  # dispatches the call and returns its result
    wait: Callable[[Any], Any] = jax.block_until_ready  # blocks until that result is computed


class Timing(NamedTuple):
    """Seconds of one call: median, minimum and maximum over the rounds."""

    median: float
    min: float
    max: float
    calls: int  # calls a round


def time_calls(calls: Mapping[Name, AsyncCall], *, repeats: int) -> dict[Name, Timing]:
    """Time calls that are compiled and warm, in `repeats` rounds of all calls.

    In a round, each call in turn is repeated until `ROUND_SECONDS` have passed.
    """
    counts = {name: _calls_per_round(call) for name, call in calls.items()}
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(_seconds(call, counts[name]) / counts[name])
    return {
        name: Timing(float(np.median(values)), min(values), max(values), counts[name])
        for name, values in seconds.items()
    }


def one_after_another(function: Callable[..., Any]) -> Callable[..., list[Any]]:
    """Return a function of several sets of arguments that calls `function` on each in turn.

    Under `jax.jit` that is one program, in which no call begins before the one before it has ended,
    and calls share no kernel. Its time is that of the calls alone, without the host's for each, and
    with arguments that the other calls have displaced from the caches.
    """

    def run(*sets: Any) -> list[Any]:
        results: list[Any] = []
        for arguments in sets:
            if results:
                arguments, _ = lax.optimization_barrier((arguments, results[-1]))
            results.append(function(*arguments))
        return results

    return run


def environment() -> dict[str, str]:
    """Return the device, machine, version of JAX and date, to be recorded with a time."""
    return {
        "device": jax.devices()[0].device_kind,
        "machine": platform.processor() or platform.machine(),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _calls_per_round(call: AsyncCall) -> int:
    """Return how many calls fill a round.

    The number grows step by step: a single call is no estimate, because dispatch dominates it.
    """
    count = 1
    while (seconds := _seconds(call, count)) < ROUND_SECONDS:
        count = max(count + 1, min(10 * count, math.ceil(count * ROUND_SECONDS / seconds)))
    return count


def _seconds(call: AsyncCall, count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        result = call.start()
    call.wait(result)
    return time.perf_counter() - started
