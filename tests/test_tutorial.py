"""run_tutorial, and the committed outputs of the tutorial."""

import base64
import importlib
import io
import json
import pathlib
import re

import in_process
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.ipynb"
NOTEBOOK = json.loads(TUTORIAL.read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
OUTPUTS = [output for cell in CODE for output in cell["outputs"]]


def test_cells_were_executed_in_order():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))


def test_outputs_have_no_errors_or_warnings():
    assert {output["output_type"] for output in OUTPUTS} <= {"stream", "execute_result"}
    assert {output.get("name", "stdout") for output in OUTPUTS} == {"stdout"}


def test_cells_that_print_have_output():
    prints = [
        cell for cell in CODE if re.search(r"^(print|judge)\(", "".join(cell["source"]), re.M)
    ]
    assert len(prints) > 10
    for cell in prints:
        assert any(output["output_type"] == "stream" for output in cell["outputs"]), cell["source"]


def test_figures_are_valid_images():
    pngs = [output["data"]["image/png"] for output in OUTPUTS if "data" in output]
    assert len(pngs) == 10
    for png in pngs:
        image = Image.open(io.BytesIO(base64.b64decode(png)))
        assert 200 <= image.width <= 900
        low, high = image.convert("L").getextrema()
        assert high - low > 100  # not blank


def test_the_last_cell_lists_all_verdicts():
    listed = "".join(CODE[-1]["outputs"][0]["text"])
    judged = sum("".join(cell["source"]).count("\njudge(") for cell in CODE)
    judged += sum("".join(cell["source"]).startswith("judge(") for cell in CODE)
    assert len(re.findall(r"^(not )?supported: ", listed, re.MULTILINE)) == judged > 10


def test_notebook_is_small_and_has_no_local_paths():
    text = TUTORIAL.read_text()
    assert len(text) < 1_500_000
    assert not re.search(r"/(home|root|tmp|Users|work)/", text)
    assert NOTEBOOK["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(cell["metadata"] == {} for cell in NOTEBOOK["cells"])


@pytest.fixture
def program(monkeypatch, capsys):
    """Return a function that runs the program in this process: exit status and stderr."""
    pytest.importorskip("nbclient", reason="needs nbclient (pip install 'capsjax[tutorial]')")
    pytest.importorskip("ipykernel", reason="needs ipykernel (pip install 'capsjax[tutorial]')")
    run_tutorial = importlib.import_module("experiments.run_tutorial")

    def program(**flags):
        status, _, stderr = in_process.run(run_tutorial, flags, monkeypatch, capsys)
        return status, stderr

    return program


@pytest.fixture
def execute(program, tmp_path):
    """Return a function that runs the program on cells: exit status and executed notebook."""

    def execute(*sources, time_limit=60):
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
        status, _ = program(notebook=path, output=output, time_limit=time_limit)
        assert json.loads(path.read_text())["cells"] == cells
        return status, json.loads(output.read_text())

    return execute


def test_successful_cells_give_status_0_and_outputs(execute):
    status, executed = execute("x = 2", "print(x + 1)\nx")
    assert status == 0
    assert [cell["execution_count"] for cell in executed["cells"]] == [1, 2]
    stream, result = executed["cells"][1]["outputs"]
    assert "".join(stream["text"]) == "3\n"
    assert "".join(result["data"]["text/plain"]) == "2"
    assert executed["metadata"] == NOTEBOOK["metadata"]
    assert all(cell["metadata"] == {} for cell in executed["cells"])


def test_warnings_and_errors_in_cells_fail(execute, caplog):
    status, executed = execute(
        "import warnings\nwarnings.warn('mind the gap')", "1 / 0", "print('after')"
    )
    assert status == 1
    assert [cell["execution_count"] for cell in executed["cells"]] == [1, 2, None]
    assert "ZeroDivisionError" in caplog.text
    assert "cell [1] wrote to stderr" in caplog.text
    assert "mind the gap" in caplog.text


def test_a_warning_alone_fails(program, tmp_path, monkeypatch):
    run_tutorial = importlib.import_module("experiments.run_tutorial")
    output = run_tutorial.NotebookNode(output_type="stream", name="stderr", text="mind the gap")

    def execute(notebook, **_):
        code = next(cell for cell in notebook.cells if cell.cell_type == "code")
        code.outputs = [output]

    monkeypatch.setattr(run_tutorial, "execute", execute)
    assert program(notebook=TUTORIAL, output=tmp_path / "out.ipynb")[0] == 1


def test_time_limit_is_enforced(execute, caplog):
    status, _ = execute("import time\ntime.sleep(60)", time_limit=1)
    assert status == 1
    assert "timed out" in caplog.text


@pytest.mark.parametrize("text", [None, "not a notebook", "{}"])
def test_invalid_notebooks_are_refused(program, tmp_path, text):
    path = tmp_path / "notebook.ipynb"
    if text is not None:
        path.write_text(text)
    status, stderr = program(notebook=path, output=tmp_path / "out.ipynb")
    assert status == 2
    assert len(stderr.splitlines()) == 1
    assert str(path) in stderr
