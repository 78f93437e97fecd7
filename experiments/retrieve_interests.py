"""Serve a run of train_interests: export its network, index the items, and answer a query.

Users' interests come from a `jax.export` file with a batch of any size, for CPU, CUDA and TPU,
that needs none of the network's code; items from an HNSW graph of faiss
(https://github.com/facebookresearch/faiss), which is compared with exact search.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from experiments import cli, files
from experiments.analysis import ranking
from experiments.cli import flag
from experiments.data.interactions import Interactions
from experiments.errors import InputError
from experiments.training import interests
from experiments.training.interests import Params, Task

PLATFORMS = ("cpu", "cuda", "tpu")
NETWORK, ITEMS, NAMES = "interests.jax_export", "items.npy", "items.json"
SIZES = (20, 50)


@dataclasses.dataclass(frozen=True)
class Config:
    """The run, the index and the query."""

    workdir: str = flag("runs/interests", "Folder of a train_interests run.")
    data_dir: str = flag("", "Folder of the data; empty: the run's --data_dir.")
    output: str = flag("", "Folder for what a server loads; empty: export/ in --workdir.")
    user: str = flag(
        "", "Id of the user to recommend to; empty: the first one of the test, unless --history."
    )
    history: str = flag(
        "", "Ids of the items of a history to recommend for, oldest first, separated by commas."
    )
    num_results: int = flag(10, "Items to recommend.", minimum=1, maximum=1000)
    links: int = flag(32, "Links of an item in a layer of the HNSW graph.", minimum=2, maximum=256)
    effort: int = flag(
        128,
        "Candidates that a search keeps (efSearch); more: slower and more exact.",
        minimum=1,
        maximum=2**20,
    )


def main(config: Config) -> int:
    """Export the run, load the export as a server would, and print recall and one answer."""
    task, params = interests.load(config.workdir, data_dir=config.data_dir)
    output = pathlib.Path(config.output or pathlib.Path(config.workdir) / "export")
    export(task, params, output)
    server = Server(output, task.config.history_length, links=config.links, effort=config.effort)
    for line in comparison_lines(task, params, server):
        print(line)
    history = chosen_history(config, task)
    found, scores, sources = server.recommend(
        [history], k=config.num_results, exclude=task.config.exclude_history
    )[0]
    newest = ", ".join(server.names[item] for item in history[-10:])
    print(f"the history's newest items: {newest}")
    rows = [["rank", "item", "score", "interest"]]
    for rank, (item, score, source) in enumerate(zip(found, scores, sources, strict=True), 1):
        rows.append([str(rank), server.names[item], f"{score:.3f}", str(source + 1)])
    for line in cli.table(rows):
        print(line)
    return 0


def export(task: Task, params: Params, output: pathlib.Path) -> None:
    """Write the network without its code, the vectors of the items, and their ids."""
    length = task.config.history_length
    shapes = jax.export.symbolic_args_specs(
        (jnp.zeros((1, length), jnp.int32), jnp.zeros((1, length), bool)), f"b, {length}"
    )
    network = jax.jit(lambda items, mask: task.model(params)(items, mask))
    exported = jax.export.export(network, platforms=PLATFORMS)(*shapes)
    files.write_bytes(output / NETWORK, bytes(exported.serialize()))
    with files.writing(output / ITEMS):
        np.save(output / ITEMS, np.asarray(params["items"]))
    files.write_json(output / NAMES, task.data.item_ids)
    size = (output / NETWORK).stat().st_size
    logging.info("%s: %.1f MiB for %s", output / NETWORK, size / 2**20, ", ".join(PLATFORMS))


class Server:
    """Answers queries from the files of `export` alone.

    Args:
      folder: Where they are.
      history_length: I, the slots that the network reads.
      links: Of an item in a layer of the graph.
      effort: Candidates that a search keeps.

    Attributes:
      names: The ids of the items.
    """

    def __init__(self, folder: pathlib.Path, history_length: int, *, links: int, effort: int):
        self._length = history_length
        exported = jax.export.deserialize(bytearray((folder / NETWORK).read_bytes()))
        self._network = jax.jit(exported.call)
        self.names: list[str] = json.loads((folder / NAMES).read_text())
        self._vectors = np.load(folder / ITEMS, allow_pickle=False)
        self._index = _index(self._vectors, links, effort)

    def interests(self, histories: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return interests `[B, J, D]` of histories of any length, and which are there, `[B, J]`.

        The newest item is in the last slot, as in training.
        """
        items = np.zeros((len(histories), self._length), np.int32)
        mask = np.zeros(items.shape, bool)
        for row, history in enumerate(histories):
            newest = history[-self._length :]
            items[row, self._length - len(newest) :] = newest
            mask[row, self._length - len(newest) :] = True
        found, valid = self._network(items, mask)
        return np.asarray(found), np.asarray(valid)

    def recommend(
        self, histories: Sequence[np.ndarray], *, k: int, exclude: bool
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Find the k best items of each history in the index.

        Each interest finds its nearest items; an item that several find counts with its highest
        score. If `exclude`, no item of the history is recommended: as many more are searched for.

        Returns:
          Items, scores and the interest that found the item, for each history.
        """
        vectors, valid = self.interests(histories)
        wanted = k + (max(map(len, histories)) if exclude else 0)
        wanted = min(wanted, len(self._vectors))
        size = vectors.shape[-1]
        queries = np.ascontiguousarray(vectors.reshape(-1, size), np.float32)
        scores, items = self._index.search(queries, wanted)
        answers = []
        rows = zip(
            histories,
            scores.reshape(*valid.shape, wanted),
            items.reshape(*valid.shape, wanted),
            valid,
            strict=True,
        )
        for history, row_scores, row_items, kept in rows:
            source = np.repeat(np.flatnonzero(kept), wanted)
            found, score = row_items[kept].ravel(), row_scores[kept].ravel()
            usable = found >= 0
            if exclude:
                usable &= ~np.isin(found, history)
            found, score, source = found[usable], score[usable], source[usable]
            order = np.argsort(-score, kind="stable")
            # The first place of each item in the order of the scores.
            first = np.sort(np.unique(found[order], return_index=True)[1])[:k]
            best = order[first]
            answers.append((found[best], score[best], source[best]))
        return answers


def comparison_lines(task: Task, params: Params, server: Server) -> list[str]:
    """Compare the server's answers for all test users with exact search by the run itself."""
    data, held, config = task.data, task.split.test, task.config
    bounds = list(zip(data.starts[held.users], held.ends, held.target_ends, strict=True))
    histories = [data.items[start:end] for start, end, _ in bounds]
    targets = [data.items[end:target_end] for _, end, target_end in bounds]
    exact, _ = ranking.exact_search(
        *task.vectors(params, held),
        np.asarray(params["items"]),
        k=max(SIZES),
        excluded=histories if config.exclude_history else None,
    )
    server.recommend(histories, k=max(SIZES), exclude=config.exclude_history)  # compiles
    started = time.perf_counter()
    answers = server.recommend(histories, k=max(SIZES), exclude=config.exclude_history)
    seconds = time.perf_counter() - started
    approximate = np.full_like(exact, ranking.NOTHING)
    for row, (items, _, _) in zip(approximate, answers, strict=True):
        row[: len(items)] = items[: len(row)]
    rows = [["", *(f"@{k}" for k in SIZES)]]
    for name, ranked in (("exact search", exact), ("index", approximate)):
        found = ranking.ranking_metrics(ranked, targets, sizes=SIZES)
        cells = [f"{100 * found[f'recall_{k}']:.2f} %" for k in SIZES]
        rows.append([f"recall of the test's items, {name}", *cells])
    shares = [
        np.mean([_share(a[:k], b[:k]) for a, b in zip(approximate, exact, strict=True)])
        for k in SIZES
    ]
    rows.append(
        ["exact search's items that the index finds", *(f"{100 * x:.2f} %" for x in shares)]
    )
    return [*cli.table(rows), f"{len(histories) / seconds:.0f} users/s by the index, in one batch"]


def chosen_history(config: Config, task: Task) -> np.ndarray:
    """Return the items, oldest first, for which the query asks.

    Raises:
      InputError: The user or an item is unknown, or both are given.
    """
    data: Interactions = task.data
    if config.user and config.history:
        raise InputError("--user and --history must not be given together")
    if config.history:
        names = config.history.split(",")
        return np.array([_number(data.item_ids, "--history", name) for name in names], np.int32)
    if config.user:
        user = _number(data.user_ids, "--user", config.user)
    else:
        user = int(task.split.test.users[0])
    return data.items[data.starts[user] : data.starts[user + 1]]


def _number(names: Sequence[str], setting: str, name: str) -> int:
    try:
        return names.index(name)
    except ValueError:
        raise InputError(
            f"{setting} must name what is in the data, such as {names[0]!r}, got {name!r}"
        ) from None


def _share(found: np.ndarray, wanted: np.ndarray) -> float:
    wanted = wanted[wanted != ranking.NOTHING]
    return float(np.isin(wanted, found).mean()) if len(wanted) else 1.0


def _index(vectors: np.ndarray, links: int, effort: int) -> Any:
    """Build an HNSW graph for the largest inner products.

    Raises:
      InputError: faiss is missing.
    """
    try:
        import faiss
    except ImportError as error:
        raise InputError(
            f"retrieve_interests needs faiss, which cannot be imported ({error}): "
            "pip install 'capsjax[retrieval]'"
        ) from error
    index = faiss.IndexHNSWFlat(vectors.shape[1], links, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efSearch = effort
    index.add(np.ascontiguousarray(vectors, np.float32))
    return index


if __name__ == "__main__":
    cli.run(Config, main)
