"""The layout of experiments/: what may import what, and that README.md lists what is there."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "experiments"
README = (ROOT / "README.md").read_text()
SOURCES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
SHARED = ("cli", "errors", "files")
PROGRAMS = [path.stem for path in SOURCES if len(path.parts) == 1 and path.stem not in SHARED]
PROGRAMS.remove("__init__")
# A folder may import those that stand below its own line.
LAYERS = (
    {"explore_page", "report_page"},
    {"analysis", "benchmarks"},
    {"training"},
    {"compilers", "data", "figures"},
)


def imported(path):
    """The names below `experiments` that a file imports: `training.loop`, `cli.flag`."""
    names = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    prefix = "experiments."
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_nothing_imports_a_program(path):
    assert not {name.split(".")[0] for name in imported(path)} & set(PROGRAMS)


@pytest.mark.parametrize("path", [path for path in SOURCES if len(path.parts) > 1], ids=str)
def test_a_folder_imports_only_folders_below_it(path):
    own = next(index for index, layer in enumerate(LAYERS) if path.parts[0] in layer)
    allowed = set(SHARED).union({path.parts[0]}, *LAYERS[own + 1 :])
    assert {name.split(".")[0] for name in imported(path)} <= allowed


def test_the_folder_can_be_taken_in_at_a_glance():
    assert len([path for path in ROOT.iterdir() if path.is_file()]) <= 26


def rows(heading):
    """The cells of README's table below a heading, without its head."""
    section = README.split(f"# {heading}\n", 1)[1].split("\n# ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_readme_lists_every_program():
    assert sorted(name.strip("`") for name, *_ in rows("Programs")) == sorted(PROGRAMS)


def test_readme_lists_every_folder():
    folders = {path.parts[0] for path in SOURCES if len(path.parts) > 1}
    assert {name.strip("`/") for name, _ in rows("Folders")} == folders


def test_readme_lists_every_flagfile_with_the_program_that_its_first_line_names():
    listed = {
        flagfile: program.strip("`")
        for program, flagfiles, *_ in rows("Programs")
        for flagfile in re.findall(r"`(\w+)`", flagfiles)
    }
    named = {}
    for path in (ROOT / "flagfiles").iterdir():
        first = path.read_text().splitlines()[0]
        command = rf"# python -m experiments\.(\w+) --flagfile=experiments/flagfiles/{path.name}"
        found = re.fullmatch(command, first)
        assert found, f"{path.name}: {first}"
        named[path.stem] = found[1]
    assert listed == named
