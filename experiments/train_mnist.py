"""Train the capsule network of "Dynamic Routing Between Capsules" on MNIST or a data set like it.

Sabour, Frosst and Hinton, https://arxiv.org/abs/1710.09829. --network=cnn and --network=pooling_cnn
train convolutional baselines.
"""

from absl import logging

from experiments import cli
from experiments.analysis import diagnostics, inspection
from experiments.figures import routing
from experiments.training import parallel, processes, records, runs
from experiments.training.mnist import Config, build, test_split


def main(config: Config) -> int:
    """Train from the workdir's newest checkpoint to the end, and write the figures."""
    dataset = runs.prepare(config)
    trainer = parallel.spread(build(config, dataset), config, batch_size=config.batch_size)
    test = test_split(config, dataset)
    status, params = runs.train(
        config,
        trainer,
        dataset.train,
        test,
        data_sha256=dataset.sha256,
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


if __name__ == "__main__":
    cli.run(Config, main)
