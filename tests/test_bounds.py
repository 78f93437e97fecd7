"""Sizes that no machine can hold: bounds of all numeric flags, and the memory of a step."""

import dataclasses
import importlib
import re
import sys
import typing

import jax
import pytest
import training_runs
from test_structure import PROGRAMS

from experiments import benchmark_training, cli
from experiments.errors import InputError
from experiments.training import interests, loop

CONFIGS = {name: f"experiments.{name}" for name in PROGRAMS}
CONFIGS["contender_process"] = "experiments.benchmarks.contender_process"
LARGEST = {int: 2**32 - 1, float: 1e6}  # a seed; a weight


def numeric_flags(config):
    types = typing.get_type_hints(config)
    return [(f, types[f.name]) for f in dataclasses.fields(config) if types[f.name] in LARGEST]


@pytest.fixture
def refused(monkeypatch, capsys):
    """Whether a program ends with status 2 and one line on this flag before it does anything."""
    monkeypatch.setattr(cli, "_configure_logging", lambda main: None)

    def refused(config, name, value):
        monkeypatch.setattr(sys, "argv", ["program", f"--{name}={value}"])
        with pytest.raises(SystemExit) as exit_:
            cli.run(config, lambda config: 0)
        stderr = capsys.readouterr().err
        return exit_.value.code == 2 and re.fullmatch(f"program: --{name} must be .*\n", stderr)

    return refused


@pytest.mark.parametrize("module", CONFIGS.values(), ids=CONFIGS)
def test_every_numeric_flag_has_finite_bounds(module, refused):
    config = importlib.import_module(module).Config
    for field, kind in numeric_flags(config):
        rules = " ".join(rule for rule, _ in field.metadata["limits"])
        one_of = rules.startswith("one of")
        assert one_of or re.search("at least|above", rules), field.name
        [upper] = [0] if one_of else re.findall(r"(?:at most|below) (\S+)", rules)
        assert float(upper) <= LARGEST[kind], field.name
        for value in ("nan", "inf", "-inf", "1e300", -(2**31), LARGEST[kind] * 2, 10**400, "٣"):
            assert refused(config, field.name, value), (field.name, value)


@pytest.mark.parametrize("text", ["", "1,", "nan", "1e300", "-11", "1_0", "٣", "1, 2", "two"])
@pytest.mark.parametrize("kind", [int, float])
def test_lists_of_numbers_are_refused_as_single_ones_are(text, kind):
    with pytest.raises(InputError, match=r"--xs must be (whole )?numbers from -10 to 10, separ"):
        cli.numbers("xs", text, minimum=-10, maximum=10, kind=kind)


def test_lists_of_numbers_are_parsed():
    assert cli.numbers("xs", "-10,0.5,10", minimum=-10, maximum=10, kind=float) == [-10, 0.5, 10]
    assert cli.numbers("xs", "7", minimum=-10, maximum=10, kind=int) == [7]


@pytest.fixture
def tiny(tmp_path):
    return training_runs.tiny_config(training_runs.write_noise(tmp_path / "data"))


def with_memory(monkeypatch, size):
    """Let this machine have so many bytes."""
    sizes = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": size}
    monkeypatch.setattr(loop.os, "sysconf", sizes.__getitem__)
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)


def test_a_step_that_does_not_fit_is_refused_before_the_workdir_is_made(
    tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    trainer = training_runs.trainer_of(tiny)
    state = trainer.abstract_state()
    leaves = jax.tree.leaves((state, state.params))
    with_memory(monkeypatch, sum(x.size * x.dtype.itemsize for x in leaves))
    status, stderr = training_runs.run_program(tiny, monkeypatch, capsys)
    line = r"train_mnist: a training step needs \S+ GiB of memory, and there are \S+ GiB; use a .*"
    assert status == 2
    assert re.fullmatch(line + "\n", stderr)
    assert not (tmp_path / "run").exists()


def test_an_evaluation_that_does_not_fit_is_refused(tiny, monkeypatch):
    trainer = training_runs.trainer_of(tiny)
    params = trainer.initial_state(0).params
    data = training_runs.datasets.load(tiny.dataset, data_dir=tiny.data_dir)
    with_memory(monkeypatch, 1000)
    with pytest.raises(InputError, match=r"^a batch of the evaluation needs \S+ GiB of memory"):
        trainer.evaluate(params, data.test, batch_size=8)


@pytest.mark.parametrize(("limit", "fits"), [("1000\n", False), ("max\n", True), (None, True)])
def test_the_limit_of_a_container_counts(limit, fits, tmp_path, monkeypatch):
    state = {"x": jax.ShapeDtypeStruct((1000,), "float32")}
    path = tmp_path / "memory.max"
    if limit is not None:
        path.write_text(limit)
    monkeypatch.setattr(loop, "CGROUP_MEMORY", str(path))
    program = jax.jit(lambda tree: tree["x"] + 1).lower(state).compile()
    if fits:
        loop.check_program_memory(program, "a step")
    else:
        with pytest.raises(InputError, match=r"^a step needs 0\.0 GiB of memory"):
            loop.check_program_memory(program, "a step")


def test_interests_that_do_not_fit_are_refused_before_the_workdir_is_made(tmp_path, monkeypatch):
    config = interests.Config(workdir=str(tmp_path / "run"), embedding_size=65536)
    task = interests.build(config, interests.load_data(config))
    with_memory(monkeypatch, 1000)
    with pytest.raises(InputError, match=r"^parameters, moments and gradients need .* smaller net"):
        interests.train(task, None)
    assert not (tmp_path / "run").exists()


def test_the_images_of_a_benchmark_that_do_not_fit_are_refused(tmp_path):
    config = benchmark_training.Config(image_size=4096)
    with pytest.raises(InputError, match=r"^parameters, moments and gradients need \S+ GiB of"):
        benchmark_training.main(config)
