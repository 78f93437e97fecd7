"""Runs a program inside the process of its test."""

import sys

import pytest

from experiments import cli


def run(program, flags, monkeypatch, capsys):
    """The exit status, stdout and stderr of a module that is a program, given these flags."""
    monkeypatch.setattr(cli, "_configure_logging", lambda config_class: None)
    name = program.__name__.rpartition(".")[2]
    arguments = [f"--{key}={value}" for key, value in flags.items()]
    monkeypatch.setattr(sys, "argv", [f"/some/where/{name}.py", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.run(program.Config, program.main)
    return exit_.value.code, *capsys.readouterr()
