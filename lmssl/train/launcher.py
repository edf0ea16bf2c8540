"""The process that launched this one, torchrun's, also under accelerate: a rank does not outlive it."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType

from lmssl.errors import TrainingError
from lmssl.output import complain

LOOK_SECONDS = 1.0
MEET_SECONDS = 10.0
"""For the place where ranks meet: the launcher opened it before it started them."""
_DECISION = timedelta(hours=1)
"""For rank 0, which reads a checkpoint in full before it decides for it."""


class Launcher:
    """Looks after the launcher from a thread: without it this process ends, or stops where it was told how.

    The launcher starts ranks in sessions of their own, so what kills it does not reach them. A rank that is starting
    would then wait for a meeting that nobody holds, half an hour by torch's patience. One launched by itself has none.
    """

    def __init__(self) -> None:
        self._process = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._request_stop: Callable[[], None] | None = None
        self._closed = threading.Event()
        if self._process is not None:
            threading.Thread(target=self._look, name="launcher", daemon=True).start()

    def then(self, request_stop: Callable[[], None]) -> None:
        """From now on, ask for a stop when the launcher is gone; there is somebody who hears it."""
        self._request_stop = request_stop

    def __enter__(self) -> Launcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()

    def _look(self) -> None:
        while os.getppid() == self._process:
            if self._closed.wait(LOOK_SECONDS):
                return
        if self._request_stop is None:
            complain("error: the launcher is gone; this rank ends before its first step")
            os._exit(TrainingError.exit_code)
        self._request_stop()


def same_on_all_ranks(what: str, decide: Callable[[], str], environment: Mapping[str, str]) -> str:
    """What rank 0 decides, once, on every rank, before ranks form a group.

    Ranks that look at another run while it goes on, each at a time of its own, find different checkpoints. Rank 0 tells
    the others through the launcher's store. Where there is none, each decides for itself.

    Args:
        what: names the decision.
    Raises:
        TrainingError: rank 0 does not answer.
    """
    if environment.get("WORLD_SIZE", "1") == "1" or environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return decide()
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # not in torch's stubs

    require_meeting(environment)
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives the ranks
    store = PrefixStore(f"lmssl/{attempt}", TCPStore(host, port, is_master=False, timeout=_DECISION))
    if environment["RANK"] == "0" and not store.check([what]):
        store.set(what, decide())
    try:
        return bytes(store.get(what)).decode()
    except RuntimeError as error:
        raise TrainingError(
            f"rank 0 does not say which {what} it takes: {str(error).splitlines()[0]}",
            where=f"{host}:{port}, from MASTER_ADDR and MASTER_PORT",
            remedy="see what rank 0 says",
        ) from error


def require_meeting(environment: Mapping[str, str], *, patience_seconds: float = MEET_SECONDS) -> None:
    """Refuse to wait for a meeting of ranks that nobody holds.

    Raises:
        TrainingError: the launcher's store cannot be reached.
    """
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return  # rank 0 opens it, perhaps later
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=patience_seconds).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"the launcher's store does not answer: {error}",
                    where=f"{host}:{port}, from MASTER_ADDR and MASTER_PORT",
                    remedy="the launcher has died, or no connection to that host and port is allowed",
                ) from error
        time.sleep(0.5)
