"""evaluate: test set, image files and refused runs."""

import dataclasses
import json
import pathlib
import re
import shutil

import in_process
import numpy as np
import pytest
from PIL import Image

from experiments import evaluate
from experiments.analysis import inspection
from experiments.data import datasets, idx, image_files
from experiments.errors import InputError
from experiments.training import loop, mnist, records
from experiments.training import trained as load_trained
from experiments.training.checkpoints import Checkpoints


def write_idx(folder, *, seed):
    rng = np.random.default_rng(seed)
    for split, size in (("train", 40), ("test", 21)):
        images = rng.integers(0, 256, (size, 17, 17), dtype=np.uint8)
        labels = (np.arange(size) % 9).astype(np.uint8)  # no example of class 9
        for stem, array in zip(idx.STEMS[split], (images, labels), strict=True):
            (folder / stem).write_bytes(idx.header(array) + array.tobytes())


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_idx(folder, seed=0)
    return mnist.Config(
        dataset="mnist",
        data_dir=str(folder),
        workdir="elsewhere",
        batch_size=8,
        conv_channels=2,
        primary_types=2,
        capsule_length=3,
        num_iterations=1,
        capsule_bias=0.1,
    )


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory):
    """A run with two checkpoints: workdir, trainer, parameters of the newest one, and data set."""
    dataset = datasets.load(settings.dataset, data_dir=settings.data_dir)
    trainer = mnist.build(settings, dataset)
    path = tmp_path_factory.mktemp("trained") / "run"
    workdir = records.open_workdir(
        path, config=settings, data_sha256=dataset.sha256, data=dataset.facts
    )
    state = trainer.initial_state(0)
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(1, state)
        weights = np.random.default_rng(0).normal(size=state.params["capsules"]["weights"].shape)
        state.params["capsules"]["weights"] = np.float32(weights)
        checkpoints.save(2, state)
    return workdir, trainer, state.params, dataset


@pytest.fixture
def workdir(trained, tmp_path):
    return shutil.copytree(trained[0], tmp_path / "run")


@pytest.fixture
def program(monkeypatch, capsys, trained):
    """Return a function that runs the program in this process: exit status, stdout and stderr."""
    monkeypatch.setattr(mnist, "build", lambda *_: trained[1])  # it is compiled once

    def program(**flags):
        return in_process.run(evaluate, flags, monkeypatch, capsys)

    return program


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_evaluation_prints_all_tables_and_writes_nothing(program, workdir, trained):
    _, trainer, params, dataset = trained
    before = contents(workdir)
    status, stdout, _ = program(workdir=workdir, batch_size=8)
    assert status == 0
    assert contents(workdir) == before
    evaluation = trainer.evaluate(params, dataset.test, batch_size=8)
    lines = stdout.splitlines()
    assert lines[0].startswith("confusion matrix")
    assert lines[1].split() == list("0123456789")
    counts = inspection.confusion_counts(evaluation, dataset.test.labels)
    assert counts.sum() == 21
    for line, name, row in zip(lines[2:12], "0123456789", counts, strict=True):
        assert line.split() == [name, *(str(count) if count else "." for count in row)]
        assert len(line) == len(lines[1])
    assert lines[12] == ""
    calibration = list(evaluate.calibration_lines(evaluation.scores, dataset.test.labels))
    assert lines[13 : 14 + len(calibration)] == [*calibration, ""]
    accuracies = list(inspection.accuracy_lines(evaluation, dataset.test.labels))
    assert lines[14 + len(calibration) :] == accuracies
    wrong = 21 - np.trace(counts)
    assert lines[-1] == f"test error {100 * wrong / 21:.2f} %: {wrong} of 21 wrong"


def test_accuracy_lines_skip_classes_without_examples():
    lengths = np.eye(3, dtype=np.float32)[[0, 0, 2, 2]]
    lines = inspection.accuracy_lines(loop.Evaluation(lengths, 0.0), np.array([0, 0, 0, 2]))
    assert list(lines) == [
        "class 0: 66.67 % of 3 correct",
        "class 2: 100.00 % of 1 correct",
        "test error 25.00 %: 1 of 4 wrong",
    ]


def test_calibration_table_has_score_and_accuracy_of_each_bin():
    scores = np.array([[0.95, 0.1], [0.92, 0.9], [0.2, 0.6], [1.0, 0.0], [0.61, 0.3]])
    labels = np.array([0, 1, 1, 0, 1])
    lines = list(evaluate.calibration_lines(scores, labels))
    assert [line.split() for line in lines[1:-1]] == [
        ["from", "to", "images", "score", "accuracy"],
        ["0.6", "0.7", "2", "0.605", "0.500"],
        ["0.9", "1.0", "3", "0.957", "0.667"],
    ]
    error = 2 / 5 * 0.105 + 3 / 5 * (2.87 / 3 - 2 / 3)
    assert lines[-1] == f"expected calibration error {error:.3f}"


def test_calibrated_scores_have_calibration_error_zero():
    highest = np.array([0.75, 0.75, 0.75, 0.75])
    scores = np.stack([highest, 1 - highest], 1)
    *_, last = evaluate.calibration_lines(scores, np.array([0, 0, 0, 1]))
    assert last == "expected calibration error 0.000"


@pytest.fixture
def images(tmp_path):
    """Files of a large image of a bar, light on dark and dark on light."""
    pixels = np.zeros((300, 200), np.uint8)
    pixels[40:260, 90:120] = 255
    paths = [tmp_path / "light.png", tmp_path / "dark.png"]
    for path, image in zip(paths, (pixels, 255 - pixels), strict=True):
        Image.fromarray(image).save(path)
    return [str(path) for path in paths]


def test_image_files_are_classified_in_both_polarities(program, workdir, trained, images):
    _, trainer, params, _ = trained
    before = contents(workdir)
    status, stdout, _ = program(workdir=workdir, images=",".join(images))
    assert status == 0
    assert contents(workdir) == before
    lines = stdout.splitlines()
    assert lines[0].split() == ["image", "class", "score", "|", *"0123456789"]
    pixels = image_files.read_images(images, shape=(17, 17, 1))
    lengths = trainer.scores(params, pixels)
    assert lengths.shape == (2, 10)
    assert np.ptp(lengths[0]) > 0.01
    # Below the table: the scores of this network are close.
    assert all(line.startswith("doubtful: ") for line in lines[3:])
    for line, path, row in zip(lines[1:3], images, lengths, strict=True):
        name, winner, longest, _, *shown = line.split()
        assert (name, int(winner)) == (path, row.argmax())
        assert longest == shown[row.argmax()] == f"{row.max():.3f}"
        np.testing.assert_allclose(np.array(shown, float), row, atol=6e-4)
        assert len(line) == len(lines[0])
    assert lines[1].split()[1:] == lines[2].split()[1:]


def test_image_files_are_centred_on_the_canvas(trained, images):
    _, trainer, params, dataset = trained
    settings = mnist.Config(canvas=25)
    test = datasets.placed(dataset.test, 25)
    run = load_trained.Trained(settings, dataset, test, trainer, params, 2)
    small = image_files.read_images(images, shape=(17, 17, 1))
    on_canvas = load_trained.read_images(run, images)
    assert on_canvas.shape == (2, 25, 25, 1)
    np.testing.assert_array_equal(on_canvas[:, 4:-4, 4:-4], small)
    assert on_canvas.sum() == pytest.approx(small.sum())


def test_scores_equal_those_of_evaluate(trained):
    _, trainer, params, dataset = trained
    pixels = dataset.test.images / np.float32(255)
    expected = trainer.evaluate(params, dataset.test, batch_size=8).scores
    found = trainer.scores(params, pixels)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_damaged_checkpoint_is_skipped(program, workdir, trained, caplog):
    _, trainer, _, dataset = trained
    (workdir / "checkpoints/2/default/_METADATA").write_text("{}")
    status, stdout, _ = program(workdir=workdir)
    assert status == 0
    assert "2 is damaged" in caplog.text
    older = trainer.evaluate(trainer.initial_state(0).params, dataset.test, batch_size=128)
    assert stdout.splitlines() == list(evaluate.summary_lines(older, dataset.test.labels))


def test_data_dir_flag_replaces_the_runs_folder(program, workdir, settings):
    moved = pathlib.Path(settings.data_dir).rename(f"{settings.data_dir}_moved")
    try:
        status, _, stderr = program(workdir=workdir)
        there = program(workdir=workdir, data_dir=moved)
    finally:
        moved.rename(settings.data_dir)
    message = f"--data_dir must be a folder that can be read, got {settings.data_dir}."
    assert (status, stderr) == (2, f"evaluate: {message}\n")
    assert there[0] == 0


def edit(workdir, **changes):
    """Change settings in config.json; None removes a setting."""
    run = json.loads((workdir / "config.json").read_bytes())
    settings = run["config"] | changes
    run["config"] = {name: value for name, value in settings.items() if value is not None}
    (workdir / "config.json").write_text(json.dumps(run))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"momentum": 0.9}, "another program or version: its config.json has the unknown momentum"),
        ({"seed": None}, "another program or version: its config.json lacks seed"),
        ({"seed": -1}, "a damaged config.json: --seed must be at least 0, got -1"),
        ({"seed": "0"}, "a damaged config.json: --seed must be a whole number, got '0'"),
        ({"shift": 1}, "belongs to a run with other settings or data"),
    ],
)
def test_other_settings_are_refused(program, workdir, changes, message):
    edit(workdir, **changes)
    status, stdout, stderr = program(workdir=workdir)
    assert (status, stdout) == (2, "")
    assert re.fullmatch(rf"evaluate: .*{re.escape(message)}\n", stderr)


def test_other_data_are_refused(program, workdir, trained, tmp_path):
    write_idx(tmp_path, seed=1)
    status, stdout, stderr = program(workdir=workdir, data_dir=tmp_path)
    other = datasets.load("mnist", data_dir=str(tmp_path))
    assert (status, stdout) == (2, "")
    assert stderr == (
        f"evaluate: workdir {workdir} was trained on mnist with sha256 {trained[3].sha256}, but "
        f"the data found have {other.sha256}; name the folder of the run's data with --data_dir\n"
    )


def test_a_run_without_checkpoints_is_refused(program, workdir):
    shutil.rmtree(workdir / "checkpoints")
    status, _, stderr = program(workdir=workdir)
    lost = (
        f"evaluate: workdir {workdir} was trained to step 2, but .* has no complete checkpoint .*"
    )
    assert status == 2
    assert re.fullmatch(f"{lost}\n", stderr)
    (workdir / "last_checkpoint.json").unlink()
    status, _, stderr = program(workdir=workdir)
    message = f"evaluate: workdir {workdir} has no checkpoint yet; let it train further\n"
    assert (status, stderr) == (2, message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"workdir": "none"}, "workdir none holds no run: it has no config.json"),
        ({"images": "none.png"}, "none.png: the image cannot be read: .*"),
        ({"batch_size": 0}, "--batch_size must be at least 1, got 0"),
        ({"image": "a.png"}, r"Unknown command line flag 'image'. Did you mean: images \?"),
    ],
)
def test_invalid_settings_are_refused(program, workdir, flags, message):
    status, stdout, stderr = program(**{"workdir": workdir} | flags)
    assert (status, stdout) == (2, "")
    assert re.fullmatch(f"evaluate: {message}\n", stderr)


def test_config_of_restores_the_config(workdir, settings):
    found = load_trained.config_of(mnist.Config, dataclasses.asdict(settings), "run")
    assert found == settings
    lacking = dataclasses.asdict(settings)
    del lacking["diagnostics"]  # affects_result=False
    assert load_trained.config_of(mnist.Config, lacking, "run") == settings
    del lacking["dtype"], lacking["dataset"]
    with pytest.raises(InputError, match=r"^workdir run .* lacks dataset, dtype$"):
        load_trained.config_of(mnist.Config, lacking, "run")


def test_a_copied_run_classifies_images_without_its_data(program, workdir, settings, images):
    with_data = program(workdir=workdir, images=",".join(images))
    moved = pathlib.Path(settings.data_dir).rename(f"{settings.data_dir}_moved")
    try:
        without = program(workdir=workdir, images=",".join(images))
    finally:
        moved.rename(settings.data_dir)
    assert with_data[0] == without[0] == 0
    assert without[1] == with_data[1]
