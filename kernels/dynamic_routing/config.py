"""Tile sizes of the votes-free passes."""

from typing import NamedTuple


class Tile(NamedTuple):
    """How many input capsules and how many examples share one tile of votes."""

    capsules: int
    examples: int


# 1.3 MB of float32 votes: with their agreements they stay in a core's caches. Twice and half
# of it are slower at 1152 x 8 -> 10 x 16 (BUILD_NOTES.md, "Routing on a CPU").
TILE_VOTES = 16 * 10 * 16 * 128
# Examples are the innermost axis: 128 float32 fill 8 vector registers of 16 lanes.
MAX_EXAMPLES = 128


def tile_for(batch: int, capsules: int, parents: int, depth: int) -> Tile:
    """The tile for `[batch, capsules, parents, depth]` votes; it need not divide them."""
    examples = min(batch, MAX_EXAMPLES)
    fitting = TILE_VOTES // (parents * depth * examples)
    return Tile(capsules=max(1, min(capsules, fitting)), examples=examples)
