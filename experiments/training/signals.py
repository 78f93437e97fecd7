"""Stopping in good order on Ctrl-C and SIGTERM."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Inside, a first SIGINT or SIGTERM is noted instead of obeyed; later ones act as usual.

    What follows within a second is the same request: Ctrl-C reaches all processes of a terminal,
    and one that started the others then asks them to stop, too.

    Yields:
      A function that returns the signal's number, or 0 while there was none.
    """
    received, since = 0, 0.0
    before: dict[int, object] = {}

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal received, since
        if not received:
            received, since = number, time.monotonic()
        elif time.monotonic() - since > 1:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield lambda: received
    finally:
        restore()
