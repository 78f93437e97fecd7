"""Trains every row of the paper's table 1 with several seeds: routing, reconstruction, controls."""

import dataclasses
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging
from matplotlib.figure import Figure

from experiments import cli, files
from experiments.analysis import diagnostics, inspection
from experiments.cli import flag
from experiments.data import datasets
from experiments.errors import InputError
from experiments.figures.style import BLUE, GREY, RED, STYLE, settle_ticks
from experiments.training import checkpoints, mnist, parallel, records, runs, trained

# With one iteration couplings are uniform: routing switched off, all parameters kept.
VARIANTS: dict[str, dict[str, Any]] = {
    "1_iteration": {"num_iterations": 1, "reconstruction_weight": 0.0},
    "1_iteration_reconstruction": {"num_iterations": 1},
    "3_iterations": {"num_iterations": 3, "reconstruction_weight": 0.0},
    "3_iterations_reconstruction": {"num_iterations": 3},
    "cnn": {"network": "cnn"},
}


@dataclasses.dataclass(frozen=True)
class Config(mnist.Config):
    """The settings of train_mnist, from which each variant takes all that it does not name."""

    workdir: str = flag("runs/ablation", "Folder of the runs.", affects_result=False)
    seeds: int = flag(3, "Runs of each variant, with --seed and the numbers after it.", minimum=1)
    variants: str = flag(",".join(VARIANTS), "Which to train, separated by commas.")


def main(config: Config) -> int:
    """Trains what is not trained yet, one run after the other, and sums all up in a table.

    Variants that are not named keep their rows, if the folder has finished runs of them.
    """
    names = config.variants.split(",")
    check(config, names)
    dataset = runs.prepare(config)
    if jax.process_count() > 1:
        raise InputError("an ablation runs in one process, with all devices that this one has")
    folder = pathlib.Path(config.workdir)
    table = []
    for name in VARIANTS:
        if name in names:
            seeds = range(config.seed, config.seed + config.seeds)
            found = [run_config(config, name, seed) for seed in seeds]
            for run in found:
                if not is_finished(run, dataset):
                    logging.info("%s with seed %d", name, run.seed)
                    last_drawn(run).unlink(missing_ok=True)
                    if status := train(run, dataset):
                        return status
        else:
            found = finished(config, name, dataset)
        if found:
            table.append(table_row(name, found, dataset))
            files.write_json(folder / "results.json", table)
    figure = errors_by_variant(table)
    files.save_figure(figure, folder / "figures/test_errors.png")
    columns = list(dict.fromkeys(key for row in table for key in row))
    cells = [[str(row.get(key, "")) for key in columns] for row in table]
    for line in cli.table([columns, *cells]):
        print(line)
    return 0


def train(run: mnist.Config, dataset: datasets.Dataset) -> int:
    """Trains one run to its end and draws its figures; returns the exit status."""
    trainer = parallel.spread(mnist.build(run, dataset), run, batch_size=run.batch_size)
    test = mnist.test_split(run, dataset)
    measure = diagnostics.measurement(trainer, dataset.train) if run.diagnostics else None
    status, params = runs.train(
        run, trainer, dataset.train, test, data_sha256=dataset.sha256, extra_metrics=measure
    )
    if not status:
        inspection.report(trainer, params, test, run.workdir, batch_size=run.batch_size)
    return status


def check(config: Config, names: list[str]) -> None:
    """Raises InputError for settings that some variant could not heed, before any is trained."""
    unknown = [name for name in names if name not in VARIANTS]
    if unknown or len(set(names)) < len(names):
        raise InputError(
            f"--variants must be some of {', '.join(VARIANTS)}, each once, got {config.variants!r}"
        )
    usual = mnist.Config()
    for name in ("network", "num_iterations"):
        if (value := getattr(config, name)) != getattr(usual, name):
            raise InputError(f"--{name} is what --variants vary: name those, got {value}")
    if not config.reconstruction_weight:
        raise InputError(
            "--reconstruction_weight must be above 0: variants without reconstruction set it to 0"
        )
    if "cnn" in names and (config.diagnostics or config.capsule_parallel != 1):
        raise InputError("--diagnostics and --capsule_parallel are of capsules: --variants has cnn")
    if config.seed + config.seeds > 2**32:
        raise InputError(
            f"--seed + --seeds must be at most {2**32}, got {config.seed} + {config.seeds}"
        )


def run_config(config: Config, variant: str, seed: int) -> mnist.Config:
    """The Config of one run, in a folder of its own."""
    fields = [field.name for field in dataclasses.fields(mnist.Config)]
    shared = mnist.Config(**{name: getattr(config, name) for name in fields})
    workdir = str(pathlib.Path(config.workdir) / variant / f"seed_{seed}")
    return dataclasses.replace(shared, **VARIANTS[variant] | {"seed": seed, "workdir": workdir})


def finished(config: Config, variant: str, dataset: datasets.Dataset) -> list[mnist.Config]:
    """The finished runs of a variant that are in the folder, by seed."""
    folders = pathlib.Path(config.workdir, variant).glob("seed_*")
    seeds = sorted(int(name) for path in folders if (name := path.name[5:]).isdecimal())
    found = [run_config(config, variant, seed) for seed in seeds]
    return [run for run in found if is_finished(run, dataset)]


def is_finished(run: mnist.Config, dataset: datasets.Dataset) -> bool:
    """Whether the folder holds this very run, trained to the end, with its figures."""
    if not last_drawn(run).exists():
        return False
    records.open_workdir(run.workdir, config=run, data_sha256=dataset.sha256)
    checkpoints.check_not_lost(run.workdir)
    wanted = runs.num_steps(run, dataset.train)
    last = min(wanted, run.max_steps) if run.max_steps else wanted
    return checkpoints.saved_steps(run.workdir)[-1:] == [last]


def last_drawn(run: mnist.Config) -> pathlib.Path:
    """The figure of a run that is drawn after all others."""
    return pathlib.Path(run.workdir) / "figures/learning_curves.png"


def table_row(variant: str, found: list[mnist.Config], dataset: datasets.Dataset) -> dict[str, Any]:
    """A row of the table: the errors of the last epoch, their mean and deviation, and the cost."""
    errors, seconds = [], []
    for run in found:
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
    if found[0].network == "capsnet" and found[0].num_iterations > 1:
        # The same trained parameters without routing.
        uniform = [error_without_routing(run, dataset) for run in found]
        cells["test_error_if_couplings_are_uniform"] = round(statistics.mean(uniform), 3)
    return cells


def error_without_routing(run: mnist.Config, dataset: datasets.Dataset) -> float:
    """The test error in percent of a trained network that routes once, with uniform couplings."""
    once = mnist.build(dataclasses.replace(run, num_iterations=1), dataset)
    once = parallel.spread(once, run, batch_size=run.batch_size)
    test = mnist.test_split(run, dataset)
    _, params = trained.restored(once, run.workdir)
    return once.evaluate(params, test, batch_size=run.batch_size).error(test.labels)


@STYLE
def errors_by_variant(table: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws each variant's test errors in percent: a dot a seed, and the mean as a line.

    A diamond is the mean of the same networks when they are tested without routing.

    Args:
      table: The rows of `table_row`.
    """
    figure = Figure((4.6, 1.1 + 0.3 * len(table)))
    axes = figure.subplots()
    for y, row in enumerate(table):
        errors = row["test_errors"]
        axes.plot(errors, [y] * len(errors), "o", color=BLUE, alpha=0.6, label="a seed")
        mean = [row["test_error"]] * 2
        axes.plot(mean, [y - 0.3, y + 0.3], color=BLUE, label="mean of the seeds")
        if (uniform := row.get("test_error_if_couplings_are_uniform")) is not None:
            axes.plot(
                uniform,
                y,
                "D",
                color=RED,
                fillstyle="none",
                label="the same, tested without routing",
            )
    names = [row["variant"].replace("_", " ") for row in table]
    axes.set_yticks(range(len(table)), names)
    axes.set(ylim=(len(table) - 0.5, -0.5), xlabel="Test error (%)")
    axes.set_xlim(0, 1.05 * axes.dataLim.x1 or 1)  # from 0, with room for the last dot
    axes.grid(visible=True, axis="x", color=GREY, alpha=0.3)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # each once
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    settle_ticks(figure)
    return figure


if __name__ == "__main__":
    cli.run(Config, main)
