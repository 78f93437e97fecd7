"""Tests of `experiments.cli`: flags from a Config, its validation, help, logging, exit status."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import pytest
from absl import flags

from experiments import cli
from experiments.errors import InputError

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Config:
    """A field of each type, and a limit of each kind."""

    workdir: str = cli.flag("", "Folder of the run.", affects_result=False)
    batch_size: int = cli.flag(128, "Examples a step.", minimum=1, maximum=1000)
    learning_rate: float = cli.flag(1e-3, "Step size of Adam.", above=0)
    download: bool = cli.flag(False, "May use the network.", affects_result=False)
    normalize: bool = cli.flag(True, "Scale to 0..1.")
    dtype: str = cli.flag("float32", "Type of the numbers.", choices=("float32", "bfloat16"))


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a program in this process; return its exit status, its Config, stdout and stderr."""
    monkeypatch.setattr(cli, "_configure_logging", lambda main: None)

    def run(*arguments, result=None):
        configs = []

        def main(config):
            configs.append(config)
            if isinstance(result, BaseException):
                raise result
            return result

        monkeypatch.setattr(sys, "argv", ["/some/where/train_mnist.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.run(Config, main)
        return exit_.value.code or 0, (configs or [None])[0], *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        ([], {}),
        (["--batch_size=1"], {"batch_size": 1}),
        (["--batch_size", "1000"], {"batch_size": 1000}),
        (["--batch_size=7", "--batch_size=8"], {"batch_size": 8}),
        (["--learning_rate=1"], {"learning_rate": 1.0}),
        (["--download", "--nonormalize"], {"download": True, "normalize": False}),
        (["--download=true", "--normalize=false"], {"download": True, "normalize": False}),
        (["--dtype=bfloat16", "--workdir=a=b"], {"dtype": "bfloat16", "workdir": "a=b"}),
        (["--"], {}),  # ends the flags; nothing follows
    ],
)
def test_flags_become_the_config(run, arguments, changes):
    status, config, _, stderr = run(*arguments)
    assert (status, config, stderr) == (0, dataclasses.replace(Config(), **changes), "")
    assert [type(value) for value in dataclasses.astuple(config)] == [
        field.type for field in dataclasses.fields(Config)
    ]


def test_flags_override_those_before_them_also_in_a_flagfile(run, tmp_path):
    flagfile = tmp_path / "paper.cfg"
    flagfile.write_text("# the paper\n--batch_size=64\n\n--learning_rate=0.01\n--download\n")
    _, config, _, _ = run("--batch_size=1", f"--flagfile={flagfile}", "--learning_rate=0.5")
    assert config == Config(batch_size=64, learning_rate=0.5, download=True)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--bach_size=3", r"Unknown command line flag 'bach_size'. Did you mean: batch_size \?"),
        ("--verbosity=3", "Unknown command line flag 'verbosity'"),
        ("--batch_size=many", "--batch_size must be a whole number, got 'many'"),
        ("--batch_size=1.5", "--batch_size must be a whole number, got '1.5'"),
        ("--batch_size=", "--batch_size must be a whole number, got ''"),
        ("--batch_size", "Missing value for flag --batch_size"),
        ("--batch_size=0", "--batch_size must be at least 1, got 0"),
        ("--batch_size=1001", "--batch_size must be at most 1000, got 1001"),
        ("--learning_rate=fast", "--learning_rate must be a number, got 'fast'"),
        ("--batch_size=٣", "--batch_size must be a whole number, got '٣'"),
        ("--batch_size=1_0", "--batch_size must be a whole number, got '1_0'"),
        ("--learning_rate=٣", "--learning_rate must be a number, got '٣'"),
        ("--learning_rate=0", "--learning_rate must be above 0, got 0.0"),
        ("--learning_rate=-1e-3", "--learning_rate must be above 0, got -0.001"),
        ("--learning_rate=1e-320", r"--learning_rate must be 0, or 1.2e-38 to .*, got 1e-320"),
        ("--learning_rate=1e300", r"--learning_rate must be 0, or .* to 3.4e\+38 in size, got 1.*"),
        ("--learning_rate=nan", "--learning_rate must be finite, got nan"),
        ("--learning_rate=inf", "--learning_rate must be finite, got inf"),
        ("--learning_rate=1e999", "--learning_rate must be finite, got inf"),
        ("--download=maybe", "--download must be true or false, got 'maybe'"),
        ("--nodownload=true", "--nodownload=true does not take an argument"),
        ("--dtype=float8", "--dtype must be one of float32, bfloat16, got 'float8'"),
        ("--flagfile=none.cfg", r"Unable to open flagfile: .*No such file or directory.*none.cfg'"),
        ("--flagfile", "--flagfile with no argument"),
        ("mnist", "unexpected argument 'mnist': settings are --name=value"),
    ],
)
def test_bad_input_prints_one_line_and_exits_with_status_2(run, argument, message):
    status, config, stdout, stderr = run(argument)
    assert (status, config, stdout) == (2, None, "")
    assert re.fullmatch(f"train_mnist: {message}\n", stderr)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"--batch_size=64 # small\n", "--batch_size must be a whole number, got '64 # small'"),
        (b"batch_size=64\n", "unexpected argument 'batch_size=64': settings are --name=value"),
        (b"--dtype=\xff\n", "the flagfile is not a text file: .*"),
    ],
)
def test_bad_line_of_a_flagfile_is_quoted(run, tmp_path, content, message):
    (tmp_path / "bad.cfg").write_bytes(content)
    status, config, _, stderr = run(f"--flagfile={tmp_path / 'bad.cfg'}")
    assert (status, config) == (2, None)
    assert re.fullmatch(f"train_mnist: {message}\n", stderr)


def test_input_error_of_the_program_is_joined_into_one_line(run):
    status, _, _, stderr = run(result=InputError("labels.idx is truncated:\n  10 bytes"))
    assert (status, stderr) == (2, "train_mnist: labels.idx is truncated: 10 bytes\n")


@pytest.mark.parametrize(("result", "status"), [(None, 0), (0, 0), (3, 3)])
def test_program_returns_its_exit_status(run, result, status):
    assert run(result=result)[0] == status


def test_other_exceptions_are_not_caught(monkeypatch):
    def main(config):
        raise ValueError("a bug")

    monkeypatch.setattr(cli, "_configure_logging", lambda main: None)
    monkeypatch.setattr(sys, "argv", ["train_mnist"])
    with pytest.raises(ValueError, match="a bug"):
        cli.run(Config, main)


def test_ctrl_c_ends_with_one_line_and_status_130(run):
    status, _, stdout, stderr = run(result=KeyboardInterrupt())
    assert (status, stdout, stderr) == (130, "", "train_mnist: interrupted\n")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("Unable to allocate 7 TiB"), "out of memory: Unable to allocate 7 TiB"),
        (MemoryError(), "out of memory: use smaller sizes"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of\nmore"), "RESOURCE_EXHAUSTED: Out of"),
    ],
)
def test_too_little_memory_ends_with_one_line(run, error, message):
    status, _, _, stderr = run(result=error)
    assert (status, stderr) == (2, f"train_mnist: {message}\n")


def test_help_lists_every_flag_with_default_and_limits(run):
    status, config, stdout, stderr = run("--help")
    assert (status, config, stderr) == (0, None, "")
    assert stdout.startswith(f"{__doc__}\n\nusage: train_mnist [--flagfile=FILE]")
    names = re.findall(r"^  --(?:\[no\])?(\w+)$", stdout, re.MULTILINE)
    assert names == [*(field.name for field in dataclasses.fields(Config)), "flagfile"]
    assert "Examples a step. (default: 128; at least 1; at most 1000)" in stdout
    assert "Step size of Adam. (default: 0.001; above 0)" in stdout
    assert "(default: float32; one of float32, bfloat16)" in stdout
    assert "--[no]download\n      May use the network. (default: false)" in stdout


def test_flags_are_not_global(run):
    run()
    run()  # would find its flags already defined
    assert "batch_size" not in flags.FLAGS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "--batch_size must be at least 1, got 0"),
        ({"batch_size": 2.0}, "--batch_size must be a whole number, got 2.0"),
        ({"batch_size": True}, "--batch_size must be a whole number, got True"),
        ({"learning_rate": "1"}, "--learning_rate must be a number, got '1'"),
        ({"learning_rate": -1}, "--learning_rate must be above 0, got -1"),
        ({"learning_rate": float("nan")}, "--learning_rate must be finite, got nan"),
        ({"download": 1}, "--download must be true or false, got 1"),
        ({"workdir": None}, "--workdir must be text, got None"),
    ],
)
def test_validate_checks_types_and_limits_of_a_config_from_a_file(changes, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        cli.validate(dataclasses.replace(Config(), **changes))


def test_validate_takes_an_int_for_a_float_within_its_limits_only():
    cli.validate(Config(learning_rate=1))
    with pytest.raises(InputError, match=r"^--learning_rate must be above 0, got 0$"):
        cli.validate(Config(learning_rate=0))


SCRIPT = """
import dataclasses
from absl import logging
from experiments import cli

@dataclasses.dataclass(frozen=True)
class Config:
    workdir: str = cli.flag("", "Folder.", affects_result=False)
    steps: int = cli.flag(1, "Steps.", minimum=1)

def main(config):
    import jax.numpy as jnp
    from experiments.training import records
    from experiments.training.checkpoints import Checkpoints
    workdir = records.open_workdir(config.workdir, config=config, data_sha256="00")
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(3)})
        logging.info("saved %s", checkpoints.steps())
        logging.warning("beware")

if __name__ == "__main__":
    cli.run(Config, main)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Run SCRIPT in a child process."""
    path = tmp_path_factory.mktemp("script") / "tiny.py"
    path.write_text(SCRIPT)

    def script(*arguments):
        return subprocess.run(
            [sys.executable, "-Werror", path, *arguments],
            cwd=path.parent,
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    return script


def test_stderr_holds_the_programs_own_log_lines_and_warnings_only(script, tmp_path):
    done = script(f"--workdir={tmp_path / 'run'}")
    assert (done.returncode, done.stdout) == (0, "")
    assert re.fullmatch(r"I \d\d:\d\d:\d\d saved \[1\]\nW \d\d:\d\d:\d\d beware\n", done.stderr)


def test_a_missing_extra_is_named(tmp_path):
    """A package that cannot be imported, in place of the installed one."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['nbformat'] = None")
    done = subprocess.run(
        [sys.executable, "-m", "experiments.run_tutorial", "--help"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "nbformat is missing: pip install 'capsjax[tutorial]'\n"


PRINTING = """
import dataclasses, os, signal, sys
from absl import logging
from experiments import cli

@dataclasses.dataclass(frozen=True)
class Config:
    text: str = cli.flag("", "What to print.")

def main(config):
    logging.info("before")
    print(config.text)
    logging.info("after")
    return 3

if __name__ == "__main__":
    cli.run(Config, main)
"""


@pytest.mark.parametrize(
    ("redirection", "status", "stdout", "stderr"),
    [
        ("", 3, r"\\u2603 x", "before after"),
        (">&-", 2, "", "before after standard output cannot be written: Bad file descriptor"),
        ("> /dev/full", 2, "", "before after standard output cannot be written: No space left .*"),
        ("| true", 141, "", "before after"),
        ("2> /dev/full", 3, r"\\u2603 x", ""),
        ("2>&-", 3, r"\\u2603 x", ""),
    ],
)
def test_streams_that_cannot_be_written_end_quietly_or_with_one_line(
    tmp_path, redirection, status, stdout, stderr
):
    (tmp_path / "printing.py").write_text(PRINTING)
    command = f"'{sys.executable}' -Werror printing.py --text='\N{SNOWMAN} x' {redirection}"
    done = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    lines = re.sub(r"I \d\d:\d\d:\d\d |printing: ", "", done.stderr).split("\n")
    assert done.returncode == status
    assert re.fullmatch(stdout, done.stdout.strip())
    assert re.fullmatch(stderr, " ".join(lines).strip())


def test_script_exits_with_one_line_and_status_2(script):
    done = script("--steps=0")
    stderr = "tiny: --steps must be at least 1, got 0\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", stderr)
