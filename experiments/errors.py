"""The exception for bad input from the user."""


class InputError(ValueError):
    """Bad input: `cli.run` prints the message as one line and exits with status 2."""
