"""Launch the processes of a multi-process training run on this machine.

python -m experiments.launch --num_processes=4 -- python -m experiments.train_mnist --workdir=…
"""

import ctypes
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from absl import logging

import experiments
from experiments import cli
from experiments.cli import flag
from experiments.errors import InputError
from experiments.training import signals

GRACE_SECONDS = 20  # from the first failure until all other processes are killed


@dataclasses.dataclass(frozen=True)
class Config:
    """Number of processes and restarts."""

    num_processes: int = flag(2, "Processes to start.", minimum=1, maximum=1024)
    restarts: int = flag(
        0, "Restarts from the last checkpoint after a process fails.", minimum=0, maximum=10_000
    )


def main(command: list[str], config: Config) -> int:
    """Run the command in all processes, and restart all of them if one fails.

    Returns:
      The exit status: 0, or the first non-zero one of a process.

    Raises:
      InputError: `command` is empty or cannot be started.
    """
    if not command:
        raise InputError("the command must follow --: -- python -m experiments.train_mnist")
    with signals.stop_requests() as stopped:
        for restart in range(config.restarts + 1):
            if restart:
                logging.info(
                    "restarting all processes from the last checkpoint: restart %d of %d",
                    *(restart, config.restarts),
                )
            statuses = run_once(command, config.num_processes, stopped)
            failures = [status for status in statuses if status]
            if not failures:
                return 0
            # No restart: invalid input (2) fails again, and a stop signal ends the whole run.
            if stopped() or {2, *(128 + number for number in experiments.STOP_SIGNALS)} & set(
                failures
            ):
                break
    return next((status for status in failures if status == 2), failures[0])


def run_once(command: list[str], count: int, stopped: Callable[[], int]) -> list[int]:
    """Start `count` processes, wait for all, and return their exit statuses.

    The status of a process that was ended by signal n is 128 + n. `stopped` returns the number of
    the stop signal that this program has received, or 0.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    processes: list[subprocess.Popen[bytes]] = []
    for number in range(count):
        flags = [
            f"--coordinator_address={address}",
            f"--num_processes={count}",
            f"--process_id={number}",
        ]
        try:
            process = subprocess.Popen([*command, *flags], preexec_fn=end_with(os.getpid()))
            processes.append(process)
        except OSError as error:
            for process in processes:
                process.kill()
            raise InputError(f"{command[0]} cannot be started: {error.strerror}") from error
        logging.info("process %d is %d", number, processes[-1].pid)
    forwarded, deadline, codes = 0, float("inf"), dict[int, int]()
    while len(codes) < count:
        for number, process in enumerate(processes):
            if number in codes or (code := process.poll()) is None:
                continue
            codes[number] = 128 - code if code < 0 else code
            if code:
                logging.info("process %d ended with status %d", number, codes[number])
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if stopped() and not forwarded:
            forwarded = stopped()
            for process in processes:
                process.send_signal(signal.SIGTERM)
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()  # SIGKILL ends even processes that are suspended
        time.sleep(0.1)
    return [codes[number] for number in range(count)]


def end_with(launcher: int) -> Callable[[], None] | None:
    """Return what a new process calls to get SIGTERM when the launcher dies, however it does.

    Its training saves then, and ends. Only Linux has this.
    """
    if sys.platform != "linux":
        return None
    prctl, set_death_signal = ctypes.CDLL(None).prctl, 1  # PR_SET_PDEATHSIG of <linux/prctl.h>

    def ask() -> None:
        prctl(set_death_signal, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != launcher:  # it died before
            os._exit(128 + signal.SIGTERM)

    return ask


if __name__ == "__main__":
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    command = sys.argv[split + 1 :]
    del sys.argv[split:]
    cli.run(Config, lambda config: main(command, config))
