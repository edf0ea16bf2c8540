"""What a person sees while a run goes: one live line on a terminal, plain lines elsewhere, main process only."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lmssl.output import BestEffort


class RunConsole:
    """Prints notes and progress; silent on all but the main process, and where nothing can be printed any more."""

    def __init__(self, *, enabled: bool, total_tokens: int, first_tokens: int) -> None:
        self.enabled = enabled
        self.total_tokens = total_tokens
        # A closed pipe would make rich end the process, and a full disk would end training.
        self._console = Console(file=cast(IO[str], BestEffort(sys.stdout)), highlight=False, soft_wrap=True)
        self._live = enabled and self._console.is_terminal
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[done]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._progress.add_task(
            "train", total=total_tokens, completed=first_tokens, done=_tokens(first_tokens, total_tokens), numbers=""
        )
        self._first_tokens = first_tokens

    def __enter__(self) -> RunConsole:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """Print one line."""
        if self.enabled:
            self._console.print(text, markup=False)

    def advance(self, row: dict[str, Any], seconds_left: float | None) -> None:
        """Show a line of metrics: in place on a terminal, as a line elsewhere."""
        if not self.enabled:
            return
        numbers = _numbers(row)
        done = _tokens(row["tokens"], self.total_tokens)
        if self._live:
            self._progress.update(self._task, completed=row["tokens"], done=done, numbers=numbers)
        else:
            eta = f"  eta {_clock(seconds_left)}" if seconds_left is not None else ""
            self._console.print(f"step {row['step']}  {done}  {numbers}{eta}", markup=False)


Report = Callable[[str], None]
_SHOWN_WAIT_RATIO = 0.05


def _numbers(row: dict[str, Any]) -> str:
    parts = [f"loss {row['loss']:.4f}" if row.get("loss") is not None else "loss -"]
    if row.get("bits_per_byte") is not None:
        parts.append(f"bits/byte {row['bits_per_byte']:.3f}")
    # Of an objective with several tasks, those that `loss` leaves out.
    parts += [
        f"{name.removeprefix('loss_')} {row[name]:.4f}"
        for name in row
        if name.startswith("loss_") and name != "loss_scale" and row[name] is not None  # the scale of float16 is none
    ]
    parts.append(f"lr {row['lr']:.1e}")
    time = row["time"]
    parts.append(f"{time['tokens_per_second']:,.0f} tok/s")
    if time.get("mfu") is not None:
        parts.append(f"mfu {time['mfu']:.0%}")
    if time["data_wait_ratio"] >= _SHOWN_WAIT_RATIO:
        parts.append(f"waiting for data {time['data_wait_ratio']:.0%}")
    return "  ".join(parts)


def _tokens(done: int, total: int) -> str:
    return f"{short(done)}/{short(total)} tokens"


def short(number: float) -> str:
    """A count in three digits.

    >>> short(999), short(12_345), short(3_100_000), short(2.5e12)
    ('999', '12.3k', '3.10M', '2.50T')
    """
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            value = number / size
            return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}{letter}"
    return f"{number:.0f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
