"""evaluate_poses: accuracies, affNIST, resumption and refused settings."""

import dataclasses
import functools
import json
import re
import shutil

import in_process
import jax
import numpy as np
import pytest
import small_runs
from scipy import io

from experiments import evaluate_poses, files
from experiments.data import affnist, datasets
from experiments.data.affine import Pose, random_affine, warp
from experiments.training import trained

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Runs that are others with another data set.
OTHER_DATA = {
    "clothes": ("canvas", {"name": "fashion_mnist"}),
    "other": ("cnn", {"sha256": "0" * 64}),
}


@functools.cache  # each network is compiled once
def load(workdir, *, data_dir, original=trained.load):
    name, changes = OTHER_DATA.get(workdir, (workdir, {}))
    run = original(name, data_dir=data_dir)
    return run._replace(dataset=dataclasses.replace(run.dataset, **changes))


FEW = {"rotations": "0,90", "shifts": "-2,3", "scales": "0.5", "shears": "0,20", "draws": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of runs: a capsule network, and CNNs without and with a canvas."""
    folder = tmp_path_factory.mktemp("runs")
    digits = small_runs.write_digits(folder / "digits")
    small_runs.save_run(folder / "capsnet", digits)
    small_runs.save_run(folder / "cnn", digits, network="pooling_cnn")
    small_runs.save_run(folder / "canvas", digits, network="pooling_cnn", canvas=40)
    shutil.copytree(folder / "canvas", folder / "copy")
    return folder


@pytest.fixture
def program(folder, tmp_path, monkeypatch, capsys):
    """Return a function that runs the program in the runs' folder: exit status, stdout, stderr."""
    monkeypatch.setattr(trained, "load", load)
    monkeypatch.chdir(folder)

    def program(**flags):
        settings = {"output": tmp_path / "out"} | FEW | flags
        return in_process.run(evaluate_poses, settings, monkeypatch, capsys)

    return program


def accuracy(run, images):
    """Return the accuracy on images with the labels of the test set, in percent."""
    images = np.float32(images)
    return 100 * np.mean(run.trainer.scores(run.params, images).argmax(1) == run.test.labels)


def test_accuracies_equal_those_computed_from_scores(program, folder, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    status, stdout, _ = program(workdirs="capsnet,cnn", seed=4, rotation=50, shift=0.2)
    assert status == 0
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results[2:] == list(evaluate_poses.PUBLISHED)
    assert len({row["clean"] for row in results[:2]}) == 2  # the networks differ
    sweeps = json.loads((tmp_path / "out/sweeps.json").read_text())
    points = {(p["run"], p["transformation"], p["value"]): p["accuracy"] for p in sweeps}
    assert len(points) == len(sweeps) == 2 * 7
    assert {point["examples"] for point in sweeps} == {60}  # fewer than --sweep_examples
    for row in results[:2]:
        run = load(row["run"], data_dir="")
        images = run.test.images / np.float32(255)
        poses = [random_affine(60, 17, 50, 0.2, key=[4, draw]) for draw in range(2)]
        drawn = [accuracy(run, warp(images, pose)) for pose in poses]
        assert {*row} == {"run", "network", "clean", "clean_cases", "affine", "affine_deviation"}
        assert row["clean_cases"] == 60
        assert row["network"] == run.config.network
        assert row["clean"] == pytest.approx(accuracy(run, images))
        assert row["affine"] == pytest.approx(np.mean(drawn))
        assert row["affine_deviation"] == pytest.approx(abs(drawn[0] - drawn[1]) / 2**0.5)
        for label, value, pose in (
            ("rotation (degrees)", 0, Pose.broadcast(60)),
            ("rotation (degrees)", 90, Pose.broadcast(60, rotation=90)),
            ("shift (pixels)", 3, Pose.broadcast(60, shift=(3, 0))),
            ("scale", 0.5, Pose.broadcast(60, scale=(0.5, 0.5))),
            ("shear (degrees)", 20, Pose.broadcast(60, shear=20)),
        ):
            found = points[row["run"], label, value]
            assert found == pytest.approx(accuracy(run, warp(images, pose)))
        assert f"{row['affine']:.2f}" in stdout
    assert (tmp_path / "out/sweeps.png").read_bytes().startswith(b"\x89PNG")
    assert "82.91" in stdout


def test_seed_interpolation_and_count_reach_the_transformations(program, tmp_path, monkeypatch):
    moved = []

    def recorded(images, pose, *, order):
        moved.append((len(images), pose.rotation.sum(), pose.shift.sum(), order))
        return warp(images, pose, order=order)

    monkeypatch.setattr(evaluate_poses, "warp", recorded)
    monkeypatch.setattr(files, "save_figure", lambda *_: None)

    def moves(**changes):
        moved.clear()
        assert program(workdirs="cnn", **changes)[0] == 0
        return [*moved]

    usual = moves()
    assert [move[0] for move in usual] == 9 * [60]
    assert moves() == usual
    assert moves(seed=1)[2:] == usual[2:]
    assert all(move != other for move, other in zip(moves(seed=1)[:2], usual, strict=False))
    assert [move[3] for move in moves(interpolation="nearest")] == 9 * [0]
    few = moves(sweep_examples=7)
    assert few[:2] == usual[:2]
    assert [move[0] for move in few[2:]] == 7 * [7]
    sweeps = json.loads((tmp_path / "out/sweeps.json").read_text())
    assert {point["examples"] for point in sweeps} == {7}


def test_networks_are_matched_within_a_tenth_of_a_point():
    rows = [{"run": "a", "clean": 99.23}, {"run": "b", "clean": 99.13}]
    *_, last = evaluate_poses.summary_lines(rows)
    assert last == "matched: clean accuracies differ by 0.10 points"
    rows[1]["clean"] = 99.12
    *_, verdict, warning = evaluate_poses.summary_lines(rows)
    assert verdict == "not matched: clean accuracies differ by 0.11 points"
    assert warning.startswith("differences in the other columns may be due to")
    assert "matched" not in "".join(evaluate_poses.summary_lines(rows[:1]))


def test_affnist_like_is_reported_under_its_name(program, folder, tmp_path):
    status, _, _ = program(workdirs="canvas")
    assert status == 0
    (row,) = json.loads((tmp_path / "out/results.json").read_text())[:1]
    run = load("canvas", data_dir="")
    assert run.test.images.shape == (60, 40, 40, 1)
    cases = affnist.make_affnist_like(run.dataset.test).images / np.float32(255)
    assert row["affnist_like"] == pytest.approx(accuracy(run, cases))
    assert row["affnist_like_cases"] == row["clean_cases"] == 60
    assert row["clean"] == pytest.approx(accuracy(run, run.test.images / np.float32(255)))
    assert "affnist" not in row
    # Sweeps start from the middle of the canvas.
    sweeps = json.loads((tmp_path / "out/sweeps.json").read_text())
    centred = datasets.centred(run.dataset.test.images, 40) / np.float32(255)
    assert sweeps[0]["accuracy"] == pytest.approx(accuracy(run, centred))


@pytest.mark.parametrize("flag", ["affnist_dir", "data_dir"])
def test_affnist_is_read_from_either_folder(program, tmp_path, flag):
    images = np.random.default_rng(0).integers(0, 256, (1600, 30), np.uint8)
    labels = np.arange(30)[None] % 10
    struct = {"image": images, "label_int": labels.astype(np.uint8)}
    small_runs.write_digits(tmp_path / "digits")
    path = tmp_path / "digits/transformed/test.mat"
    path.parent.mkdir()
    io.savemat(path, {"affNISTdata": struct})
    status, _, _ = program(workdirs="canvas", **{flag: tmp_path / "digits"})
    assert status == 0
    (row,) = json.loads((tmp_path / "out/results.json").read_text())[:1]
    assert not any("affnist_like" in title for title in row)
    assert row["affnist_cases"] == 30
    run = load("canvas", data_dir="")
    scores = run.trainer.scores(run.params, np.float32(images.T.reshape(30, 40, 40, 1)) / 255)
    assert row["affnist"] == pytest.approx(100 * np.mean(scores.argmax(1) == labels[0]))


@pytest.fixture
def measured(monkeypatch):
    """Sizes of the measured slices; the program is killed after `limited.limit` of them."""
    counts, count = [], evaluate_poses.count_correct

    def limited(run, split, pose, config):
        if len(counts) == limited.limit:
            raise SystemExit(137)
        counts.append(split.size)
        return count(run, split, pose, config)

    monkeypatch.setattr(evaluate_poses, "count_correct", limited)
    monkeypatch.setattr(evaluate_poses, "SLICE_SIZE", 40)
    monkeypatch.setattr(files, "save_figure", lambda *_: None)
    return counts, limited


def read(folder):
    return [(folder / name).read_bytes() for name in ("results.json", "sweeps.json")]


def test_a_killed_program_resumes_to_equal_results(program, tmp_path, measured):
    counts, limited = measured
    limited.limit = None
    assert program(workdirs="canvas,copy", output=tmp_path / "whole")[0] == 0
    # 2 runs; clean, affnist_like, 2 draws and 7 sweep points; 2 slices.
    assert counts == 2 * 11 * [40, 20]
    for limit in (1, 10, 15):  # in clean images, and in sweeps of both runs
        counts.clear()
        limited.limit = limit
        assert program(workdirs="canvas,copy", output=tmp_path / "killed")[0] == 137
    assert not (tmp_path / "killed/results.json").exists()
    counts.clear()
    limited.limit = None
    assert program(workdirs="canvas,copy", output=tmp_path / "killed")[0] == 0
    assert len(counts) == 44 - 1 - 10 - 15
    assert read(tmp_path / "killed") == read(tmp_path / "whole")
    assert not (tmp_path / "killed/progress.json").exists()


def test_progress_with_other_settings_or_networks_is_refused(
    program, tmp_path, measured, monkeypatch
):
    counts, limited = measured
    limited.limit = 9
    assert program(workdirs="canvas")[0] == 137
    path = tmp_path / "out/progress.json"
    before = path.read_bytes()
    counts.clear()
    refusal = (
        "evaluate_poses: .*progress.json holds 9 measurements with other settings or runs; use "
        "another --output, or delete the file to start again\n"
    )
    status, stdout, stderr = program(workdirs="canvas", seed=1)
    assert (status, stdout) == (2, "")
    assert re.fullmatch(refusal, stderr)
    run = load("canvas", data_dir="")
    params = jax.tree.map(lambda x: x + 1, run.params)
    monkeypatch.setattr(trained, "load", lambda *_, **__: run._replace(params=params))
    limited.limit = None
    status, stdout, stderr = program(workdirs="canvas")
    assert (status, stdout) == (2, "")
    assert re.fullmatch(refusal, stderr)
    assert (counts, path.read_bytes()) == ([], before)
    path.unlink()
    assert program(workdirs="canvas")[0] == 0
    assert len(counts) == 22


def test_damaged_progress_is_refused(program, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/progress.json").write_text("{")
    status, stdout, stderr = program(workdirs="cnn")
    assert (status, stdout) == (2, "")
    assert re.fullmatch("evaluate_poses: .*progress.json is damaged .* to start again\n", stderr)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"workdirs": "capsnet,canvas"}, "the runs must have one image size, got 17x17x1 in cap.*"),
        (
            {"workdirs": "cnn,other"},
            "the runs must have one data set, got mnist .* in cnn, mnist .*",
        ),
        ({"workdirs": "cnn,./cnn"}, "workdir ./cnn is named twice"),
        ({"workdirs": "none"}, "workdir none holds no run: it has no config.json"),
        ({"workdirs": ""}, "workdir  ?holds no run: it has no config.json"),
        ({"workdirs": "empty"}, "workdir empty holds no run: it has no config.json"),
        ({"workdirs": "program"}, "workdir program holds a run of another program or version: .*"),
        ({"workdirs": "start"}, "workdir start has no checkpoint yet; let it train further"),
        ({"workdirs": "lost"}, "workdir lost was trained to step 1, but .* put them back, or .*"),
        ({"affnist_dir": "digits"}, "--affnist_dir needs runs with --canvas=40, got .* 17x17 .*"),
        ({"affnist_dir": "none", "workdirs": "canvas"}, "--affnist_dir=none has none of .*"),
        ({"affnist_dir": "~nosuchuser", "workdirs": "canvas"}, ".*=~nosuchuser has none of .*"),
        ({"affnist_dir": 300 * "x", "workdirs": "canvas"}, ".*=x{300} has none of .*"),
        (
            {"affnist_dir": "digits", "workdirs": "clothes"},
            "--affnist_dir needs runs on MNIST digits.*, got fashion_mnist with images of 17x17x1",
        ),
        ({"rotations": "0,x"}, "--rotations must be numbers .* separated by commas, got '0,x'"),
        ({"shifts": ""}, "--shifts must be numbers .*, got ''"),
        ({"shifts": "nan"}, "--shifts must be numbers .*, got 'nan'"),
        ({"scales": "0"}, "--scales must be numbers from 0.01 to 100, separated .*, got '0'"),
        ({"shears": "90"}, "--shears must be numbers from -89 to 89, separated .*, got '90'"),
        ({"draws": 1}, "--draws must be at least 2, got 1"),
        ({"output": "capsnet/config.json"}, ".*config.json.* cannot be written: .*"),
    ],
)
def test_invalid_settings_are_refused(program, folder, flags, message):
    (folder / "empty").mkdir(exist_ok=True)
    if not (folder / "program").exists():
        shutil.copytree(folder / "cnn", folder / "program")
        path = folder / "program/config.json"
        path.write_text(path.read_text().replace('"shift"', '"overlap"'))
        shutil.copytree(folder / "cnn", folder / "start")
        shutil.rmtree(folder / "start/checkpoints")
        (folder / "start/last_checkpoint.json").unlink()
        shutil.copytree(folder / "cnn", folder / "lost")
        shutil.rmtree(folder / "lost/checkpoints")
    status, stdout, stderr = program(**{"workdirs": "cnn"} | flags)
    assert (status, stdout) == (2, "")
    assert re.fullmatch(f"evaluate_poses: {message}\n", stderr)
