import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmssl.data.cancel import Cancelled, attended, check, locked, never, pause

DAY_SECONDS = 86_400.0


def calls(number: int) -> Callable[[], bool]:
    """True from that call on."""
    answers: Iterator[bool] = iter([False] * number)
    return lambda: next(answers, True)


def test_work_that_goes_on(tmp_path: Path) -> None:
    check(never)
    pause(0.001, never)
    with locked(tmp_path / "lock", never):
        assert attended(lambda: "done", never) == "done"
    with locked(tmp_path / "lock", never), pytest.raises(ZeroDivisionError):
        attended(lambda: 1 // 0, never)


def test_a_pause_ends() -> None:
    with pytest.raises(Cancelled):
        pause(DAY_SECONDS, calls(2))


def test_a_wait_for_a_lock_ends(tmp_path: Path) -> None:
    with locked(tmp_path / "lock", never), pytest.raises(Cancelled), locked(tmp_path / "lock", calls(2)):
        pytest.fail("two hold it")
    with locked(tmp_path / "lock", never):
        pass


def test_work_that_hangs_is_left_behind() -> None:
    hanging = threading.Event()
    try:
        with pytest.raises(Cancelled):
            attended(lambda: hanging.wait(DAY_SECONDS), calls(2))
    finally:
        hanging.set()


def test_cancelled_work_does_not_begin() -> None:
    begun: list[int] = []
    with pytest.raises(Cancelled):
        attended(lambda: begun.append(1), calls(0))
    assert not begun


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_work_that_ends_its_thread_is_a_timeout() -> None:
    def end() -> None:
        raise KeyboardInterrupt

    with pytest.raises(TimeoutError):
        attended(end, never)
