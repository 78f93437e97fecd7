"""Tests of `training.records` and `files`: a run's folder, metrics and figures."""

import errno
import json
import os
import pathlib
import re

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure
from runs import Config, open_workdir
from tensorboardX.proto import event_pb2

from experiments import files
from experiments.errors import InputError
from experiments.training import records
from experiments.training.checkpoints import Checkpoints

ROOT = pathlib.Path(__file__).parents[1]


# The folder of a run


def test_new_workdir_has_config_digest_and_versions(tmp_path):
    workdir = open_workdir(tmp_path / "deep" / "run", batch_size=64)
    assert {entry.name for entry in workdir.iterdir()} == {"config.json", "checkpoints", "figures"}
    run = records.read_config(workdir)
    assert Config(**run["config"]) == Config(batch_size=64)
    assert run["data_sha256"] == "da7a"
    assert run["versions"].keys() == {"jax", "flax", "optax", "capsjax"}
    assert run["versions"]["jax"] == jax.__version__


def test_run_is_resumed_in_a_folder_that_was_moved(tmp_path):
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
def test_different_run_is_refused_with_every_difference(tmp_path, changes, differing):
    workdir = open_workdir(tmp_path / "run")
    before = (workdir / "config.json").read_bytes()
    message = (
        f"workdir {workdir} holds a run with other settings: {differing}; use another --workdir"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        open_workdir(workdir, **changes)
    assert (workdir / "config.json").read_bytes() == before


def test_run_with_other_names_of_settings_is_refused(tmp_path):
    workdir = open_workdir(tmp_path / "run")
    run = json.loads((workdir / "config.json").read_text())
    run["config"]["momentum"] = run["config"].pop("dtype")
    (workdir / "config.json").write_text(json.dumps(run))
    message = "dtype absent there, float32 here; momentum float32 there, absent here"
    with pytest.raises(InputError, match=message):
        open_workdir(workdir)


def test_folder_with_other_files_is_refused_and_unchanged(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"holds files but no run \(thesis.tex, for one\)"):
        open_workdir(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_interrupted_start_does_not_block_the_next(tmp_path):
    (tmp_path / ".config.json.123.tmp").write_text('{"config"')
    open_workdir(tmp_path)
    assert records.read_config(tmp_path)["config"]["batch_size"] == 128


def test_of_two_simultaneous_starts_the_later_is_refused(tmp_path, monkeypatch):
    create = files.create

    def late(path, content):
        monkeypatch.setattr(files, "create", create)
        open_workdir(tmp_path / "run", batch_size=64)  # the other process, at the worst moment
        create(path, content)

    monkeypatch.setattr(files, "create", late)
    with pytest.raises(InputError, match="batch_size 64 there, 128 here"):
        open_workdir(tmp_path / "run")
    assert records.read_config(tmp_path / "run")["config"]["batch_size"] == 64
    names = {entry.name for entry in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "checkpoints", "figures"}


def test_workdir_needs_no_hard_links(tmp_path, monkeypatch):
    def link(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    open_workdir(tmp_path / "run")
    assert records.read_config(tmp_path / "run")["config"]["batch_size"] == 128
    names = {entry.name for entry in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "checkpoints", "figures"}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    workdir = open_workdir(tmp_path / "run")
    monkeypatch.setattr("fcntl.flock", flock)
    message = f"run cannot be locked against another process: {os.strerror(number)}; use a --workd"
    with pytest.raises(InputError, match=message), records.exclusive(workdir):
        pass


def test_a_run_that_may_not_be_written_is_refused(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    workdir = open_workdir(tmp_path / "run")
    monkeypatch.setattr("builtins.open", refuse)
    with (
        pytest.raises(InputError, match=r"^workdir .*run cannot be written: Permission denied$"),
        records.exclusive(workdir),
    ):
        pass


def test_lock_excludes_another_process(tmp_path):
    workdir = open_workdir(tmp_path / "run")
    message = "run is in use by another process; wait for its end"
    with (
        records.exclusive(workdir),
        pytest.raises(InputError, match=message),
        records.exclusive(workdir),
    ):
        pass
    with records.exclusive(workdir):
        pass  # free again


def test_file_instead_of_a_workdir_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match=r"run is a file, not a folder; use another --workdir$"):
        open_workdir(tmp_path / "run")
    with pytest.raises(InputError, match=r"workdir .*run/a cannot be written: Not a directory$"):
        open_workdir(tmp_path / "run" / "a")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_workdir_that_cannot_be_created_is_an_input_error(tmp_path, monkeypatch, number):
    def refuse(*args, **kwargs):
        raise OSError(number, errno.errorcode[number])

    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    message = f"workdir .*run cannot be written: {errno.errorcode[number]}$"
    with pytest.raises(InputError, match=message):
        open_workdir(tmp_path / "run")


def test_full_disk_at_the_start_leaves_a_usable_folder(tmp_path, small_disk):
    with small_disk(10), pytest.raises(InputError, match=r"cannot be written: File too large$"):
        open_workdir(tmp_path / "run")
    open_workdir(tmp_path / "run")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b'{"config": {}}', b'{"config": 1, "data_sha256": ""}']
)
def test_damaged_config_is_an_input_error(tmp_path, content):
    workdir = open_workdir(tmp_path)
    (workdir / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json is damaged"):
        open_workdir(tmp_path)
    assert (workdir / "config.json").read_bytes() == content


@pytest.mark.parametrize("read", [records.read_config, Checkpoints])
def test_folder_without_a_run_is_an_input_error(tmp_path, read):
    with pytest.raises(InputError, match=r"holds no run: it has no config\.json$"):
        read(tmp_path)
    assert list(tmp_path.iterdir()) == []


# Metrics


def write_rows(workdir, steps, *, step=0, **options):
    with records.Metrics(workdir, step=step, **options) as metrics:
        for number in steps:
            metrics.write({"step": number, "train_loss": number / 3, "test_error": 1.25})


def read_steps(workdir):
    return [row["step"] for row in records.read_metrics(workdir)]


def test_metrics_read_equal_those_written(tmp_path):
    write_rows(tmp_path, [1, 2])
    assert records.read_metrics(tmp_path) == [
        {"step": 1, "train_loss": 1 / 3, "test_error": 1.25},
        {"step": 2, "train_loss": 2 / 3, "test_error": 1.25},
    ]


def test_row_is_on_disk_when_write_returns(tmp_path):
    with records.Metrics(tmp_path, step=0) as metrics:
        metrics.write({"step": 1})
        assert read_steps(tmp_path) == [1]


@pytest.mark.parametrize(
    ("restored", "kept"), [(0, []), (2, [1, 2]), (3, [1, 2, 3]), (9, [1, 2, 3])]
)
def test_resumed_run_drops_later_rows(tmp_path, restored, kept):
    write_rows(tmp_path, [1, 2, 3])
    write_rows(tmp_path, [10], step=restored)
    assert read_steps(tmp_path) == [*kept, 10]


def test_incomplete_last_line_is_dropped(tmp_path):
    write_rows(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    for length in range(1, len(second) - 1):
        path.write_bytes(first + second[:length])
        assert read_steps(tmp_path) == [1], second[:length]
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
def test_damaged_line_is_an_input_error_with_its_number(tmp_path, line, use):
    content = b'{"step": 1}\n' + line + b'\n{"step": 3}\n'
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=r"metrics\.jsonl is damaged at line 2 \("):
        use(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == content


def test_missing_metrics_are_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"has no metrics\.jsonl: nothing was trained there yet$"):
        records.read_metrics(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_values_and_steps_that_are_no_integers_are_refused(tmp_path, value):
    with records.Metrics(tmp_path, step=0) as metrics:
        with pytest.raises(ValueError, match=f"train_loss must be finite, got {value}$"):
            metrics.write({"step": 1, "train_loss": value})
        with pytest.raises(TypeError, match=r"step must be an int, got 1\.5$"):
            metrics.write({"step": 1.5})
    assert read_steps(tmp_path) == []


def test_full_disk_keeps_earlier_rows(tmp_path, small_disk):
    with records.Metrics(tmp_path, step=0) as metrics:
        metrics.write({"step": 1})
        message = r"metrics\.jsonl cannot be written: File too large$"
        with small_disk(20), pytest.raises(InputError, match=message):
            metrics.write({"step": 2})
    write_rows(tmp_path, [2], step=1)
    assert read_steps(tmp_path) == [1, 2]


def read_events(path):
    """Read the events of a TensorBoard file; 12 bytes precede an event and 4 follow it."""
    content, events = path.read_bytes(), []
    while content:
        end = 12 + int.from_bytes(content[:8], "little")
        events.append(event_pb2.Event.FromString(content[12:end]))
        content = content[end + 4 :]
    return events


def test_tensorboard_has_the_same_rows_and_purges_later_ones(tmp_path):
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


def test_missing_tensorboardx_is_an_input_error_with_the_command_to_install_it(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'capsjax\[tensorboard\]'$"):
        records.Metrics(tmp_path, step=0, tensorboard=True)


def test_training_seconds_exclude_evaluation():
    rows = [
        {"step": 10, "images_per_second": 40.0},
        {"step": 15, "images_per_second": 20.0},
    ]
    assert records.training_seconds(rows, 8) == 10 * 8 / 40 + 5 * 8 / 20


# Whole files


def test_rows_of_metrics_out_of_order_are_damage(tmp_path):
    for steps in ([1, 1], [2, 1]):
        lines = [f'{{"step": {step}}}\n' for step in steps]
        (tmp_path / "metrics.jsonl").write_text("".join(lines))
        with pytest.raises(InputError, match=f"damaged at line 2 .*step 1 follows step {steps[0]}"):
            records.read_metrics(tmp_path)


WRITERS = {
    "write": lambda path: files.write_bytes(path, b"n" * 99),
    "json": lambda path: files.write_json(path, ["n" * 99]),
    "append": lambda path: files.append_lines(path, [{"n": "n" * 99}]),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_failed_write_leaves_the_file_as_it_was_and_nothing_else(tmp_path, small_disk, write):
    path = tmp_path / "results"
    path.write_text("old")
    with small_disk(50), pytest.raises(InputError, match="results cannot be written: File too lar"):
        write(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_follows_no_link_that_lies_where_it_writes_first(tmp_path, monkeypatch):
    monkeypatch.setattr("secrets.token_hex", lambda size: "aa")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f".results.{os.getpid()}.aa.tmp").symlink_to(victim)
    with pytest.raises(InputError, match="results cannot be written: File exists"):
        files.write_bytes(tmp_path / "results", b"new")
    assert victim.read_text() == "precious"


def test_two_writers_of_one_file_do_not_share_a_temporary_file(tmp_path, monkeypatch):
    replace = pathlib.Path.replace

    def late(partial, path):
        monkeypatch.setattr(pathlib.Path, "replace", replace)
        files.write_bytes(path, b"other")  # the other process, at the worst moment
        replace(partial, path)

    monkeypatch.setattr(pathlib.Path, "replace", late)
    files.write_bytes(tmp_path / "results", b"own")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("results", b"own")]


def test_the_longest_name_can_be_written_and_keeps_its_permissions(tmp_path):
    path = tmp_path / ("\N{SNOWMAN}" * 85)  # 255 bytes
    files.write_bytes(path, b"1")
    path.chmod(0o640)
    files.write_bytes(path, b"2")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"2", 0o640)


def test_a_device_is_written_to_and_not_replaced():
    files.write_bytes("/dev/null", b"1")
    assert pathlib.Path("/dev/null").is_char_device()
    with pytest.raises(InputError, match=r"^/dev/full cannot be written: No space left on device$"):
        files.write_bytes("/dev/full", b"1")


# Figures


def test_figure_is_written_as_png(tmp_path):
    figure = Figure(figsize=(2, 1))
    files.save_figure(figure, tmp_path / "curve.png")
    header = (tmp_path / "curve.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert (header[16:20], header[20:24]) == ((300).to_bytes(4), (150).to_bytes(4))
    assert [entry.name for entry in tmp_path.iterdir()] == ["curve.png"]


def test_figure_that_cannot_be_written_leaves_the_old_one(tmp_path, small_disk):
    (tmp_path / "curve.png").write_text("old")
    message = r"curve\.png cannot be written: File too large$"
    with small_disk(10), pytest.raises(InputError, match=message):
        files.save_figure(Figure(), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_text() == "old"
