"""Programs that train, evaluate and measure capsule networks."""

import os
import signal
import sys
from types import FrameType


def end_quietly(number: int, frame: FrameType | None) -> None:
    """End this process on Ctrl-C with one line; for while nothing needs to be cleared away."""
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


# Python sets this name until it has found the program that -m runs. The program's imports take
# seconds, in which `cli.run` cannot catch Ctrl-C yet.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_quietly)
