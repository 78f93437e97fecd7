"""Stopping in good order on Ctrl-C and SIGTERM."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Inside, the first SIGINT or SIGTERM is noted instead of obeyed; the next ones act as usual.

    Yields:
      A function that returns the signal's number, or 0 while there was none.
    """
    received = 0
    before: dict[int, object] = {}

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = number
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield lambda: received
    finally:
        restore()
