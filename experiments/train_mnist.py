"""Train the capsule network of "Dynamic Routing Between Capsules" on MNIST or a data set like it.

Sabour, Frosst and Hinton, https://arxiv.org/abs/1710.09829. --network trains capsule networks of
other papers, and CNNs as baselines.
"""

from experiments import cli
from experiments.analysis.classifier_run import train_run
from experiments.training import runs
from experiments.training.mnist import Config, select_viewpoints


def main(config: Config) -> int:
    """Train from the workdir's newest checkpoint to the end, and write the figures."""
    return train_run(config, select_viewpoints(config, runs.prepare(config)))


if __name__ == "__main__":
    cli.run(Config, main)
