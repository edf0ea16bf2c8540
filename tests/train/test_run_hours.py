"""`train.max_hours`: a run that decays by its time, and from where it may get more of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmssl import checkpoint
from lmssl.errors import CheckpointError
from lmssl.recipe.load import load_recipe
from lmssl.train import loop
from lmssl.train import run as run_module
from lmssl.train.branch import branch_recipe
from lmssl.train.run import train
from lmssl.train.step import train_step
from runs import metrics, small_recipe, write_recipe

STEP_SECONDS = 360.0
"""Ten steps an hour, by a clock that moves with steps alone."""
WSD = {"kind": "wsd", "warmup_tokens": 1024, "decay_ratio": 0.5, "min_lr_ratio": 0.1}


@pytest.fixture(scope="module", autouse=True)
def _clock() -> Iterator[None]:
    now = [0.0]

    def slow_step(*arguments: Any, **named: Any) -> Any:
        now[0] += STEP_SECONDS
        return train_step(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
        patch.setattr(loop, "train_step", slow_step)
        yield


def recipe_of(folder: Path, text: Path, hours: float | None, out: str = "run", **changes: Any) -> Path:
    """A budget of a hundred steps, which the hours end much earlier."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    common = {"schedule": WSD, "checkpoint": {"every_steps": 2, "keep_last": 20}, "data.validation": None}
    common |= {f"model.{key}": value for key, value in sizes.items()} | {"train.max_hours": hours}
    return write_recipe(
        folder / f"{out}.yaml", small_recipe(text, folder / out, folder / "cache", steps=100, **common | changes)
    )


@pytest.fixture(scope="module")
def decayed(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """A run whose hour is over."""
    folder = tmp_path_factory.mktemp("hours")
    return train(load_recipe(recipe_of(folder, text_folder, 1.0)))


def rates(run: Path) -> list[float]:
    return [row["lr"] / 3e-3 for row in metrics(run) if row["kind"] == "train"]


def steps(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint.step_folders(run)]


def test_a_run_ends_with_its_hours_at_the_end_of_its_decay(decayed: Path) -> None:
    falling = [0.1 + 0.9 * left for left in (0.8, 0.6, 0.4, 0.2)]
    assert rates(decayed) == pytest.approx([0.001, *[1.0] * 5, *falling])
    found = checkpoint.find_step(decayed, None)
    assert found.step == 10
    assert json.loads(found.text("state.json"))["elapsed_seconds"] == 3600


def test_the_same_command_does_nothing_more(
    decayed: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (decayed / "metrics.jsonl").read_bytes()
    train(load_recipe(decayed.parent / "run.yaml"))
    assert "the 1 hours of train.max_hours are over at step 10" in capsys.readouterr().out
    assert (decayed / "metrics.jsonl").read_bytes() == before
    assert checkpoint.find_step(decayed, None).step == 10


def test_more_hours_continue_from_before_the_decay(decayed: Path, text_folder: Path) -> None:
    """Step 4 has spent 0.4 of the old hour and a third of the new time; step 6 was in the old decay."""
    folder = decayed.parent
    run = shutil.copytree(decayed, folder / "more")
    train(load_recipe(recipe_of(folder, text_folder, 1.2, "more")))
    assert json.loads((run / "sessions.jsonl").read_text(encoding="utf-8").splitlines()[-1])["from_step"] == 4
    assert rates(run) == pytest.approx([0.001, *[1.0] * 6, *[0.1 + 0.9 * left / 6 for left in (5, 4, 3, 2, 1)]])
    assert steps(run / "ended-at-step-00000010") == [6, 8, 10]
    assert json.loads(checkpoint.find_step(run, None).text("state.json"))["elapsed_seconds"] == pytest.approx(4320)


@pytest.mark.parametrize("hours", [2.0, None])
def test_without_a_checkpoint_from_before_the_decay_more_hours_are_refused(
    decayed: Path, text_folder: Path, hours: float | None
) -> None:
    folder = decayed.parent
    run = shutil.copytree(decayed, folder / f"late-{hours}")
    for step in (2, 4):
        shutil.rmtree(checkpoint.find_step(run, step).path)
    with pytest.raises(CheckpointError) as caught:
        train(load_recipe(recipe_of(folder, text_folder, hours, run.name)))
    assert f"train.max_hours: 1.0 there, {hours} now" in caught.value.what
    assert "by the hours that it took, the learning rate was at 0.1 of its peak after step 10" in caught.value.what
    assert "would have been at 1, and no checkpoint from before is kept" in caught.value.what
    assert steps(run) == [6, 8, 10]


def test_a_branch_off_a_checkpoint_that_time_has_decayed_is_refused(decayed: Path) -> None:
    with pytest.raises(CheckpointError, match="already in its decay at step 6: its learning rate is at 0.82 of"):
        branch_recipe(f"{decayed}@6", recipe=None, decay_tokens=2048)
    branch = branch_recipe(f"{decayed}@4", recipe=None, decay_tokens=2048).recipe
    assert (branch.steps, branch.train.max_hours) == (6, None)
