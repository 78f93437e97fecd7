"""mnist_ablation: variants, resumption, table and figure."""

import dataclasses
import json
import pathlib
import re
import shutil
import statistics

import in_process
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import capsjax
from experiments import mnist_ablation
from experiments.analysis import inspection
from experiments.data import datasets
from experiments.training import checkpoints, mnist, records, runs

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_variants_change_only_the_settings_they_name():
    config = mnist_ablation.Config(seed=5, learning_rate=0.01, workdir="w")
    runs = {name: mnist_ablation.run_config(config, name, 6) for name in mnist_ablation.VARIANTS}
    usual = mnist.Config(learning_rate=0.01, seed=6)
    for name, run in runs.items():
        differing = {
            field: value for field, value in vars(run).items() if value != getattr(usual, field)
        }
        assert differing.pop("workdir") == f"w/{name}/seed_6"
        expected = mnist_ablation.VARIANTS[name]
        assert differing == {k: v for k, v in expected.items() if getattr(usual, k) != v}


def test_figure_shows_seeds_means_and_uniform_couplings():
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


def test_markers_are_not_clipped_by_the_axes():
    table = [{"variant": "cnn", "test_error": 1.08, "test_errors": [1.03, 1.13]}]
    (axes,) = mnist_ablation.draw_errors(table).axes
    left, right = axes.get_xlim()
    assert left == 0
    assert right > 1.04 * 1.13
    table = [{"variant": "cnn", "test_error": 0.0, "test_errors": [0.0]}]
    (axes,) = mnist_ablation.draw_errors(table).axes
    assert axes.get_xlim() == (0, 1)


SETTINGS = {
    "dataset": "mnist_small",
    "workdir": "all",
    "conv_channels": 2,
    "primary_types": 1,
    "capsule_length": 2,
    "batch_size": 8,
    "num_epochs": 1,
    "seeds": 2,
    "variants": "3_iterations,1_iteration_reconstruction",
}
STEPS = 3


@pytest.fixture(scope="module")
def dataset():
    whole = datasets.load("mnist_small")
    train, test = (
        datasets.Split(split.images[:24, 5:22, 5:22], split.labels[:24])
        for split in (whole.train, whole.test)
    )
    return datasets.Dataset("mnist_small", 10, train, test, "5a")


@pytest.fixture(scope="module", autouse=True)
def reported(dataset):
    """Workdirs whose figures were drawn; trainers are compiled once, figures are empty files."""
    trainers, reported = {}, []

    def build(config, dataset, original=mnist.build):
        key = dataclasses.replace(config, seed=0, workdir="", max_steps=0)
        if key not in trainers:
            trainers[key] = original(config, dataset)
        return trainers[key]

    def report(trainer, params, test, workdir, *, batch_size):
        reported.append(workdir)
        (pathlib.Path(workdir) / "figures").mkdir(exist_ok=True)
        (pathlib.Path(workdir) / "figures/learning_curves.png").touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", lambda *_, **__: dataset)
        patch.setattr(mnist, "build", build)
        patch.setattr(inspection, "report", report)
        yield reported


def test_one_iteration_squashes_the_mean_of_the_votes(dataset):
    config = mnist_ablation.Config(**SETTINGS)
    run = mnist_ablation.run_config(config, "1_iteration_reconstruction", 0)
    trainer = mnist.build(run, dataset)

    @jax.jit
    def both(params, images):
        model = trainer.model(params)
        weights = params["capsules"]["weights"]
        votes = jnp.einsum("bip,ipjd->bijd", model.primary_poses(images), weights)
        return model(images), capsjax.squash(votes.sum(1) / 10)

    params = jax.tree.map(lambda x: 10 * x, trainer.initial_state(0).params)  # longer capsules
    capsules, expected = both(params, dataset.test.images[:3] / np.float32(255))
    assert abs(expected).max() > 1e-3
    np.testing.assert_allclose(capsules, expected, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of an ablation, one of whose runs was killed before its first metrics."""
    folder = tmp_path_factory.mktemp("ablation")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = mnist_ablation.Config(**SETTINGS)
        killed = mnist_ablation.run_config(config, "3_iterations", 0)
        records.open_workdir(killed.workdir, config=killed, data_sha256="5a")
        records.Metrics(killed.workdir, step=0).close()
        assert mnist_ablation.main(config) == 0
    return folder / "all"


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "all")


@pytest.fixture
def program(tmp_path, monkeypatch, capsys):
    """Return a function that runs the program in this process: its exit status and stderr."""
    monkeypatch.chdir(tmp_path)

    def program(**changes):
        status, _, stderr = in_process.run(mnist_ablation, SETTINGS | changes, monkeypatch, capsys)
        return status, stderr

    return program


def read_table(folder):
    return json.loads((folder / "results.json").read_text())


def test_table_has_the_last_errors_of_all_seeds(finished):
    table = read_table(finished)
    assert [row["variant"] for row in table] == ["1_iteration_reconstruction", "3_iterations"]
    for row in table:
        last = [
            records.read_metrics(finished / row["variant"] / f"seed_{seed}")[-1] for seed in (0, 1)
        ]
        errors = [metrics["test_error"] for metrics in last]
        assert [metrics["step"] for metrics in last] == [STEPS, STEPS]
        assert row["test_errors"] == pytest.approx(errors, abs=1e-4)
        assert row["test_error"] == pytest.approx(statistics.mean(errors), abs=1e-3)
        assert row["deviation"] == pytest.approx(statistics.stdev(errors), abs=1e-3)
        assert row["epochs"] == 1
    assert (finished / "figures/test_errors.png").exists()
    assert "test_error_if_couplings_are_uniform" not in table[0]
    assert "test_error_if_couplings_are_uniform" in table[1]


def test_only_missing_figures_are_drawn_again(program, folder, reported):
    (folder / "3_iterations/seed_1/figures/learning_curves.png").unlink()
    reported.clear()
    assert program() == (0, "")
    assert reported == ["all/3_iterations/seed_1"]


def test_a_variant_resumes_from_max_steps_and_joins_the_table(program, finished, tmp_path):
    workdir = tmp_path / "all/1_iteration/seed_0"
    flags = {"variants": "1_iteration", "seeds": 1}
    assert program(**flags, max_steps=2) == (0, "")
    assert records.read_metrics(workdir)[-1]["step"] == 2
    shutil.copytree(finished, tmp_path / "all", dirs_exist_ok=True)
    assert program(**flags) == (0, "")
    assert records.read_metrics(workdir)[-1]["step"] == STEPS
    assert checkpoints.saved_steps(workdir)[-1] == STEPS
    first, *others = read_table(tmp_path / "all")
    assert (first["variant"], len(first["test_errors"])) == ("1_iteration", 1)
    assert others == read_table(finished)


def test_finished_runs_are_not_trained_again(program, folder, monkeypatch):
    def refuse(run, dataset):
        raise AssertionError(run)

    monkeypatch.setattr(mnist_ablation, "train_run", refuse)
    assert program() == (0, "")
    status, stderr = program(learning_rate=0.5)
    assert status == 2
    assert "other settings: learning_rate 0.001 there, 0.5 here" in stderr


@pytest.mark.parametrize("variants", ["3_iterations", "1_iteration_reconstruction"])
def test_lost_checkpoints_are_refused_whether_the_variant_is_named_or_not(
    program, folder, variants
):
    shutil.rmtree(folder / "3_iterations/seed_0/checkpoints")
    before = {path: path.read_bytes() for path in folder.rglob("*.png")}
    status, stderr = program(variants=variants)
    assert status == 2
    message = "mnist_ablation: workdir all/3_iterations/seed_0 was trained to step 3, but .*\n"
    assert re.fullmatch(message, stderr)
    assert {path: path.read_bytes() for path in before} == before


def test_processes_join_once_and_must_be_one(program, dataset, monkeypatch):
    joined, trained = [], []
    monkeypatch.setattr(runs, "prepare", lambda config: joined.append(config.seeds) or dataset)
    monkeypatch.setattr(mnist_ablation, "train_run", lambda run, dataset: trained.append(run) or 0)
    row = {"variant": "1_iteration", "test_error": 1.0, "test_errors": [1.0]}
    monkeypatch.setattr(mnist_ablation, "table_row", lambda *_: row)
    assert program(variants="1_iteration") == (0, "")
    assert (joined, [run.seed for run in trained]) == ([2], [0, 1])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    status, stderr = program(variants="1_iteration")
    assert (status, len(trained)) == (2, 2)
    assert stderr.startswith("mnist_ablation: mnist_ablation must run in a single process")


def test_a_stopped_run_ends_the_ablation(program, tmp_path, monkeypatch):
    monkeypatch.setattr(mnist_ablation, "train_run", lambda *_: 143)
    assert program() == (143, "")
    assert not (tmp_path / "all/results.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        (
            {"variants": "2_iterations"},
            "--variants must be distinct names out of .*, got '2_iterations'",
        ),
        ({"variants": "cnn,cnn"}, "--variants must be distinct names out of .*, got 'cnn,cnn'"),
        ({"network": "pooling_cnn"}, "--network is set by --variants, .*, got pooling_cnn"),
        ({"num_iterations": 5}, "--num_iterations is set by --variants, .*, got 5"),
        ({"reconstruction_weight": 0}, "--reconstruction_weight must be above 0; .*"),
        ({"variants": "cnn", "diagnostics": True}, "--diagnostics and --capsule_parallel need .*"),
        ({"seed": 2**32 - 1}, r"--seed \+ --seeds must be at most 4294967296, got 4294967295 \+ 2"),
    ],
)
def test_invalid_settings_are_refused(program, flags, message):
    status, stderr = program(**flags)
    assert status == 2
    assert re.fullmatch(f"mnist_ablation: {message}\n", stderr)
