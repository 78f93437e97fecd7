"""Trains every row of the paper's table 1 with several seeds: routing, reconstruction, controls."""

import dataclasses
import pathlib
from typing import Any

import jax
from absl import logging

from experiments import (
    ablation_figures,
    ablation_results,
    checkpoints,
    cli,
    data,
    records,
    runs,
    train_mnist,
)
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
                    if status := train_mnist.train(run, dataset):
                        return status
        else:
            found = finished(config, name, dataset)
        if found:
            table.append(ablation_results.row(name, found))
            records.write_json(folder / "results.json", table)
    figure = ablation_figures.errors_by_variant(table)
    records.save_figure(figure, folder / "figures/test_errors.png")
    for row in table:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    return 0


def check(config: Config, names: list[str]) -> None:
    """Raises InputError for settings that some variant could not heed, before any is trained."""
    unknown = [name for name in names if name not in VARIANTS]
    if unknown or len(set(names)) < len(names):
        raise InputError(
            f"--variants must be some of {', '.join(VARIANTS)}, each once, got {config.variants!r}"
        )
    usual = train_mnist.Config()
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


def run_config(config: Config, variant: str, seed: int) -> train_mnist.Config:
    """The Config of one run, in a folder of its own."""
    fields = [field.name for field in dataclasses.fields(train_mnist.Config)]
    shared = train_mnist.Config(**{name: getattr(config, name) for name in fields})
    workdir = str(pathlib.Path(config.workdir) / variant / f"seed_{seed}")
    return dataclasses.replace(shared, **VARIANTS[variant] | {"seed": seed, "workdir": workdir})


def finished(config: Config, variant: str, dataset: data.Dataset) -> list[train_mnist.Config]:
    """The finished runs of a variant that are in the folder, by seed."""
    folders = pathlib.Path(config.workdir, variant).glob("seed_*")
    seeds = sorted(int(name) for path in folders if (name := path.name[5:]).isdecimal())
    found = [run_config(config, variant, seed) for seed in seeds]
    return [run for run in found if is_finished(run, dataset)]


def is_finished(run: train_mnist.Config, dataset: data.Dataset) -> bool:
    """Whether the folder holds this very run, trained to the end, with its figures."""
    if not last_drawn(run).exists():
        return False
    records.open_workdir(run.workdir, config=run, data_sha256=dataset.sha256)
    checkpoints.check_not_lost(run.workdir)
    wanted = runs.num_steps(run, dataset.train)
    last = min(wanted, run.max_steps) if run.max_steps else wanted
    return checkpoints.saved_steps(run.workdir)[-1:] == [last]


def last_drawn(run: train_mnist.Config) -> pathlib.Path:
    """The figure of a run that is drawn after all others."""
    return pathlib.Path(run.workdir) / "figures/learning_curves.png"


if __name__ == "__main__":
    cli.run(Config, main)
