"""The benchmark of training: programs do the same work, and every row is measured."""

import importlib.util
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib.image import imread

from capsjax.models import CapsNet
from experiments import benchmark_training
from experiments.benchmarks import plain_capsnet, programs, step_parts
from experiments.errors import InputError
from experiments.training.objectives import CapsuleClassification
from experiments.training.transforms import scaled

SMALL = partial(CapsNet, conv_channels=4, primary_types=2, hidden=(8,))
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def digits():
    """Bytes and classes."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (3, 20, 20, 1), np.uint8), rng.integers(0, 10, 3, np.int32)


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    """A small network's parameters, biases included, after a way through a file."""
    model = SMALL((20, 20, 1), rngs=nnx.Rngs(0))
    made = nnx.to_pure_dict(nnx.split(model)[1])
    made["primary"]["convolution"]["bias"] = jnp.linspace(-0.1, 0.1, 16)
    path = str(tmp_path_factory.mktemp("params") / "params.npz")
    programs.save_params(path, made)
    read = programs.load_params(path)
    jax.tree.map(np.testing.assert_array_equal, read, jax.tree.map(np.asarray, made))
    return read


@pytest.fixture(scope="module")
def own(params, digits):
    """Capsjax's class capsules, drawings and gradients of the loss."""
    images, labels = digits
    graph = nnx.split(SMALL((20, 20, 1), rngs=nnx.Rngs(0)))[0]
    objective = CapsuleClassification(10, 0, 0, programs.RECONSTRUCTION_WEIGHT)
    pixels = scaled(jnp.asarray(images))

    def mean_loss(params):
        model = nnx.merge(graph, params)
        return objective.loss(model, pixels, labels, jax.random.key(0))[0].mean()

    model = nnx.merge(graph, params)
    capsules = model(pixels)
    drawn = model.reconstruct(capsules, labels).reshape(len(images), -1)
    return capsules, drawn, jax.jit(jax.value_and_grad(mean_loss))(params)


def assert_close(actual, wanted):
    for a, w in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, w, atol=TOLERANCE * max(1, np.abs(w).max()))


def test_plain_jax_computes_what_capsjax_does(params, digits, own):
    images, labels = digits
    pixels = scaled(jnp.asarray(images))
    capsules = plain_capsnet.class_capsules(params, pixels)
    drawn = plain_capsnet.reconstruct(params, capsules, labels)
    loss = partial(plain_capsnet.loss, reconstruction_weight=programs.RECONSTRUCTION_WEIGHT)
    assert_close((capsules, drawn), own[:2])
    assert_close(jax.jit(jax.value_and_grad(loss))(params, pixels, labels), own[2])


@pytest.mark.parametrize("form", ["TorchCapsNet", "NotebookCapsNet"])
def test_both_forms_in_pytorch_compute_what_capsjax_does(form, params, digits, own):
    torch = pytest.importorskip("torch", reason="needs torch (pip install 'capsjax[torch]')")
    from experiments.benchmarks import torch_capsnet

    images, labels = digits
    network = getattr(torch_capsnet, form)(params)
    trainer = torch_capsnet.TorchTrainer(
        network, reconstruction_weight=programs.RECONSTRUCTION_WEIGHT
    )
    pixels, classes = torch_capsnet.pixels(images), torch.from_numpy(labels).long()
    capsules = network(pixels)
    drawn = network.reconstruct(capsules, classes)
    assert_close([x.detach().numpy() for x in (capsules, drawn)], list(own[:2]))
    loss, gradients = own[2]
    assert trainer.loss(pixels, classes).item() == pytest.approx(float(loss), rel=TOLERANCE)
    trainer.loss(pixels, classes).backward()
    weights = network.weights.grad.numpy(), network.convolution.weight.grad.permute(2, 3, 1, 0)
    assert_close(weights, (gradients["capsules"]["weights"], gradients["convolution"]["kernel"]))


@pytest.mark.parametrize("form", ["TorchCapsNet", "NotebookCapsNet"])
def test_pytorch_trains_and_has_rows(form, params, digits):
    pytest.importorskip("torch", reason="needs torch (pip install 'capsjax[torch]')")
    from experiments.benchmarks import torch_capsnet

    program = torch_capsnet.program(getattr(torch_capsnet, form), params, *digits)
    first = program.train()
    assert program.train() < first
    rows = program.rows()
    assert ["training", *rows] == list(benchmark_training.COMMON)
    for run in rows.values():
        run()


@pytest.mark.parametrize("module", [step_parts, plain_capsnet])
def test_rows_of_the_programs_in_jax(module, params, digits, own, monkeypatch):
    monkeypatch.setattr(step_parts, "CapsNet", SMALL)
    monkeypatch.setattr(step_parts, "MATRIX", 16)
    program = module.program(params, *digits)
    program.train()
    assert_close(program.class_capsules(digits[0]), own[0])
    rows = program.rows()
    wanted = set(benchmark_training.COMMON) - {"training"}
    assert set(rows) == wanted | (set(benchmark_training.PARTS) if module is step_parts else set())
    for run in rows.values():
        run()


def test_a_contender_answers_from_a_process_of_its_own(tmp_path):
    config = benchmark_training.Config(batch_size=2, image_size=17)
    path = benchmark_training._params(str(tmp_path), config)
    contender = benchmark_training.Contender(
        "capsjax", [f"--params={path}", "--batch_size=2", "--image_size=17", "--more_steps=0"]
    )
    try:
        assert contender.started["first_step"] > 0
        assert contender.started["peak_mib"] > 100
        assert np.shape(contender.started["class_capsules"]) == (2, 10, 16)
        assert contender.seconds("training") > 0
    finally:
        contender.stop()
    assert contender.process.returncode is not None


class Fake:
    """A contender without a process: capsjax takes a second for everything, others two."""

    difference = 0.0

    def __init__(self, name, arguments):
        self.name = name
        shift = 0 if name == "capsjax" else self.difference
        self.started = {"first_step": 9, "peak_mib": 700, "class_capsules": [[[shift]]]}
        self.compiled = any("--compilation_cache" in argument for argument in arguments)

    def seconds(self, row):
        assert not self.compiled
        return 1.0 if self.name == "capsjax" else 2.0

    def stop(self):
        pass


def test_rows_are_timed_in_turn_printed_written_and_drawn(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark_training, "Contender", Fake)
    monkeypatch.setattr(benchmark_training, "CapsNet", SMALL)
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
    printed = capsys.readouterr().out
    assert all(row["program"] in printed and row["row"] in printed for row in rows)
    assert "2.00x" in printed
    assert imread(figure).shape[2] == 4


@pytest.mark.parametrize(
    ("difference", "said"), [(2 * TOLERANCE, r"2\.0e-04"), (float("nan"), "nan")]
)
def test_a_program_that_computes_something_else_is_not_compared(monkeypatch, difference, said):
    monkeypatch.setattr(benchmark_training, "Contender", Fake)
    monkeypatch.setattr(benchmark_training, "CapsNet", SMALL)
    monkeypatch.setattr(Fake, "difference", difference)
    with pytest.raises(RuntimeError, match=f"plain_jax differs from capsjax by {said}"):
        benchmark_training.main(benchmark_training.Config(image_size=17))


def test_torch_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--torch needs the package torch"):
        benchmark_training.main(benchmark_training.Config(torch=True))


def test_the_chart_shows_each_speed_beside_its_name():
    speeds = {"torch": 40.0, "capsjax": 123.4, "plain_jax": 2.25, "torch_notebook": 19.0}
    rows = [
        {"program": name, "row": row, "images_per_second": speed}
        for row in ("training", "inference", "routing")
        for name, speed in speeds.items()
    ]
    figure = benchmark_training.throughput(rows)
    assert [axes.get_title() for axes in figure.axes] == [
        "training, images/s",
        "inference, images/s",
    ]
    for axes in figure.axes:
        names = [label.get_text() for label in axes.get_yticklabels()]
        assert names == ["plain JAX", "PyTorch, notebook form", "PyTorch", "capsjax"]
        assert [bar.get_width() for bar in axes.patches] == [2.25, 19.0, 40.0, 123.4]
        assert [text.get_text() for text in axes.texts] == ["2.25", "19", "40", "123"]
