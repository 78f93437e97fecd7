"""Train the variants of the CapsNet paper's table 1, each with several seeds.

Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", table 1,
https://arxiv.org/abs/1710.09829: 1 or 3 routing iterations, with or without reconstruction, and a
CNN baseline.
"""

import dataclasses
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging
from matplotlib.figure import Figure

from experiments import cli, files
from experiments.analysis.classifier_run import train_run
from experiments.cli import flag
from experiments.data import datasets
from experiments.errors import InputError
from experiments.figures.style import BLUE, GREY, RED, STYLE, settle_ticks
from experiments.training import checkpoints, mnist, parallel, records, runs, trained

# One iteration has uniform couplings: no routing, with the same parameters.
VARIANTS: dict[str, dict[str, Any]] = {
    "1_iteration": {"num_iterations": 1, "reconstruction_weight": 0.0},
    "1_iteration_reconstruction": {"num_iterations": 1},
    "3_iterations": {"num_iterations": 3, "reconstruction_weight": 0.0},
    "3_iterations_reconstruction": {"num_iterations": 3},
    "cnn": {"network": "cnn"},
}


@dataclasses.dataclass(frozen=True)
class Config(mnist.Config):
    """The settings of train_mnist; each variant overrides some of them."""

    workdir: str = flag(
        "runs/ablation", "Folder of all runs, results.json and figures.", affects_result=False
    )
    seeds: int = flag(
        3, "Runs of each variant, with consecutive seeds from --seed on.", minimum=1, maximum=10_000
    )
    variants: str = flag(",".join(VARIANTS), "Variants to train, separated by commas.")


def main(config: Config) -> int:
    """Train unfinished runs one after the other, and write and print the table of all runs.

    The table includes finished runs in the folder of variants that are not in --variants.
    """
    names = config.variants.split(",")
    check_settings(config, names)
    dataset = mnist.select_viewpoints(config, runs.prepare(config))
    if jax.process_count() > 1:
        raise InputError("mnist_ablation must run in a single process; it uses all of its devices")
    folder = pathlib.Path(config.workdir)
    table = []
    for name in VARIANTS:
        if name in names:
            seeds = range(config.seed, config.seed + config.seeds)
            variant_runs = [run_config(config, name, seed) for seed in seeds]
            for run in variant_runs:
                if not is_finished(run, dataset):
                    logging.info("%s with seed %d", name, run.seed)
                    last_figure(run).unlink(missing_ok=True)
                    if status := train_run(run, dataset):
                        return status
        else:
            variant_runs = finished_runs(config, name, dataset)
        if variant_runs:
            table.append(table_row(name, variant_runs, dataset))
            files.write_json(folder / "results.json", table)
    figure = draw_errors(table)
    files.save_figure(figure, folder / "figures/test_errors.png")
    columns = list(dict.fromkeys(key for row in table for key in row))
    values = [[row.get(key) for key in columns] for row in table]
    cells = [["" if value is None else str(value) for value in row] for row in values]
    for line in cli.table([columns, *cells]):
        print(line)
    return 0


def check_settings(config: Config, names: list[str]) -> None:
    """Check the settings against the variants.

    Raises:
      InputError: A variant is unknown or repeated, or would ignore or override a given setting.
    """
    unknown = [name for name in names if name not in VARIANTS]
    if unknown or len(set(names)) < len(names):
        raise InputError(
            f"--variants must be distinct names out of {', '.join(VARIANTS)}, got "
            f"{config.variants!r}"
        )
    defaults = mnist.Config()
    for name in ("network", "num_iterations"):
        if (value := getattr(config, name)) != getattr(defaults, name):
            raise InputError(f"--{name} is set by --variants, and must not be given, got {value}")
    if not config.reconstruction_weight:
        raise InputError(
            "--reconstruction_weight must be above 0; variants without reconstruction set it to 0"
        )
    if "cnn" in names and (config.diagnostics or config.capsule_parallel != 1):
        raise InputError(
            "--diagnostics and --capsule_parallel need capsules: remove cnn from --variants"
        )
    if config.seed + config.seeds > 2**32:
        raise InputError(
            f"--seed + --seeds must be at most {2**32}, got {config.seed} + {config.seeds}"
        )


def run_config(config: Config, variant: str, seed: int) -> mnist.Config:
    """Return the settings of one run, with the workdir WORKDIR/VARIANT/seed_SEED."""
    fields = [field.name for field in dataclasses.fields(mnist.Config)]
    shared = mnist.Config(**{name: getattr(config, name) for name in fields})
    workdir = str(pathlib.Path(config.workdir) / variant / f"seed_{seed}")
    return dataclasses.replace(shared, **VARIANTS[variant] | {"seed": seed, "workdir": workdir})


def finished_runs(config: Config, variant: str, dataset: datasets.Dataset) -> list[mnist.Config]:
    """Return the finished runs of a variant in the folder, sorted by seed."""
    folders = pathlib.Path(config.workdir, variant).glob("seed_*")
    seeds = sorted(int(name) for path in folders if (name := path.name[5:]).isdecimal())
    candidates = [run_config(config, variant, seed) for seed in seeds]
    return [run for run in candidates if is_finished(run, dataset)]


def is_finished(run: mnist.Config, dataset: datasets.Dataset) -> bool:
    """Return whether a run has its last checkpoint and all of its figures.

    Raises:
      InputError: The run's folder has other settings or data, or has lost checkpoints or metrics.
    """
    if not last_figure(run).exists():
        return False
    records.open_workdir(run.workdir, config=run, data_sha256=dataset.sha256)
    checkpoints.check_not_lost(run.workdir)
    checkpoints.check_metrics(run.workdir)
    num_steps = runs.num_steps(run, dataset.train)
    last = min(num_steps, run.max_steps) if run.max_steps else num_steps
    return checkpoints.saved_steps(run.workdir)[-1:] == [last]


def last_figure(run: mnist.Config) -> pathlib.Path:
    """Return the path of the figure that is written after all others."""
    return pathlib.Path(run.workdir) / "figures/learning_curves.png"


def table_row(
    variant: str, variant_runs: list[mnist.Config], dataset: datasets.Dataset
) -> dict[str, Any]:
    """Return a variant's final test errors (%), their mean and standard deviation, and its cost.

    With routing, `test_error_if_couplings_are_uniform` is the mean test error of the same
    parameters with uniform couplings.
    """
    errors, seconds = [], []
    for run in variant_runs:
        rows = records.read_metrics(run.workdir)
        errors.append(round(rows[-1]["test_error"], 4))
        seconds.append(records.training_seconds(rows, run.batch_size))
    cells = {
        "variant": variant,
        "test_error": round(statistics.mean(errors), 3),
        "deviation": round(statistics.stdev(errors), 3) if len(errors) > 1 else None,
        "test_errors": errors,
        "epochs": round(rows[-1]["epoch"], 2),
        "minutes_a_run": round(statistics.mean(seconds) / 60, 1),
    }
    if variant_runs[0].network == "capsnet" and variant_runs[0].num_iterations > 1:
        uniform = [error_without_routing(run, dataset) for run in variant_runs]
        cells["test_error_if_couplings_are_uniform"] = round(statistics.mean(uniform), 3)
    return cells


def error_without_routing(run: mnist.Config, dataset: datasets.Dataset) -> float:
    """Return the test error (%) of a trained network with one iteration, i.e. uniform couplings."""
    trainer = mnist.build(dataclasses.replace(run, num_iterations=1), dataset)
    trainer = parallel.spread(trainer, run, batch_size=run.batch_size)
    test = mnist.test_split(run, dataset)
    _, params = trained.restored(trainer, run.workdir)
    return trainer.evaluate(params, test, batch_size=run.batch_size).error(test.labels)


@STYLE
def draw_errors(table: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the test errors (%) by variant: dots for seeds, a line for their mean.

    A diamond is the mean error of the same networks evaluated with uniform couplings.

    Args:
      table: Rows of `table_row`.
    """
    figure = Figure((4.6, 1.1 + 0.3 * len(table)))
    axes = figure.subplots()
    for y, row in enumerate(table):
        errors = row["test_errors"]
        axes.plot(errors, [y] * len(errors), "o", color=BLUE, alpha=0.6, label="one seed")
        mean = [row["test_error"]] * 2
        axes.plot(mean, [y - 0.3, y + 0.3], color=BLUE, label="mean of seeds")
        if (uniform := row.get("test_error_if_couplings_are_uniform")) is not None:
            axes.plot(
                uniform,
                y,
                "D",
                color=RED,
                fillstyle="none",
                label="mean, tested without routing",
            )
    names = [row["variant"].replace("_", " ") for row in table]
    axes.set_yticks(range(len(table)), names)
    axes.set(ylim=(len(table) - 0.5, -0.5), xlabel="Test error (%)")
    axes.set_xlim(0, 1.05 * axes.dataLim.x1 or 1)  # room for the marker of the largest error
    axes.grid(visible=True, axis="x", color=GREY, alpha=0.3)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # one per label
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    settle_ticks(figure)
    return figure


if __name__ == "__main__":
    cli.run(Config, main)
