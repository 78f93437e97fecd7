"""Users' sequences of items: files of RecBole and GroupLens, a generator, and splits without leaks.

Shape letters, besides those of `capsjax.shapes`: U users; V items of the catalogue; N interactions
of all users together.
"""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.errors import InputError

PROTOCOLS = ("next_item", "last_fifth")
_COLUMNS = ("user_id", "item_id", "timestamp")
_GROUPLENS_COLUMNS = ("user_id", "item_id", "rating", "timestamp")
# Fixed, so that runs with different --seed have the same users and the same test.
_GENERATOR_SEED, _SPLIT_SEED = 2019, 2020
_INTERESTS = (2, 4)  # fewest and most clusters of a generated user
_LENGTHS = (10, 30)  # fewest and most items of a generated user


@dataclass(frozen=True, eq=False)
class Interactions:
    """The items of all users, each user's in order of time; users and items are numbered from 0."""

    name: str
    items: np.ndarray  # int32 [N], of one user after the other
    starts: np.ndarray  # int64 [U + 1]; user u has items[starts[u] : starts[u + 1]]
    user_ids: tuple[str, ...]  # [U], as in the file
    item_ids: tuple[str, ...]  # [V], as in the file
    sha256: str
    clusters: np.ndarray | None = None  # int32 [V], of generated data: what each item belongs to

    @property
    def num_users(self) -> int:
        """Return U."""
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        """Return V."""
        return len(self.item_ids)

    def histories(self, ends: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the last items before each position, and which slots hold one.

        The newest item is in the last slot, whatever the length of the history, and padding in
        front, so that a slot means the same age in all histories.

        Args:
          ends: Positions in `items`, int `[B]`; a history has items of the same user before it.
            An end of user u is above `starts[u]`.
          length: I, the slots.

        Returns:
          Items, int32 `[B, I]`, 0 in empty slots; and booleans `[B, I]`, False for those.
        """
        first = self.starts[np.searchsorted(self.starts, ends, side="left") - 1]
        positions = ends[:, None] + np.arange(-length, 0)
        mask = positions >= first[:, None]
        return np.where(mask, self.items[np.where(mask, positions, 0)], 0), mask


class HeldOut(NamedTuple):
    """Users to evaluate: their histories, and the items to be found."""

    users: np.ndarray  # int64 [B]
    ends: np.ndarray  # int64 [B]: the history is items[starts[user] : end]
    target_ends: np.ndarray  # int64 [B]: the targets are items[end : target_end]


class Split(NamedTuple):
    """What a network is trained on, and where it is evaluated."""

    seen: np.ndarray  # bool [N]: interactions of the training data
    train: np.ndarray  # int64, their positions except each user's first: the targets of training
    validation: HeldOut
    test: HeldOut


def load(name: str, *, data_dir: str = "", min_interactions: int = 0) -> Interactions:
    """Load the interactions of a folder.

    Args:
      name: What the data are called in messages.
      data_dir: Folder with GroupLens's `u.data`, or with one `.inter` file of RecBole.
      min_interactions: Users and items with fewer interactions are removed until none is left
        ("k-core" filtering).

    Raises:
      InputError: The file is missing, ambiguous or damaged, or nothing is left.
    """
    path = _locate(data_dir)
    users, items, times = _read(path)
    user_ids, user_of = _numbered(users)
    item_ids, item_of = _numbered(items)
    order = np.lexsort((times, user_of))  # stable: interactions of one time stay as in the file
    user_of, item_of, times = user_of[order], item_of[order], times[order]
    kept = ~_repeated(user_of, item_of, times)
    user_of, item_of = user_of[kept], item_of[kept]
    while True:
        counts = (np.bincount(user_of)[user_of], np.bincount(item_of)[item_of])
        kept = np.minimum(*counts) >= min_interactions
        if kept.all():
            break
        user_of, item_of = user_of[kept], item_of[kept]
        if not kept.any():
            raise InputError(
                f"{path}: no user and item has the {min_interactions} interactions of "
                "--min_interactions"
            )
    used_users, user_of = np.unique(user_of, return_inverse=True)
    used_items, item_of = np.unique(item_of, return_inverse=True)
    return _interactions(
        name,
        item_of.astype(np.int32),
        np.bincount(user_of),
        [user_ids[u] for u in used_users],
        [item_ids[i] for i in used_items],
    )


def synthetic(*, num_users: int, num_items: int, num_clusters: int) -> Interactions:
    """Generate users with a few clear interests, which are clusters of items.

    The catalogue is cut into clusters of equal size. A user has 2 to 4 of them, and 10 to 30 items:
    each is of one of the user's clusters, with equal probabilities, and none is repeated. In a
    cluster the r-th item has the popularity 1/r.

    Args:
      num_users: U.
      num_items: V, divisible into clusters of 10 items or more.
      num_clusters: At least 4.

    Raises:
      InputError: A cluster has too few items.
    """
    size = num_items // num_clusters
    if size * _INTERESTS[0] < _LENGTHS[1]:
        raise InputError(
            f"--synthetic_items must be at least {-(-_LENGTHS[1] // _INTERESTS[0])} for each of "
            f"the {num_clusters} clusters of --synthetic_clusters, got {num_items}"
        )
    clusters = np.arange(num_items, dtype=np.int32) % num_clusters
    popularity = 1 / (1 + np.arange(num_items) // num_clusters)
    sequences = []
    for user in range(num_users):
        draws = _uniforms(_GENERATOR_SEED, user, 2 + num_clusters + num_items + _LENGTHS[1])
        count = _between(draws[0], _INTERESTS)
        length = _between(draws[1], _LENGTHS)
        draws = draws[2:]
        own = np.argsort(draws[:num_clusters])[:count]
        draws = draws[num_clusters:]
        # An exponential race: items in the order of draws without replacement.
        order = np.argsort(-np.log(draws[:num_items]) / popularity)
        left = [list(order[clusters[order] == c]) for c in own]
        sequence = []
        for draw in draws[num_items : num_items + length]:
            nonempty = [items for items in left if items]
            sequence.append(nonempty[int(draw * len(nonempty))].pop(0))
        sequences.append(np.array(sequence, np.int32))
    return _interactions(
        "synthetic",
        np.concatenate(sequences),
        [len(sequence) for sequence in sequences],
        [str(u) for u in range(num_users)],
        [f"{clusters[i]}.{i // num_clusters}" for i in range(num_items)],
        clusters,
    )


def split(interactions: Interactions, protocol: str) -> Split:
    """Split interactions into training, validation and test.

    `"next_item"`: the last item of each user is the test, the one before it the validation, and
    those before train. Users of fewer than three items train only. An item of another user may be
    younger than a test item, as everywhere where the last item is left out.

    `"last_fifth"`: of the users, 8 of 10 train, 1 is for validation and 1 for the test. The first
    80 % of the items of a held-out user are the history, and the others are to be found. Source:
    Cen et al., "Controllable Multi-Interest Framework for Recommendation", the
    evaluation with users unseen in training, https://arxiv.org/abs/2005.09347.

    Raises:
      InputError: Too few users or items are left in one of the three.
    """
    starts, ends = interactions.starts[:-1], interactions.starts[1:]
    lengths = ends - starts
    users = np.arange(interactions.num_users)
    seen = np.ones(len(interactions.items), bool)
    if protocol == "next_item":
        held = users[lengths >= 3]
        seen[ends[held] - 1] = seen[ends[held] - 2] = False
        validation = HeldOut(held, ends[held] - 2, ends[held] - 1)
        test = HeldOut(held, ends[held] - 1, ends[held])
    else:
        order = np.argsort(_uniforms(_SPLIT_SEED, 0, len(users)), kind="stable")
        tenth = len(users) // 10
        parts = []
        for held in (order[:tenth], order[tenth : 2 * tenth]):
            held = np.sort(held)
            seen[np.isin(np.repeat(users, lengths), held)] = False
            held = held[lengths[held] >= 2]
            parts.append(HeldOut(held, starts[held] + lengths[held] * 4 // 5, ends[held]))
        validation, test = parts
    is_first = np.zeros_like(seen)
    is_first[starts] = True
    train = np.flatnonzero(seen & ~is_first)
    sizes = {"train on": train, "validate": validation.users, "test": test.users}
    for what, positions in sizes.items():
        if not len(positions):
            raise InputError(
                f"{interactions.name}: the {len(users)} users have too few items to {what} with "
                f"--protocol={protocol}"
            )
    return Split(seen, train, validation, test)


def _locate(data_dir: str) -> Path:
    folder = os.path.expanduser(data_dir)
    # os.path, because Path's methods raise for names that are too long.
    if not (os.path.isdir(folder) and os.access(folder, os.R_OK | os.X_OK)):
        raise InputError(f"--data_dir must be a folder that can be read, got {data_dir!r}")
    found = sorted(Path(folder).glob("*.inter"))
    if (plain := Path(folder) / "u.data").is_file():
        found.append(plain)
    if len(found) != 1:
        names = f"found {', '.join(path.name for path in found)}" if found else "found neither"
        raise InputError(
            f"--data_dir must hold one file NAME.inter of RecBole or GroupLens's u.data, {names} "
            f"in {data_dir}"
        )
    return found[0]


def _read(path: Path) -> tuple[list[str], list[str], np.ndarray]:
    """Read a file: the users, the items and the times of its rows.

    Ids are text, so that no memory depends on their values.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: the file cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: the file is not UTF-8 text: {error.reason}") from error
    lines = text.replace("\r\n", "\n").rstrip("\n").split("\n")
    is_plain = path.name == "u.data"
    names = _GROUPLENS_COLUMNS if is_plain else _header(path, lines[0])
    first = 0 if is_plain else 1
    user, item, time = (names.index(name) for name in _COLUMNS)
    users, items, times = [], [], []
    for number, line in enumerate(lines[first:], first + 1):
        cells = line.split("\t")
        if len(cells) != len(names):
            raise InputError(
                f"{path}, line {number}: must have {len(names)} columns separated by tabs "
                f"({', '.join(names)}), got {len(cells) if line else 0}"
            )
        for index in (user, item):
            # GroupLens numbers both; RecBole's tokens are any text.
            if not (cells[index].isdecimal() if is_plain else cells[index]):
                rule = "a whole number from 0" if is_plain else "some text"
                raise InputError(
                    f"{path}, line {number}: {names[index]} must be {rule}, got {cells[index]!r}"
                )
        try:
            seconds = float(cells[time])
        except ValueError:
            seconds = math.nan
        if not math.isfinite(seconds):
            raise InputError(
                f"{path}, line {number}: timestamp must be a number, got {cells[time]!r}"
            )
        users.append(cells[user])
        items.append(cells[item])
        times.append(seconds)
    if not users:
        raise InputError(f"{path}: the file has no interactions")
    return users, items, np.array(times)


def _header(path: Path, line: str) -> tuple[str, ...]:
    """Return the names of the columns of an `.inter` file."""
    wanted = ("user_id:token", "item_id:token", "timestamp:float")
    fields = line.split("\t")
    if missing := [field for field in wanted if fields.count(field) != 1]:
        raise InputError(
            f"{path}: the first line must name each of {', '.join(wanted)} once, separated by "
            f"tabs; {missing[0]} is not there once in {line[:80]!r}"
        )
    return tuple(field.partition(":")[0] for field in fields)


def _numbered(names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Number names in the order of their first appearance: the names, and the number of each."""
    numbers: dict[str, int] = {}
    found = np.array([numbers.setdefault(name, len(numbers)) for name in names])
    return list(numbers), found


def _repeated(user_of: np.ndarray, item_of: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Return which rows repeat an earlier one in user, item and time."""
    order = np.lexsort((np.arange(len(times)), item_of, times, user_of))
    keys = np.stack([user_of, item_of, times])[:, order]
    repeated = np.zeros(len(times), bool)
    repeated[order[1:]] = (keys[:, 1:] == keys[:, :-1]).all(0)
    return repeated


def _interactions(
    name: str,
    items: np.ndarray,
    lengths: Sequence[int] | np.ndarray,
    user_ids: Sequence[str],
    item_ids: Sequence[str],
    clusters: np.ndarray | None = None,
) -> Interactions:
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    digest = hashlib.sha256(items.astype("<i4").tobytes() + starts.astype("<i8").tobytes())
    for text in (*user_ids, *item_ids):
        digest.update(text.encode() + b"\0")
    return Interactions(
        name, items, starts, tuple(user_ids), tuple(item_ids), digest.hexdigest(), clusters
    )


def _uniforms(seed: int, stream: int, count: int) -> np.ndarray:
    """Return numbers in (0, 1), the same in every version of NumPy: raw bits of Philox are."""
    bits = np.random.Philox(key=np.array([seed, stream], np.uint64)).random_raw(count)
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _between(draw: float, limits: tuple[int, int]) -> int:
    """Return a whole number between the limits, inclusive, for a number in (0, 1)."""
    least, most = limits
    return least + int(draw * (most - least + 1))
