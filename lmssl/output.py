"""What is printed may have no reader: a full disk or a closed pipe silences a stream, and ends nothing."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any, TextIO


class BestEffort:
    """A stream that falls silent at the first write that fails, and says so on stderr."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or leave it."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._fall_silent(error)
            return len(text)

    def flush(self) -> None:
        """Hand over what is buffered, or leave it."""
        try:
            self._stream.flush()
        except OSError as error:
            self._fall_silent(error)

    def _fall_silent(self, error: OSError) -> None:
        silence(self._stream)
        complain(f"warning: the output cannot be written, and ends here; the work goes on: {error}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def silence(stream: TextIO) -> None:
    """Let what a stream has buffered, and all that follows, go nowhere, or Python would complain at exit."""
    with suppress(OSError, ValueError):  # one that is no file has no number, and needs none
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)


def complain(text: str) -> None:
    """Print a line on stderr, where that is possible: `lmssl train 2>&1 | tee log` may have lost its reader."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)
