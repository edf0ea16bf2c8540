"""Recipes that change while their run goes on: what passes, what is refused, and what the learning rate does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmssl import checkpoint
from lmssl.errors import CheckpointError, DataError
from lmssl.recipe.load import load_recipe
from lmssl.train.changes import _first
from lmssl.train.run import train
from runs import metrics, small_recipe, tensors_of, write_recipe

WSD = {"kind": "wsd", "warmup_tokens": 2048, "decay_ratio": 0.25}
HALF = WSD | {"decay_ratio": 0.5}
CONSTANT = {"kind": "constant", "warmup_tokens": 2048}


def run(folder: Path, text: Path, label: str, /, *, steps: int, **change: Any) -> Path:
    """Train, or go on training, a tiny recipe; 1024 tokens a step."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    change = {"model": {"kind": "llama", **sizes}, "checkpoint": {"every_steps": 2, "keep_last": 10}} | change
    content = small_recipe(text, folder / label, folder / "cache", steps=steps, **change)
    return train(load_recipe(write_recipe(folder / f"{label}.yaml", content)))


def assert_equal_ends(first: Path, second: Path) -> None:
    a, b = checkpoint.find_step(first, None), checkpoint.find_step(second, None)
    assert a.step == b.step
    for name in ("model.safetensors", "optim.safetensors"):
        ours, theirs = tensors_of(a, name), tensors_of(b, name)
        assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)
    assert json.loads(a.text("state.json")) == json.loads(b.text("state.json"))
    assert a.text("ledger.jsonl") == b.text("ledger.jsonl")
    trained = [[_plain(row) for row in metrics(path) if row["kind"] == "train"] for path in (first, second)]
    assert trained[0] == trained[1]


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("time", "phases")}


def test_a_finished_wsd_run_extends_from_before_its_decay(
    tmp_path: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """2N tokens at once equal N tokens, decayed to their end, extended to 2N from the checkpoint before the decay."""
    whole = run(tmp_path, text_folder, "whole", steps=16, schedule=HALF)
    short = run(tmp_path, text_folder, "short", steps=8, schedule=HALF)
    decayed = metrics(short)
    rates = [row["lr"] for row in decayed if row["kind"] == "train"]
    assert rates[7] < rates[6] < rates[5] < rates[4] == rates[2]
    capsys.readouterr()
    extended = run(tmp_path, text_folder, "short", steps=16, schedule=HALF)
    said = " ".join(capsys.readouterr().out.split())
    assert "train.tokens: 8192 there, 16384 now" in said
    assert (
        "of the 4 completed steps is that of both recipes; it stays at 1 of its peak up to step 9; "
        "step 8 has 1 of it instead of 0.25" in said
    )
    assert_equal_ends(whole, extended)
    kept = short / "ended-at-step-00000008"
    assert checkpoint.find_step(kept, None).step == 8 and checkpoint.find_step(kept, 6).step == 6
    assert [_plain(row) for row in metrics(kept)] == [_plain(row) for row in decayed]
    assert (kept / "recipe.yaml").exists() and (kept / "tokenizer/tokenizer.json").exists()


def test_a_run_extends_from_a_checkpoint_right_before_the_first_step_that_decays(
    tmp_path: Path, text_folder: Path
) -> None:
    """The decay begins a little before step 5, so step 4 is the last at the peak, and its checkpoint will do."""
    schedule = HALF | {"decay_ratio": 0.5125}
    whole = run(tmp_path, text_folder, "whole", steps=16, schedule=schedule)
    change = {"checkpoint": {"every_steps": 4, "keep_last": 2}}
    short = run(tmp_path, text_folder, "short", steps=8, schedule=schedule, **change)
    rates = [row["lr"] for row in metrics(short) if row["kind"] == "train"]
    assert rates[4] < rates[3] == rates[2]
    assert_equal_ends(whole, run(tmp_path, text_folder, "short", steps=16, schedule=schedule, **change))


def test_a_start_that_saved_nothing_does_not_hold_the_next_to_its_recipe(tmp_path: Path, text_folder: Path) -> None:
    with pytest.raises(DataError, match="the validation split is empty"):
        run(tmp_path, text_folder, "run", steps=2, **{"data.validation": {"ratio": 1e-9}})
    assert (tmp_path / "run/recipe.yaml").exists()
    started = run(tmp_path, text_folder, "run", steps=2, **{"data.validation": {"ratio": 0.2, "tokens": 2000}})
    assert metrics(started)[-1]["step"] == 2


def test_a_constant_run_extends_from_its_end_and_may_get_a_decay(tmp_path: Path, text_folder: Path) -> None:
    whole = run(tmp_path, text_folder, "whole", steps=12, schedule=CONSTANT)
    run(tmp_path, text_folder, "short", steps=6, schedule=CONSTANT)
    extended = run(tmp_path, text_folder, "short", steps=12, schedule=CONSTANT)
    assert_equal_ends(whole, extended)
    assert not list(extended.glob("ended-at-*"))
    wsd = run(tmp_path, text_folder, "wsd", steps=16, schedule=WSD)
    decayed = run(tmp_path, text_folder, "short", steps=16, schedule=WSD)
    assert_equal_ends(wsd, decayed)


def test_a_run_may_be_made_shorter(tmp_path: Path, text_folder: Path) -> None:
    """Ahead of where it is; not to before it."""
    run(tmp_path, text_folder, "cut", steps=6, schedule=CONSTANT)
    with pytest.raises(
        CheckpointError, match="the run has made 2 steps already, more than 1|no checkpoint from before"
    ):
        run(tmp_path, text_folder, "cut", steps=1, schedule={"kind": "constant"})
    whole = run(tmp_path, text_folder, "whole", steps=8, schedule=WSD)
    cut = run(tmp_path, text_folder, "cut", steps=8, schedule=WSD)
    assert_equal_ends(whole, cut)


def test_a_cosine_run_cannot_be_extended(tmp_path: Path, text_folder: Path) -> None:
    cosine = {"kind": "cosine", "warmup_tokens": 1024}
    change = {"schedule": cosine, "checkpoint": {"every_steps": None}}
    path = run(tmp_path, text_folder, "run", steps=4, **change)
    before = sorted(path.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        run(tmp_path, text_folder, "run", steps=8, **change)
    assert "train.tokens: 4096 there, 8192 now" in caught.value.what
    assert "step 3 had 0.775 of the peak learning rate, and would have had 0.9554" in caught.value.what
    assert "model.from=" in str(caught.value.remedy)
    assert sorted(path.rglob("*")) == before


def test_a_wsd_run_whose_stable_checkpoints_were_pruned_says_what_to_keep(tmp_path: Path, text_folder: Path) -> None:
    change = {"schedule": HALF, "checkpoint": {"every_steps": 1, "keep_last": 2}}
    path = run(tmp_path, text_folder, "run", steps=8, **change)
    before = sorted(path.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        run(tmp_path, text_folder, "run", steps=16, **change)
    assert "and no checkpoint from before is kept" in caught.value.what
    remedy = str(caught.value.remedy)
    assert "a checkpoint of step 5 or before, which checkpoint.keep_last=2 did not keep" in remedy
    assert "checkpoint.keep_every_steps" in remedy and f"model.from={path}" in remedy
    assert sorted(path.rglob("*")) == before


def falling_masks(kind: str) -> dict[str, Any]:
    """A tiny masked model whose rate of masks falls over the second half, and whose last checkpoint alone is kept."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "schedule": CONSTANT,
        "tokenizer": {"path": "tokenizer/wordpiece-8k"},
        "model": {"kind": kind, **sizes},
        "objective": {"kind": "masked", "rate": 0.3, "final_rate": 0.1, "decay_ratio": 0.5},
        "checkpoint": {"every_steps": 1, "keep_last": 1},
    }


def test_the_rate_of_masks_must_not_have_begun_to_change(tmp_path: Path, text_folder: Path) -> None:
    change = falling_masks("bert")
    run(tmp_path, text_folder, "run", steps=4, **change)
    with pytest.raises(CheckpointError, match="the rate of masks had begun to change"):
        run(tmp_path, text_folder, "run", steps=8, **change)


def test_longer_sequences_ahead_must_not_move_the_rate_of_masks(tmp_path: Path, text_folder: Path) -> None:
    change = falling_masks("modernbert")
    run(tmp_path, text_folder, "run", steps=4, **change)
    stages = [{"from_tokens": 3072, "sequence_length": 128}]
    with pytest.raises(CheckpointError, match="data.stages.*\n.*the rate of masks had begun to change"):
        run(tmp_path, text_folder, "run", steps=4, **change, **{"data.stages": stages})


def test_every_changed_field_is_shown_with_what_it_means(tmp_path: Path, text_folder: Path) -> None:
    run(tmp_path, text_folder, "run", steps=2, schedule=CONSTANT)
    with pytest.raises(CheckpointError) as caught:
        run(
            tmp_path,
            text_folder,
            "run",
            steps=2,
            **{"schedule": CONSTANT, "optim.lr": 1e-3, "seed": 7, "data.eos": False},
        )
    what = caught.value.what
    assert "optim.lr: 0.003 there, 0.001 now\n        the updates made so far belong to the old value" in what
    assert "seed: 1 there, 7 now" in what and "data.eos: True there, False now\n        it decides which tokens" in what


def test_harmless_fields_pass(tmp_path: Path, text_folder: Path) -> None:
    path = run(tmp_path, text_folder, "run", steps=2, schedule=CONSTANT)
    before = (path / "metrics.jsonl").read_bytes()
    change = {"name": "other", "train.log_every_steps": 7, "data.max_bad_records": 3, "train.deterministic": True}
    run(tmp_path, text_folder, "run", steps=2, **{"schedule": CONSTANT, **change})
    assert (path / "metrics.jsonl").read_bytes() == before
    assert load_recipe(path / "recipe.yaml").recipe.name == "other"


@pytest.mark.parametrize("first", [None, 0, 1, 243, 250, 700_001, 999_999])
def test_the_first_step_that_differs_is_found_without_looking_at_all(first: int | None) -> None:
    looked = []

    def differs(step: int) -> bool:
        looked.append(step)
        return first is not None and step >= first

    assert _first(range(1_000_000), differs) == first
    assert len(looked) < 10_000
    assert _first(range(0), differs) is None


def test_a_difference_that_ends_early_is_found() -> None:
    """As of two warmups."""
    assert _first(range(1_000_000), lambda step: 3 <= step < 20) == 3
    assert _first(range(5, 1_000_000), lambda step: 7 <= step < 9) == 7
