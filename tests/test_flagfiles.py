"""Flagfiles: the program in the first line accepts the flags that follow."""

import importlib
import pathlib
import re

import in_process
import pytest

from experiments import cli

FOLDER = pathlib.Path(cli.__file__).with_name("flagfiles")


@pytest.fixture
def read(monkeypatch, capsys):
    """Return a function that runs a flagfile's command: its Config, and the program's default."""

    def read(name):
        first_line, *_ = (FOLDER / f"{name}.cfg").read_text().splitlines()
        command = rf"# python -m experiments\.(\w+) --flagfile=experiments/flagfiles/{name}\.cfg"
        program = importlib.import_module(f"experiments.{re.fullmatch(command, first_line)[1]}")
        configs = []
        monkeypatch.setattr(program, "main", configs.append)
        in_process.run(program, {"flagfile": FOLDER / f"{name}.cfg"}, monkeypatch, capsys)
        (config,) = configs
        return config, program.Config()

    return read


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.iterdir()))
def test_program_of_first_line_gets_every_flag(name, read):
    config, default = read(name)
    flags = re.findall(r"^--(\w+)=(.*)$", (FOLDER / f"{name}.cfg").read_text(), re.MULTILINE)
    assert flags
    for flag, text in flags:
        assert getattr(config, flag) == type(getattr(default, flag))(text)


@pytest.mark.parametrize("name", ["affine", "equivariance"])
def test_flags_equal_defaults(name, read):
    config, default = read(name)
    assert config == default
