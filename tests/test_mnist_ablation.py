"""The ablation: what its variants are, and that its table says what the runs did."""

import dataclasses
import json
import re
import shutil
import statistics

import in_process
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import capsjax
from capsjax.models import CapsNet
from experiments import mnist_ablation, train_mnist
from experiments.data import datasets
from experiments.training import checkpoints, mnist, records, runs


def test_one_iteration_is_the_control_without_routing():
    """Every parent gets the plain mean of its votes, as if there were no couplings at all."""
    model = CapsNet(
        (17, 17, 1), conv_channels=2, primary_types=2, num_iterations=1, rngs=nnx.Rngs(0)
    )
    images = jax.random.uniform(jax.random.key(0), (3, 17, 17, 1))
    weights = model.capsules.weights[...]
    votes = jnp.einsum("bip,ipjd->bijd", model.primary_poses(images), weights)
    wanted = capsjax.squash(votes.sum(1) / 10)
    np.testing.assert_allclose(model(images), wanted, rtol=1e-5, atol=1e-7)


def test_controls_differ_from_routing_in_what_they_name_alone():
    config = mnist_ablation.Config(seed=5, learning_rate=0.01, workdir="w")
    runs = {name: mnist_ablation.run_config(config, name, 6) for name in mnist_ablation.VARIANTS}
    usual = mnist.Config(learning_rate=0.01, seed=6)
    for name, run in runs.items():
        differing = {
            field: value for field, value in vars(run).items() if value != getattr(usual, field)
        }
        assert differing.pop("workdir") == f"w/{name}/seed_6"
        wanted = mnist_ablation.VARIANTS[name]
        assert differing == {k: v for k, v in wanted.items() if getattr(usual, k) != v}


def test_the_figure_shows_every_seed_the_mean_and_the_control():
    table = [
        {"variant": "1_iteration", "test_error": 2.0, "test_errors": [1.0, 3.0]},
        {
            "variant": "3_iterations",
            "test_error": 1.0,
            "test_errors": [0.5, 1.5],
            "test_error_if_couplings_are_uniform": 1.25,
        },
    ]
    figure = mnist_ablation.draw_errors(table)
    (axes,) = figure.axes
    drawn = [line.get_xydata().tolist() for line in axes.lines]
    seeds_and_means = [
        [[1.0, 0], [3.0, 0]],
        [[2.0, -0.3], [2.0, 0.3]],
        [[0.5, 1], [1.5, 1]],
        [[1.0, 0.7], [1.0, 1.3]],
    ]
    assert drawn == [*seeds_and_means, [[1.25, 1]]]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["1 iteration", "3 iterations"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["one seed", "mean of seeds", "mean, tested without routing"]


def test_dots_that_lie_close_are_not_cut_by_the_figures_edge():
    table = [{"variant": "cnn", "test_error": 1.08, "test_errors": [1.03, 1.13]}]
    (axes,) = mnist_ablation.draw_errors(table).axes
    left, right = axes.get_xlim()
    assert left == 0
    assert right > 1.04 * 1.13
    table = [{"variant": "cnn", "test_error": 0.0, "test_errors": [0.0]}]
    (axes,) = mnist_ablation.draw_errors(table).axes
    assert axes.get_xlim() == (0, 1)


@pytest.fixture
def program(tmp_path, monkeypatch, capsys):
    """Runs the program in this process, with tiny networks: exit status and stderr."""
    monkeypatch.chdir(tmp_path)
    whole = datasets.load("mnist_small")
    few = [
        datasets.Split(s.images[:40, 5:22, 5:22], s.labels[:40]) for s in (whole.train, whole.test)
    ]
    small = datasets.Dataset("mnist_small", 10, *few, "5a")
    monkeypatch.setattr(datasets, "load", lambda *_, **__: small)

    def program(**changes):
        settings = {
            "dataset": "mnist_small",
            "workdir": "all",
            "conv_channels": 2,
            "primary_types": 1,
            "capsule_length": 2,
            "batch_size": 8,
            "num_epochs": 1,
            "seeds": 2,
            "variants": "3_iterations,1_iteration_reconstruction",
        } | changes
        status, _, stderr = in_process.run(mnist_ablation, settings, monkeypatch, capsys)
        return status, stderr

    return program


def test_the_table_holds_the_last_epochs_of_all_seeds(program, tmp_path, monkeypatch):
    assert program() == (0, "")
    table = json.loads((tmp_path / "all" / "results.json").read_text())
    assert [row["variant"] for row in table] == ["1_iteration_reconstruction", "3_iterations"]
    for row in table:
        errors = [
            records.read_metrics(tmp_path / "all" / row["variant"] / f"seed_{seed}")[-1]
            for seed in (0, 1)
        ]
        errors = [last["test_error"] for last in errors]
        assert row["test_errors"] == errors
        assert row["test_error"] == pytest.approx(statistics.mean(errors), abs=1e-3)
        assert row["deviation"] == pytest.approx(statistics.stdev(errors), abs=1e-3)
        assert row["epochs"] == 1
    assert (tmp_path / "all/figures/test_errors.png").exists()
    assert "test_error_if_couplings_are_uniform" not in table[0]
    assert "test_error_if_couplings_are_uniform" in table[1]

    # A run that was killed while it drew its figures draws them again.
    last_drawn = tmp_path / "all/3_iterations/seed_1/figures/learning_curves.png"
    last_drawn.unlink()
    assert program() == (0, "")
    assert last_drawn.exists()

    # Another variant joins the table; those that are not named stay as they are.
    assert program(variants="1_iteration", seeds=1) == (0, "")
    more = json.loads((tmp_path / "all" / "results.json").read_text())
    assert more[1:] == table
    assert more[0]["variant"] == "1_iteration"
    assert len(more[0]["test_errors"]) == 1

    # What is trained already is not trained again.
    def refuse(config, dataset):
        raise AssertionError(config)

    monkeypatch.setattr(train_mnist, "train", refuse)
    assert program() == (0, "")
    status, stderr = program(learning_rate=0.5)
    assert status == 2
    assert "other settings: learning_rate 0.001 there, 0.5 here" in stderr


def test_a_run_killed_before_its_first_metrics_is_trained(program, tmp_path):
    config = mnist_ablation.Config(dataset="mnist_small", workdir="all", conv_channels=2)
    small = {"primary_types": 1, "capsule_length": 2, "batch_size": 8, "num_epochs": 1}
    config = dataclasses.replace(config, **small)
    run = mnist_ablation.run_config(config, "3_iterations", 0)
    folder = records.open_workdir(run.workdir, config=run, data_sha256="5a")
    records.Metrics(folder, step=0).close()
    assert program(variants="3_iterations", seeds=1) == (0, "")
    assert records.read_metrics(folder)[-1]["step"] == 5


def test_a_run_with_figures_of_fewer_steps_goes_on(program, tmp_path):
    """As one that was killed before its last checkpoint, when it went on from --max_steps."""
    workdir = tmp_path / "all/1_iteration/seed_0"
    assert program(variants="1_iteration", seeds=1, max_steps=3) == (0, "")
    assert records.read_metrics(workdir)[-1]["step"] == 3
    assert program(variants="1_iteration", seeds=1) == (0, "")
    assert records.read_metrics(workdir)[-1]["step"] == 5
    assert checkpoints.saved_steps(workdir)[-1] == 5


def test_a_run_that_lost_its_checkpoints_is_refused_and_keeps_its_figures(program, tmp_path):
    assert program(variants="1_iteration", seeds=1) == (0, "")
    workdir = tmp_path / "all/1_iteration/seed_0"
    shutil.rmtree(workdir / "checkpoints")
    before = {path: path.read_bytes() for path in (tmp_path / "all").rglob("*") if path.is_file()}
    for variants in ("1_iteration", "3_iterations"):  # named or not, its row is not left out
        status, stderr = program(variants=variants, seeds=1, max_steps=0)
        assert status == 2
        assert re.fullmatch(
            "mnist_ablation: workdir all/1_iteration/seed_0 was trained to step 5, but .*\n", stderr
        )
        for path, content in before.items():
            assert path.read_bytes() == content


def test_runs_of_one_process_use_its_devices(program, tmp_path, monkeypatch):
    """JAX joins the processes of a cluster only once: before the first run, not before each."""
    joined = []
    monkeypatch.setattr(runs, "prepare", lambda config: joined.append(1) or datasets.load("small"))
    assert program(variants="1_iteration", data_parallel=1, max_steps=1) == (0, "")
    assert joined == [1]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    status, stderr = program(variants="1_iteration")
    assert (status, stderr[:41]) == (2, "mnist_ablation: an ablation runs in one p")


def test_a_stopped_run_stops_all(program, tmp_path, monkeypatch):
    monkeypatch.setattr(train_mnist, "train", lambda *_: 143)
    assert program() == (143, "")
    assert not (tmp_path / "all" / "results.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"variants": "2_iterations"}, "--variants must be some of .*, got '2_iterations'"),
        ({"variants": "cnn,cnn"}, "--variants must be some of .*, each once, got 'cnn,cnn'"),
        ({"network": "pooling_cnn"}, "--network is what --variants vary: .*, got pooling_cnn"),
        ({"num_iterations": 5}, "--num_iterations is what --variants vary: .*, got 5"),
        ({"reconstruction_weight": 0}, "--reconstruction_weight must be above 0: .*"),
        ({"variants": "cnn", "diagnostics": True}, "--diagnostics and --capsule_parallel are .*"),
        ({"seed": 2**32 - 1}, r"--seed \+ --seeds must be at most 4294967296, got 4294967295 \+ 2"),
    ],
)
def test_what_cannot_be_used_is_one_line(program, flags, message):
    status, stderr = program(**flags)
    assert status == 2
    assert re.fullmatch(f"mnist_ablation: {message}\n", stderr)
