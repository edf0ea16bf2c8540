"""What saves a run's checkpoints: what its manifests say, and what it refuses before the first step."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from lmssl import __version__, checkpoint
from lmssl.checkpoint import space
from lmssl.errors import CheckpointError, TrainingError
from lmssl.recipe.load import load_recipe
from lmssl.tokenizer.load import load_tokenizer
from lmssl.train.run import train
from lmssl.train.saving import require_one_precision, require_one_source, require_one_step
from runs import metrics, small_recipe, write_recipe


def start(tmp_path: Path, text_folder: Path, *, steps: int = 4, **changes: Any) -> Path:
    recipe = small_recipe(text_folder, tmp_path / "run", tmp_path / "cache", steps=steps, **changes)
    return train(load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe), []))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_manifests_and_metrics_know_what_was_saved(
    tmp_path: Path, text_folder: Path, asynchronous: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"checkpoint.every_steps": 2, "evaluate.every_steps": 2, "checkpoint.asynchronous": asynchronous}
    run = start(tmp_path, text_folder, steps=6, **changes)
    found = checkpoint.find_step(run, 6)
    manifest = dict(found.manifest)
    evaluated = [row["loss"] for row in metrics(run) if row["kind"] == "evaluate"]
    assert manifest["tokens"] == 6 * 1024 and manifest["finite"] and manifest["validation_loss"] == evaluated[-1]
    assert manifest["backend"] == "single" and manifest["num_ranks"] == 1
    assert manifest["tokenizer"] == load_tokenizer(run / "tokenizer").fingerprint
    assert manifest["recipe"] == hashlib.sha256(found.text("recipe.yaml").encode()).hexdigest()
    assert manifest["versions"]["lmssl"] == __version__ and {"torch", "transformers"} <= set(manifest["versions"])
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("training paused") == 3 and "checkpoint of step 6:" in said
    lines = [(row["step"], saved) for row in metrics(run) for saved in row["time"].get("saves", [])]
    # The save of step 4 waits for that of step 2, so line 5 is the last that may be the first to know of it.
    assert (first := next(line for line, saved in lines if saved["step"] == 2)) in {3, 4, 5}, first
    assert all(0 <= saved["pause_seconds"] <= saved["total_seconds"] and saved["step"] < line for line, saved in lines)


def test_the_best_ones_are_kept_by_the_validation_loss(tmp_path: Path, text_folder: Path) -> None:
    changes = {"checkpoint.every_steps": 1, "evaluate.every_steps": 1, "checkpoint.keep_last": 1}
    run = start(
        tmp_path, text_folder, steps=6, **changes, **{"checkpoint.keep_best": 1, "checkpoint.keep_every_steps": 4}
    )
    losses = {row["step"]: row["loss"] for row in metrics(run) if row["kind"] == "evaluate" and row["step"]}
    best = min(losses, key=lambda step: losses[step])
    kept = [int(path.name.removeprefix("step-")) for path in checkpoint.step_folders(run)]
    assert kept == sorted({best, 4, 6})


def test_a_disk_that_holds_no_checkpoint_is_refused_before_the_first_step(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space, "free_bytes", lambda _: 10_000)
    with pytest.raises(CheckpointError, match=r"a checkpoint needs [\d,]+ bytes \([\d.]+ MB\) .* 10,000 free"):
        start(tmp_path, text_folder)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_disk_that_holds_too_few_is_told(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(space, "free_bytes", lambda _: 8_000_000)
    start(tmp_path, text_folder)
    assert "3 checkpoints of" in " ".join(capsys.readouterr().out.split())


def test_ranks_that_found_different_checkpoints_do_not_train(tmp_path: Path) -> None:
    class Meeting:
        def exchange(self, text: str) -> list[str]:
            return ["4", text]

    require_one_step(Meeting(), 4, tmp_path)
    with pytest.raises(CheckpointError, match=r"different steps \(rank 0: 4, rank 1: 0\)"):
        require_one_step(Meeting(), 0, tmp_path)
    with pytest.raises(TrainingError, match=r"different precisions \(rank 0: 4, rank 1: bf16\)"):
        require_one_precision(Meeting(), "bf16")
    require_one_precision(Meeting(), "4")
    require_one_source(Meeting(), "4")
    with pytest.raises(CheckpointError, match=r"different models \(rank 0: 4, rank 1: runs/a/checkpoints/step-5\)"):
        require_one_source(Meeting(), "runs/a/checkpoints/step-5")
