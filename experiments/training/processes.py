"""Training by several processes: joining them, agreeing on errors and signals, losing one."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.cli import flag
from experiments.errors import InputError

T = TypeVar("T")
LOST = 75  # exit status of a process that cannot go on without another; a restart may help
HEARTBEAT_SECONDS = 10  # without a sign of life, after which a process counts as lost


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of `jax.distributed.initialize`; clusters that JAX knows need none of them."""

    coordinator_address: str = flag(
        "",
        "HOST:PORT of process 0; empty: one process, or JAX asks the cluster (SLURM, TPU pod).",
        affects_result=False,
    )
    num_processes: int = flag(
        1, "Number of processes in the run.", minimum=1, maximum=2**16, affects_result=False
    )
    process_id: int = flag(
        0, "Index of this process, from 0.", minimum=0, maximum=2**16 - 1, affects_result=False
    )


def start(settings: Settings, *, may_be_cluster: bool) -> None:
    """Join the other processes, if there are any, before the first use of a device.

    Args:
      settings: Address, number and index.
      may_be_cluster: Whether JAX looks for a cluster if there is no address.

    Raises:
      InputError: The flags contradict each other, the port is in use, or a process does not join
        within the five minutes that JAX waits.
    """
    if jax.distributed.is_initialized():
        return
    address, count, own = settings.coordinator_address, settings.num_processes, settings.process_id
    if not address and (count > 1 or own):
        raise InputError("--num_processes and --process_id need --coordinator_address=HOST:PORT")
    if not address and not may_be_cluster:
        return
    if address:
        if own >= count:
            raise InputError(f"--process_id must be below --num_processes={count}, got {own}")
        _check_address(address, listens=own == 0)
        try:
            jax.distributed.initialize(
                address, count, own, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
            )
        except jax.errors.JaxRuntimeError as error:
            raise InputError(
                f"--coordinator_address={address}: not all {count} processes came together: "
                f"{str(error).splitlines()[0]}"
            ) from error
    else:
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        except ValueError as error:
            if "coordinator_address should be defined" not in str(error):
                raise
            return  # no cluster
    # jax installs a handler that would ignore SIGTERM outside the training loop.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def is_lead() -> bool:
    """Return whether this is process 0, the one that writes logs, metrics and figures."""
    return jax.process_index() == 0


def together(action: Callable[[], T]) -> T:
    """Call the same function in every process.

    Raises:
      InputError: It fails in one of them; all raise that one's error.
    """
    if jax.process_count() == 1:
        return action()
    result, reason = None, ""
    try:
        result = action()
    except (InputError, OSError) as error:  # else the others would wait for this one
        reason = str(error)
    if reason := first_reason(reason):
        raise InputError(reason)
    return result  # type: ignore[return-value]


def gather(action: Callable[[], T]) -> list[T]:
    """Call the same function in every process, and return all results, which JSON can write.

    Raises:
      InputError: As `together`.
    """
    own = together(action)
    return [json.loads(text) for text in _texts(json.dumps(own))]


def on_lead(action: Callable[[], T]) -> T | None:
    """Call a function in process 0 alone; the others get None.

    Raises:
      InputError: It fails there; all processes raise its error.
    """
    return together(lambda: action() if is_lead() else None)


def first_reason(reason: str) -> str:
    """Return in all processes the first text of any process that is not empty, or an empty one."""
    return next(filter(None, _texts(reason)), "")


def from_lead(tree: T) -> T:
    """Return the small arrays of process 0 in every process."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


def check_same(facts: dict[str, Any], rule: str = "the processes differ") -> None:
    """Raise InputError in all processes if their values differ: the rule, and the differences."""
    texts = _texts("\n".join(repr(value) for value in facts.values()))
    values = [text.split("\n") for text in texts]
    for process, other in enumerate(values):
        differing = [
            f"{name} {here} in process 0, {there} in process {process}"
            for name, here, there in zip(facts, values[0], other, strict=True)
            if here != there
        ]
        if differing:
            raise InputError(f"{rule}: {'; '.join(differing)}")


def agreed(stopped: Callable[[], int]) -> Callable[[], int]:
    """Make a function that returns in all processes the signal that any of them received.

    All must call it equally often. It tells what was so one call before, so that no step waits.
    JAX's own `reached_preemption_sync_point` knows SIGTERM alone and not which signal it was,
    and its handler of SIGTERM ignores every later one.
    """
    if jax.process_count() == 1:
        return stopped
    by_device = NamedSharding(Mesh(np.array(jax.devices()), "all"), PartitionSpec("all"))
    largest = jax.jit(jnp.max)
    asked: list[jax.Array] = []
    received = 0

    def ask() -> int:
        nonlocal received
        if not received:
            own = np.full(jax.local_device_count(), stopped(), np.int32)
            asked.append(largest(jax.make_array_from_process_local_data(by_device, own)))
            received = int(asked.pop(0)) if len(asked) > 1 else 0
        return received

    return ask


@contextlib.contextmanager
def one_line_on_loss(last_checkpoint: Callable[[], str]) -> Iterator[None]:
    """End this process with one line and status 75 when its connection to another one breaks.

    A process that only falls silent breaks no connection: after `HEARTBEAT_SECONDS` jax aborts all
    others.

    Args:
      last_checkpoint: Says from where a restart goes on.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        program, reason = pathlib.Path(sys.argv[0]).stem, str(error).splitlines()[0]
        # jax also raises XLA's errors, which begin with a status such as UNKNOWN, as ValueErrors.
        if jax.process_count() == 1 or not re.match("[A-Z_]+: ", reason):
            raise
        line = f"{program}: lost another process ({reason}); {last_checkpoint()}\n"
        os.write(2, line.encode())
        os._exit(LOST)  # without jax's shutdown, which waits for the lost process


def _texts(text: str) -> list[str]:
    """Return the texts of all processes, by process."""
    if jax.process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(own.size))
    padded = np.pad(own, (0, int(sizes.max()) - own.size + 1))
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def _check_address(address: str, *, listens: bool) -> None:
    """Raise InputError unless it is HOST:PORT, with a free port if this process listens."""
    host, _, port = address.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise InputError(f"--coordinator_address must be HOST:PORT, got {address!r}")
    if listens:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", int(port)))
            except OSError as error:
                raise InputError(
                    f"--coordinator_address must have a free port, got {address}: {error.strerror}"
                ) from error
