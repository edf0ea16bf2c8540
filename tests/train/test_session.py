"""Continuing a run whose recipe leaves out other positions, or has other stages, than when it was saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lmssl import checkpoint, cli
from lmssl.checkpoint import checkpoints_path
from lmssl.data.ledger import Ledger
from lmssl.data.order import Order
from lmssl.errors import CheckpointError, DataError
from lmssl.export import export_run
from lmssl.recipe.load import load_recipe
from lmssl.train.run import train
from runs import metrics, small_recipe, tensors_of, write_recipe

BATCH = 16  # sequences
STEPS = 6


def run(folder: Path, text: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    defaults: dict[str, Any] = {"checkpoint.every_steps": 2, "checkpoint.keep_last": 9, "data.block_sequences": 16}
    recipe = small_recipe(text, folder / "run", text.parent / "session-cache", steps=STEPS, **(defaults | changes))
    return train(load_recipe(write_recipe(folder / "recipe.yaml", recipe)))


def back_to(out: Path, step: int) -> None:
    """Go back to an earlier checkpoint by removing newer ones."""
    for path in checkpoints_path(out).iterdir():
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)


def assert_equal_ends(ours: Path, theirs: Path) -> None:
    a, b = checkpoint.find_step(ours, None), checkpoint.find_step(theirs, None)
    assert a.step == b.step == STEPS
    first, second = tensors_of(a, "model.safetensors"), tensors_of(b, "model.safetensors")
    assert all(first[key].equal(second[key]) for key in first)
    assert a.text("state.json") == b.text("state.json")
    assert a.text("ledger.jsonl") == b.text("ledger.jsonl")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """A finished run without anything special."""
    return run(tmp_path_factory.mktemp("plain"), text_folder)


@pytest.fixture
def copied(plain: Path, tmp_path: Path) -> Path:
    """A copy of it in `tmp_path / "run"`."""
    return Path(shutil.copytree(plain, tmp_path / "run"))


def test_leaving_out_positions_ahead_equals_a_run_that_did_so_from_the_start(
    tmp_path: Path, plain: Path, copied: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The first range begins where step 2 ended, so the cursor moves at once.
    skip = [[2 * BATCH, 2 * BATCH + 5], [3 * BATCH, 4 * BATCH + 1]]
    whole = run(tmp_path / "whole", text_folder, **{"data.skip": skip})
    back_to(copied, 2)
    capsys.readouterr()
    run(tmp_path, text_folder, **{"data.skip": skip})
    assert "data.skip: 22 positions will be left out: 32 to 36, 48 to 64" in " ".join(capsys.readouterr().out.split())
    assert_equal_ends(copied, whole)
    a, b = (tensors_of(checkpoint.find_step(path, None), "model.safetensors") for path in (copied, plain))
    assert any(not a[key].equal(b[key]) for key in a)
    state = json.loads(checkpoint.find_step(copied, None).text("state.json"))
    assert state["skip"] == skip
    assert state["cursor"] == STEPS * BATCH + 22
    rows = [row for row in metrics(copied) if row["kind"] == "train"]
    assert [row["next_position"] for row in rows] == [16, 32, 70, 86, 102, 118]
    assert load_recipe(copied / "recipe.yaml").recipe.data.skip == ((32, 37), (48, 65))
    card = (export_run(copied, None, tmp_path / "export", lambda _: None).path / "README.md").read_text()
    assert "Positions of the data order that were left out: 32 to 36, 48 to 64." in card


def test_a_skip_behind_the_run_is_refused_and_nothing_is_touched(
    tmp_path: Path, copied: Path, text_folder: Path
) -> None:
    back_to(copied, 4)
    before = (copied / "recipe.yaml").read_bytes()
    with pytest.raises(
        CheckpointError, match="positions 60 to 63, and the run has passed them: its next is 64"
    ) as error:
        run(tmp_path, text_folder, **{"data.skip": [[60, 70]]})
    assert "step-00000004" in str(error.value) and "checkpoints" in str(error.value)
    assert (copied / "recipe.yaml").read_bytes() == before


def test_a_skip_that_was_passed_must_stay(tmp_path: Path, text_folder: Path) -> None:
    out = run(tmp_path, text_folder, **{"data.skip": [[4, 8], [32, 40]]})
    back_to(out, 2)  # read up to position 35: the second range has been entered
    for skip in ([], [[4, 8]], [[4, 9], [32, 40]], [[4, 8], [32, 41]]):
        with pytest.raises(CheckpointError, match=r"data\.skip changed for positions"):
            run(tmp_path, text_folder, **{"data.skip": skip})
    run(tmp_path, text_folder, **{"data.skip": [[4, 6], [6, 8], [32, 40], [90, 91]]})


def test_a_range_right_after_the_last_read_position_may_go(tmp_path: Path, copied: Path, text_folder: Path) -> None:
    out = run(tmp_path / "skipping", text_folder, **{"data.skip": [[32, 40]]})
    back_to(out, 2)
    run(tmp_path / "skipping", text_folder)
    a, b = (tensors_of(checkpoint.find_step(path, None), "model.safetensors") for path in (out, copied))
    assert all(a[key].equal(b[key]) for key in a)


def two_corpora(text: Path, **keys: Any) -> list[dict[str, Any]]:
    base = {"kind": "text", "document": "paragraph", "weight": 0.5}
    return [
        {"name": "one", "path": str(text / "part-[01].txt"), **base, **keys},
        {"name": "two", "path": str(text / "part-[23].txt"), **base},
    ]


def test_a_stage_added_ahead_equals_a_run_that_had_it_from_the_start(tmp_path: Path, text_folder: Path) -> None:
    mixture = {"data.mixture": two_corpora(text_folder)}
    stages = {"data.stages": [{"from_tokens": 2 * 1024, "weights": {"two": 1}}]}
    whole = run(tmp_path / "whole", text_folder, **mixture, **stages)
    out = run(tmp_path / "added", text_folder, **mixture)
    back_to(out, 4)
    with pytest.raises(DataError, match=r"data\.stages changed for a part of the run that lies before position 64"):
        run(tmp_path / "added", text_folder, **mixture, **stages)
    back_to(out, 2)
    run(tmp_path / "added", text_folder, **mixture, **stages)
    assert_equal_ends(out, whole)
    rows = [row["epochs"] for row in metrics(out) if row["kind"] == "train"]
    assert [row["one"] > 0 for row in rows] == [True] * 6
    assert rows[1]["one"] == rows[-1]["one"] and rows[1]["two"] < rows[-1]["two"]
    card = (export_run(out, None, tmp_path / "export", lambda _: None).path / "README.md").read_text()
    assert "From token 2,048 on the weights were: two 1." in card
    assert f"| one | text | 0.5 | {rows[-1]['one']:.2f} |" in card


def test_a_limit_of_epochs_holds_in_a_run_and_is_told(tmp_path: Path, text_folder: Path) -> None:
    limited = {"data.mixture": two_corpora(text_folder, max_epochs=0.01), "data.chunk_bytes": 8192}
    out = run(tmp_path, text_folder, **limited)
    rows = [row for row in metrics(out) if row["kind"] == "train"]
    assert rows[-1]["epochs"]["one"] == pytest.approx(0.01, rel=0.5)
    with pytest.raises(DataError, match="together they last for"):
        corpora = two_corpora(text_folder, max_epochs=0.01)
        corpora[1]["max_epochs"] = 0.01
        run(tmp_path / "none", text_folder, **{"data.mixture": corpora})


def test_a_longer_run_does_not_exceed_the_limit_of_its_epochs(
    tmp_path: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limited = {"data.mixture": two_corpora(text_folder, max_epochs=0.01), "data.chunk_bytes": 8192}
    limited |= {"schedule": {"kind": "constant"}}
    out = run(tmp_path, text_folder, **limited)
    longer = {"train.tokens": 24 * 1024}
    with pytest.raises(DataError, match=r"would read corpus 'one' 0\.0\d+ times, more than max_epochs: 0\.01"):
        run(tmp_path, text_folder, **limited, **longer)
    back_to(out, 4)
    run(tmp_path, text_folder, **limited, **{"train.tokens": 5 * 1024})  # fewer epochs, with the shares of before
    assert metrics(out)[-1]["step"] == 5
    capsys.readouterr()
    assert cli.main(["data", str(tmp_path / "recipe.yaml"), "--position", "0", "--count", "80", "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    stages = Ledger.load(checkpoint.find_step(out, 5).path / "ledger.jsonl").stages
    order = Order(stages, load_recipe(out / "recipe.yaml").recipe.data_seed)
    assert [{part["corpus"] for part in line["segments"]} for line in told] == [
        {order.locate(position)[0]} for position in range(80)
    ]


def test_validation_sets_are_reported_apart(tmp_path: Path, plain: Path, text_folder: Path) -> None:
    sets = [{"name": "exam", "kind": "text", "path": str(text_folder / "part-0.txt")}]
    out = run(tmp_path, text_folder, **{"data.validation": {"ratio": 0.05, "tokens": 2000, "sets": sets}})
    ours, theirs = (
        [{k: v for k, v in row.items() if k not in ("time", "sets")} for row in metrics(path)] for path in (out, plain)
    )
    assert ours == theirs  # the held-out split, and the training, are what they were
    evaluations = [row for row in metrics(out) if row["kind"] == "evaluate"]
    assert all(set(row["sets"]) == {"exam"} and set(row["corpora"]) == {"text"} for row in evaluations)
    assert evaluations[-1]["sets"]["exam"]["loss"] < evaluations[0]["sets"]["exam"]["loss"]
    card = (export_run(out, None, tmp_path / "export", lambda _: None).path / "README.md").read_text()
    assert f"- exam: loss {evaluations[-1]['sets']['exam']['loss']:.4f} nats per token" in card
