"""Reader of MATLAB files, with files that SciPy writes and damaged ones."""

import struct
import zlib

import numpy as np
import pytest
from scipy import io

from experiments.data import matlab

TYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"]


def arrays():
    rng = np.random.default_rng(0)
    return {f"of_{kind}": rng.integers(0, 100, (3, 5)).astype(kind) for kind in TYPES}


def save(path, variables, **options):
    io.savemat(path, variables, **options)
    return path


@pytest.mark.parametrize("do_compression", [False, True])
def test_arrays_keep_shape_and_type(tmp_path, do_compression):
    fields = arrays() | {"small": np.uint8([[7]]), "text": "passed over", "other": {"a": 1.0}}
    path = save(
        tmp_path / "a.mat",
        {"before": np.arange(9.0), "wanted": fields, "after": "text"},
        do_compression=do_compression,
    )
    found = matlab.read_struct(path, "wanted", ["small", *arrays()])
    assert {*found} == {"small", *arrays()}
    for name, array in found.items():
        assert array.dtype == fields[name].dtype
        np.testing.assert_array_equal(array, fields[name])


def test_numbers_stored_in_a_narrower_type_keep_their_class(tmp_path):
    # MATLAB stores doubles with integer values as integers; SciPy does not.
    path = save(tmp_path / "a.mat", {"s": {"x": np.array([[300.0, 2.0]])}})
    content = path.read_bytes()
    stored = struct.pack("<II", 9, 16) + np.array([300.0, 2.0]).tobytes()
    assert content.count(stored) == 1
    narrow = struct.pack("<II", 4, 4) + np.array([300, 2], "u2").tobytes() + bytes(4)
    # An empty element keeps the total size.
    path.write_bytes(content.replace(stored, narrow + struct.pack("<II", 2, 0)))
    found = matlab.read_struct(path, "s", ["x"])["x"]
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, [[300.0, 2.0]])


def test_numbers_that_their_class_cannot_represent_are_refused(tmp_path):
    path = save(tmp_path / "a.mat", {"s": {"x": np.array([[300.0, 2.0]])}})
    content = path.read_bytes()
    flags = struct.pack("<4I", 6, 8, 6, 0)  # class 6, double; 9 is uint8
    assert content.count(flags) == 1
    path.write_bytes(content.replace(flags, struct.pack("<4I", 6, 8, 9, 0)))
    with pytest.raises(ValueError, match="x has numbers that its class cannot represent"):
        matlab.read_struct(path, "s", ["x"])


def test_array_flags_may_be_uint8(tmp_path):
    path = save(tmp_path / "a.mat", {"s": {"x": np.arange(3.0)[None]}})
    content = path.read_bytes()
    flags = struct.pack("<4I", 6, 8, 6, 0)
    assert content.count(flags) == 1
    path.write_bytes(content.replace(flags, struct.pack("<2I2B6x", 2, 2, 6, 0)))
    np.testing.assert_array_equal(matlab.read_struct(path, "s", ["x"])["x"], [[0, 1, 2]])


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"other": {"x": 1.0}}, "there is no variable s"),
        ({"s": 1.0}, "s is not a struct of one element"),
        ({"s": np.zeros(2, [("x", object)])}, "s is not a struct of one element"),
        ({"s": {"y": 1.0}}, "s has no x"),
        ({"s": {"x": "text"}}, "x is not a numeric array"),
        ({"s": {"x": 1j}}, "an array is complex"),
    ],
)
def test_missing_structs_and_fields_are_refused(tmp_path, variables, message):
    path = save(tmp_path / "a.mat", variables)
    with pytest.raises(ValueError, match=message):
        matlab.read_struct(path, "s", ["x"])


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(matlab, "MAX_BYTES", 10_000)
    path = save(tmp_path / "a.mat", {"s": {"x": np.zeros((100, 200))}}, do_compression=True)
    assert path.stat().st_size < 1000
    with pytest.raises(ValueError, match="is damaged or has more than 10000 bytes"):
        matlab.read_struct(path, "s", ["x"])
    save(path, {"s": {"x": np.zeros((100, 200))}})
    with pytest.raises(ValueError, match="the file has more than 10000 bytes"):
        matlab.read_struct(path, "s", ["x"])


@pytest.mark.parametrize("do_compression", [False, True])
def test_damaged_files_raise_value_errors(tmp_path, do_compression):
    variables = {"s": {"text": "abc", "x": np.arange(6.0).reshape(2, 3), "y": np.uint8([[1]])}}
    path = save(tmp_path / "a.mat", variables, do_compression=do_compression)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for trial in range(1000):
        content = bytearray(whole)
        if do_compression:
            # Damaged before compression, because zlib's checksum detects damage after it.
            inner = bytearray(zlib.decompress(whole[136:]))
            damage(inner, rng, trial)
            packed = zlib.compress(inner)
            content = whole[:128] + struct.pack("<II", 15, len(packed)) + packed
        else:
            damage(content, rng, trial)
        path.write_bytes(content)
        try:
            found = matlab.read_struct(path, "s", ["x"])
        except ValueError:
            refused += 1
        else:
            assert found["x"].ndim >= 2
    assert refused > 333


def damage(content, rng, trial):
    """Overwrite two bytes, or in every fourth trial truncate the content, in place."""
    if trial % 4:
        for place in rng.integers(0, len(content), 2):
            content[place] = rng.choice([0, 1, 2, 7, 9, 14, 127, 128, 255])
    else:
        del content[rng.integers(len(content)) :]
