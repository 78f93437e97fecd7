"""Training of one classifier from start to figures, for train_mnist and mnist_ablation."""

from absl import logging

from experiments.analysis import diagnostics, inspection
from experiments.data import datasets
from experiments.figures import routing
from experiments.training import mnist, parallel, processes, records, runs


def train_run(config: mnist.Config, dataset: datasets.Dataset) -> int:
    """Train from the workdir's newest checkpoint to the end, and write the figures.

    Returns:
      The exit status, as of `runs.train`.

    Raises:
      InputError: As of `mnist.build`, `parallel.spread`, `make_diagnostics` and `runs.train`.
    """
    trainer = parallel.spread(mnist.build(config, dataset), config, batch_size=config.batch_size)
    test = mnist.test_split(config, dataset)
    status, params = runs.train(
        config,
        trainer,
        dataset.train,
        test,
        dataset=dataset,
        extra_metrics=(
            diagnostics.make_diagnostics(trainer, dataset.train) if config.diagnostics else None
        ),
    )
    if status:
        return status
    inspection.report(trainer, params, test, config.workdir, batch_size=config.batch_size)
    rows = records.read_metrics(config.workdir)
    if config.diagnostics and not routing.with_diagnostics(rows) and processes.is_lead():
        logging.warning(
            "--diagnostics has no effect: %s was trained to its end without it; use another "
            "--workdir",
            config.workdir,
        )
    return 0
