"""Reader of numeric struct fields in MATLAB level 5 files.

Source: The MathWorks, "MAT-File Format", chapter 1, "MAT-File Level 5 File Format",
https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf. It replaces `scipy.io.loadmat`,
which crashes the process on some damaged files; here they raise ValueError.
"""

import struct
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

MAX_BYTES = 2**30  # of a file, and of a decompressed variable
_HEADER_BYTES, _VERSION = 128, b"\0\1IM"
_MATRIX, _COMPRESSED = 14, 15  # data types of elements
_STRUCT = 2  # class of an array
_COMPLEX_FLAG = 0x0800
# NumPy types by the format's numbers: data types of stored numbers, then classes of arrays.
_DATA_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8"}
_DATA_TYPES |= {13: "u8"}
_ARRAY_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4"}
_ARRAY_CLASSES |= {14: "i8", 15: "u8"}


def read_struct(path: Path, name: str, fields: Collection[str]) -> dict[str, np.ndarray]:
    """Read real numeric fields of a 1 x 1 struct in a MATLAB file.

    Args:
      path: The file.
      name: Name of the variable that holds the struct.
      fields: Names of the fields to read; all others are skipped.

    Returns:
      The arrays by field name, with MATLAB's shapes and types.

    Raises:
      OSError: The file cannot be read.
      ValueError: The file is damaged, larger than `MAX_BYTES`, of another format, or lacks the
        struct or one of the fields.
    """
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"the file has more than {MAX_BYTES} bytes")
    content = memoryview(path.read_bytes())
    if bytes(content[_HEADER_BYTES - 4 : _HEADER_BYTES]) != _VERSION:
        raise ValueError("the header is not that of a little-endian MATLAB level 5 file")
    for kind, body in _iter_elements(content[_HEADER_BYTES:]):
        if kind == _COMPRESSED:
            kind, body = next(_iter_elements(_decompress(body)), (0, body))
        if kind == _MATRIX and (found := _read_fields(body, name, fields)) is not None:
            return found
    raise ValueError(f"there is no variable {name}")


def _read_fields(
    body: memoryview, name: str, fields: Collection[str]
) -> dict[str, np.ndarray] | None:
    """Read the fields of a variable, or return None if the variable is not called `name`."""
    parts = _iter_elements(body)
    array_class, shape, variable = _read_array_header(parts)
    if variable != name:
        return None
    if array_class != _STRUCT or np.prod(shape, dtype=float) != 1:
        raise ValueError(f"{name} is not a struct of one element")
    (width,), text = _read_integers(*_next_element(parts)), bytes(_next_element(parts)[1])
    if width < 1:
        raise ValueError("the field names have length 0")
    found = {}
    for start in range(0, len(text), int(width)):
        field = text[start : start + int(width)].partition(b"\0")[0].decode("latin-1")
        kind, inner = _next_element(parts)
        if field in fields:
            found[field] = _read_array(kind, inner, field)
    if missing := set(fields) - found.keys():
        raise ValueError(f"{name} has no {', '.join(sorted(missing))}")
    return found


def _read_array(kind: int, body: memoryview, field: str) -> np.ndarray:
    parts = _iter_elements(body)
    array_class, shape, _ = _read_array_header(parts)
    if kind != _MATRIX or array_class not in _ARRAY_CLASSES:
        raise ValueError(f"{field} is not a numeric array")
    values = _read_numbers(*_next_element(parts))
    if len(values) != np.prod(shape, dtype=float):
        raise ValueError(f"{field} has {len(values)} numbers for the shape {shape}")
    cast = values.astype(_ARRAY_CLASSES[array_class])
    if not np.array_equal(cast, values, equal_nan=True):
        raise ValueError(f"{field} has numbers that its class cannot represent")
    return cast.reshape(shape, order="F")


def _read_array_header(parts: Iterator[tuple[int, memoryview]]) -> tuple[int, tuple, str]:
    """Read the class, the shape and the name of an array."""
    flags, shape = (_read_integers(*_next_element(parts)) for _ in range(2))
    # int(), because a damaged file may give uint8 flags, and NumPy refuses uint8 & 0x0800.
    is_complex = len(flags) == 2 and int(flags[0]) & _COMPLEX_FLAG
    if len(flags) != 2 or is_complex or len(shape) < 2 or shape.min() < 0:
        raise ValueError("an array is complex or has invalid flags or shape")
    name = bytes(_next_element(parts)[1]).decode("latin-1")
    return int(flags[0]) & 0xFF, tuple(map(int, shape)), name


def _read_numbers(kind: int, body: memoryview) -> np.ndarray:
    if kind not in _DATA_TYPES or len(body) % np.dtype(_DATA_TYPES[kind]).itemsize:
        raise ValueError("numbers have an unknown type or an incomplete last value")
    return np.frombuffer(body, f"<{_DATA_TYPES[kind]}")


def _read_integers(kind: int, body: memoryview) -> np.ndarray:
    values = _read_numbers(kind, body)
    if values.dtype.kind == "f":
        raise ValueError("a shape, flags or a length are not integers")
    return values


def _next_element(parts: Iterator[tuple[int, memoryview]]) -> tuple[int, memoryview]:
    found = next(parts, None)
    if found is None:
        raise ValueError("an array is incomplete")
    return found


def _iter_elements(content: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the data type and the data of each element lazily."""
    position = 0
    while position < len(content):
        if len(content) - position < 8:
            raise ValueError("the file ends inside a tag")
        kind, size = struct.unpack_from("<II", content, position)
        start = position + 8
        position = start + size + (0 if kind == _COMPRESSED else -size % 8)
        if kind >> 16:  # small data element format: the data are inside the 8 bytes of the tag
            kind, size, start, position = kind & 0xFFFF, kind >> 16, start - 4, start
            if size > 4:
                raise ValueError("a small data element has more than 4 bytes")
        if size > len(content) - start:
            raise ValueError("the file ends inside an element")
        yield kind, content[start : start + size]


def _decompress(body: memoryview) -> memoryview:
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(body, MAX_BYTES)
    except zlib.error as error:
        raise ValueError(f"a compressed variable is damaged: {error}") from error
    if not stream.eof:
        raise ValueError(f"a compressed variable is damaged or has more than {MAX_BYTES} bytes")
    return memoryview(content)
