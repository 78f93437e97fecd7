"""measure_equivariance: the vectors and sweeps it measures, and changes of stroke width."""

import functools
import json
import re

import in_process
import jax
import numpy as np
import pytest
import small_runs
from scipy import ndimage

from experiments import measure_equivariance
from experiments.analysis import equivariance
from experiments.data import datasets
from experiments.data.affine import Pose, warp
from experiments.figures.poses import SweepCurves
from experiments.measure_equivariance import change_stroke_width
from experiments.training import trained

pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache  # each network is compiled once
def load(workdir, *, data_dir, original=trained.load):
    run = original("cnn" if workdir == "canvas" else workdir, data_dir=data_dir)
    if workdir == "canvas":  # a run with a larger image size
        images = datasets.centred(run.test.images, 18)
        run = run._replace(test=run.test._replace(images=images))
    return run


FEW = {"examples_per_class": 4, "steps": 3, "workdir": "capsnet", "cnn_workdir": "cnn"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    digits = small_runs.write_digits(folder / "digits", size=200)
    small_runs.save_run(folder / "capsnet", digits)
    small_runs.save_run(folder / "cnn", digits, network="pooling_cnn")
    return folder


@pytest.fixture
def program(folder, tmp_path, monkeypatch, capsys):
    """Return a function that runs the program in the runs' folder: exit status, stdout, stderr."""
    monkeypatch.setattr(trained, "load", load)
    monkeypatch.chdir(folder)

    def program(**flags):
        settings = {"output": tmp_path / "out"} | FEW | flags
        return in_process.run(measure_equivariance, settings, monkeypatch, capsys)

    return program


def test_vectors_are_true_class_capsules_and_last_hidden_units(program, tmp_path, monkeypatch):
    calls = []

    def measure_sweep(*arrays, **options):
        calls.append((*arrays, options))
        curves = SweepCurves(*np.zeros((3, *arrays[1].shape[:2])))
        return {"length_stability": 0.25 * len(calls)}, curves

    monkeypatch.setattr(equivariance, "measure_sweep", measure_sweep)
    status, stdout, _ = program(shift=2.5, rotation=40, thinning=0.5, thickening=1.5, seed=3)
    assert status == 0
    rows = json.loads((tmp_path / "out/results.json").read_text())
    capsnet, cnn = (load(name, data_dir="") for name in ("capsnet", "cnn"))
    digits = measure_equivariance.first_of_each_class(capsnet.dataset.test, 4)
    np.testing.assert_array_equal(digits.labels, np.repeat(np.arange(10), 4))
    images = digits.images / np.float32(255)

    @jax.jit
    def encode(capsnet_params, cnn_params, images):
        capsules = capsnet.trainer.model(capsnet_params)(images)
        return capsules[np.arange(40), digits.labels], cnn.trainer.model(cnn_params).features(
            images
        )

    calls_and_rows = zip(calls, rows, strict=True)
    for label, values, move in (
        (
            "rotation (degrees)",
            [-40, 0, 40],
            lambda x: warp(images, Pose.broadcast(40, rotation=x)),
        ),
        (
            "shift (pixels)",
            [-2.5, 0, 2.5],
            lambda x: warp(images, Pose.broadcast(40, shift=(x, 0))),
        ),
        (
            "stroke width (pixels)",
            [-0.5, 0.5, 1.5],
            lambda x: change_stroke_width(images, [x])[0],
        ),
    ):
        sweep = [encode(capsnet.params, cnn.params, move(x)) for x in (0, *values)]
        for network, vectors in zip(
            ("capsnet", "pooling_cnn"), zip(*sweep, strict=True), strict=True
        ):
            (original, swept, steps, classes, options), row = next(calls_and_rows)
            assert original.shape == (40, 3 if network == "capsnet" else 256)
            expected = np.stack(vectors)
            np.testing.assert_allclose(original, expected[0], rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(swept, expected[1:], rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(steps, values)
            np.testing.assert_array_equal(classes, digits.labels)
            assert options == {"dimensions": 3, "seed": 3}
            assert (row["network"], row["transformation"]) == (network, label)
    assert [row["length_stability"] for row in rows] == [0.25 * n for n in range(1, 7)]
    assert len(stdout.splitlines()) == 7
    assert (tmp_path / "out/equivariance.png").read_bytes().startswith(b"\x89PNG")


def test_a_capsule_network_can_be_measured_without_a_cnn(program, tmp_path):
    status, _, _ = program(cnn_workdir="")
    assert status == 0
    rows = json.loads((tmp_path / "out/results.json").read_text())
    assert [row["network"] for row in rows] == ["capsnet"] * 3
    assert {"length_stability", "direction_smoothness", "decodability"} < rows[0].keys()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"workdir": "", "cnn_workdir": ""}, "workdir holds no run: it has no config.json"),
        ({"workdir": "cnn", "cnn_workdir": ""}, "--workdir must be a run of a capsule network, .*"),
        ({"cnn_workdir": "capsnet"}, "workdir capsnet is named twice"),
        (
            {"cnn_workdir": "canvas"},
            "the runs must have one image size, got 17x17x1 in capsnet, .*",
        ),
        ({"workdir": "none"}, "workdir none holds no run: it has no config.json"),
        ({"examples_per_class": 90}, r"--examples_per_class must be at most \d+, got 90"),
        ({"examples_per_class": 3}, "--examples_per_class must be at least 4, got 3"),
        ({"steps": 2}, "--steps must be at least 3, got 2"),
    ],
)
def test_invalid_settings_are_refused(program, flags, message):
    status, stdout, stderr = program(**flags)
    assert (status, stdout) == (2, "")
    assert re.fullmatch(f"measure_equivariance: {message}\n", stderr)


CHANGES = (-1.5, -0.6, 0.0, 0.3, 1.0, 2.2)


def test_stroke_width_of_a_bar_changes_as_given():
    images = np.zeros((2, 28, 28, 1), np.float32)
    images[0, :, 11:15] = 0.8
    images[1, 9:14, :] = 0.8
    result = change_stroke_width(images, CHANGES)
    assert result.shape == (6, 2, 28, 28, 1)
    for change, (upright, flat) in zip(CHANGES, result[..., 0], strict=True):
        # Along the middle, because the image's border cuts the bars' ends.
        np.testing.assert_allclose(upright[14].sum() / 0.8, 4 + change, atol=0.01)
        np.testing.assert_allclose(flat[:, 14].sum() / 0.8, 5 + change, atol=0.01)


@pytest.mark.parametrize("change", [-1.5, 1.5])
def test_stroke_width_changes_by_dilation_or_erosion_with_a_disc(change):
    image = np.zeros((28, 28), np.float32)
    image[8:20, 9:13] = image[8:12, 9:20] = 1
    fine = np.kron(image, np.ones((8, 8))) > 0.5
    radius = abs(change) / 2 * 8
    steps = np.arange(-8, 9)
    disc = np.hypot(*np.meshgrid(steps, steps)) <= radius
    operation = ndimage.binary_dilation if change > 0 else ndimage.binary_erosion
    expected = operation(fine, disc).reshape(28, 8, 28, 8).mean((1, 3))
    found = change_stroke_width(image[None, ..., None], [change])[0, 0, ..., 0]
    assert (
        np.abs(found - expected).max() < 0.2
    )  # of a pixel, because the discs are on grids of different resolution
    np.testing.assert_allclose(found.sum(), expected.sum(), rtol=0.03)


def test_thicker_strokes_contain_thinner_ones_and_blank_images_stay_blank():
    images = np.random.default_rng(0).random((3, 14, 14, 3), np.float32) ** 4
    images[1] = 0
    result = change_stroke_width(images, CHANGES)
    assert result.min() >= 0
    assert (result.max((1, 2, 3, 4)) <= images.max() + 1e-6).all()
    assert (np.diff(result, axis=0) >= -1e-6).all()
    assert not result[:, 1].any()
    assert result[-1, 0].mean() > 2 * result[0, 0].mean()
