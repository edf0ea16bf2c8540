"""A small checkpoint, saved at once."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmssl.checkpoint import Checkpoint, Keep, Saver, find_step

Save = Callable[..., Checkpoint]


@pytest.fixture
def save() -> Save:
    """Saves `step` of a run with a saver of its own; `keep` and whatever `Saver.save` takes."""

    def saved(run: Path, step: int, *, keep: Keep | None = None, **given: Any) -> Checkpoint:
        ticks = itertools.count()
        saver = Saver(run, keep=keep or Keep(last=99), clock=lambda: float(next(ticks)), report=lambda _: None)
        tensors = {"model": {"a": torch.full((4,), float(step)), "b": torch.tensor(2.5)}}
        given = {"tensors": tensors, "texts": {"state.json": json.dumps({"step": step})}, **given}
        saver.save(step, **given)
        saver.close()
        return find_step(run, step)

    return saved
