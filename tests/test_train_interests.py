"""Training of multi-interest networks, its interruptions, and retrieval from an export."""

import dataclasses
import json
import math
import os
import pathlib
import signal
import subprocess
import sys

import faiss
import in_process
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import retrieve_interests, train_interests
from experiments.errors import InputError
from experiments.training import interest_networks, interests, records
from experiments.training.checkpoints import Checkpoints, saved_steps

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROOT = pathlib.Path(__file__).parents[1]
TINY = interests.Config(
    workdir="run",
    synthetic_users=20,
    synthetic_items=60,
    synthetic_clusters=4,
    history_length=6,
    embedding_size=4,
    max_interests=3,
    interest_count="deepmatch",
    num_iterations=2,
    num_negatives=10,
    batch_size=64,
    num_epochs=4,
    learning_rate=0.02,
    log_every_steps=2,
    checkpoint_every_steps=3,
)
EPOCH = 4  # steps
LAST_STEP = 16


@pytest.fixture(scope="module", autouse=True)
def _without_figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_interests.files, "save_figure", lambda *_: None)
        for name in ("learning_curves", "user_interests"):
            patch.setattr(train_interests.figures, name, lambda *_, **__: None)
        yield


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains in a folder of the test's own; gives the folder."""
    monkeypatch.chdir(tmp_path)

    def train(*, status=0, **changes):
        config = dataclasses.replace(TINY, **changes)
        assert train_interests.main(config) == status
        return tmp_path / config.workdir

    return train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that nothing disturbed; only read."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert train_interests.main(dataclasses.replace(TINY, workdir=str(workdir))) == 0
    return workdir


@pytest.fixture(scope="module")
def wanted(finished):
    return contents(finished)


def contents(workdir):
    """Step, arrays, rows and results of a run."""
    task, _ = interests.load(str(workdir))
    with Checkpoints(workdir) as checkpoints:
        step, state = checkpoints.restore(task.initial_state())
    arrays = {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree.leaves_with_path(state)
    }
    rows = [row | {"steps_per_second": 0} for row in records.read_metrics(workdir)]
    return step, arrays, rows, json.loads((workdir / "results.json").read_text())


def test_a_run_writes_metrics_of_training_validation_and_test(wanted):
    step, _, rows, results = wanted
    assert step == LAST_STEP
    assert [row["step"] for row in rows] == list(range(2, LAST_STEP + 1, 2))
    measured = [row for row in rows if "validation_recall_50" in row]
    assert [row["epoch"] for row in measured] == [1, 2, 3, 4]
    best = max(measured, key=lambda row: row["validation_recall_50"])
    assert results["step"] == best["step"]
    names = {f"{name}_{k}" for name in ("recall", "ndcg", "hit_rate") for k in (20, 50)}
    names |= {"step", "interests", "interest_cosine", "distinct_nearest", "list_diversity_20"}
    names |= {"purity", "purity_of_one_interest", "adjusted_rand", "clusters_found"}
    assert results.keys() == names | {"interests_with_items", "true_interests"}
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


@pytest.mark.parametrize("network", interest_networks.NETWORKS)
def test_every_network_trains_with_every_setting_and_masks_what_a_user_lacks(train, network):
    settings = {"network": network, "num_epochs": 1, "protocol": "last_fifth", "item_dropout": 0.2}
    settings |= {"loss": "softmax", "readout": "soft", "label_power": 2.0, "hidden_layers": 1}
    workdir = train(**settings, exclude_history=False)
    task, params = interests.load(str(workdir))
    items, mask = task.data.histories(task.data.starts[:3] + np.array([1, 3, 9]), 6)
    vectors, valid = task.interests(params, items, mask)
    # floor(log2(L + 1)) of 1, 3 and the 6 slots, or one vector a user.
    several = network in interest_networks.SEVERAL
    assert valid.sum(1).tolist() == ([1, 2, 2] if several else [1, 1, 1])
    if network not in ("mind", "easyrec"):  # which have layers behind the interests
        assert not np.any(vectors[~valid])
    # What is in empty slots does not matter.
    other, _ = task.interests(params, np.where(mask, items, 7), mask)
    np.testing.assert_array_equal(vectors, other)
    if several:
        found = jax.jit(lambda params, *batch: task.model(params).couplings(*batch))
        couplings = np.asarray(found(params, items, mask))
        assert couplings.shape == (3, 6, 3)
        axis = 1 if network == "comirec_sa" else 2
        sums = np.where(mask[..., None], couplings, 0).sum(axis)
        wanted = valid if axis == 1 else mask
        np.testing.assert_allclose(sums, wanted, atol=1e-6)
        assert not np.any(couplings.swapaxes(1, 2)[~valid])


def test_popularity_is_not_trained_and_recommends_what_is_common(train):
    workdir = train(network="popularity")
    assert contents(workdir)[2] == []
    task, params = interests.load(str(workdir))
    counts = np.bincount(task.data.items[task.split.seen], minlength=60)
    assert params["items"][:, 0].tolist() == counts.tolist()


def test_a_seed_gives_the_same_bits_and_another_one_others(train, wanted):
    assert contents(train()) == wanted
    train(seed=1, num_epochs=1, workdir="other")
    row = records.read_metrics("other")[0]
    assert row["train_loss"] != wanted[2][0]["train_loss"]


@pytest.mark.parametrize(("number", "last"), [(signal.SIGINT, 5), (signal.SIGTERM, LAST_STEP)])
def test_a_signal_saves_and_the_run_goes_on(train, wanted, monkeypatch, caplog, number, last):
    def interrupted(row):
        if row["step"] >= last:
            signal.raise_signal(number)

    handler = signal.getsignal(number)
    caplog.set_level("INFO", logger="absl")
    with monkeypatch.context() as patch:
        patch.setattr(interests, "_log", interrupted)
        workdir = train(status=128 + number)
    step = saved_steps(workdir)[-1]
    name = signal.Signals(number).name
    assert f"{name}: saved at step {step}; the same --workdir goes on from there" in caplog.messages
    assert signal.getsignal(number) is handler
    train()
    assert f"going on from step {step} of {LAST_STEP} in run" in caplog.messages
    assert contents(workdir) == wanted


@pytest.mark.parametrize(
    ("where", "name", "calls"),
    [
        (records.Metrics, "write", 5),
        (Checkpoints, "save", 1),
        (Checkpoints, "save", 3),
        (train_interests.files, "write_json", 1),
    ],
)
def test_killed_before_any_write_a_run_ends_as_if_nothing_had_been(
    train, wanted, monkeypatch, where, name, calls
):
    class Killed(BaseException):
        pass

    original, left = getattr(where, name), calls

    def kill(*arguments):
        nonlocal left
        left -= 1
        if not left:
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, kill)
        with pytest.raises(Killed):
            train()
    assert contents(train()) == wanted


def test_a_killed_process_loses_nothing(tmp_path, wanted):
    settings = dataclasses.asdict(TINY) | {"workdir": tmp_path / "run"}
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "experiments.train_interests", *arguments]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as run:
        while "step 6 " not in (line := run.stderr.readline()):
            assert line
        run.kill()
        rest = run.stderr.read()
    assert run.returncode == -signal.SIGKILL
    assert "Traceback" not in rest
    config = dataclasses.replace(TINY, workdir=str(tmp_path / "run"))
    assert train_interests.main(config) == 0
    assert contents(tmp_path / "run") == wanted


def test_max_steps_ends_a_run_that_can_go_on(train, wanted):
    workdir = train(max_steps=EPOCH + 1)
    with pytest.raises(InputError, match=r"^workdir run is at step 5 already, past --max_steps=4$"):
        train(max_steps=EPOCH)
    # It is evaluated where it ends, which does not make those parameters the best.
    assert "validation_recall_50" in records.read_metrics(workdir)[-1]
    train()
    step, arrays, _, results = contents(workdir)
    assert (step, arrays, results) == (wanted[0], wanted[1], wanted[3])


def test_users_who_repeat_what_they_know_need_no_exclusion(train, tmp_path):
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    lines += [f"{user}\t{t % 2}\t{t}" for user in range(9) for t in range(12)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x.inter").write_text("\n".join(lines))
    settings = {"dataset": "interactions", "data_dir": "data", "network": "popularity"}
    with pytest.raises(InputError, match="--exclude_history leaves nothing to find"):
        train(**settings)
    workdir = train(**settings, exclude_history=False, workdir="other")
    assert contents(workdir)[3]["recall_20"] == 1


def test_without_a_better_validation_training_ends_and_the_best_parameters_are_kept(train):
    workdir = train(learning_rate=1e-9, patience=2, num_epochs=9)
    step, _, rows, results = contents(workdir)
    assert step == 3 * EPOCH
    assert results["step"] == EPOCH
    assert rows[-1]["step"] == step
    train(learning_rate=1e-9, patience=2, num_epochs=9)
    assert contents(workdir)[2] == rows


def test_a_loss_that_is_not_finite_stops_the_run_in_one_line(tmp_path, monkeypatch, capsys):
    growing = {"learning_rate": 1e6, "weight_decay": 1e6}  # a factor of -1e12 a step
    settings = dataclasses.asdict(TINY) | {"workdir": tmp_path / "run"} | growing
    status, _, stderr = in_process.run(train_interests, settings, monkeypatch, capsys)
    assert status == 2
    assert "is not finite at step" in stderr
    assert stderr.count("\n") == 1


REFUSED = {
    "batch": ({"batch_size": 10**6}, "--batch_size must be at most the"),
    "interests": ({"max_interests": 7}, "--max_interests must be at most --history_length=6"),
    "items": ({"synthetic_clusters": 30}, "--synthetic_items must be at least 15 for each"),
    "data_dir": ({"data_dir": "here"}, "--data_dir needs --dataset=interactions"),
    "core": ({"min_interactions": 2}, "--min_interactions needs --dataset=interactions"),
    "no folder": ({"dataset": "interactions"}, "--data_dir must be a folder that can be read"),
    "network": ({"network": "mnd"}, "--network must be one of mind, comirec_dr"),
    "power": ({"label_power": 0}, "--label_power must be above 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_settings_are_refused_in_one_line(tmp_path, monkeypatch, capsys, case):
    changes, message = REFUSED[case]
    settings = dataclasses.asdict(TINY) | {"workdir": tmp_path / "run"} | changes
    status, _, stderr = in_process.run(train_interests, settings, monkeypatch, capsys)
    assert status == 2
    assert stderr.startswith(f"train_interests: {message}")
    assert stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_on_a_file_is_that_on_its_rows(train, tmp_path):
    data = interests.load_data(TINY)
    rows = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user, (start, end) in enumerate(zip(data.starts[:-1], data.starts[1:], strict=True)):
        rows += [f"{user}\t{data.item_ids[i]}\t{t}" for t, i in enumerate(data.items[start:end])]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x.inter").write_text("\n".join(rows))
    workdir = train(dataset="interactions", data_dir="data", num_epochs=1)
    results = contents(workdir)[3]
    assert "recall_20" in results
    assert "purity" not in results  # nobody knows the clusters of a file
    (tmp_path / "data/x.inter").write_text("\n".join(rows[:-1]))
    with pytest.raises(InputError, match="was trained on data with sha256"):
        interests.load(str(workdir))


class Fixed(interest_networks.Network):
    """The same vector of a user whatever the history."""

    def __init__(self, users, catalogue):
        self.settings = TINY
        self.users, self.items = users[:, None], jnp.asarray(catalogue)

    def for_target(self, items, mask, target):
        del items, mask, target
        return self.users, jnp.ones((5, 1), bool)


@pytest.mark.parametrize("negatives", ["uniform", "log_uniform"])
def test_a_sampled_softmax_approaches_the_full_one(negatives):
    rng = np.random.default_rng(0)
    catalogue = rng.normal(size=(30, 4)).astype(np.float32)
    counts = rng.permutation(30) ** 2
    targets = np.arange(5)
    model = Fixed(jnp.asarray(rng.normal(size=(5, 4)), jnp.float32), catalogue)
    mask = np.ones((5, 6), bool)

    def loss(key, **settings):
        config = dataclasses.replace(TINY, **settings)
        return float(interests._loss(config, counts)(model, None, mask, targets, key))

    scores = np.asarray(model.users[:, 0]) @ catalogue.T
    exact = np.mean(np.log(np.exp(scores).sum(1)) - scores[targets, targets])
    assert loss(jax.random.key(0), loss="softmax") == pytest.approx(exact, rel=1e-5)
    settings = {"negatives": negatives, "num_negatives": 20_000}
    found = loss(jax.random.key(0), **settings)
    # The target is counted once for sure, and never as a negative: its own correction, log(n q),
    # is what makes its share right.
    share = np.full(30, 1 / 30)
    if negatives == "log_uniform":
        order = np.argsort(-counts, kind="stable")
        share[order] = np.log1p(1 / np.arange(1, 31)) / math.log(31)
    corrected = scores - np.log(20_000 * share)
    own = corrected[targets, targets]
    others = np.exp(scores).sum(1) - np.exp(scores[targets, targets])
    wanted = np.mean(np.log(np.exp(own) + others) - own)
    assert found == pytest.approx(wanted, rel=0.01)


def test_an_export_answers_like_the_run_and_the_index_like_exact_search(
    finished, tmp_path, monkeypatch, capsys
):
    flags = {"workdir": finished, "output": tmp_path / "export", "num_results": 5}
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    status, stdout, _ = in_process.run(retrieve_interests, flags, monkeypatch, capsys)
    assert status == 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    assert "100.00 %   100.00 %" in " ".join(stdout.split("\n")[3].split()).replace(" %", " %  ")
    task, params = interests.load(str(finished))
    server = retrieve_interests.Server(tmp_path / "export", 6, links=16, effort=64)
    histories = [task.data.items[:size] for size in (1, 4, 9)]
    vectors, valid = server.interests(histories)
    items, mask = task.data.histories(np.array([1, 4, 9]), 6)
    wanted, wanted_valid = task.interests(params, items, mask)
    np.testing.assert_allclose(vectors, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(valid, wanted_valid)
    catalogue = np.asarray(params["items"])
    for history, (found, scores, sources), row, kept in zip(
        histories, server.recommend(histories, k=7, exclude=True), vectors, valid, strict=True
    ):
        best = (row[kept] @ catalogue.T).max(0)
        best[history] = -np.inf
        assert found.tolist() == np.argsort(-best, kind="stable")[:7].tolist()
        np.testing.assert_allclose(scores, (row[sources] * catalogue[found]).sum(1), rtol=1e-4)
    for platform in retrieve_interests.PLATFORMS:
        content = (tmp_path / "export" / retrieve_interests.NETWORK).read_bytes()
        assert platform in jax.export.deserialize(bytearray(content)).platforms


def test_a_query_names_a_user_or_items(finished, tmp_path, monkeypatch, capsys):
    def ask(**query):
        flags = {"workdir": finished, "output": tmp_path / "export", **query}
        return in_process.run(retrieve_interests, flags, monkeypatch, capsys)

    status, stdout, _ = ask(history="1.3,2.0", num_results=3)
    assert status == 0
    lines = stdout.splitlines()
    assert "the history's newest items: 1.3, 2.0" in lines
    answers = lines[-3:]
    assert [line.split()[0] for line in answers] == ["1", "2", "3"]
    assert not {line.split()[1] for line in answers} & {"1.3", "2.0"}
    assert "3" in interests.load_data(TINY).user_ids
    assert ask(user="3")[0] == 0
    for query, message in (
        ({"user": "nobody"}, "--user must name what is in the data, such as '0'"),
        ({"history": "1.3,x"}, "--history must name what is in the data, such as '0.0', got 'x'"),
        ({"history": "1.3", "user": "1"}, "--user and --history must not be given together"),
        ({"workdir": tmp_path / "none"}, "holds no run"),
    ):
        status, _, stderr = ask(**query)
        assert status == 2
        assert message in stderr
        assert stderr.count("\n") == 1


def test_faiss_searches_inner_products_as_the_program_assumes():
    index = faiss.IndexHNSWFlat(2, 4, faiss.METRIC_INNER_PRODUCT)
    index.add(np.array([[1, 0], [5, 0], [0, 1]], np.float32))
    scores, items = index.search(np.array([[2, 0]], np.float32), 2)
    assert items.tolist() == [[1, 0]]
    assert scores.tolist() == [[10, 2]]
