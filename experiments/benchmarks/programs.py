"""What the programs that are compared share: what is measured, and their parameters in a file."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

RECONSTRUCTION_WEIGHT = 0.0005

Rows = dict[str, Callable[[], Any]]


class Program(NamedTuple):
    """One program's functions; each ends when its result is there."""

    train: Callable[[], Any]
    class_capsules: Callable[[np.ndarray], Any]  # of images, with the parameters from the file
    rows: Callable[[], Rows]  # beside "training"; made when training's memory has been read


def save_params(path: str, params: Any) -> None:
    """Writes nested dicts of arrays."""
    arrays: Any = dict(_flat(params))
    np.savez(path, **arrays)


def load_params(path: str) -> Any:
    """Reads what `save_params` wrote."""
    params: dict[Any, Any] = {}
    with np.load(path) as file:
        for name, array in file.items():
            *folders, last = name.split("/")
            level = params
            for folder in folders:
                level = level.setdefault(int(folder) if folder.isdigit() else folder, {})
            level[last] = array
    return params


def _flat(params: Any, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, value in params.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", np.asarray(value)
