"""Interrupted and damaged runs of train_mnist end as an undisturbed one, or are refused."""

import dataclasses
import functools
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import training_runs
from training_runs import LAST_STEP, assert_same_result, contents, newest_state, rows

from experiments import train_mnist
from experiments.analysis import inspection
from experiments.errors import InputError
from experiments.training import loop, records, runs
from experiments.training.checkpoints import Checkpoints, begin_training, saved_steps

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return training_runs.tiny_config(
        training_runs.write_noise(tmp_path_factory.mktemp("data") / "noise")
    )


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The folder of a run that nothing disturbed; never changed, only copied."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(inspection, "report", lambda *_, **__: None)
        return training_runs.finish(tiny, tmp_path_factory.mktemp("finished"))


@pytest.fixture
def train(tiny, tmp_path, monkeypatch):
    """Trains in a folder of the test's own, without figures; gives the folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inspection, "report", lambda *_, **__: None)

    def train(*, status=0, **changes):
        config = dataclasses.replace(tiny, **changes)
        assert train_mnist.main(config) == status
        return tmp_path / config.workdir

    return train


@pytest.fixture
def program(tiny, tmp_path, monkeypatch, capsys):
    """Run the program in this process: its exit status and stderr."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(training_runs.run_program, tiny, monkeypatch, capsys)


@pytest.mark.parametrize(("number", "last"), [(signal.SIGINT, 7), (signal.SIGTERM, LAST_STEP)])
def test_a_signal_saves_and_the_run_goes_on(train, finished, monkeypatch, caplog, number, last):
    class Interrupted(runs.Display):
        def update(self, step, row):
            super().update(step, row)
            if step == last:
                signal.raise_signal(number)

    handler = signal.getsignal(number)
    caplog.set_level("INFO", logger="absl")
    with monkeypatch.context() as patch:
        patch.setattr(runs, "Display", Interrupted)
        workdir = train(status=128 + number)
    name = signal.Signals(number).name
    message = f"{name}: saved at step {last}; the same --workdir goes on from there"
    assert message in caplog.messages
    assert saved_steps(workdir)[-1] == last
    assert signal.getsignal(number) is handler
    train()
    assert f"going on from step {last} of {LAST_STEP} in run" in caplog.messages
    assert_same_result(workdir, finished)


def test_killed_again_and_again_a_run_ends_as_if_nothing_had_been(tiny, train, finished, tmp_path):
    rng = random.Random(0)
    settings = dataclasses.asdict(tiny) | {"workdir": tmp_path / "run"}
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "experiments.train_mnist", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": jax.default_backend()}
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        # A line at least every second step, a save every fourth: the kills fall on all of these.
        lines_first = rng.randint(1, 5)
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as run:
            lines = []
            while sum("images/s" in line for line in lines) < lines_first:
                lines.append(run.stderr.readline())
                assert lines[-1], "".join(lines)
            time.sleep(rng.uniform(0, 0.1))
            run.send_signal(number)
            lines += run.stderr.readlines()
        if number == signal.SIGTERM:
            assert run.returncode == 128 + signal.SIGTERM
            assert re.search(r"SIGTERM: saved at step \d+; the same --workdir goes on", lines[-1])
        else:
            assert run.returncode == -signal.SIGKILL
        assert not any("Traceback" in line for line in lines)
    assert_same_result(train(), finished)


def test_max_steps_ends_a_run_that_can_go_on(train, finished):
    workdir = train(max_steps=10)
    assert saved_steps(workdir) == [4, 8, 10]
    with pytest.raises(
        InputError, match=r"^workdir run is at step 10 already, past --max_steps=9$"
    ):
        train(max_steps=9)
    train()
    assert_same_result(workdir, finished)


class Recorder:
    """Copies a folder before each change to it: what a kill at any moment would leave there.

    A folder that Orbax has not renamed yet is copied empty: tensorstore's threads write there
    meanwhile, and nobody reads it after a kill.
    """

    CHANGES = ("fsync", "link", "mkdir", "rename", "replace", "rmdir", "unlink")

    def __init__(self, folder, copies, monkeypatch):
        self.folder, self.copies, self.seen = folder, copies, {}
        self.lock, self.is_copying = threading.RLock(), False
        for name in self.CHANGES:
            monkeypatch.setattr(os, name, self.recorded(getattr(os, name)))

    def recorded(self, change):
        def changed(*arguments, **options):
            with self.lock:
                if not self.is_copying and self.folder.exists():
                    self.is_copying = True
                    self.copy()
                    self.is_copying = False
                return change(*arguments, **options)

        return changed

    def copy(self):
        copy, state = self.copies / str(len(self.seen)), []

        def ignore(folder, names):
            state.append((folder, sorted(names)))
            return names if ".orbax-checkpoint-tmp" in folder else []

        def link(source, target):
            state.append((source, os.stat(source).st_size))
            # Only metrics are ever added to in place; other files are replaced.
            (shutil.copy if source.endswith("metrics.jsonl") else os.link)(source, target)

        shutil.copytree(self.folder, copy, ignore=ignore, copy_function=link)
        if self.seen.setdefault(repr(state), copy) is not copy:
            shutil.rmtree(copy)


def test_no_moment_of_a_kill_is_refused_or_costs_a_checkpoint(
    tiny, train, tmp_path, monkeypatch, caplog
):
    often = {"log_every_steps": 1, "checkpoint_every_steps": 2, "max_steps": 8}
    with monkeypatch.context() as patch:
        killed = Recorder(tmp_path / "run", tmp_path / "killed", patch)
        whole = train(**often).rename(tmp_path / "whole")
    moments = {}
    for copy in killed.seen.values():
        steps = [int(path.name) for path in copy.glob("checkpoints/*") if path.name.isdecimal()]
        moments.setdefault((tuple(saved_steps(copy)), tuple(sorted(steps))), copy)
    assert moments.keys() >= {
        *(((), ()), ((), (2,)), ((2,), (2,)), ((2,), (2, 4)), ((2, 4), (2, 4))),
        *(((2, 4, 6), (2, 4, 6, 8)), ((4, 6), (4, 6, 8)), ((4, 6, 8), (4, 6, 8))),
    }
    # And kills of the starts after a kill: one before the first checkpoint, one during a save.
    copies = list(killed.seen.values())
    for number, moment in enumerate([((), (2,)), ((4, 6), (4, 6, 8))]):
        shutil.copytree(moments[moment], tmp_path / "run")
        with monkeypatch.context() as patch:
            later = Recorder(tmp_path / "run", tmp_path / f"killed_again_{number}", patch)
            assert_same_result(train(**often), whole)
        shutil.rmtree(tmp_path / "run")
        copies += later.seen.values()
    template = training_runs.trainer_of(tiny).abstract_state()
    caplog.clear()
    restored = set()
    for copy in filter(records.holds_run, copies):
        newest = max(saved_steps(copy), default=0)
        last = copy / "last_checkpoint.json"
        kind = newest, last.exists() and last.read_text(), len([*copy.glob("checkpoints/*")])
        if kind not in restored:
            with Checkpoints(copy) as checkpoints:
                assert (checkpoints.restore(template) or (0,))[0] == newest
            restored.add(kind)
        begin_training(copy)
    assert caplog.messages == []


LOSSES = {
    "records": lambda workdir: [p.unlink() for p in workdir.glob("checkpoints/*/record.json")],
    "all": lambda workdir: shutil.rmtree(workdir / "checkpoints"),
}


@pytest.mark.parametrize("what", LOSSES)
def test_a_run_that_lost_its_checkpoints_is_refused_and_keeps_the_rest(
    program, finished, tmp_path, what
):
    workdir = shutil.copytree(finished, tmp_path / "run")
    LOSSES[what](workdir)
    (workdir / "checkpoints").mkdir(exist_ok=True)
    before = contents(workdir)
    found = "24, 28, 30 without record.json" if what == "records" else "none"
    line = (
        "train_mnist: workdir run was trained to step 30, but run/checkpoints has no complete "
        f"checkpoint (found {found}); put them back, or to start again remove run or use another "
        "--workdir\n"
    )
    for _ in range(2):
        assert program() == (2, line)
        assert contents(workdir) == before


def warnings_of(caplog):
    """The warnings of a run, but for that on its data, which are not MNIST's."""
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    return [text for text in warnings if "not the published MNIST" not in text]


def test_a_run_stopped_before_its_first_checkpoint_says_so(train, caplog):
    class Stopped(runs.Display):
        def update(self, step, row):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "Display", Stopped)
        with pytest.raises(KeyboardInterrupt):
            train(log_every_steps=1)
    assert warnings_of(caplog) == []
    train(log_every_steps=1, max_steps=2)
    assert warnings_of(caplog) == [
        "workdir run was stopped at step 1 or later, before its first checkpoint: training starts "
        "again at step 0; save sooner with --checkpoint_every_steps"
    ]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    train, finished, tmp_path, caplog
):
    workdir = shutil.copytree(finished, tmp_path / "run")
    path = max((workdir / "checkpoints/30").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    train()
    [warning] = warnings_of(caplog)
    assert re.fullmatch(r"checkpoint .*/30 is damaged \(.*\): going on from step 28", warning)
    assert_same_result(workdir, finished)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_good_checkpoint(
    program, tmp_path, monkeypatch
):
    growing = loop.adam(1e-3, final_learning_rate=1e34, num_steps=LAST_STEP)  # over tenfold a step
    monkeypatch.setattr(loop, "adam", lambda *_, **__: growing)
    status, stderr = program()
    assert status == 2
    found = re.fullmatch(
        r"train_mnist: .* is not finite at step (\d+); try a lower --learning_rate\n", stderr
    )
    step = int(found[1])
    last, state = newest_state(tmp_path / "run")
    assert 4 <= last < step <= LAST_STEP
    assert rows(tmp_path / "run")[-1]["step"] < step
    assert all(np.isfinite(array).all() for array in state.values())
    before = contents(tmp_path / "run/checkpoints")
    assert program() == (2, stderr)  # and again, from the checkpoint
    assert contents(tmp_path / "run/checkpoints") == before
