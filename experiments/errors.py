"""The one exception that the programs turn into a line for the user."""


class InputError(ValueError):
    """What the user gave cannot be used: one line on stderr, exit status 2, no traceback."""
