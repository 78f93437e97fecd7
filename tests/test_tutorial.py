"""The tutorial: its committed copy was run in order, without warnings; its program says if not."""

import base64
import io
import json
import pathlib
import re
import subprocess
import sys

import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.ipynb"
NOTEBOOK = json.loads(TUTORIAL.read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
OUTPUTS = [output for cell in CODE for output in cell["outputs"]]


def test_every_cell_was_run_in_order_from_a_clean_state():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))


def test_no_cell_has_an_error_or_a_warning():
    assert {output["output_type"] for output in OUTPUTS} <= {"stream", "execute_result"}
    assert {output.get("name", "stdout") for output in OUTPUTS} == {"stdout"}


def test_every_cell_that_prints_has_its_text():
    prints = [
        cell for cell in CODE if re.search(r"^(print|judge)\(", "".join(cell["source"]), re.M)
    ]
    assert len(prints) > 10
    for cell in prints:
        assert any(output["output_type"] == "stream" for output in cell["outputs"]), cell["source"]


def test_every_figure_is_an_image_that_can_be_read():
    pngs = [output["data"]["image/png"] for output in OUTPUTS if "data" in output]
    assert len(pngs) == 10
    for png in pngs:
        image = Image.open(io.BytesIO(base64.b64decode(png)))
        assert 200 <= image.width <= 900
        low, high = image.convert("L").getextrema()
        assert high - low > 100  # not blank


def test_the_last_cell_lists_every_verdict():
    listed = "".join(CODE[-1]["outputs"][0]["text"])
    judged = sum("".join(cell["source"]).count("\njudge(") for cell in CODE)
    judged += sum("".join(cell["source"]).startswith("judge(") for cell in CODE)
    assert len(re.findall(r"^(not )?supported: ", listed, re.MULTILINE)) == judged > 10


def test_it_is_small_and_names_no_machine():
    text = TUTORIAL.read_text()
    assert len(text) < 1_500_000
    assert not re.search(r"/(home|root|tmp|Users|work)/", text)
    assert NOTEBOOK["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(cell["metadata"] == {} for cell in NOTEBOOK["cells"])


@pytest.fixture
def run(tmp_path):
    """Runs the program on a notebook of these cells: what it did, and the notebook it wrote."""
    pytest.importorskip("nbclient", reason="needs nbclient (pip install 'capsjax[tutorial]')")
    pytest.importorskip("ipykernel", reason="needs ipykernel (pip install 'capsjax[tutorial]')")

    def run(*sources, time_limit=60):
        cells = [
            {
                "cell_type": "code",
                "execution_count": None,
                "id": f"cell-{number}",
                "metadata": {},
                "outputs": [],
                "source": source,
            }
            for number, source in enumerate(sources)
        ]
        path, output = tmp_path / "notebook.ipynb", tmp_path / "out" / "notebook.ipynb"
        path.write_text(json.dumps({**NOTEBOOK, "cells": cells}))
        done = program(f"--notebook={path}", f"--output={output}", f"--time_limit={time_limit}")
        assert json.loads(path.read_text())["cells"] == cells
        return done, json.loads(output.read_text())

    return run


def program(*arguments):
    command = [sys.executable, "-m", "experiments.run_tutorial", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_cells_that_run_give_0_and_their_outputs(run):
    done, written = run("x = 2", "print(x + 1)\nx")
    assert done.returncode == 0, done.stderr
    assert [cell["execution_count"] for cell in written["cells"]] == [1, 2]
    stream, result = written["cells"][1]["outputs"]
    assert "".join(stream["text"]) == "3\n"
    assert "".join(result["data"]["text/plain"]) == "2"
    assert written["metadata"] == NOTEBOOK["metadata"]
    assert all(cell["metadata"] == {} for cell in written["cells"])


def test_an_error_in_a_cell_fails_and_is_shown(run):
    done, written = run("print('before')", "1 / 0", "print('after')")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert [cell["execution_count"] for cell in written["cells"]] == [1, 2, None]


def test_a_warning_in_a_cell_fails_and_is_shown(run):
    done, _ = run("import warnings\nwarnings.warn('mind the gap')")
    assert done.returncode == 1
    assert "cell [1] wrote to stderr" in done.stderr
    assert "mind the gap" in done.stderr


def test_a_cell_that_takes_too_long_fails(run):
    done, _ = run("import time\ntime.sleep(60)", time_limit=5)
    assert done.returncode == 1
    assert "5 seconds" in done.stderr or "timed out" in done.stderr


@pytest.mark.parametrize("text", [None, "not a notebook", "{}"])
def test_what_is_no_notebook_is_one_line_and_exit_2(tmp_path, text):
    pytest.importorskip("nbclient", reason="needs nbclient (pip install 'capsjax[tutorial]')")
    path = tmp_path / "notebook.ipynb"
    if text is not None:
        path.write_text(text)
    done = program(f"--notebook={path}", f"--output={tmp_path / 'out.ipynb'}")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert str(path) in done.stderr
