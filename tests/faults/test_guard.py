"""Losses that are not numbers, and spikes: what is skipped, what is logged, when a run goes back."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from faulty_runs import faulty_run
from lmssl import checkpoint
from lmssl.errors import Preempted, TrainingError
from lmssl.objective.causal import CausalObjective
from lmssl.recipe.load import load_recipe
from lmssl.train.run import train
from lmssl.train.session import Session
from runs import metrics, small_recipe, tensors_of, write_recipe

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL: dict[str, Any] = {
    **{f"model.{key}": value for key, value in SIZES.items()},
    "train.micro_batch_sequences": 16,
    "train.precision": "fp32",
    "data.validation": None,
}


def run(folder: Path, text: Path, **changes: Any) -> Path:
    recipe = small_recipe(text, folder / "run", folder / "cache", **{**SMALL, **changes})
    return train(load_recipe(write_recipe(folder / "recipe.yaml", recipe)))


def guard_rows(run: Path) -> list[dict[str, Any]]:
    return [row for row in metrics(run) if row["kind"] == "guard"]


def state_of(run: Path, step: int | None = None) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(checkpoint.find_step(run, step).text("state.json"))
    return found


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """First position of a batch -> what its loss is multiplied by: the text's fault, whenever it is read."""
    factors: dict[int, float] = {}
    prepare, sums = CausalObjective.prepare, CausalObjective.sums

    def marked(self: CausalObjective, batch: Any, **options: Any) -> Any:
        micro = prepare(self, batch, **options)
        micro.inputs["factor"] = torch.tensor(factors.get(int(batch.positions_B[0]), 1.0))
        return micro

    def faulty(self: CausalObjective, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        factor = inputs.get("factor", torch.tensor(1.0))
        return {name: value * factor for name, value in sums(self, model, inputs).items()}

    monkeypatch.setattr(CausalObjective, "prepare", marked)
    monkeypatch.setattr(CausalObjective, "sums", faulty)
    return factors


def test_the_run_goes_back_leaves_the_text_out_and_equals_one_that_never_read_it(
    tmp_path: Path, text_folder: Path, poison: dict[int, float]
) -> None:
    """Steps of 16 positions; those of positions 64 to 111 are bad, and the last checkpoint before is of step 4."""
    poison |= {64: math.nan, 80: math.inf, 96: math.nan}
    change = {"steps": 9, "train.max_skipped_steps": 2, "checkpoint.every_steps": 2}
    out = run(tmp_path, text_folder, **change)
    (back,) = guard_rows(out)
    assert (back["action"], back["step"], back["from_step"], back["skip"]) == ("rollback", 4, 7, [64, 112])
    rows = [row for row in metrics(out) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert all(math.isfinite(row["loss"]) and row["skipped_steps"] == 0 for row in rows)
    assert rows[4]["next_position"] == 112 + 16
    state = state_of(out)
    assert state["skip"] == [[64, 112]]
    assert [(back["from_step"], back["to_step"]) for back in state["rollbacks"]] == [(7, 4)]
    other = tmp_path / "other"
    other.mkdir()
    wanted = run(other, text_folder, **change, **{"data.skip": [[64, 112]]})
    for group in ("model", "optim"):
        ours, theirs = (tensors_of(checkpoint.find_step(path, None), group) for path in (out, wanted))
        assert all(ours[name].equal(theirs[name]) for name in ours)


def test_a_run_that_went_back_continues_with_the_recipe_it_was_begun_with(
    tmp_path: Path, text_folder: Path, poison: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped once before the next save, where it must go back again, and once after it."""
    poison |= {32: math.nan, 48: math.nan}
    change = {"steps": 8, "train.max_skipped_steps": 1, "checkpoint.every_steps": 2}
    whole = tmp_path / "whole"
    whole.mkdir()
    wanted = run(whole, text_folder, **change)
    save, began = Session.save, []

    def stopping(self: Session) -> None:
        began.append(self.state.step)
        if len(began) in (2, 5):
            raise Preempted("killed in a save")
        save(self)

    monkeypatch.setattr(Session, "save", stopping)
    for _ in range(2):
        with pytest.raises(Preempted):
            run(tmp_path, text_folder, **change)
    out = run(tmp_path, text_folder, **change)
    assert began == [2, 4, 4, 6, 8, 8]
    strip = [[{k: v for k, v in row.items() if k != "time"} for row in metrics(path)] for path in (out, wanted)]
    assert strip[0] == strip[1]
    assert state_of(out) == state_of(wanted)
    ours, theirs = (tensors_of(checkpoint.find_step(path, None), "optim") for path in (out, wanted))
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_going_back_is_bounded_and_works_without_any_checkpoint(
    tmp_path: Path, text_folder: Path, poison: dict[int, float]
) -> None:
    poison |= dict.fromkeys(range(0, 16 * 40, 16), math.nan)
    with pytest.raises(TrainingError, match="2 steps in a row .* going back 2 times did not help") as error:
        run(tmp_path, text_folder, steps=9, **{"train.max_skipped_steps": 1})
    assert "positions 64 to 95" in str(error.value)
    assert [row["skip"] for row in guard_rows(tmp_path / "run") if row["action"] == "rollback"] == [[0, 32], [32, 64]]
    failed = (tmp_path / "run" / "heartbeats" / "failed.json").read_text()
    assert "2 steps in a row" in failed


@pytest.mark.parametrize("spike", ["log", "skip", "off"])
def test_a_spike_of_ten_times_is_seen(tmp_path: Path, text_folder: Path, poison: dict[int, float], spike: str) -> None:
    poison |= {16 * 14: 10.0}
    change = {"steps": 18, "guard": {"spike": spike, "window_steps": 16}, "checkpoint.every_steps": 9}
    out = run(tmp_path, text_folder, **change)
    rows = guard_rows(out)
    state = state_of(out)
    if spike == "off":
        assert rows == []
        assert state["recent"] == []
        return
    (row,) = rows
    assert (row["step"], row["action"], row["reason"], row["positions"]) == (15, spike, "spike", [224, 239])
    assert row["loss"] > 5 * row["limits"]["loss"] / 1.5
    assert (state["spikes"], state["skipped_steps"]) == (1, int(spike == "skip"))
    assert len(state["recent"]) == 17
    by_step = {row["step"]: row for row in metrics(out) if row["kind"] == "train"}
    assert (by_step[15].get("loss") is None) == (spike == "skip")


def test_limits_continue_over_an_interruption(tmp_path: Path, text_folder: Path, poison: dict[int, float]) -> None:
    """Whatever is logged or saved, and wherever it is stopped, every step has the same limits."""
    poison |= {16 * 14: 10.0}
    change = {"steps": 18, "guard": {"spike": "skip", "window_steps": 16}}
    found = []
    for name, more in {"a": {}, "b": {"train.log_every_steps": 5, "checkpoint.every_steps": 7}}.items():
        (tmp_path / name).mkdir()
        out = run(tmp_path / name, text_folder, **change, **more)
        found.append((guard_rows(out), state_of(out)["recent"]))
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_loss_that_is_no_number_on_one_rank_is_skipped_by_both(tmp_path: Path, text_folder: Path) -> None:
    """Its gradient reaches rank 0 in the exchange; neither updates, both go on, and both hold the same weights."""
    fault = """
on_sums(lambda n, training: float("nan") if RANK == 1 and n == 4 else None)
from lmssl.train.session import Session
save = Session.save
def saved(self):
    import torch
    torch.save([p.detach().clone() for p in self.core.parameters()], FOLDER / f"weights-{RANK}")
    save(self)
Session.save = saved
"""
    change = {**SMALL, "train.micro_batch_sequences": 4}
    recipe = small_recipe(text_folder, tmp_path / "run", tmp_path / "cache", steps=4, **change)
    with faulty_run(tmp_path, write_recipe(tmp_path / "r.yaml", recipe), fault, launcher="torchrun") as found:
        assert found.end() == 0, found.output
    rows = [row for row in metrics(tmp_path / "run") if row["kind"] == "train"]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 1]
    assert guard_rows(tmp_path / "run")[0] | {"loss": 0, "grad_norm": 0} == {
        "kind": "guard",
        "step": 2,
        "action": "skip",
        "reason": "not finite",
        "positions": [16, 31],
        "loss": 0,
        "grad_norm": 0,
    }
    ours, theirs = (torch.load(tmp_path / f"weights-{rank}") for rank in (0, 1))
    assert all(a.equal(b) and bool(a.isfinite().all()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_go_back_together(tmp_path: Path, text_folder: Path) -> None:
    """The bad text is in the rows of one rank; both open the run again, and end with equal numbers to one process."""
    fault = """
import torch
from lmssl.objective.causal import CausalObjective
prepare, sums = CausalObjective.prepare, CausalObjective.sums
def marked(self, batch, **options):
    micro = prepare(self, batch, **options)
    bad = ((batch.positions_B >= 64) & (batch.positions_B < 68)) | (batch.positions_B == 80)
    micro.inputs["factor"] = torch.tensor(float("nan") if bad.any() else 1.0)
    return micro
CausalObjective.prepare = marked
CausalObjective.sums = lambda self, model, inputs: {
    name: value * inputs["factor"] for name, value in sums(self, model, inputs).items()
}
"""
    change = {**SMALL, "train.micro_batch_sequences": 4, "train.max_skipped_steps": 1, "checkpoint.every_steps": 2}
    found = []
    for name, launcher in (("one", None), ("two", "torchrun")):
        (tmp_path / name).mkdir()
        recipe = small_recipe(text_folder, tmp_path / name / "run", tmp_path / "cache", steps=7, **change)
        path = write_recipe(tmp_path / f"{name}.yaml", recipe)
        with faulty_run(tmp_path / name, path, fault, launcher=launcher) as done:
            assert done.end() == 0, done.output
        found.append(metrics(tmp_path / name / "run"))
    (back,) = guard_rows(tmp_path / "two" / "run")
    assert (back["from_step"], back["to_step"], back["skip"]) == (6, 4, [64, 96])
    for one, two in zip(*found, strict=True):
        assert (one["kind"], one["step"]) == (two["kind"], two["step"])
        if one["kind"] == "train":
            assert two["loss"] == pytest.approx(one["loss"], rel=2e-5)
            assert two["padding_ratio"] == one["padding_ratio"]


def test_the_text_of_a_bad_step_can_be_shown(tmp_path: Path, text_folder: Path, poison: dict[int, float]) -> None:
    """By the command that the message gives."""
    poison |= {16: math.nan}
    out = run(tmp_path, text_folder, steps=3)
    (row,) = guard_rows(out)
    first, last = row["positions"]
    command = ["data", str(out / "recipe.yaml"), "--position", str(first), "--count", str(last - first + 1), "--json"]
    shown = subprocess.run(
        [sys.executable, "-m", "lmssl", *command], capture_output=True, text=True, check=False, env={**os.environ}
    )
    assert shown.returncode == 0, shown.stderr
    assert [json.loads(line)["position"] for line in shown.stdout.splitlines()] == list(range(16, 32))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # handlers are put back
