"""Train the capsule network of "Dynamic Routing Between Capsules" on MNIST or a data set like it.

https://arxiv.org/abs/1710.09829. With --network=cnn or pooling_cnn: a convolutional control.
"""

from absl import logging

from experiments import cli
from experiments.analysis import diagnostics, inspection
from experiments.figures import routing
from experiments.training import parallel, processes, records, runs
from experiments.training.mnist import Config, build, test_split


def main(config: Config) -> int:
    """Trains from the workdir's newest checkpoint to the end, and draws the figures."""
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
            diagnostics.measurement(trainer, dataset.train) if config.diagnostics else None
        ),
    )
    if status:
        return status
    inspection.report(trainer, params, test, config.workdir, batch_size=config.batch_size)
    measured = not config.diagnostics or routing.measured(records.read_metrics(config.workdir))
    if processes.is_lead() and not measured:
        logging.warning(
            "--diagnostics: %s was trained to its end without them; for a run with them use "
            "another --workdir",
            config.workdir,
        )
    return 0


if __name__ == "__main__":
    cli.run(Config, main)
