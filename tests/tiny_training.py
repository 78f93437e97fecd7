"""Trains as `train_mnist` does, without figures, for the tests of many processes."""

from experiments import cli, inspection, train_mnist

if __name__ == "__main__":
    inspection.report = lambda *_, **__: None
    cli.run(train_mnist.Config, train_mnist.main)
