"""Training by real processes of this machine: losses, restarts, other splits, and refusals."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import small_runs

from experiments.errors import InputError
from experiments.training import processes, records

ROOT = pathlib.Path(__file__).parents[1]
TRAIN = [sys.executable, str(ROOT / "tests/tiny_training.py")]
TOO_LONG_SECONDS = 400


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Settings of a run of 40 steps of 16 digits; what is compiled once is kept for all runs."""
    folder = tmp_path_factory.mktemp("processes")
    data_dir = small_runs.write_digits(folder / "data", size=165, side=20)
    return {
        "dataset": "mnist",
        "data_dir": data_dir,
        "compilation_cache": folder / "compiled",
        "batch_size": 16,
        "num_epochs": 4,
        "conv_channels": 2,
        "primary_types": 2,
        "capsule_length": 3,
        "log_every_steps": 1,
        "checkpoint_every_steps": 4,
    }


def environment(devices=1):
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }


def command(flags, **changes):
    return [*TRAIN, *(f"--{name}={value}" for name, value in {**flags, **changes}.items())]


class Launched:
    """A run started by `launch`, in a session of its own; `lines` are its stderr so far."""

    def __init__(self, training, *, processes, restarts=0, devices=1):
        launch = [sys.executable, "-m", "experiments.launch", f"--num_processes={processes}"]
        self.run = subprocess.Popen(
            [*launch, f"--restarts={restarts}", "--", *training],
            stderr=subprocess.PIPE,
            text=True,
            env=environment(devices),
            start_new_session=True,
        )
        self.lines = []
        # Processes that wait for each other for ever would have the tests wait, too.
        self.timer = threading.Timer(TOO_LONG_SECONDS, self.kill)
        self.timer.start()

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.run.pid, signal.SIGKILL)

    def wait_for(self, pattern):
        while True:
            line = self.run.stderr.readline()
            assert line, "".join(self.lines)
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found

    def pids(self, count):
        return [int(self.wait_for(rf"process {n} is (\d+)")[1]) for n in range(count)]

    def end(self):
        self.lines += self.run.stderr.readlines()
        return self.run.wait()


@pytest.fixture
def launch():
    with contextlib.ExitStack() as stack:

        def start(*arguments, **options):
            launched = Launched(*arguments, **options)

            def stop():
                launched.timer.cancel()
                launched.kill()
                launched.run.wait()
                launched.run.stderr.close()

            stack.callback(stop)
            return launched

        yield start


def rows(workdir):
    return {row["step"]: row | {"images_per_second": 0} for row in records.read_metrics(workdir)}


@pytest.mark.parametrize(
    ("count", "victim", "number"),
    [(2, 1, signal.SIGKILL), (4, 0, signal.SIGKILL), (4, 2, signal.SIGSTOP)],
)
def test_a_lost_process_is_named_by_all_that_are_left(
    launch, flags, tmp_path, count, victim, number
):
    workdir = tmp_path / "run"
    training = command(flags, workdir=workdir, num_epochs=10_000, data_parallel=-1)
    launched = launch(training, processes=count)
    pids = launched.pids(count)
    launched.wait_for(r"step 8 ")
    os.kill(pids[victim], number)
    killed = time.monotonic()
    lost = (
        rf"lost process {victim}{' .the coordinator.' * (victim == 0)} of {count}; the last good "
    )
    for _ in range(count - 1):
        found = launched.wait_for(
            rf"^tiny_training: {lost}checkpoint is that of step (\d+) in (.*)"
        )
        assert found[2] == str(workdir)
        assert int(found[1]) % 4 == 0
    for _ in range(count - 1):
        launched.wait_for(r"process \d ended with status 75")
    assert time.monotonic() - killed < 15
    assert launched.end() in (75, 128 + signal.SIGKILL)


def test_a_run_that_loses_a_process_ends_as_an_unbroken_one(launch, flags, tmp_path):
    """On 8 devices bit for bit; and on 2 devices, then 1, it goes on as one device does."""
    spread = {"max_steps": 20, "data_parallel": 4, "capsule_parallel": -1}
    one, whole, many = tmp_path / "one", tmp_path / "whole", tmp_path / "many"
    subprocess.run(command(flags, workdir=one), check=True, env=environment())
    unbroken = launch(command(flags, workdir=whole, **spread), processes=2, devices=4)
    assert unbroken.end() == 0, "".join(unbroken.lines)
    broken = launch(command(flags, workdir=many, **spread), processes=2, restarts=1, devices=4)
    victim = broken.pids(2)[1]
    broken.wait_for(r"step 10 ")
    os.kill(victim, signal.SIGKILL)
    assert broken.end() == 0, "".join(broken.lines)
    assert re.search(r"going on from step (8|12) of 20", "".join(broken.lines))
    assert rows(many) == rows(whole)
    for process in (0, 1):
        written = (many / "checkpoints/20").glob(f"default/ocdbt.process_{process}/d/*")
        assert sum(path.stat().st_size for path in written) > 2**20, "a small share"

    two = command(flags, workdir=many, max_steps=30, data_parallel=2)
    subprocess.run(two, check=True, env=environment(devices=2))
    subprocess.run(command(flags, workdir=many), check=True, env=environment())
    wanted, found = rows(one), rows(many)
    assert found.keys() == wanted.keys() | {20, 30}
    for step, row in wanted.items():
        for name, value in row.items():
            np.testing.assert_allclose(
                found[step][name], value, rtol=1e-4, err_msg=f"{step} {name}"
            )


def test_a_signal_to_one_process_saves_and_ends_all(launch, flags, tmp_path):
    workdir = tmp_path / "run"
    training = command(flags, workdir=workdir, num_epochs=10_000, data_parallel=2)
    launched = launch(training, processes=2)
    pids = launched.pids(2)
    launched.wait_for(r"step 6 ")
    os.kill(pids[1], signal.SIGTERM)
    step = int(launched.wait_for(r"SIGTERM: saved at step (\d+); the same --workdir goes on")[1])
    assert launched.end() == 128 + signal.SIGTERM
    assert not any("lost" in line or "Traceback" in line for line in launched.lines)
    assert list(rows(workdir))[-1] == step


def test_the_processes_of_a_slurm_job_find_each_other(flags, tmp_path):
    """What `srun` sets, and jax reads: rank, number of ranks, hosts, and the port from the job."""
    job = next(number for number in range(os.getpid(), 2**22) if is_free(61440 + number % 4096))
    shared = {"SLURM_JOB_ID": f"{job}", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    training = command(flags, workdir=tmp_path / "run", max_steps=4, data_parallel=2)
    runs = [
        subprocess.Popen(
            training,
            env=environment() | shared | {"SLURM_PROCID": f"{own}", "SLURM_LOCALID": f"{own}"},
        )
        for own in range(2)
    ]
    assert [run.wait(timeout=100) for run in runs] == [0, 0]
    assert list(rows(tmp_path / "run")) == [1, 2, 3, 4]


def is_free(port):
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) != 0


def refused(commands, folders=(None, None)):
    """The last lines of processes that do not want to train, each started in its folder."""
    runs = [
        subprocess.Popen(
            arguments, stderr=subprocess.PIPE, text=True, env=environment(), cwd=folder
        )
        for arguments, folder in zip(commands, folders, strict=False)
    ]
    texts = [run.communicate(timeout=100)[1] for run in runs]
    assert [run.returncode for run in runs] == [2] * len(runs), texts
    return [[line for line in text.splitlines() if line.startswith("tiny_tr")] for text in texts]


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_processes_with_different_settings_are_refused(flags, tmp_path):
    address = f"localhost:{free_port()}"
    shared = {"coordinator_address": address, "num_processes": 2, "data_parallel": 2}
    changes = [{"learning_rate": 0.1}, {"learning_rate": 0.2, "data_dir": tmp_path / "other"}]
    small_runs.write_digits(tmp_path / "other", size=70, side=20)
    lines = refused(
        command(flags, workdir=tmp_path / "run", process_id=own, **shared, **change)
        for own, change in enumerate(changes)
    )
    message = (
        r"tiny_training: the processes differ: learning_rate 0.1 in process 0, 0.2 in "
        r"process 1; data_sha256 '\w+' in process 0, '\w+' in process 1"
    )
    for [line] in lines:
        assert re.fullmatch(message, line)
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_is_not_shared_is_refused(flags, tmp_path):
    """Each process has a folder of its own under the same name, as on disks of two machines."""
    shared = {"coordinator_address": f"localhost:{free_port()}", "num_processes": 2}
    folders = [tmp_path / "here", tmp_path / "there"]
    for folder in folders:
        folder.mkdir()
    lines = refused(
        (
            command(flags, workdir="run", data_parallel=2, process_id=own, **shared)
            for own in range(2)
        ),
        folders,
    )
    line = (
        "tiny_training: workdir run must be on a disk that all processes share: a run there: True "
        "in process 0, False in process 1"
    )
    assert lines == [[line], [line]]


def test_lost_checkpoints_are_refused_by_all_processes(flags, tmp_path):
    shared = {"workdir": tmp_path / "run", "max_steps": 4}
    subprocess.run(command(flags, **shared), check=True, env=environment())
    (tmp_path / "run/checkpoints/4/record.json").unlink()
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    shared |= {"coordinator_address": f"localhost:{free_port()}", "num_processes": 2}
    lines = refused(command(flags, **shared, data_parallel=2, process_id=own) for own in range(2))
    line = (
        f"tiny_training: workdir {tmp_path}/run was trained to step 4, but {tmp_path}/run/"
        "checkpoints has no complete checkpoint (found 4 without record.json); put them back, or "
        f"to start again remove {tmp_path}/run or use another --workdir"
    )
    assert lines == [[line], [line]]
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    assert (tmp_path / "run/checkpoints/4/default").exists()


def test_a_port_in_use_is_refused(flags):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        address = f"localhost:{taken.getsockname()[1]}"
        [[line]] = refused([command(flags, coordinator_address=address, num_processes=2)])
    assert line == (
        f"tiny_training: --coordinator_address must have a free port, got {address}: Address "
        "already in use"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_processes": 2}, "--num_processes and --process_id need --coordinator_address=.*"),
        ({"coordinator_address": "here"}, "--coordinator_address must be HOST:PORT, got 'here'"),
        (
            {"coordinator_address": "here:1", "process_id": 3},
            "--process_id must be below --num_processes=1, got 3",
        ),
        ({"data_parallel": 2}, ".* must be at most the 1 devices, got 2 x 1"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, tmp_path, changes, message):
    [[line]] = refused([command(flags, workdir=tmp_path / "run", **changes)])
    assert re.fullmatch(f"tiny_training: {message}", line)


def test_processes_that_do_not_come_are_waited_for_once(monkeypatch):
    def initialize(*_, **__):
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: after 300s\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    settings = processes.Settings("localhost:1234", 2, 1)
    message = "^--coordinator_address=localhost:1234: not all 2 processes came .*: after 300s$"
    with pytest.raises(InputError, match=message):
        processes.start(settings, may_be_cluster=False)
