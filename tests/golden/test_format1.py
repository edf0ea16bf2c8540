"""A run folder of an earlier version, kept as it was, goes on under this one to the end that version gave it.

`format1/` was written by lmssl at checkpoint format 1: `run` as it was when killed after step 10 of 16, with a
checkpoint of step 8; `finished` from the same run left alone. It is never written again: what it asks of this version
is that format 1, its recipe and its data plane keep meaning what they meant.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lmssl import checkpoint
from lmssl.recipe.load import load_recipe
from lmssl.train.run import train
from runs import metrics

OLD = Path(__file__).parent / "format1"
GROUPS = ("model", "optim", "ema")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    run = tmp_path_factory.mktemp("format1") / "run"
    shutil.copytree(OLD / "run", run)
    overrides = [f"out={run}", f"data.cache={run.parent / 'cache'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)  # the old recipe has relative paths
        loaded = load_recipe(OLD / "recipe.yaml", overrides)
        return train(loaded)


def test_it_ends_with_the_old_versions_weights_states_and_averages(resumed: Path) -> None:
    """Bit for bit on the kind of processor that wrote it, to rounding on others."""
    found = checkpoint.find_step(resumed, None)
    assert found.step == 16
    for group in GROUPS:
        ours, theirs = found.tensors(group), load_file(OLD / "finished" / f"{group}.safetensors")
        assert set(ours) == set(theirs)
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)


def test_it_reads_the_same_text(resumed: Path) -> None:
    found = checkpoint.find_step(resumed, None)
    ours, theirs = json.loads(found.text("state.json")), json.loads((OLD / "finished/state.json").read_text())
    assert {key: ours[key] for key in ("step", "tokens_seen", "cursor", "skip", "skipped_steps", "epochs")} == {
        key: theirs[key] for key in ("step", "tokens_seen", "cursor", "skip", "skipped_steps", "epochs")
    }
    assert found.text("ledger.jsonl") == (OLD / "finished/ledger.jsonl").read_text()


def test_its_metrics_go_on_without_a_line_twice(resumed: Path) -> None:
    """The line of step 9 stood in the file when the run was killed, after the checkpoint of step 8."""
    ours = metrics(resumed)
    theirs = [json.loads(line) for line in (OLD / "finished/metrics.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["step"]) for row in ours] == [(row["kind"], row["step"]) for row in theirs]
    for mine, old in zip(ours, theirs, strict=True):
        shared = {key for key in old if key in mine} - {"time"}
        assert {"loss", "tokens", "num_targets"} <= shared
        assert all(_close(mine[key], old[key]) for key in shared), (mine, old)


def test_nothing_of_it_was_refused_or_passed_over(resumed: Path) -> None:
    sessions = [json.loads(line) for line in (resumed / "sessions.jsonl").read_text().splitlines()]
    assert [about["from_step"] for about in sessions] == [0, 8]


def _close(mine: Any, old: Any) -> bool:
    if isinstance(old, dict):
        return all(_close(mine[key], old[key]) for key in old)
    return mine == (pytest.approx(old, rel=1e-4) if isinstance(old, float) else old)
