"""Runs whose sequences grow and whose rotary base changes: checkpoints, resuming, exports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from lmssl import checkpoint
from lmssl.checkpoint import checkpoints_path
from lmssl.errors import DataError
from lmssl.export import export_run
from lmssl.recipe.load import load_recipe
from lmssl.train.run import train
from runs import metrics, small_recipe, tensors_of, write_recipe

STAGES = [
    {"from_tokens": 3072, "sequence_length": 256, "rope_theta": 50_000},
    {"from_tokens": 5120, "sequence_length": 128},
]
POSITIONS = [16, 32, 48, 52, 56, 64, 72]
"""Where steps 1 to 7 end: 16 sequences of 64 tokens, 4 of 256, 8 of 128."""


def run(folder: Path, text: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    defaults: dict[str, Any] = {"data.stages": STAGES, "checkpoint.every_steps": 1, "checkpoint.keep_last": 99}
    defaults |= {"model.rope_theta": 10_000, "evaluate.every_steps": 3, "train.ema_decay": 0.9}
    recipe = small_recipe(text, folder / "run", text.parent / "lengths-cache", steps=7, **(defaults | changes))
    return train(load_recipe(write_recipe(folder / "recipe.yaml", recipe)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    return run(tmp_path_factory.mktemp("whole"), text_folder)


def back_to(out: Path, step: int) -> None:
    for path in checkpoints_path(out).iterdir():
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)


def without_clock(out: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "time"} for row in metrics(out)]


def theta(config: dict[str, Any]) -> float:
    return float(config["rope_parameters"]["rope_theta"])


def test_steps_keep_their_tokens(whole: Path) -> None:
    rows = [row for row in metrics(whole) if row["kind"] == "train"]
    assert [row["next_position"] for row in rows] == POSITIONS
    assert [row["tokens"] for row in rows] == [1024 * step for step in range(1, 8)]
    assert all(row["num_targets"] > 900 for row in rows)
    evaluations = [row for row in metrics(whole) if row["kind"] == "evaluate"]
    assert len({row["num_targets"] for row in evaluations}) == 1  # the same sequences in every stage


@pytest.mark.parametrize("step", [2, 3, 4, 5, 6])
def test_interrupted_around_a_change_equals_uninterrupted(
    tmp_path: Path, text_folder: Path, whole: Path, step: int
) -> None:
    copied = Path(shutil.copytree(whole, tmp_path / "run"))
    back_to(copied, step)
    run(tmp_path, text_folder)
    a, b = checkpoint.find_step(whole, None), checkpoint.find_step(copied, None)
    for name in ("model.safetensors", "optim.safetensors", "ema.safetensors"):
        ours, theirs = tensors_of(a, name), tensors_of(b, name)
        assert all(ours[key].equal(theirs[key]) for key in ours)
    for name in ("state.json", "ledger.jsonl", "config.json"):
        assert a.text(name) == b.text(name)
    assert without_clock(whole) == without_clock(copied)


def test_an_evaluation_that_is_due_where_a_run_goes_on_has_the_base_of_its_stage(
    tmp_path: Path, text_folder: Path, whole: Path
) -> None:
    every = {"evaluate.every_steps": 5}
    reference = run(tmp_path / "reference", text_folder, **every)
    copied = Path(shutil.copytree(whole, tmp_path / "run"))
    back_to(copied, 5)
    run(tmp_path, text_folder, **every)
    theirs, ours = (
        {row["step"]: row["loss"] for row in metrics(out) if row["kind"] == "evaluate"} for out in (reference, copied)
    )
    assert ours[5] == theirs[5] and ours[7] == theirs[7]


def test_checkpoints_and_exports_name_the_base_they_were_trained_with(whole: Path, tmp_path: Path) -> None:
    configs = [json.loads(checkpoint.find_step(whole, step).text("config.json")) for step in range(1, 8)]
    assert [theta(config) for config in configs] == [10_000] * 3 + [50_000] * 4
    assert {config["max_position_embeddings"] for config in configs} == {256}
    for step, wanted in ((3, 10_000), (7, 50_000)):
        out = export_run(whole, step, tmp_path / str(step), lambda _: None).path
        config = AutoConfig.from_pretrained(out)
        assert config.rope_parameters["rope_theta"] == wanted
        assert json.loads((out / "config.json").read_text())["rope_theta"] == wanted
        assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == 256
        said = (out / "README.md").read_text()
        assert ("From token 3,072 on sequences had 256 tokens." in said) == (step == 7)
        assert ("From token 3,072 on the base of rotary positions was 50000." in said) == (step == 7)


def test_a_base_alone_changes_the_losses_from_there_on(tmp_path: Path, text_folder: Path, whole: Path) -> None:
    stages = [{name: value for name, value in stage.items() if name != "rope_theta"} for stage in STAGES]
    other = run(tmp_path, text_folder, **{"data.stages": stages})
    ours, theirs = ([row["loss"] for row in metrics(out) if row["kind"] == "train"] for out in (whole, other))
    assert ours[:3] == theirs[:3]
    assert ours[3] != theirs[3]


def test_a_stage_may_be_added_ahead_and_not_behind(
    tmp_path: Path, text_folder: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = Path(shutil.copytree(whole, tmp_path / "run"))
    back_to(copied, 6)
    with pytest.raises(DataError, match=r"data\.stages changed for a part of the run"):
        run(tmp_path, text_folder, **{"data.stages": [{**STAGES[0], "rope_theta": 20_000}, STAGES[1]]})
    capsys.readouterr()
    run(tmp_path, text_folder, **{"data.stages": [*STAGES, {"from_tokens": 6144, "rope_theta": 90_000}]})
    said = " ".join(capsys.readouterr().out.split())
    assert "from step 7 on, the base of rotary positions is 90000" in said
    assert theta(json.loads(checkpoint.find_step(copied, 7).text("config.json"))) == 90_000


def test_positions_that_are_left_out_before_a_change(tmp_path: Path, text_folder: Path) -> None:
    """The change comes in the middle of a step, which ends there; the run makes up for its tokens with another step."""
    out = run(tmp_path, text_folder, **{"data.skip": [[3, 5], [40, 41]], "data.stages": STAGES[:1]})
    rows = [row for row in metrics(out) if row["kind"] == "train"]
    assert [row["next_position"] for row in rows] == [18, 34, 48, 52, 56, 60, 64, 68]
    assert [row["tokens"] for row in rows][:4] == [1024, 2048, 2048 + 13 * 64, 2048 + 13 * 64 + 1024]
