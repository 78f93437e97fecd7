"""Checkpoints: what is saved comes back bit for bit, or its damage is named."""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import open_workdir

from experiments.errors import InputError
from experiments.training.checkpoints import Checkpoints, begin_training, check_metrics

ROOT = pathlib.Path(__file__).parents[1]


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
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore(make_state(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with the checkpoints 1 and 2; never changed, only copied."""
    workdir = open_workdir(tmp_path_factory.mktemp("saved") / "run")
    with Checkpoints(workdir) as checkpoints:
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
    with Checkpoints(workdir) as checkpoints:
        for step in (3, 4):
            checkpoints.save(step, make_state(step))
        assert checkpoints.steps() == [2, 3, 4]
    assert {entry.name for entry in (workdir / "checkpoints").iterdir()} == {"2", "3", "4"}


def test_a_step_is_saved_once_and_never_out_of_order(workdir):
    with Checkpoints(workdir) as checkpoints:
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


def files_of(workdir, step):
    return sorted(path for path in (workdir / f"checkpoints/{step}").rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", [flip, truncate, delete])
def test_damage_is_named_and_the_good_one_before_is_used(workdir, caplog, damage):
    damage(max(files_of(workdir, 2), key=lambda path: path.stat().st_size), 0.5)
    step, state = restore(workdir)
    assert step == 1
    assert_same(state, make_state(1))
    [message] = caplog.messages
    assert message.startswith(f"checkpoint {workdir / 'checkpoints/2'} is damaged (")


def test_every_damage_of_every_file_is_noticed(workdir):
    """A flipped bit, a torn, lost or swapped file; Orbax restores some of these silently."""
    flip(workdir / "checkpoints/1/default/_METADATA", 0.5)  # all are damaged: nothing to restore
    rng, paths = random.Random(0), files_of(workdir, 2)
    contents = {path: path.read_bytes() for path in paths}

    def assert_noticed(changed):
        with pytest.raises(InputError, match=r"^every checkpoint in .* is damaged: "):
            restore(workdir)
        for path in changed:
            path.write_bytes(contents[path])

    for path in paths:
        for damage in (*[flip] * 8, truncate, delete):
            damage(path, rng.random())
            assert_noticed([path])
    first, second = sorted(paths, key=lambda path: len(contents[path]))[-2:]
    first.write_bytes(contents[second])
    second.write_bytes(contents[first])
    assert_noticed([first, second])
    assert restore(workdir)[0] == 2


def test_a_checkpoint_with_the_record_of_an_older_version_is_restored(workdir):
    """Its record has a CRC-32 of every array and of itself."""
    path = workdir / "checkpoints/2/record.json"
    record = json.loads(path.read_bytes())["record"]
    for leaf in record["leaves"].values():
        leaf["crc32"] = 1
    sealed = {"crc32": zlib.crc32(json.dumps(record).encode()), "record": record}
    path.write_text(json.dumps(sealed))
    step, state = restore(workdir)
    assert step == 2
    assert_same(state, make_state(2))
    path.write_text(json.dumps(sealed | {"crc32": 1}))
    assert restore(workdir)[0] == 1


def test_a_checkpoint_copied_to_another_step_is_damaged(workdir, caplog):
    shutil.copytree(workdir / "checkpoints/2", workdir / "checkpoints/5")
    assert restore(workdir)[0] == 2
    [message] = caplog.messages
    assert "checkpoints/5 is damaged (it is that of step 2): going on from step 2" in message


@pytest.mark.parametrize("name", ["0200", "\N{ARABIC-INDIC DIGIT THREE}", "3 "])
def test_a_folder_with_another_name_is_no_checkpoint(workdir, name):
    shutil.copytree(workdir / "checkpoints/2", workdir / "checkpoints" / name)
    assert restore(workdir)[0] == 2


def reseal(path, change):
    """Change a record, and give it the checksum that fits."""
    record = change(json.loads(path.read_bytes())["record"])
    digest = hashlib.sha256(json.dumps(record).encode()).hexdigest()
    path.write_text(json.dumps({"sha256": digest, "record": record}))


def with_file(name):
    return lambda record: record | {"files": {name: "00"} | record["files"]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda record: [record], "it holds no object"),
        (lambda record: None, "it holds no object"),
        (lambda record: {}, "it names no files"),
        (lambda record: record | {"files": []}, "it names no files"),
        (lambda record: record | {"files": {"x": 1}}, "it names the file 'x'"),
        (with_file("../../../config.json"), r"it names the file '\.\./\.\./\.\./config\.json'"),
        (with_file("/etc/passwd"), "it names the file '/etc/passwd'"),
        (with_file("a\0b"), r"it names the file 'a\\x00b'"),
        (with_file("\ud800"), r"it names the file '\\ud800'"),
        (lambda record: record | {"leaves": [1]}, "its leaves are no objects"),
        (lambda record: record | {"leaves": {"a": 1}}, "its leaves are no objects"),
        (lambda record: record | {"step": "2"}, "its step is no integer"),
        (lambda record: record | {"metrics": {"bytes": -1}}, "its metrics have no length .*"),
    ],
)
def test_a_record_of_unforeseen_form_is_damaged(workdir, caplog, change, reason):
    reseal(workdir / "checkpoints/2/record.json", change)
    assert restore(workdir)[0] == 1
    [message] = caplog.messages
    assert re.search(rf"/2 is damaged \(record\.json is damaged: {reason}\): going on", message)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"sha256": "", "record": 1}', "7", "null", ""])
def test_a_record_that_is_none_is_damaged(workdir, caplog, content):
    (workdir / "checkpoints/2/record.json").write_text(content)
    assert restore(workdir)[0] == 1
    assert "checkpoints/2 is damaged (record.json is damaged: " in caplog.messages[0]


def test_a_pipe_or_link_in_place_of_a_file_is_damage_and_not_waited_for(workdir, caplog):
    for step, name in (("2", "record.json"), ("1", "default/_METADATA")):
        path = workdir / "checkpoints" / step / name
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(InputError, match=r"1 \(_METADATA is not a file\)"):
        restore(workdir)


def test_other_settings_missing_from_a_record_are_refused(workdir):
    reseal(workdir / "checkpoints/2/record.json", lambda record: record | {"config": None})
    with pytest.raises(InputError, match="belongs to a run with other settings or data"):
        restore(workdir)


def test_the_warning_gives_the_reason(workdir, caplog):
    (workdir / "checkpoints/2/default/_METADATA").write_text("{}")
    restore(workdir)
    assert caplog.messages == [
        f"checkpoint {workdir / 'checkpoints/2'} is damaged (default/_METADATA is not what was "
        "written): going on from step 1"
    ]


def test_reading_changes_nothing(workdir):
    """A run may be evaluated while it trains, and is in the middle of a save."""
    flip(workdir / "checkpoints/2/default/_METADATA", 0.5)
    (workdir / "checkpoints/3").mkdir()
    (workdir / "checkpoints/4.orbax-checkpoint-tmp").mkdir()
    before = sorted(workdir.rglob("*"))
    assert restore(workdir)[0] == 1
    assert sorted(workdir.rglob("*")) == before


def test_a_save_that_did_not_finish_is_none_that_was_lost(workdir, caplog):
    (workdir / "checkpoints/3").mkdir()
    assert restore(workdir)[0] == 2
    assert caplog.messages == []


def test_the_first_save_clears_away_what_cannot_be_used(workdir, caplog):
    flip(workdir / "checkpoints/2/default/_METADATA", 0.5)
    (workdir / "checkpoints/3").mkdir()
    (workdir / "checkpoints/4.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(workdir) as checkpoints:
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
        with Checkpoints(workdir) as checkpoints:
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


def remove_records(workdir):
    for path in workdir.glob("checkpoints/*/record.json"):
        path.unlink()


def remove_all_but_a_record(workdir):
    remove_records(workdir)
    shutil.rmtree(workdir / "checkpoints/1")


def remove_folders(workdir):
    for path in workdir.glob("checkpoints/*"):
        shutil.rmtree(path)


def remove_checkpoints(workdir):
    shutil.rmtree(workdir / "checkpoints")


def remove_records_and_what_was_last(workdir):
    remove_records(workdir)
    (workdir / "last_checkpoint.json").unlink()


def remove_folders_but_rows(workdir):
    """As a run of which only settings and metrics were copied."""
    remove_folders(workdir)
    (workdir / "last_checkpoint.json").unlink()
    (workdir / "metrics.jsonl").write_text('{"step": 2}\n')


def remove_records_of_a_run_that_had_none(workdir):
    remove_records(workdir)
    (workdir / "last_checkpoint.json").write_text('{"step": -1}')


@pytest.mark.parametrize(
    ("lose", "found"),
    [
        (remove_records, "1, 2 without record.json"),
        (remove_all_but_a_record, "2 without record.json"),
        (remove_folders, "none"),
        (remove_checkpoints, "none"),
        (remove_records_and_what_was_last, "1, 2 without record.json"),
        (remove_folders_but_rows, "none"),
        (remove_records_of_a_run_that_had_none, "1, 2 without record.json"),
    ],
)
@pytest.mark.parametrize(
    "use",
    [
        restore,
        begin_training,
        lambda workdir: Checkpoints(workdir).save(3, make_state(3)),
    ],
)
def test_lost_checkpoints_are_refused_and_nothing_is_replaced(workdir, lose, found, use):
    lose(workdir)
    before = sorted(workdir.rglob("*"))
    message = (
        f"workdir {workdir} was trained to step 2, but {workdir / 'checkpoints'} has no complete "
        f"checkpoint (found {found}); put them back, or to start again remove {workdir} or use "
        "another --workdir"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        use(workdir)
    assert sorted(workdir.rglob("*")) == before


def test_a_lost_record_is_named_and_its_checkpoint_set_aside(workdir, caplog):
    (workdir / "checkpoints/2/record.json").unlink()
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.restore(make_state(0))[0] == 1
        checkpoints.save(3, make_state(3))
    assert caplog.messages == [
        f"checkpoint {workdir / 'checkpoints/2'} is damaged (it has no record.json): going on from "
        "step 1"
    ]
    names = {entry.name for entry in (workdir / "checkpoints").iterdir()}
    assert names == {"1", "damaged_2", "3"}
    caplog.clear()
    assert restore(workdir)[0] == 3
    assert caplog.messages == []


def test_a_lost_folder_is_named(workdir, caplog):
    shutil.rmtree(workdir / "checkpoints/2")
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.restore(make_state(0))[0] == 1
        checkpoints.save(2, make_state(2))
    assert caplog.messages == [
        f"checkpoint {workdir / 'checkpoints/2'} is damaged (its folder is missing): going on from "
        "step 1"
    ]
    assert restore(workdir)[0] == 2


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"step": "2"}', b'{"step": 1}'])
def test_a_lost_note_of_the_last_checkpoint_is_written_again(workdir, caplog, content):
    path = workdir / "last_checkpoint.json"
    before = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert restore(workdir)[0] == 2
    begin_training(workdir)
    assert path.read_bytes() == before
    assert caplog.messages == []


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
        Checkpoints(workdir) as checkpoints,
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
    with Checkpoints(workdir) as checkpoints:
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
    with Checkpoints(workdir) as checkpoints:
        with pytest.raises(InputError, match=message):
            checkpoints.save(3, make_state(3))
        assert checkpoints.steps() == [1, 2]


def rows_of(steps):
    return b"".join(b'{"step": %d, "loss": 1.5}\n' % step for step in steps)


@pytest.fixture
def with_metrics(workdir):
    """A checkpoint of step 3, after rows of the steps 1 to 3, and the row of step 4."""
    path = workdir / "metrics.jsonl"
    path.write_bytes(rows_of([1, 2, 3]))
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(3, make_state(3))
    path.write_bytes(rows_of([1, 2, 3, 4]))
    return path


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "it has no rows"),
        (rows_of([1, 2]), "it has no rows after step 2"),
        (rows_of([1, 2, 3])[:-9], "it has no rows after step 2"),
        (rows_of([1, 2, 3])[:-1], "it has no rows after step 3"),
        (rows_of([1, 2, 3, 4]).replace(b"1.5", b"1.6", 1), "rows were changed, added or removed"),
        (rows_of([0, 1, 2, 3]), "rows were changed, added or removed"),
        (rows_of([1, 3, 4, 5]), "rows were changed, added or removed"),
        (rows_of([2, 1, 3]), "rows were changed, added or removed"),
    ],
)
def test_metrics_that_a_checkpoint_was_not_saved_with_are_refused(with_metrics, content, found):
    check_metrics(with_metrics.parent)
    with_metrics.write_bytes(content)
    message = f"is not what was saved with the checkpoint of step 3: {found}; put it back, or remov"
    with pytest.raises(InputError, match=message):
        check_metrics(with_metrics.parent, 3)
    check_metrics(with_metrics.parent, 2)  # which had none yet


def test_missing_metrics_are_named_and_the_run_goes_on(with_metrics, caplog):
    with_metrics.unlink()
    check_metrics(with_metrics.parent)
    assert caplog.messages == [f"{with_metrics} is missing: there are no rows up to step 3"]


def test_other_errors_of_a_save_are_not_taken_for_a_full_disk(workdir):
    with Checkpoints(workdir) as checkpoints, pytest.raises(ValueError, match="empty"):
        checkpoints.save(3, {})


PROGRAM = """
import dataclasses, itertools, resource
import jax
import jax.numpy as jnp
from experiments import cli
from experiments.training import records
from experiments.training.checkpoints import Checkpoints

@dataclasses.dataclass(frozen=True)
class Config:
    workdir: str = cli.flag("", "Folder.", affects_result=False)
    largest_file: int = cli.flag(resource.RLIM_INFINITY, "Bytes; -1: no limit.")
    more_arrays: int = cli.flag(0, "Arrays beside the first.")

def main(config):
    workdir = records.open_workdir(config.workdir, config=config, data_sha256="")
    with Checkpoints(workdir) as checkpoints:
        for step in itertools.count(1):
            noise = jax.random.normal(jax.random.key(0), (config.more_arrays, 3000))
            rest = {str(k): row for k, row in enumerate(noise)}
            checkpoints.save(step, {"x": jnp.full((400, 500), step), **rest})
            print(step, flush=True)
            resource.setrlimit(resource.RLIMIT_FSIZE, (config.largest_file, -1))

cli.run(Config, main)
"""


@pytest.fixture
def start():
    """Start programs that save step after step; none outlives its test."""
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
    folders = [tmp_path / str(number) for number in range(2)]
    for folder, program in [(folder, start(folder)) for folder in folders]:
        assert program.stdout.readline() == "1\n"
        time.sleep(rng.uniform(0, 0.3))
        program.kill()
        newest = max([1, *map(int, program.stdout.read().split())])
        with Checkpoints(folder / "run") as checkpoints:
            step, state = checkpoints.restore({"x": jnp.zeros((400, 500), jnp.int32)})
            assert step - newest in (0, 1)  # it may have died between the save and the print
            assert_same(state, {"x": jnp.full((400, 500), step)})
            checkpoints.save(step + 1, state)


@pytest.mark.parametrize("size", [200, 8_000])
def test_a_program_whose_write_fails_ends_with_one_line(tmp_path, start, size):
    # Many arrays: when one fails, the writes of others are under way.
    program = start(tmp_path, largest_file=size, more_arrays=30)
    stdout, stderr = program.communicate(timeout=100)
    assert (program.returncode, stdout) == (2, "1\n")
    assert re.fullmatch(
        r"saver: checkpoint .*/2 cannot be written: File too large; those before it are intact\n",
        stderr,
    )
