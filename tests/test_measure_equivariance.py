"""The measurement of equivariance: which vectors it follows along which sweeps."""

import functools
import json
import re

import in_process
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs

from experiments import measure_equivariance
from experiments.analysis import equivariance
from experiments.data.affine import Pose, warp
from experiments.measure_equivariance import change_stroke_width
from experiments.training import trained

load = functools.cache(trained.load)  # a network is compiled once
FEW = {"examples_per_class": 4, "steps": 3, "workdir": "capsnet", "cnn_workdir": "cnn"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    digits = small_runs.write_digits(folder / "digits", size=200)
    small_runs.save_run(folder / "capsnet", digits)
    small_runs.save_run(folder / "cnn", digits, network="pooling_cnn")
    small_runs.save_run(folder / "canvas", digits, network="pooling_cnn", canvas=18)
    return folder


@pytest.fixture
def program(folder, tmp_path, monkeypatch, capsys):
    """Runs the program among the runs, in this process: its exit status, stdout and stderr."""
    monkeypatch.setattr(trained, "load", load)
    monkeypatch.chdir(folder)

    def program(**flags):
        settings = {"output": tmp_path / "out"} | FEW | flags
        return in_process.run(measure_equivariance, settings, monkeypatch, capsys)

    return program


def test_numbers_are_those_of_the_true_class_capsule_and_of_the_last_hidden_units(
    program, folder, tmp_path
):
    status, stdout, _ = program(shift=2.5, rotation=40, thinning=0.5, thickening=1.5, seed=3)
    assert status == 0
    rows = json.loads((tmp_path / "out/results.json").read_text())
    capsnet, cnn = (load(name, data_dir="") for name in ("capsnet", "cnn"))
    digits = measure_equivariance.first_of_each_class(capsnet.dataset.test, 4)
    np.testing.assert_array_equal(digits.labels, np.repeat(np.arange(10), 4))
    images = digits.images / np.float32(255)
    wanted = []
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
        ("stroke width (pixels)", [-0.5, 0.5, 1.5], lambda x: change_stroke_width(images, [x])[0]),
    ):
        for run in (capsnet, cnn):
            found = []
            for value in (0, *values):
                moved = jnp.asarray(move(value))
                if run is capsnet:
                    capsules = np.asarray(run.model(moved), float)
                    found.append(capsules[np.arange(40), digits.labels])
                else:
                    found.append(np.asarray(run.model.features(moved), float))
            assert found[0].shape == (40, 3 if run is capsnet else 256)
            numbers, _ = equivariance.measure_sweep(
                found[0],
                np.stack(found[1:]),
                np.array(values, float),
                digits.labels,
                dimensions=3,
                seed=3,
            )
            wanted.append({"network": run.config.network, "transformation": label} | numbers)
    for row, other in zip(rows, wanted, strict=True):
        for name in ("network", "transformation"):
            assert row.pop(name) == other.pop(name)
        assert row == pytest.approx(other, rel=1e-2, abs=1e-3)
    assert len(stdout.splitlines()) == 7
    assert (tmp_path / "out/equivariance.png").read_bytes().startswith(b"\x89PNG")


def test_a_capsule_network_can_be_looked_at_alone(program, tmp_path):
    status, _, _ = program(cnn_workdir="")
    assert status == 0
    rows = json.loads((tmp_path / "out/results.json").read_text())
    assert [row["network"] for row in rows] == ["capsnet"] * 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"workdir": "", "cnn_workdir": ""}, "workdir holds no run: it has no config.json"),
        ({"workdir": "cnn", "cnn_workdir": ""}, "--workdir must be a run of a capsule network, .*"),
        ({"cnn_workdir": "capsnet"}, "workdir capsnet is named twice"),
        ({"workdir": ""}, "workdir holds no run: it has no config.json"),
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
def test_what_cannot_be_used_is_one_line(program, flags, message):
    status, stdout, stderr = program(**flags)
    assert (status, stdout) == (2, "")
    assert re.fullmatch(f"measure_equivariance: {message}\n", stderr)
