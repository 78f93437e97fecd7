"""Trains as `train_mnist` does, without figures, for the tests of many processes."""

from experiments import cli, train_mnist
from experiments.analysis import inspection
from experiments.training import mnist

if __name__ == "__main__":
    inspection.report = lambda *_, **__: None
    cli.run(mnist.Config, train_mnist.main)
