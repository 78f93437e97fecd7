"""Trains as `train_mnist` does, for tests of many processes: computes figures, draws none."""

import jax
from jax.experimental import multihost_utils

from experiments import cli, files, train_mnist
from experiments.figures import classifier
from experiments.training import mnist


def gather(tree, **options):
    """Gathers texts between processes, and no weights."""
    assert all(leaf.ndim < 2 for leaf in jax.tree.leaves(tree))
    return allgather(tree, **options)


if __name__ == "__main__":
    allgather, multihost_utils.process_allgather = multihost_utils.process_allgather, gather
    for name in ("couplings", "coupling_entropy", "reconstructions", "dimension_tweaks"):
        setattr(classifier, name, lambda *_, **__: None)
    for name in ("confusion_matrix", "misclassified", "learning_curves"):
        setattr(classifier, name, lambda *_, **__: None)
    files.save_figure = lambda *_: None
    cli.run(mnist.Config, train_mnist.main)
