"""Requests to stop: the first is noted, what belongs to it too, and the next acts as usual."""

import signal
import time

import pytest

from experiments.training import signals


@pytest.fixture
def interruptible():
    """Python's own handler, which pytest-xdist replaces."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_both_signals_of_one_request_are_noted_once(interruptible):
    """A terminal's Ctrl-C reaches a worker, and then the launcher's SIGTERM does."""
    before = signal.getsignal(signal.SIGTERM)
    with signals.stop_requests() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stopped() == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_later_request_acts_as_usual(interruptible):
    with signals.stop_requests() as stopped:
        signal.raise_signal(signal.SIGINT)
        assert stopped() == signal.SIGINT
        time.sleep(1.01)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_closed_terminal_is_a_request_too_but_not_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.stop_requests() as stopped:
            signal.raise_signal(signal.SIGHUP)
            assert not stopped()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with signals.stop_requests() as stopped:
            signal.raise_signal(signal.SIGHUP)
            assert stopped() == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)
