"""What `mnist_ablation` trained, in numbers: a row of its table for each variant."""

import dataclasses
import statistics
from typing import Any

from experiments import records, train_mnist, trained


def row(variant: str, found: list[train_mnist.Config]) -> dict[str, Any]:
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
        uniform = [error_without_routing(run) for run in found]
        cells["test_error_if_couplings_are_uniform"] = round(statistics.mean(uniform), 3)
    return cells


def error_without_routing(run: train_mnist.Config) -> float:
    """The test error in percent of a trained network that routes once, with uniform couplings."""
    network = trained.load(run.workdir, data_dir=run.data_dir)
    once = train_mnist.build(dataclasses.replace(run, num_iterations=1), network.dataset)
    evaluation = once.evaluate(network.params, network.test, batch_size=run.batch_size)
    return evaluation.error(network.test.labels)
