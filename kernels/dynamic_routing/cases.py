"""The routing problems that tests, benchmarks and reports share, named after their model."""

from typing import NamedTuple


class Case(NamedTuple):
    """Sizes in the letters B, I, P, J, D and T of `capsjax.shapes`."""

    batch: int
    capsules: int
    length: int
    parents: int
    depth: int
    num_iterations: int = 3
    dtype: str = "float32"


CASES = {
    # Sabour, Frosst and Hinton 2017: 6 x 6 positions of 32 types.
    "capsnet_mnist": Case(batch=128, capsules=1152, length=8, parents=10, depth=16),
}
