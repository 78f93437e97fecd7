"""Graceful shutdown on Ctrl-C, SIGTERM, and SIGHUP of a terminal that is closed."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

import experiments


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Record the first SIGINT, SIGTERM or SIGHUP in the block; a later one has its usual effect.

    Signals within a second of the first count as the same request: Ctrl-C reaches all processes of
    a terminal, and `launch` then sends SIGTERM to those that it started. SIGHUP stays ignored where
    it is, under nohup.

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

    for number in experiments.STOP_SIGNALS:
        is_hangup = number == getattr(signal, "SIGHUP", None)
        if is_hangup and signal.getsignal(number) == signal.SIG_IGN:
            continue
        before[number] = signal.signal(number, note)
    try:
        yield lambda: received
    finally:
        restore()
