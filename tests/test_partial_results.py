"""Partial results: resumption, other inputs and damaged files."""

import json

import numpy as np
import pytest

from experiments.analysis.partial_results import PartialResults, sha256
from experiments.errors import InputError

FACTS = {"settings": {"seed": 0, "rotation": 30.0, "name": "\u00fc"}, "sizes": [1, 2]}


def never():
    raise AssertionError


def test_counts_are_on_disk_before_the_next_measurement(tmp_path):
    path = tmp_path / "new/progress.json"
    first = PartialResults(path, FACTS)
    assert first("a", lambda x: x + 1, 6) == 7
    with pytest.raises(AssertionError):
        first("b", never)
    second = PartialResults(path, FACTS)
    assert second("a", never) == 7
    assert second("b", lambda: 0) == 0
    assert PartialResults(path, FACTS)("b", never) == 0
    second.remove()
    assert [*path.parent.iterdir()] == []
    second.remove()


@pytest.mark.parametrize("facts", [FACTS | {"sizes": [1, 3]}, FACTS | {"more": 0}, {}])
def test_results_with_other_inputs_are_refused(tmp_path, facts):
    path = tmp_path / "progress.json"
    PartialResults(path, FACTS)("a", lambda: 7)
    before = path.read_bytes()
    message = (
        r"^.*progress\.json holds 1 measurements with other settings or runs; "
        "use another --output, or delete the file to start again$"
    )
    with pytest.raises(InputError, match=message):
        PartialResults(path, facts)
    assert path.read_bytes() == before


def test_files_without_counts_are_replaced(tmp_path):
    path = tmp_path / "progress.json"
    PartialResults(path, {})
    assert PartialResults(path, FACTS)("a", lambda: 8) == 8
    assert PartialResults(path, FACTS)("a", never) == 8


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b"[" * 100_000,
        json.dumps({"facts": FACTS}).encode(),
        json.dumps({"facts": FACTS, "counts": [7]}).encode(),
        json.dumps({"facts": FACTS, "counts": {"a": 7.0}}).encode(),
        json.dumps({"facts": FACTS, "counts": {"a": True}}).encode(),
    ],
)
def test_damaged_files_are_refused(tmp_path, content):
    path = tmp_path / "progress.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"progress\.json is damaged .*; delete it to"):
        PartialResults(path, FACTS)
    assert path.read_bytes() == content


def test_unusable_paths_are_refused_at_construction(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/progress\.json cannot be written: "):
        PartialResults(tmp_path / "file/progress.json", FACTS)
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        PartialResults(tmp_path, FACTS)


def test_sha256_depends_on_all_bytes():
    arrays = [np.arange(6, dtype=np.float32).reshape(2, 3), np.array(3), np.zeros((0, 2))]
    before = sha256(arrays)
    assert sha256([array.copy() for array in arrays]) == before
    assert sha256([arrays[0].T, *arrays[1:]]) != before
    arrays[0][1, 2] = np.nextafter(arrays[0][1, 2], np.float32(9))
    assert sha256(arrays) != before
