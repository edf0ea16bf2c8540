"""The flag that signals set, without processes: when it raises, and when it only says so."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time

import pytest

from lmssl.train.signals import STOP_SIGNALS, StopFlag, StoppedAtOnce, handling


def later(how: signal.Signals) -> None:
    """Send this process a signal from a thread."""
    threading.Timer(0.2, os.kill, (os.getpid(), how)).start()


@pytest.mark.parametrize("how", STOP_SIGNALS)
def test_between_steps_a_signal_is_only_noted(how: signal.Signals) -> None:
    flag = StopFlag()
    flag.at_once = False
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with handling(flag):
        signal.raise_signal(how)
        if how != signal.SIGINT:
            signal.raise_signal(how)
        assert flag.requested
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_before_the_first_step_a_signal_ends_the_run_where_it_is() -> None:
    flag = StopFlag()
    with handling(flag):
        with pytest.raises(StoppedAtOnce):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # on its way out already
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_second_interrupt_by_a_person_ends_at_once_and_a_forwarded_one_does_not() -> None:
    flag = StopFlag()
    flag.at_once = False
    with handling(flag):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.4)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("how", STOP_SIGNALS)
def test_a_signal_ends_a_long_wait_for_data(how: signal.Signals) -> None:
    flag = StopFlag()
    flag.at_once = False
    with handling(flag):
        later(how)
        with pytest.raises(StoppedAtOnce), flag.interrupting():
            queue.Queue[int]().get(timeout=60)
        assert flag.requested
        with flag.interrupting(enabled=False):
            signal.raise_signal(signal.SIGTERM)
