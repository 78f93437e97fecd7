"""Runs on disk: what is written is read again, or its damage is named."""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import pathlib
import random
import re
import resource
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure
from tensorboardX.proto import event_pb2

from experiments import cli, records
from experiments.errors import InputError

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Config:
    """Two settings that change the result, and one that does not."""

    workdir: str = cli.flag("", "Folder.", affects_result=False)
    batch_size: int = cli.flag(128, "Examples a step.")
    dtype: str = cli.flag("float32", "Type of the numbers.")


def open_workdir(path, *, data_sha256="da7a", **settings):
    return records.open_workdir(path, config=Config(**settings), data_sha256=data_sha256)


@functools.cache
def make_state(step):
    """A state as training has it: layers by number, three dtypes, Adam's moments, a key."""
    key = jax.random.key(step)
    params = {
        "layers": {
            0: {"kernel": jax.random.normal(key, (40, 40))},
            1: {"kernel": jax.random.normal(key, (3, 5), jnp.bfloat16)},
        }
    }
    optimizer = optax.chain(optax.clip(1.0), optax.adam(optax.exponential_decay(1e-3, 10, 0.9)))
    _, optimizer_state = optimizer.update(params, optimizer.init(params), params)
    return {
        "params": params,
        "optimizer": optimizer_state,
        "step": jnp.int32(step),
        "key": jax.random.key_data(key),
    }


def assert_same(found, wanted):
    """Equal in structure, dtypes, shapes and every bit."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (a.dtype, a.shape, np.asarray(a).tobytes()) == (
            *(b.dtype, b.shape),
            np.asarray(b).tobytes(),
        )


def restore(workdir):
    with records.Checkpoints(workdir) as checkpoints:
        return checkpoints.restore(make_state(0))


@pytest.fixture
def small_disk():
    """Writing past the given size of a file fails, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextlib.contextmanager
    def small_disk(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return small_disk


# The folder of a run


def test_a_new_workdir_says_what_runs_in_it(tmp_path):
    workdir = open_workdir(tmp_path / "deep" / "run", batch_size=64)
    assert {entry.name for entry in workdir.iterdir()} == {"config.json", "checkpoints", "figures"}
    run = records.read_config(workdir)
    assert Config(**run["config"]) == Config(batch_size=64)
    assert run["data_sha256"] == "da7a"
    assert run["versions"].keys() == {"jax", "flax", "optax", "capsjax"}
    assert run["versions"]["jax"] == jax.__version__


def test_the_same_run_goes_on_though_its_folder_moved(tmp_path):
    open_workdir(tmp_path / "run", workdir="old", batch_size=64)
    before = (tmp_path / "run/config.json").read_bytes()
    open_workdir(tmp_path / "run", workdir="new", batch_size=64)
    assert (tmp_path / "run/config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"batch_size": 64}, "batch_size 128 there, 64 here"),
        (
            {"batch_size": 64, "dtype": "bfloat16", "workdir": "x"},
            "batch_size 128 there, 64 here; dtype float32 there, bfloat16 here",
        ),
        ({"data_sha256": "0" * 64}, f"data_sha256 da7a there, {'0' * 64} here"),
    ],
)
def test_another_run_is_refused_with_every_difference(tmp_path, changes, differing):
    workdir = open_workdir(tmp_path / "run")
    before = (workdir / "config.json").read_bytes()
    message = (
        f"workdir {workdir} holds a run with other settings: {differing}; use another --workdir"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        open_workdir(workdir, **changes)
    assert (workdir / "config.json").read_bytes() == before


def test_a_run_of_another_version_of_the_program_is_refused(tmp_path):
    workdir = open_workdir(tmp_path / "run")
    run = json.loads((workdir / "config.json").read_text())
    run["config"]["momentum"] = run["config"].pop("dtype")
    (workdir / "config.json").write_text(json.dumps(run))
    message = "dtype absent there, float32 here; momentum float32 there, absent here"
    with pytest.raises(InputError, match=message):
        open_workdir(workdir)


def test_a_folder_with_other_files_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"holds files but no run \(thesis.tex, for one\)"):
        open_workdir(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_start_that_was_stopped_does_not_block_the_next(tmp_path):
    (tmp_path / ".config.json.tmp").write_text('{"config"')
    open_workdir(tmp_path)
    assert records.read_config(tmp_path)["config"]["batch_size"] == 128
    assert not (tmp_path / ".config.json.tmp").exists()


def test_a_file_is_no_workdir(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match=r"run is a file, not a folder; use another --workdir$"):
        open_workdir(tmp_path / "run")
    with pytest.raises(InputError, match=r"workdir .*run/a cannot be written: Not a directory$"):
        open_workdir(tmp_path / "run" / "a")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_workdir_that_cannot_be_made_is_named(tmp_path, monkeypatch, number):
    def refuse(*args, **kwargs):
        raise OSError(number, errno.errorcode[number])

    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    message = f"workdir .*run cannot be written: {errno.errorcode[number]}$"
    with pytest.raises(InputError, match=message):
        open_workdir(tmp_path / "run")


def test_a_full_disk_at_the_start_leaves_an_empty_folder(tmp_path, small_disk):
    with small_disk(10), pytest.raises(InputError, match=r"cannot be written: File too large$"):
        open_workdir(tmp_path / "run")
    open_workdir(tmp_path / "run")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b'{"config": {}}', b'{"config": 1, "data_sha256": ""}']
)
def test_a_damaged_config_is_named(tmp_path, content):
    workdir = open_workdir(tmp_path)
    (workdir / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json is damaged"):
        open_workdir(tmp_path)
    assert (workdir / "config.json").read_bytes() == content


@pytest.mark.parametrize("read", [records.read_config, records.Checkpoints])
def test_a_folder_without_a_run_is_refused(tmp_path, read):
    with pytest.raises(InputError, match=r"holds no run: it has no config\.json$"):
        read(tmp_path)
    assert list(tmp_path.iterdir()) == []


# Checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with the checkpoints 1 and 2; never changed, only copied."""
    workdir = open_workdir(tmp_path_factory.mktemp("saved") / "run")
    with records.Checkpoints(workdir) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step))
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def test_a_state_comes_back_bit_for_bit(workdir):
    step, state = restore(workdir)
    assert step == 2
    assert_same(state, make_state(2))


def test_without_a_checkpoint_there_is_nothing_to_restore(tmp_path):
    assert restore(open_workdir(tmp_path)) is None


def test_the_newest_three_are_kept(workdir):
    with records.Checkpoints(workdir) as checkpoints:
        for step in (3, 4):
            checkpoints.save(step, make_state(step))
        assert checkpoints.steps() == [2, 3, 4]
    assert {entry.name for entry in (workdir / "checkpoints").iterdir()} == {"2", "3", "4"}


def test_a_step_is_saved_once_and_never_out_of_order(workdir):
    with records.Checkpoints(workdir) as checkpoints:
        checkpoints.save(2, make_state(7))
        with pytest.raises(RuntimeError, match=r"step must be above 2, got 0$"):
            checkpoints.save(0, make_state(0))
    assert_same(restore(workdir)[1], make_state(2))


def flip(path, position):
    content = bytearray(path.read_bytes())
    bit = int(position * 8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def truncate(path, position):
    path.write_bytes(path.read_bytes()[: int(position * path.stat().st_size)])


def delete(path, position):
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "seed"),
    [(damage, seed) for damage in (flip, truncate, delete) for seed in range(24)],
)
def test_damage_is_named_and_the_good_one_before_is_used(workdir, caplog, damage, seed):
    files = sorted(p for p in (workdir / "checkpoints/2").rglob("*") if p.is_file())
    damage(damaged := files[seed % len(files)], random.Random(seed).random())
    step, state = restore(workdir)
    assert step == 1
    assert_same(state, make_state(1))
    if damage is delete and damaged.name == "record.json":  # a save that did not finish
        assert caplog.messages == []
    else:
        [message] = caplog.messages
        assert message.startswith(f"checkpoint {workdir / 'checkpoints/2'} is damaged (")


def test_every_damage_of_the_values_is_noticed(workdir):
    """Without the checksums, Orbax restores such values silently."""
    files = sorted(p for p in (workdir / "checkpoints/2").rglob("d/*") if p.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    for number in range(20):
        flip(largest, number / 20)
        assert restore(workdir)[0] == 1
        largest.write_bytes(content)
    assert restore(workdir)[0] == 2


def test_the_warning_gives_the_reason(workdir, caplog):
    (workdir / "checkpoints/2/default/_METADATA").write_text("{}")
    restore(workdir)
    assert caplog.messages == [
        f"checkpoint {workdir / 'checkpoints/2'} is damaged (default/_METADATA is not what was "
        "written): going on from step 1"
    ]


def test_values_that_orbax_changes_are_noticed(workdir, monkeypatch, caplog):
    orbax_restore = records.ocp.StandardCheckpointer.restore

    def restore_wrongly(self, path, *args):
        state = orbax_restore(self, path, *args)
        return state | {"step": state["step"] + 1} if path.parent.name == "2" else state

    monkeypatch.setattr(records.ocp.StandardCheckpointer, "restore", restore_wrongly)
    assert restore(workdir)[0] == 1
    assert "(['step'] was not restored as it was saved): going on from step 1" in caplog.text


def test_reading_changes_nothing(workdir):
    """A run may be evaluated while it trains, and is in the middle of a save."""
    flip(workdir / "checkpoints/2/default/_METADATA", 0.5)
    (workdir / "checkpoints/3").mkdir()
    (workdir / "checkpoints/4.orbax-checkpoint-tmp").mkdir()
    before = sorted(workdir.rglob("*"))
    assert restore(workdir)[0] == 1
    assert sorted(workdir.rglob("*")) == before


def test_the_first_save_clears_away_what_cannot_be_used(workdir, caplog):
    flip(workdir / "checkpoints/2/default/_METADATA", 0.5)
    (workdir / "checkpoints/3").mkdir()
    (workdir / "checkpoints/4.orbax-checkpoint-tmp").mkdir()
    with records.Checkpoints(workdir) as checkpoints:
        assert checkpoints.restore(make_state(0))[0] == 1
        checkpoints.save(3, make_state(3))
    names = {entry.name for entry in (workdir / "checkpoints").iterdir()}
    assert names == {"1", "damaged_2", "3"}
    unfinished = workdir / "checkpoints/3"
    assert f"checkpoint {unfinished} has no record.json: removed as unfinished" in caplog.messages
    assert_same(restore(workdir)[1], make_state(3))


def test_a_damaged_step_can_be_saved_again_and_again(workdir):
    for _ in range(2):
        flip(workdir / "checkpoints/2/default/manifest.ocdbt", 0.5)
        with records.Checkpoints(workdir) as checkpoints:
            assert checkpoints.restore(make_state(0))[0] == 1
            checkpoints.save(2, make_state(2))
    step, state = restore(workdir)
    assert step == 2
    assert_same(state, make_state(2))


def test_when_all_are_damaged_nothing_is_replaced(workdir):
    for step in (1, 2):
        flip(workdir / f"checkpoints/{step}/default/_METADATA", 0.5)
    before = sorted(workdir.rglob("*"))
    message = (
        r"every checkpoint in .*checkpoints is damaged: 2 \(default/_METADATA is not what was "
        r"written\), 1 \(.*\); to start again, remove .*run or use another --workdir$"
    )
    with pytest.raises(InputError, match=message):
        restore(workdir)
    assert sorted(workdir.rglob("*")) == before


def with_kernel(kernel):
    """A state whose first kernel is another one."""
    return jax.tree.map(lambda leaf: kernel if leaf.shape == (40, 40) else leaf, make_state(0))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            with_kernel(jnp.zeros((40, 40), jnp.bfloat16)),
            r"\['layers'\]\[0\]\['kernel'\] is \('float32', \[40, 40\]\) there, "
            r"\('bfloat16', \[40, 40\]\) here$",
        ),
        (
            with_kernel(jnp.zeros(1600)),
            r"\[40, 40\]\) there, \('float32', \[1600\]\) here$",
        ),
        (make_state(0) | {"more": jnp.ones(1)}, r"\['more'\] is absent there, \('float32', \[1\]"),
        ({"step": jnp.int32(0)}, r"\['key'\] is \('uint32', \[2\]\) there, absent here$"),
    ],
)
def test_another_state_is_refused_not_cast(workdir, template, message):
    with (
        records.Checkpoints(workdir) as checkpoints,
        pytest.raises(InputError, match=f"^checkpoint .*/2 does not fit this program: .*{message}"),
    ):
        checkpoints.restore(template)
    assert restore(workdir)[0] == 2


def test_a_checkpoint_of_another_run_is_refused(workdir, tmp_path):
    other = open_workdir(tmp_path / "other", batch_size=1)
    shutil.copytree(workdir / "checkpoints/2", other / "checkpoints/2")
    with pytest.raises(InputError, match=r"/2 belongs to a run with other settings or data$"):
        restore(other)


# TensorStore ends its other writes after Orbax has closed the event loop they report to.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("size", [0, 100, 4000])
def test_a_failed_write_keeps_what_there_was(workdir, small_disk, size):
    with records.Checkpoints(workdir) as checkpoints:
        message = r"^checkpoint .*/3 cannot be written: File too large; those before it are intact$"
        with small_disk(size), pytest.raises(InputError, match=message):
            checkpoints.save(3, make_state(3))
        assert checkpoints.steps() == [1, 2]
        assert_same(checkpoints.restore(make_state(0))[1], make_state(2))
        checkpoints.save(3, make_state(3))
    assert_same(restore(workdir)[1], make_state(3))
    names = {entry.name for entry in (workdir / "checkpoints").iterdir()}
    assert names == {"1", "2", "3"}


def test_a_disk_with_too_little_space_is_not_filled(workdir, monkeypatch):
    usage = shutil.disk_usage(workdir)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = (
        r"/3 cannot be written: it needs 1\.0 MiB and the disk has 1\.0 MiB free; those before"
    )
    with records.Checkpoints(workdir) as checkpoints:
        with pytest.raises(InputError, match=message):
            checkpoints.save(3, make_state(3))
        assert checkpoints.steps() == [1, 2]


def test_other_errors_of_a_save_are_not_taken_for_a_full_disk(workdir):
    with records.Checkpoints(workdir) as checkpoints, pytest.raises(ValueError, match="empty"):
        checkpoints.save(3, {})


PROGRAM = """
import dataclasses, itertools, resource
import jax.numpy as jnp
from experiments import cli, records

@dataclasses.dataclass(frozen=True)
class Config:
    workdir: str = cli.flag("", "Folder.", affects_result=False)
    largest_file: int = cli.flag(resource.RLIM_INFINITY, "Bytes; -1: no limit.")

def main(config):
    workdir = records.open_workdir(config.workdir, config=config, data_sha256="")
    with records.Checkpoints(workdir) as checkpoints:
        for step in itertools.count(1):
            checkpoints.save(step, {"x": jnp.full((400, 500), step)})
            print(step, flush=True)
            resource.setrlimit(resource.RLIMIT_FSIZE, (config.largest_file, -1))

cli.run(Config, main)
"""


@pytest.fixture
def start():
    """Starts programs that save step after step; none outlives its test."""
    with contextlib.ExitStack() as stack:

        def start(folder, **settings):
            folder.mkdir(exist_ok=True)
            (folder / "saver.py").write_text(PROGRAM)
            flags = [f"--{name}={value}" for name, value in settings.items()]
            program = subprocess.Popen(
                [sys.executable, folder / "saver.py", f"--workdir={folder / 'run'}", *flags],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            )
            stack.enter_context(program)
            stack.callback(program.kill)
            return program

        yield start


def test_kill_9_at_any_moment_leaves_the_newest_complete_checkpoint(tmp_path, start):
    rng = random.Random(0)
    folders = [tmp_path / str(number) for number in range(4)]
    for folder, program in [(folder, start(folder)) for folder in folders]:
        assert program.stdout.readline() == "1\n"
        time.sleep(rng.uniform(0, 0.3))
        program.kill()
        newest = max([1, *map(int, program.communicate()[0].split())])
        with records.Checkpoints(folder / "run") as checkpoints:
            step, state = checkpoints.restore({"x": jnp.zeros((400, 500), jnp.int32)})
            assert step - newest in (0, 1)  # it may have died between the save and the print
            assert_same(state, {"x": jnp.full((400, 500), step)})
            checkpoints.save(step + 1, state)


def test_a_program_whose_write_fails_ends_with_one_line(tmp_path, start):
    program = start(tmp_path, largest_file=200)
    stdout, stderr = program.communicate(timeout=100)
    assert (program.returncode, stdout) == (2, "1\n")
    assert re.fullmatch(
        r"saver: checkpoint .*/2 cannot be written: File too large; those before it are intact\n",
        stderr,
    )


# Metrics


def write_rows(workdir, steps, *, step=0, **options):
    with records.Metrics(workdir, step=step, **options) as metrics:
        for number in steps:
            metrics.write({"step": number, "train_loss": number / 3, "test_error": 1.25})


def read_steps(workdir):
    return [row["step"] for row in records.read_metrics(workdir)]


def test_rows_come_back_as_written(tmp_path):
    write_rows(tmp_path, [1, 2])
    assert records.read_metrics(tmp_path) == [
        {"step": 1, "train_loss": 1 / 3, "test_error": 1.25},
        {"step": 2, "train_loss": 2 / 3, "test_error": 1.25},
    ]


def test_a_row_is_on_disk_when_write_returns(tmp_path):
    with records.Metrics(tmp_path, step=0) as metrics:
        metrics.write({"step": 1})
        assert read_steps(tmp_path) == [1]


@pytest.mark.parametrize(
    ("restored", "kept"), [(0, []), (2, [1, 2]), (3, [1, 2, 3]), (9, [1, 2, 3])]
)
def test_a_resumed_run_drops_the_rows_it_will_write_again(tmp_path, restored, kept):
    write_rows(tmp_path, [1, 2, 3])
    write_rows(tmp_path, [10], step=restored)
    assert read_steps(tmp_path) == [*kept, 10]


@pytest.mark.parametrize("torn", range(1, len('{"step": 2, "train_loss": 0.66666')))
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    write_rows(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:torn])
    assert read_steps(tmp_path) == [1]
    write_rows(tmp_path, [2], step=1)
    assert path.read_bytes() == first + second


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"",
        b"[]",
        b"3",
        b"\xff",
        b'{"loss": 1}',
        b'{"step": 1, "loss": NaN}',
        b'{"step": "1"}',
    ],
)
@pytest.mark.parametrize("use", [records.read_metrics, lambda w: records.Metrics(w, step=9)])
def test_a_damaged_line_is_named(tmp_path, line, use):
    content = b'{"step": 1}\n' + line + b'\n{"step": 3}\n'
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=r"metrics\.jsonl is damaged at line 2 \("):
        use(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == content


def test_missing_metrics_are_an_error(tmp_path):
    with pytest.raises(InputError, match=r"has no metrics\.jsonl: nothing was trained there yet$"):
        records.read_metrics(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_only_finite_values_are_written(tmp_path, value):
    with records.Metrics(tmp_path, step=0) as metrics:
        with pytest.raises(ValueError, match=f"train_loss must be finite, got {value}$"):
            metrics.write({"step": 1, "train_loss": value})
        with pytest.raises(TypeError, match=r"step must be an int, got 1\.5$"):
            metrics.write({"step": 1.5})
    assert read_steps(tmp_path) == []


def test_a_full_disk_keeps_the_rows_before(tmp_path, small_disk):
    with records.Metrics(tmp_path, step=0) as metrics:
        metrics.write({"step": 1})
        message = r"metrics\.jsonl cannot be written: File too large$"
        with small_disk(20), pytest.raises(InputError, match=message):
            metrics.write({"step": 2})
    write_rows(tmp_path, [2], step=1)
    assert read_steps(tmp_path) == [1, 2]


def read_events(path):
    """The events of a TensorBoard file: each lies between 12 bytes and 4 of length and checksum."""
    content, events = path.read_bytes(), []
    while content:
        end = 12 + int.from_bytes(content[:8], "little")
        events.append(event_pb2.Event.FromString(content[12:end]))
        content = content[end + 4 :]
    return events


def test_tensorboard_gets_the_same_rows_and_forgets_those_to_be_written_again(tmp_path):
    write_rows(tmp_path, [4, 5], step=3, tensorboard=True)
    [path] = (tmp_path / "tensorboard").iterdir()
    events = read_events(path)
    starts = [e.step for e in events if e.session_log.status == event_pb2.SessionLog.START]
    assert starts == [4]  # TensorBoard purges what an earlier file has from this step on
    scalars = {(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value}
    assert scalars == {
        (step, name, np.float32(value))
        for step in (4, 5)
        for name, value in {"train_loss": step / 3, "test_error": 1.25}.items()
    }


def test_without_tensorboardx_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'capsjax\[tensorboard\]'$"):
        records.Metrics(tmp_path, step=0, tensorboard=True)


# Figures


def test_a_figure_becomes_a_png(tmp_path):
    figure = Figure(figsize=(2, 1))
    records.save_figure(figure, tmp_path / "curve.png")
    header = (tmp_path / "curve.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert (header[16:20], header[20:24]) == ((300).to_bytes(4), (150).to_bytes(4))
    assert [entry.name for entry in tmp_path.iterdir()] == ["curve.png"]


def test_a_figure_that_cannot_be_written_leaves_the_old_one(tmp_path, small_disk):
    (tmp_path / "curve.png").write_text("old")
    message = r"curve\.png cannot be written: File too large$"
    with small_disk(10), pytest.raises(InputError, match=message):
        records.save_figure(Figure(), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_text() == "old"
