"""Training by several processes: restarts after a loss, stop signals, SLURM, and refusals."""

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

from experiments import train_mnist
from experiments.analysis import inspection
from experiments.errors import InputError
from experiments.training import mnist, processes, records

ROOT = pathlib.Path(__file__).parents[1]
TRAIN = [sys.executable, str(ROOT / "tests/tiny_training.py")]
TOO_LONG_SECONDS = 400


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Settings of a run of 20 steps of 16 digits."""
    folder = tmp_path_factory.mktemp("processes")
    data_dir = small_runs.write_digits(folder / "data", size=165, side=20)
    return {
        "dataset": "mnist",
        "data_dir": data_dir,
        "batch_size": 16,
        "num_epochs": 2,
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
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {small_runs.QUICK}",
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


def train_here(flags, monkeypatch, **changes):
    """Trains in this process, on its one device."""
    monkeypatch.setattr(inspection, "report", lambda *_, **__: None)
    config = mnist.Config(**{**flags, **changes})
    assert train_mnist.main(config) == 0


LOSS = r"^tiny_training: lost another process \(.*\); "


def test_when_a_process_is_killed_the_other_ends_with_one_line(launch, flags, tmp_path):
    # Without saves, in which processes wait for each other without a connection that can break.
    workdir, rare = tmp_path / "run", {"num_epochs": 10_000, "checkpoint_every_steps": 10**9}
    training = command(flags, workdir=str(workdir), data_parallel=-1, **rare)
    launched = launch(training, processes=2)
    pids = launched.pids(2)
    launched.wait_for(r"step 8 ")
    os.kill(pids[1], signal.SIGKILL)
    found = launched.wait_for(rf"{LOSS}there is no checkpoint yet in (.*)")
    assert found[1] == str(workdir)
    launched.wait_for(rf"process 0 ended with status {processes.LOST}$")
    assert launched.end() in (processes.LOST, 128 + signal.SIGKILL)


def test_when_a_process_falls_silent_the_other_ends(launch, flags, tmp_path):
    """Without heartbeats of the other, jax aborts, or a save fails first and says so in a line."""
    workdir = tmp_path / "run"
    training = command(flags, workdir=str(workdir), num_epochs=10_000, data_parallel=-1)
    launched = launch(training, processes=2)
    pids = launched.pids(2)
    launched.wait_for(r"step 8 ")
    os.kill(pids[1], signal.SIGSTOP)
    stopped_at = time.monotonic()
    status = int(launched.wait_for(r"process 0 ended with status (\d+)$")[1])
    assert time.monotonic() - stopped_at < 3 * processes.HEARTBEAT_SECONDS
    if status == processes.LOST:
        line = rf"{LOSS}the last good checkpoint is that of step \d*[048] in {workdir}"
        assert re.search(line, "".join(launched.lines), re.MULTILINE)
    else:
        assert status == 128 + signal.SIGABRT
    assert launched.end() in (status, 128 + signal.SIGKILL)


def test_a_run_that_loses_its_coordinator_ends_as_an_unbroken_one(
    launch, flags, tmp_path, monkeypatch
):
    """On 8 devices bit for bit; and on 2 devices, then 1, it goes on as one device does."""
    spread = {"max_steps": 10, "data_parallel": 4, "capsule_parallel": -1, "diagnostics": True}
    one, whole, many = (str(tmp_path / name) for name in ("one", "whole", "many"))
    train_here(flags, monkeypatch, workdir=one, diagnostics=True)
    unbroken = launch(command(flags, workdir=whole, **spread), processes=2, devices=4)
    assert unbroken.end() == 0, "".join(unbroken.lines)
    assert f"figures are in {whole}/figures" in "".join(unbroken.lines)
    broken = launch(command(flags, workdir=many, **spread), processes=2, restarts=1, devices=4)
    victim = broken.pids(2)[0]
    broken.wait_for(r"step 5 ")
    os.kill(victim, signal.SIGKILL)
    assert broken.end() == 0, "".join(broken.lines)
    assert re.search(r"going on from step (4|8) of 10", "".join(broken.lines))
    assert rows(many) == rows(whole)
    for process in (0, 1):
        written = pathlib.Path(many).glob(f"checkpoints/10/default/ocdbt.process_{process}/d/*")
        assert sum(path.stat().st_size for path in written) > 2**20, "a small share"

    two = command(flags, workdir=many, max_steps=15, data_parallel=2)
    subprocess.run(two, check=True, env=environment(devices=2))
    train_here(flags, monkeypatch, workdir=many)
    wanted, found = rows(one), rows(many)
    assert found.keys() == wanted.keys() | {15}
    for step, row in wanted.items():
        assert {"train_loss", "train_error"} <= row.keys() & found[step].keys()
        for name in row.keys() & found[step].keys():  # a run's last step is tested too
            np.testing.assert_allclose(
                found[step][name], row[name], rtol=1e-4, atol=1e-6, err_msg=f"{step} {name}"
            )


def test_a_signal_to_one_process_of_a_slurm_job_saves_and_ends_all(flags, tmp_path):
    """The processes find each other by what `srun` sets: rank, ranks, hosts, and the job's port."""
    job = next(number for number in range(os.getpid(), 2**22) if is_free(61440 + number % 4096))
    shared = {"SLURM_JOB_ID": f"{job}", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    workdir = tmp_path / "run"
    training = command(flags, workdir=str(workdir), num_epochs=10_000, data_parallel=2)
    runs = [
        subprocess.Popen(
            training,
            env=environment() | shared | {"SLURM_PROCID": f"{own}", "SLURM_LOCALID": f"{own}"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in range(2)
    ]
    try:
        lines = []
        while not any("step 6 " in line for line in lines):
            lines.append(runs[0].stderr.readline())
            assert lines[-1], "".join(lines)
        runs[1].send_signal(signal.SIGTERM)
        texts = [run.communicate(timeout=100)[1] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [128 + signal.SIGTERM] * 2, texts
    found = re.search(r"SIGTERM: saved at step (\d+); the same --workdir goes on", texts[0])
    assert list(rows(workdir))[-1] == int(found[1])
    assert not any("lost" in text or "Traceback" in text for text in texts)


def is_free(port):
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) != 0


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_what_one_process_cannot_use_all_refuse_for_the_same_reason(flags, tmp_path):
    """Settings or data that differ, a workdir that is not shared, and lost checkpoints."""
    folder = tmp_path / "runs"
    folder.mkdir()
    program = [sys.executable, str(ROOT / "tests/refused_training.py")]
    shared = flags | {
        "coordinator_address": f"localhost:{free_port()}",
        "num_processes": 2,
        "data_parallel": 2,
        "other_data_dir": small_runs.write_digits(tmp_path / "other", size=70, side=20),
        "folder": folder,
    }
    runs = [
        subprocess.Popen(
            [*program, *(f"--{name}={value}" for name, value in (shared | own).items())],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for own in ({"process_id": 0}, {"process_id": 1})
    ]
    outputs = [run.communicate(timeout=200) for run in runs]
    assert [run.returncode for run in runs] == [2, 2], outputs
    differing = (
        r"the processes differ: learning_rate 0.1 in process 0, 0.2 in process 1; "
        r"data_sha256 '\w+' in process 0, '\w+' in process 1"
    )
    apart = (
        "workdir run must be on a disk that all processes share: a run there: True in process 0, "
        "False in process 1"
    )
    lost = (
        f"refused_training: workdir {folder}/run was trained to step 4, but {folder}/run/"
        "checkpoints has no complete checkpoint (found 4 without record.json); put them back, or "
        f"to start again remove {folder}/run or use another --workdir"
    )
    for stdout, stderr in outputs:
        first, second = (line for line in stdout.splitlines() if not line.startswith("[Gloo]"))
        assert re.fullmatch(differing, first)
        assert second == apart
        assert stderr.splitlines().count(lost) == 1
    assert not (folder / "differing").exists()
    assert list(rows(folder / "run")) == [1, 2, 3, 4]
    assert (folder / "run/checkpoints/4/default").exists()


def test_a_port_in_use_is_refused():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        address = f"localhost:{taken.getsockname()[1]}"
        message = f"^--coordinator_address must have a free port, got {address}: Address already in"
        with pytest.raises(InputError, match=message):
            processes.start(processes.Settings(address, 2, 0), may_be_cluster=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("", 2, 0), "--num_processes and --process_id need --coordinator_address=HOST:PORT"),
        (("here", 1, 0), "--coordinator_address must be HOST:PORT, got 'here'"),
        (("here:1", 1, 3), "--process_id must be below --num_processes=1, got 3"),
    ],
)
def test_flags_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        processes.start(processes.Settings(*settings), may_be_cluster=False)


def test_processes_that_do_not_come_are_waited_for_once(monkeypatch):
    def initialize(*_, **__):
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: after 300s\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    settings = processes.Settings("localhost:1234", 2, 1)
    message = "^--coordinator_address=localhost:1234: not all 2 processes came .*: after 300s$"
    with pytest.raises(InputError, match=message):
        processes.start(settings, may_be_cluster=False)


def test_processes_end_when_their_launcher_is_killed(launch):
    launched = launch(["sh", "-c", "exec sleep 100"], processes=2)
    pids = launched.pids(2)
    launched.run.kill()
    launched.run.wait()
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("script", "status", "starts"),
    [
        ("exit 0", 0, 1),
        ("exit 75", 75, 3),  # lost another process: two restarts
        ("exit 2", 2, 1),  # bad input is as bad the next time
        ("kill -TERM $$", 128 + signal.SIGTERM, 1),  # a signal to one ends the whole run
    ],
)
def test_launch_starts_again_after_a_loss_alone(tmp_path, script, status, starts):
    # A process of its own: JAX, which this one has started, warns about forks.
    launch = [sys.executable, "-m", "experiments.launch", "--num_processes=2", "--restarts=2", "--"]
    shell = ["sh", "-c", f"echo started >> {tmp_path}/starts; {script}"]
    assert subprocess.run([*launch, *shell], timeout=60).returncode == status
    assert len((tmp_path / "starts").read_text().splitlines()) == 2 * starts
