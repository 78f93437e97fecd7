"""train_mnist: what a run leaves, and what the program refuses in one line."""

import dataclasses
import functools
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
import training_runs
from jax.experimental.compilation_cache import compilation_cache
from training_runs import LAST_STEP, contents, rows

from experiments.training.checkpoints import saved_steps

pytestmark = pytest.mark.usefixtures("quick_compilation")

FIGURES = {
    *("reconstructions", "dimension_tweaks", "couplings", "coupling_entropy"),
    *("confusion_matrix", "misclassified", "learning_curves"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return training_runs.tiny_config(
        training_runs.write_noise(tmp_path_factory.mktemp("data") / "noise")
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The folder of --compilation_cache of the finished run."""
    names = ("jax_persistent_cache_min_compile_time_secs", "jax_compilation_cache_dir")
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    yield tmp_path_factory.mktemp("compiled")
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def finished(tiny, compiled, tmp_path_factory):
    """The folder of a run that nothing disturbed; never changed, only copied."""
    config = dataclasses.replace(tiny, compilation_cache=str(compiled))
    return training_runs.finish(config, tmp_path_factory.mktemp("finished"))


@pytest.fixture
def program(tiny, tmp_path, monkeypatch, capsys):
    """Run the program in this process: its exit status and stderr."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(training_runs.run_program, tiny, monkeypatch, capsys)


def test_a_run_leaves_what_it_promises(finished, compiled):
    names = {entry.name for entry in finished.iterdir()}
    assert names == {
        *("config.json", "last_checkpoint.json", "metrics.jsonl", "checkpoints", "figures")
    }
    assert saved_steps(finished) == [24, 28, LAST_STEP]
    found = rows(finished)
    assert [row["step"] for row in found] == sorted({*range(2, 31, 2), *range(5, 31, 5)})
    tested = {row["step"]: row for row in found if "test_error" in row}
    assert list(tested) == list(range(5, 31, 5))
    wrong = [row["test_error"] * 21 / 100 for row in tested.values()]  # all 21 count
    np.testing.assert_allclose(wrong, np.round(wrong), atol=1e-9)
    assert found[-1]["train_loss"] < found[0]["train_loss"]
    assert any(compiled.glob("jit__step-*"))


def test_every_figure_is_drawn(finished):
    drawn = {path.name: path.read_bytes() for path in (finished / "figures").iterdir()}
    assert drawn.keys() == {f"{name}.png" for name in FIGURES}
    for name, content in drawn.items():
        assert content.startswith(b"\x89PNG"), name
        assert len(content) > 5_000, name


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
    training_runs.write_noise(tmp_path / "data", seed=1)
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
        ({"num_epochs": 10**9}, "--num_epochs=1000000000 are .* steps, .* at most 2147483647"),
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
    training_runs.write_noise(tmp_path, side=16)
    status, stderr = program(data_dir=".")
    assert status == 2
    assert re.fullmatch(
        r"train_mnist: CapsNet: image_shape must be at least 17 pixels .*\n", stderr
    )
    assert not (tmp_path / "run").exists()
