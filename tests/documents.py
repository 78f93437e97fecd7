"""Runs the Python blocks of a page of docs/."""

import pathlib
import re

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def run(page):
    """Execute all Python blocks of a page, in order, and return the names that they define."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.S | re.M)
    assert blocks
    names = {"__name__": page}
    for block in blocks:
        exec(compile(block, str(DOCS / page), "exec"), names)
    return names
