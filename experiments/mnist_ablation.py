"""Trains every row of the paper's table 1 with several seeds: routing, reconstruction, controls."""

import dataclasses
import pathlib
import statistics
from typing import Any

from absl import logging

from experiments import ablation_figures, cli, data, processes, records, runs, train_mnist, trained
from experiments.cli import flag
from experiments.errors import InputError

# With one iteration couplings are uniform: routing switched off, all parameters kept.
VARIANTS: dict[str, dict[str, Any]] = {
    "1_iteration": {"num_iterations": 1, "reconstruction_weight": 0.0},
    "1_iteration_reconstruction": {"num_iterations": 1},
    "3_iterations": {"num_iterations": 3, "reconstruction_weight": 0.0},
    "3_iterations_reconstruction": {"num_iterations": 3},
    "cnn": {"network": "cnn"},
}


@dataclasses.dataclass(frozen=True)
class Config(train_mnist.Config):
    """The settings of train_mnist, from which each variant takes all that it does not name."""

    workdir: str = flag("runs/ablation", "Folder of the runs.", affects_result=False)
    seeds: int = flag(3, "Runs of each variant, with --seed and the numbers after it.", minimum=1)
    variants: str = flag(",".join(VARIANTS), "Which to train, separated by commas.")


def main(config: Config) -> int:
    """Trains what is not trained yet, one run after the other, and sums all up in a table."""
    names = config.variants.split(",")
    unknown = [name for name in names if name not in VARIANTS]
    if unknown or len(set(names)) < len(names):
        raise InputError(
            f"--variants must be some of {', '.join(VARIANTS)}, each once, got {config.variants!r}"
        )
    dataset = runs.prepare(config)
    table = []
    for name in names:
        found = []
        for seed in range(config.seed, config.seed + config.seeds):
            run = run_config(config, name, seed)
            if not is_finished(run, dataset):
                logging.info("%s with seed %d", name, seed)
                if status := train_mnist.main(run):
                    return status
            found.append(run)
        if not processes.is_lead():
            continue
        table.append(summary(name, found))
        records.write_json(pathlib.Path(config.workdir) / "results.json", table)
    if table:
        figure = ablation_figures.errors_by_variant(table)
        records.save_figure(figure, pathlib.Path(config.workdir) / "test_errors.png")
    for row in table:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    return 0


def run_config(config: Config, variant: str, seed: int) -> train_mnist.Config:
    """The Config of one run, in a folder of its own."""
    fields = [field.name for field in dataclasses.fields(train_mnist.Config)]
    shared = train_mnist.Config(**{name: getattr(config, name) for name in fields})
    workdir = str(pathlib.Path(config.workdir) / variant / f"seed_{seed}")
    return dataclasses.replace(shared, **VARIANTS[variant] | {"seed": seed, "workdir": workdir})


def is_finished(run: train_mnist.Config, dataset: data.Dataset) -> bool:
    """Whether the folder holds this very run, trained to the end."""
    if not (pathlib.Path(run.workdir) / "figures/learning_curves.png").exists():  # drawn last
        return False
    records.open_workdir(run.workdir, config=run, data_sha256=dataset.sha256)
    wanted = runs.num_steps(run, dataset.train)
    last = records.read_metrics(run.workdir)[-1]["step"]
    return last == (min(wanted, run.max_steps) if run.max_steps else wanted)


def summary(variant: str, found: list[train_mnist.Config]) -> dict[str, Any]:
    """A row of the table: the errors of the last epoch, their mean and deviation, and the cost."""
    errors, seconds = [], []
    for run in found:
        rows = records.read_metrics(run.workdir)
        errors.append(round(rows[-1]["test_error"], 4))
        seconds.append(records.training_seconds(rows, run.batch_size))
    row = {
        "variant": variant,
        "test_error": round(statistics.mean(errors), 3),
        "deviation": round(statistics.stdev(errors), 3) if len(errors) > 1 else None,
        "test_errors": errors,
        "epochs": round(rows[-1]["epoch"], 2),
        "minutes_a_run": round(statistics.mean(seconds) / 60, 1),
    }
    if found[0].network == "capsnet" and found[0].num_iterations > 1:
        # The same trained parameters without routing.
        uniform = [error_without_routing(run) for run in found]
        row["test_error_if_couplings_are_uniform"] = round(statistics.mean(uniform), 3)
    return row


def error_without_routing(run: train_mnist.Config) -> float:
    """The test error in percent of a trained network that routes once, with uniform couplings."""
    network = trained.load(run.workdir, data_dir=run.data_dir)
    once = train_mnist.build(dataclasses.replace(run, num_iterations=1), network.dataset)
    evaluation = once.evaluate(network.params, network.test, batch_size=run.batch_size)
    return evaluation.error(network.test.labels)


if __name__ == "__main__":
    cli.run(Config, main)
