"""Starts the processes of a training run on this machine, and again when one is lost.

python -m experiments.launch --num_processes=4 -- python -m experiments.train_mnist --workdir=…
"""

import dataclasses
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from absl import logging

from experiments import cli
from experiments.cli import flag
from experiments.errors import InputError
from experiments.training import signals

STOPS = (signal.SIGINT, signal.SIGTERM)
GRACE_SECONDS = 20  # from the end of the first process to that of the others


@dataclasses.dataclass(frozen=True)
class Config:
    """How many processes, and how often."""

    num_processes: int = flag(2, "Processes to start.", minimum=1)
    restarts: int = flag(0, "Starts from the last checkpoint after a loss.", minimum=0)


def main(command: list[str], config: Config) -> int:
    """Runs the command in so many processes; the exit status is the first that is not 0."""
    if not command:
        raise InputError("give the command after --, as in: -- python -m experiments.train_mnist")
    with signals.stop_requests() as stopped:
        for restart in range(config.restarts + 1):
            if restart:
                logging.info(
                    "starting all processes again from the last checkpoint: restart %d of %d",
                    *(restart, config.restarts),
                )
            statuses = _run(command, config.num_processes, stopped)
            bad = [status for status in statuses if status]
            if not bad:
                return 0
            # What cannot be used the next start cannot use either; and who stops it means all.
            if stopped() or {2, *(128 + number for number in STOPS)} & set(bad):
                break
    return next((status for status in bad if status == 2), bad[0])


def _run(command: list[str], count: int, stopped: Callable[[], int]) -> list[int]:
    """The exit statuses of all processes, those of a signal as a shell's."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    processes: list[subprocess.Popen[bytes]] = []
    for number in range(count):
        own = [
            f"--coordinator_address={address}",
            f"--num_processes={count}",
            f"--process_id={number}",
        ]
        try:
            processes.append(subprocess.Popen([*command, *own]))
        except OSError as error:
            for process in processes:
                process.kill()
            raise InputError(f"{command[0]} cannot be started: {error.strerror}") from error
        logging.info("process %d is %d", number, processes[-1].pid)
    told, deadline, codes = 0, float("inf"), dict[int, int]()
    while len(codes) < count:
        for number, process in enumerate(processes):
            if number in codes or (code := process.poll()) is None:
                continue
            codes[number] = 128 - code if code < 0 else code
            if code:
                logging.info("process %d ended with status %d", number, codes[number])
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if stopped() and not told:
            told = stopped()
            for process in processes:
                process.send_signal(signal.SIGTERM)
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()  # a stopped one too
        time.sleep(0.1)
    return [codes[number] for number in range(count)]


if __name__ == "__main__":
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given = sys.argv[split + 1 :]
    del sys.argv[split:]
    cli.run(Config, lambda config: main(given, config))
