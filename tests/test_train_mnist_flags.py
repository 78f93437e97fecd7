"""Every flag of train_mnist has an effect on the data, the compiled step or the files of a run."""

import dataclasses

import jax
import numpy as np
import pytest
import training_runs
from flax import nnx

from experiments import train_mnist
from experiments.analysis import inspection
from experiments.data import datasets
from experiments.errors import InputError
from experiments.training import mnist, runs
from experiments.training.checkpoints import saved_steps


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    data_dir = training_runs.write_noise(tmp_path_factory.mktemp("data") / "noise")
    return training_runs.tiny_config(data_dir, num_epochs=1)


def loading(config, monkeypatch, tmp_path):
    """The data asked for, and where programs are kept by then."""

    def load(*arguments, **options):
        raise InputError(f"{arguments} {options} {jax.config.jax_compilation_cache_dir}")

    before = {
        name: getattr(jax.config, name)
        for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    }
    monkeypatch.setattr(datasets, "load", load)
    with pytest.raises(InputError) as error:
        train_mnist.main(config)
    for name, value in before.items():
        jax.config.update(name, value)
    return str(error.value)


def compiling(config, monkeypatch, tmp_path):
    """The programs of the initial parameters and of a step, and the first batch."""
    dataset = datasets.load(config.dataset, data_dir=config.data_dir)
    trainer = mnist.build(config, dataset)
    chosen = next(datasets.batches(44, batch_size=config.batch_size, seed=config.seed))
    start = jax.jit(lambda: nnx.to_pure_dict(nnx.state(trainer.build())))
    step = trainer.step.lower(trainer.abstract_state(), *trainer.batch(dataset.train, chosen))
    return start.lower().as_text(), step.as_text(), chosen.tolist()


def seeing(config, monkeypatch, tmp_path):
    """The shapes of the images to train on and of those to test, if their viewpoints are known."""
    dataset = datasets.load(config.dataset, data_dir=config.data_dir)
    info = {
        split: np.arange(getattr(dataset, split).size)[:, None] % 18 * (0, 0, 2, 0)
        for split in ("train", "test")
    }
    dataset = mnist.select_viewpoints(config, dataclasses.replace(dataset, info=info))
    return dataset.train.images.shape, mnist.test_split(config, dataset).images.shape


def training(config, monkeypatch, tmp_path):
    """The rows of metrics, the checkpoints, and the kinds of files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inspection, "report", lambda *_, **__: None)
    assert train_mnist.main(config) == 0
    [workdir] = tmp_path.iterdir()
    names = sorted(path.name for path in workdir.iterdir())
    return workdir.name, training_runs.rows(workdir), saved_steps(workdir), names


EFFECTS = {
    "dataset": ("fashion_mnist", loading),
    "data_dir": ("elsewhere", loading),
    "download": (True, loading),
    "compilation_cache": ("elsewhere", loading),
    "batch_size": (4, compiling),
    "num_epochs": (7, compiling),
    "learning_rate": (0.02, compiling),
    "final_learning_rate": (1e-5, compiling),
    "num_iterations": (3, compiling),
    "gradient": ("last", compiling),
    "reconstruction_weight": (0.01, compiling),
    "shift": (1, compiling),
    "canvas": (32, compiling),
    "diagnostics": (True, training),
    "network": ("pooling_cnn", compiling),
    "ema_decay": (0.9, compiling),
    "rotation": (5.0, compiling),
    "scale": (0.2, compiling),
    "crop": (16, seeing),
    "standardize": (True, compiling),
    "brightness": (0.2, compiling),
    "contrast": (0.2, compiling),
    "viewpoints": ("azimuth", seeing),
    "conv_channels": (3, compiling),
    "decoder_units": (8, compiling),
    "kernel_size": (7, compiling),
    "primary_types": (2, compiling),
    "primary_scale": (0.5, compiling),
    "capsule_length": (4, compiling),
    "capsule_bias": (0.1, compiling),
    "seed": (1, compiling),
    "dtype": ("bfloat16", compiling),
    "implementation": ("reference", compiling),
    "workdir": ("elsewhere", training),
    "max_steps": (3, training),
    "log_every_steps": (3, training),
    "checkpoint_every_steps": (3, training),
    "tensorboard": (True, training),
}


def test_no_flag_is_left_out():
    fields = {field.name for field in dataclasses.fields(mnist.Config)}
    devices = {field.name for base in runs.Settings.__bases__ for field in dataclasses.fields(base)}
    assert EFFECTS.keys() == fields - devices  # for which see test_devices and test_processes


@pytest.fixture(scope="module")
def usual(tiny, tmp_path_factory):
    """What is observed of the tiny Config itself, each way; and that twice is the same."""
    found = {}
    for observe in (loading, compiling, seeing, training):
        for _ in range(2):
            with pytest.MonkeyPatch.context() as monkeypatch:
                seen = observe(tiny, monkeypatch, tmp_path_factory.mktemp("usual"))
            assert found.setdefault(observe, seen) == seen
    return found


@pytest.mark.parametrize("name", EFFECTS)
def test_every_flag_has_an_effect(tiny, usual, name, monkeypatch, tmp_path):
    value, observe = EFFECTS[name]
    assert value != getattr(tiny, name)
    seen = observe(dataclasses.replace(tiny, **{name: value}), monkeypatch, tmp_path)
    assert seen != usual[observe]
    if name == "tensorboard":
        [events] = (tmp_path / "run/tensorboard").glob("events.out.tfevents.*")
        assert b"train_loss" in events.read_bytes()


def test_the_seed_changes_the_initial_parameters(tiny):
    programs = {compiling(dataclasses.replace(tiny, seed=s), None, None)[0] for s in (0, 1)}
    assert len(programs) == 2
