"""The main program: every flag matters, and no interruption or damage changes a run's result."""

import dataclasses
import json
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

import in_process
import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments import train_mnist
from experiments.analysis import inspection
from experiments.data import datasets, idx
from experiments.errors import InputError
from experiments.training import mnist, records, runs
from experiments.training.checkpoints import Checkpoints, begin_training, saved_steps
from experiments.training.display import Display

ROOT = pathlib.Path(__file__).parents[1]
FIGURES = {
    *("reconstructions", "dimension_tweaks", "couplings", "coupling_entropy"),
    *("confusion_matrix", "misclassified", "learning_curves"),
}
LAST_STEP = 30  # of 6 epochs


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """A folder in which programs are kept as soon as one is compiled, for all runs here."""
    names = ("jax_persistent_cache_min_compile_time_secs", "jax_compilation_cache_dir")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], 0)
    compilation_cache.reset_cache()
    yield tmp_path_factory.mktemp("compiled")
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def write_idx(folder, *, seed):
    """A data set of noise: 5 batches of 8 and 4 more to train on, 2 and 5 more to test."""
    rng = np.random.default_rng(seed)
    for split, size in (("train", 44), ("test", 21)):
        images = rng.integers(0, 256, (size, 17, 17), dtype=np.uint8)
        labels = (np.arange(size) % 10).astype(np.uint8)
        for stem, array in zip(idx.STEMS[split], (images, labels), strict=True):
            (folder / stem).write_bytes(idx.header(array) + array.tobytes())


@pytest.fixture(scope="module")
def tiny(compiled, tmp_path_factory):
    """A Config that trains in a second once it is compiled."""
    folder = tmp_path_factory.mktemp("data")
    write_idx(folder, seed=0)
    return mnist.Config(
        dataset="mnist",
        data_dir=str(folder),
        workdir="run",
        batch_size=8,
        num_epochs=6,
        learning_rate=0.01,
        conv_channels=2,
        primary_types=3,
        capsule_length=3,
        num_iterations=2,
        log_every_steps=2,
        checkpoint_every_steps=4,
        compilation_cache=str(compiled),
    )


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The folder of a run that nothing disturbed; never changed, only copied."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert train_mnist.main(dataclasses.replace(tiny, workdir=str(workdir))) == 0
    return workdir


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
    """Runs the program in this process: its exit status and stderr."""
    monkeypatch.chdir(tmp_path)

    def program(**changes):
        settings = dataclasses.asdict(tiny) | changes
        status, _, stderr = in_process.run(train_mnist, settings, monkeypatch, capsys)
        return status, stderr

    return program


def rows(workdir):
    return [row | {"images_per_second": 0} for row in records.read_metrics(workdir)]


def saved(workdir):
    """The steps that have a checkpoint, and dtype, shape and checksum of the last one's leaves."""
    with Checkpoints(workdir) as checkpoints:
        steps = checkpoints.steps()
    record = json.loads((workdir / f"checkpoints/{steps[-1]}/record.json").read_bytes())
    return steps, record["record"]["leaves"]


def assert_same_result(workdir, wanted):
    """Equal in every bit of parameters, optimizer, step, key and rows."""
    assert saved(workdir)[1] == saved(wanted)[1]
    assert rows(workdir) == rows(wanted)


def contents(folder):
    return {
        path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")
    }


# A whole run


def test_a_run_leaves_what_it_promises(finished, tiny):
    names = {entry.name for entry in finished.iterdir()}
    assert names == {
        *("config.json", "last_checkpoint.json", "metrics.jsonl", "checkpoints", "figures")
    }
    assert saved(finished)[0] == [24, 28, LAST_STEP]
    found = rows(finished)
    assert [row["step"] for row in found] == sorted({*range(2, 31, 2), *range(5, 31, 5)})
    tested = {row["step"]: row for row in found if "test_error" in row}
    assert list(tested) == list(range(5, 31, 5))
    wrong = [row["test_error"] * 21 / 100 for row in tested.values()]  # all 21 count
    np.testing.assert_allclose(wrong, np.round(wrong), atol=1e-9)
    assert found[-1]["train_loss"] < found[0]["train_loss"]
    assert any(pathlib.Path(tiny.compilation_cache).glob("jit__step-*"))


def test_every_figure_is_drawn(finished):
    drawn = {path.name: path.read_bytes() for path in (finished / "figures").iterdir()}
    assert drawn.keys() == {f"{name}.png" for name in FIGURES}
    for name, content in drawn.items():
        assert content.startswith(b"\x89PNG"), name
        assert len(content) > 5_000, name


# Every field has an effect


def what_is_loaded(config, monkeypatch, tmp_path):
    """The data asked for, and where programs are kept by then."""

    def load(*arguments, **options):
        raise InputError(f"{arguments} {options} {jax.config.jax_compilation_cache_dir}")

    monkeypatch.setattr(datasets, "load", load)
    with pytest.raises(InputError) as error:
        train_mnist.main(config)
    jax.config.update("jax_compilation_cache_dir", None)
    return str(error.value)


def what_is_trained(config, monkeypatch, tmp_path):
    """The first parameters, the program of a step, and the first batch."""
    dataset = datasets.load(config.dataset, data_dir=config.data_dir)
    trainer = mnist.build(config, dataset)
    state = trainer.initial_state(config.seed)
    order = datasets.batches(44, batch_size=config.batch_size, seed=config.seed)
    chosen = next(order)
    images, labels = dataset.train.images[chosen], dataset.train.labels[chosen]
    step = trainer.step.lower(state, images, labels).as_text()
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)], step, chosen.tolist()


def what_is_left(config, monkeypatch, tmp_path):
    """The rows of metrics, the checkpoints, and the kinds of files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inspection, "report", lambda *_, **__: None)
    train_mnist.main(config)
    [workdir] = tmp_path.iterdir()
    names = sorted(path.name for path in workdir.iterdir())
    return workdir.name, rows(workdir), saved(workdir), names


EFFECTS = {
    "dataset": ("fashion_mnist", what_is_loaded),
    "data_dir": ("elsewhere", what_is_loaded),
    "download": (True, what_is_loaded),
    "compilation_cache": ("elsewhere", what_is_loaded),
    "batch_size": (4, what_is_trained),
    "num_epochs": (7, what_is_trained),
    "learning_rate": (0.02, what_is_trained),
    "final_learning_rate": (1e-5, what_is_trained),
    "num_iterations": (3, what_is_trained),
    "gradient": ("last", what_is_trained),
    "reconstruction_weight": (0.01, what_is_trained),
    "shift": (1, what_is_trained),
    "canvas": (32, what_is_trained),
    "diagnostics": (True, what_is_left),
    "network": ("pooling_cnn", what_is_trained),
    "conv_channels": (3, what_is_trained),
    "primary_types": (2, what_is_trained),
    "primary_scale": (0.5, what_is_trained),
    "capsule_length": (4, what_is_trained),
    "capsule_bias": (0.1, what_is_trained),
    "seed": (1, what_is_trained),
    "dtype": ("bfloat16", what_is_trained),
    "implementation": ("reference", what_is_trained),
    "workdir": ("elsewhere", what_is_left),
    "max_steps": (3, what_is_left),
    "log_every_steps": (3, what_is_left),
    "checkpoint_every_steps": (7, what_is_left),
    "tensorboard": (True, what_is_left),
}


def test_no_field_is_left_out():
    fields = {field.name for field in dataclasses.fields(mnist.Config)}
    devices = {field.name for base in runs.Settings.__bases__ for field in dataclasses.fields(base)}
    assert EFFECTS.keys() == fields - devices  # for which see test_devices and test_processes


@pytest.fixture(scope="module")
def usual(tiny, tmp_path_factory):
    """What is observed of the tiny Config itself, each way once; and that twice is the same."""
    found = {}
    for observe in (what_is_loaded, what_is_trained, what_is_left):
        for _ in range(2):
            with pytest.MonkeyPatch.context() as monkeypatch:
                seen = observe(tiny, monkeypatch, tmp_path_factory.mktemp("usual"))
            assert found.setdefault(observe, seen) == seen
    return found


@pytest.mark.parametrize("name", EFFECTS)
def test_every_field_has_an_effect(tiny, usual, name, monkeypatch, tmp_path):
    value, observe = EFFECTS[name]
    assert value != getattr(tiny, name)
    seen = observe(dataclasses.replace(tiny, **{name: value}), monkeypatch, tmp_path)
    assert seen != usual[observe]


def test_tensorboard_files_are_written(train):
    workdir = train(tensorboard=True, max_steps=2)
    [events] = (workdir / "tensorboard").glob("events.out.tfevents.*")
    assert b"train_loss" in events.read_bytes()


# Interruptions


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("last", [7, LAST_STEP])
def test_a_signal_saves_and_the_run_goes_on(train, finished, monkeypatch, caplog, number, last):
    class Interrupted(Display):
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
    assert saved(workdir)[0][-1] == last
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
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
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
    assert saved(workdir)[0] == [4, 8, 10]
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
    template = mnist.build(tiny, datasets.load("mnist", data_dir=tiny.data_dir)).initial_state(0)
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
    "folders": lambda workdir: [shutil.rmtree(path) for path in workdir.glob("checkpoints/*")],
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


def test_a_run_stopped_before_its_first_checkpoint_says_so(train, caplog):
    class Stopped(Display):
        def update(self, step, row):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "Display", Stopped)
        with pytest.raises(KeyboardInterrupt):
            train(log_every_steps=1)
    assert caplog.messages == []
    train(log_every_steps=1, max_steps=2)
    assert caplog.messages == [
        "workdir run was stopped at step 1 or later, before its first checkpoint: training starts "
        "again at step 0; save sooner with --checkpoint_every_steps"
    ]


# Damage


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    train, finished, tmp_path, caplog
):
    workdir = shutil.copytree(finished, tmp_path / "run")
    path = max((workdir / "checkpoints/30").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    train()
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert re.fullmatch(r"checkpoint .*/30 is damaged \(.*\): going on from step 28", warning)
    assert_same_result(workdir, finished)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_good_checkpoint(
    tiny, program, tmp_path
):
    config = {"learning_rate": 1e-3, "final_learning_rate": 1e34}  # more than tenfold every step
    status, stderr = program(**config)
    assert status == 2
    found = re.fullmatch(
        r"train_mnist: .* is not finite at step (\d+); try a lower --learning_rate\n", stderr
    )
    step = int(found[1])
    steps, leaves = saved(tmp_path / "run")
    assert 4 <= steps[-1] < step <= LAST_STEP
    assert rows(tmp_path / "run")[-1]["step"] < step
    dataset = datasets.load(tiny.dataset, data_dir=tiny.data_dir)
    trainer = mnist.build(dataclasses.replace(tiny, **config), dataset)
    with Checkpoints(tmp_path / "run") as checkpoints:
        _, state = checkpoints.restore(trainer.initial_state(0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert program(**config) == (2, stderr)  # and again, from the checkpoint
    assert saved(tmp_path / "run") == (steps, leaves)


def test_a_workdir_of_another_config_is_refused(program, finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    before = contents(workdir)
    status, stderr = program(learning_rate=0.5, shift=1, checkpoint_every_steps=5)
    assert (status, stderr) == (
        2,
        "train_mnist: workdir run holds a run with other settings: learning_rate 0.01 there, 0.5 "
        "here; shift 2 there, 1 here; use another --workdir\n",
    )
    assert contents(workdir) == before


def test_a_workdir_of_other_data_is_refused(program, finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    before = contents(workdir)
    (tmp_path / "data").mkdir()
    write_idx(tmp_path / "data", seed=1)
    status, stderr = program(data_dir="data")
    assert status == 2
    assert re.fullmatch(
        r"train_mnist: workdir run .*: data_sha256 \w+ there, \w+ here; .*\n", stderr
    )
    assert contents(workdir) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "--batch_size must be at least 1, got 0"),
        (
            {"batch_size": 45},
            "--batch_size must be at most the 44 training examples of mnist, got 45",
        ),
        ({"learning_rate": -0.1}, "--learning_rate must be above 0, got -0.1"),
        ({"final_learning_rate": 0}, "--final_learning_rate must be above 0, got 0.0"),
        ({"reconstruction_weight": -1}, "--reconstruction_weight must be at least 0, got -1.0"),
        ({"num_epochs": 2**31}, "--num_epochs=2147483648 are .* steps, .* at most 2147483647"),
        ({"num_iterations": 0}, "--num_iterations must be at least 1, got 0"),
        ({"shift": -1}, "--shift must be at least 0, got -1"),
        ({"shift": 17}, "--shift must be less than the 17 pixels of the images, got 17"),
        ({"seed": 2**32}, "--seed must be at most 4294967295, got 4294967296"),
        ({"dtype": "float8"}, "--dtype must be one of float32, bfloat16, got 'float8'"),
        ({"bach_size": 3}, r"Unknown command line flag 'bach_size'. Did you mean: batch_size \?"),
        ({"dataset": "mnits"}, "--dataset must be mnist_small, mnist, .* got 'mnits'."),
        ({"data_dir": "none"}, "--data_dir must be a folder that can be read, got none."),
        ({"data_dir": "d" * 300}, "--data_dir must be a folder that can be read, got d+."),
        ({"data_dir": "~nobody0/x"}, "--data_dir must be a folder .*, got ~nobody0/x."),
        ({"data_dir": "."}, "mnist was not found. Looked for the four idx or idx.gz files in .*"),
        (
            {"dataset": "mnist_small"},
            "mnist_small comes with the programs and takes no --data_dir.*",
        ),
        ({"workdir": "file"}, "workdir file is a file, not a folder; use another --workdir"),
        ({"workdir": "w" * 300}, "workdir w+ cannot be written: File name too long"),
        ({"workdir": "file/run"}, "workdir file/run cannot be written: Not a directory"),
        ({"workdir": "."}, r"workdir . holds files but no run \(file, for one\); nothing is .*"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_nothing_is_written(
    program, tmp_path, changes, message
):
    (tmp_path / "file").write_text("precious")
    status, stderr = program(**changes)
    assert status == 2
    assert re.fullmatch(f"train_mnist: {message}\n", stderr)
    assert contents(tmp_path) == {pathlib.Path("file"): b"precious"}


def test_images_too_small_for_the_network_are_refused(program, tmp_path):
    images, labels = np.zeros((9, 16, 16), np.uint8), np.zeros(9, np.uint8)
    for stem, array in zip(
        sum(idx.STEMS.values(), ()), (images, labels, images, labels), strict=True
    ):
        (tmp_path / stem).write_bytes(idx.header(array) + array.tobytes())
    status, stderr = program(data_dir=".")
    assert status == 2
    assert re.fullmatch(
        r"train_mnist: CapsNet: image_shape must be at least 17 pixels .*\n", stderr
    )
    assert not (tmp_path / "run").exists()
