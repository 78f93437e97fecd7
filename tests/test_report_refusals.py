"""The report: files that are missing, damaged or too large are refused in one line."""

import errno
import io
import json
import os
import pathlib
import re

import pytest
from PIL import Image
from reports import report_program, write_experiment, write_figure, write_run

program = pytest.fixture(report_program)


def damage(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "a")


PNG = io.BytesIO()
Image.new("L", (20, 20), 7).save(PNG, "PNG")
GIGANTIC = io.BytesIO()
Image.new("1", (10_000, 3_001)).save(GIGANTIC, "PNG")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", r"a/config.json is damaged or unreadable \(JSONDecodeError.*\)"),
        ("config.json", b"[" * 10**5, r"a/config.json is damaged or unreadable \(Recursion.*\)"),
        (
            "config.json",
            b'{"config": {"x": [[[[[[[[[[]]]]]]]]]]}, "data_sha256": ""}',
            "a/config.json is damaged: it is nested more than 10 deep",
        ),
        (
            "config.json",
            b" " * 200_000,
            "a/config.json is too large for a report: 0.2 MiB, more than 0.125",
        ),
        ("metrics.jsonl", b"", "workdir a has no metrics yet: metrics.jsonl is empty"),
        ("metrics.jsonl", b'{"step": 1}\n{]\n', r"a/metrics.jsonl is damaged at line 2 \(.*\)"),
        ("metrics.jsonl", b"[" * 10**5 + b"\n", r"a/metrics.jsonl is damaged at line 1 \(.*\)"),
        (
            "metrics.jsonl",
            b'{"step": 1}\n{"step": 2, "test_error": "0"}\n',
            "a/metrics.jsonl is damaged at line 2: 'test_error' must be a number up to 1e100, "
            "got '0'",
        ),
        ("metrics.jsonl", b'{"step": 1%s}\n' % bytes([48] * 101), "a/metrics.jsonl is damaged .*"),
        (
            "metrics.jsonl",
            json.dumps({"step": 1} | dict.fromkeys(map(str, range(100)), 1.0)).encode() + b"\n",
            "a/metrics.jsonl has 101 measures, more than 100",
        ),
        ("results.json", b"", "a/results.json is damaged or has another format: .*"),
        ("results.json", b"[]", ".*: it must hold a non-empty object or list of objects"),
        ("results.json", b"7", ".*: it must hold a non-empty object or list of objects"),
        ("results.json", b"[1]", ".*: every item of its list must be an object"),
        ("results.json", b'{"x": NaN}', ".*: NaN is not JSON"),
        ("results.json", b"[" * 10**5, "a/results.json is damaged or has another format: .*"),
        (
            "results.json",
            json.dumps([{"x": 0}] + [{str(k): 0} for k in range(300)]).encode(),
            ".*: its table would have more than 50000 cells",
        ),
        ("results.json", b" " * 2**20 + b"{}", "a/results.json is too large for a report: .*"),
        ("figures/x.png", b"no image", "a/figures/x.png is not a valid PNG or GIF: .*"),
        ("figures/x.png", PNG.getvalue()[:-30], "a/figures/x.png is not a valid PNG or GIF: .*"),
        (
            "figures/x.png",
            GIGANTIC.getvalue(),
            ".*: 10000 x 3001 pixels exceed the limit of 30000000",
        ),
        ("figures/x.gif", bytes(17 * 2**20), "a/figures/x.gif is too large for a report: 17.0 .*"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)  # fmt: skip
def test_an_unusable_file_is_refused_in_one_line(program, run, tmp_path, name, content, message):
    damage(run / name, content)
    status, stderr = program("a")
    assert status == 2
    assert re.fullmatch(f"report: {message}\n", stderr)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "results.json", "figures/x.png"])
def test_a_pipe_in_place_of_a_file_is_not_read(program, run, name):
    (run / name).unlink(missing_ok=True)
    (run / name).parent.mkdir(exist_ok=True)
    os.mkfifo(run / name)
    assert program("a") == (2, f"report: a/{name} is not a file\n")


@pytest.mark.parametrize("name", ["results.json", "sweeps.png", "figures/x.gif"])
def test_files_of_an_experiment_are_checked_like_those_of_a_run(program, tmp_path, name):
    path = write_experiment(tmp_path / "affine", results={"x": 1})
    damage(path / name, b"{")
    status, stderr = program("affine")
    assert status == 2
    assert re.fullmatch(f"report: affine/{name} is (damaged|not a valid PNG or GIF).*\n", stderr)
    (path / name).unlink()
    os.mkfifo(path / name)
    assert program("affine") == (2, f"report: affine/{name} is not a file\n")


@pytest.mark.parametrize(
    ("workdirs", "message"),
    [
        ([], "--workdirs must be one or more folders, separated by commas, got ''"),
        (
            ["a", "", "a"],
            "--workdirs must be one or more folders, separated by commas, got 'a,,a'",
        ),
        (["none"], "workdir none does not exist"),
        (["a/config.json"], "workdir a/config.json is a file, not a folder"),
        (["x" * 300], f"workdir {'x' * 300} does not exist"),
        (
            ["empty"],
            "workdir empty holds no run and no results: neither it nor a subfolder has "
            "config.json, and it has no results.json",
        ),
        (["new"], "workdir new has no metrics.jsonl: nothing was trained there yet"),
        (["a", "a"], "--workdirs names the run a twice"),
        (["a", "./empty/../a/"], "--workdirs names the run empty/../a twice"),
        (["a", "link"], "--workdirs names the run link twice"),
        (["many", "many/x"], "--workdirs names the run many/x twice"),
        (["affine", "a", "affine"], "--workdirs names the folder affine twice"),
        (["affine", "affine_link"], "--workdirs names the folder affine_link twice"),
    ],
)
def test_unusable_workdirs_are_refused_in_one_line(program, run, tmp_path, workdirs, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("a")
    write_experiment(tmp_path / "affine", results={"x": 1})
    (tmp_path / "affine_link").symlink_to("affine")
    (write_run(tmp_path / "new") / "metrics.jsonl").unlink()
    write_run(tmp_path / "many/x")
    assert program(*workdirs) == (2, f"report: {message}\n")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("", "--output must be a file that ends in .html, got ''"),
        ("a/metrics.jsonl", "--output must be a file that ends in .html, got 'a/metrics.jsonl'"),
        ("folder.html", "--output must be a file that ends in .html, got 'folder.html'"),
        ("none/r.html", "--output: none is not a folder; create it first"),
        ("a/config.json/r.html", "--output: a/config.json is not a folder; create it first"),
        (f"{'x' * 300}.html", f"{'x' * 300}.html cannot be written: File name too long"),
        ("/proc/r.html", "/proc/r.html cannot be written: No such file or directory"),
    ],
)
def test_an_unusable_output_is_refused_in_one_line(program, run, tmp_path, output, message):
    (tmp_path / "folder.html").mkdir()
    assert program("a", output=output) == (2, f"report: {message}\n")


@pytest.mark.parametrize("name", ["results.json", "figures/x.png"])
def test_a_file_that_fails_to_read_is_refused_in_one_line(program, run, name):
    (run / "figures").mkdir()
    (run / name).symlink_to("/proc/self/mem")
    assert program("a") == (2, f"report: a/{name} cannot be read: Input/output error\n")


def test_a_folder_that_fails_to_list_is_refused_in_one_line(program, run, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (run / "figures").mkdir()
    monkeypatch.setattr(pathlib.Path, "iterdir", refuse)
    assert program("a") == (2, "report: a/figures cannot be read: Permission denied\n")


def test_too_many_megabytes_of_figures_are_refused(program, run, monkeypatch):
    write_figure(run, "x.png")
    monkeypatch.setattr("experiments.report_page.workdirs._FIGURES_LIMIT", 1000)
    status, stderr = program("a")
    assert status == 2
    assert re.fullmatch(
        "report: the figures would make a page of .*; pass fewer --workdirs\n", stderr
    )
