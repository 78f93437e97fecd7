"""The documentation: programs of pages run, pages and API are complete, links lead somewhere."""

import inspect
import pathlib
import re

import documents
import pytest

import capsjax
import capsjax.models
import capsjax.nn

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    path.relative_to(DOCS)
    for path in DOCS.rglob("*.md")
    if not {"_build", "jupyter_execute"} & set(path.parts)
)
FRONT = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "BUILD_NOTES.md")


@pytest.mark.parametrize(
    "page", ["quickstart", "guides/layers", "guides/routing", "guides/precision", "guides/serving"]
)
def test_programs_of_a_page_run(page):
    assert documents.run(f"{page}.md")


def test_the_network_of_a_page_learns(capsys):
    names = documents.run("guides/your_network.md")
    assert names["right"] > 0.9


def test_readme_is_short_and_its_example_runs():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    (example,) = re.findall(r"^```python\n(.*?)^```$", text, re.S | re.M)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["gradient"].shape == names["weights"].shape
    assert len([line for line in example.splitlines() if line]) <= 12


def test_build_notes_are_short():
    assert len((ROOT / "BUILD_NOTES.md").read_text().splitlines()) <= 200


def test_the_api_pages_name_everything_public():
    listed = set(
        re.findall(
            r"auto(?:function|class|exception):: (\S+)",
            "".join(page.read_text() for page in (DOCS / "api").glob("*.md")),
        )
    )
    public = {
        f"{module.__name__}.{name}"
        for module in (capsjax, capsjax.nn, capsjax.models)
        for name, value in vars(module).items()
        if inspect.isfunction(value) or inspect.isclass(value)
    }
    types = {
        "capsjax.kernels.vote_passes.passes.Implementation",
        "capsjax.nn.routings.Routing()",
    }
    assert listed == public | types


def test_every_page_is_in_a_table_of_contents():
    """Sphinx names pages that are not; the site is built by `.ci/run` only."""
    listed = set()
    for page in PAGES:
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", (DOCS / page).read_text(), re.S):
            names = [line for line in tree.split() if not line.startswith(":")]
            listed |= {page.parent / f"{name}.md" for name in names}
    assert {*PAGES} - listed == {pathlib.Path("index.md")}


@pytest.mark.parametrize("page", [*FRONT, *(f"docs/{page}" for page in PAGES)])
def test_links_between_files_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.S | re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target = link.split("#")[0]
        if target and "://" not in link:
            assert (ROOT / page).parent.joinpath(target).exists(), link


def test_the_version_is_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {capsjax.__version__}\n" in citation
    assert f"\n## {capsjax.__version__}" in (ROOT / "CHANGELOG.md").read_text()
