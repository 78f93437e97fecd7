"""Programs that train, evaluate and measure capsule networks."""

import os
import signal
import sys
from types import FrameType, TracebackType

# Windows has no SIGHUP.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


def end_quietly(number: int, frame: FrameType | None = None) -> None:
    """End this process on a signal with one line; for while nothing needs to be cleared away."""
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


_EXTRAS = {  # those of setup.cfg; all other packages are in "experiments"
    "nbformat": "tutorial",
    "nbclient": "tutorial",
    "torch": "torch",
    "faiss": "retrieval",
    "gradio": "explore",
    "flatbuffers": "retrieval",
    "tensorboardX": "tensorboard",
}


def name_extra(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Say which extra to install where a program's imports fail; show other errors as usual."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if not issubclass(kind, ModuleNotFoundError) or package in ("", "experiments", "capsjax"):
        sys.__excepthook__(kind, error, trace)
        return
    extra = _EXTRAS.get(package, "experiments")
    os.write(2, f"{package} is missing: pip install 'capsjax[{extra}]'\n".encode())
    os._exit(2)


# Python sets this name until it has found the program that -m runs. The program's imports take
# seconds, in which `cli.run` cannot catch signals yet. What is ignored (under nohup) stays so.
if sys.argv[:1] == ["-m"]:
    for number in STOP_SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, end_quietly)
if sys.argv[:1] == ["-m"]:
    sys.excepthook = name_extra
