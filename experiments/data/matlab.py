"""Reads numbers out of a struct in a MATLAB file of level 5, without trusting a size in it.

Source: The MathWorks, "MAT-File Format", chapter 1, "MAT-File Level 5 File Format",
https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf. It exists because SciPy's reader
ends the whole process on some damaged files.
"""

import struct
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

LARGEST = 2**30  # bytes of a file, and of a variable that is compressed in it
_HEADER, _VERSION = 128, b"\0\1IM"
_MATRIX, _COMPRESSED = 14, 15
_STRUCT = 2
# NumPy's types by the numbers of the format: of stored data, and of arrays.
_STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8"}
_STORED |= {13: "u8"}
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4"}
_CLASSES |= {14: "i8", 15: "u8"}


def read_struct(path: Path, name: str, fields: Collection[str]) -> dict[str, np.ndarray]:
    """The named fields of a struct that is a variable of a file.

    Args:
      path: The file.
      name: The variable, a struct of one element.
      fields: Real numeric arrays in it; others are passed over.

    Returns:
      The arrays, in MATLAB's shape and type.

    Raises:
      OSError: The file cannot be read.
      ValueError: It is damaged, too large, of another format or has no such struct and fields.
    """
    if path.stat().st_size > LARGEST:
        raise ValueError(f"it has more than {LARGEST} bytes")
    content = memoryview(path.read_bytes())
    if bytes(content[_HEADER - 4 : _HEADER]) != _VERSION:
        raise ValueError("it has no header of a MATLAB file of level 5, little-endian")
    for kind, body in _elements(content[_HEADER:]):
        if kind == _COMPRESSED:
            kind, body = next(_elements(_decompressed(body)), (0, body))
        if kind == _MATRIX and (found := _fields(body, name, fields)) is not None:
            return found
    raise ValueError(f"it has no variable {name}")


def _fields(body: memoryview, name: str, fields: Collection[str]) -> dict[str, np.ndarray] | None:
    """The fields of a variable; None if it has another name."""
    parts = _elements(body)
    number, shape, own = _heading(parts)
    if own != name:
        return None
    if number != _STRUCT or np.prod(shape, dtype=float) != 1:
        raise ValueError(f"{name} is no struct of one element")
    (width,), text = _integers(*_next(parts)), bytes(_next(parts)[1])
    if width < 1:
        raise ValueError("names of fields have no length")
    found = {}
    for start in range(0, len(text), int(width)):
        field = text[start : start + int(width)].partition(b"\0")[0].decode("latin-1")
        kind, inner = _next(parts)
        if field in fields:
            found[field] = _array(kind, inner, field)
    if missing := set(fields) - found.keys():
        raise ValueError(f"{name} has no {', '.join(sorted(missing))}")
    return found


def _array(kind: int, body: memoryview, field: str) -> np.ndarray:
    parts = _elements(body)
    number, shape, _ = _heading(parts)
    if kind != _MATRIX or number not in _CLASSES:
        raise ValueError(f"{field} is no array of numbers")
    values = _numbers(*_next(parts))
    if len(values) != np.prod(shape, dtype=float):
        raise ValueError(f"{field} has {len(values)} numbers for the shape {shape}")
    cast = values.astype(_CLASSES[number])
    if not np.array_equal(cast, values, equal_nan=True):
        raise ValueError(f"{field} has numbers that its class cannot hold")
    return cast.reshape(shape, order="F")


def _heading(parts: Iterator[tuple[int, memoryview]]) -> tuple[int, tuple, str]:
    """The class, the shape and the name of an array."""
    flags, shape = (_integers(*_next(parts)) for _ in range(2))
    # As Python's: NumPy's of one byte, which a tag may ask for, take no 0x0800.
    if len(flags) != 2 or int(flags[0]) & 0x0800 or len(shape) < 2 or shape.min() < 0:
        raise ValueError("an array has no flags or shape, or complex numbers")
    name = bytes(_next(parts)[1]).decode("latin-1")
    return int(flags[0]) & 0xFF, tuple(map(int, shape)), name


def _numbers(kind: int, body: memoryview) -> np.ndarray:
    if kind not in _STORED or len(body) % np.dtype(_STORED[kind]).itemsize:
        raise ValueError("numbers have a type or a size that does not exist")
    return np.frombuffer(body, f"<{_STORED[kind]}")


def _integers(kind: int, body: memoryview) -> np.ndarray:
    values = _numbers(kind, body)
    if values.dtype.kind == "f":
        raise ValueError("a shape, flags or a length are no integers")
    return values


def _next(parts: Iterator[tuple[int, memoryview]]) -> tuple[int, memoryview]:
    found = next(parts, None)
    if found is None:
        raise ValueError("an array ends early")
    return found


def _elements(content: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The type and the data of each element; one is read when it is asked for."""
    place = 0
    while place < len(content):
        if len(content) - place < 8:
            raise ValueError("it ends inside a tag")
        kind, size = struct.unpack_from("<II", content, place)
        start = place + 8
        place = start + size + (0 if kind == _COMPRESSED else -size % 8)
        if kind >> 16:  # a small element: its data share the 8 bytes of the tag
            kind, size, start, place = kind & 0xFFFF, kind >> 16, start - 4, start
            if size > 4:
                raise ValueError("a small element is too large")
        if size > len(content) - start:
            raise ValueError("it ends inside an element")
        yield kind, content[start : start + size]


def _decompressed(body: memoryview) -> memoryview:
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(body, LARGEST)
    except zlib.error as error:
        raise ValueError(f"it is damaged: {error}") from error
    if not stream.eof:
        raise ValueError(f"a variable is damaged or has more than {LARGEST} bytes")
    return memoryview(content)
