"""Tests of the PyTorch baselines, for an environment with PyTorch: `python -m pytest -m torch`.

The modules that import PyTorch are imported inside the tests, so that this file can be collected
without it.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_capsnet
from flax import nnx
from small_capsnet import TOLERANCE, assert_close

from capsjax.kernels.vote_passes.cases import CASES
from experiments import benchmark_routing, benchmark_training
from experiments.benchmarks import contenders, routing_rows
from experiments.training import mnist, networks

pytestmark = pytest.mark.torch


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("form", ["TorchCapsNet", "NotebookCapsNet"])
def test_both_forms_have_the_outputs_and_gradients_of_capsjax(form):
    import torch

    from experiments.benchmarks import torch_capsnet

    images, labels = small_capsnet.batch()
    network = getattr(torch_capsnet, form)(small_capsnet.params())
    trainer = torch_capsnet.TorchTrainer(
        network, reconstruction_weight=contenders.RECONSTRUCTION_WEIGHT
    )
    pixels, classes = torch_capsnet.pixels(images), torch.from_numpy(labels).long()
    wanted_capsules, wanted_drawn, wanted_loss, gradients = small_capsnet.expected()
    capsules = network(pixels)
    drawn = network.reconstruct(capsules, classes)
    assert_close([x.detach().numpy() for x in (capsules, drawn)], [wanted_capsules, wanted_drawn])
    loss = trainer.loss(pixels, classes)
    assert loss.item() == pytest.approx(float(wanted_loss), rel=TOLERANCE)
    loss.backward()
    found = (
        network.weights.grad,
        network.convolution.weight.grad.permute(2, 3, 1, 0),
        network.decoder[0].weight.grad.T,
        network.decoder[-2].bias.grad,
    )
    layers = gradients["decoder"]["layers"]
    wanted = (
        gradients["capsules"]["weights"],
        gradients["convolution"]["kernel"],
        layers[min(layers)]["kernel"],
        layers[max(layers)]["bias"],
    )
    assert_close([x.numpy() for x in found], list(wanted))


@pytest.mark.parametrize("form", ["TorchCapsNet", "NotebookCapsNet"])
def test_both_forms_train_and_have_every_row(form):
    from experiments.benchmarks import torch_capsnet

    network = getattr(torch_capsnet, form)
    contender = torch_capsnet.contender(network, small_capsnet.params(), *small_capsnet.batch())
    first = contender.train()
    assert contender.train() < first
    rows = contender.rows()
    assert ["training", *rows] == list(benchmark_training.COMMON)
    for row in rows.values():
        row()


def test_benchmark_of_training_measures_every_contender(tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    config = benchmark_training.Config(
        batch_size=2, image_size=17, repeats=1, plain_repeats=0, torch=True, output=str(output)
    )
    assert benchmark_training.main(config) == 0  # RuntimeError if their class capsules differ
    rows = read_rows(output)
    for row in benchmark_training.COMMON:
        names = [found["program"] for found in rows if found["row"] == row]
        assert names == ["capsjax", "torch", "torch_notebook"]
    assert all(row["median"] > 0 for row in rows)
    assert "ratio to capsjax" in capsys.readouterr().out


@pytest.mark.parametrize("network", contenders.NETWORKS[1:])
def test_other_networks_have_the_outputs_and_gradients_of_capsjax(network, float64):

    import torch

    from experiments.benchmarks import torch_networks

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 28, 28, 1), np.uint8)
    config = mnist.Config(network=network, dtype="float64")
    model = networks.build(config, images.shape[1:], 10, seed=0)
    # Statistics and costs off their initial values, which are 0 and 1 at many places.
    params = jax.tree.map(
        lambda x: np.asarray(x, np.float64) + rng.uniform(0, 0.1, x.shape),
        nnx.to_pure_dict(nnx.state(model)),
    )
    graph = nnx.graphdef(model)

    def loss(params):
        found = nnx.merge(graph, params)(jnp.asarray(images / 255))
        found = found if network == "efficient_capsnet" else found[0].reshape(3, 10, 16)
        return (found**2).sum(), found

    (_, wanted), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    tested = torch_networks.build(network, params).eval()
    found = tested(torch.from_numpy(images / 255).permute(0, 3, 1, 2))
    found = found if network == "efficient_capsnet" else found[0]
    np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=1e-9)
    (found**2).sum().backward()
    if network == "efficient_capsnet":
        pairs = [
            (tested.weights, gradients["capsules"]["weights"]),
            (tested.bias, gradients["capsules"]["couplings_bias"]),
            (tested.primary.bias, gradients["primary"]["bias"]),
        ]
    else:
        pairs = [(tested.capsules.weights, gradients["capsules"]["weights"])]
        for k, layer in enumerate(tested.convolutions):
            pairs.append((layer.weights, gradients["conv_capsules"][k]["weights"]))
            betas = gradients["conv_capsules"][k]
            pairs.append((layer.betas, np.stack([betas["beta_u"], betas["beta_a"]])))
    for own, other in pairs:
        np.testing.assert_allclose(own.grad.numpy(), other, rtol=0, atol=1e-9 * np.abs(other).max())


@pytest.mark.parametrize("network", contenders.NETWORKS[1:])
def test_other_networks_train(network):
    from experiments.benchmarks import torch_networks

    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (3, 28, 28, 1), np.uint8), np.array([3, 0, 7])
    model = networks.build(mnist.Config(network=network), images.shape[1:], 10, seed=0)
    params = nnx.to_pure_dict(nnx.state(model))
    contender = torch_networks.contender(network, params, images, labels)
    losses = [contender.train() for _ in range(3)]
    assert losses[2] < losses[0]


@pytest.mark.parametrize("network", contenders.NETWORKS[1:])
def test_benchmark_of_other_networks_measures_pytorch(network, tmp_path):
    output = tmp_path / "rows.jsonl"
    config = benchmark_training.Config(
        network=network, batch_size=2, repeats=1, torch=True, output=str(output)
    )
    assert benchmark_training.main(config) == 0  # RuntimeError if their class capsules differ
    rows = read_rows(output)
    for row in ("training", "inference"):
        names = [found["program"] for found in rows if found["row"] == row]
        assert names == ["capsjax", "torch"]


def test_benchmark_of_routing_measures_pytorch(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(CASES, "tiny", CASES["capsnet_mnist"]._replace(batch=3, capsules=6))
    output = tmp_path / "rows.jsonl"
    config = benchmark_routing.Config(
        cases="tiny", implementations="reference", torch=True, repeats=1, output=str(output)
    )
    benchmark_routing.main(config)
    rows = [row for row in read_rows(output) if row["implementation"] == "torch"]
    assert [row["mode"] for row in rows] == ["forward", "gradients"]
    assert all(row["difference"] < 1e-5 and row["median"] > 0 for row in rows)
    assert "torch" in capsys.readouterr().out


def test_routing_in_pytorch_equals_stored_votes_in_jax():
    routing_rows.check_torch(CASES["capsnet_mnist"])


def test_routing_in_pytorch_with_an_error_is_refused(monkeypatch):
    monkeypatch.setattr(
        routing_rows.torch_routing,
        "arrays",
        lambda result: jax.tree.map(lambda x: x.numpy() * np.float32(1.001), result),
    )
    with pytest.raises(RuntimeError, match=r"^PyTorch's forward differs by 1\.0e-03"):
        routing_rows.check_torch(CASES["capsnet_mnist"]._replace(batch=3, capsules=6))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own compiler
@pytest.mark.parametrize("way", ["eager", "compile"])
def test_several_sets_in_turn_have_the_results_of_capsjax(way):
    from experiments.benchmarks import torch_routing

    case = CASES["capsnet_mnist"]._replace(batch=2, capsules=6)
    sets = [routing_rows.make_inputs(case, seed=seed) for seed in range(2)]
    function = routing_rows.function_of(
        routing_rows.Variant("reference", "gradients", case.dtype), case.num_iterations
    )
    call = torch_routing.calls_in_turn(
        sets, num_iterations=case.num_iterations, mode="gradients", way=way
    )
    for inputs, result in zip(sets, call.wait(call.start()), strict=True):
        found, wanted = torch_routing.arrays(result), function(*inputs)
        assert routing_rows.difference(found, wanted) < TOLERANCE
