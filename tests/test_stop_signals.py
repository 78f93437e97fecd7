"""Ctrl-C, SIGTERM and SIGHUP at several moments of a program: one line, and 128 + the number."""

import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
import training_runs

ROOT = pathlib.Path(__file__).parents[1]
# Sends the signal when the process imports or opens what the test names; "held" is a moment in
# which compiled code does not return, as a compiler's may for minutes.
HOOK = """
import hashlib, os, signal, sys, threading

# Tests that run in the background ignore Ctrl-C, and their programs would too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

wanted, number, held = os.environ["WANTED"], int(os.environ["NUMBER"]), os.environ["HELD"] == "1"
done = []

def hook(event, arguments):
    if done or event not in ("import", "open") or not str(arguments[0]).endswith(wanted):
        return
    done.append(event)
    if held:
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
    else:
        os.kill(os.getpid(), number)

sys.addaudithook(hook)
"""
MOMENTS = {
    "first imports": ("numpy", signal.SIGINT, False),
    "last imports": ("optax", signal.SIGTERM, False),
    "reading data": ("t10k-labels-idx1-ubyte", signal.SIGHUP, False),
    "in compiled code": ("t10k-labels-idx1-ubyte", signal.SIGTERM, True),
    "in compiled code, Ctrl-C": ("t10k-labels-idx1-ubyte", signal.SIGINT, True),
    "drawing figures": (".ttf", signal.SIGINT, False),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return training_runs.write_noise(tmp_path_factory.mktemp("data") / "noise")


def run(data, folder, wanted, number, is_held):
    (folder / "sitecustomize.py").write_text(HOOK)
    config = training_runs.tiny_config(data, workdir=str(folder / "run"))
    config = dataclasses.replace(config, num_epochs=1)
    flags = [f"--{name}={value}" for name, value in dataclasses.asdict(config).items()]
    return subprocess.run(
        [sys.executable, "-m", "experiments.train_mnist", *flags],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "JAX_PLATFORMS": "cpu"}
        | {"WANTED": wanted, "NUMBER": str(int(number)), "HELD": str(int(is_held))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_ends_a_program_with_one_line_at_any_moment(data, tmp_path, moment):
    wanted, number, is_held = MOMENTS[moment]
    done = run(data, tmp_path, wanted, number, is_held)
    lines = [x for x in done.stderr.splitlines() if not re.match(r"[IW] \d\d:\d\d:\d\d ", x)]
    assert (done.returncode, done.stdout) == (128 + number, "")
    assert lines in (["interrupted"], ["train_mnist: interrupted"])
    if moment == "drawing figures":
        trained = training_runs.newest_state(tmp_path / "run")
        assert trained[0] == training_runs.LAST_STEP // 6
