"""Training of networks that turn a user's history into interests: settings, step, loop and restore.

Not `loop.Trainer` and `runs.train`, which are made for images and labels: here an example is a
position in a sequence, the catalogue is evaluated at once, and the best parameters by validation
belong to the state. Checkpoints, metrics and signals are the same. Shape letters are those of
`experiments.training.interest_networks`.
"""

import contextlib
import dataclasses
import math
import pathlib
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import nnx
from jax import Array

from experiments.cli import flag
from experiments.data import datasets, interactions
from experiments.data.interactions import HeldOut, Interactions, Split
from experiments.errors import InputError
from experiments.training import interest_networks, loop, records, signals, trained
from experiments.training.checkpoints import Checkpoints, begin_training, check_metrics

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config(interest_networks.Settings):
    """Settings of train_interests; the defaults are MIND on generated users."""

    dataset: str = flag(
        "synthetic",
        "synthetic: generated users; interactions: u.data or NAME.inter in --data_dir.",
        choices=("synthetic", "interactions"),
    )
    data_dir: str = flag("", "Folder with u.data or one NAME.inter.", affects_result=False)
    min_interactions: int = flag(
        0,
        "Remove users and items with fewer interactions, until all have as many.",
        minimum=0,
        maximum=2**31 - 1,
    )
    synthetic_users: int = flag(1000, "Generated users.", minimum=10, maximum=10_000_000)
    synthetic_items: int = flag(500, "Generated items.", minimum=60, maximum=100_000)
    synthetic_clusters: int = flag(
        20, "Clusters of generated items; a user has 2 to 4 of them.", minimum=4, maximum=1000
    )
    protocol: str = flag(
        "next_item",
        "next_item: each user's last item is the test, the one before it the validation; "
        "last_fifth: the last 20 % of the items of users who are not trained on.",
        choices=interactions.PROTOCOLS,
    )
    exclude_history: bool = flag(
        True,
        "Recommend nothing that is in the user's history: a film is rated once. Off where people "
        "buy or hear the same again.",
    )
    workdir: str = flag(
        "runs/interests",
        "Folder for checkpoints, metrics and figures; a run found there goes on.",
        affects_result=False,
    )
    loss: str = flag(
        "sampled_softmax",
        "Softmax over the target and negatives, or over the whole catalogue.",
        choices=("sampled_softmax", "softmax"),
    )
    negatives: str = flag(
        "uniform",
        "Distribution of the negatives over the items by falling popularity; scores are corrected "
        "by its logarithm.",
        choices=("uniform", "log_uniform"),
    )
    num_negatives: int = flag(
        200,
        "Negatives of a step, common to its examples, of a sampled softmax.",
        minimum=1,
        maximum=10_000_000,
    )
    batch_size: int = flag(128, "Examples in one step.", minimum=1, maximum=2**31 - 1)
    num_epochs: int = flag(30, "Passes over the training positions.", minimum=1, maximum=10**9)
    patience: int = flag(
        5,
        "Stop after so many epochs without a better validation; 0: never.",
        minimum=0,
        maximum=10**9,
    )
    max_steps: int = flag(
        0,
        "Stop after this step; 0: after num_epochs.",
        minimum=0,
        maximum=2**31 - 1,
        affects_result=False,
    )
    learning_rate: float = flag(1e-3, "Learning rate of Adam.", above=0, maximum=1e6)
    item_dropout: float = flag(
        0.0,
        "Fraction of a history's items, but for the newest, that training hides at random.",
        minimum=0,
        maximum=0.9,
    )
    weight_decay: float = flag(
        0.0, "Decoupled weight decay of Adam, all parameters.", minimum=0, maximum=1e6
    )
    seed: int = flag(
        0, "Seed of parameters, order of examples and negatives.", minimum=0, maximum=2**32 - 1
    )
    log_every_steps: int = flag(100, "Steps between rows of metrics.", minimum=1, maximum=2**31 - 1)
    checkpoint_every_steps: int = flag(
        500, "Steps between checkpoints.", minimum=1, maximum=2**31 - 1, affects_result=False
    )
    tensorboard: bool = flag(
        False, "Write the metrics as TensorBoard files too.", affects_result=False
    )


class Window(NamedTuple):
    """Sums over the steps since the last row of metrics."""

    steps: Array  # int32
    loss: Array  # float32, sum of batch means
    bad_step: Array  # int32, the first step whose loss or gradient was not finite, or -1


class Best(NamedTuple):
    """The parameters with the highest validation so far."""

    params: Params
    score: Array  # float32, `SELECT_BY`; -1 before the first
    step: Array  # int32


class State(NamedTuple):
    """Everything that a step or an evaluation changes, and that a checkpoint saves."""

    params: Params
    optimizer: optax.OptState
    step: Array  # int32, steps done
    window: Window
    best: Best


Metrics = dict[str, float]
SELECT_BY = "recall_50"  # of the validation; ComiRec's too


class Task(NamedTuple):
    """The data of a run, and the compiled functions of its network."""

    config: Config
    data: Interactions
    split: Split
    graph: Any  # of the network, for nnx.merge
    initial_state: Callable[[], State]
    step: Any  # compiled; from state, items, mask and targets; donates the state
    interests: Callable[..., tuple[Array, Array]]  # from parameters, items and mask

    @property
    def epoch_steps(self) -> int:
        """Return the steps of a pass over the training positions; 0 if nothing is trained."""
        if self.config.network == "popularity":
            return 0
        return len(self.split.train) // self.config.batch_size

    def model(self, params: Params) -> Any:
        """Return the network with these parameters."""
        return nnx.merge(self.graph, params)

    def vectors(self, params: Params, held: HeldOut) -> tuple[np.ndarray, np.ndarray]:
        """Return the interests of users, `[B, J, D]`, and which of them they have, `[B, J]`."""
        found, size = [], self.config.batch_size
        for start in range(0, len(held.ends), size):
            # One compiled size: the last batch is filled up, and the filling is cut off.
            ends = held.ends[start : start + size]
            filled = np.append(ends, np.full(size - len(ends), held.ends[0]))
            batch = self.data.histories(filled, self.config.history_length)
            found.append([np.asarray(x)[: len(ends)] for x in self.interests(params, *batch)])
        interests, valid = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return interests, valid


def load_data(config: Config) -> Interactions:
    """Load or generate the data of a run.

    Raises:
      InputError: They are missing or damaged, or flags contradict each other.
    """
    if config.dataset == "interactions":
        return interactions.load(
            config.dataset, data_dir=config.data_dir, min_interactions=config.min_interactions
        )
    for name in ("data_dir", "min_interactions"):
        if getattr(config, name):
            raise InputError(f"--{name} needs --dataset=interactions")
    return interactions.synthetic(
        num_users=config.synthetic_users,
        num_items=config.synthetic_items,
        num_clusters=config.synthetic_clusters,
    )


def build(config: Config, data: Interactions) -> Task:
    """Build network, objective and optimizer of a Config for some data.

    Raises:
      InputError: The data are too few, or the batch is larger than they are.
    """
    split = interactions.split(data, config.protocol)
    if config.batch_size > len(split.train):
        raise InputError(
            f"--batch_size must be at most the {len(split.train)} training positions of "
            f"{data.name}, got {config.batch_size}"
        )
    counts = np.bincount(data.items[split.seen], minlength=data.num_items)

    def network() -> nnx.Module:
        return interest_networks.build(config, counts, seed=config.seed)

    graph, _ = nnx.split(nnx.eval_shape(network))
    optimizer = optax.adamw(config.learning_rate, weight_decay=config.weight_decay)
    loss = _loss(config, counts)

    def initial_state() -> State:
        params = nnx.to_pure_dict(nnx.state(network()))
        start = jnp.zeros((), jnp.int32)
        best = Best(jax.tree.map(jnp.copy, params), jnp.full((), -1, jnp.float32), start)
        return State(params, optimizer.init(params), start, empty_window(), best)

    def step(state: State, items: Array, mask: Array, targets: Array) -> State:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)

        def mean_loss(params: Params) -> Array:
            return loss(nnx.merge(graph, params), items, mask, targets, key)

        value, gradients = jax.value_and_grad(mean_loss)(state.params)
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        finite = jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(gradients))
        seen, done = state.window, state.step + 1
        bad_step = jnp.where(finite | (seen.bad_step >= 0), seen.bad_step, done)
        return State(
            optax.apply_updates(state.params, updates),
            moments,
            done,
            Window(seen.steps + 1, seen.loss + value, bad_step),
            state.best,
        )

    return Task(
        config,
        data,
        split,
        graph,
        jax.jit(initial_state),
        jax.jit(step, donate_argnums=0),
        jax.jit(lambda params, *batch: nnx.merge(graph, params)(*batch)),
    )


def train(task: Task, evaluate: Callable[[Task, Params, HeldOut], Metrics]) -> tuple[int, State]:
    """Train from the workdir's newest checkpoint, or from the start, to the last step.

    Args:
      task: From `build`.
      evaluate: Measures parameters on held-out users; called after every epoch.

    Returns:
      The exit status (128 + the signal's number if the run was stopped), and the state.

    Raises:
      InputError: The workdir holds another run, has lost its checkpoints or cannot be written, or
        the loss is not finite.
    """
    config, epoch = task.config, task.epoch_steps
    workdir = pathlib.Path(config.workdir)
    last_step = config.num_epochs * epoch
    if config.max_steps:
        last_step = min(last_step, config.max_steps)
    if epoch:
        state = jax.eval_shape(task.initial_state)
        loop.check_memory(state)
        targets = task.split.train[: config.batch_size]
        batch = task.data.histories(targets, config.history_length)
        compiled = task.step.lower(state, *batch, task.data.items[targets]).compile()
        loop.check_program_memory(compiled, "a training step")
    with contextlib.ExitStack() as stack:
        records.open_workdir(workdir, config=config, data_sha256=task.data.sha256)
        stack.enter_context(records.exclusive(workdir))
        begin_training(workdir)
        checkpoints = stack.enter_context(Checkpoints(workdir))
        stopped = stack.enter_context(signals.stop_requests())
        state = task.initial_state()
        step, state = checkpoints.restore(state) or (0, state)
        if step > last_step:
            raise InputError(
                f"workdir {workdir} is at step {step} already, past --max_steps={last_step}"
            )
        if step:
            logging.info("going on from step %d of %d in %s", step, last_step, workdir)
        check_metrics(workdir, step)
        metrics = stack.enter_context(
            records.Metrics(workdir, step=step, tensorboard=config.tensorboard)
        )
        order = None
        if epoch:
            order = datasets.batches(
                len(task.split.train),
                batch_size=config.batch_size,
                seed=config.seed,
                first_step=step,
            )
        started, started_at = time.perf_counter(), step
        while order and step < last_step and not stopped() and not _is_over(config, state, epoch):
            targets = task.split.train[next(order)]
            batch = task.data.histories(targets, config.history_length)
            state = task.step(state, *batch, task.data.items[targets])
            step += 1
            epoch_ends = step % epoch == 0 or step == last_step
            if epoch_ends or step % config.log_every_steps == 0:
                row: dict[str, float | int] = {"step": step, "epoch": step / epoch}
                row["train_loss"] = _mean_loss(state.window)
                row["steps_per_second"] = (step - started_at) / (time.perf_counter() - started)
                state = state._replace(window=empty_window())
                if epoch_ends:
                    found = evaluate(task, state.params, task.split.validation)
                    row |= {f"validation_{name}": value for name, value in found.items()}
                    # Not where --max_steps ends: a run that goes on must not depend on that.
                    if step % epoch == 0 and found[SELECT_BY] > float(state.best.score):
                        best = Best(state.params, jnp.float32(found[SELECT_BY]), state.step)
                        # The next step donates the state: what is kept must not share its buffers.
                        state = state._replace(best=jax.tree.map(jnp.copy, best))
                metrics.write(row)
                _log(row)
                started, started_at = time.perf_counter(), step
            if step % config.checkpoint_every_steps == 0:
                _mean_loss(state.window)
                checkpoints.save(step, state)
        _mean_loss(state.window)
        checkpoints.save(step, state)
        if number := stopped():
            name = signal.Signals(number).name
            logging.info("%s: saved at step %d; the same --workdir goes on from there", name, step)
            return 128 + number, state
    return 0, state


def load(workdir: str, *, data_dir: str = "") -> tuple[Task, Params]:
    """Restore the best parameters of a run, or the newest if none were evaluated yet.

    Args:
      workdir: The folder of the run; nothing is written to it.
      data_dir: Folder of the data; empty: that of the run.

    Raises:
      InputError: The folder holds no such run or no checkpoint, or the data found are not those of
        the run.
    """
    run = records.read_config(workdir)
    config = trained.config_of(Config, run["config"], workdir)
    if data_dir:
        config = dataclasses.replace(config, data_dir=data_dir)
    data = load_data(config)
    if data.sha256 != run["data_sha256"]:
        raise InputError(
            f"workdir {workdir} was trained on data with sha256 {run['data_sha256']}, but those "
            f"found have {data.sha256}; name the folder of the run's data with --data_dir"
        )
    task = build(config, data)
    with Checkpoints(workdir) as checkpoints:
        found = checkpoints.restore(task.initial_state())
    if found is None:
        raise InputError(f"workdir {workdir} has no checkpoint yet; let it train further")
    return task, selected(found[1])[1]


def selected(state: State) -> tuple[int, Params]:
    """Return step and parameters of the best evaluation, or the newest if there was none.

    There is none of popularity, which is not trained.
    """
    if float(state.best.score) < 0:
        return int(state.step), state.params
    return int(state.best.step), state.best.params


def empty_window() -> Window:
    """Return the sums before the first step."""
    return Window(jnp.zeros((), jnp.int32), jnp.zeros(()), jnp.full((), -1, jnp.int32))


def _is_over(config: Config, state: State, epoch: int) -> bool:
    """Return whether validation has not become better for `patience` epochs."""
    since = int(state.step) - int(state.best.step)
    return 0 < config.patience * epoch <= since


def _mean_loss(window: Window) -> float:
    """Return the mean loss of a window; raise InputError if one was not finite."""
    if (bad_step := int(window.bad_step)) >= 0:
        raise InputError(
            f"the loss or its gradient is not finite at step {bad_step}; try a lower "
            "--learning_rate"
        )
    return float(window.loss) / max(1, int(window.steps))


def _log(row: dict[str, float | int]) -> None:
    text = f"loss {row['train_loss']:.4f}  {row['steps_per_second']:.1f} steps/s"
    if (name := f"validation_{SELECT_BY}") in row:
        text += f"  validation recall@50 {100 * row[name]:.2f} %"
    logging.info("epoch %.2f  step %d  %s", row["epoch"], row["step"], text)


def _loss(config: Config, counts: np.ndarray) -> Callable[..., Array]:
    """Return the loss of a network, items, mask, targets and a key: the mean over the batch."""
    by_popularity = np.argsort(-counts, kind="stable").astype(np.int32)
    ranks = np.empty_like(by_popularity)
    ranks[by_popularity] = np.arange(len(counts))
    size = len(counts)

    def log_expected(rank: Array) -> Array:
        """Return the logarithm of how often an item is expected among the negatives."""
        if config.negatives == "uniform":
            share = jnp.full(rank.shape, 1 / size)
        else:
            share = jnp.log1p(1 / (rank + 1)) / math.log(size + 1)
        return jnp.log(config.num_negatives * share)

    def loss(model: Any, items: Array, mask: Array, targets: Array, key: Array) -> Array:
        catalogue = model.items[...]
        wanted = catalogue[targets]
        if config.item_dropout:
            hidden_key = jax.random.fold_in(key, 1)
            hidden = jax.random.bernoulli(hidden_key, config.item_dropout, mask.shape)
            mask &= ~hidden.at[:, -1].set(False)
        users, kept = model.for_target(items, mask, wanted)

        def scores_of(vectors: Array) -> Array:
            products = jnp.einsum("bjd,cd->bjc", users, vectors)
            return jnp.where(kept[..., None], products, -jnp.inf).max(1)

        if config.loss == "softmax":
            scores = scores_of(catalogue)
            losses = optax.softmax_cross_entropy_with_integer_labels(scores, targets)
            return losses.mean()
        draws = jax.random.uniform(key, (config.num_negatives,))
        if config.negatives == "uniform":
            rank = (draws * size).astype(jnp.int32)
        else:
            # The inverse of the distribution function log(rank + 1) / log(V + 1), ranks from 1.
            rank = jnp.expm1(draws * math.log(size + 1)).astype(jnp.int32)
        rank = jnp.minimum(rank, size - 1)
        negatives = jnp.asarray(by_popularity)[rank]
        scores = scores_of(catalogue[negatives]) - log_expected(rank)[None]
        # A negative that is the target would be pushed away.
        scores = jnp.where(negatives[None] == targets[:, None], -jnp.inf, scores)
        products = jnp.where(kept, jnp.einsum("bjd,bd->bj", users, wanted), -jnp.inf)
        target = products.max(1) - log_expected(jnp.asarray(ranks)[targets])
        return jnp.mean(jax.nn.logsumexp(jnp.column_stack([target, scores]), axis=1) - target)

    return loss
