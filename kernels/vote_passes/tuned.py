"""Tile sizes that were measured on a device, which take the place of the default ones.

The folder `tuned` beside this module has a JSON file a kind of device, written by
`python -m experiments.benchmark_routing --sweep --tuned=FOLDER`; its README.md describes the files.
A process reads each file once.
"""

import dataclasses
import datetime
import functools
import json
import math
import pathlib
import re
import types
import typing
from typing import Any, TypeVar

from capsjax.kernels.vote_passes.cases import Case
from capsjax.kernels.vote_passes.config import CONFIGS

FOLDER = pathlib.Path(__file__).with_name("tuned")

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class Measured:
    """The fastest config of one implementation for one case: a row of a file."""

    implementation: str  # one that has a config
    sizes: Case
    config: dict[str, Any]  # the fields of the implementation's config
    seconds: float  # of the outputs and all gradients
    jax: str  # version
    date: str  # YYYY-MM-DD

    @property
    def key(self) -> tuple[Any, ...]:
        """What a file has one row for: a pass does not know the T of the routing it is part of."""
        return (self.implementation, *self.sizes._replace(num_iterations=0))


def find(
    implementation: str, case: Case, device_kind: str, config_class: type[Config]
) -> Config | None:
    """Return the config that was measured for a pass, or None.

    Args:
      implementation: Name of the implementation.
      case: Sizes of the pass, which must equal those measured. `num_iterations` is the number of
        iterations whose gradients the pass computes at once, at most those measured.
      device_kind: JAX's `device_kind`.
      config_class: The dataclass of the implementation's configs.

    Raises:
      ValueError: The device's file is not valid, or its config is none of `config_class`.
    """
    path = FOLDER / file_name(device_kind)
    row = _rows_by_key(path, device_kind).get((implementation, *case._replace(num_iterations=0)))
    if row is None or case.num_iterations > row.sizes.num_iterations:
        return None
    return decode(f"{path}: config of {implementation}", row.config, config_class)


def file_name(device_kind: str) -> str:
    """Return the name of a device's file: "nvidia_h200.json" for "NVIDIA H200"."""
    return f"{re.sub(r'[^a-z0-9]+', '_', device_kind.lower()).strip('_')}.json"


def read(path: pathlib.Path, device_kind: str) -> list[Measured]:
    """Return the rows of a device's file; an empty list if there is none.

    Raises:
      ValueError: The file is not valid; the message names the file and the value.
    """
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    _check_names(f"{path}", content, {"device", "rows"})
    if content["device"] != device_kind:
        raise ValueError(f"{path}: device must be {device_kind!r}, got {content['device']!r}")
    if not isinstance(content["rows"], list):
        raise ValueError(f"{path}: rows must be a list, got {content['rows']!r}")
    rows = [_parse(f"{path}: row {n}", row) for n, row in enumerate(content["rows"], start=1)]
    for n, row in enumerate(rows, start=1):
        if row.key in [other.key for other in rows[: n - 1]]:
            raise ValueError(f"{path}: row {n} repeats the sizes and implementation of another")
    return rows


def to_json(device_kind: str, rows: list[Measured]) -> dict[str, Any]:
    """Return the content of a device's file, as `json.dumps` takes it."""
    return {"device": device_kind, "rows": [encode(row) for row in rows]}


def encode(value: Any) -> Any:
    """Return a config as JSON: an object for a dataclass or NamedTuple, else the value."""
    if not _is_record(type(value)):
        return value
    return {name: encode(getattr(value, name)) for name in typing.get_type_hints(type(value))}


def decode(where: str, value: Any, kind: Any) -> Any:
    """Return the value of a type that `encode` encoded.

    Raises:
      ValueError: A field is unknown or missing, of another type, or out of range: sizes are at
        least 1. The message begins with `where`.
    """
    if isinstance(kind, types.UnionType):  # X | None
        if value is None:
            return None
        kind = next(x for x in typing.get_args(kind) if x is not types.NoneType)
    # The size of a batch may be symbolic, and then has no type in its class; not so in a file.
    expected = int if kind is Any else typing.get_origin(kind) or kind
    if _is_record(expected):
        hints = typing.get_type_hints(expected)
        _check_names(where, value, set(hints))
        fields = {name: decode(f"{where}: {name}", value[name], hints[name]) for name in hints}
        try:
            return expected(**fields)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if type(value) is not expected and not (expected is float and type(value) is int):
        raise ValueError(f"{where} must be of type {expected.__name__}, got {value!r}")
    if expected is int and value < 1:
        raise ValueError(f"{where} must be at least 1, got {value}")
    if expected is float and not 0 < value < math.inf:
        raise ValueError(f"{where} must be a positive number, got {value}")
    return value


@functools.cache
def _rows_by_key(path: pathlib.Path, device_kind: str) -> dict[tuple[Any, ...], Measured]:
    return {row.key: row for row in read(path, device_kind)}


def _parse(where: str, value: Any) -> Measured:
    row = decode(where, value, Measured)
    if row.sizes.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"{where}: dtype must be float32 or bfloat16, got {row.sizes.dtype!r}")
    if row.implementation not in CONFIGS:
        raise ValueError(
            f"{where}: implementation must be one of {', '.join(CONFIGS)}, "
            f"got {row.implementation!r}"
        )
    try:
        datetime.date.fromisoformat(row.date)
    except ValueError as error:
        raise ValueError(f"{where}: date: {error}") from error
    return row


def _is_record(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or hasattr(kind, "_fields")


def _check_names(where: str, value: Any, names: set[str]) -> None:
    if not isinstance(value, dict) or value.keys() != names:
        found = sorted(value) if isinstance(value, dict) else value
        raise ValueError(f"{where} must have the fields {', '.join(sorted(names))}, got {found!r}")
