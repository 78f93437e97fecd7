"""The interface of a contender in `benchmark_training`, and files of CapsNet parameters.

A contender is one implementation of a network: capsjax, plain JAX, or PyTorch.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

NETWORKS = ("capsnet", "efficient_capsnet", "matrix_capsnet")
RECONSTRUCTION_WEIGHT = 0.0005

# Functions to time, by the name of their row in the results.
Rows = dict[str, Callable[[], Any]]


class Contender(NamedTuple):
    """The functions of one contender; each blocks until its result is computed."""

    train: Callable[[], Any]  # takes one training step
    # Maps images [B, H, W, C] to poses of class capsules, by the parameters from the file.
    class_capsules: Callable[[np.ndarray], Any]
    # Returns the rows to time beside "training". Called after the peak memory of training was
    # read, because it allocates arrays of its own.
    rows: Callable[[], Rows]


def save_params(path: str, params: Any) -> None:
    """Write nested dicts of arrays to an .npz file."""
    arrays: Any = dict(_flatten(params))
    np.savez(path, **arrays)


def load_params(path: str) -> Any:
    """Read the nested dicts of a file written by `save_params`; keys of digits become ints."""
    params: dict[Any, Any] = {}
    with np.load(path) as file:
        for name, array in file.items():
            *parents, key = name.split("/")
            level = params
            for parent in parents:
                level = level.setdefault(int(parent) if parent.isdigit() else parent, {})
            level[key] = array
    return params


def _flatten(params: Any, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, value in params.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", np.asarray(value)
