"""Tests of `benchmark_training`: contenders compute the same, and every row is measured."""

import importlib.util
import io
import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_capsnet
import test_figures
from flax import nnx
from matplotlib.image import imread
from small_capsnet import SMALL, assert_close

from experiments import benchmark_training
from experiments.benchmarks import contender_process, contenders, plain_capsnet, step_parts
from experiments.errors import InputError
from experiments.training import networks
from experiments.training.transforms import scaled

SIZES = {"batch_size": small_capsnet.BATCH_SIZE, "image_size": small_capsnet.IMAGE_SIZE}


@pytest.fixture(scope="module")
def params_file(tmp_path_factory):
    """The small network's parameters in a file."""
    path = str(tmp_path_factory.mktemp("params") / "params.npz")
    contenders.save_params(path, small_capsnet.params())
    return path


def test_parameters_read_from_a_file_equal_those_written(params_file):
    read, written = contenders.load_params(params_file), small_capsnet.params()
    jax.tree.map(np.testing.assert_array_equal, read, written)


def test_plain_jax_has_the_outputs_and_gradients_of_capsjax():
    images, labels = small_capsnet.batch()

    @partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        pixels = scaled(jnp.asarray(images))
        capsules = plain_capsnet.class_capsules(params, pixels)
        drawn = plain_capsnet.reconstruct(params, capsules, labels)
        weight = contenders.RECONSTRUCTION_WEIGHT
        value = plain_capsnet.loss(params, pixels, labels, reconstruction_weight=weight)
        return value, (capsules, drawn)

    (value, (capsules, drawn)), gradients = jax.jit(loss)(small_capsnet.params())
    assert_close((capsules, drawn, value, gradients), small_capsnet.expected())


def small_network(settings, image_shape, num_classes, *, seed):
    assert (settings.network, num_classes) == ("capsnet", 10)
    return SMALL(image_shape, rngs=nnx.Rngs(seed))


ROWS = {
    "capsjax": (*benchmark_training.COMMON, *benchmark_training.PARTS),
    "plain_jax": benchmark_training.COMMON,
}


@pytest.mark.parametrize("name", ROWS)
def test_contender_process_times_every_row(name, params_file, monkeypatch, capsys):
    monkeypatch.setattr(networks, "build", small_network)
    monkeypatch.setattr(step_parts, "MATRIX", 16)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(ROWS[name])))
    config = contender_process.Config(name=name, params=params_file, more_steps=1, **SIZES)
    assert contender_process.main(config) == 0
    start, *seconds = map(json.loads, capsys.readouterr().out.splitlines())
    assert start["first_step"] > 0
    assert start["peak_mib"] > 100
    assert_close(np.array(start["class_capsules"]), small_capsnet.expected()[0])
    assert len(seconds) == len(ROWS[name])
    assert min(seconds) > 0


def test_another_network_has_rows_of_training_and_inference(tmp_path):
    output = tmp_path / "rows.jsonl"
    config = benchmark_training.Config(
        network="efficient_capsnet", batch_size=2, repeats=1, output=str(output)
    )
    assert benchmark_training.main(config) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert {row["network"] for row in rows} == {"efficient_capsnet"}
    assert [row["row"] for row in rows] == [
        *("training", "inference", "matrix product", "first step", "peak memory"),
        "first step, compiled before",
    ]
    assert min(row["median"] for row in rows) > 0


def test_child_process_answers_until_it_is_stopped(params_file):
    sizes = [f"--{name}={size}" for name, size in SIZES.items()]
    process = benchmark_training.ContenderProcess(
        "plain_jax", [f"--params={params_file}", *sizes, "--more_steps=1"]
    )
    try:
        assert_close(np.array(process.started["class_capsules"]), small_capsnet.expected()[0])
        assert process.seconds("training") > 0
    finally:
        process.stop()
    assert process.process.returncode is not None


class FakeProcess:
    """A contender without a process: a row takes capsjax one second, and others two."""

    difference = 0.0

    def __init__(self, name, arguments):
        self.name = name
        shift = 0 if name == "capsjax" else self.difference
        self.started = {"first_step": 9, "peak_mib": 700, "class_capsules": [[[shift]]]}
        self.is_cached = any("--compilation_cache" in argument for argument in arguments)

    def seconds(self, row):
        assert not self.is_cached
        return 1.0 if self.name == "capsjax" else 2.0

    def stop(self):
        pass


@pytest.fixture
def _fake_processes(monkeypatch):
    monkeypatch.setattr(benchmark_training, "ContenderProcess", FakeProcess)
    monkeypatch.setattr(networks, "build", small_network)


@pytest.mark.usefixtures("_fake_processes")
def test_rows_are_printed_written_and_drawn(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    output, figure = tmp_path / "rows.jsonl", tmp_path / "chart.png"
    config = benchmark_training.Config(
        batch_size=6, image_size=17, repeats=3, torch=True, output=str(output), figure=str(figure)
    )
    assert benchmark_training.main(config) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    found = {(row["program"], row["row"]): row for row in rows}
    assert len(found) == len(rows) == 4 * (3 + 2) + 5 + 1
    assert found["torch", "training"]["images_per_second"] == 3
    assert found["torch", "training"]["repeats"] == 3
    assert found["plain_jax", "training"]["repeats"] == 1
    assert found["capsjax", "peak memory"]["median"] == 700
    head, *table, last = capsys.readouterr().out.splitlines()
    assert head.split()[:6] == ["program", "row", "unit", "median", "min", "max"]
    for row, line in zip(rows, table, strict=True):
        assert line.startswith(row["program"])
        assert row["row"] in line
        is_slower = row["unit"] == "s" and "first step" not in row["row"]
        ratio = 2 if is_slower and row["program"] != "capsjax" else 1
        assert line.endswith(f"{ratio:.2f}")
    assert last.startswith("matrix product of ")
    assert imread(figure).shape[2] == 4


@pytest.mark.usefixtures("_fake_processes")
@pytest.mark.parametrize(
    ("difference", "text"),
    [(2 * benchmark_training.TOLERANCE, r"2\.0e-04"), (float("nan"), "nan")],
)
def test_contender_with_other_outputs_is_an_error(monkeypatch, difference, text):
    monkeypatch.setattr(FakeProcess, "difference", difference)
    with pytest.raises(RuntimeError, match=f"plain_jax differs from capsjax by {text}"):
        benchmark_training.main(benchmark_training.Config(image_size=17))


def test_torch_without_its_package_is_an_input_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--torch needs the package torch"):
        benchmark_training.main(benchmark_training.Config(torch=True))


def test_chart_labels_each_contender_with_its_speed():
    speeds = {"torch": 40.0, "capsjax": 123.4, "plain_jax": 2.25, "torch_notebook": 19.0}
    rows = [
        {"program": name, "row": row, "images_per_second": speed}
        for row in ("training", "inference", "routing")
        for name, speed in speeds.items()
    ]
    figure = benchmark_training.throughput(rows)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "training, images/s",
        "inference, images/s",
    ]
    for axes in figure.axes:
        names = [label.get_text() for label in axes.get_yticklabels()]
        assert names == ["plain JAX", "PyTorch, notebook form", "PyTorch", "capsjax"]
        assert [bar.get_width() for bar in axes.patches] == [2.25, 19.0, 40.0, 123.4]
        assert [text.get_text() for text in axes.texts] == ["2.25", "19", "40", "123"]
    test_figures.assert_legible(figure)
