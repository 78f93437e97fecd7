"""Every flagfile is read by the program that it is for, and names only what that program has."""

import importlib
import pathlib

import in_process
import pytest

from experiments import cli

FOLDER = pathlib.Path(cli.__file__).with_name("flagfiles")
PROGRAMS = {
    "ablation": "mnist_ablation",
    "ablation_small": "mnist_ablation",
    "affine": "evaluate_poses",
    "equivariance": "measure_equivariance",
    "multimnist": "train_multimnist",
    "multimnist_small": "train_multimnist",
    "parse_tree": "parse_tree",
    "routing": "benchmark_routing",
    "routing_quick": "benchmark_routing",
    "tweaks": "tweak_dimensions",
}  # all others are for train_mnist


@pytest.fixture
def read(monkeypatch, capsys):
    """Reads a flagfile: its Config, and the default one of its program."""

    def read(name):
        program = importlib.import_module(f"experiments.{PROGRAMS.get(name, 'train_mnist')}")
        found = []
        monkeypatch.setattr(program, "main", found.append)
        in_process.run(program, {"flagfile": FOLDER / f"{name}.cfg"}, monkeypatch, capsys)
        return found[0], program.Config()

    return read


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.iterdir()))
def test_its_program_takes_it(name, read):
    config, default = read(name)
    assert type(config) is type(default)


@pytest.mark.parametrize("name", ["affine", "equivariance"])
def test_these_programs_do_the_same_without_it(name, read):
    config, default = read(name)
    assert config == default
