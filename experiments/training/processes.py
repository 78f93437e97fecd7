"""Training by several processes: how they find each other, agree, and notice that one is lost."""

import atexit
import contextlib
import ctypes
import dataclasses
import json
import os
import pathlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src.distributed import global_state  # its client alone knows which processes live
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.cli import flag
from experiments.errors import InputError

T = TypeVar("T")
LOST = 75  # exit status of a process that cannot go on without another; a restart may help
HEARTBEAT_SECONDS = 10  # without a sign of life; jax notices after 7 to 11


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which process this is; none is needed where JAX finds that out, as on SLURM or a TPU pod."""

    coordinator_address: str = flag(
        "", "HOST:PORT of process 0; empty: one process, or a cluster's.", affects_result=False
    )
    num_processes: int = flag(1, "Processes of the run.", minimum=1, affects_result=False)
    process_id: int = flag(0, "Which of them this is.", minimum=0, affects_result=False)


def start(settings: Settings, *, may_be_cluster: bool) -> None:
    """Joins the other processes, if there are any; the first use of JAX must come after it.

    Args:
      settings: Those of this process.
      may_be_cluster: Whether to ask JAX for the processes of a cluster, if none are named.

    Raises:
      InputError: The flags do not fit each other, the port is in use, or another process does not
        come within the five minutes that JAX waits.
    """
    if jax.distributed.is_initialized():
        return
    address, count, own = settings.coordinator_address, settings.num_processes, settings.process_id
    if not address and (count > 1 or own):
        raise InputError("--num_processes and --process_id need --coordinator_address=HOST:PORT")
    if not address and not may_be_cluster:
        return
    # Else the loss of any process would end all the others before they could name it.
    jax.config.update("jax_enable_recoverability", True)
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
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # jax swallows it


def is_lead() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def together(action: Callable[[], T]) -> T:
    """Calls the same function in every process.

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
    _refuse(first_reason(reason))
    return result  # type: ignore[return-value]


def gather(action: Callable[[], T]) -> list[T]:
    """Calls the same function in every process, and returns all results, which JSON can write.

    Raises:
      InputError: As `together`.
    """
    own = together(action)
    return [json.loads(text) for text in _texts(json.dumps(own))]


def on_lead(action: Callable[[], T]) -> T | None:
    """Does something in process 0 alone; None in the others.

    Raises:
      InputError: It cannot be done there; all processes say why.
    """
    return together(lambda: action() if is_lead() else None)


def first_reason(reason: str) -> str:
    """The reason of the first process that has one, in all of them."""
    return next(filter(None, _texts(reason)), "")


def from_lead(tree: T) -> T:
    """The arrays of process 0, in every process."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


def check_same(facts: dict[str, Any], rule: str = "the processes differ") -> None:
    """Raises InputError in all processes if their facts differ: the rule, and what differs."""
    texts = _texts("\n".join(repr(value) for value in facts.values()))
    values = [text.split("\n") for text in texts]
    for process, other in enumerate(values):
        differing = [
            f"{name} {here} in process 0, {there} in process {process}"
            for name, here, there in zip(facts, values[0], other, strict=True)
            if here != there
        ]
        if differing:
            _refuse(f"{rule}: {'; '.join(differing)}")


def agreed(stopped: Callable[[], int]) -> Callable[[], int]:
    """A function that says the same in all processes: the signal that any of them was sent.

    All must call it equally often. It tells what was so one call before, so that no step waits.
    """
    if jax.process_count() == 1:
        return stopped
    mesh = Mesh(np.array(jax.devices()), "all")
    by_device = NamedSharding(mesh, PartitionSpec("all"))
    largest = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    asked: list[jax.Array] = []
    received = 0

    def ask() -> int:
        nonlocal received
        if not received:
            flags = np.full(mesh.size, stopped(), np.int32)
            asked.append(
                largest(
                    jax.make_array_from_callback(flags.shape, by_device, lambda part: flags[part])
                )
            )
            received = int(asked.pop(0)) if len(asked) > 1 else 0
        return received

    return ask


@contextlib.contextmanager
def watched(last_checkpoint: Callable[[], str]) -> Iterator[Callable[[int], None]]:
    """Inside, the loss of another process ends this one with a line that names it.

    Args:
      last_checkpoint: Says from where a restart goes on.

    Yields:
      A function to be told the exit status when all is done: from then on no one is missed.
    """
    over = threading.Event()
    status = LOST

    def finish(value: int) -> None:
        nonlocal status
        status = value
        over.set()

    if jax.process_count() == 1:
        yield finish
        return
    client: Any = global_state.client
    everyone = list(range(jax.process_count()))
    program = pathlib.Path(sys.argv[0]).stem

    def end(lost: str) -> None:
        line = f"{program}: lost {lost} of {len(everyone)}; {last_checkpoint()}\n"
        os.write(2, line.encode())
        _outlive()
        os._exit(LOST)

    def watch() -> None:
        while not over.wait(1):
            try:
                # Waits for all to ask it, or to be given up.
                live = client.get_live_nodes(everyone)
            except jax.errors.JaxRuntimeError:
                return  # the coordinator is lost, of which jax tells below
            lost = [process for process in everyone if process not in live]
            if lost and not over.is_set():
                end(f"process{'es' * (len(lost) > 1)} {', '.join(map(str, lost))}")

    # jax aborts when the coordinator is lost, from a thread of its own where no exception helps.
    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def aborted(number: int) -> None:
        del number
        if not over.is_set():
            end("process 0 (the coordinator)")
        os._exit(status)

    ctypes.CDLL(None).signal(signal.SIGABRT, aborted)
    _kept.append(aborted)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield finish
    except InputError:
        raise
    except (jax.errors.JaxRuntimeError, ValueError):
        # A connection broke: whose, the thread knows after some heartbeats.
        time.sleep(2 * HEARTBEAT_SECONDS)
        raise
    finally:
        over.set()


_kept: list[Any] = []  # handlers that C calls until the process ends


def _refuse(reason: str) -> None:
    if reason:
        atexit.register(_outlive)  # not now: the others end meanwhile, and would be missed
        raise InputError(reason)


def _outlive() -> None:
    """Lets process 0 end after the others: what they ask when they end is a service of its."""
    if is_lead():
        time.sleep(2)


def _texts(text: str) -> list[str]:
    """The texts of all processes."""
    if jax.process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(own.size))
    padded = np.pad(own, (0, int(sizes.max()) - own.size + 1))
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def _check_address(address: str, *, listens: bool) -> None:
    """Raises InputError unless it is HOST:PORT, with a port that is free if this one listens."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
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
