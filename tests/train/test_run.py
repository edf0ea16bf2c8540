"""`lmssl train` in one process: what a run writes, what it refuses, what it counts."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lmssl import checkpoint
from lmssl.errors import CheckpointError, DataError, LmsslError, ModelError, TrainingError
from lmssl.model import native
from lmssl.objective.causal import CausalObjective
from lmssl.recipe.load import load_recipe
from lmssl.train.run import train
from runs import metrics, small_recipe, write_recipe


def run(folder: Path, text: Path, *overrides: str, **changes: Any) -> Path:
    recipe = small_recipe(text, folder / "run", folder / "cache", **changes)
    return train(load_recipe(write_recipe(folder / "recipe.yaml", recipe), overrides))


def test_a_run_learns_and_leaves_a_whole_folder(tmp_path: Path, text_folder: Path) -> None:
    out = run(tmp_path, text_folder, steps=40, **{"checkpoint.every_steps": 10, "evaluate.every_steps": 20})
    rows = metrics(out)
    losses = [r["loss"] for r in rows if r["kind"] == "train"]
    assert len(losses) == 40
    assert losses[0] == pytest.approx(math.log(4096), rel=0.02)
    assert losses[-1] < losses[0] - 1
    evaluations = [r for r in rows if r["kind"] == "evaluate"]
    assert [r["step"] for r in evaluations] == [0, 20, 40]
    assert evaluations[-1]["bits_per_byte"] < evaluations[0]["bits_per_byte"] - 0.4
    assert evaluations[0].keys() >= {"loss", "num_targets", "corpora"}
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["step-00000030", "step-00000040"]
    assert (out / "tokenizer" / "tokenizer.json").exists()
    assert load_recipe(out / "recipe.yaml").recipe.steps == 40


def test_the_learning_rate_follows_the_schedule(tmp_path: Path, text_folder: Path) -> None:
    rows = [r for r in metrics(run(tmp_path, text_folder, steps=10)) if r["kind"] == "train"]
    rates = [r["lr"] / 3e-3 for r in rows]
    assert rates[:3] == pytest.approx([1e-3, 0.5, 1.0])
    assert rates[3:8] == pytest.approx([1.0] * 5)
    assert rates[8:] == pytest.approx([2 / 3, 1 / 3])


def test_kernels_that_cannot_be_had_are_missed(
    tmp_path: Path, text_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "processor_can", lambda *_: False)
    for kernels, wanted in (("on", True), ("auto", False)):
        (tmp_path / kernels).mkdir()
        run(tmp_path / kernels, text_folder, steps=1, **{"train.precision": "fp32", "train.kernels": kernels})
        said = " ".join(capsys.readouterr().out.split())
        assert ("this run has none: they need Linux on a CPU with AVX2" in said) == wanted


def test_micro_batches_do_not_change_the_run(tmp_path: Path, text_folder: Path) -> None:
    """16 sequences in one, in unequal and in padded micro-batches; float32 to rounding."""
    found = []
    for rows in (16, 3, 11):
        folder = tmp_path / str(rows)
        folder.mkdir()
        change = {"train.micro_batch_sequences": rows, "train.precision": "fp32"}
        found.append([r["loss"] for r in metrics(run(folder, text_folder, steps=6, **change))])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


def test_loader_workers_do_not_change_the_run(tmp_path: Path, text_folder: Path) -> None:
    found = []
    for workers in (0, 1):
        folder = tmp_path / str(workers)
        folder.mkdir()
        out = run(folder, text_folder, steps=4, **{"data.workers": workers})
        found.append([{k: v for k, v in r.items() if k != "time"} for r in metrics(out)])
    assert found[0] == found[1]


def test_another_recipe_in_the_same_folder_is_refused_field_by_field(tmp_path: Path, text_folder: Path) -> None:
    out = run(tmp_path, text_folder, steps=2)
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"optim\.lr: 0\.003 there, 0\.1 now") as error:
        run(tmp_path, text_folder, "optim.lr=0.1", steps=2)
    assert "choose another out" in str(error.value)
    assert (out / "metrics.jsonl").read_bytes() == before


def test_harmless_fields_may_change_when_a_run_continues(tmp_path: Path, text_folder: Path) -> None:
    run(tmp_path, text_folder, steps=2)
    run(tmp_path, text_folder, "checkpoint.keep_last=5", "data.workers=1", "train.log_every_steps=3", steps=2)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, text_folder: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match="no run folder"):
        run(tmp_path, text_folder)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_start_that_was_killed_early_is_no_obstacle(tmp_path: Path, text_folder: Path) -> None:
    (tmp_path / "run" / ".tmp-tokenizer").mkdir(parents=True)
    (tmp_path / "run" / ".tmp-recipe.yaml").write_text("na")
    assert checkpoint.find_step(run(tmp_path, text_folder, steps=2), None).step == 2


def test_a_file_in_place_of_the_folder(tmp_path: Path, text_folder: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        run(tmp_path, text_folder)


def test_an_unwritable_output_fails_before_anything_is_built(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, so the answer of the operating system is played."""
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(CheckpointError, match="cannot be written"):
        run(tmp_path, text_folder)
    assert not (tmp_path / "cache").exists()


MISTAKES: dict[str, tuple[type[LmsslError], str, dict[str, Any]]] = {
    "missing tokenizer": (LmsslError, "nowhere", {"tokenizer.path": "nowhere"}),
    "vocabulary too small": (ModelError, "model's vocabulary only 100", {"model.vocab_size": 100}),
    "less text than a batch": (DataError, "batch", {"train.batch_tokens": 2**24, "train.tokens": 2**24}),
    "tracker not installed": (TrainingError, "not installed", {"track.with": ["aim"]}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_stop_before_the_run_folder_exists(tmp_path: Path, text_folder: Path, mistake: str) -> None:
    kind, match, change = MISTAKES[mistake]
    with pytest.raises(kind, match=match) as error:
        run(tmp_path, text_folder, **change)
    assert error.value.remedy
    assert not (tmp_path / "run").exists()


def test_numbers_that_are_not_finite_are_skipped_counted_and_in_the_end_stop_the_run(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = CausalObjective.sums
    calls = 0

    def poisoned(self: CausalObjective, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        nonlocal calls
        found = sums(self, model, inputs)
        if not torch.is_grad_enabled():
            return found
        calls += 1
        return {k: v * (float("nan") if calls in bad else 1.0) for k, v in found.items()}

    monkeypatch.setattr(CausalObjective, "sums", poisoned)
    bad = {3}
    whole = {"train.micro_batch_sequences": 16, "train.max_skipped_steps": 2}
    out = run(tmp_path, text_folder, steps=6, **whole)
    rows = [r for r in metrics(out) if r["kind"] == "train"]
    assert [r["skipped_steps"] for r in rows] == [0, 0, 1, 1, 1, 1]
    assert all(math.isfinite(r["loss"]) for r in rows if r["step"] != 3)
    second = tmp_path / "second"
    second.mkdir()
    calls, bad = 0, {3, 4, 5, 6}
    with pytest.raises(TrainingError, match="3 steps in a row") as error:
        run(second, text_folder, steps=6, **whole, **{"checkpoint.every_steps": 2, "guard.max_rollbacks": 0})
    assert "positions 32 to 79" in str(error.value)
    assert checkpoint.find_step(second / "run", None).step == 4


def test_a_tracker_receives_the_numbers(tmp_path: Path, text_folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = run(tmp_path, text_folder, steps=3, **{"track.with": ["tensorboard"]})
    events = EventAccumulator(str(next((out / "small").rglob("events*")).parent))
    events.Reload()
    logged = [event.value for event in events.Scalars("loss")]
    assert logged == pytest.approx([r["loss"] for r in metrics(out) if r["kind"] == "train"])
    assert len(events.Scalars("validation_bits_per_byte")) == 2


def test_a_failing_tracker_does_not_stop_training(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from accelerate import Accelerator

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("server is gone")

    monkeypatch.setattr(Accelerator, "log", fail)
    out = run(tmp_path, text_folder, steps=2, **{"track.with": ["tensorboard"]})
    assert checkpoint.find_step(out, None).step == 2
    assert "server is gone" in capsys.readouterr().out


def test_a_tokenizer_that_changed_is_refused_or_kept_anew(tmp_path: Path, text_folder: Path, root: Path) -> None:
    """Where steps were saved it is refused; where none were, the run's copy is that of the tokenizer it trains with."""
    folder = shutil.copytree(root / "tokenizer" / "bpe-4k", tmp_path / "tokenizer")

    def change() -> None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        content["model"]["merges"] = content["model"]["merges"][:-1]
        path.write_text(json.dumps(content), encoding="utf-8")

    recipe = small_recipe(text_folder, tmp_path / "run", tmp_path / "cache", **{"tokenizer.path": str(folder)})
    loaded = load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe))
    out = train(loaded)
    shutil.rmtree(out / "checkpoints")
    change()
    train(loaded)
    assert (out / "tokenizer" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    change()
    with pytest.raises(LmsslError, match="the tokenizer"):
        train(loaded)
