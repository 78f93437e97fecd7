"""Train a network that gives a user several interests, and measure what these retrieve.

MIND, ComiRec and EasyRec by `capsjax.multi_interests` and `capsjax.self_attentive_interests`, and
baselines of one vector a user, on generated users or on MovieLens's ratings.
"""

import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from absl import logging

from experiments import cli, files
from experiments.analysis import ranking
from experiments.data.interactions import HeldOut
from experiments.errors import InputError
from experiments.figures import interests as figures
from experiments.training import interest_networks, interests, records
from experiments.training.interests import Config, Metrics, Params, Task

SIZES = (20, 50)  # k of recall, NDCG and hit rate
SHOWN_SLOTS = 24  # newest items in the figure of one user


def main(config: Config) -> int:
    """Train from the workdir's newest checkpoint, test the best parameters, and draw figures."""
    data = interests.load_data(config)
    task = interests.build(config, data)
    logging.info(
        "%d users, %d items, %d interactions; %d positions to train on, %d users to test",
        *(data.num_users, data.num_items, len(data.items)),
        *(len(task.split.train), len(task.split.test.users)),
    )
    status, state = interests.train(task, evaluate)
    if status:
        return status
    step, params = interests.selected(state)
    results = {"step": step, **evaluate(task, params, task.split.test)}
    folder = pathlib.Path(config.workdir)
    if config.network in interest_networks.SEVERAL:
        couplings, items, mask = couplings_of(task, params, task.split.test)
        if data.clusters is not None:
            results |= ranking.recovery(couplings, mask, data.clusters[items])
        files.save_figure(
            user_figure(task, params, couplings, items, mask), folder / "figures/interests.png"
        )
    files.write_json(folder / "results.json", results)
    if task.epoch_steps:
        rows = records.read_metrics(folder)
        files.save_figure(figures.learning_curves(rows), folder / "figures/learning_curves.png")
    for line in result_lines(results):
        print(line)
    return 0


def evaluate(task: Task, params: Params, held: HeldOut) -> Metrics:
    """Measure recall, NDCG, hit rate and diversity by exact search in the whole catalogue.

    With --exclude_history, items of the history cannot be found, and are no targets: a user whose
    targets all are in the history is left out.

    Raises:
      InputError: All users are left out.
    """
    data, catalogue = task.data, np.asarray(params["items"])
    ends = zip(data.starts[held.users], held.ends, held.target_ends, strict=True)
    histories, targets = [], []
    for start, end, target_end in ends:
        histories.append(data.items[start:end])
        found = np.unique(data.items[end:target_end])
        targets.append(np.setdiff1d(found, histories[-1]) if task.config.exclude_history else found)
    vectors, valid = task.vectors(params, held)
    ranked, _ = ranking.exact_search(
        vectors,
        valid,
        catalogue,
        k=max(SIZES),
        excluded=histories if task.config.exclude_history else None,
    )
    ranked = np.pad(
        ranked, ((0, 0), (0, max(SIZES) - ranked.shape[1])), constant_values=ranking.NOTHING
    )
    kept = [row for row, wanted in enumerate(targets) if len(wanted)]
    if not kept:
        raise InputError(
            "--exclude_history leaves nothing to find: all items to be found are in the histories"
        )
    metrics = ranking.ranking_metrics(ranked[kept], [targets[row] for row in kept], sizes=SIZES)
    if task.config.network in interest_networks.SEVERAL:
        metrics |= ranking.interest_diversity(vectors, valid, catalogue)
    if data.clusters is not None:
        metrics["list_diversity_20"] = ranking.list_diversity(ranked, data.clusters, k=20)
    return metrics


def couplings_of(
    task: Task, params: Params, held: HeldOut
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return couplings `[B, I, J]`, items and mask `[B, I]` of users."""
    items, mask = task.data.histories(held.ends, task.config.history_length)
    found = jax.jit(lambda params, *batch: task.model(params).couplings(*batch))
    return np.asarray(found(params, items, mask)), items, mask


def user_figure(
    task: Task, params: Params, couplings: np.ndarray, items: np.ndarray, mask: np.ndarray
) -> figures.Figure:
    """Draw the couplings of the test user whose items are spread most evenly over interests."""
    vectors, valid = task.vectors(params, task.split.test)
    sums = np.where(mask[..., None], couplings, 0).sum(1)
    shares = sums / np.maximum(sums.sum(1, keepdims=True), 1e-9)
    entropy = -np.sum(shares * np.log(np.maximum(shares, 1e-9)), 1)
    user = int(np.argmax(entropy * (mask.sum(1) >= min(SHOWN_SLOTS, mask.shape[1]) // 2)))
    shown = np.flatnonzero(mask[user])[-SHOWN_SLOTS:]
    catalogue, names = np.asarray(params["items"]), task.data.item_ids
    nearest = [
        [names[item] for item in np.argsort(-(catalogue @ vector), kind="stable")[:3]]
        for vector in vectors[user]
    ]
    clusters = task.data.clusters
    return figures.user_interests(
        couplings[user, shown].T[valid[user]],
        [names[item] for item in items[user, shown]],
        [found for found, kept in zip(nearest, valid[user], strict=True) if kept],
        title=f"User {task.data.user_ids[task.split.test.users[user]]}",
        groups=None if clusters is None else clusters[items[user, shown]],
        over_items=task.config.network == "comirec_sa",
    )


def result_lines(results: Metrics) -> Iterator[str]:
    """Yield the test's metrics as lines of text."""
    rows = [["test", *(f"@{k}" for k in SIZES)]]
    for name in ("recall", "ndcg", "hit_rate"):
        rows.append([name, *(f"{100 * results[f'{name}_{k}']:.2f} %" for k in SIZES)])
    yield from cli.table(rows)
    ranked = {f"{name}_{k}" for name in ("recall", "ndcg", "hit_rate") for k in SIZES}
    for name, value in results.items():
        if name not in ranked:
            yield f"{name.replace('_', ' ')} {value:.4g}"


if __name__ == "__main__":
    cli.run(Config, main)
